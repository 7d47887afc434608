"""The training step: gradients, and on CUDA one recorded graph of compiled steps that does the same.

Without a GPU a step runs on the meta device, which has no values: what needs one is refused there. A graph is stood in
for by one that keeps every operation, and the memory it read and wrote. The last section needs a GPU.
"""

import functools
import gc
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
EVERY = [(name, variant, setup) for name in train.MODELS for variant in train.model_file(name).VARIANTS
         for setup in ("patch4", "fullres")]
FULL = [(name, setup) for name in train.MODELS for setup in ("patch4", "fullres")]


def settings(name="convlstm", setup="patch4", **other):
    """As much of a run's config as a step needs."""
    training = train.model_file(name).TRAINING[setup]
    return dict(batch=2, precision="fp32", loss=training["loss"], optimizer=training["optimizer"], lr=1e-3,
                weight_decay=training.get("weight_decay", 0.0), reverse=True, frames_in=2, horizon=2, seed=0, schedule=10,
                iterations=10, recompute=False, eager=False) | other


def small(name="convlstm", **options):
    torch.manual_seed(0)
    return train.model_file(name).MODEL(**dict(size=16, hidden=4, layers=2, kernel=3, patch=2, setup="patch4") | options)


def new_step(model, device=CPU, iteration=0, checkpoint=None, **config):
    run = train.Run(None, settings(**config), model, device=device, iteration=iteration, checkpoint=checkpoint)
    return train.Step(run, run.config)


def batches(config, device=CPU, missing=False, size=16):
    """Endless (frames, mask, learning rate), no two alike."""
    for iteration in itertools.count():
        generator = torch.Generator().manual_seed(iteration)
        frames = torch.rand(config["batch"], 4, 1, size, size, generator=generator)
        if missing:
            frames[torch.rand(frames.shape, generator=generator) < 0.2] = torch.nan
        mask = torch.rand(3, config["batch"], generator=generator) < 0.5
        yield frames.to(device), mask.to(device), 1e-2 / (1 + iteration)


def gradients(model, frames, mask, **config):
    """`train.gradients`: the loss, then every parameter's gradient, in fp64."""
    loss = train.gradients(model, frames, mask, settings(**config))
    return [loss.double(), *(p.grad.double() for p in model.parameters())]


def assert_near(tensors, others, tolerance):
    """Apart by no more than a part of their size, all together."""
    apart, size = (torch.nn.utils.get_total_norm(v) for v in ([a - b for a, b in zip(tensors, others)], others))
    assert len(tensors) == len(others) and apart <= tolerance * size, (apart, size)


# --------------------------------------------------------------------------------------------------------- the gradients

@pytest.mark.parametrize("name, variant, setup", EVERY)
def test_gradients_of_every_model(name, variant, setup):
    """fp32, bf16 and recomputed steps follow fp64; every parameter has a gradient, and it is fp32."""
    model, (frames, mask, _) = small(name, variant=variant, setup=setup), next(batches(settings()))
    exact, loss = model.double(), settings(name, setup)["loss"]
    expected = gradients(exact, frames.double(), mask, loss=loss)
    train.wrap_step(exact, recompute=True)
    assert_near(gradients(exact, frames.double(), mask, loss=loss), expected, 1e-12)
    train.wrap_step(exact)
    for precision, tolerance in ("fp32", 1e-5), ("bf16", 0.05):
        found = gradients(model.float(), frames, mask, loss=loss, precision=precision)
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        assert_near(found[:1], expected[:1], tolerance)
        assert_near(found[1:], expected[1:], tolerance)


@pytest.mark.parametrize("name, variant", [("convlstm", "full"), ("predrnn", "v2"), ("ms_lstm", "full")])
def test_weighted_shares_add_up(name, variant):
    """To the whole batch's loss and gradients, however unequal the shares are."""
    model, (frames, mask, _) = small(name, variant=variant).double(), next(batches(settings(batch=5), missing=True))
    whole = gradients(model, frames.double(), mask, batch=5)
    shares = [gradients(model, frames[part].double(), mask[:, part], batch=5)
              for part in (slice(0, 3), slice(3, 4), slice(4, 5))]
    assert_near([sum(parts) for parts in zip(*shares)], whole, 1e-12)


