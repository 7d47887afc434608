"""Train a model by name, evaluate it, forecast with it: the command line.

    python train.py convlstm                      the paper's run on Moving MNIST, on a CUDA device
    python train.py convlstm --quick              a three-minute demonstration on any machine
    torchrun --nproc_per_node=4 train.py convlstm the same run on four devices
    python train.py --help                        everything else

A run is a model, a dataset and settings, and lives in a folder of its own, runs/NAME:

    config.json                    every setting; with the code and the data it decides all that follows
    log.csv                        the training loss
    last.pt, best.pt               the last checkpoint, and that of the best validation score
    results.json, forecast.png     scores of the test set, and its first sequences

Clips and sampling masks are a pure function of (seed, iteration), so a checkpoint needs no random state, and a resumed
run goes on bit for bit. Nothing here knows a model's inside: a model file is picked by name, and its contract (README,
"The contract") is all that is used.

    file ──data.py──▶ clips ──the step──▶ model ──evaluation──▶ metrics.py: scores, table, pictures ──▶ runs/NAME

Sections: a run, its settings; the step; the loop; the step on CUDA; evaluation; runs on the disk; commands; figures;
command line; the machine; processes, signals, messages.
"""

import os
import signal

if __name__ == "__main__":      # torch takes seconds to import: Ctrl-C is one line meanwhile, too
    signal.signal(signal.SIGINT, lambda *_: os._exit(os.write(2, b"train.py: interrupted\n") and 130))

import argparse
import contextlib
import functools
import io
import json
import math
import subprocess
import sys
import time
import zipfile
from collections import Counter
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import data
import metrics

MODELS = ("convlstm", "predrnn", "sa_convlstm", "cms_lstm", "moderrnn", "ms_lstm")
# A network that any machine trains in about three minutes, whatever the model: all its iterations take so many
# multiply-accumulates (forward). It says nothing about the papers' results.
QUICK = dict(data="moving_digits", layers=2, hidden=32, kernel=3, patch=8, batch=4, lr=5e-3, final_lr=1e-5,
             loss="l2+0.2l1", reverse=False, eval_sequences=100)
QUICK_MACS = 1.62e12
OWN = dict(iterations=None, epochs=100, reverse=False)  # data of one's own: no paper speaks; no storm runs backwards
MASK_STREAM = 16                    # of data.draws, for scheduled sampling
EVAL_BATCH = 16                     # sequences at a time, where they fit; fixed: an evaluation repeats to the bit


# ------------------------------------------------------------------------------------------------- a run, its settings

@dataclass
class Run:
    """A model, its data and settings, as far as they have come, and the folder that keeps what comes of them."""

    folder: Path
    config: dict                    # all of `settings`
    model: torch.nn.Module
    clips: data.Clips = None
    device: torch.device = torch.device("cpu")
    iteration: int = 0
    validation: list = field(default_factory=list)      # [[iteration, MSE], …]
    checkpoint: dict = None         # that it was read from, if any
    weights: str = "last"           # or "best": that checkpoint's name
    piece: int = EVAL_BATCH         # sequences that an evaluation forecasts at a time, fewer where they do not fit


