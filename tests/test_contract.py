"""What every model file promises, for every variant under both set-ups."""

import copy
import importlib
import pickle
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from conftest import ROOT, layers_of
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import train

NAMES = ("convlstm", "predrnn", "sa_convlstm", "cms_lstm", "moderrnn", "ms_lstm")
CASES = [(name, setup, variant) for name in NAMES for setup in ("patch4", "fullres")
         for variant in importlib.import_module(name).VARIANTS]
SMALL = dict(size=16, hidden=8, layers=4, kernel=3, channels=1)


def small(name, setup, variant, **other):
    """A model a hundredth of the paper's size: a 4×4 or an 8×8 grid of tokens."""
    torch.manual_seed(0)
    patch = dict(patch4=4, fullres=2)[setup]
    return importlib.import_module(name).MODEL(setup=setup, variant=variant, **(SMALL | dict(patch=patch) | other))


def predictions_and_loss(model, *args, **options):
    """The loss is 0 for a model that adds none of its own."""
    if getattr(model, "has_auxiliary_loss", False):
        return model(*args, with_loss=True, **options)
    return model(*args, **options), 0


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_shapes_and_roll_out(name, setup, variant):
    model = small(name, setup, variant).eval().double()
    frames = torch.rand(2, 5, 1, 16, 16, dtype=torch.float64)
    with torch.no_grad():
        one_step, forecast = model(frames), model(frames, horizon=3)
        assert one_step.shape == (2, 4, 1, 16, 16) and forecast.shape == (2, 7, 1, 16, 16)
        # The forecast continues from the model's own predictions: given as observed frames, they predict the same.
        torch.testing.assert_close(forecast[:, :4], one_step)
        torch.testing.assert_close(model(torch.cat([frames, forecast[:, 4:6]], 1), horizon=1), forecast)
        # Nothing is kept between calls, and a prediction depends on the past only.
        torch.testing.assert_close(model(frames), one_step, rtol=0, atol=0)
        changed = frames.clone()
        changed[:, 3] += 1
        again = model(changed)
        torch.testing.assert_close(again[:, :3], one_step[:, :3], rtol=0, atol=0)
        assert (again[:, 3] - one_step[:, 3]).abs().amax() > 1e-12      # four fresh layers may damp it by 1e-10


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_scheduled_sampling(name, setup, variant):
    model = small(name, setup, variant).double()
    frames = torch.rand(2, 6, 1, 16, 16, dtype=torch.float64)
    always, never = torch.ones(5, 2, dtype=torch.bool), torch.zeros(5, 2, dtype=torch.bool)
    with torch.no_grad():
        torch.testing.assert_close(model(frames, use_truth=always), model(frames))
        torch.testing.assert_close(model(frames, use_truth=never), model(frames[:, :1], horizon=5))
        mixed = always.clone()
        mixed[3:, 0] = False                                      # one sequence reads three frames, the other one frame
        mixed[1:, 1] = False
        both = model(frames, use_truth=mixed)
        torch.testing.assert_close(both[:1], model(frames[:1, :3], horizon=3))
        torch.testing.assert_close(both[1:], model(frames[1:, :1], horizon=5))
    for k in (0, 300, 999, 1000):
        p = model.truth_probability(k, 1000, frames_in=10, steps=19)
        assert len(p) == 19 and all(0 <= v <= 1 for v in p)
    assert all(v == 0 for v in p[10:])                            # at the end of the training


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_every_parameter_is_trained(name, setup, variant):
    """And a training script may put something around `step`: checkpointing gives the same gradients."""
    model = small(name, setup, variant)
    frames, gradients = torch.rand(2, 4, 1, 16, 16), []
    for step in (model.step, partial(checkpoint, model.step, use_reentrant=False)):
        model.zero_grad()
        model.step = step
        out, loss = predictions_and_loss(model, frames, use_truth=torch.tensor([[1, 1], [1, 0], [0, 1]]) == 1)
        (((out - frames[:, 1:]) ** 2).sum() + loss).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for a, b in zip(*gradients):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_every_memory_layout_gives_the_same(name, setup, variant):
    channels, patch = dict(patch4=(2, 4), fullres=(1, 1))[setup]  # a single token channel: strides that are ambiguous
    plain = torch.rand(2, 3, channels, 16, 16, dtype=torch.float64)
    by_pixel = plain.permute(0, 2, 3, 4, 1).contiguous().permute(0, 4, 1, 2, 3)       # from (B, C, H, W, T)
    channels_last = plain.permute(0, 1, 3, 4, 2).contiguous().permute(0, 1, 4, 2, 3)              # (B, T, H, W, C)
    results = []
    for frames, memory_format in [(plain, torch.contiguous_format), (by_pixel, torch.contiguous_format),
                                  (plain, torch.channels_last), (channels_last, torch.channels_last)]:
        model = small(name, setup, variant, layers=2, channels=channels, patch=patch)
        model = model.double().to(memory_format=memory_format)
        out = model(frames, horizon=1)
        out.square().sum().backward()
        results.append([out.detach()] + [p.grad for p in model.parameters() if p.grad is not None])
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


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
        half = model.half()(frames.half())
    assert bf16.dtype == torch.float32 and half.dtype == torch.float16 and half.isfinite().all()
    bound = max(0.03 * exact.norm(), 2**16 * (fp32 - exact).norm())
    assert (bf16 - fp32).norm() < bound < 0.5 * exact.norm() and (half - fp32).norm() < bound


@pytest.mark.parametrize("name, setup, variant", [
    pytest.param(*case, marks=() if case[1:] == ("patch4", "full") else pytest.mark.slow) for case in CASES])