@pytest.mark.parametrize("kind, weight", [("l2", 0), ("l2+0.2l1", 0.2), ("l1+l2", 1)])
def test_pixels_without_data_by_hand(kind, weight):
    """The network reads 0 there, and they add nothing to the loss."""
    model, (frames, mask, _) = small(), next(batches(settings(), missing=True))
    assert 0.1 < frames.isnan().float().mean() < 0.3
    with torch.no_grad():
        error = (model(frames.nan_to_num(0.0), use_truth=mask) - frames[:, 1:]).double().numpy()
    expected = sum(e**2 + weight * abs(e) for e in error.flatten() if e == e) / (2 * 3)
    loss, *found = gradients(model, frames, mask, loss=kind)
    assert loss.item() == pytest.approx(expected, rel=1e-5) and all(g.isfinite().all() for g in found)


def test_gradients_of_bf16_are_added_in_fp32():
    """A weight that 400 steps read, a gradient of 1 + 2^-6 each: a bf16 sum would stop growing where steps are 2."""
    conv, x = torch.nn.Conv2d(1, 1, 1, bias=False), torch.full((1, 1, 1, 1), 1 + 2**-6)
    with train.autocast(CPU, "bf16"):
        assert conv(x).dtype == torch.bfloat16
        sum(conv(x).float() for _ in range(400)).backward()
    assert conv.weight.grad.item() == 400 * (1 + 2**-6)


def test_tf32_is_where_it_is_asked_for():
    """One process may evaluate several runs, each in its own arithmetic."""
    for device, precision in (CUDA, "tf32"), (CUDA, "fp32"), (CUDA, "tf32"), (CPU, "bf16"):
        train.autocast(device, precision)
        found = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision() == "high"
        assert found == (precision == "tf32",) * 2


def test_learning_rate():
    constant, cosine = dict(lr=0.5, final_lr=None, schedule=100), dict(lr=0.5, final_lr=0.1, schedule=100)
    assert [train.learning_rate(constant, k) for k in (0, 50, 200)] == [0.5, 0.5, 0.5]
    expected = [0.5, 0.3 + 0.2 * math.sqrt(0.5), 0.3, 0.1, 0.1]
    assert [train.learning_rate(cosine, k) for k in (0, 25, 50, 100, 200)] == pytest.approx(expected)
    assert train.learning_rate(cosine | dict(lr=0.05), 50) == 0.05          # never rises
    step = new_step(small(), reverse=False)
    before = [p.detach().clone() for p in step.parameters]
    step(*next(batches(step.config))[:2], 1e-4)                             # Adam's first step is lr × the gradient's sign
    moved = torch.cat([(a - b).abs().flatten() for a, b in zip(step.parameters, before)])
    assert moved.median().item() == pytest.approx(1e-4, rel=1e-3)


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
    """Refuses what an operation, of the backward pass too, would wait for: values, shapes by value, other devices."""

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
    """`gradients` of a model on the meta device, which autocast does not know."""
    monkeypatch.setattr(train, "autocast", lambda device, precision: nullcontext())

    def work(model):
        frames, mask = (torch.empty(shape, device="meta") for shape in ((2, 3, 1, *model.size), (2, 2)))
        with WatchCalls(), WatchOps():
            return train.gradients(model, frames, mask.bool(), settings())

    return work


@pytest.mark.parametrize("name, variant, setup", EVERY)
def test_nothing_in_the_gradients_waits(name, variant, setup, on_meta):
    with torch.device("meta"):
        model = small(name, setup=setup, variant=variant)
    for recompute in False, True:
        train.wrap_step(model, recompute)
        assert on_meta(model).device.type == "meta"


SCALAR, INDEX = torch.tensor(2.0), torch.tensor([0, 1])
SEEN_IN_PYTHON = [
    lambda x: x * x.mean().tolist(), lambda x: x * torch.tensor(2.0, device=x.device), lambda x: x.cpu().to(x.device),
    lambda x: x + x[[0, 1]], lambda x: x + x[:, np.array([0])], lambda x: x + torch.as_tensor([1.0], device=x.device)]
