"""Train a model by name, evaluate it, forecast with it: the command line.

    python train.py convlstm                      the paper's run on Moving MNIST, on a CUDA device
    python train.py convlstm --quick              a two-minute demonstration on any machine
    torchrun --nproc_per_node=4 train.py convlstm the same run on four devices
    python train.py --help                        everything else

Nothing here knows a model's inside: a model file is picked by name, and its contract (README, "The contract") is all that
is used. A run is a pure function of its settings: clips and sampling masks depend on (seed, iteration) alone, so a
checkpoint needs no random state, and a resumed run goes on bit for bit.

Sections: settings; training; evaluation; runs; commands; figures; errors and interruptions; processes; command line.
"""

import argparse
import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from importlib import import_module
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
# A network that any machine trains in two minutes. It says nothing about the papers' results.
QUICK = dict(data="moving_digits", layers=2, hidden=16, kernel=3, patch=4, batch=4, lr=2e-3, final_lr=1e-5, loss="l2",
             iterations=270, no_reverse=True, eval_sequences=100)
EVAL_BATCH = 16                     # sequences at a time; fixed, so that an evaluation can be repeated to the bit
MASK_STREAM = 16                    # of data.draws, for scheduled sampling


# ----------------------------------------------------------------------------------------------------------- settings

def model_file(name):
    """The module of a model, by the name of its file."""
    if name not in MODELS:
        raise UserError(f"no model is called {name!r}; the models: {', '.join(MODELS)}")
    return import_module(name)


def device_of(name, quick=False):
    """The device to work on: what was asked for, or CUDA where there is one."""
    name = name or ("cuda" if torch.cuda.is_available() or not quick else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name}: no such device; cuda, cuda:N or cpu") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device here: add --device cpu to train on the CPU all the same (days, not hours), "
                        "or --quick for a two-minute demonstration")
    if device.type not in ("cuda", "cpu"):
        raise UserError(f"--device {name}: only cuda and cpu are supported")
    if device.type == "cuda":
        if device.index is not None and processes.count > 1:
            raise UserError(f"--device {name}: each of {processes.count} processes takes a device of its own; --device cuda")
        device = torch.device("cuda", processes.local if device.index is None else device.index)
        if device.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA device(s)")
        torch.cuda.set_device(device)
    return device


def cpu_has_bf16():
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def computes_in(device, precision):
    """Whether a device has that arithmetic: tf32 is CUDA's alone, and bf16 is neither every CPU's nor every GPU's."""
    if precision == "bf16":
        return torch.cuda.is_bf16_supported(including_emulation=False) if device.type == "cuda" else cpu_has_bf16()
    return precision == "fp32" or device.type == "cuda"


def precision_of(name, device):
    """The arithmetic to train in; sets up what the whole process shares."""
    name = name or ("bf16" if device.type == "cuda" and computes_in(device, "bf16") else "fp32")
    if not computes_in(device, name):
        raise UserError("--precision tf32 is CUDA's; on the CPU use fp32 or bf16" if name == "tf32" else
                        f"--precision bf16: this {'GPU' if device.type == 'cuda' else 'CPU'} has no bf16 arithmetic; use fp32")
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = name == "tf32"
    torch.backends.cudnn.benchmark = True       # sizes never change, so trying every algorithm once pays
    return name