def test_overfits_one_batch(name, setup, variant):
    # Without LayerNorm a fresh layer of SA-ConvLSTM passes on a hundredth of its input, and less with SE before its
    # memory: through four of them, the two sequences cannot be told apart for hundreds of iterations.
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


def refused(call, *texts):
    with pytest.raises(ValueError) as caught:
        call()
    assert all(text in str(caught.value) for text in texts) and "\n" not in str(caught.value), caught.value


@pytest.mark.parametrize("name", NAMES)
def test_refuses_what_cannot_be_built(name):
    build = partial(importlib.import_module(name).MODEL, setup="patch4")
    refused(partial(build, size=30), "30×30", "multiple")
    refused(partial(build, size=(64, 2)), "64×2", "multiple")
    refused(partial(build, setup="other"), "'other'", "patch4", "fullres")
    refused(partial(build, variant="other"), "'other'", "full")
    refused(partial(build, kernel=4), "kernel", "odd")
    for option in ("hidden", "layers", "patch"):
        refused(partial(build, **{option: 0}), option, "positive")
    refused(partial(build, channels=0), "(B, T, 0, H, W)")


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_refuses_frames_that_it_cannot_read(name, setup, variant):
    model = small(name, setup, variant)
    for shape, horizon in [((1, 1, 1, 16, 16), 0), ((1, 0, 1, 16, 16), 3), ((0, 3, 1, 16, 16), 0), ((3, 1, 16, 16), 0),
                           ((1, 3, 2, 16, 16), 0), ((1, 3, 1, 16, 16), -2)]:
        refused(lambda: model(torch.rand(shape), horizon), f"frames {shape}, horizon {horizon}", "(B, T, 1, H, W)")
    refused(lambda: model(torch.rand(1, 3, 1, 16, 17)), "16×17", "multiple")
    if setup == "patch4" or variant == "peephole":
        refused(lambda: model(torch.rand(1, 3, 1, 32, 16)), "fit one size", "size=(32, 16)")
    else:
        assert model(torch.rand(1, 3, 1, 32, 16)).shape == (1, 2, 1, 32, 16)


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_maps(name, setup, variant):
    model, frames = small(name, setup, variant), torch.rand(2, 3, 1, 16, 16)
    plain = model(frames, horizon=1)
    maps = train.maps(model, frames, horizon=1, point=(9, 14))
    for picture in {picture for picture, *_ in maps}:
        for values in layers_of(maps, picture):
            shapes = {(*value.shape[:2], value.dim()) for value in values.values()}
            assert shapes == {(2, 3, 4 if picture == "attention" else 5)}
            if picture == "attention":                            # of one or more softmaxes, each of sum 1
                total = sum(value.sum((2, 3)) for value in values.values())
                torch.testing.assert_close(total, total.round())
    # The last layer's H are what the predictions were made from.
    tokens = torch.stack([model.output(h) for h in maps["layers", 3, "H"].unbind(1)], 1)
    torch.testing.assert_close(F.pixel_shuffle(tokens, model.patch), plain)
    with pytest.raises(RuntimeError):
        train.maps(model, frames.double())
    assert not any(m._forward_hooks for m in model.modules())
    torch.testing.assert_close(model(frames, horizon=1), plain, rtol=0, atol=0)


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_is_pickled_and_copied(name, setup, variant):
    model, frames = small(name, setup, variant, layers=2), torch.rand(1, 3, 1, 16, 16)
    for other in (pickle.loads(pickle.dumps(model)), copy.deepcopy(model)):
        torch.testing.assert_close(other(frames, horizon=2), model(frames, horizon=2), rtol=0, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_is_exported_and_compiled_whole(name):
    """torch.export takes the whole roll-out, torch.compile a step, each as one graph."""
    variant, frames = "v2" if name == "predrnn" else "full", torch.rand(2, 2, 1, 16, 16)
    model = small(name, "fullres", variant, layers=2)
    exported = torch.export.export(model, (frames,), dict(horizon=1)).module()
    torch.testing.assert_close(exported(frames, horizon=1), model(frames, horizon=1))
    torch._dynamo.reset()
    model = small(name, "patch4", variant, layers=2)
    plain = predictions_and_loss(model, frames, horizon=1)
    model.step = torch.compile(model.step, fullgraph=True, backend="eager")
    torch.testing.assert_close(predictions_and_loss(model, frames, horizon=1), plain)


def test_each_file_stands_alone(tmp_path):
    """It names its project and licence, and trains where nothing else of the project is."""
    project = (ROOT / "README.md").read_text().partition("\n")[0].removeprefix("# ")
    copyright = next(line for line in (ROOT / "LICENSE").read_text().splitlines() if line.startswith("Copyright"))
    for name in NAMES:
        head = " ".join((ROOT / f"{name}.py").read_text().splitlines()[:5])
        assert project in head and "MIT licence" in head and copyright.lower() in head.lower()
        (tmp_path / name).mkdir()
        shutil.copy(ROOT / f"{name}.py", tmp_path / name)
    script = """
import importlib, sys, torch
for name in sys.argv[1:]:
    sys.path[0] = name
    model = importlib.import_module(name).MODEL(size=(16, 32), hidden=8, layers=2, kernel=3, channels=2)
    optimizer = torch.optim.Adam(model.parameters())
    frames = torch.rand(1, 4, 2, 16, 32)
    loss = ((model(frames) - frames[:, 1:]) ** 2).sum(); loss.backward(); optimizer.step()
    print(*model(frames, horizon=2).shape)
"""
    command = [sys.executable, "-c", script, *NAMES]
    assert subprocess.check_output(command, cwd=tmp_path, text=True).splitlines() == ["1 5 2 16 32"] * len(NAMES)