SEEN_IN_OPERATIONS = [
    lambda x: x if x.mean() > 0 else -x, lambda x: x * x.mean().item(), lambda x: x * SCALAR, lambda x: x + x[INDEX],
    lambda x: x.to("cpu").to(x.device), lambda x: x + torch.ones(1).to(x.device, non_blocking=True),
    lambda x: x + x[x > 0].sum(), lambda x: x.index_put((x > 0,), x.sum()), lambda x: x + x.masked_select(x > 0).sum(),
    lambda x: x + (x > 0).nonzero().sum(), lambda x: x + x.unique().sum(), lambda x: x if torch.equal(x, x) else -x]


class Backwards(torch.autograd.Function):
    """Does to a gradient what `work` does."""

    @staticmethod
    def forward(ctx, x, work):
        ctx.work = work
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return ctx.work(grad), None


@pytest.mark.parametrize("where, fault", [("forward", fault) for fault in SEEN_IN_PYTHON + SEEN_IN_OPERATIONS] + [
    ("backward", fault) for fault in SEEN_IN_OPERATIONS])
def test_what_would_wait_is_refused(where, fault, on_meta):
    with torch.device("meta"):
        model = small()
    embed = model.embed.forward
    if where == "forward":
        model.embed.forward = lambda x: embed(fault(x))
    else:
        model.embed.forward = lambda x: Backwards.apply(embed(x), fault)
    with pytest.raises(Refused):
        on_meta(model)


# ------------------------------------------------------------------------------------- a graph, stood in for on the CPU

class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph, and for torch.cuda.graph, which records into it.

    Keeps every operation with the tensors that it read and wrote, to do the same in the same memory again. As recording
    computes nothing, what was written meanwhile is replaced by NaN.
    """

    recording = False

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __enter__(self):
        Graph.recording = True
        return super().__enter__()

    def __exit__(self, *error):
        Graph.recording = False
        super().__exit__(*error)
        for _, args, kwargs, written in self.operations:
            outside = {v.untyped_storage().data_ptr() for v in tree_leaves((args, kwargs)) if isinstance(v, torch.Tensor)}
            for v in tree_leaves(written):
                if isinstance(v, torch.Tensor) and v.is_floating_point() and v.untyped_storage().data_ptr() not in outside:
                    v.fill_(torch.nan)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        written = func(*args, **kwargs or {})
        self.operations.append((func, args, kwargs or {}, written))
        return written

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, written in self.operations:
            for old, new in zip(tree_leaves(written), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def as_on_cuda(monkeypatch):
    """A maker of steps that do on the CPU what they do on CUDA, in fp32."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = dict(CUDAGraph=Graph, graph=lambda graph, stream: graph, Stream=lambda: stream,
                     current_stream=lambda: stream, stream=lambda stream: nullcontext())
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(train, "autocast", lambda device, precision: nullcontext())

    def make(model=None, **options):
        model = model or small()
        model.to = lambda device: model
        return new_step(model, CUDA, **options)

    yield make
    assert gc.isenabled() and not Graph.recording


def trained(step, calls, start=0, **options):
    """Its losses over some calls, and the weights and moments that it ends with."""
    losses = [step(*batch).item() for batch in itertools.islice(batches(step.config, **options), start, start + calls)]
    moments = [v for of_one in step.optimizer.state_dict()["state"].values() for v in of_one.values()]
    return losses, [p.detach() for p in step.model.parameters()], moments


def assert_same(a, b):
    assert a[0] == b[0]
    assert all(torch.equal(x, y) for part in (1, 2) for x, y in zip(a[part], b[part], strict=True))


@pytest.mark.parametrize("reverse, missing, recompute", [
    (False, False, False), (True, False, True), (True, True, False)])
def test_a_graph_is_the_plain_step(reverse, missing, recompute, as_on_cuda, capsys):
    step = as_on_cuda(reverse=reverse, recompute=recompute)
    assert_same(trained(step, 7, missing=missing), trained(new_step(small(), reverse=reverse), 7, missing=missing))
    assert step.graph.replays == (14 if reverse else 7) - 2 and capsys.readouterr().out == ""


