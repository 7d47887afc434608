"""The training step: nothing in it that a CUDA graph cannot hold, and by a graph the same as without one.

Without a GPU a graph is stood in for by calling again what was recorded, and a step runs on the meta device, which has
no values: what needs one is seen. The last section needs a GPU.
"""

import copy
import functools
import itertools
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import nullcontext

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train

CPU, CUDA, STEP = torch.device("cpu"), torch.device("cuda"), train.Step
EVERY = [(name, variant, setup) for name in train.MODELS for variant in train.model_file(name).VARIANTS
         for setup in ("patch4", "fullres")]


def settings(name="convlstm", setup="patch4", **other):
    training = train.model_file(name).TRAINING[setup]
    return dict(batch=2, precision="fp32", loss=training["loss"], optimizer=training["optimizer"], lr=1e-3,
                weight_decay=training.get("weight_decay", 0.0), reverse=True, frames_in=2, horizon=2, schedule=10,
                seed=0) | other


# ------------------------------------------------------------------------------------ what a graph cannot hold, on meta

class Refused(Exception):
    pass


class WatchCalls(TorchFunctionMode):
    """Refuses what only the Python side shows: values from or for the host, lists and masks as indices."""

    HOST = {torch.Tensor.item, torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.Tensor.__bool__,
            torch.Tensor.__int__, torch.Tensor.__float__, torch.Tensor.__index__, torch.Tensor.__contains__,
            torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.HOST:
            raise Refused(f"{func.__name__}: a value passes between the host and the device")
        if func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__):
            for index in args[1] if isinstance(args[1], tuple) else args[1:2]:
                mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
                if mask or isinstance(index, (list, np.ndarray)):
                    raise Refused("a list or a mask as an index")
        return func(*args, **kwargs or {})


class WatchOps(TorchDispatchMode):
    """Refuses what an op of forward, backward or optimiser would wait for: values, shapes by value, other devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        tensors = [v for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)]
        devices = [v.device for v in tensors] + [torch.device(kwargs.get("device") or "meta")]
        if tensors and any(device.type != "meta" for device in devices):
            raise Refused(f"{name} between the host and the device")
        if name.startswith(("index", "_index", "_unsafe_index")):       # by numbers they have the shape of the numbers
            if any(v.dtype in (torch.bool, torch.uint8) for v in tree_leaves(args[1]) if isinstance(v, torch.Tensor)):
                raise Refused(f"{name} by a mask")
        elif torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise Refused(f"{name} depends on values")
        return func(*args, **kwargs)


@pytest.fixture
def on_meta(monkeypatch):
    """A step on the meta device. SGD: torch's Adam knows no meta, and what CUDA gets instead is asserted below."""
    monkeypatch.setattr(train, "autocast", lambda device, precision: nullcontext())
    monkeypatch.setattr(train, "make_optimizer", lambda model, config: torch.optim.SGD(
        model.parameters(), lr=config["lr"], foreach=False))

    def step(model, config):
        with torch.device("meta"):
            frames = torch.empty(2, 3, 1, *model.size)
            mask = torch.empty(2, 2, dtype=torch.bool)
        step = train.Step(model, config, torch.device("meta"))
        with WatchCalls(), WatchOps():
            return step(frames, mask, 1e-3)

    return step


@pytest.mark.parametrize("name, variant, setup", EVERY)
def test_nothing_in_a_step_waits(name, variant, setup, on_meta):
    with torch.device("meta"):
        model = train.model_file(name).MODEL(size=16, patch=4, layers=2, setup=setup, variant=variant)
    for model.recompute in (False, True) if variant == "full" else (False,):
        assert on_meta(model, settings(name, setup, reverse=False)).device.type == "meta"


HOST_SCALAR, HOST_INDEX = torch.tensor(2.0), torch.tensor([0, 1])


SEEN_IN_PYTHON = [
    lambda x: x * x.mean().tolist(), lambda x: x * torch.tensor(2.0, device=x.device), lambda x: x.cpu().to(x.device),
    lambda x: x + x[[0, 1]], lambda x: x + x[:, np.array([0])], lambda x: x + torch.as_tensor([1.0], device=x.device)]
