"""`--bench`: what it counts is right, and what it prints is what it found."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import train


def test_kept_bytes_by_hand():
    layer, x = nn.Linear(3, 5), torch.rand(7, 3)
    # sigmoid keeps its output, 7×5; the product keeps both factors: that output again and tanh's, 7×5, which tanh keeps too
    def network(x):
        y = layer(x)
        return torch.sigmoid(y) * torch.tanh(y)

    network.parameters = layer.parameters
    assert train.kept_bytes(network, x) == 4 * 2 * 7 * 5


def test_layer_outputs_by_hand():
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.Sigmoid(), nn.Conv2d(2, 4, 1))
    assert train.layer_output_bytes(model, torch.rand(3, 1, 8, 8)) == 4 * 3 * 64 * (2 + 4)


def test_timed_leaves_the_warm_up_out():
    calls = []
    assert len(train.timed(lambda: calls.append(1), torch.device("cpu"), repeats=3, warm_up=2)) == 3 and len(calls) == 5


def test_ceilings(monkeypatch):
    """A product of two matrices of n × n is 2n³ operations; a copy reads and writes 4n² bytes each."""
    monkeypatch.setattr(train, "timed", lambda work, device, repeats: work() is None or [3.0, 2.0, 4.0])
    assert train.ceilings(torch.device("cpu"), "fp32") == (2 * 2048**3 / 2, 2 * 4 * 2048**2 / 2)


def test_a_model_too_large_for_the_bench_is_said_and_passed_over(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ceilings", lambda device, precision: (1e11, 1e10))
    monkeypatch.setitem(train.model_file("predrnn").NETWORK, "patch4", dict(patch=16, layers=1, hidden=2, kernel=3))
    bench = train.bench

    def scarce(name, *rest, **named):
        if name == "convlstm":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return bench(name, *rest, **named)

    monkeypatch.setattr(train, "bench", scarce)
    file = tmp_path / "bench.json"
    assert train.main(["--bench", "convlstm", "predrnn", "--device", "cpu", "--batch", "1", "--json", str(file)]) == 0
    assert "out of memory" in capsys.readouterr().out
    assert [row["model"] for row in json.loads(file.read_text())["models"]] == ["predrnn"]


def test_bench(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "ceilings", lambda device, precision: (1e11, 1e10))
    monkeypatch.setitem(train.model_file("convlstm").NETWORK, "patch4", dict(patch=16, layers=2, hidden=4, kernel=3))
    file = tmp_path / "bench.json"
    assert train.main(["--bench", "convlstm", "--device", "cpu", "--batch", "3", "--json", str(file)]) == 0
    out, report = capsys.readouterr().out, json.loads(file.read_text())
    row, = report["models"]
    assert (row["model"], row["setup"], row["batch"]) == ("convlstm", "patch4", 3)
    assert (report["matmul_flops"], report["copy_bytes_per_second"]) == (1e11, 1e10)
    assert row["seconds"] == sorted(row["all_seconds"])[1] and len(row["all_seconds"]) == 3
    parameters, macs = train.cost(train.model_file("convlstm"), "patch4", "full", 1, 64, 20)
    assert row["flops"] == pytest.approx(6 * macs * 3 / row["seconds"])
    assert row["sequences_per_second"] == pytest.approx(3 / row["seconds"])
    model, frames = train.model_file("convlstm").MODEL(), torch.rand(3, 20, 1, 64, 64)
    kept = train.kept_bytes(model, frames, use_truth=torch.ones(19, 3, dtype=torch.bool))
    assert row["memory_bytes"] == pytest.approx(16 * parameters + kept, rel=0.05)        # its mask is another
    assert row["cost_model_bytes"] == 16 * parameters + 2 * train.layer_output_bytes(model, frames)
    assert f"{row['seconds']:.3f} (" in out and f"{row['flops'] / 1e11:.1%}" in out
    assert train.main(["--bench", "convlstm", "--device", "cpu", "--batch", "3", "--recompute", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["models"][0]["memory_bytes"] < row["memory_bytes"]


@pytest.mark.parametrize("arguments, says", [
    ("--bench nosuch --device cpu", "nosuch"), ("--bench convlstm --lr 1", "--lr"), ("convlstm --json x", "--json")])
def test_refusals(arguments, says, capsys):
    assert train.main(arguments.split()) == 2
    err = capsys.readouterr().err
    assert says in err and err.count("\n") == 1 and not Path("x").exists()


@pytest.mark.parametrize("name", train.MODELS)
def test_bf16_follows_fp32(name):
    """The loss of a bf16 run stays beside that of an fp32 run, and states, predictions and gradients stay fp32."""
    losses = {}
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = train.model_file(name).MODEL(size=16, hidden=8, layers=2, kernel=3, setup="patch4")
        frames = (torch.rand(4, 5, 1, 4, 4) > 0.5).float().repeat_interleave(4, 3).repeat_interleave(4, 4)
        config = dict(batch=4, precision=precision, loss="l2", optimizer="adam", lr=2e-3, weight_decay=0.0)
        optimizer, dtypes = train.make_optimizer(model, config), []
        step, mask = model.step, torch.ones(4, 4, dtype=torch.bool)

        def watched(*arguments):
            out = step(*arguments)
            dtypes.extend(t.dtype for t in torch.utils._pytree.tree_leaves(out[:2]) if isinstance(t, torch.Tensor))
            return out

        model.step = watched
        losses[precision] = [train.train_step(model, optimizer, frames, mask, config).item() for _ in range(40)]
        assert set(dtypes) == {torch.float32}
        assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    first, last = (abs(losses["bf16"][k] - losses["fp32"][k]) / losses["fp32"][k] for k in (0, -1))
    assert losses["fp32"][-1] < 0.8 * losses["fp32"][0] and first < 0.02 and last < 0.1, (first, last, losses)
