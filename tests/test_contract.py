"""What every model file promises, for every variant under both set-ups."""

import importlib
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

NAMES = ("convlstm", "predrnn", "sa_convlstm", "cms_lstm", "moderrnn", "ms_lstm")
CASES = [(name, setup, variant) for name in NAMES for setup in ("patch4", "fullres")
         for variant in importlib.import_module(name).VARIANTS]
SMALL = dict(size=16, hidden=8, layers=4, kernel=3, channels=1)


def small(name, setup, variant, **other):
    """A model a hundredth of the paper's size: a 4×4 or an 8×8 grid of tokens."""
    torch.manual_seed(0)
    patch = dict(patch4=4, fullres=2)[setup]
    return importlib.import_module(name).MODEL(setup=setup, variant=variant, **(SMALL | dict(patch=patch) | other))


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_shapes_and_roll_out(name, setup, variant):
    # In fp64: without LayerNorm a change of the frame can come out of four fresh layers at a 1e-10th of its size.
    model = small(name, setup, variant).eval().double()
    frames = torch.rand(2, 5, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        one_step, forecast = model(frames), model(frames, horizon=3)
        assert one_step.shape == (2, 4, 1, 16, 16) and forecast.shape == (2, 7, 1, 16, 16)
        # The observed frames are read alike, and the forecast goes on from the model's own predictions: feeding what
        # it predicted as if it had been observed must give the same again.
        torch.testing.assert_close(forecast[:, :4], one_step)
        torch.testing.assert_close(model(torch.cat([frames, forecast[:, 4:6]], 1), horizon=1), forecast)
        # Nothing is kept between calls, and a prediction sees the past only.
        torch.testing.assert_close(model(frames), one_step, rtol=0, atol=0)
        changed = frames.clone()
        changed[:, 3] += 1
        again = model(changed)
        torch.testing.assert_close(again[:, :3], one_step[:, :3], rtol=0, atol=0)
        assert (again[:, 3] - one_step[:, 3]).abs().amax() > 1e-12


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_scheduled_sampling(name, setup, variant):
    model = small(name, setup, variant).double()                  # how rows of a batch are told apart, not rounding
    frames = torch.rand(2, 6, 1, 16, 16, dtype=torch.float64)
    always, never = torch.ones(5, 2, dtype=torch.bool), torch.zeros(5, 2, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(model(frames, use_truth=always), model(frames))
        torch.testing.assert_close(model(frames, use_truth=never), model(frames[:, :1], horizon=5))
        observed = never.clone()
        observed[:3] = True                                       # three frames read, then its own predictions
        torch.testing.assert_close(model(frames, use_truth=observed), model(frames[:, :3], horizon=3))
        mixed = always.clone()
        mixed[1:, 1] = False                                      # one sequence of two
        both = model(frames, use_truth=mixed)
        torch.testing.assert_close(both[:1], model(frames[:1]))
        torch.testing.assert_close(both[1:], model(frames[1:, :1], horizon=5))


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_probabilities(name, setup, variant):
    model = small(name, setup, variant)
    for k in (0, 100, 300, 999, 1000):
        p = model.truth_probability(k, 1000, frames_in=10, steps=19)
        assert len(p) == 19 and all(0 <= v <= 1 for v in p)
    assert all(v == 0 for v in p[10:])                            # in the end the forecast is its own


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_extras_cost_nothing_when_not_asked(name, setup, variant):
    model = small(name, setup, variant)
    frames = torch.rand(2, 4, 1, 16, 16)
    plain = model(frames, horizon=2)
    for extras in ("loss", True, [(0, 1)]):
        out, found = model(frames, horizon=2, extras=extras)
        torch.testing.assert_close(out, plain)
        assert set(found) <= {"loss"} if extras == "loss" else len(found["layers"]) == len(model.cells)
        assert "loss" not in found or found["loss"].shape == ()
    assert all(h.shape[:2] == (2, 5) for h in found["layers"])


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_recompute_gives_the_same_gradients(name, setup, variant):
    model = small(name, setup, variant)
    frames, gradients = torch.rand(2, 4, 1, 16, 16), []
    for model.recompute in (False, True):
        model.zero_grad()
        out, found = model(frames, use_truth=torch.tensor([[1, 1], [1, 0], [0, 1]], dtype=torch.bool), extras="loss")
        (((out - frames[:, 1:]) ** 2).sum() + found.get("loss", 0)).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])      # every parameter is used
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_bf16_agrees_with_fp32(name, setup, variant):
    """To bf16's precision: some dozens of roundings of 0.4%. Where a random network magnifies roundings (attention
    after LayerNorm does, several layers deep), fp32's own show by how much: bf16 keeps 16 bits fewer."""
    model = small(name, setup, variant)
    frames = torch.rand(2, 6, 1, 16, 16)
    with torch.no_grad():
        fp32 = model(frames)
        with torch.autocast("cpu", torch.bfloat16):
            bf16 = model(frames)
        exact = model.double()(frames.double())
    assert bf16.dtype == torch.float32
    assert (bf16 - fp32).norm() < max(0.03 * exact.norm(), 2**16 * (fp32 - exact).norm()) < 0.5 * exact.norm()


@pytest.mark.parametrize("name, setup, variant", [
    pytest.param(*case, marks=pytest.mark.slow if case[1] == "fullres" else ()) for case in CASES])
def test_overfits_one_batch(name, setup, variant):
    # Without LayerNorm a layer of SA-ConvLSTM damps what it is given to a hundredth at the start, and more with SE before
    # its memory: through four the two sequences cannot be told apart for hundreds of steps (see its docstring).
    layers = 1 if setup == "fullres" and "sa_convlstm" in (name, *variant.split("_no_")) else 4
    model = small(name, setup, variant, hidden=16, layers=layers)
    frames = (torch.rand(2, 5, 1, 4, 4) > 0.5).float().repeat_interleave(4, 3).repeat_interleave(4, 4)
    optimizer, losses = torch.optim.Adam(model.parameters(), 5e-3), []
    while not losses or losses[-1] >= 0.25 * losses[0]:
        losses.append(((model(frames) - frames[:, 1:]) ** 2).sum((2, 3, 4)).mean())
        assert len(losses) <= 300, (losses[0], losses[-1])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()


@pytest.mark.parametrize("name", NAMES)
def test_refuses_what_cannot_be_built(name):
    model = importlib.import_module(name).MODEL
    for wrong in (dict(size=30), dict(size=(64, 2)), dict(setup="other"), dict(variant="other"), dict(kernel=4), dict(hidden=0)):
        with pytest.raises(ValueError) as caught:
            model(**(dict(setup="patch4") | wrong))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="32"):                   # names the nearest size
        model(setup="patch4", size=30)


@pytest.mark.parametrize("name", NAMES)
def test_stands_alone(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    out = subprocess.run([sys.executable, f"{name}.py"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "parameters" in out and "multiply-accumulates" in out and "(1, 20, 1, 64, 64)" in out
    train = f"""
import torch, {name}
model = {name}.MODEL(size=(16, 32), hidden=8, layers=2, kernel=3, channels=2)
optimizer = torch.optim.Adam(model.parameters())
frames = torch.rand(1, 4, 2, 16, 32)
loss = ((model(frames) - frames[:, 1:]) ** 2).sum(); loss.backward(); optimizer.step()
print(model(frames, horizon=2).shape)
"""
    out = subprocess.run([sys.executable, "-c", train], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "[1, 5, 2, 16, 32]" in out