SEEN_IN_OPS = [
    lambda x: x if x.mean() > 0 else -x, lambda x: x * x.mean().item(), lambda x: x * float(x.mean()),
    lambda x: x * int(x.flatten()[0]), lambda x: x * HOST_SCALAR, lambda x: x + x[HOST_INDEX],
    lambda x: x.to("cpu").to(x.device), lambda x: x + torch.ones(1).to(x.device, non_blocking=True),
    lambda x: x + torch.from_numpy(np.ones(1, np.float32)).to(x.device),
    lambda x: x + x[x > 0].sum(), lambda x: x.index_put((x > 0,), x.sum()), lambda x: x + x.masked_select(x > 0).sum(),
    lambda x: x + (x > 0).nonzero().sum(), lambda x: x + torch.where(x > 0)[0].sum(), lambda x: x + x.unique().sum(),
    lambda x: x + torch.repeat_interleave(x.long().flatten()).sum(), lambda x: x if torch.equal(x, x) else -x,
    lambda x: x if x.isfinite().all() else -x]


@pytest.mark.parametrize("where, fault", [("forward", fault) for fault in SEEN_IN_PYTHON + SEEN_IN_OPS] + [
    ("backward", fault) for fault in SEEN_IN_OPS])
def test_what_would_wait_is_found(where, fault, on_meta):
    with torch.device("meta"):
        model = train.model_file("convlstm").MODEL(size=16, hidden=2, layers=1, kernel=3)
    embed = model.embed.forward
    if where == "forward":
        model.embed.forward = lambda x: embed(fault(x))
    else:
        model.embed.forward = lambda x: Backwards.apply(embed(x), fault)
    with pytest.raises(Refused):
        on_meta(model, settings())


class Backwards(torch.autograd.Function):
    """Does to a gradient what `work` does."""

    @staticmethod
    def forward(ctx, x, work):
        ctx.work = work
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.work(grad), None


@pytest.mark.parametrize("kind", ["adam", "adamw"])
def test_adam_on_a_device_is_fused_and_has_its_rate_there(kind, monkeypatch):
    given = {}
    monkeypatch.setattr(torch.optim, dict(adam="Adam", adamw="AdamW")[kind], lambda _, **options: given.update(options))
    train.make_optimizer(torch.nn.Linear(1, 1, device="meta"), settings(optimizer=kind, weight_decay=0.5))
    assert given.pop("lr").device.type == "meta" and given == dict(weight_decay=0.5, fused=True, capturable=True)
    given.clear()
    train.make_optimizer(torch.nn.Linear(1, 1), settings(optimizer=kind))
    assert given == dict(lr=1e-3, weight_decay=0.0)


def test_tf32_is_where_it_is_asked_for():
    """Several runs may be drawn by one process, each in its own arithmetic."""
    for precision in ("tf32", "fp32", "tf32", "bf16"):
        with train.autocast(CPU, precision):
            found = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision() == "high"
        assert found == (precision == "tf32",) * 2


# ------------------------------------------------------------------------------------- a graph, stood in for on the CPU

def held(step):
    """Where a graph of this step would read and write."""
    states = [v for of_one in step.optimizer.state.values() for v in of_one.values()]
    own = step.frames, step.mask, step.optimizer.param_groups[0]["lr"], *step.model.parameters()
    return [v.data_ptr() for v in (*own, *states)]


class Again:
    """Stands in for train.Graph: replays by calling again, and sees that everything lies where it was recorded."""

    replays = 0

    def __init__(self, work):
        self.work, self.step = work, work.__self__

    def run(self, **options):
        return self.work(**options)

    def record(self):
        self.held = held(self.step)

    def replay(self):
        assert held(self.step) == self.held
        Again.replays += 1
        return self.work().clone()


