"""bench.py: the straightforward form of every model is ours, and what is printed is what was measured."""

import bench
import pytest
import torch

import train

CPU = torch.device("cpu")


def outcome(form, embed, frames, mask):
    """In fp64, predictions and the gradient of the first layer, into which all others and all steps go."""
    predictions = form(frames, use_truth=mask)
    return predictions, *torch.autograd.grad(predictions.square().sum(), embed.weight)


@pytest.mark.parametrize("setup", ("patch4", "fullres"))
@pytest.mark.parametrize("name", train.MODELS)
def test_straightforward_is_the_same(name, setup):
    ours = train.model_file(name).MODEL(setup=setup, size=16, layers=4, hidden=4, kernel=3).double()
    plain, frames = bench.Straightforward(name, ours).double(), torch.rand(3, 5, 1, 16, 16, dtype=torch.float64)
    mask = (torch.arange(4)[:, None] + torch.arange(3)) % 2 == 0      # sequences read truth and predictions in turn
    expected = outcome(ours, ours.embed, frames, mask)
    torch.testing.assert_close(outcome(plain, plain.model.embed, frames, mask), expected, rtol=1e-6, atol=1e-9)
    with torch.no_grad():
        [*plain.parameters()][-3].add_(1e-3)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(outcome(plain, plain.model.embed, frames, mask), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seconds, calls", [(1, 3), (0.05, 20)])
def test_slow_steps_are_repeated_three_times(seconds, calls):
    now, called = [0.0], []

    def step():
        now[0] += seconds if len(called) else 10                      # the first call compiles
        called.append(1)

    assert bench.measure(step, clock=lambda: now[0]) == pytest.approx([1e3 * seconds] * calls)
    assert len(called) == 1 + calls


def test_a_profile_is_of_one_step():
    a = torch.rand(64, 64)
    rows = bench.profile(lambda: [a @ a for _ in range(7)], CPU)
    times = [milliseconds for milliseconds, _, _ in rows]
    assert times == sorted(times, reverse=True) and ("aten::mm", 7) in [(name, calls) for _, calls, name in rows]


def test_lines(capsys, monkeypatch):
    """Each form when it is measured; the step in between is a real one of a small network."""
    module, made, said = train.model_file("ms_lstm"), [], []
    monkeypatch.setitem(module.NETWORK, "fullres", dict(patch=4, layers=2, hidden=4, kernel=3))

    def measured(step):
        said.append(capsys.readouterr().out)
        made.append(step())
        return [250.0, 500.0, 2000.0]

    monkeypatch.setattr(bench, "measure", measured)
    bench.main(["ms_lstm", "--device", "cpu", "--profile"])
    said.append(capsys.readouterr().out)
    assert made[1].isfinite() and said[0].count("\n") == 1 and "torch" in said[0]
    for form, line in zip(bench.FORMS["cpu"], said[1:], strict=True):
        assert line.startswith(f"ms_lstm, batch 2, {form}: 500.00 ms (250.00 – 2000.00), 4.0 sequences/s\n")
    assert "aten::convolution" in said[1] and said[1].count("\n") == 31 and said[2].count("\n") == 1


@pytest.mark.parametrize("arguments, says", [("nosuch", "nosuch"), ("convlstm --device tpu", "tpu")])
def test_refusals(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and says in error and error.count("\n") == 1
