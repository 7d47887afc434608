"""bench.py: what it counts is right, both forms of a model are the same, and what it prints is what it found."""

import bench
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import train

CPU = torch.device("cpu")
TINY = dict(patch=16, layers=2, hidden=4, kernel=3)


def test_kept_bytes_by_hand():
    layer, x = nn.Linear(3, 5), torch.rand(7, 3)
    # sigmoid keeps its output, 7×5; the product keeps both factors: that output again and tanh's, 7×5, which tanh keeps
    # too
    def network(x):
        y = layer(x)
        return torch.sigmoid(y) * torch.tanh(y)

    network.parameters = layer.parameters
    assert bench.kept_bytes(network, x) == 4 * 2 * 7 * 5


def test_layer_outputs_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Sigmoid(), nn.Conv2d(2, 4, 1))
    assert bench.layer_output_bytes(model, torch.rand(3, 1, 8, 8)) == 4 * 3 * 64 * (2 + 4)


def test_steps_take_turns():
    calls, clock = [], iter(range(100))
    steps = {"one": lambda: calls.append(1), "two": lambda: calls.append(next(clock))}
    assert bench.in_turn(steps, repeats=2, clock=lambda: next(clock)) == {"one": [1, 1], "two": [2, 2]}
    assert calls == [1, 3, 1, 8]


def test_ceiling(monkeypatch):
    """A product of two matrices of n × n is 2n³ operations; the first of each kind is a warm-up."""
    monkeypatch.setattr(bench, "in_turn", lambda steps, repeats: {form: [1.0, 3.0, 2.0, 4.0] for form in steps})
    assert bench.ceiling(CPU, "fp32") == 2 * 2048**3 / 2


@pytest.mark.parametrize("setup", ("patch4", "fullres"))
@pytest.mark.parametrize("name", train.MODELS)
def test_straightforward_is_the_same(name, setup):
    ours = train.model_file(name).MODEL(setup=setup, size=16, layers=4, hidden=4, kernel=3)
    plain, frames = bench.Straightforward(name, ours), torch.rand(3, 5, 1, 16, 16)
    bench.check_equal(plain, ours, frames)
    with torch.no_grad():
        [*plain.parameters()][-3].add_(1e-3)
    with pytest.raises(AssertionError):
        bench.check_equal(plain, ours, frames)


@pytest.mark.parametrize("name", train.MODELS)
def test_bound_computes_what_a_step_does(name):
    """As many operations in convolutions and attention, forward and backward."""
    model = train.model_file(name).MODEL(setup="patch4", size=16, layers=2, hidden=4, kernel=3)
    frames, record = torch.rand(2, 4, 1, 16, 16), bench.Record()
    with FlopCounterMode(display=False) as step, record:
        model(frames).sum().backward()
    with FlopCounterMode(display=False) as again:
        record()
    assert again.get_flop_counts()["Global"] == step.get_flop_counts()["Global"]
    assert any("backward" in str(op) for op in step.get_flop_counts()["Global"])


def test_table(capsys, monkeypatch):
    """What it prints of time, memory and FLOP/s follows from what was found; what does not fit is said."""
    monkeypatch.setattr(bench, "ceiling", lambda device, precision: 1e11)
    for name in ("convlstm", "predrnn"):
        monkeypatch.setitem(train.model_file(name).NETWORK, "patch4", TINY)
    measured, found, step = bench.bench, [], train.train_step

    def kept(*arguments):
        found.append(measured(*arguments))
        return found[-1]

    def scarce(model, *rest):
        if isinstance(model, bench.Straightforward) and model.memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(model, *rest)

    monkeypatch.setattr(bench, "bench", kept)
    monkeypatch.setattr(train, "train_step", scarce)
    bench.main("convlstm predrnn --device cpu --batch 3 --frames 5 --repeats 3".split())
    out = capsys.readouterr().out
    (seconds, sizes), (others, _) = found
    assert "predrnn, patch4, straightforward: out of memory" in out and "straightforward" not in others
    block = out[out.index("convlstm, patch4"):out.index("predrnn, patch4")]
    rows = [line.split() for line in block.splitlines()[1:] if line]
    for row, form in zip(rows, [form for form in bench.FORMS if form in seconds or form in sizes], strict=True):
        numbers = row[len(form.split()):]
        if form in seconds:
            median = sorted(seconds[form])[1]
            assert len(seconds[form]) == 3 and numbers[0] == f"{median:.3f}"
            _, macs = train.cost(train.model_file("convlstm"), 5, setup="patch4")
            assert numbers[4] == f"{median / sorted(seconds['ours'])[1]:.3f}" and numbers[5] == f"{3 / median:.2f}"
            assert numbers[6:8] == [f"{18 * macs / median / 1e9:,.0f}", f"{18 * macs / median / 1e11:.1%}"]
        if form in sizes:
            assert numbers[-2:] == [f"{sizes[form] / 1e6:,.0f}", f"{sizes[form] / sizes['ours']:.3f}"]
    model, frames = train.model_file("convlstm").MODEL(), torch.rand(3, 5, 1, 64, 64)
    weights = sum(p.nbytes for p in model.parameters())
    kept = bench.kept_bytes(model, frames, use_truth=torch.ones(4, 3, dtype=torch.bool))
    assert sizes["ours"] == pytest.approx(4 * weights + kept, rel=0.05)                  # its mask is another
    assert sizes["ours, recompute"] < sizes["ours"]
    assert sizes["4·M_par + 2·M_out"] == 4 * weights + 2 * bench.layer_output_bytes(model, frames)


@pytest.mark.parametrize("arguments, says", [
    ("nosuch", "nosuch"), ("convlstm --device tpu", "tpu"), ("--batch 0", "--batch")])
def test_refusals(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments.split())
    assert ended.value.code == 2 and says in capsys.readouterr().err


@pytest.mark.parametrize("name", train.MODELS)
def test_bf16_follows_fp32(name):
    """The loss of a bf16 run stays beside that of an fp32 run; memories, predictions and gradients stay fp32.

    H, the first of every layer's states, goes into convolutions alone: it is rounded once to what they compute in.
    """
    losses = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = train.model_file(name).MODEL(size=16, hidden=8, layers=2, kernel=3, setup="patch4")
        frames = (torch.rand(4, 5, 1, 4, 4) > 0.5).float().repeat_interleave(4, 3).repeat_interleave(4, 4)
        config = dict(batch=4, precision=precision, loss="l2", optimizer="adam", lr=2e-3, weight_decay=0.0)
        optimizer, hidden, dtypes = train.make_optimizer(model, config), set(), set()
        step, mask = model.step, torch.ones(4, 4, dtype=torch.bool)

        def watched(*arguments):
            out = step(*arguments)
            layers, *zigzag = out[1] if isinstance(out[1], tuple) else (out[1],)
            hidden.update(layer[0].dtype for layer in layers)
            dtypes.update(t.dtype for t in (out[0], *zigzag, *(t for layer in layers for t in layer[1:])))
            return out

        model.step = watched
        losses[precision] = [train.train_step(model, optimizer, frames, mask, config).item() for _ in range(40)]
        assert dtypes == {torch.float32} and hidden == {torch.bfloat16 if precision == "bf16" else torch.float32}
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    first, last = (abs(losses["bf16"][k] - losses["fp32"][k]) / losses["fp32"][k] for k in (0, -1))
    assert losses["fp32"][-1] < 0.8 * losses["fp32"][0] and first < 0.02 and last < 0.1, (first, last, losses)