@pytest.fixture
def as_on_cuda(monkeypatch):
    """Steps on the CPU do what they do on CUDA; the optimiser too, but for `capturable`, which the CPU has not."""
    monkeypatch.setattr(train, "Graph", Again)
    monkeypatch.setattr(Again, "replays", 0)

    def make_optimizer(model, config):
        lr, weight_decay = torch.tensor(config["lr"]), config["weight_decay"]
        return torch.optim.Adam(model.parameters(), lr=lr, weight_decay=weight_decay, fused=True)

    monkeypatch.setattr(train, "make_optimizer", make_optimizer)


def small(name="convlstm", **options):
    torch.manual_seed(0)
    return train.model_file(name).MODEL(**dict(size=8, hidden=4, layers=2, kernel=3, patch=2, setup="patch4") | options)


def batches(config, device=CPU, size=8, missing=False):
    """Endless (frames, mask, lr), no two alike."""
    for iteration in itertools.count():
        generator = torch.Generator().manual_seed(iteration)
        frames = torch.rand(config["batch"], 4, 1, size, size, generator=generator)
        if missing:
            frames[torch.rand(frames.shape, generator=generator) < 0.2] = torch.nan
        mask = torch.rand(3, config["batch"], generator=generator) < 0.5
        yield frames.to(device), mask.to(device), 1e-2 / (1 + iteration)


def trained(step, calls, start=0, **options):
    """Its losses over some calls, and everything it ended with."""
    losses = [step(*batch).item() for batch in itertools.islice(batches(step.config, **options), start, start + calls)]
    state = step.optimizer.state_dict()["state"]
    states = [v for of_one in state.values() for v in of_one.values()]
    return losses, [p.detach() for p in step.model.parameters()], states


def assert_same(a, b):
    assert a[0] == b[0]
    assert all(torch.equal(x, y) for part in (1, 2) for x, y in zip(a[part], b[part], strict=True))


@pytest.mark.parametrize("reverse, missing", [(False, False), (True, False), (True, True)])
def test_a_graph_is_the_plain_step(reverse, missing, as_on_cuda, capsys):
    config = settings(reverse=reverse)
    step, plain = train.Step(small(), config, CUDA), train.Step(small(), config | dict(graph=False), CUDA)
    assert_same(trained(step, 7, missing=missing), trained(plain, 7, missing=missing))
    assert Again.replays == 5 and step.graph and not plain.graph      # of the third call, its proof, and of four more
    assert capsys.readouterr().out == ""


def test_a_step_leaves_its_batch_alone(as_on_cuda):
    step, given = train.Step(small(), settings(), CUDA), list(itertools.islice(batches(settings()), 5))
    kept = [(frames.clone(), mask.clone()) for frames, mask, _ in given]
    losses = [step(*batch) for batch in given]
    assert all(torch.equal(a, b) for one, other in zip(given, kept) for a, b in zip(one, other))
    assert len({loss.item() for loss in losses}) == 5                 # nor does a replay overwrite the loss before


def test_who_gets_a_graph(as_on_cuda, monkeypatch, capsys):
    for device, config, expected in ((CUDA, {}, True), (CPU, {}, False), (CUDA, dict(graph=False), False),
                                     (CUDA, dict(graph=True), True), (CPU, dict(graph=True), False)):
        step = train.Step(small(), settings(**config), device)
        trained(step, 3)
        assert bool(step.graph) == expected and capsys.readouterr().out == ""
    monkeypatch.setattr(train.processes, "count", 2)
    monkeypatch.setattr(train, "DistributedDataParallel", lambda model, **options: model)
    for device, lines in ((CUDA, 1), (CPU, 0)):
        step = train.Step(small(), settings(), device)
        trained(step, 3)
        out = capsys.readouterr().out
        assert not step.graph and out.count("\n") == lines == out.count("no CUDA graph")


def failing(error):
    class Fails(Again):
        def record(self):
            for p in self.step.model.parameters():
                p.grad = None                                         # as a recording leaves them
            raise error
    return Fails


def wrong(work):
    class Wrong(Again):
        def replay(self):
            return work(self)
    return Wrong


def stale(graph):
    graph.step.frames = graph.step.frames.flip(0)
    graph.step.mask = ~graph.step.mask
    return graph.work()


