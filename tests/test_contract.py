"""What every model file promises, for every variant under both set-ups."""

import copy
import importlib
import io
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
    # Without LayerNorm a layer of SA-ConvLSTM damps what it is given to a hundredth at the start, and more with SE
    # before its memory: through four the two sequences cannot be told apart for hundreds of steps (see its docstring).
    attends = "sa_convlstm" in (name, *variant.split("_no_"))
    layers = 4 if setup == "patch4" or name == "ms_lstm" else 1 if attends else 2       # four make a pyramid of MS-LSTM
    model = small(name, setup, variant, hidden=16, layers=layers)
    frames = (torch.rand(2, 4, 1, 4, 4) > 0.5).float().repeat_interleave(4, 3).repeat_interleave(4, 4)
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
    for wrong in (dict(size=30), dict(size=(64, 2)), dict(setup="other"), dict(variant="other"), dict(kernel=4),
                  dict(hidden=0)):
        with pytest.raises(ValueError) as caught:
            model(**(dict(setup="patch4") | wrong))
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="^setup 'other': choose from patch4, fullres$"):
        model(setup="other")
    with pytest.raises(ValueError, match="^variant 'other': choose from .*full"):
        model(variant="other")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("size", [(30, 30), (30, 40), (50, 64), (62, 3), (1, 999)])
def test_names_the_nearest_sizes(name, size):
    """Those that build, of each side the nearest; a side that fits stays."""
    model = importlib.import_module(name).MODEL
    unit = dict(cms_lstm=16, ms_lstm=8).get(name, 4)              # the patch, times what the scales or the poolings cut
    fits = [[s for s in range(unit, 1100, unit) if abs(s - side) == min(abs(t - side) for t in range(unit, 1100, unit))]
            for side in size]
    with pytest.raises(ValueError) as caught:
        model(setup="patch4", size=size)
    named = str(caught.value).rpartition(": ")[2].split(", ")
    assert named == [f"{h}×{w}" for h in fits[0] for w in fits[1]]
    for one in named:
        with torch.device("meta"):
            model(setup="patch4", size=tuple(map(int, one.split("×"))), hidden=4, layers=4)


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_refuses_frames_that_it_cannot_read(name, setup, variant):
    model = small(name, setup, variant)
    one_size = setup == "patch4" or variant == "peephole"
    for shape, horizon, text in [((1, 1, 1, 16, 16), 0, "horizon at least 1"), ((1, 0, 1, 16, 16), 3, "horizon"),
                                 ((1, 3, 2, 16, 16), 0, r"\(B, T, 1, H, W\)"),
                                 ((3, 1, 16, 16), 0, r"\(B, T, 1, H, W\)"),
                                 ((1, 3, 1, 16, 17), 0, "16×16"),
                                 ((1, 3, 1, 32, 16), 0, r"fit 16×16 alone; build the model with size=\(32, 16\)")]:
        if text.startswith("fit") and not one_size:
            assert model(torch.rand(shape)).shape == (1, 2, 1, 32, 16)
            continue
        with pytest.raises(ValueError, match=text) as caught:
            model(torch.rand(shape), horizon=horizon)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_is_saved_whole_and_copied(name, setup, variant):
    model, frames = small(name, setup, variant, layers=2), torch.rand(1, 3, 1, 16, 16)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.no_grad():
        for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
            torch.testing.assert_close(other(frames, horizon=2), model(frames, horizon=2), rtol=0, atol=0)


@pytest.mark.parametrize("name, setup", [(name, setup) for name in NAMES for setup in ("patch4", "fullres")])
def test_is_exported_and_compiled_whole(name, setup):
    """torch.export and torch.compile see one graph, for frames of one shape."""
    model, frames = small(name, setup, "full", layers=2).eval(), torch.rand(2, 2, 1, 16, 16)
    with torch.no_grad():
        forecast = model(frames, horizon=2)
        exported = torch.export.export(model, (frames,), dict(horizon=2)).module()
        torch.testing.assert_close(exported(frames, horizon=2), forecast)
        torch._dynamo.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(frames, horizon=2), forecast)


@pytest.mark.parametrize("name", NAMES)
def test_says_where_it_is_from(name):
    """A copied file names its project and its licence."""
    project = (ROOT / "README.md").read_text().partition("\n")[0].removeprefix("# ")
    copyright = next(line for line in (ROOT / "LICENSE").read_text().splitlines() if line.startswith("Copyright"))
    head = " ".join((ROOT / f"{name}.py").read_text().splitlines()[:5])
    assert project in head and "MIT licence" in head and copyright.lower() in head.lower()


@pytest.mark.parametrize("name", NAMES)
def test_stands_alone(name, tmp_path):
    shutil.copy(ROOT / f"{name}.py", tmp_path)
    script = f"""
import runpy
runpy.run_path("{name}.py", run_name="__main__")
import torch, {name}
model = {name}.MODEL(size=(16, 32), hidden=8, layers=2, kernel=3, channels=2)
optimizer = torch.optim.Adam(model.parameters())
frames = torch.rand(1, 4, 2, 16, 32)
loss = ((model(frames) - frames[:, 1:]) ** 2).sum(); loss.backward(); optimizer.step()
print(model(frames, horizon=2).shape)
"""
    command = [sys.executable, "-c", script]
    out = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert "parameters" in out and "multiply-accumulates" in out and "(1, 20, 1, 64, 64)" in out
    assert "[1, 5, 2, 16, 32]" in out
