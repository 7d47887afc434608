"""What a training step costs: milliseconds, sequences per second, memory. Not a test: run it.

    python tests/bench.py                       all models, each with its paper's set-up, 20 frames of 64×64
    python tests/bench.py cms_lstm --profile    one of them, and which kernels its step consists of

A step (forward and backward pass, optimiser) in these forms, half of the frames the model's own:

    compiled graph    as train.py takes it on CUDA
    straightforward   as the papers' released code writes it: frames cut into patches by reshapes, sampling masks built
                      one sequence and step at a time and as large as the frames, a convolution per input (Q, K, V: one
                      each), split, gate by gate; softmax(QᵀK) stored, then multiplied with V; SE's blocks sliced out
    graph, eager      ours without compiling; without a graph either, as --eager and on the CPU

On CUDA in bf16 with the paper's batch, on the CPU in fp32 with two sequences. Each is printed as soon as it is measured.
test_bench.py holds the straightforward form to ours.
"""

import argparse
import copy
import gc
import os
import statistics
import subprocess
import sys
import tempfile
from collections import Counter

import numpy as np
import torch
from conftest import ROOT  # noqa: F401  puts the project on the import path
from torch import nn
from torch.nn import functional as F
from torch.utils.benchmark import timer                           # waits for the device

import train

# ---------------------------------------------------------------------------------------- the straightforward form

def split(u, like):
    return torch.split(u, like.shape[1], 1)


def remember(x, h, c, forget_offset):
    """f ∘ c + i ∘ g, of what x and h add to each gate."""
    i = torch.sigmoid(x[0] + h[0])
    f = torch.sigmoid(x[1] + h[1] + forget_offset)
    g = torch.tanh(x[2] + h[2])
    return f * c + i * g


def convlstm(cell, x, h, c):
    x, h = split(cell.x2h(x), c), split(cell.h2h(h), c)
    c = cell.norm_c(remember(x, h, c, cell.forget_offset))
    return torch.sigmoid(x[3] + h[3]) * torch.tanh(c), c


def st_lstm(cell, x, h, c, m):
    x, h, of_m = split(cell.x2h(x), c), split(cell.h2h(h), c), split(cell.m2h(m), c)
    c, m = remember(x, h, c, cell.forget_offset), remember(x[3:], of_m, m, cell.forget_offset)
    memory = torch.cat((c, m), 1)
    o = torch.sigmoid(x[6] + h[3] + cell.cm2o(memory))
    return o * torch.tanh(cell.mix(memory)), c, m


def sa_convlstm(cell, x, h, c, m):
    h, c = convlstm(cell, x, h, c)
    memory, (q, k, v), (k_m, v_m) = cell.memory, each(cell.memory.qkv_h, h), each(cell.memory.kv_m, m)
    z = memory.fuse(torch.cat([attend(q, k, v), attend(q, k_m, v_m)], 1))
    i, g, o = split(memory.gates(torch.cat([z, h], 1)), h)
    i = torch.sigmoid(i)
    m = (1 - i) * m + i * torch.tanh(g)
    return torch.sigmoid(o) * m, c, m


def each(convs, x):
    return [conv(x) for conv in convs]


def attend(q, k, v):
    """All points of q, k, v (B, C, …) to all, without a scale."""
    shape, (q, k, v) = q.shape, (u.reshape(*u.shape[:2], -1) for u in (q, k, v))
    attention = torch.softmax(torch.bmm(q.transpose(1, 2), k), -1)
    return torch.bmm(v, attention.transpose(1, 2)).view(shape)


def cms_lstm(cell, x, h, c):
    for step in range(cell.ce.steps):
        if step % 2 == 0:
            x = 2 * torch.sigmoid(cell.ce.conv_h(h)) * x
        else:
            h = 2 * torch.sigmoid(cell.ce.conv_x(x)) * h
    h, c = convlstm(cell, x, h, c)
    se, (height, width), z, expressed = cell.se, h.shape[2:], torch.cat([h, c], 3), []
    for n, scale in enumerate(se.scales):
        # H and C, side by side, one behind the other: (B, C, H, W, 2)
        q, k, v = (torch.stack(torch.split(u, width, 3), 4) for u in each(se.qkv[3 * n:3 * n + 3], z))
        step_h, step_w, rows = height // scale, width // scale, []
        for i in range(scale):
            blocks = [[u[:, :, i * step_h:(i + 1) * step_h, j * step_w:(j + 1) * step_w] for u in (q, k, v)]
                      for j in range(scale)]
            rows.append(torch.cat([attend(*block) for block in blocks], 3))
        context = torch.cat(rows, 2)
        expressed.append(torch.cat([context[..., 0], context[..., 1]], 3) + z)
    a = se.norm_a(se.fuse(torch.cat(expressed, 1)))
    a = se.mix(torch.cat(torch.split(a, width, 3), 1))
    (i, g, o), (i_h, g_h, o_h) = split(se.a2g(a), h), split(se.h2g(h), h)
    i = torch.sigmoid(i + i_h)
    c = se.norm_c((1 - i) * c + i * torch.tanh(g + g_h))
    return torch.sigmoid(o + o_h) * c, c