def half_trained(graph):
    before = [p.clone() for p in graph.step.model.cells[0].parameters()]
    loss = graph.work()
    torch._foreach_copy_([p.data for p in graph.step.model.cells[0].parameters()], before)
    return loss


def other_rate(graph):
    graph.step.optimizer.param_groups[0]["lr"].fill_(2e-2)
    return graph.work()


def one_bias(graph):
    """One gradient, of a weight so small that no norm over all weights moves."""
    loss = graph.work()
    graph.step.optimizer.state[graph.step.model.output.bias]["exp_avg"].neg_()
    return loss


def no_number(graph):
    loss = graph.work()
    next(graph.step.model.parameters()).data.fill_(torch.nan)
    return loss


@pytest.mark.parametrize("graph, says", [
    (failing(RuntimeError("operation not permitted when stream is capturing\nCUDA kernel errors might be …")),
     "not permitted"),
    (failing(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")), "out of memory"),
    (wrong(lambda graph: graph.work() * 1.01), "first replay"), (wrong(stale), "first replay"),
    (wrong(half_trained), "first replay"), (wrong(other_rate), "first replay"), (wrong(no_number), "first replay"),
    (wrong(one_bias), "weights and moments 1 differ"),
    (wrong(lambda graph: torch.tensor(torch.nan)), "first replay"),
    (wrong(lambda graph: train.frame_loss(*torch.zeros(2, 1, 1, 1, 1, 1), "l2")), "first replay"),
])
def test_without_a_graph_that_can_be_trusted_training_goes_on(graph, says, as_on_cuda, monkeypatch, capsys):
    """As if there had been none, and one line says so."""
    monkeypatch.setattr(train, "Graph", graph)
    step = train.Step(small(), settings(), CUDA)
    assert_same(trained(step, 6), trained(train.Step(small(), settings(graph=False), CUDA), 6))
    out = capsys.readouterr().out
    assert not step.graph and out.count("\n") == 1 and out.startswith("no CUDA graph: ") and says in out


@pytest.mark.parametrize("save_at", [1, 3, 6])
def test_a_state_moves_between_graph_and_no_graph(save_at, as_on_cuda):
    whole = trained(train.Step(small(), settings(graph=False), CUDA), 9)
    for first, then in ((True, False), (False, True), (True, True)):
        step = train.Step(small(), settings(graph=first), CUDA)
        losses, *_ = trained(step, save_at)
        model = small()
        model.load_state_dict(step.model.state_dict())
        later = train.Step(model, settings(graph=then), CUDA)
        later.load(step.optimizer.state_dict())
        more, *state = trained(later, 9 - save_at, start=save_at)
        assert_same((losses + more, *state), whole)


def test_a_state_loaded_again_is_recorded_again(as_on_cuda):
    step = train.Step(small(), settings(), CUDA)
    trained(step, 5)
    step.load(step.optimizer.state_dict())
    assert not step.graph
    trained(step, 2, start=5)                                         # `held` would see the old state's places
    assert step.graph


def test_a_checkpoint_brings_no_settings_of_its_device(monkeypatch, tmp_path):
    """What CUDA saves goes on on the CPU, with its moments and counts, and the other way round."""
    fused = functools.partial(torch.optim.Adam, fused=True)
    of_cuda = train.Step(small(), settings(), CPU)
    of_cuda.optimizer = fused(of_cuda.model.parameters(), lr=torch.tensor(5e-4))
    of_cpu = train.Step(small(), settings(), CPU)
    trained(of_cuda, 3)
    torch.save(of_cuda.optimizer.state_dict(), tmp_path / "state.pt")
    own = {k: v for k, v in of_cpu.optimizer.param_groups[0].items() if k != "params"}
    of_cpu.load(torch.load(tmp_path / "state.pt", weights_only=True))
    assert {k: v for k, v in of_cpu.optimizer.param_groups[0].items() if k != "params"} == own and own["lr"] == 1e-3
    of_cpu.model.load_state_dict(of_cuda.model.state_dict())
    for a, b in zip(trained(of_cpu, 3, start=3)[1:], trained(of_cuda, 3, start=3)[1:]):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert all(state["step"] == 12 for state in of_cpu.optimizer.state.values())
    of_cuda.load(copy.deepcopy(of_cpu.optimizer.state_dict()))      # a file's tensors are nobody else's
    group, = of_cuda.optimizer.param_groups
    assert group["fused"] and group["lr"].item() == pytest.approx(1e-2 / 6)    # its own, of its last call
    of_cuda.model.load_state_dict(of_cpu.model.state_dict())
    for a, b in zip(trained(of_cpu, 2, start=6)[1:], trained(of_cuda, 2, start=6)[1:]):
        for x, y in zip(a, b):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["l2", "l1+l2"])
def test_pixels_without_data_by_hand(kind):
    """The network reads 0 there, and they add nothing to the loss."""
    config = settings(loss=kind, reverse=False)
    frames, mask, _ = next(batches(config, missing=True))
    assert 0.1 < frames.isnan().float().mean() < 0.3
    model = small()
    with torch.no_grad():
        error = (model(frames.nan_to_num(0.0), use_truth=mask) - frames[:, 1:]).double().numpy()
    total = sum(e**2 + abs(e) * (kind == "l1+l2") for e in error.flatten() if e == e)
    expected = total / (error.shape[0] * error.shape[1])
    assert trained(train.Step(model, config, CPU), 1, missing=True)[0][0] == pytest.approx(expected, rel=1e-5)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in model.parameters() if p.grad.numel() > 1)


