"""The training step: gradients, and on CUDA one recorded graph of compiled steps that does the same.

Without a GPU a step runs on the meta device, which has no values: what needs one is refused there. A graph is stood in
for by one that keeps every operation and the memory it used. The last section needs a GPU.
"""

import functools
import gc
import itertools
import shutil
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import conftest
import numpy as np
import pytest
import torch
from conftest import SMALL
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode
from torch.utils._pytree import tree_leaves

import train

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SETUPS = {name: train.model_file(name).DEFAULT_SETUP for name in train.MODELS}
EVERY = [(name, variant, setup) for name in train.MODELS for variant in train.model_file(name).VARIANTS
         for setup in ("patch4", "fullres")]


def small(name="convlstm", **options):
    torch.manual_seed(0)
    return train.model_file(name).MODEL(
        **dict(size=16, hidden=4, layers=2, kernel=3, patch=2, setup=SETUPS[name]) | options)


def new_step(model, device=CPU, iteration=0, **config):
    """A Step of a run that stands at this iteration."""
    config = dict(batch=2, precision="fp32", loss="l2", optimizer="adam", lr=1e-3, weight_decay=0.0, reverse=True,
                  frames_in=3, horizon=1, seed=0, schedule=10, iterations=10, recompute=False, eager=False) | config
    return train.Step(train.Run(None, config, model, None, device, iteration))


def batches(size=2, device=CPU, missing=False):
    """Endless (frames, mask, learning rate), no two alike."""
    for iteration in itertools.count():
        generator = torch.Generator().manual_seed(iteration)
        frames, mask = (torch.rand(shape, generator=generator) for shape in ((size, 4, 1, 16, 16), (3, size)))
        if missing:
            frames[torch.rand(frames.shape, generator=generator) < 0.2] = torch.nan
        yield frames.to(device), mask.to(device) < 0.5, 1e-2 / (1 + iteration)


def gradients(model, frames, mask, **config):
    """`train.gradients`: the loss, then every parameter's gradient, in fp64."""
    config = dict(batch=2, precision="fp32", loss="l2+0.2l1") | config
    loss = train.gradients(model, frames.to(next(model.parameters()).dtype), mask, config)
    return [loss.double(), *(p.grad.double() for p in model.parameters())]


def assert_near(tensors, others, tolerance):
    """Apart by no more than a part of their size, all together."""
    apart, size = map(torch.nn.utils.get_total_norm, ([a - b for a, b in zip(tensors, others, strict=True)], others))
    assert apart <= tolerance * size, (apart, size)


# -------------------------------------------------------------------------------------------------------- the gradients

@pytest.mark.parametrize("name, variant, setup", EVERY)
def test_gradients_of_every_model(name, variant, setup):
    """fp32, bf16 and recomputed steps follow fp64; every parameter has a gradient, and it is fp32."""
    model, (frames, mask, _) = small(name, variant=variant, setup=setup).double(), next(batches())
    expected = gradients(model, frames, mask)
    train.wrap_step(model, recompute=True)
    assert_near(gradients(model, frames, mask), expected, 1e-12)
    train.wrap_step(model.float())
    for precision, tolerance in ("fp32", 1e-5), ("bf16", 0.05):
        found = gradients(model, frames, mask, precision=precision)
        assert {p.grad.dtype for p in model.parameters()} == {torch.float32}
        assert_near(found[:1], expected[:1], tolerance)
        assert_near(found[1:], expected[1:], tolerance)


@pytest.mark.parametrize("name, variant", [("convlstm", "full"), ("predrnn", "v2"), ("ms_lstm", "full")])
def test_weighted_shares_add_up(name, variant):
    """To the whole batch's loss and gradients, however unequal the shares are."""
    model, (frames, mask, _) = small(name, variant=variant).double(), next(batches(5, missing=True))
    parts = slice(0, 3), slice(3, 4), slice(4, 5)
    shares = [gradients(model, frames[part], mask[:, part], batch=5) for part in parts]
    assert_near([sum(tensors) for tensors in zip(*shares)], gradients(model, frames, mask, batch=5), 1e-12)


def test_gradients_of_bf16_are_added_in_fp32():
    """A weight that 400 steps read, a gradient of 1 + 2^-6 each: a bf16 sum would stop growing where steps are 2."""
    conv, x = torch.nn.Conv2d(1, 1, 1, bias=False), torch.full((1, 1, 1, 1), 1 + 2**-6)
    with train.autocast(CPU, "bf16"):
        assert conv(x).dtype == torch.bfloat16
        sum(conv(x).float() for _ in range(400)).backward()
    assert conv.weight.grad.item() == 400 * (1 + 2**-6)