def moderrnn(cell, x, h, c):
    for step in range(5):
        if step % 2 == 0:
            x = 2 * torch.sigmoid(sum(each(cell.dcb.conv_h, h)) / 3) * x
        else:
            h = 2 * torch.sigmoid(sum(each(cell.dcb.conv_x, x)) / 3) * h
    return convlstm(cell, x, h, c)


def mk_lstm(cell, x, h, c, c_wide):
    wide = split(cell.x2h_wide(x), c), split(cell.h2h_wide(h), c)
    x, h = split(cell.x2h(x), c), split(cell.h2h(h), c)
    c = cell.norm_c(remember(x, h, c, cell.forget_offset))
    c_wide = cell.norm_c_wide(remember(*wide, c_wide, cell.forget_offset))
    o = torch.sigmoid(x[3] + h[3] + cell.c2o(c) + wide[0][3] + wide[1][3] + cell.c2o_wide(c_wide))
    return o * torch.tanh(cell.mix(torch.cat([c, c_wide], 1))), c, c_wide


# Of each model: its cell, and how many states of its own a layer has (PredRNN's M, handed from layer to layer, aside).
CELLS = dict(convlstm=(convlstm, 2), predrnn=(st_lstm, 2), sa_convlstm=(sa_convlstm, 3), cms_lstm=(cms_lstm, 2),
             moderrnn=(moderrnn, 2), ms_lstm=(mk_lstm, 3))