def test_a_step_leaves_its_batch_and_earlier_losses_alone(as_on_cuda):
    step, given = as_on_cuda(), list(itertools.islice(batches(settings()), 5))
    kept = [(frames.clone(), mask.clone()) for frames, mask, _ in given]
    losses = [step(*batch) for batch in given]
    assert all(torch.equal(a, b) for one, other in zip(given, kept) for a, b in zip(one, other))
    assert len({loss.item() for loss in losses}) == 5


@pytest.mark.parametrize("save_at", [1, 3, 6])
def test_a_checkpoint_moves_between_graph_and_no_graph(save_at, as_on_cuda):
    whole = trained(new_step(small()), 9)
    for first, then in itertools.product((as_on_cuda, new_step), repeat=2):
        step = first(small())
        losses, *_ = trained(step, save_at)
        model = small()
        model.load_state_dict(step.model.state_dict())
        later = then(model, checkpoint=dict(optimizer=step.optimizer.state_dict()["state"]))
        more, *state = trained(later, 9 - save_at, start=save_at)
        assert_same((losses + more, *state), whole)


@pytest.mark.parametrize("error", [None, RuntimeError("operation not permitted when stream is capturing\nand more")])
def test_the_collector_destroys_nothing_while_a_graph_is_recorded(error, as_on_cuda, monkeypatch, capsys):
    """Neither what was garbage before, which is collected first, nor what becomes garbage meanwhile."""
    destroyed = []

    class Older:                                                            # a graph that only the collector frees
        def __init__(self):
            self.own = self

        def __del__(self):
            destroyed.append(Graph.recording)

    def recording(graph, stream):
        assert destroyed == [False]
        Older()
        with graph:
            cycles = [[] for _ in range(10_000)]                            # enough for the collector, were it on
            yield cycles
            if error:
                raise error

    monkeypatch.setattr(torch.cuda, "graph", train.contextlib.contextmanager(recording))
    Older()
    step = as_on_cuda()
    assert_same(trained(step, 4), trained(new_step(small()), 4))
    gc.collect()
    assert destroyed == [False, False] and bool(step.graph) == (error is None)
    says = "the step is not recorded: operation not permitted when stream is capturing; the run continues without\n"
    assert capsys.readouterr().out == (says if error else "")


def test_a_step_takes_its_graph_along(as_on_cuda):
    """No cycle refers to them: neither waits for the collector."""
    step = as_on_cuda(recompute=True)
    trained(step, 3)
    gone = weakref.ref(step), weakref.ref(step.graph)
    gc.collect()
    gc.disable()
    try:
        del step
        assert [reference() for reference in gone] == [None, None]
    finally:
        gc.enable()


# -------------------------------------------------------------------------------------------------------- compiled steps

@pytest.fixture
def compiles(monkeypatch):
    """torch.compile without its code generator, which needs a C++ compiler: what it traces runs operation by operation."""
    torch._dynamo.reset()
    compile, traced = torch.compile, []

    def backend(graph, inputs):
        traced.append(graph)
        return graph

    monkeypatch.setattr(torch, "compile", lambda function, dynamic, options: compile(function, dynamic=dynamic, backend=backend))
    yield traced
    torch._dynamo.reset()


@pytest.mark.parametrize("name, setup", FULL)
def test_a_compiled_step_is_the_plain_step(name, setup, compiles):
    """Traced whole, twice: the first time step is a program of its own, for nothing before it wants a gradient."""
    model, (frames, mask, _) = small(name, setup=setup).double(), next(batches(settings()))
    expected = gradients(model, frames.double(), mask)
    for recompute in False, True:
        train.wrap_step(model, recompute, compiled=True)
        assert_near(gradients(model, frames.double(), mask), expected, 1e-12)
    assert len(compiles) == 2


def test_who_gets_a_compiled_step(as_on_cuda):
    least = train.COMPILE_FROM
    for options, expected in [(dict(iterations=least), True), (dict(iterations=least - 1), False),
                              (dict(iterations=least, eager=True), False), (dict(iterations=least, iteration=1), False),
                              (dict(iterations=least + 1, iteration=1), True)]:
        assert as_on_cuda(**options).to_compile == expected
    step = new_step(small(), iterations=least)
    assert not step.to_compile and not step.on_cuda
    step = as_on_cuda(eager=True)
    trained(step, 3)
    assert step.graph is None and not step.on_cuda