TINY = ["convlstm", *SMALL, *"--iterations 12 --eval-every 5 --save-every 4 --eval-sequences 3".split()]    # on the CPU


def run(*arguments, status=0):
    assert conftest.run(*arguments) == status


def outcome(folder):
    last = torch.load(folder / "last.pt", map_location="cpu", weights_only=True)
    log = [row.split(",")[:4] for row in (folder / "log.csv").read_text().splitlines()[1:]]
    scores = json.loads((folder / "results.json").read_text())["forecast"]
    states = [v for of_one in last["optimizer"]["state"].values() for v in of_one.values()]
    return [last["iteration"], log, scores], list(last["model"].values()), states


def interrupted_at(iteration):
    """A Step that asks the loop to stop in the middle of an iteration, as Ctrl-C does."""
    class Interrupted(STEP):
        calls = 0

        def __call__(self, *arguments):
            Interrupted.calls += 1
            if Interrupted.calls == iteration:
                os.kill(os.getpid(), 15)
            return super().__call__(*arguments)

    return Interrupted


def test_runs_with_a_graph_and_without_are_the_same_run(as_on_cuda, monkeypatch, tmp_path, capsys):
    """Interrupted ones too, whichever way they go on: checkpoints, log and results are bit for bit the same."""
    monkeypatch.chdir(tmp_path)
    plain, folder = STEP, tmp_path / "runs"
    with_graph = lambda kind: lambda model, config, device: kind(model, config, CUDA)
    run(*TINY, "--name", "plain")
    monkeypatch.setattr(train, "Step", with_graph(plain))
    run(*TINY, "--name", "graph")
    assert Again.replays == 12 - 2
    assert_same(outcome(folder / "graph"), outcome(folder / "plain"))
    for first, then, name in ((with_graph, lambda kind: kind, "away"), (lambda kind: kind, with_graph, "back")):
        monkeypatch.setattr(train, "Step", first(interrupted_at(7)))
        run(*TINY, "--name", name, status=143)
        monkeypatch.setattr(train, "Step", then(plain))
        run("--resume", folder / name)
        assert_same(outcome(folder / name), outcome(folder / "plain"))
    assert "no CUDA graph" not in capsys.readouterr().out


# -------------------------------------------------------------------------------- weights handed on, and compiled steps