class Straightforward(nn.Module):
    """The straightforward form of a model's full variant, with a copy of its weights."""

    def __init__(self, name, model):
        super().__init__()
        self.model, (self.cell, self.states) = copy.deepcopy(model), CELLS[name]
        for module in [*self.model.modules()]:                    # Q, K, V: a convolution each
            for fused in {"qkv", "qkv_h", "kv_m"} & {*dict(module.named_children())}:
                layer, parts = getattr(module, fused), nn.ModuleList()
                for weight, bias in zip(layer.weight.data.split(model.hidden), layer.bias.data.split(model.hidden)):
                    parts.append(nn.Conv2d(layer.in_channels, model.hidden, 1))
                    parts[-1].weight.data, parts[-1].bias.data = weight.clone(), bias.clone()
                setattr(module, fused, parts)

    def forward(self, frames, use_truth):
        B, T, C, height, width = frames.shape
        model, p, depths = self.model, self.model.patch, getattr(self.model, "depths", [0] * len(self.model.cells))
        height, width, hidden = height // p, width // p, model.hidden
        patches = frames.view(B, T, C, height, p, width, p).permute(0, 1, 2, 4, 6, 3, 5)
        patches = patches.reshape(B, T, C * p * p, height, width)
        flags = []
        for truth in use_truth.T.tolist():                        # one by one, as large as the frames
            flags += [(np.ones if true else np.zeros)(patches.shape[2:], np.float32) for true in truth]
        flags = torch.from_numpy(np.reshape(np.array(flags), (B, T - 1, *patches.shape[2:]))).to(frames)
        state = [[frames.new_zeros(B, hidden, height // 2**depth, width // 2**depth) for _ in range(self.states)]
                 for depth in depths]
        memory, x, predictions = frames.new_zeros(B, hidden, height, width), patches[:, 0], []
        for t in range(T - 1):
            if t > 0:
                x = flags[:, t] * patches[:, t] + (1 - flags[:, t]) * x
            h = model.embed(x)
            for layer, cell in enumerate(model.cells):
                if layer and depths[layer] > depths[layer - 1]:
                    h = F.max_pool2d(h, 2)
                if layer and depths[layer] < depths[layer - 1]:
                    h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
                    h = h + state[len(model.cells) - 1 - layer][0]
                if self.cell == st_lstm:
                    *state[layer], memory = self.cell(cell, h, *state[layer], memory)
                else:
                    state[layer] = self.cell(cell, h, *state[layer])
                h = state[layer][0]
            x = model.output(h)
            predictions.append(x)
        predictions = torch.stack(predictions, 1).view(B, T - 1, C, p, p, height, width)
        return predictions.permute(0, 1, 2, 5, 3, 6, 4).reshape(B, T - 1, *frames.shape[2:])


# --------------------------------------------------------------------------------------------------------------- bench

FORMS = dict(cuda=("compiled graph", "straightforward", "graph", "eager"), cpu=("straightforward", "eager"))


def step_of(form, name, device, batch):
    """A training step of a model in one of the forms, to be called without arguments."""
    module, precision = train.model_file(name), dict(cuda="bf16", cpu="fp32")[device.type]
    training, model = module.TRAINING[module.DEFAULT_SETUP], module.MODEL()
    config = dict(batch=batch, precision=precision, loss=training["loss"], optimizer=training["optimizer"], lr=1e-3,
                  weight_decay=0.0, reverse=False, recompute=False, frames_in=10, horizon=10,
                  iterations=train.COMPILE_FROM if form == "compiled graph" else 1, eager="graph" not in form)
    if form == "straightforward":                                 # autocast as usual: it keeps the weights that it cast
        model = Straightforward(name, model)
        model.forward = torch.autocast(device.type, torch.bfloat16, precision == "bf16")(model.forward)
    step = train.Step(train.Run(None, config, model, device=device))
    frames, mask = torch.rand(batch, 20, 1, 64, 64).to(device), torch.rand(19, batch).to(device) < 0.5
    return lambda: step(frames, mask, config["lr"])


def measure(step, clock=timer):
    """Milliseconds of each of 20 calls, but of three where one takes over 100; the first, which records, left out."""
    found = []
    step()
    while len(found) < 3 or len(found) < 20 and max(found) < 100:
        begun = clock()
        step()
        found.append(1e3 * (clock() - begun))
    return found


def compile_all(names):
    """Compile the models side by side, in a process each, into the folder that this one reads from."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", tempfile.mkdtemp(prefix="bench-"))
    environment = os.environ | dict(TORCHINDUCTOR_COMPILE_THREADS="2")
    for process in [subprocess.Popen([sys.executable, __file__, "--compile", name], env=environment) for name in names]:
        process.wait()


def profile(step, device):
    """What one call of a step consists of: [(milliseconds, calls, name), …] by time. On CUDA its kernels, on the CPU
    its operations, each with those that it calls."""
    kind = getattr(torch.profiler.ProfilerActivity, device.type.upper())
    with torch.profiler.profile(activities=[kind]) as profiled:
        step()
        timer()                                                   # waits
    milliseconds, calls = Counter(), Counter()
    for event in profiled.profiler.kineto_results.events():       # the usual .events() takes half a minute
        if event.device_type().name == device.type.upper():
            milliseconds[event.name()] += event.duration_ns() / 1e6
            calls[event.name()] += 1
    return [(each, calls[name], name) for name, each in milliseconds.most_common()]


def report(form, name, device, batch, profiled):
    """Measure a form and print its line."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    step = step_of(form, name, device, batch)
    times = measure(step)
    middle = statistics.median(times)
    memory = f", {torch.cuda.max_memory_allocated() / 2**20:.0f} MiB" if device.type == "cuda" else ""
    print(f"{name}, batch {batch}, {form}: {middle:.2f} ms ({min(times):.2f} – {max(times):.2f}), "
          f"{1e3 * batch / middle:.1f} sequences/s{memory}", flush=True)
    for milliseconds, calls, kernel in profile(step, device)[:30] if profiled else ():
        print(f"    {milliseconds:8.3f} ms {calls:6}  {kernel[:90]}")


def main(argv=None):
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    p.add_argument("models", metavar="MODEL", nargs="*", help=", ".join(train.MODELS))
    p.add_argument("--device", help="cuda, cuda:N or cpu (cuda where there is one)")
    p.add_argument("--profile", action="store_true", help="list what a step of the first form consists of, by time")
    p.add_argument("--compile", action="store_true", help="only compile, for a later call")
    args = p.parse_args(argv)
    try:
        device = train.device_of(args.device, quick=True)
        modules = {name: train.model_file(name) for name in args.models or train.MODELS}
    except train.UserError as error:
        p.exit(2, f"bench.py: {error}\n")
    batch = {name: module.TRAINING[module.DEFAULT_SETUP]["batch"] if device.type == "cuda" else 2
             for name, module in modules.items()}
    if args.compile:
        return [step_of("compiled graph", name, device, batch[name])() for name in modules]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    print(f"{name}, torch {torch.__version__}", flush=True)
    if device.type == "cuda":
        compile_all(modules)
    for name in modules:
        for form in FORMS[device.type]:
            report(form, name, device, batch[name], args.profile and form == FORMS[device.type][0])


if __name__ == "__main__":
    main()