def test_a_step_has_the_learning_rate_that_it_is_given():
    step = new_step(small(), reverse=False)
    before = [p.detach().clone() for p in step.parameters]
    step(*next(batches())[:2], 1e-4)                                  # Adam's first step: by lr, up or down
    moved = torch.cat([(a - b).abs().flatten() for a, b in zip(step.parameters, before)])
    assert moved.median().item() == pytest.approx(1e-4, rel=1e-3)


# ------------------------------------------------------------------------------------ what a graph cannot hold, on meta

class Refused(Exception):
    pass


def tensors(*trees):
    return [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]


class Watch(TorchDispatchMode):
    """Refuses what an operation, of the backward pass too, would wait for: values, shapes by value, other devices."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs, given = func.overloadpacket.__name__, kwargs or {}, tensors(args, kwargs)
        devices = {v.device.type for v in given} | {torch.device(kwargs.get("device") or "meta").type}
        by_value = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & {*func.tags}
        if name.startswith(("index", "_index", "_unsafe_index")):     # by numbers they have the shape of the numbers
            by_value = [v for v in tensors(args[1]) if v.dtype == torch.bool]
        if by_value or given and devices != {"meta"}:
            raise Refused(f"{name} on {devices}, {by_value}")
        return func(*args, **kwargs)


@pytest.fixture
def on_meta(monkeypatch):
    """`train.gradients` of a model on the meta device, which autocast does not know."""
    monkeypatch.setattr(train, "autocast", lambda device, precision: nullcontext())

    def work(model):
        frames, mask = (torch.empty(shape, device="meta") for shape in ((2, 3, 1, *model.size), (2, 2)))
        with Watch():
            return train.gradients(model, frames, mask.bool(), dict(batch=2, precision="fp32", loss="l1+l2"))

    return work


@pytest.mark.parametrize("name, variant, setup", EVERY)
def test_nothing_in_the_gradients_waits(name, variant, setup, on_meta):
    with torch.device("meta"):
        model = small(name, variant=variant, setup=setup)
    train.wrap_step(model, recompute=name == "convlstm")
    assert on_meta(model).device.type == "meta"


SCALAR, INDEX = torch.tensor(2.0), torch.tensor([0, 1])
FAULTS = [
    lambda x: x * x.mean().item(), lambda x: x * x.mean().tolist(), lambda x: x if x.mean() > 0 else -x,
    lambda x: x if torch.equal(x, x) else -x, lambda x: x.cpu().to(x.device), lambda x: x * SCALAR, lambda x: x + x[INDEX],
    lambda x: x + x[:, np.array([0])], lambda x: x + torch.ones(1).to(x.device, non_blocking=True),
    lambda x: x + x[x > 0].sum(), lambda x: x.index_put((x > 0,), x.sum()), lambda x: x + x.masked_select(x > 0).sum(),
    lambda x: x + (x > 0).nonzero().sum(), lambda x: x + x.unique().sum()]


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_what_would_wait_is_refused(backward, fault, on_meta):
    def embed(x):
        y = plain(x if backward else fault(x))
        if backward:
            y.register_hook(fault)
        return y

    with torch.device("meta"):
        model = small()
    plain, model.embed.forward = model.embed.forward, embed
    with pytest.raises(Refused):
        on_meta(model)


# ------------------------------------------------------------------------------------- a graph, stood in for on the CPU

class Graph(TorchDispatchMode):
    """Stands in for torch.cuda.CUDAGraph, and for torch.cuda.graph, which records into it.

    Keeps every operation with the tensors it read and wrote, to do the same in the same memory again.
    """

    def __init__(self):
        super().__init__()
        self.operations, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        written = func(*args, **kwargs or {})
        self.operations.append((func, args, kwargs or {}, written))
        return written

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, written in self.operations:
            for old, new in zip(tensors(written), tensors(func(*args, **kwargs))):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def recording():
    return isinstance(_get_current_dispatch_mode(), Graph)


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
    assert gc.isenabled() and not recording()


def trained(step, calls, **options):
    """Its losses over some calls, and the weights and moments that it ends with."""
    losses = [step(*batch) for batch in itertools.islice(batches(**options), calls)]
    moments = [v for of_one in step.optimizer.state_dict()["state"].values() for v in of_one.values()]
    return [loss.item() for loss in losses], [p.detach() for p in step.parameters], moments


def assert_same(a, b):
    assert a[0] == b[0]
    assert all(torch.equal(x, y) for part in (1, 2) for x, y in zip(a[part], b[part], strict=True))


@pytest.mark.parametrize("reverse, missing", [(False, False), (True, True)])
def test_a_graph_is_the_plain_step(reverse, missing, as_on_cuda, capsys):
    step = as_on_cuda(reverse=reverse, recompute=reverse)
    assert_same(trained(step, 7, missing=missing), trained(new_step(small(), reverse=reverse), 7, missing=missing))
    assert step.graph.replays == (14 if reverse else 7) and capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [None, RuntimeError("operation not permitted when stream is capturing\nand more")])
def test_the_collector_destroys_nothing_while_a_graph_is_recorded(error, as_on_cuda, capsys):
    """Neither what was garbage before, which is collected first, nor what becomes garbage meanwhile."""
    destroyed, seen, step = [], [], as_on_cuda()

    class Older:                                                      # a graph that only the collector frees
        def __init__(self):
            self.own = self

        def __del__(self):
            destroyed.append(recording())

    def embed(x):
        if recording():
            Older()
            seen.append((len(destroyed), [[] for _ in range(10_000)]))       # enough for the collector, were it on
            if error:
                raise error
        return plain(x)

    plain, step.model.embed.forward = step.model.embed.forward, embed
    Older()
    assert_same(trained(step, 4), trained(new_step(small()), 4))
    gc.collect()
    assert {number for number, _ in seen} == {1} and destroyed == [False] * (1 + len(seen))
    says = "the step is not recorded: operation not permitted when stream is capturing; the run continues without\n"
    assert bool(step.graph) == (error is None) and capsys.readouterr().out == (says if error else "")


def test_a_step_takes_its_graph_along(as_on_cuda):
    """No cycle refers to them: neither waits for the collector."""
    step = as_on_cuda(recompute=True)
    trained(step, 3)
    gone = weakref.ref(step), weakref.ref(step.graph)
    gc.collect()
    gc.disable()
    del step
    gc.enable()
    assert [reference() for reference in gone] == [None, None]


# ------------------------------------------------------------------------------------------------------- compiled steps

@pytest.fixture
def compiles(monkeypatch):
    """torch.compile without its code generator, which needs a C++ compiler: what it traces runs as it is."""
    def backend(graph, inputs):
        traced.append(graph)
        return graph

    torch._dynamo.reset()
    compile, traced = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda work, options, **more: compile(work, backend=backend, **more))
    yield traced
    torch._dynamo.reset()


@pytest.mark.parametrize("name", train.MODELS)
def test_a_compiled_step_is_the_plain_step(name, compiles):
    """Traced whole, twice: the first time step is a program of its own, for nothing before it wants a gradient."""
    model, (frames, mask, _) = small(name).double(), next(batches())
    expected = gradients(model, frames, mask)
    for recompute in False, True:
        train.wrap_step(model, recompute, compiled=True)
        assert_near(gradients(model, frames, mask), expected, 1e-12)
    assert len(compiles) == 2


def test_who_gets_a_compiled_step(as_on_cuda):
    least = train.COMPILE_FROM
    for iterations, iteration, eager in (least, 0, False), (least - 1, 0, False), (least, 1, False), (least, 0, True):
        step = as_on_cuda(iterations=iterations, iteration=iteration, eager=eager)
        assert step.to_compile == (iterations - iteration == least and not eager) and step.to_record != eager
    assert not new_step(small(), iterations=least).to_record and trained(step, 3) and step.graph is None


def test_a_step_is_compiled_for_training_and_evaluation(as_on_cuda, compiles, capsys):
    """Before anything else, and the user sees it."""
    step, plain = as_on_cuda(iterations=train.COMPILE_FROM), new_step(small())
    trained(step, 1), trained(plain, 1)
    said, number = capsys.readouterr().out.splitlines(), len(compiles)
    assert len(said) == 2 and said[0].startswith("compiling") and said[1].startswith("compiled in ")
    for rows in 1, 2:
        found, expected = (train.predict(each.run, next(batches())[0][:rows, :3], 2) for each in (step, plain))
        torch.testing.assert_close(found, expected)
    assert len(compiles) == number


@pytest.mark.parametrize("what", ["compile", "predict", "elsewhere"])
def test_what_fails_is_said_once_and_the_step_goes_on_without(what, as_on_cuda, compiles, monkeypatch, capsys):
    """All processes do, where one of them fails."""
    def fail(*args, **options):
        raise RuntimeError("no working C++ compiler\n and more")

    if what == "elsewhere":
        monkeypatch.setattr(train, "maximum", lambda number: 1)
    else:
        monkeypatch.setattr(torch if what == "compile" else train, what, fail)
    step = as_on_cuda(iterations=train.COMPILE_FROM, recompute=True)
    assert_same(trained(step, 4), trained(new_step(small()), 4))
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("the step is not")]
    problem, *stages = ["not on every device", "compiled", "recorded"] if what == "elsewhere" else [
        "no working C++ compiler", "compiled"]
    assert said == [f"the step is not {stage}: {problem}; the run continues without" for stage in stages]
    assert bool(step.graph) == (what != "elsewhere")
    assert step.model.step.args[0].__func__ is type(step.model).step              # not compiled, but computed again


# ---------------------------------------------------------------------------------------------------------- with a GPU

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on_cuda(form, model, **config):
    """What a Step does in one of three forms: eager, graph or compiled."""
    torch._dynamo.reset()                                             # else it compiles no ninth version of a function
    iterations = train.COMPILE_FROM if form == "compiled" else 10
    step = new_step(model, CUDA, iterations=iterations, eager=form == "eager", **config)
    result = trained(step, 6, device=CUDA)
    assert bool(step.graph) == (form != "eager") and step.optimizer.defaults["fused"]
    return result


def assert_close(a, b, start):
    """To rounding: losses to 1 %, and weights apart by no more than a tenth of the way from where both started."""
    np.testing.assert_allclose(a[0], b[0], rtol=1e-2)
    apart, way = (torch.stack([(x.cpu() - y.cpu()).norm() for x, y in zip(a[1], other, strict=True)]).norm()
                  for other in (b[1], start))
    assert apart <= 0.1 * way, (apart, way)


@needs_cuda
@pytest.mark.parametrize("precision, recompute", [("fp32", False), ("tf32", False), ("bf16", False), ("bf16", True)])
@pytest.mark.parametrize("form, name, variant, setup", [("graph", *case) for case in EVERY] + [
    ("compiled", name, "full", setup) for name, setup in SETUPS.items()])
def test_cuda_a_graph_is_the_eager_step(form, name, variant, setup, precision, recompute, capsys):
    new = functools.partial(small, name, variant=variant, setup=setup)
    eager = on_cuda("eager", new(), precision=precision)
    assert_close(on_cuda(form, new(), precision=precision, recompute=recompute), eager, [*new().parameters()])
    assert "the step is not" not in capsys.readouterr().out


@needs_cuda
def test_cuda_follows_the_cpu():
    assert_close(on_cuda("graph", small()), trained(new_step(small()), 6), [*small().parameters()])


@needs_cuda
@pytest.mark.parametrize("eager", [False, True])
def test_cuda_nothing_waits(eager):
    """Neither drawing a batch nor a step; the first, which records, may."""
    clips = train.data.open_data("moving_digits", frames_in=2, horizon=2)
    step = new_step(small(size=64, patch=4), CUDA, reverse=False, eager=eager, frames_in=2, horizon=2)
    for iteration in range(6):
        torch.cuda.set_sync_debug_mode("error" if iteration else "default")
        try:
            frames = clips.train(0, iteration, 2, slice(0, 2), CUDA)
            mask, _ = train.sampling_mask(step.model, step.config, iteration, slice(0, 2), CUDA)
            step(frames, mask, 1e-3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert bool(step.graph) != eager


@needs_cuda
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_cuda_a_run_continues_with_a_graph_without_one_and_on_the_cpu(precision, empty_folder):
    command = ["convlstm", *SMALL, *"--iterations 6 --eval-sequences 3 --name first --device cuda".split()]
    assert conftest.run(*command, "--precision", precision) == 0
    start, results = [*train.open_run("runs/first").model.parameters()], {}
    for name, options in ("eager", ["--eager"]), ("graph", []), ("cpu", ["--device", "cpu"]):
        shutil.copytree("runs/first", f"runs/{name}")
        assert conftest.run("--resume", f"runs/{name}", "--iterations", 12, *options) == 0
        ended = train.open_run(f"runs/{name}")
        results[name] = [ended.log[-1][1]], [*ended.model.parameters()]
        assert_close(results[name], results["eager"], start)