def gradients(model, config, handed_on):
    """Of a roll-out over five steps: its predictions' sum of squares, and every parameter's gradient, None for none."""
    torch.manual_seed(1)
    frames = torch.rand(2, 6, 1, *model.size, dtype=next(model.parameters()).dtype)
    mask = torch.rand(5, 2) < 0.5
    model.zero_grad()
    handing = train.weights_handed_on(model, config) if handed_on else nullcontext()
    with train.autocast(CPU, config["precision"]), handing:
        predictions, found = model(frames, use_truth=mask, extras="loss")
    assert "step" not in vars(model)
    loss = predictions.to(frames.dtype).square().sum() + found.get("loss", 0)
    loss.backward()
    return loss.item(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("name, variant, setup", EVERY)
def test_weights_handed_on_have_the_same_gradients(name, variant, setup):
    model = small(name, size=16, setup=setup, variant=variant).double()
    expected = gradients(model, settings(), False)
    for model.recompute in (False, True) if variant == "full" else (False,):
        loss, found = gradients(model, settings(), True)
        assert loss == expected[0]
        for a, b in zip(found, expected[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_model_without_steps_trains_as_it_is():
    model = torch.nn.Conv2d(1, 1, 1)
    for compile in (False, True):
        with train.weights_handed_on(model, settings(compile=compile)):
            assert model(torch.ones(1, 1, 1, 1)).grad_fn is not None and "step" not in vars(model)


def test_gradients_of_bf16_are_added_in_fp32():
    """A weight that 400 steps read, a gradient of 1 + 2^-6 each: a bf16 sum would stop growing where steps are 2."""
    class Steps(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = torch.nn.Conv2d(1, 1, 1, bias=False)
            self.scale = torch.nn.Parameter(torch.ones(()))           # of no convolution: stays as it is
            self.unused = torch.nn.Parameter(torch.ones(()))

        def step(self, x):
            assert self.conv.weight.dtype == torch.bfloat16 and self.scale.dtype == torch.float32
            return self.conv(x).float() * self.scale

        def forward(self, x):
            return sum(self.step(x) for _ in range(400))

    model, x = Steps(), torch.full((1, 1, 1, 1), 1 + 2**-6)
    with train.autocast(CPU, "bf16"), train.weights_handed_on(model, settings(precision="bf16")):
        model(x).backward()
    assert model.conv.weight.grad.item() == 400 * (1 + 2**-6) and model.conv.weight.grad.dtype == torch.float32
    assert model.scale.grad.item() == pytest.approx(400 * (model.conv.weight.bfloat16() * x.bfloat16()).item())
    assert model.unused.grad is None


@pytest.fixture
def compiles(monkeypatch):
    """torch.compile without its code generator, which needs a C++ compiler: what it traces runs op by op."""
    torch._dynamo.reset()
    traced = []

    def backend(graph, inputs):
        traced.append(graph)
        return torch._dynamo.backends.debugging.aot_eager(graph, inputs)

    monkeypatch.setattr(train, "compiled", functools.cache(
        lambda step: torch.compile(step, dynamic=False, backend=backend)))
    yield traced
    torch._dynamo.reset()


@pytest.mark.parametrize("name, setup", [
    pytest.param(name, setup, marks=[] if (name, setup) == ("convlstm", "patch4") else pytest.mark.slow)
    for name in train.MODELS for setup in ("patch4", "fullres")])
def test_a_compiled_step_is_the_plain_step(name, setup, compiles):
    """Traced whole, twice: the first time step is a program of its own, for nothing before it wants a gradient."""
    model = small(name, size=16, setup=setup).double()
    expected = gradients(model, settings(), False)
    for model.recompute in (False, True):
        loss, found = gradients(model, settings(compile=True), True)
        assert loss == pytest.approx(expected[0], rel=1e-12)
        for a, b in zip(found, expected[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        assert len(compiles) == 2
    other = small(name, size=16, setup=setup).double()                # of the same shape: nothing to compile
    gradients(other, settings(compile=True), True)
    assert len(compiles) == 2


def test_a_graph_of_a_compiled_step(compiles, as_on_cuda, capsys):
    """The step that the graph is held against is not compiled."""
    config, compiled = settings(compile=True), []
    step, plain = train.Step(small(), config, CUDA), train.Step(small(), settings(graph=False), CUDA)
    take = train.train_step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", lambda *a: compiled.append(bool(a[-1].get("compile"))) or take(*a))
        found = trained(step, 4)
    assert compiled == [True] * 4 + [False] * 2 + [True] * 4 and step.graph     # forwards and backwards each
    for a, b in zip(found, trained(plain, 4)):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    assert capsys.readouterr().out.count("\n") == 1


def test_what_cannot_be_compiled_says_so_and_goes_on_without(monkeypatch, tmp_path, capsys):
    def backend(graph, inputs):
        raise RuntimeError("no working C++ compiler\n and more")

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    run(*TINY, "--name", "plain")
    torch._dynamo.reset()
    monkeypatch.setattr(train, "compiled", lambda step: torch.compile(step, backend=backend))
    with monkeypatch.context() as patch:
        patch.setattr(train, "compile_of", lambda args, device: True)
        run(*TINY, "--name", "compiled", status=1)
    error, = capsys.readouterr().err.splitlines()
    assert error.startswith("train.py: --compile: ") and "no working C++ compiler" in error
    assert error.endswith("go on without it: --resume runs/compiled")
    run("--resume", folder / "compiled")
    assert_same(outcome(folder / "compiled"), outcome(folder / "plain"))


def test_a_run_of_compiled_steps(compiles, monkeypatch, tmp_path, capsys):
    """The run that it is without; the option is for CUDA, and is given anew where a run goes on."""
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs"
    run(*TINY, "--name", "plain")
    with monkeypatch.context() as patch:
        patch.setattr(train, "Step", lambda model, config, device: STEP(model, config | dict(compile=True), device))
        run(*TINY, "--name", "compiled")
    assert len(compiles) == 2
    a, b = outcome(folder / "plain"), outcome(folder / "compiled")
    for x, y in zip(a[1] + a[2], b[1] + b[2], strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    run(*TINY, "--compile", status=2)
    before = outcome(folder / "plain")
    run("--resume", folder / "plain", "--iterations", 14, "--compile", status=2)
    assert capsys.readouterr().err.count("--compile spares CUDA launches") == 2 == len(compiles)
    assert_same(outcome(folder / "plain"), before)


# ----------------------------------------------------------------------------------------------------------- with a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(name, graph, precision="fp32", recompute=False, calls=6, compile=False, **options):
    """A run of a few steps on CUDA, and the Step that took them."""
    config = settings(name, options.get("setup", "patch4"), precision=precision, compile=compile, graph=graph)
    train.precision_of(precision, CUDA)
    model = small(name, **options).to(CUDA)
    model.recompute = recompute
    step = train.Step(model, config, CUDA)
    return trained(step, calls, device=CUDA), step


def assert_close(a, b, start):
    """To rounding: losses to 1 %, and weights apart by no more than a tenth of the way from where both started."""
    np.testing.assert_allclose(a[0], b[0], rtol=1e-2)
    apart, way = (torch.stack([(x - y.to(x.device)).norm() for x, y in zip(a[1], other)]).norm()
                  for other in (b[1], start))
    assert apart <= 0.1 * way, (apart, way)


def losses_and_weights(found):
    """Of an outcome."""
    return [float(row[1]) for row in found[0][1]], found[1]


def initial(folder):
    """The weights that a run started with."""
    return list(train.build(json.loads((folder / "config.json").read_text())).parameters())


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("name, variant, setup", EVERY)
def test_cuda_a_graph_is_the_eager_step(name, variant, setup, precision, capsys):
    if not train.computes_in(CUDA, precision):
        pytest.skip(f"this device has no {precision} arithmetic")
    start = [p.detach() for p in small(name, variant=variant, setup=setup).parameters()]
    for recompute in (False, True) if precision == "bf16" else (False,):
        graph, step = on_cuda(name, True, precision, recompute, variant=variant, setup=setup)
        eager, plain = on_cuda(name, False, precision, recompute, variant=variant, setup=setup)
        assert step.graph and not plain.graph and capsys.readouterr().out == ""
        assert_close(graph, eager, start)


@needs_cuda
@pytest.mark.parametrize("name", train.MODELS)
def test_cuda_a_graph_of_a_compiled_step_is_the_eager_step(name, capsys):
    start = [p.detach() for p in small(name).parameters()]
    for precision in ("fp32", "bf16") if train.computes_in(CUDA, "bf16") else ("fp32",):
        graph, step = on_cuda(name, True, precision, compile=True)
        eager, _ = on_cuda(name, False, precision)
        assert step.graph and step.config["compile"]
        assert_close(graph, eager, start)
    assert "not compiled" not in capsys.readouterr().out


@needs_cuda
def test_cuda_follows_the_cpu():
    start = [p.detach() for p in small().parameters()]
    assert_close(trained(train.Step(small(), settings(), CPU), 6), on_cuda("convlstm", True)[0], start)


@needs_cuda
def test_cuda_nothing_waits(capsys):
    """Neither drawing a batch nor a step, eagerly and by a graph; the third call, which records, may."""
    clips = train.data.open_data("moving_digits", frames_in=2, horizon=2)
    model = small(size=64, patch=4).to(CUDA)
    for graph in (False, True):
        step = train.Step(model, settings(graph=graph), CUDA)
        for iteration in range(6):
            torch.cuda.set_sync_debug_mode("default" if iteration in (0, 2) else "error")
            try:
                frames = clips.train(0, iteration, 2, device=CUDA)
                mask, _ = train.sampling_mask(model, step.config, iteration, CUDA)
                step(frames, mask, 1e-3)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        assert bool(step.graph) == graph


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_runs_go_on_with_a_graph_without_one_and_on_the_cpu(precision, monkeypatch, tmp_path, capsys):
    if not train.computes_in(CUDA, precision):
        pytest.skip(f"this device has no {precision} arithmetic")
    monkeypatch.chdir(tmp_path)
    arguments, folder = [*TINY, "--device", "cuda", "--precision", precision], tmp_path / "runs"
    run(*arguments, "--name", "whole")
    whole, start = outcome(folder / "whole"), initial(folder / "whole")
    assert all(np.isfinite(whole[0][2][score]["mean"]) for score in ("mse", "mae", "psnr", "ssim"))
    plain, on_cpu = STEP, ("--device", "cpu")
    with_graph = lambda kind, graph: lambda model, config, device: kind(model, config | dict(graph=graph), device)
    for first, then, moves in ((True, False, ()), (False, True, ()), (True, True, ()), (True, True, on_cpu)):
        name = f"{first}-{then}-{len(moves)}"
        monkeypatch.setattr(train, "Step", with_graph(interrupted_at(7), first))
        run(*arguments, "--name", name, status=143)
        monkeypatch.setattr(train, "Step", with_graph(plain, then))
        run("--resume", folder / name, *moves)
        resumed = outcome(folder / name)
        assert resumed[0][0] == 12 and all(state == 24 for state in resumed[2] if state.ndim == 0)
        assert_close(losses_and_weights(resumed), losses_and_weights(whole), start)
    run("--resume", folder / "True-True-2", "--iterations", 14, "--device", "cuda")      # and from the CPU to CUDA
    assert not re.search("no CUDA graph", capsys.readouterr().out)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_cuda_two_processes(tmp_path):
    """Over NCCL: the run that one process makes, eagerly, and a line that says so."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    arguments = [str(ROOT / "train.py"), *TINY, "--device", "cuda", "--precision", "fp32", "--name"]
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={port}"]
    subprocess.run([sys.executable, *arguments, "one"], cwd=tmp_path, check=True)
    command = [sys.executable, *launcher, *arguments, "two"]
    two = subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True)
    assert two.stdout.count("no CUDA graph") == 1
    one, two = (outcome(tmp_path / "runs" / name) for name in ("one", "two"))
    assert_close(losses_and_weights(one), losses_and_weights(two), initial(tmp_path / "runs/one"))