def autocast(device, precision):
    """Convolutions and matrix products in bf16 where asked for; states, statistics of norms, losses, metrics stay fp32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def check_shares(what, batch, way_out):
    """Refuse more processes than a batch has sequences."""
    if batch < processes.count:
        raise UserError(f"{what} {batch} over {processes.count} processes leaves some without a sequence; {way_out}")


def settings(args):
    """Every setting of a new run, as JSON-safe data, and its clips. What is not given is the paper's."""
    module = model_file(args.model)
    setup, variant = args.setup or module.DEFAULT_SETUP, args.variant or "full"
    if variant not in module.VARIANTS:
        raise UserError(f"{args.model} has no variant {variant!r}; it has {', '.join(module.VARIANTS)}")
    quick = QUICK if args.quick else {}

    def pick(name, default=None):
        return next((v for v in (getattr(args, name), quick.get(name), default) if v is not None), None)

    device = device_of(args.device, quick=args.quick)
    precision = precision_of(args.precision, device)
    clips = data.open_data(pick("data", "moving_mnist"), args.data_dir or "data", setup, args.frames_in, args.horizon,
                           bool(args.normalize), args.box)
    training = dict(module.TRAINING[setup])
    training |= training.pop("data").get(clips.name, {})
    batch = pick("batch", training["batch"])
    check_shares("--batch", batch, "raise --batch")
    whole = training.get("iterations") or max(1, training["epochs"] * clips.train_count // batch)   # the paper counts epochs
    iterations = pick("iterations", whole)
    on_cpu = device.type == "cpu"
    eval_sequences = min(pick("eval_sequences", 200 if on_cpu else clips.test_count), clips.test_count)
    config = dict(
        model=args.model, variant=variant, setup=setup, quick=bool(args.quick),
        data=where(pick("data", "moving_mnist")), data_dir=os.path.abspath(args.data_dir or "data"), normalize=bool(args.normalize), box=args.box,
        frames_in=clips.frames_in, horizon=clips.horizon, clips=clips.info(),
        network=dict(channels=clips.channels, size=list(clips.size), hidden=pick("hidden"), layers=pick("layers"),
                     kernel=pick("kernel"), patch=pick("patch", training.get("patch")), **training.get("model", {})),
        optimizer=training["optimizer"], weight_decay=training.get("weight_decay", 0.0),
        lr=pick("lr", training["lr"]), final_lr=quick.get("final_lr", training.get("final_lr")),
        loss=quick.get("loss", training["loss"]),
        reverse=training["reverse"] and not pick("no_reverse"), batch=batch,
        iterations=iterations, schedule=iterations,     # `schedule`: what ε and lr are spread over; stays on a longer run
        seed=args.seed or 0, precision=precision, recompute=bool(args.recompute), init=args.init and os.path.abspath(args.init),
        log_every=10 if on_cpu else 100, eval_every=args.eval_every or max(1, iterations // (5 if quick else 20)),
        eval_sequences=eval_sequences, valid_sequences=min(clips.valid_count, max(1, eval_sequences // 4), 500),
        save_every=args.save_every or (100 if on_cpu else 1000),
        # Only a run of the paper's own network, schedule and training is set beside the paper's figures.
        whole=whole, as_published=not quick and iterations >= whole and all(getattr(args, name) is None for name in (
            "hidden", "layers", "kernel", "patch", "batch", "lr", "no_reverse", "init", "frames_in", "horizon")),
        device=device.type, versions=versions(device))
    return config, clips, device


def where(name_or_path):
    """A dataset's name as it is, a file's path in full: a run is gone on with from any folder."""
    return name_or_path if name_or_path in data.DATASETS else os.path.abspath(name_or_path)


def versions(device):
    """What a result depends on besides the settings."""
    here = Path(__file__).resolve().parent
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=here, text=True,
                                capture_output=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    return dict(python=sys.version.split()[0], torch=str(torch.__version__), numpy=np.__version__, commit=commit, device=name)


def build(config):
    """The network of a run, on the CPU, as its seed makes it."""
    torch.manual_seed(config["seed"])
    network = dict(config["network"])
    try:
        model = model_file(config["model"]).MODEL(setup=config["setup"], variant=config["variant"],
                                                  **network | dict(size=tuple(network["size"])))
    except ValueError as error:
        raise UserError(f"{config['model']}: {error}") from None
    model.recompute = config["recompute"]
    return model


# ----------------------------------------------------------------------------------------------------------- training

def make_optimizer(model, config):
    """Adam or AdamW. On CUDA it is two launches, and the learning rate lies on the device, as a graph needs it."""
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config["optimizer"]]
    device = next(model.parameters()).device
    options = dict(lr=config["lr"]) if device.type == "cpu" else dict(
        lr=torch.tensor(config["lr"], device=device), fused=True, capturable=True)
    return kind(model.parameters(), weight_decay=config["weight_decay"], **options)


def learning_rate(config, iteration):
    """Constant, or a cosine from lr to final_lr over the schedule."""
    if config["final_lr"] is None:
        return config["lr"]
    final = min(config["final_lr"], config["lr"])
    return final + (config["lr"] - final) * (1 + math.cos(math.pi * min(1, iteration / config["schedule"]))) / 2


def sampling_mask(model, config, iteration, device):
    """Scheduled sampling: bool (T-1, B), and ε, the probability at the last step."""
    steps = config["frames_in"] + config["horizon"] - 1
    p = model.truth_probability(iteration, config["schedule"], config["frames_in"], steps)
    drawn = data.draws(MASK_STREAM, config["seed"], iteration, config["batch"], steps)
    mask = drawn[processes.share(config["batch"])] < np.rint(np.array(p) * 2**32)       # (B, T-1)
    return data.to_device(mask.T.copy(), device), p[-1]


def frame_loss(predictions, truth, kind):
    """Mean over batch and frames of the sum over pixels of error² ("l2") or error² + |error| ("l1+l2").

    A pixel whose truth is NaN adds nothing.
    """
    error = torch.where(truth.isnan(), 0.0, predictions.float() - truth)
    pixels = error.square() if kind == "l2" else error.square() + error.abs()
    return pixels.sum((2, 3, 4)).mean()


def train_step(model, optimizer, frames, mask, config):
    """One optimiser step on one batch; returns the loss, this process's share of it where there are several.

    frames: (B, T, C, H, W), NaN where there are no data: the network reads 0 there. mask: (T-1, B), of scheduled sampling.
    DDP averages gradients over the processes; weighted by its share of the batch, a process's loss adds up to the loss of
    the whole batch whatever the shares are.
    """
    weight = len(frames) / config["batch"]
    with autocast(frames.device, config["precision"]):
        predictions, extra = model(torch.where(frames.isnan(), 0.0, frames), use_truth=mask, extras="loss")
    loss = (frame_loss(predictions, frames[:, 1:], config["loss"]) + extra.get("loss", 0.0)) * weight
    optimizer.zero_grad()
    (loss * processes.count).backward()
    optimizer.step()
    return loss.detach()


class Graph:
    """All that a function launches on CUDA, as one launch. What it returns is one tensor."""

    def __init__(self, work):
        self.work, self.graph, self.stream = work, torch.cuda.CUDAGraph(), torch.cuda.Stream()

    def run(self):
        """Call the function, on the stream on which it will be recorded."""
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = self.work()
        torch.cuda.current_stream().wait_stream(self.stream)
        return result

    def record(self):
        """Nothing is computed. A call that has to wait for the device, or to choose by its values, raises RuntimeError."""
        with torch.cuda.stream(self.stream), torch.cuda.graph(self.graph, stream=self.stream):
            self.result = self.work()

    def replay(self):
        """Launch what was recorded: it reads and writes where the recorded call did."""
        self.graph.replay()
        return self.result.clone()


class Step:
    """One optimiser step on one batch or, with `reverse`, two: the same clips played backwards are as good a film.

    Called with frames, mask (both as for `train_step`, of the same shape every time) and the learning rate; returns the
    loss, on the device: nothing waits. A step is thousands of small kernels, and launching them takes longer than running
    them, so on CUDA the third call is recorded as one graph, which those after it replay. The first two, ordinary steps of
    the run like it, leave ready what recording cannot make: cuDNN's choice of algorithms, the optimiser's state.

    graph: whether to (the run's setting). Not over several processes.
    """

    def __init__(self, model, config, device, graph=None):
        self.config, self.graph, self.eager_calls = config, None, math.inf
        self.optimizer = make_optimizer(model, config)
        self.model = DistributedDataParallel(model, gradient_as_bucket_view=True) if processes.count > 1 else model
        if device.type == "cuda" and (config.get("graph", True) if graph is None else graph):
            if processes.count == 1:
                self.eager_calls = 2
            else:
                processes.say("no CUDA graph: it is for a process alone; every step is launched kernel by kernel")

    def load(self, state):
        """Go on from an optimiser's state_dict, of any device: its moments and counts; the settings stay this device's own."""
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

    def eager(self):
        loss = train_step(self.model, self.optimizer, self.frames, self.mask, self.config)
        if self.config["reverse"]:
            loss = (loss + train_step(self.model, self.optimizer, self.frames.flip(1), self.mask, self.config)) / 2
        return loss

    def record(self):
        """Take the step eagerly and, from the same state, by a graph. The graph stays only if both end alike."""
        weights = [p.detach() for p in self.model.parameters()]
        state = weights + [v for of_one in self.optimizer.state.values() for v in of_one.values()]
        before, graph = [v.clone() for v in state], Graph(self.eager)
        self.frames, self.mask = self.frames.clone(), self.mask.clone()        # where the graph will read
        loss, after = graph.run(), [v.clone() for v in state]
        try:
            torch._foreach_copy_(state, before)
            graph.record()
            replayed = graph.replay()
            step, apart = (math.sqrt(sum((a - b).double().square().sum() for a, b in zip(after, other[:len(weights)])))
                           for other in (before, weights))
            if torch.allclose(replayed, loss, rtol=1e-3) and apart <= 0.1 * step:
                self.graph = graph
                return loss
            problem = f"its first replay ends {apart / step:.0%} of a step away, with loss {replayed:.6g} for {loss:.6g}"
        except RuntimeError as error:           # out of memory is one
            problem = str(error).partition("\n")[0]
        torch._foreach_copy_(state, after)
        self.eager_calls = math.inf
        processes.say(f"no CUDA graph: {problem}; every step is launched kernel by kernel")
        return loss


class Progress:
    """One bar with a terminal; without one, a plain line now and then."""

    def __init__(self, config, iteration):
        self.batch, self.total, self.plain_at = config["batch"], config["iterations"], 0.0
        self.start, self.begun = iteration, time.monotonic()
        terminal = sys.stderr.isatty() and processes.first
        self.bar = tqdm(total=self.total, initial=iteration, unit="it", dynamic_ncols=True) if terminal else None
        self.text = ""

    def step(self):
        if self.bar:
            self.bar.update()

    def show(self, iteration, loss, epsilon, lr):
        rate = (iteration - self.start) / (time.monotonic() - self.begun)
        text = f"loss {loss:.4g}, ε {epsilon:.2f}, lr {lr:.2g}, {rate * self.batch:.1f} sequences/s"
        if self.bar:
            self.bar.set_postfix_str(text)
        elif time.monotonic() - self.plain_at > 15:
            left = (self.total - iteration) / rate
            processes.say(f"iteration {iteration}/{self.total}: {text}, {left / 60:.0f} min left")
            self.plain_at = time.monotonic()

    def close(self):
        if self.bar:
            self.bar.close()


def train(config, clips, device, folder, stop, checkpoint=None):
    """Train a run from where it stands to its end; leaves last.pt, best.pt and log.csv.

    Returns the model and its validations, [[iteration, MSE], …].
    """
    model = build(config).to(device)
    losses = torch.zeros(config["log_every"], device=device)      # of the iterations since the last line of the log
    iteration, logged, seconds, validation = 0, 0, 0.0, []
    if checkpoint:
        model.load_state_dict(checkpoint["model"])
        iteration, logged, seconds, validation = (checkpoint[n] for n in ("iteration", "logged", "seconds", "validation"))
        if processes.first:
            losses += checkpoint["losses"].to(device)
    elif config["init"]:
        load_weights(model, config, config["init"])
    step = Step(model, config, device)
    if checkpoint:
        step.load(checkpoint["optimizer"])
    log = Log(folder, iteration)
    progress, begun = Progress(config, iteration), time.monotonic() - seconds
    share = processes.share(config["batch"])
    last = folder / "last.pt"
    way_on = f"the last good checkpoint is {last}; try a lower --lr or --precision fp32"

    def losses_since_logged():
        """As numbers; one that is not finite ends the run before it is logged or saved."""
        every = config["log_every"]
        found = processes.sum(losses)[logged % every:(iteration - 1) % every + 1].tolist() if iteration > logged else []
        for at, loss in enumerate(found, logged + 1):
            if not math.isfinite(loss):
                raise RunError(f"the loss was not finite at iteration {at}; {way_on}")
        return found

    def save(path):
        losses_since_logged()
        if not torch.stack(torch._foreach_norm([*model.parameters()])).isfinite().all():
            raise RunError(f"the weights were not finite at iteration {iteration}; {way_on}")
        window = processes.sum(losses).cpu()
        if processes.first:
            save_checkpoint(path, dict(
                config=config, iteration=iteration, logged=logged, seconds=time.monotonic() - begun, validation=validation,
                losses=window, model=model.state_dict(), optimizer=step.optimizer.state_dict()))

    try:
        while True:
            # Everything due at this iteration comes first, so a run resumed here, or one that was stopped in the middle
            # of it, does the same things in the same order.
            done = iteration == config["iterations"]
            if iteration and (iteration % config["eval_every"] == 0 or done) and iteration not in (k for k, _ in validation):
                score = validate(model, config, clips, device, stop)
                if score is not None:
                    best = min((mse for _, mse in validation), default=math.inf)
                    validation.append([iteration, score])
                    processes.say(f"iteration {iteration}: validation MSE {score:.2f}" + (", the best yet" if score < best else ""))
                    if score < best:
                        save(folder / "best.pt")
            asked = stop.agreed()
            if iteration % config["save_every"] == 0 or done or asked:
                save(last)
            if asked:
                processes.maximum(0)    # who left before it is saved, would make torchrun end the one that saves
                raise Interrupted(asked, f"stopped at iteration {iteration}, saved; go on with: "
                                         f"python train.py --resume {folder}")
            if done:
                break

            frames = clips.train(config["seed"], iteration, config["batch"], share, device)
            mask, epsilon = sampling_mask(model, config, iteration, device)
            lr = learning_rate(config, iteration)
            losses[iteration % config["log_every"]] = step(frames, mask, lr)
            iteration += 1
            progress.step()
            if iteration % config["log_every"] == 0 or iteration == config["iterations"]:
                found = losses_since_logged()
                mean, logged = sum(found) / len(found), iteration
                log.add(iteration, mean, lr, epsilon, time.monotonic() - begun)
                progress.show(iteration, mean, epsilon, lr)
    finally:
        progress.close()
    return model, validation


class Log:
    """log.csv: a line every so often. Lines past the checkpoint that a run is resumed from are cut off."""

    HEADER = ["iteration", "loss", "lr", "epsilon", "seconds"]

    def __init__(self, folder, iteration):
        self.path = folder / "log.csv"
        rows = [self.HEADER]
        if iteration and self.path.exists():
            rows += [row for row in read_log(self.path) if int(row[0]) <= iteration]
        if processes.first:
            data.write_whole(self.path, "".join(",".join(row) + "\n" for row in rows).encode())

    def add(self, iteration, loss, lr, epsilon, seconds):
        if processes.first:
            with open(self.path, "a") as file:
                file.write(f"{iteration},{loss!r},{lr!r},{epsilon!r},{seconds:.2f}\n")


def read_log(path):
    """The whole rows of a log.csv: a process killed while it wrote may have left half a line at the end."""
    text = path.read_text()
    return list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))[1:]


# --------------------------------------------------------------------------------------------------------- evaluation

@torch.no_grad()
def score_batches(model, config, part, count, device, stop, baselines=False):
    """Forecast sequences 0 … count - 1 of a part of the clips and score them.

    part: (start, stop, device) -> clips and where their scores count. Yields a dict for each batch of this process:
    "forecast" and "all_predictions" (and "repeat_last", "black") -> (predictions, truth, mask), each (b, frames, C, H, W).
    """
    share = processes.share(count)
    model.eval()
    # All take the rounds of the largest share, so that they can agree in each to stop, and one more, which only asks.
    for done in range(0, -(-count // processes.count) + EVAL_BATCH, EVAL_BATCH):
        if asked := stop.agreed():
            raise Interrupted(asked, "stopped during the evaluation; the run is whole, and --eval RUN evaluates it")
        start = share.start + done
        if start >= share.stop:
            continue
        frames, mask = part(start, min(start + EVAL_BATCH, share.stop), device)
        horizon = frames.shape[1] - config["frames_in"]
        with autocast(device, config["precision"]):
            predictions = model(frames[:, :-horizon], horizon=horizon)
        everything = predictions.float(), frames[:, 1:], None if mask is None else mask[:, 1:]
        forecast, truth, counts = (v if v is None else v[:, -horizon:] for v in everything)
        found = {"forecast": (forecast, truth, counts), "all_predictions": everything}
        if baselines:
            found["repeat_last"] = (frames[:, -horizon - 1:-horizon].expand_as(truth), truth, counts)
            found["black"] = (torch.zeros_like(truth), truth, counts)
        yield found
    model.train()


def validate(model, config, clips, device, stop):
    """The forecast's mean MSE over some of the validation set; None if the user asks to stop meanwhile."""
    try:
        mse = [metrics.frame_scores(*batch["forecast"])["mse"].cpu() for batch in score_batches(
            model, config, lambda *rows: (clips.valid(*rows), None), config["valid_sequences"], device, stop)]
    except Interrupted:
        return None
    mse = torch.cat([torch.empty(0, config["horizon"], dtype=torch.float64), *mse])
    return torch.cat(processes.from_all(mse)).mean().item()


def evaluate(model, config, clips, device, stop):
    """All scores of the test set: {"forecast": {"mse": {"mean": …, "frames": […]}, …}, "all_predictions": …, …}."""
    scores, rain = {}, {}
    for batch in score_batches(model, config, lambda *rows: (clips.test(*rows), clips.test_mask(*rows)),
                               config["eval_sequences"], device, stop, baselines=True):
        for name, (predictions, truth, mask) in batch.items():
            scores.setdefault(name, []).append({k: v.cpu() for k, v in metrics.frame_scores(predictions, truth, mask).items()})
            if clips.unit == "mm/h":
                counts = metrics.event_counts(clips.to_units(predictions.clamp(0, 1)), clips.to_units(truth),
                                              metrics.RAIN_THRESHOLDS, mask)
                rain[name] = rain.get(name, 0) + counts.cpu()
    scores, rain = processes.from_all(scores), processes.from_all(rain)
    summaries = {}
    for name in scores[0]:
        batches = [batch for part in scores for batch in part.get(name, [])]
        summaries[name] = metrics.summarize({k: torch.cat([batch[k] for batch in batches]) for k in batches[0]})
        if clips.unit == "mm/h":
            summaries[name] |= metrics.csi_hss(sum(part[name] for part in rain if name in part), metrics.RAIN_THRESHOLDS)
    return summaries


def finish(model, config, clips, folder, iteration, validation, stop, weights="last", suffix=""):
    """Evaluate trained weights: write results.json and pictures (`suffix` tells others apart), print the table."""
    device = next(model.parameters()).device
    count = config["eval_sequences"]
    processes.say(f"evaluating {count} of {clips.test_count} test sequences ({clips.test_set})")
    summaries = evaluate(model, config, clips, device, stop)
    results = dict(model=config["model"], variant=config["variant"], setup=config["setup"], data=clips.name,
                   test_set=clips.test_set, sequences=count, frames_in=config["frames_in"], horizon=clips.test_horizon,
                   iteration=iteration, weights=weights, unit=clips.unit, validation=validation, **summaries)
    if not processes.first:
        return
    write_json(folder / f"results{suffix}.json", results)
    picture = folder / f"forecast{suffix}.png"
    write_film_strip(model, config, clips, device, picture, iteration)
    # MS-LSTM's released code has PSNR and SSIM of its own; the table shows those that the papers of the set-up report.
    own = {"psnr": "psnr_float", "ssim": "ssim_gaussian"} if config["setup"] == "fullres" else {}
    published = [{own.get(k, k): v for k, v in row.items()} for row in published_scores(config, clips)]
    print(f"\n{label_of(config, clips, iteration)}, {count} test sequences\n")
    print(metrics.table(summaries, published, [own.get(m, m) for m in ("mse", "mae", "psnr", "ssim")], clips.unit,
                        config["precision"]))
    print(f"\npictures: {picture}\nresults:  {folder / f'results{suffix}.json'}")


def published_scores(config, clips):
    """What the papers report for this very run, as rows for the table; nothing for a run of other settings."""
    rows = []
    for row in model_file(config["model"]).PUBLISHED if config["as_published"] else ():
        same = (row["variant"], row["setup"], row["data"]) == (config["variant"], config["setup"], clips.name)
        if same and row.get("iterations", config["whole"]) == config["iterations"]:
            row = dict(row, source=row["source"] + (", all" if "over" in row else ""))
            if "mse_frames" in row:
                row.setdefault("mse", round(sum(row["mse_frames"]) / len(row["mse_frames"]), 4))
            for score in ("csi", "hss"):
                row |= {f"{score}_{t:g}": v for t, v in zip(metrics.RAIN_THRESHOLDS, row.pop(score, ()))}
            rows.append(row)
    return rows


def label_of(config, clips, iteration):
    """What a picture or a table is of."""
    return f"{config['model']} {config['variant']} {config['setup']}, {clips.name}, iteration {iteration}"


@torch.no_grad()
def write_film_strip(model, config, clips, device, path, iteration, sequences=3):
    """The first test sequences and their forecasts."""
    past, stop = config["frames_in"], min(sequences, clips.test_count)
    frames, mask = clips.test(0, stop, device), clips.test_mask(0, stop, device)
    with autocast(device, config["precision"]):
        forecasts = model(frames[:, :past], horizon=clips.test_horizon)[:, -clips.test_horizon:].float().clamp(0, 1)
    truth = frames if mask is None else frames.where(mask, math.nan)
    films = [metrics.Film(f"test sequence {k}", past, one.cpu(), {"": forecast.cpu()})
             for k, (one, forecast) in enumerate(zip(truth, forecasts))]
    data.write_whole(path, metrics.png(metrics.film_sheet(films, label_of(config, clips, iteration))))


# --------------------------------------------------------------------------------------------------------------- runs

def new_folder(args, config, clips):
    """Make the folder of a new run; its name is given, or model, variant, data and a running number."""
    folder, refusal = None, None
    if processes.first:
        try:
            folder = make_folder(Path(args.out or "runs"), args.name, f"{config['model']}-{config['variant']}-{clips.name}")
            write_json(folder / "config.json", config)
        except UserError as error:
            refusal = error
        except OSError as error:
            refusal = UserError(f"--out {args.out or 'runs'}: {error.strerror}")
    folder, refusal = processes.from_first((folder, refusal))
    if refusal:
        raise refusal
    return folder


def make_folder(out, name, otherwise):
    """out/name, which must be new, or out/otherwise-N with the first N that is free."""
    if name and (Path(name).name != name or name.startswith(".")):
        raise UserError(f"--name {name}: a plain name, please; the folder is given with --out")
    out.mkdir(parents=True, exist_ok=True)
    for number in range(1, sys.maxsize):
        folder = out / (name or f"{otherwise}-{number}")
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            if name:
                raise UserError(f"--name {name}: {folder} exists; another name, or go on with --resume {folder}") from None


def write_json(path, content):
    data.write_whole(path, (json.dumps(content, indent=1) + "\n").encode())


def save_checkpoint(path, checkpoint):
    data.write_whole(path, lambda file: torch.save(checkpoint, file))


CHECKPOINT = ("config", "iteration", "logged", "seconds", "validation", "losses", "model", "optimizer")


def load_checkpoint(run):
    """A run's folder (its last.pt) or one of its checkpoints: (the folder, "last" or "best", the checkpoint)."""
    path = Path(run)
    path = path / "last.pt" if path.is_dir() else path
    if not path.exists():
        what = "the run was stopped before its first checkpoint" if (path.parent / "config.json").exists() else "no such run"
        raise UserError(f"{run}: {what} ({path} is missing)")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["config"]["as_published"], [checkpoint[name] for name in CHECKPOINT]
    except Exception:
        raise UserError(f"{path}: not a checkpoint of train.py, or a damaged one") from None
    return path.parent, path.stem, checkpoint


def load_weights(model, config, run):
    """--init: the weights of another run, which must be of the same network."""
    _, _, checkpoint = load_checkpoint(run)
    other = checkpoint["config"]
    try:
        if any(other[name] != config[name] for name in ("model", "variant", "setup")):
            raise RuntimeError
        model.load_state_dict(checkpoint["model"])
    except RuntimeError:
        raise UserError(f"--init {run}: another network ({other['model']} {other['variant']} {other['setup']}, "
                        f"{other['network']})") from None


def open_run_data(config, args, training=False):
    """The clips that a run was trained on; they may not have changed, for more training in nothing that it sees."""
    clips = data.open_data(config["data"], args.data_dir or config["data_dir"], config["setup"], config["frames_in"],
                           config["horizon"], config["normalize"], config["box"])
    now, then = clips.info(), config["clips"]
    for name in ("channels", "size", "scale", *(("train_count", "valid_count") if training else ())):
        if json.dumps(now.get(name)) != json.dumps(then.get(name)):
            raise UserError(f"{config['data']} is not what the run was trained on: {name} is {now.get(name)} now, was "
                            f"{then.get(name)}; put the old data back, or start a new run with --init")
    return clips


# ----------------------------------------------------------------------------------------------------------- commands

def command_train(args):
    config, clips, device = settings(args)
    model = build(config)           # a network that cannot be built, or not from --init, leaves no folder behind
    if args.init:
        load_weights(model, config, args.init)
    processes.start()
    folder = new_folder(args, config, clips)
    processes.say(f"{folder}: {config['model']} {config['variant']}, {config['setup']}, {clips.name}, "
                  f"{sum(p.numel() for p in model.parameters()):,} parameters, {config['iterations']:,} iterations of "
                  f"{config['batch']}, {config['precision']} on {config['versions']['device']}")
    for note in clips.notes:
        processes.say(note)
    run(config, clips, device, folder)


def run(config, clips, device, folder, checkpoint=None):
    """Train to the end and evaluate."""
    try:
        with Stop() as stop:
            model, validation = train(config, clips, device, folder, stop, checkpoint)
            finish(model, config, clips, folder, config["iterations"], validation, stop)
    except (MemoryError, RuntimeError) as error:
        if out_of_memory(error):
            size = "×".join(map(str, config["network"]["size"]))
            raise RunError(f"out of memory with --batch {config['batch']} of {config['frames_in'] + config['horizon']} frames "
                           f"{size}: lower --batch or --hidden, or add --recompute") from None
        if processes.count > 1 and any(word in str(error) for word in ("gloo", "NCCL", "onnection")):
            raise RunError(f"another process of this run ended; go on with --resume {folder}") from None
        raise


def out_of_memory(error):
    """Whether an error says so: CUDA's has a type of its own, the CPU allocator's has not."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "allocate memory" in str(error) or \
        "not enough memory" in str(error)


def command_resume(args):
    folder, weights, checkpoint = load_checkpoint(args.resume)
    if weights != "last":
        raise UserError(f"--resume {args.resume}: a run goes on from its last checkpoint; give its folder")
    config = checkpoint["config"]
    check_shares(f"--resume {args.resume}: its batch of", config["batch"], f"--nproc_per_node={config['batch']} at the most")
    device = device_of(args.device or config["device"])
    if not computes_in(device, config["precision"]):
        processes.say(f"this CPU has no {config['precision']} arithmetic: going on in fp32")
        config["precision"] = "fp32"
    precision_of(config["precision"], device)
    config |= dict(device=device.type, versions=versions(device), data_dir=os.path.abspath(args.data_dir or config["data_dir"]))
    for name in ("eval_every", "eval_sequences", "save_every"):
        config[name] = getattr(args, name) or config[name]
    if args.iterations:
        if args.iterations < checkpoint["iteration"]:
            raise UserError(f"--iterations {args.iterations}: the run already stands at iteration {checkpoint['iteration']}")
        if args.iterations > config["schedule"] and config["final_lr"] is not None:
            raise UserError(f"--iterations {args.iterations}: the learning rate falls to its end over {config['schedule']} "
                            f"iterations, so this run cannot go on; start a new one with --init {folder}")
        config["iterations"] = args.iterations
    clips = open_run_data(config, args, training=True)
    config["eval_sequences"] = min(config["eval_sequences"], clips.test_count)
    processes.start()
    if processes.first:
        write_json(folder / "config.json", config)
    processes.say(f"{folder}: going on from iteration {checkpoint['iteration']} of {config['iterations']}")
    run(config, clips, device, folder, checkpoint)


def trained(args, run):
    """A run's folder, which weights, config, clips, model on a device, iteration and validation."""
    folder, weights, checkpoint = load_checkpoint(run)
    config = checkpoint["config"]
    device = device_of(args.device, quick=True)
    same = device.type == config["device"] and computes_in(device, config["precision"])
    config["precision"] = precision_of(config["precision"] if same else None, device)
    model = build(config)
    model.load_state_dict(checkpoint["model"])
    return folder, weights, config, model.to(device), device, checkpoint


def command_eval(args):
    folder, weights, config, model, _, checkpoint = trained(args, args.eval)
    clips = open_run_data(config, args)
    suffix = which_evaluation(args, config, clips, weights)
    with Stop() as stop:
        finish(model, config, clips, folder, checkpoint["iteration"], checkpoint["validation"], stop, weights, suffix)


def which_evaluation(args, config, clips, weights):
    """Set how many test sequences to evaluate; returns the suffix of the evaluation's files: a run's own results stay."""
    suffix = "" if weights == "last" else f"-{weights}"
    count = min(args.eval_sequences or config["eval_sequences"], clips.test_count)
    if count != config["eval_sequences"]:
        config["eval_sequences"] = count
        suffix += f"-{config['eval_sequences']}-sequences"
    return suffix


def command_predict(args):
    """Forecast beyond the end of every film of a file; an array in the file's own units, and pictures."""
    if not args.data:
        raise UserError("--predict RUN needs --data X: a .npy file with the frames to go on from")
    folder, _, config, model, device, checkpoint = trained(args, args.predict)
    films = data.open_films(args.data, config["clips"])
    horizon = args.horizon or config["horizon"]
    path = next(p for n in range(1, sys.maxsize) if not (p := folder / f"predict-{Path(args.data).stem}-{n}.npy").exists())
    forecasts = []
    with torch.no_grad(), autocast(device, config["precision"]):
        for start in tqdm(range(0, films.count, EVAL_BATCH), desc="forecast", disable=not sys.stderr.isatty()):
            frames = films.frames(start, min(start + EVAL_BATCH, films.count), device)
            forecasts.append(model(frames, horizon=horizon)[:, -horizon:].float().cpu())
    forecast = torch.cat(forecasts)
    array = films.as_file(forecast)
    data.write_whole(path, lambda file: np.save(file, array))
    known, future = films.frames(0, 1)[0], forecast[0].clamp(0, 1)
    title = f"{config['model']} {config['variant']} {config['setup']}, {Path(args.data).name}, iteration {checkpoint['iteration']}"
    data.write_whole(path.with_suffix(".png"), metrics.png(metrics.film_sheet(
        [metrics.Film("", len(known), known.cpu(), {"": future})], title)))
    print(f"{path}: {array.dtype} {array.shape}, {horizon} frames beyond the end of {films.count} film(s)\n"
          f"{path.with_suffix('.png')}: the first of them")


# What the papers count a sequence's cost on: channels (of TaxiBJ the inflow), side of a frame, frames.
PAPER_FRAMES = {"moving_mnist": (1, 64, 20), "taxibj": (1, 32, 8), "kth": (1, 128, 20), "germany": (1, 180, 8)}


def command_list(args):
    """Every model and variant with its cost; with --data, beside the figures that the papers print for that dataset."""
    if args.data and args.data not in PAPER_FRAMES:
        raise UserError(f"--list --data {args.data}: the papers count costs on {', '.join(PAPER_FRAMES)}")
    if args.data:
        return list_published(args.data, args.setup)
    print(f"Costs of one sequence of 20 frames of 64×64, read and predicted\n\n"
          f"{'model':12} {'variant':20} {'set-up':8} {'parameters':>10} {'MACs':>7}  what it is")
    for name in MODELS:
        module = model_file(name)
        for setup in [args.setup or module.DEFAULT_SETUP]:
            for variant, meaning in module.VARIANTS.items():
                parameters, macs = cost(module, setup, variant, *PAPER_FRAMES["moving_mnist"])
                print(f"{name:12} {variant:20} {setup:8} {parameters:>10,} {macs / 1e9:>6.1f}G  {meaning}")


def list_published(dataset, setup):
    """The papers' cost tables for a dataset, counted again."""
    channels, side, frames = PAPER_FRAMES[dataset]
    print(f"{dataset}: {frames} frames of {channels}×{side}×{side}; MACs are multiply-accumulates of one sequence\n\n"
          f"{'':32} {'parameters':>19}   {'MACs':>17}\n"
          f"{'model':12} {'variant':10} {'set-up':8} {'counted':>10} {'printed':>8}   {'counted':>8} {'printed':>8}   printed in")
    for name in MODELS:
        module = model_file(name)
        for row in module.PUBLISHED:
            if row["data"] != dataset or setup not in (None, row["setup"]) or not {"params", "macs"} & {*row}:
                continue
            parameters, macs = cost(module, row["setup"], row["variant"], channels, side, frames)
            print(f"{name:12} {row['variant']:10} {row['setup']:8} {parameters:>10,} {row.get('params', '–'):>8}   "
                  f"{as_printed(macs, row.get('macs', '1.0G')):>8} {row.get('macs', '–'):>8}   {row['source']}"
                  + (f"  ≠ {row['note']}" if "note" in row else ""))


def as_printed(value, like):
    """A count as a paper would print it: as_printed(444_001, "0.9M") is "0.4M"."""
    decimals = len(like[:-1].partition(".")[2])
    return f"{value / dict(M=1e6, G=1e9)[like[-1]]:.{decimals}f}{like[-1]}"


def cost(module, setup, variant, channels, side, frames):
    """Parameters, and multiply-accumulates of one sequence as in training, counted by torch without computing anything.

    One step is counted: all cost the same, whatever they read.
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        model = module.MODEL(channels=channels, size=side, setup=setup, variant=variant)
        model(torch.empty(1, 2, channels, side, side), extras="loss")
    return sum(p.numel() for p in model.parameters()), (frames - 1) * counter.get_total_flops() / 2


# ------------------------------------------------------------------------------------------------------------ figures

class Figures:
    """A trained run, its results, and its forecasts of single test sequences."""

    def __init__(self, args, run):
        self.folder, weights, self.config, self.model, self.device, checkpoint = trained(args, run)
        self.iteration, self.validation = checkpoint["iteration"], checkpoint["validation"]
        self.clips = open_run_data(self.config, args)
        self.label = label_of(self.config, self.clips, self.iteration)
        self.place = self.folder / ("figures" if weights == "last" else f"figures-{weights}")
        suffix = which_evaluation(args, self.config, self.clips, weights)
        path = self.folder / f"results{suffix}.json"
        self.results = read_results(path)
        if self.results is None or self.results["iteration"] != self.iteration:
            with Stop() as stop:
                finish(self.model, self.config, self.clips, self.folder, self.iteration, self.validation, stop, weights,
                       suffix)
            self.results = read_results(path)

    def ranked(self):
        """{"best": (number of a test sequence, its forecast's MSE), "median": …, "worst": …}"""
        with Stop() as stop:
            scores = [metrics.frame_scores(*batch["forecast"]) for batch in score_batches(
                self.model, self.config, lambda *rows: (self.clips.test(*rows), self.clips.test_mask(*rows)),
                self.results["sequences"], self.device, stop)]
        return metrics.ranked({name: torch.cat([batch[name] for batch in scores]).cpu() for name in scores[0]})

    @torch.no_grad()
    def forecast(self, number, extras="loss"):
        """A test sequence and its forecast, in the data's unit; all frames that the model read; its extras."""
        past, frames = self.clips.frames_in, self.clips.test(number, number + 1, self.device)
        with autocast(self.device, self.config["precision"]):
            predictions, found = self.model(frames[:, :past], horizon=self.clips.test_horizon, extras=extras)
        extras = {name: [layer.float().cpu() for layer in (layers if isinstance(layers, list) else [layers])]
                  for name, layers in found.items() if name != "loss"}
        predictions = predictions.float().clamp(0, 1)
        reads = torch.cat([frames[0, :past], predictions[0, past - 1:-1]]).cpu()
        truth, forecast = (in_units(self.clips, film) for film in (frames, predictions[:, past - 1:]))
        if (mask := self.clips.test_mask(number, number + 1, self.device)) is not None:
            truth = truth.where(mask, math.nan)
        return truth[0].cpu(), forecast[0].cpu(), reads, extras

    def pictures(self, ranked):
        """Every picture of this run alone: {name of a file: its content}."""
        films, past, unit, median = [], self.clips.frames_in, self.clips.unit, ranked["median"][0]
        for name, (number, mse) in ranked.items():
            truth, forecast, _, _ = self.forecast(number)
            caption = f"{name} of {self.results['sequences']}: test sequence {number}, MSE {mse:.4g}"
            films.append(metrics.Film(caption, past, truth, {"": forecast}))
        log = self.folder / "log.csv"
        loss = [(int(row[0]), float(row[1])) for row in read_log(log)] if log.exists() else []
        training = {"training": (f"{self.config['loss']} loss (sum over a frame)", loss),
                    "validation": ("MSE of the forecast (sum over a frame)", self.validation)}
        training = {name: (ylabel, [point for point in points if point[0] <= self.iteration])
                    for name, (ylabel, points) in training.items()}
        points = metrics.query_points(self.clips.test(median, median + 1)[0, past - 1])
        _, _, reads, extras = self.forecast(median, points)
        about = (f"test sequence {median}; up to t={past} it reads true frames, then its own forecasts; a scale for each row")
        images = {"films": metrics.film_sheet(films, self.label, unit),
                  "films_animated": metrics.film_animation(films, self.label, unit),
                  "layers": metrics.layer_sheet({about: (reads, extras)}, self.label),
                  **metrics.map_sheets(reads, extras, getattr(self.model, "map_names", {}), points, about, self.label)}
        return {"curves.svg": score_curves([self]), "training.svg": metrics.training_curves(training, self.label).encode(),
                **{f"{name}.png": metrics.png(image) for name, image in images.items()}}


def read_results(path):
    """A results.json, or None where there is none."""
    try:
        results = json.loads(path.read_text())
        results["iteration"], results["sequences"], results["forecast"], results["repeat_last"]
        return results
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError):
        raise UserError(f"{path} is damaged: delete it to have the run evaluated again") from None


def in_units(clips, frames):
    return clips.to_units(frames).float() if clips.unit else frames


def labels_of(runs):
    """The runs' labels, with the folders' names where they would be the same."""
    labels = [run.label for run in runs]
    return labels if len(set(labels)) == len(runs) else [f"{run.folder.name}: {run.label}" for run in runs]


def score_curves(runs):
    results = runs[0].results
    summaries = dict(zip(labels_of(runs), (run.results["forecast"] for run in runs)))
    return metrics.score_curves(summaries | {"last frame repeated": results["repeat_last"]},
                                f"{results['data']}, {results['sequences']} test sequences", results["unit"]).encode()


def compare(runs, number):
    """Several runs side by side: their scores, and their forecasts and layers on one test sequence."""
    clips, labels, found = runs[0].clips, labels_of(runs), [run.forecast(number, True) for run in runs]
    film = metrics.Film("", clips.frames_in, found[0][0], {label: one[1] for label, one in zip(labels, found)})
    title, layers = f"{clips.name}, test sequence {number}", {label: one[2:] for label, one in zip(labels, found)}
    return {"comparison.svg": score_curves(runs),
            "comparison.png": metrics.png(metrics.film_sheet([film], title, clips.unit)),
            "comparison_layers.png": metrics.png(metrics.layer_sheet(layers, title))}


def command_figures(args):
    """The papers' figures of each run, in its own folder; what compares several, in the first one's."""
    runs = [Figures(args, run) for run in args.figures]
    first, *others = runs
    if len({run.place.resolve() for run in runs}) < len(runs):
        raise UserError("--figures: a run is named twice")
    for other in others:
        for what in ("test_set", "frames_in", "test_horizon"):
            one, two = getattr(first.clips, what), getattr(other.clips, what)
            if one != two:
                raise UserError(f"--figures: {first.folder} and {other.folder} differ in {what}, {one} and {two}: "
                                f"they cannot be compared")
        one, two = first.results["sequences"], other.results["sequences"]
        if one != two:
            raise UserError(f"--figures: {first.folder} was evaluated on {one} test sequences, {other.folder} on {two}: "
                            f"add --eval-sequences {min(one, two)}")
    drawn, medians = [], []
    for run in runs:                # all is drawn before anything is written
        try:
            ranked = run.ranked()
            medians.append(ranked["median"][0])
            drawn.append(run.pictures(ranked))
        except (ValueError, LookupError) as error:                # NaN, or a foreign results.json or log.csv
            raise RunError(f"{run.folder} cannot be drawn: {error}") from None
    if others:
        drawn[0] |= compare(runs, medians[0])
    for run, pictures in zip(runs, drawn):
        run.place.mkdir(exist_ok=True)
        for name, content in pictures.items():
            print(data.write_whole(run.place / name, content))


# ------------------------------------------------------------------------------------------- errors and interruptions

class UserError(Exception):
    """Something the user can mend: one line on stderr, exit status 2."""


class RunError(Exception):
    """A run that cannot go on: one line on stderr, exit status 1."""


class Interrupted(Exception):
    """Ctrl-C or SIGTERM, once the run is saved: exit status 130 or 143."""

    def __init__(self, signum, message):
        super().__init__(message)
        self.signum = signum


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


# ---------------------------------------------------------------------------------------------------------- processes

class Processes:
    """This process among those that torchrun started, or alone."""

    def __init__(self):
        self.count = int(os.environ.get("WORLD_SIZE", 1))
        self.rank = int(os.environ.get("RANK", 0))
        self.local = int(os.environ.get("LOCAL_RANK", 0))
        self.first = self.rank == 0

    def start(self):
        if self.count > 1 and not dist.is_initialized():
            dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")

    def share(self, total):
        """This process's part of `total` things: a slice; parts differ by one at the most, and the first is never empty."""
        return slice(-(-self.rank * total // self.count), -(-(self.rank + 1) * total // self.count))

    def from_first(self, value):
        """The first process's value (anything that pickles), on all."""
        box = [value]
        if self.count > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def from_all(self, value):
        """Every process's value, in the order of their ranks."""
        box = [value]
        if self.count > 1:
            box = [None] * self.count
            dist.all_gather_object(box, value)
        return box

    def sum(self, tensor):
        """The sum over the processes of a tensor, a new one."""
        tensor = tensor.clone()
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

    def say(self, *text):
        if self.first:
            tqdm.write(" ".join(map(str, text)))
            sys.stdout.flush()


processes = Processes()


# ---------------------------------------------------------------------------------------------------- command line

COMMANDS = {"list": command_list, "eval": command_eval, "resume": command_resume, "predict": command_predict,
            "figures": command_figures}
# What may be given beside a command; a training run takes every option.
TAKES = {"list": {"setup", "data"}, "eval": {"device", "data_dir", "eval_sequences"}, "predict": {"data", "horizon", "device"},
         "figures": {"device", "data_dir", "eval_sequences"},
         "resume": {"device", "data_dir", "iterations", "eval_every", "eval_sequences", "save_every"}}


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} (see python train.py --help)")


def positive(text):
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def rate(text):
    number = float(text)
    if not 0 < number < math.inf:
        raise ValueError
    return number


def seed(text):
    number = int(text)
    if not 0 <= number < 2**63:
        raise ValueError
    return number


positive.__name__, rate.__name__, seed.__name__ = "positive whole number", "positive number", "whole number from 0 to 2^63 - 1"      # argparse names them in its errors


def parse(argv):
    p = Parser(prog="train.py", allow_abbrev=False, description="Train, evaluate and use ConvRNNs for next-frame prediction.")
    p.add_argument("model", nargs="?", metavar="MODEL", help=", ".join(MODELS))
    p.add_argument("--quick", action="store_true", default=None, help="a two-minute demonstration on moving_digits, on any machine")
    p.add_argument("--list", action="store_true", default=None, help="every model and variant with its cost; with --data, the papers' cost tables")
    p.add_argument("--eval", metavar="RUN", help="evaluate a run again; RUN: its folder or a checkpoint")
    p.add_argument("--figures", metavar="RUN", nargs="+", help="draw the papers' figures from trained runs")
    p.add_argument("--resume", metavar="RUN", help="go on with an interrupted run, from exactly where it stood")
    p.add_argument("--predict", metavar="RUN", help="forecast beyond the end of --data X, a .npy of yours; writes .npy and a picture")
    p.add_argument("--variant", help="an ablation of the model's paper (full)")
    p.add_argument("--setup", choices=("patch4", "fullres"), help="the set-up to train under (the model's own paper's)")
    p.add_argument("--data", metavar="NAME|PATH", help="a dataset by name or a .npy or .npz of yours (moving_mnist)")
    p.add_argument("--data-dir", metavar="DIR", help="where datasets lie or are downloaded to (data)")
    p.add_argument("--frames-in", type=positive, metavar="N", help="frames read (the dataset's)")
    p.add_argument("--horizon", type=positive, metavar="N", help="frames forecast (the dataset's)")
    for name in ("iterations", "batch"):
        p.add_argument(f"--{name}", type=positive, metavar="N", help="override the set-up")
    p.add_argument("--lr", type=rate, metavar="X", help="override the set-up")
    p.add_argument("--seed", type=seed, metavar="N", help="of weights, clips and sampling (0)")
    for name in ("hidden", "layers", "kernel", "patch"):
        p.add_argument(f"--{name}", type=positive, metavar="N", help="override the network")
    p.add_argument("--device", help="cuda, cuda:N or cpu (cuda)")
    p.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="arithmetic (bf16 on CUDA, fp32 on the CPU)")
    p.add_argument("--recompute", action="store_true", default=None, help="keep little but the states for backward: less memory, more time")
    p.add_argument("--init", metavar="RUN", help="start from a run's weights, with a fresh optimiser")
    p.add_argument("--eval-every", type=positive, metavar="N", help="validate every N iterations")
    p.add_argument("--eval-sequences", type=positive, metavar="N", help="how many test sequences (all; 200 on the CPU)")
    p.add_argument("--save-every", type=positive, metavar="N", help="save last.pt every N iterations")
    p.add_argument("--out", metavar="DIR", help="where runs go (runs)")
    p.add_argument("--name", help="the run's name (model, variant, data and a running number)")
    p.add_argument("--no-reverse", action="store_true", default=None, help="do not train on reversed sequences")
    p.add_argument("--normalize", action="store_true", default=None, help="scale an array of yours by its training part's range")
    p.add_argument("--box", type=float, nargs=4, metavar=("S", "W", "N", "E"), help="degrees of latitude and longitude (typhoon)")
    args = p.parse_args(argv)
    given = [name for name, value in vars(args).items() if value is not None]
    commands = [name for name in given if name in COMMANDS]
    if args.model:
        commands.insert(0, "model")
    if len(commands) != 1:
        raise UserError("give a MODEL, or one of " + ", ".join(f"--{name}" for name in COMMANDS) + " (see python train.py --help)")
    command = commands[0]
    if processes.count > 1 and command not in ("model", "resume"):
        raise UserError(f"--{command} runs in one process: python train.py --{command}, without torchrun")
    for name in given:
        if command != "model" and name != command and name not in TAKES[command]:
            takes = ", ".join(f"--{option.replace('_', '-')}" for option in sorted(TAKES[command]))
            raise UserError(f"--{name.replace('_', '-')} does not go with --{command}, which takes {takes}")
    return command, args


def main(argv=None):
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
            print(f"train.py: {message}", file=sys.stderr, flush=True)
        return status
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def attempt(argv):
    """Do what the command line says: (exit status, what went wrong or None)."""
    try:
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
    except BrokenPipeError:         # `--list | head`: who reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, None
    except OSError as error:
        return 2, f"{error.filename}: {error.strerror}" if error.filename else str(error)
    except (MemoryError, RuntimeError) as error:
        if not out_of_memory(error):
            raise
        return 1, "out of memory: a smaller --hidden or fewer frames would fit"


if __name__ == "__main__":
    sys.exit(main())