def settings(args, init=None):
    """Every setting of a new run, as JSON-safe data, its clips and its device. What is not given is the paper's.

    init: the run of --init.
    """
    module = model_file(args.model)
    setup, variant = args.setup or module.DEFAULT_SETUP, args.variant or "full"
    if variant not in module.VARIANTS:
        raise UserError(f"{args.model} has no variant {variant!r}; it has {', '.join(module.VARIANTS)}")
    quick = QUICK if args.quick else {}

    def pick(name, default=None):
        given = getattr(args, name)
        return quick.get(name, default) if given is None else given

    device = device_of(args.device, quick=args.quick)
    precision = precision_of(args.precision, device)
    source, options = pick("data", "moving_mnist"), options_of(args)
    start = init and init.config["clips"].get("scale")
    if start and source not in data.DATASETS and "normalize" not in options:
        options["scale"] = start    # weights mean what they meant
    clips = data.open_data(source, args.data_dir or "data", setup, args.frames_in, args.horizon, **options)
    scale = json_safe(clips.info()).get("scale")
    if start and scale != start:
        raise UserError(f"--init {args.init}: its weights read data scaled by {start}, these are scaled by "
                        f"{scale or 'their type'}: leave out --normalize to take over the run's scale")
    training = dict(module.TRAINING[setup])
    training |= training.pop("data").get(clips.name, {}) | (OWN if clips.own else {}) | quick
    batch = pick("batch", training["batch"])
    check_shares("--batch", batch, "raise --batch")
    network = dict(channels=clips.channels, size=list(clips.size), hidden=pick("hidden"), layers=pick("layers"),
                   kernel=pick("kernel"), patch=pick("patch", training.get("patch")), **training.get("model", {}))
    if args.quick:
        try:
            _, macs = cost(module, clips.frames_in + clips.horizon, setup=setup, variant=variant, **network)
        except ValueError as error:
            raise UserError(f"{args.model}: {error}") from None
        whole = max(1, round(QUICK_MACS / macs / batch))
    else:                           # some papers count epochs
        whole = training.get("iterations") or max(1, training["epochs"] * clips.train_count // batch)
    iterations, on_cpu = pick("iterations", whole), device.type == "cpu"
    eval_sequences = min(pick("eval_sequences", 200 if on_cpu else clips.test_count), clips.test_count)
    config = dict(
        model=args.model, variant=variant, setup=setup, network=network,
        data=source if source in data.DATASETS else os.path.abspath(source), options=options,
        data_dir=os.path.abspath(args.data_dir or "data"), frames_in=clips.frames_in, horizon=clips.horizon,
        clips=clips.info(),
        optimizer=training["optimizer"], weight_decay=training.get("weight_decay", 0.0), lr=pick("lr", training["lr"]),
        final_lr=training.get("final_lr"), loss=training["loss"], batch=batch,
        reverse=training["reverse"] and not args.no_reverse,
        iterations=iterations, schedule=iterations,     # `schedule`: what ε and lr are spread over, on a longer run too
        seed=args.seed or 0, precision=precision, recompute=bool(args.recompute),
        graph=not args.no_graph, compile=compile_of(args, device), init=args.init and os.path.abspath(args.init),
        log_every=10 if on_cpu else 100, eval_every=args.eval_every or max(1, iterations // (5 if args.quick else 20)),
        eval_sequences=eval_sequences, valid_sequences=min(clips.valid_count, max(1, eval_sequences // 4), 500),
        save_every=args.save_every or (100 if on_cpu else 1000),
        # Only a run of the paper's own network, schedule and training is set beside the paper's figures.
        whole=whole, as_published=not args.quick and not clips.own and iterations >= whole and all(
            getattr(args, name) is None for name in ("hidden", "layers", "kernel", "patch", "batch", "lr", "no_reverse",
                                                     "init", "frames_in", "horizon")),
        device=device.type, versions=versions(device))
    return json_safe(config), clips, device


def compile_of(args, device):
    """Whether a start of a run compiles its step: each says so itself."""
    if args.compile and device.type == "cpu":
        raise UserError("--compile spares CUDA launches; on the CPU it gains nothing: leave it out")
    return bool(args.compile)


def options_of(args):
    """What the command line says of how data are to be read, and only that."""
    options = {name: getattr(args, name) for name in ("box", "normalize", "layout", "channels", "unit", "thresholds")}
    options = {name: value for name, value in options.items() if value is not None}
    if "normalize" in options:
        options["normalize"] = options["normalize"] or "range"     # without numbers: the training part's range
    return options


def json_safe(content):
    return json.loads(json.dumps(content))


def model_file(name):
    """The module of a model, by the name of its file."""
    if name not in MODELS:
        raise UserError(f"no model is called {name!r}; the models: {', '.join(MODELS)}")
    return import_module(name)


def build(config):
    """The network of a run, on the CPU, as its seed makes it."""
    torch.manual_seed(config["seed"])
    module = model_file(config["model"])
    try:
        model = module.MODEL(setup=config["setup"], variant=config["variant"], **config["network"])
    except ValueError as error:
        raise UserError(f"{config['model']}: {error}") from None
    model.recompute = config["recompute"]
    return model


def cost(module, frames, channels=1, size=64, **network):
    """Parameters of a network, and multiply-accumulates of one sequence of that many frames as in training, counted by
    torch without computing anything. One step is counted: all cost the same, whatever they read."""
    size = (size, size) if isinstance(size, int) else size
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = module.MODEL(channels=channels, size=size, **network)
        model(torch.empty(1, 2, channels, *size), extras="loss")
    return sum(p.numel() for p in model.parameters()), (frames - 1) * counter.get_total_flops() / 2


# ------------------------------------------------------------------------------------------------------------- the step

def autocast(device, precision):
    """Convolutions and matrix products in bf16 or TF32 where asked for; memories, norms, losses and scores are fp32."""
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def make_optimizer(model, config):
    """Adam or AdamW. On CUDA it is two launches, and the learning rate lies on the device, as a graph needs it."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config["optimizer"]]
    device = next(model.parameters()).device
    options = dict(lr=config["lr"]) if device.type == "cpu" else dict(
        lr=torch.tensor(config["lr"], device=device), fused=True, capturable=True)
    return kind(model.parameters(), weight_decay=config["weight_decay"], **options)


def sampling_mask(model, config, iteration, device):
    """Scheduled sampling: bool (T-1, B), and ε, the probability at the last step."""
    steps = config["frames_in"] + config["horizon"] - 1
    p = model.truth_probability(iteration, config["schedule"], config["frames_in"], steps)
    drawn = data.draws(MASK_STREAM, config["seed"], iteration, config["batch"], steps)
    mask = drawn[processes.share(config["batch"])] < np.rint(np.array(p) * 2**32)       # (B, T-1)
    return data.to_device(mask.T.copy(), device), p[-1]


def frame_loss(predictions, truth, kind):
    """Mean over batch and frames of the sum over pixels of error², and of |error| by the weight that `kind` gives it.

    A pixel whose truth is NaN adds nothing.
    """
    error = torch.where(truth.isnan(), 0.0, predictions.float() - truth)
    weight = {"l2": 0, "l2+0.2l1": 0.2, "l1+l2": 1}[kind]
    pixels = error.square() + weight * error.abs() if weight else error.square()
    return pixels.sum((2, 3, 4)).mean()


def train_step(model, optimizer, frames, mask, config):
    """One optimiser step on one batch; returns the loss, this process's share of it where there are several.

    frames: (B, T, C, H, W), NaN where there are no data: the network reads 0 there. mask: (T-1, B), of scheduled
    sampling. DDP averages gradients over the processes; weighted by its share of the batch, a process's loss adds up to
    the loss of the whole batch whatever the shares are.
    """
    weight = len(frames) / config["batch"]
    # A CPU does not wait for launches: autograd's own way with weights is a little faster there.
    handed_on = frames.device.type != "cpu" or config.get("compile")
    with autocast(frames.device, config["precision"]), \
            weights_handed_on(model, config) if handed_on else contextlib.nullcontext():
        predictions, extra = model(torch.where(frames.isnan(), 0.0, frames), use_truth=mask, extras="loss")
    loss = (frame_loss(predictions, frames[:, 1:], config["loss"]) + extra.get("loss", 0.0)) * weight
    optimizer.zero_grad()
    (loss * processes.count).backward()
    optimizer.step()
    return loss.detach()


def learning_rate(config, iteration):
    """Constant, or a cosine from lr to final_lr over the schedule."""
    if config["final_lr"] is None:
        return config["lr"]
    final = min(config["final_lr"], config["lr"])
    return final + (config["lr"] - final) * (1 + math.cos(math.pi * min(1, iteration / config["schedule"]))) / 2


# ----------------------------------------------------------------------------------------------------------- the loop

def train(run, stop):
    """Train a run from where it stands to its end; leaves last.pt, best.pt and log.csv."""
    config, clips, device = run.config, run.clips, run.device
    step = Step(run.model.to(device), config, device)
    if run.checkpoint:
        step.load(run.checkpoint["optimizer"])
    share = processes.share(config["batch"])
    log = Log(run)

    def save(name):
        losses = log.numbers()
        optimizer = step.optimizer.state_dict()
        if not all_finite([*run.model.state_dict().values(), *optimizer["state"].values()]):
            raise log.broken("the weights were", run.iteration)
        if processes.first:
            save_checkpoint(run.folder / name, dict(
                config=config, iteration=run.iteration, validation=run.validation, logged=log.logged, losses=losses,
                seconds=log.seconds(), model=run.model.state_dict(), optimizer=optimizer))

    with log.bar:
        while True:
            # Everything due at this iteration comes first, so a run resumed here, or one that was stopped in the middle
            # of it, does the same things in the same order.
            iteration, done, scores = run.iteration, run.iteration == config["iterations"], dict(run.validation)
            due = iteration and (iteration % config["eval_every"] == 0 or done) and iteration not in scores
            if due and (score := validate(run, stop)) is not None:
                if not math.isfinite(score):
                    raise log.broken("the validation's MSE was", iteration)
                best = score < min(scores.values(), default=math.inf)
                run.validation.append([iteration, score])
                say(f"iteration {iteration}: validation MSE {score:.2f}" + (", the best yet" if best else ""))
                if best:
                    save("best.pt")
            asked = stop.agreed()
            if iteration % config["save_every"] == 0 or done or asked:
                save("last.pt")
            if asked:
                processes.maximum(0)    # who left before it is saved, would make torchrun end the one that saves
                raise Interrupted(asked, f"stopped at iteration {iteration}, saved; go on with: "
                                         f"python train.py --resume {run.folder}")
            if done:
                return

            frames = clips.train(config["seed"], iteration, config["batch"], share, device)
            mask, epsilon = sampling_mask(run.model, config, iteration, device)
            lr = learning_rate(config, iteration)
            loss = step(frames, mask, lr)
            run.iteration += 1
            log.add(loss, lr, epsilon)


class Log:
    """log.csv, the progress bar, and the losses on their way to both: they stay on the device, which is waited for
    every `log_every` iterations and before a save.

    Without a terminal a plain line now and then takes the bar's place. Lines of log.csv past the checkpoint that a run
    is resumed from are cut off.
    """

    def __init__(self, run):
        self.run, self.path, rows = run, run.folder / "log.csv", []
        self.losses, self.logged = [], run.iteration        # since the last line, and the iteration of that line
        self.begun, self.plain_at = time.monotonic(), 0.0
        if before := run.checkpoint:
            self.logged = before["logged"]
            self.begun -= before["seconds"]
            self.losses = [torch.tensor(loss if processes.first else 0.0, device=run.device)
                           for loss in before["losses"]]
            rows = [row for row in read_log(self.path) if int(row[0]) <= run.iteration]
        self.start, self.seconds_before = run.iteration, self.seconds()
        if processes.first:
            rows = [["iteration", "loss", "lr", "epsilon", "seconds"], *rows]
            data.write_whole(self.path, "".join(",".join(row) + "\n" for row in rows).encode())
        self.bar = tqdm(total=run.config["iterations"], initial=self.start, unit="it", dynamic_ncols=True,
                        disable=not (processes.first and on_terminal()))

    def seconds(self):
        return time.monotonic() - self.begun

    def broken(self, what, iteration):
        return RunError(f"{what} not finite at iteration {iteration}; the last good checkpoint is "
                        f"{self.run.folder / 'last.pt'}; try a lower --lr or --precision fp32")

    def numbers(self):
        """The losses since the last line; one that is not finite ends the run."""
        losses = processes.sum(torch.stack(self.losses)).tolist() if self.losses else []
        for iteration, loss in enumerate(losses, self.logged + 1):
            if not math.isfinite(loss):
                raise self.broken("the loss was", iteration)
        return losses

    def add(self, loss, lr, epsilon):
        """An iteration is done; every `log_every` of them, and the last, give a line."""
        iteration, config = self.run.iteration, self.run.config
        self.losses.append(loss)
        self.bar.update()
        if iteration % config["log_every"] and iteration != config["iterations"]:
            return
        losses, seconds = self.numbers(), self.seconds()
        loss, self.losses, self.logged = sum(losses) / len(losses), [], iteration
        if processes.first:
            with open(self.path, "a") as file:
                file.write(f"{iteration},{loss!r},{lr!r},{epsilon!r},{seconds:.2f}\n")
        rate = (iteration - self.start) / (seconds - self.seconds_before)
        text = f"loss {loss:.4g}, ε {epsilon:.2f}, lr {lr:.2g}, {rate * config['batch']:.1f} sequences/s"
        self.bar.set_postfix_str(text)
        if self.bar.disable and time.monotonic() - self.plain_at > 15:
            left = (config["iterations"] - iteration) / rate
            say(f"iteration {iteration}/{config['iterations']}: {text}, {left / 60:.0f} min left")
            self.plain_at = time.monotonic()


def read_log(path):
    """The rows of a log.csv, [] where there is none: a process killed while it wrote may have left half a line."""
    if not path.exists():
        return []
    with data.reading(path, "move it away to go on without it") as file:
        text = file.read().decode()
        rows = [line.split(",") for line in text[: text.rfind("\n") + 1].splitlines()[1:]]
        for iteration, loss, lr, epsilon, seconds in rows:
            int(iteration), [float(number) for number in (loss, lr, epsilon, seconds)]
    return rows


def all_finite(states):
    """Whether all tensors of a list of tensors and dicts of tensors are finite, at one look."""
    tensors = [t for state in states for t in (state.values() if isinstance(state, dict) else [state])]
    largest = torch.nn.utils.get_total_norm([t for t in tensors if t.is_floating_point()], math.inf)
    return bool(largest.isfinite())


# ----------------------------------------------------------------------------------------------------- the step on CUDA

class HandOn(torch.autograd.Function):
    """Weights for one time step, and the same weights for the steps after it.

    A weight that T steps read has T gradients, which autograd adds up one by one: a kernel for each weight and step, in
    the type in which it is read. Here those of all weights of a step arrive together, and one kernel adds them, in
    fp32, to the sum over the later steps. Kernels that a model makes of weights before its steps are not among them.

    Called with n, n weights as the step reads them, and the n weights or what the step before handed on; returns both.
    """

    @staticmethod
    def forward(ctx, n, *weights):
        ctx.n = n
        ctx.set_materialize_grads(False)
        return tuple(w.view_as(w) for w in weights)

    @staticmethod
    def backward(ctx, *gradients):
        here, later = gradients[:ctx.n], gradients[ctx.n:]      # None for a weight that is not read, here or later
        here = cast(here, [i for i, g in enumerate(here) if g is not None and g.dtype == torch.bfloat16], torch.float32)
        both = [i for i in range(ctx.n) if here[i] is not None and later[i] is not None]
        sums = torch._foreach_add([here[i] for i in both], [later[i] for i in both]) if both else []
        sums = dict(zip(both, sums))
        return None, *[None] * ctx.n, *(sums.get(i, later[i] if g is None else g) for i, g in enumerate(here))


def cast(tensors, which, dtype):
    """A list of tensors, those at the places `which` as copies of another type, all made by one kernel."""
    copies = [torch.empty_like(tensors[i], dtype=dtype) for i in which]
    if copies:
        torch._foreach_copy_(copies, [tensors[i] for i in which])
    copies = dict(zip(which, copies))
    return [copies.get(i, t) for i, t in enumerate(tensors)]


class TimeStep(torch.nn.Module):
    """The step of a model as a module of its own, which torch.func can call with other weights."""

    def __init__(self, model, step):
        super().__init__()
        self.model, self.step = model, step

    def forward(self, *arguments):
        return self.step(self.model, *arguments)


@functools.cache
def compiled(step):
    # As few kernels as the compiler can make: it would lay out every convolution's weight anew at each call, and leave
    # sums over different maps to kernels of their own.
    return torch.compile(step, dynamic=False, options=dict(layout_optimization=False, combo_kernels=True))


@contextlib.contextmanager
def weights_handed_on(model, config):
    """Within it each time step of a model's forward pass, compiled if config["compile"], reads its weights from HandOn,
    in bf16 those of convolutions, cast once for all steps."""
    model = getattr(model, "module", model)         # DistributedDataParallel's
    if not hasattr(model, "step"):                  # a network that keeps the contract and no more
        yield
        return
    names, weights = zip(*((f"model.{name}", w) for name, w in model.named_parameters()))
    read, handed = [w.detach() for w in weights], weights
    if config["precision"] == "bf16":
        convs = {id(w) for m in model.modules() if isinstance(m, torch.nn.Conv2d) for w in m.parameters()}
        read = cast(read, [i for i, w in enumerate(weights) if id(w) in convs], torch.bfloat16)
    step = type(model).step
    step = TimeStep(model, compiled(step) if config.get("compile") else step)

    def handing_on(*arguments):
        nonlocal handed
        both = HandOn.apply(len(names), *read, *handed)
        handed = both[len(names):]
        return torch.func.functional_call(step, dict(zip(names, both)), arguments)

    model.step = handing_on
    try:
        yield
    finally:
        del model.step
        handed = weights            # --recompute calls it again, and what that hands on leads nowhere


class Graph:
    """All that a function launches on CUDA, as one launch. What it returns is one tensor."""

    def __init__(self, work):
        self.work, self.graph, self.stream = work, torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def run(self, **options):
        """Call the function, on the stream on which it will be recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.work(**options)
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self):
        """Nothing is computed. A call that waits for the device, or chooses by its values, raises RuntimeError."""
        with torch.cuda.stream(self.stream), torch.cuda.graph(self.graph, stream=self.stream):
            self.result = self.work()

    def replay(self):
        """Launch what was recorded: it reads and writes where the recorded call did."""
        self.graph.replay()
        return self.result.clone()


class Step:
    """One optimiser step on one batch or, with `reverse`, two: the same clips played backwards are as good a film.

    Called with frames, mask (both as for `train_step`, of the same shape every time) and the learning rate; returns the
    loss, on the device: nothing waits. A step is thousands of small kernels, and launching them takes longer than
    running them, so on CUDA the third call is recorded as one graph, which those after it replay. The first two,
    ordinary steps of the run like it, leave ready what recording cannot make: cuDNN's choice of algorithms, the
    optimiser's state. Not over several processes, and not where config["graph"] is False.
    """

    def __init__(self, model, config, device):
        self.config, self.graph, self.eager_calls = config, None, math.inf
        if config.get("compile"):
            say("compiling: the first iteration takes minutes")
        self.optimizer = make_optimizer(model, config)
        self.model = DistributedDataParallel(model, gradient_as_bucket_view=True) if processes.count > 1 else model
        if device.type == "cuda" and config.get("graph", True):
            if processes.count == 1:
                self.eager_calls = 2
            else:
                say("no CUDA graph: it is for a process alone; every step is launched kernel by kernel")

    def load(self, state):
        """Go on from an optimiser's state_dict, of any device: its moments and counts; settings stay the device's."""
        self.optimizer.load_state_dict(state | dict(param_groups=self.optimizer.state_dict()["param_groups"]))
        self.graph = None                       # it knows the state that is replaced

    def __call__(self, frames, mask, lr):
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(lr) if isinstance(group["lr"], torch.Tensor) else lr
        if self.graph:
            self.frames.copy_(frames)
            self.mask.copy_(mask)
            return self.graph.replay()
        self.frames, self.mask = frames, mask
        if not self.eager_calls:
            return self.record()
        self.eager_calls -= 1
        return self.eager()

    def eager(self, **other):
        """The step, kernel by kernel, with `other` settings where given."""
        played = [self.frames, self.frames.flip(1)] if self.config["reverse"] else [self.frames]
        losses = [train_step(self.model, self.optimizer, frames, self.mask, self.config | other) for frames in played]
        return sum(losses) / len(losses)

    def record(self):
        """Take the step eagerly, not compiled, and, from the same state, by a graph, which stays if both end alike.

        Alike: the loss to 0.1 %, and apart by a quarter of the step at most all weights together and the first moment
        of each alone (a weight alone may not be: Adam takes a whole step along a gradient that is mere rounding).
        """
        def distances(a, b):
            each = torch.stack(torch._foreach_norm(torch._foreach_sub(a[:2 * n], b[:2 * n])))
            return torch.cat([each[:n].norm()[None], each[n:]])

        weights = [p.detach() for p in self.model.parameters()]
        moments, n = self.optimizer.state.values(), len(weights)
        state = weights + [of_one[name] for name in ("exp_avg", "exp_avg_sq", "step") for of_one in moments]
        before, graph = [v.clone() for v in state], Graph(self.eager)
        self.frames, self.mask = self.frames.clone(), self.mask.clone()        # where the graph will read
        loss, after = graph.run(compile=False), [v.clone() for v in state]
        try:
            torch._foreach_copy_(state, before)
            graph.record()
            replayed = graph.replay()
            alike = distances(after, state) <= 0.25 * distances(after, before)     # bf16 makes up to 0.03
            if torch.allclose(replayed, loss, rtol=1e-3) and alike.all():
                self.graph = graph
                return loss
            problem = (f"its first replay gives loss {replayed:.6g} and the eager step {loss:.6g}; of {len(alike)} "
                       f"weights and moments {int((~alike).sum())} differ")
        except RuntimeError as error:           # out of memory is one
            problem = str(error.__context__ or error).partition("\n")[0]    # ending a broken recording raises anew
        torch._foreach_copy_(state, after)
        self.eager_calls = math.inf
        say(f"no CUDA graph: {problem}; every step is launched kernel by kernel")
        return loss


# --------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def predict(run, frames, horizon):
    """A trained model's predictions of a batch, in as small pieces as the device's memory wants (`run.piece`).

    frames: (B, T, C, H, W) in [0, 1], NaN where there are no data: the model reads 0 there. Returns
    (B, T-1+horizon, C, H, W), float32, not clipped.
    """
    frames = frames.nan_to_num(0.0)
    while True:
        try:
            with autocast(run.device, run.config["precision"]):
                return torch.cat([run.model(part, horizon=horizon).float() for part in frames.split(run.piece)])
        except (MemoryError, RuntimeError) as error:
            if run.piece == 1 or not out_of_memory(error):
                raise
        run.piece //= 2             # out of the handler, so that what did not fit is gone


def batches(run, part, total, horizon, stop):
    """Sequences 0 … total - 1 of a part of a run's clips and their predictions, batch by batch of this process's share.

    part: (start, stop, device) -> frames (b, T, C, H, W), of which `horizon` are to be forecast. Yields (start, stop),
    frames and predictions (b, T-1, C, H, W).
    """
    share = processes.share(total)
    # All take the rounds of the largest share, so that they can agree in each to stop, and one more, which only asks.
    for done in range(0, -(-total // processes.count) + EVAL_BATCH, EVAL_BATCH):
        if asked := stop.agreed():
            raise Interrupted(asked, "stopped during the evaluation; the run is whole, and --eval RUN evaluates it")
        start = share.start + done
        if start < share.stop:
            rows = start, min(start + EVAL_BATCH, share.stop)
            frames = part(*rows, run.device)
            yield rows, frames, predict(run, frames[:, :-horizon], horizon)


def scores_of(clips, frames, predictions, horizon):
    """Score the forecast, all predictions and the two simplest forecasts of frames (b, T, C, H, W), the forecast first.

    Yields (name, predictions, the slice of the frames that they predict, metrics.frame_scores).
    """
    there = None                                # where there are data; None for everywhere
    if clips.masked:
        frames, there = frames.nan_to_num(0.0), ~frames.isnan()
    last, future = slice(-horizon, None), frames[:, -horizon:]
    shown = {"forecast": (predictions[:, last], last), "all_predictions": (predictions, slice(1, None)),
             "repeat_last": (frames[:, -horizon - 1, None].expand_as(future), last),
             "black": (torch.zeros_like(future), last)}
    if clips.channels > 1 and not clips.own:    # some papers score, of two channels, one
        shown["first_channel"] = predictions[:, last, :1], last
    for name, (made, at) in shown.items():
        channels = made.shape[2]
        yield name, made, at, metrics.frame_scores(made, frames[:, at, :channels],
                                                   None if there is None else there[:, at, :channels])


def joined(parts):
    """Scores of parts of a set, {name: (b, T)} each or {} where a part is empty, as those of the set, on the CPU."""
    parts = [part for part in parts if part]
    return {name: torch.cat([part[name] for part in parts]).cpu() for name in (parts[0] if parts else ())}


def forecast_scores(run, part, total, horizon, stop):
    """metrics.frame_scores of the forecast alone, of this process's share of a part of the clips: see `batches`."""
    return joined(next(scores_of(run.clips, frames, predictions, horizon))[3]
                  for _, frames, predictions in batches(run, part, total, horizon, stop))


def validate(run, stop):
    """The forecast's mean MSE over some of the validation set; None if the user asks to stop meanwhile."""
    try:
        scores = forecast_scores(run, run.clips.valid, run.config["valid_sequences"], run.config["horizon"], stop)
    except Interrupted:
        return None
    scores = joined(processes.from_all(scores))
    return scores["mse"][scores["pixels"] != 0].mean().item()       # frames without data have no score


def evaluate(run, stop):
    """All scores of the test set, {"forecast": {"mse": {"mean": …, "frames": […]}, …}, "all_predictions": …, …}. The
    device is waited for once, at the end."""
    clips, horizon = run.clips, run.clips.test_horizon
    scores, sums, units = {}, Counter(), bool(clips.unit or clips.own)
    for rows, frames, predictions in batches(run, clips.test, run.config["eval_sequences"], horizon, stop):
        stored = clips.test_units(*rows, run.device) if units else None
        for name, made, at, found in scores_of(clips, frames, predictions, horizon):
            scores.setdefault(name, []).append(found)
            if units and name != "first_channel":
                # In the data's units the truth is as stored, and so is the last frame repeated: no trip through pixels.
                truth, made = stored[:, at], clips.to_units(made.double().clamp(0, 1))
                if name == "repeat_last":
                    last = stored[:, -horizon - 1, None].expand_as(truth)
                    made = torch.where(last.isnan(), made.to(last.dtype), last)
                there = ~truth.isnan()
                sums["errors", name] += metrics.unit_errors(made, truth, there)
                if clips.thresholds:
                    sums["events", name] += metrics.event_counts(made, truth, clips.thresholds, there)
    scores = {name: joined(parts) for name, parts in scores.items()}
    sums = {name: values.cpu() for name, values in sums.items()}
    scores, sums, pieces = zip(*processes.from_all((scores, sums, run.piece)))
    run.piece, summaries, total = min(pieces), {}, Counter()
    for part in sums:
        total.update(part)
    for name in scores[0]:
        summaries[name] = metrics.summarize(joined(part.get(name) for part in scores))
        if ("errors", name) in total:
            summaries[name] |= metrics.unit_summary(total["errors", name])
        if ("events", name) in total:
            summaries[name] |= metrics.csi_hss(total["events", name], clips.thresholds)
    return summaries


def finish(run, stop, suffix=""):
    """Evaluate a trained run: write results.json and pictures (`suffix` tells others apart), print the table."""
    config, clips, path = run.config, run.clips, run.folder / f"results{suffix}.json"
    number = config["eval_sequences"]
    say(f"evaluating {number} of {clips.test_count} test sequences ({clips.test_set})")
    before = read_results(path) if path.exists() else {}
    run.piece = before.get("eval_batch", EVAL_BATCH)        # in other pieces the last bits are others
    summaries = evaluate(run, stop)
    if not processes.first:
        return
    about = {name: config[name] for name in ("model", "variant", "setup", "frames_in", "precision")}
    about |= dict(data=clips.name, test_set=clips.test_set, sequences=number, horizon=clips.test_horizon,
                  unit=clips.unit, iteration=run.iteration, weights=run.weights, eval_batch=run.piece)
    write_json(path, about | dict(validation=run.validation, **summaries))
    films = [film_of(run, k, f"test sequence {k}") for k in range(min(3, clips.test_count))]
    picture = data.write_whole(run.folder / f"forecast{suffix}.png",
                               metrics.png(metrics.film_sheet(films, label_of(run), clips.unit)))
    # MS-LSTM's released code has PSNR and SSIM of its own; the table shows those that the papers of the set-up report.
    own = {"psnr": "psnr_float", "ssim": "ssim_gaussian"} if config["setup"] == "fullres" else {}
    published = [{own.get(k, k): v for k, v in row.items()} for row in published_scores(config, clips)]
    say(f"\n{label_of(run)}, {number} test sequences\n")
    say(metrics.table(summaries, published, [own.get(m, m) for m in ("mse", "mae", "psnr", "ssim")], clips.unit,
                      config["precision"]))
    say(f"\npictures: {picture}\nresults:  {path}")


def published_scores(config, clips):
    """What the papers report for this very run, as rows for the table; nothing for a run of other settings."""
    rows = []
    for row in model_file(config["model"]).PUBLISHED if config["as_published"] else ():
        same = (row["variant"], row["setup"], row["data"]) == (config["variant"], config["setup"], clips.name)
        if same and row.get("iterations", config["whole"]) == config["iterations"]:
            alone = ", first channel" if row.get("channels", clips.channels) < clips.channels else ""
            row = dict(row, source=row["source"] + (", all" if "over" in row else "") + alone)
            if "mse_frames" in row:
                row.setdefault("mse", round(sum(row["mse_frames"]) / len(row["mse_frames"]), 4))
            for score in ("csi", "hss"):
                row |= {f"{score}_{t:g}": v for t, v in zip(clips.thresholds, row.pop(score, ()))}
            rows.append(row)
    return rows


def label_of(run):
    """What a picture or a table is of."""
    return (f"{run.config['model']} {run.config['variant']} {run.config['setup']}, {run.clips.name}, iteration "
            f"{run.iteration}")


@torch.no_grad()
def shown_forecast(run, number, extras="loss"):
    """A test sequence and its forecast as they are drawn, in the data's unit, NaN where there are no data; all frames
    that the model read; its extras."""
    clips, past = run.clips, run.clips.frames_in
    frames = clips.test(number, number + 1, run.device)
    with autocast(run.device, run.config["precision"]):
        predictions, found = run.model(frames[:, :past].nan_to_num(0.0), horizon=clips.test_horizon, extras=extras)
    extras = {name: [layer.float().cpu() for layer in (layers if isinstance(layers, list) else [layers])]
              for name, layers in found.items() if name != "loss"}
    predictions = predictions.float().clamp(0, 1)
    reads = torch.cat([frames[0, :past], predictions[0, past - 1:-1]]).nan_to_num(0.0)
    truth, forecast = frames, predictions[:, past - 1:]
    if clips.unit:
        truth, forecast = clips.test_units(number, number + 1), clips.to_units(forecast)
    return truth[0].float().cpu(), forecast[0].float().cpu(), reads.cpu(), extras


def film_of(run, number, caption):
    """A test sequence and its forecast, to be drawn."""
    truth, forecast, *_ = shown_forecast(run, number)
    return metrics.Film(caption, run.clips.frames_in, truth, {"": forecast})


# --------------------------------------------------------------------------------------------------- runs on the disk

def new_folder(args, config, clips):
    """Make the folder of a new run: --out/--name, or --out/model-variant-data-N with the first N that is free."""
    out, name, folder = Path(args.out or "runs"), args.name, None
    if name and (Path(name).name != name or name.startswith(".")):
        raise UserError(f"--name {name}: a plain name, please; the folder is given with --out")
    if processes.first:
        names = [name] if name else (f"{config['model']}-{config['variant']}-{clips.name}-{n}" for n in count(1))
        try:
            out.mkdir(parents=True, exist_ok=True)
            for folder in (out / name for name in names):
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    break
            else:
                raise UserError(f"--name {name}: {folder} exists; another name, or --resume it")
            try:
                write_json(folder / "config.json", config)
            except OSError:
                folder.rmdir()
                raise
        except OSError as error:
            raise UserError(f"--out {out}: {error.strerror}") from None
    return processes.from_all(folder)[0]


def write_json(path, content):
    data.write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def save_checkpoint(path, checkpoint):
    content = io.BytesIO()          # first in memory: torch hides what a full disk says
    torch.save(checkpoint, content)
    data.write_whole(path, content.getbuffer())


def read_results(path):
    """A results.json."""
    with data.reading(path, "delete it to have the run evaluated again") as file:
        results = json.loads(file.read())
        int(results["iteration"]), int(results["sequences"]), int(results["eval_batch"])
        for name in ("forecast", "repeat_last"):
            for summary in results[name].values():
                for value in [summary["mean"], *summary["frames"]]:
                    value is None or float(value)
    return results


# What a checkpoint's config holds, by type: one that differs was not written by this program, or was damaged.
CONFIG = {str: "model variant setup data data_dir optimizer loss precision device",
          dict: "network options clips versions", float: "lr weight_decay",
          int: "frames_in horizon batch iterations schedule seed log_every eval_every save_every eval_sequences "
               "valid_sequences whole", bool: "reverse recompute graph as_published"}


def open_run(name):
    """Read a run by its folder (its last.pt) or one of its checkpoints, and check all of it; without its clips."""
    path = Path(name)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        begun = (path.parent / "config.json").exists()
        what = "the run was stopped before its first checkpoint" if begun else "no such run"
        raise UserError(f"{name}: {what} ({path} is missing)")
    with data.reading(path, "it is no checkpoint of train.py, or a damaged one") as file:
        if damaged := zipfile.ZipFile(file).testzip():              # torch.load looks at no checksum
            raise ValueError(f"the checksum of {damaged} differs")
        file.seek(0)
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        config = checkpoint["config"]
        for kind, names in CONFIG.items():
            for name in names.split():
                if type(config[name]) is not kind:
                    raise TypeError(f"{name} is {config[name]!r}")
        model = build(config)
        model.load_state_dict(checkpoint["model"])
        if not all_finite([*model.parameters(), *checkpoint["optimizer"]["state"].values()]):
            raise ValueError("weights or states that are not finite")
        parameters, iteration, losses = [*model.parameters()], checkpoint["iteration"], checkpoint["losses"]
        if isinstance(losses, torch.Tensor):        # of an earlier version: by their iteration, modulo log_every
            losses, logged = losses.view(config["log_every"]), checkpoint["logged"]
            checkpoint["losses"] = losses = losses.roll(-logged)[:iteration - logged].tolist()
        if not 0 <= checkpoint["logged"] == iteration - len(losses):
            raise ValueError("it stands at no iteration")
        [float(number) for number in (checkpoint["seconds"], *losses)]
        [(int(k), float(mse)) for k, mse in checkpoint["validation"]]
        for number, moments in checkpoint["optimizer"]["state"].items():
            if {moments[name].shape for name in ("exp_avg", "exp_avg_sq")} != {parameters[number].shape}:
                raise ValueError("the optimiser's state is of another network")
    return Run(path.parent, config, model, iteration=iteration, validation=checkpoint["validation"],
               checkpoint=checkpoint, weights=path.stem)


def load_weights(model, config, init):
    """--init: give a model the weights of another run, which must be of the same network."""
    kind = "model", "variant", "setup"
    here, there = ({name: of[name] for name in kind} | of["network"] for of in (config, init.config))
    differs = [f"{name} {there.get(name) or 'of the set-up'}, here {here[name] or 'of the set-up'}"
               for name in here if here[name] != there.get(name)]
    shapes = [[(name, w.shape) for name, w in one.state_dict().items()] for one in (model, init.model)]
    if shapes[0] != shapes[1] or any(here[name] != there[name] for name in kind):
        raise UserError(f"--init {config['init']}: its weights are of another network: {'; '.join(differs)}")
    model.load_state_dict(init.model.state_dict())


def open_run_data(run, args, training=False):
    """Give a run the clips that it was trained on; for more training they may have changed in nothing that it sees."""
    config = run.config
    clips = data.open_data(config["data"], data_dir_of(run, args), config["setup"], config["frames_in"],
                           config["horizon"], **config["options"])
    now, then = json_safe(clips.info()), config["clips"]
    for name in ("channels", "size", "scale", *(("train_count", "valid_count", "checksum") if training else ())):
        if now.get(name) != then.get(name):
            raise UserError(f"{config['data']} is not what the run was trained on: {name} is {now.get(name)} now, was "
                            f"{then.get(name)}; put the old data back, or start a new run with --init")
    run.clips = clips


def data_dir_of(run, args):
    """Where a run's data lie: where the command line says, or where they lay, if the run lies where it was trained.

    Datasets are unpacked there, and a run from elsewhere may not say where this program writes.
    """
    here = os.path.abspath(run.folder) == run.config.get("folder")
    return args.data_dir or (run.config["data_dir"] if here else "data")


def load(run, device="cpu"):
    """A trained model for code of one's own, and the run's config.

    run: a folder of a run, or one of its checkpoints. The model is on the device, in eval mode; config["clips"] says
    what it reads: frames_in, channels, size and the scale of its pixels.
    """
    run = open_run(run)
    return run.model.to(device).eval(), run.config


# ----------------------------------------------------------------------------------------------------------- commands

def command_train(args):
    init = None if args.init is None else open_run(args.init)
    config, clips, device = settings(args, init)
    model = build(config)           # a network that cannot be built, or not from --init, leaves no folder behind
    if init:
        load_weights(model, config, init)
    processes.start()
    folder = new_folder(args, config, clips)
    config["folder"] = os.path.abspath(folder)
    both = ", each forwards and reversed" if config["reverse"] else ""
    say(f"{folder}: {config['model']} {config['variant']}, {config['setup']}, {clips.name}, "
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {config['iterations']:,} iterations of "
        f"{config['batch']}{both}, {config['precision']} on {config['versions']['device']}")
    for note in clips.notes:
        say(note)
    work(Run(folder, config, model, clips, device))


def command_resume(args):
    run = open_run(args.resume)
    config = run.config
    if run.weights != "last":
        raise UserError(f"--resume {args.resume}: a run goes on from its last checkpoint; give its folder")
    batch = config["batch"]
    check_shares(f"--resume {args.resume}: its batch of", batch, f"--nproc_per_node={batch} at the most")
    run.device = device = device_of(args.device or config["device"])
    if not computes_in(device, config["precision"]):
        say(f"this device has no {config['precision']} arithmetic: going on in fp32")
        config["precision"] = "fp32"
    open_run_data(run, args, training=True)
    config |= dict(device=device.type, versions=versions(device), data_dir=os.path.abspath(data_dir_of(run, args)),
                   folder=os.path.abspath(run.folder), compile=compile_of(args, device))
    for name in ("eval_every", "eval_sequences", "save_every"):
        config[name] = getattr(args, name) or config[name]
    config["eval_sequences"] = min(config["eval_sequences"], run.clips.test_count)
    config["graph"] = config["graph"] and not args.no_graph
    if args.iterations:
        if args.iterations < run.iteration:
            raise UserError(f"--iterations {args.iterations}: the run already stands at iteration {run.iteration}")
        if args.iterations > config["schedule"] and config["final_lr"] is not None:
            raise UserError(f"--iterations {args.iterations}: the learning rate is at its end after "
                            f"{config['schedule']}; start a new run with --init {run.folder}")
        config["iterations"] = args.iterations
    processes.start()
    say(f"{run.folder}: going on from iteration {run.iteration} of {config['iterations']}")
    work(run)


def work(run):
    """Train to the end and evaluate, alone in the run's folder."""
    config = run.config
    try:
        alone = data.alone_in(run.folder, wait=False) if processes.first else contextlib.nullcontext()
        with Stop() as stop, alone:
            if processes.first:
                write_json(run.folder / "config.json", config)
            train(run, stop)
            finish(run, stop)
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            size = "×".join(map(str, config["network"]["size"]))
            frames = config["frames_in"] + config["horizon"]
            raise RunError(f"out of memory with --batch {config['batch']} of {frames} frames {size}: lower --batch or "
                           f"--hidden, or add --recompute") from None
        if said := not_compiled(error):
            raise RunError(f"--compile: {said}; go on without it: --resume {run.folder}") from None
        raise


def trained(args, name):
    """A run whose model is to be used: on the device for it, in an arithmetic that the device has."""
    run = open_run(name)
    run.device = device_of(args.device, quick=True)
    same = run.device.type == run.config["device"] and computes_in(run.device, run.config["precision"])
    run.config["precision"] = precision_of(run.config["precision"] if same else None, run.device)
    run.model.to(run.device)
    return run


def which_evaluation(run, args, other=""):
    """Set how many test sequences to evaluate; returns the suffix of its files: a run's own results stay.

    other: where the clips are not the run's, what tells them apart.
    """
    suffix = ("" if run.weights == "last" else f"-{run.weights}") + other
    number = min(args.eval_sequences or run.config["eval_sequences"], run.clips.test_count)
    if number != run.config["eval_sequences"]:
        run.config["eval_sequences"] = number
        suffix += f"-{number}-sequences"
    return suffix


def command_eval(args):
    run = trained(args, args.eval)
    if args.data is None:
        run.config["options"] |= options_of(args)
        open_run_data(run, args)
        suffix = which_evaluation(run, args)
    else:                           # a storm that the run never saw, every window of it
        open_other_data(run, args, data.open_test, horizon=args.horizon)
        run.config |= dict(eval_sequences=run.clips.test_count, as_published=False)
        suffix = which_evaluation(run, args, f"-{run.clips.name}")
    with Stop() as stop:
        finish(run, stop, suffix)


def command_predict(args):
    """Forecast beyond the end of every film of a file; an array in the file's own units, and pictures."""
    if not args.data:
        raise UserError("--predict RUN needs --data X: a file or folder with the frames to go on from")
    run = trained(args, args.predict)
    open_other_data(run, args, data.open_films)
    films, horizon = run.clips, args.horizon or run.config["horizon"]
    found = []
    for start in tqdm(range(0, films.test_count, EVAL_BATCH), desc="forecast", disable=not on_terminal()):
        frames = films.test(start, min(start + EVAL_BATCH, films.test_count), run.device)
        found.append(predict(run, frames, horizon)[:, -horizon:].cpu())
    found, content = torch.cat(found), io.BytesIO()
    array = films.as_file(found)
    np.save(content, array)
    path = write_new(run.folder, f"predict-{Path(args.data).stem}", ".npy", content.getbuffer())
    known = films.test(0, 1)[0]
    film = metrics.Film("", len(known), known, {"": found[0].clamp(0, 1)})
    picture = data.write_whole(path.with_suffix(".png"), metrics.png(metrics.film_sheet([film], label_of(run))))
    say(f"{path}: {array.dtype} {array.shape}, {horizon} frames beyond the end of {films.test_count} film(s)\n"
        f"{picture}: the first of them")


def open_other_data(run, args, opened, **options):
    """Give a run clips of a user's file, and a model for the size of their frames: without LayerNorm the same weights
    fit any."""
    config = run.config
    run.clips = opened(args.data, data_dir_of(run, args), config["clips"], config["options"] | options_of(args),
                       any_size=not getattr(run.model, "one_size", True), **options)
    for note in run.clips.notes:
        say(note)
    if list(run.clips.size) != config["network"]["size"]:
        other = build(config | dict(network=config["network"] | dict(size=list(run.clips.size))))
        other.load_state_dict(run.model.state_dict())
        run.model = other.to(run.device)


def write_new(folder, stem, suffix, content):
    """Write a file that is nobody's yet: stem-1, stem-2 …, whichever is free, also when others do so meanwhile."""
    temporary = data.write_whole(folder / f".{stem}-{os.getpid()}.tmp", content)
    try:
        for number in count(1):
            path = folder / f"{stem}-{number}{suffix}"
            with contextlib.suppress(FileExistsError):
                os.link(temporary, path)
                return path
    finally:
        temporary.unlink()


# What the papers count a sequence's cost on: channels (of TaxiBJ the inflow), side of a frame, frames.
PAPER_FRAMES = {"moving_mnist": (1, 64, 20), "taxibj": (1, 32, 8), "kth": (1, 128, 20), "germany": (1, 180, 8)}


def command_list(args):
    """Every model and variant with its cost; with --data, beside the figures that the papers print for that dataset."""
    if args.data is not None and args.data not in PAPER_FRAMES:
        raise UserError(f"--list --data {args.data}: the papers count costs on {', '.join(PAPER_FRAMES)}")
    channels, side, frames = PAPER_FRAMES[args.data or "moving_mnist"]
    printed = ("printed", "printed", "in") if args.data else ("", "", "what it is")
    columns = "{:>10} {:>8}   {:>8} {:>8}" if args.data else "{:>10}{:.0}   {:>8}{:.0}"
    line = ("{:12} {:20} {:8} " + columns + "   {}").format
    say(f"Parameters, and multiply-accumulates (MACs) of a sequence of {frames} frames of {channels}×{side}×{side}\n\n"
        + line("model", "variant", "set-up", "parameters", printed[0], "MACs", *printed[1:]))
    for name in MODELS:
        module = model_file(name)
        rows = [row for row in module.PUBLISHED if row["data"] == args.data and {"params", "macs"} & {*row}
                and args.setup in (None, row["setup"])] if args.data else [
            dict(variant=variant, setup=args.setup or module.DEFAULT_SETUP, source=meaning)
            for variant, meaning in module.VARIANTS.items()]
        for row in rows:
            parameters, macs = cost(module, frames, channels, side, setup=row["setup"], variant=row["variant"])
            say(line(name, row["variant"], row["setup"], f"{parameters:,}", row.get("params", "–" if args.data else ""),
                     as_printed(macs, row.get("macs", "1.0G")), row.get("macs", "–" if args.data else ""),
                     row["source"] + (f"  ≠ {row['note']}" if "note" in row else "")))


def as_printed(value, like):
    """A count as a paper would print it: as_printed(444_001, "0.9M") is "0.4M"."""
    decimals = len(like[:-1].partition(".")[2])
    return f"{value / dict(M=1e6, G=1e9)[like[-1]]:.{decimals}f}{like[-1]}"


# ------------------------------------------------------------------------------------------------------------ figures

def results_of(run, args):
    """The results of a run on its own clips, which it gets; evaluated again where its checkpoint has none."""
    open_run_data(run, args)
    suffix = which_evaluation(run, args)
    path = run.folder / f"results{suffix}.json"
    results = read_results(path) if path.exists() else {}
    if results.get("iteration") != run.iteration:
        with Stop() as stop:
            finish(run, stop, suffix)
        results = read_results(path)
    return results


def figures_of(run, results):
    """Every picture of a run alone, {name of a file: its content}, and the number of the median sequence."""
    clips, past, label = run.clips, run.clips.frames_in, label_of(run)
    with Stop() as stop:
        ranked = metrics.ranked(forecast_scores(run, clips.test, results["sequences"], clips.test_horizon, stop))
    films = [film_of(run, number, f"{name} of {results['sequences']}: test sequence {number}, MSE {mse:.4g}")
             for name, (number, mse) in ranked.items()]
    median = ranked["median"][0]
    loss = [(int(row[0]), float(row[1])) for row in read_log(run.folder / "log.csv")]
    loss, mse = ([point for point in points if point[0] <= run.iteration] for points in (loss, run.validation))
    training = [(f"{run.config['loss']} loss (sum over a frame)", "iteration", {"training": loss}),
                ("MSE of the forecast (sum over a frame)", "iteration", {"validation": mse})]
    points = metrics.query_points(clips.test(median, median + 1)[0, past - 1].nan_to_num(0.0))
    *_, reads, extras = shown_forecast(run, median, points)
    about = f"test sequence {median}; up to t={past} true frames are read, then its own forecasts; a scale a row"
    images = metrics.model_sheets(reads, extras, getattr(run.model, "map_names", {}), points, about, label)
    images |= {"films": metrics.film_sheet(films, label, clips.unit),
               "films_animated": metrics.film_animation(films, label, clips.unit)}
    return {f"{name}.png": metrics.png(image) for name, image in images.items()} | {
        "curves.svg": score_curves({label: results}),
        "training.svg": metrics.curves_svg(training, label, log=True).encode()}, median


def score_curves(results):
    """Frame-wise scores of runs, {label: results}, and of the repeated last frame."""
    first = next(iter(results.values()))
    summaries = {label: of_one["forecast"] for label, of_one in results.items()}
    return metrics.score_curves(summaries | {"last frame repeated": first["repeat_last"]},
                                f"{first['data']}, {first['sequences']} test sequences", first["unit"]).encode()


def compare(runs, results, number):
    """Pictures of runs side by side: their scores, and their forecasts and layers on one test sequence."""
    clips, labels = runs[0].clips, [*map(label_of, runs)]
    if len(set(labels)) < len(runs):
        labels = [f"{run.folder.name}: {label}" for run, label in zip(runs, labels)]
    found = {label: shown_forecast(run, number, True) for label, run in zip(labels, runs)}
    film = metrics.Film("", clips.frames_in, found[labels[0]][0], {label: one[1] for label, one in found.items()})
    layers = [metrics.model_sheets(*one[2:], {}, about=label)["layers"] for label, one in found.items()]
    title = f"{clips.name}, test sequence {number}"
    return {"comparison.svg": score_curves(dict(zip(labels, results))),
            "comparison_layers.png": metrics.png(metrics.sheet(layers, title)),
            "comparison.png": metrics.png(metrics.film_sheet([film], title, clips.unit))}


def command_figures(args):
    """The papers' figures of each run, in its own folder; what compares several, in the first one's."""
    runs = [trained(args, name) for name in args.figures]
    if len({(run.folder.resolve(), run.weights) for run in runs}) < len(runs):
        raise UserError("--figures: a run is named twice")
    results = [results_of(run, args) for run in runs]
    for run, of_run in zip(runs[1:], results[1:]):
        for what in ("test_set", "frames_in", "test_horizon"):
            one, two = getattr(runs[0].clips, what), getattr(run.clips, what)
            if one != two:
                raise UserError(f"--figures: {runs[0].folder} and {run.folder} differ in {what}, {one} and {two}: "
                                f"they cannot be compared")
        one, two = results[0]["sequences"], of_run["sequences"]
        if one != two:
            raise UserError(f"--figures: {runs[0].folder} was evaluated on {one} test sequences, {run.folder} on "
                            f"{two}: add --eval-sequences {min(one, two)}")
    drawn = []                      # all is drawn before anything is written
    for run, of_run in zip(runs, results):
        try:
            drawn.append(figures_of(run, of_run))
        except (ValueError, LookupError) as error:                # NaN, or a foreign results.json or log.csv
            raise RunError(f"{run.folder} cannot be drawn: {error}") from None
    pictures, medians = zip(*drawn)
    if len(runs) > 1:
        pictures[0].update(compare(runs, results, medians[0]))
    for run, of_run in zip(runs, pictures):
        place = run.folder / ("figures" if run.weights == "last" else f"figures-{run.weights}")
        place.mkdir(exist_ok=True)
        for name, content in of_run.items():
            say(str(data.write_whole(place / name, content)))


# ------------------------------------------------------------------------------------------------------- command line

COMMANDS = {"list": command_list, "eval": command_eval, "resume": command_resume, "predict": command_predict,
            "figures": command_figures}
# What may be given beside a command; a training run takes every option.
TAKES = {"list": "setup data", "eval": "data horizon layout channels unit thresholds device data-dir eval-sequences",
         "resume": "device data-dir iterations eval-every eval-sequences save-every no-graph compile",
         "predict": "data horizon layout channels device data-dir", "figures": "device data-dir eval-sequences"}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see python train.py --help)")


def number_type(meaning, kind, valid):
    """A type for argparse, which names it in its errors."""
    def parse(text):
        number = kind(text)
        if not valid(number):
            raise ValueError
        return number
    parse.__name__ = meaning
    return parse


POSITIVE = number_type("whole number from 1 to 2^31 - 1", int, lambda n: 1 <= n < 2**31)
SEED = number_type("whole number from 0 to 2^63 - 1", int, lambda n: 0 <= n < 2**63)
RATE = number_type("number above 0, at most 1000", float, lambda x: 0 < x <= 1000)
NUMBER = number_type("finite number", float, math.isfinite)


def parser():
    p = Parser(prog="train.py", allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter,
               usage="train.py MODEL [options]   or one of the commands below",
               description=f"Train, evaluate and use ConvRNNs for next-frame prediction.\n\n"
                           f"MODEL is one of {', '.join(MODELS)}:\ntrain it, then evaluate it, on a CUDA device.",
               epilog="What goes with a command (MODEL takes every option):\n" + "\n".join(
                   f"  --{name:8} --{takes.replace(' ', ' --')}" for name, takes in TAKES.items()))
    p.add_argument("model", nargs="?", metavar="MODEL", help=argparse.SUPPRESS)

    def group(title, *options):
        g = p.add_argument_group(title)
        for name, meaning, about in options:
            about = about if isinstance(about, dict) else dict(type=POSITIVE, metavar=about)
            g.add_argument(f"--{name}", default=None, help=meaning, **about)

    flag, text = dict(action="store_true"), lambda metavar: dict(metavar=metavar)
    group("instead of MODEL",
          ("list", "every model and variant with its cost; with --data, beside the papers' figures", flag),
          ("eval", "evaluate a run again (RUN: its folder or a checkpoint), or, with --data, on a file", text("RUN")),
          ("resume", "go on with an interrupted run, from exactly where it stood", text("RUN")),
          ("predict", "forecast beyond the end of --data; writes .npy and a picture", text("RUN")),
          ("figures", "draw the papers' figures from trained runs", dict(metavar="RUN", nargs="+")))
    group("data",
          ("data", f"{', '.join(data.DATASETS)}, or yours: .npy, .npz, a video, a folder (default: moving_mnist)",
           text("NAME|PATH")),
          ("data-dir", "where datasets lie or are downloaded to (default: data)", text("DIR")),
          ("frames-in", "frames read (default: the dataset's, 10 for data of yours)", "N"),
          ("horizon", "frames forecast (default: the dataset's, 10 for data of yours)", "N"),
          ("box", "degrees of latitude and longitude; for typhoon", dict(
              type=NUMBER, nargs=4, metavar=("S", "W", "N", "E"))),
          ("normalize", "data of yours: scale LOW … HIGH to 0 … 1; without numbers each channel's training range", dict(
              type=NUMBER, nargs="*", metavar=("LOW", "HIGH"))),
          ("layout", "data of yours: what an array's axes are: " + ", ".join(data.LAYOUTS), text("AXES")),
          ("channels", "data of yours: 3 for films and images in colour (default: 1, grey)", "N"),
          ("unit", "data of yours: the unit of its values, for tables and pictures", text("NAME")),
          ("thresholds", "data of yours: values in that unit at which CSI and HSS are taken", dict(
              type=NUMBER, nargs="+", metavar="X")))
    group("network (default: the paper's)",
          ("variant", "an ablation of the model's paper, as --list shows them (default: full)", text("NAME")),
          ("setup", "the set-up (default: the model's own paper's)", dict(choices=("patch4", "fullres"))),
          ("hidden", "channels of the states", "N"),
          ("layers", "layers", "N"),
          ("kernel", "side of the gates' kernels, odd", "N"),
          ("patch", "side of the patches that frames are cut into", "N"))
    group("training (default: the paper's)",
          ("quick", "a three-minute demonstration on moving_digits, on any machine", flag),
          ("iterations", "how long; 100 epochs for data of yours", "N"),
          ("batch", "sequences an iteration, of all processes together", "N"),
          ("lr", "learning rate", dict(type=RATE, metavar="X")),
          ("no-reverse", "do not train on reversed sequences (default for data of yours)", flag),
          ("init", "start from a run's weights, with a fresh optimiser", text("RUN")),
          ("seed", "of weights, clips and sampling (default: 0)", dict(type=SEED, metavar="N")),
          ("device", "cuda, cuda:N or cpu (default: cuda)", text("NAME")),
          ("precision", "arithmetic (default: bf16 on CUDA, fp32 on the CPU)", dict(choices=("fp32", "tf32", "bf16"))),
          ("recompute", "keep little but the states for the backward pass: less memory, more time", flag),
          ("no-graph", "CUDA: launch every kernel instead of replaying a recorded step", flag),
          ("compile", "CUDA: fuse a step's kernels by torch.compile: minutes at first, then half the launches; "
                      "--resume wants it given again", flag))
    group("output",
          ("out", "where runs go (default: runs)", text("DIR")),
          ("name", "the run's name (default: model, variant, data and a running number)", text("NAME")),
          ("save-every", "save last.pt every N iterations (default: 1000; 100 on the CPU)", "N"),
          ("eval-every", "validate every N iterations (default: 20 times a run)", "N"),
          ("eval-sequences", "how many test sequences (default: all; 200 on the CPU)", "N"))
    return p


def parse(argv):
    """The command that a command line gives, and its options: None for what is not given."""
    args = parser().parse_args(argv)
    given = [name for name, value in vars(args).items() if value is not None]
    for name in given:
        if getattr(args, name) in ("", []) and name != "normalize":       # argparse lets --lr=-- through as []
            raise UserError(f"--{name.replace('_', '-')} wants a value (see python train.py --help)")
    commands = [name for name in given if name in ("model", *COMMANDS)]
    if len(commands) != 1:
        raise UserError(f"give a MODEL, or one of --{', --'.join(COMMANDS)} (see python train.py --help)")
    command, = commands
    if args.normalize and len(args.normalize) != 2:
        raise UserError("--normalize takes no number or two, LOW and HIGH")
    if processes.count > 1 and command not in ("model", "resume"):
        raise UserError(f"--{command} runs in one process: python train.py --{command}, without torchrun")
    for name in (name.replace("_", "-") for name in given):
        if command != "model" and name != command and name not in TAKES[command].split():
            takes = ", ".join(f"--{option}" for option in sorted(TAKES[command].split()))
            raise UserError(f"--{name} does not go with --{command}, which takes {takes}")
    return command, args


# ---------------------------------------------------------------------------------------------------------- the machine

def device_of(name, quick=False):
    """The device to work on: what was asked for, or CUDA where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() or not quick else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; cuda, cuda:N or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: add --device cpu to train on the CPU all the same (days, not hours), "
                        "or --quick for a three-minute demonstration")
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: only cuda and cpu are supported")
    if device.type == "cuda":
        if device.index is not None and processes.count > 1:
            raise UserError(f"--device {name}: each of {processes.count} processes takes one of its own; --device cuda")
        device = torch.device("cuda", processes.local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True   # sizes never change, so trying every algorithm once pays
    return device


def versions(device):
    """What a result depends on besides the settings."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, text=True,
                                capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return dict(python=sys.version.split()[0], torch=str(torch.__version__), numpy=np.__version__, commit=commit,
                device=name)


def cpu_has_bf16():
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computes_in(device, precision):
    """Whether a device has that arithmetic: tf32 is CUDA's alone, and bf16 is neither every CPU's nor every GPU's."""
    if precision == "bf16":
        return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    return precision == "fp32" or device.type == "cuda"


def precision_of(name, device):
    """The arithmetic that was asked for, or the device's default."""
    name = name or ("bf16" if device.type == "cuda" and computes_in(device, "bf16") else "fp32")
    if not computes_in(device, name):
        raise UserError("--precision tf32 is CUDA's; on the CPU use fp32 or bf16" if name == "tf32" else
                        f"--precision bf16: this {device.type.upper()} device has no bf16 arithmetic; use fp32")
    return name


# ---------------------------------------------------------------------------------------- processes, signals, messages

class UserError(Exception):
    """Something the user can mend: one line on stderr, exit status 2."""


class RunError(Exception):
    """A run that cannot go on: one line on stderr, exit status 1."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, once the run is saved: exit status 130 or 143."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


def out_of_memory(error):
    """Whether an error says so: CUDA's has a type of its own, the CPU allocator's has not."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error) or \
        "not enough memory" in str(error)


def not_compiled(error):
    """What torch.compile says in an error of its own; "" of any other error."""
    own = type(error).__module__.startswith(("torch._dynamo", "torch._inductor"))
    return " ".join(str(error).split("\n")[:2]).strip() if own else ""


class Processes:
    """This process among those that torchrun started, or alone."""

    def __init__(self):
        self.count, self.rank, self.local = (
            int(value) if (value := os.environ.get(name, otherwise)).isdecimal() else -1
            for name, otherwise in (("WORLD_SIZE", "1"), ("RANK", "0"), ("LOCAL_RANK", "0")))
        self.first = self.rank <= 0

    def start(self):
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def share(self, total):
        """This process's part of `total` things: a slice; parts differ by one at most, and the first is never empty."""
        return slice(-(-self.rank * total // self.count), -(-(self.rank + 1) * total // self.count))

    def from_all(self, value):
        """Every process's value, in the order of their ranks."""
        box = [value]
        if self.count > 1:
            box = [None] * self.count
            dist.all_gather_object(box, value)
        return box

    def sum(self, tensor):
        """The sum over the processes of a tensor, in its place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def maximum(self, number):
        """The largest of the processes' whole numbers; over the CPU, so that no device has to be waited for."""
        if self.count == 1:
            return number
        tensor = torch.tensor(number)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)


processes = Processes()


class Stop:
    """Within it Ctrl-C and SIGTERM ask to stop, and loops do so between two iterations; a second Ctrl-C does not wait.

    Under torchrun it does: launcher and scheduler may each pass one on, and torchrun itself kills who takes 30 seconds.
    """

    def __enter__(self):
        self.signum = 0
        self.before = {signum: signal.signal(signum, self._ask) for signum in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for signum, handler in self.before.items():
            signal.signal(signum, handler)

    def _ask(self, signum, _):
        self.signum = signum
        if processes.count == 1:
            signal.signal(signum, signal.SIG_DFL)

    def agreed(self):
        """The signal that any process got, on all of them alike; 0 for none."""
        return processes.maximum(self.signum)


def check_shares(what, batch, way_out):
    """Refuse more processes than a batch has sequences."""
    if batch < processes.count:
        raise UserError(f"{what} {batch} over {processes.count} processes leaves some without a sequence; {way_out}")


def on_terminal():
    return sys.stderr is not None and sys.stderr.isatty()


def say(text):
    """Print, once for all processes and without tearing a progress bar. Who listens may leave: the run goes on."""
    if processes.first and sys.stdout is not None:
        try:
            with tqdm.external_write_mode():
                print("\n".join(map(data.printable, text.split("\n"))), flush=True)
        except OSError as error:
            # What Python still holds of it must not be tried again at the end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            if not isinstance(error, BrokenPipeError):
                raise OSError(error.errno, error.strerror, "standard output") from None


def main(argv=None):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):     # ε and × should not end a run on a terminal that has none
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        status, message = attempt(argv)
        if message and not processes.first:
            # All have mostly met the same: the first says it, and torchrun ends the others. Who is left met it alone.
            time.sleep(3)
            message = f"process {processes.rank}: {message}"
        if message:
            print(f"train.py: {data.printable(str(message))}", file=sys.stderr, flush=True)
        return status
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def attempt(argv):
    """Do what the command line says: (exit status, what went wrong or None)."""
    try:
        if min(processes.count - 1, processes.rank, processes.local) < 0:
            raise UserError("WORLD_SIZE, RANK and LOCAL_RANK, which torchrun sets, must be whole numbers")
        command, args = parse(argv)
        (command_train if command == "model" else COMMANDS[command])(args)
        return 0, None
    except (UserError, data.DataError) as error:
        return 2, error
    except RunError as error:
        return 1, error
    except Interrupted as error:
        return 128 + error.signum, error
    except KeyboardInterrupt:
        return 130, "interrupted"
    except OSError as error:
        return 2, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            return 1, "out of memory: a smaller --hidden or fewer frames would fit"
        if processes.count > 1 and any(word in str(error) for word in ("gloo", "NCCL", "onnection")):
            return 1, "another process of this run ended; go on with --resume and the run's folder"
        raise


if __name__ == "__main__":
    status = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)    # all is done; Python's end takes a moment, in which Ctrl-C would kill
    if processes.count > 1:
        # Gloo's threads let go of what was gathered when they come to it; if Python is ending by then, they abort.
        os._exit(status)
    sys.exit(status)
