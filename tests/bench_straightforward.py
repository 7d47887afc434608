"""Our training step against the straightforward one: time, and bytes that autograd keeps. Not a test: run it.

    python tests/bench_straightforward.py                        all models at their own set-ups; two threads, wall-clock
    python tests/bench_straightforward.py cms_lstm --threads 1 --clock cpu --frames 8         on a machine that is not idle

The straightforward form computes the same from the same weights, written the way the papers' own released code writes
it: frames cut into patches by reshapes, sampling masks built one sequence and step at a time and as large as the frames,
one convolution per input (Q, K, V: one each), split, gate by gate; softmax(QᵀK) stored, then multiplied with V; SE's
blocks sliced out in loops. Before anything is measured the two must give the same predictions to 1e-5.

Both forms, and ours in bf16 and with `recompute`, then take turns in one process, so that whatever else the machine does
meets all of them: sampling masks, forward pass and backward pass of a training step. What counts are the ratios. In turn
with them, as the bound of what these convolutions leave to gain, they run with attention alone, from inputs that lie ready.
"""

import argparse
import copy
import importlib
import json
import math
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train  # noqa: E402

FORMS = ("straightforward", "ours", "ours, bf16", "ours, recompute")
BOUND = "bare"


def part_of(layer, outputs):
    """The part of a convolution, perhaps with its LayerNorm, that makes some of its output channels."""
    part = nn.Conv2d(layer.in_channels, outputs.stop - outputs.start, layer.kernel_size, padding=layer.padding)
    part.weight.data.copy_(layer.weight[outputs])
    part.bias.data.copy_(layer.bias[outputs])
    return part


def one_by_one(layer, parts):
    """One convolution for each of the equal parts of a layer's output channels."""
    channels = layer.out_channels // parts
    return nn.ModuleList(part_of(layer, slice(k * channels, (k + 1) * channels)) for k in range(parts))


class PlainConvLSTM(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.x2h, self.h2h, self.norm_c, self.forget_offset = cell.x2h, cell.h2h, cell.norm_c, cell.forget_offset

    def forward(self, x, h, c):
        i_x, f_x, g_x, o_x = torch.split(self.x2h(x), h.shape[1], 1)
        i_h, f_h, g_h, o_h = torch.split(self.h2h(h), h.shape[1], 1)
        i = torch.sigmoid(i_x + i_h)
        f = torch.sigmoid(f_x + f_h + self.forget_offset)
        g = torch.tanh(g_x + g_h)
        o = torch.sigmoid(o_x + o_h)
        c = self.norm_c(f * c + i * g)
        return o * torch.tanh(c), c


class PlainSTLSTM(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.x2h, self.h2h, self.m2h, self.cm2o, self.mix = cell.x2h, cell.h2h, cell.m2h, cell.cm2o, cell.mix
        self.forget_offset = cell.forget_offset

    def forward(self, x, h, c, m):
        i_x, f_x, g_x, i_xm, f_xm, g_xm, o_x = torch.split(self.x2h(x), h.shape[1], 1)
        i_h, f_h, g_h, o_h = torch.split(self.h2h(h), h.shape[1], 1)
        i_m, f_m, g_m = torch.split(self.m2h(m), h.shape[1], 1)
        i = torch.sigmoid(i_x + i_h)
        f = torch.sigmoid(f_x + f_h + self.forget_offset)
        g = torch.tanh(g_x + g_h)
        delta_c = i * g
        c = f * c + delta_c
        i_prime = torch.sigmoid(i_xm + i_m)
        f_prime = torch.sigmoid(f_xm + f_m + self.forget_offset)
        g_prime = torch.tanh(g_xm + g_m)
        delta_m = i_prime * g_prime
        m = f_prime * m + delta_m
        mem = torch.cat((c, m), 1)
        o = torch.sigmoid(o_x + o_h + self.cm2o(mem))
        return o * torch.tanh(self.mix(mem)), c, m


class PlainSAM(nn.Module):
    def __init__(self, memory):
        super().__init__()
        self.q, self.k, self.v = one_by_one(memory.qkv_h, 3)
        self.k_m, self.v_m = one_by_one(memory.kv_m, 2)
        self.fuse, self.gates = memory.fuse, memory.gates

    def forward(self, h, m):
        B, C, height, width = h.shape
        q = self.q(h).view(B, C, -1).transpose(1, 2)
        k, v = self.k(h).view(B, C, -1), self.v(h).view(B, C, -1)
        attention_h = torch.softmax(torch.bmm(q, k), -1)
        z_h = torch.matmul(attention_h, v.permute(0, 2, 1))
        k_m, v_m = self.k_m(m).view(B, C, -1), self.v_m(m).view(B, C, -1)
        attention_m = torch.softmax(torch.bmm(q, k_m), -1)
        z_m = torch.matmul(attention_m, v_m.permute(0, 2, 1))
        z_h = z_h.transpose(1, 2).reshape(B, C, height, width)
        z_m = z_m.transpose(1, 2).reshape(B, C, height, width)
        z = self.fuse(torch.cat([z_h, z_m], 1))
        i, g, o = torch.split(self.gates(torch.cat([z, h], 1)), C, 1)
        i = torch.sigmoid(i)
        m = (1 - i) * m + i * torch.tanh(g)
        return torch.sigmoid(o) * m, m


class PlainSAConvLSTM(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.lstm, self.memory = PlainConvLSTM(cell), PlainSAM(cell.memory)

    def forward(self, x, h, c, m):
        h, c = self.lstm(x, h, c)
        h, m = self.memory(h, m)
        return h, c, m


class PlainSE(nn.Module):
    def __init__(self, se):
        super().__init__()
        self.scales = se.scales
        convs = one_by_one(se.qkv, 3 * len(se.scales))
        self.qkv = nn.ModuleList(convs[3 * k:3 * k + 3] for k in range(len(se.scales)))
        self.fuse, self.norm_a, self.mix, self.norm_c = se.fuse, se.norm_a, se.mix, se.norm_c
        self.a2g, self.h2g = se.a2g, se.h2g

    def attend(self, x, scale, convs):
        """x (B, C, H, 2W), H and C side by side."""
        B, C, height, width = x.shape
        q, k, v = (torch.stack([u[..., :width // 2], u[..., width // 2:]], 4) for u in (conv(x) for conv in convs))
        step_h, step_w = height // scale, width // 2 // scale
        rows = []
        for i in range(scale):
            blocks = []
            for j in range(scale):
                q_, k_, v_ = (u[:, :, i * step_h:(i + 1) * step_h, j * step_w:(j + 1) * step_w].reshape(B, C, -1)
                              for u in (q, k, v))
                sim_map = torch.softmax(torch.bmm(q_.permute(0, 2, 1), k_), -1)
                context = torch.bmm(v_, sim_map.permute(0, 2, 1))
                blocks.append(context.view(B, C, step_h, step_w, 2))
            rows.append(torch.cat(blocks, 3))
        context = torch.cat(rows, 2)
        return torch.cat([context[..., 0], context[..., 1]], 3) + x

    def forward(self, h, c):
        z = torch.cat([h, c], 3)
        z = self.norm_a(self.fuse(torch.cat([self.attend(z, s, convs) for s, convs in zip(self.scales, self.qkv)], 1)))
        a_h, a_c = torch.split(z, h.shape[3], 3)
        a = self.mix(torch.cat([a_h, a_c], 1))
        i_a, g_a, o_a = torch.split(self.a2g(a), h.shape[1], 1)
        i_h, g_h, o_h = torch.split(self.h2g(h), h.shape[1], 1)
        i = torch.sigmoid(i_a + i_h)
        c = self.norm_c((1 - i) * c + i * torch.tanh(g_a + g_h))
        return torch.sigmoid(o_a + o_h) * c, c


class PlainCMSLSTM(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.of_x, self.of_h, self.steps = cell.ce.of_x, cell.ce.of_h, cell.ce.steps
        self.lstm, self.se = PlainConvLSTM(cell), PlainSE(cell.se)

    def forward(self, x, h, c):
        for step in range(self.steps):
            if step % 2 == 0:
                x = 2 * torch.sigmoid(self.of_h(h)) * x
            else:
                h = 2 * torch.sigmoid(self.of_x(x)) * h
        return self.se(*self.lstm(x, h, c))


class PlainMoDeRNN(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.of_x, self.of_h, self.steps = cell.dcb.of_x, cell.dcb.of_h, cell.dcb.steps
        self.lstm = PlainConvLSTM(cell)

    def forward(self, x, h, c):
        for step in range(self.steps):
            if step % 2 == 0:
                x = 2 * torch.sigmoid((self.of_h[0](h) + self.of_h[1](h) + self.of_h[2](h)) / 3) * x
            else:
                h = 2 * torch.sigmoid((self.of_x[0](x) + self.of_x[1](x) + self.of_x[2](x)) / 3) * h
        return self.lstm(x, h, c)


class PlainMKLSTM(nn.Module):
    def __init__(self, cell):
        super().__init__()
        for name, part in cell.named_children():
            setattr(self, name, part)
        self.forget_offset = cell.forget_offset

    def forward(self, x, h, c, c_wide):
        i_x, f_x, g_x, o_x = torch.split(self.x2h(x), h.shape[1], 1)
        i_h, f_h, g_h, o_h = torch.split(self.h2h(h), h.shape[1], 1)
        i_x5, f_x5, g_x5, o_x5 = torch.split(self.x2h_wide(x), h.shape[1], 1)
        i_h5, f_h5, g_h5, o_h5 = torch.split(self.h2h_wide(h), h.shape[1], 1)
        i = torch.sigmoid(i_x + i_h)
        f = torch.sigmoid(f_x + f_h + self.forget_offset)
        g = torch.tanh(g_x + g_h)
        c = self.norm_c(f * c + i * g)
        i5 = torch.sigmoid(i_x5 + i_h5)
        f5 = torch.sigmoid(f_x5 + f_h5 + self.forget_offset)
        g5 = torch.tanh(g_x5 + g_h5)
        c_wide = self.norm_c_wide(f5 * c_wide + i5 * g5)
        o = torch.sigmoid(o_x + o_h + self.c2o(c) + o_x5 + o_h5 + self.c2o_wide(c_wide))
        return o * torch.tanh(self.mix(torch.cat([c, c_wide], 1))), c, c_wide


# Of each model: its cell, and how many states of its own that has (PredRNN's M, handed from layer to layer, aside).
PLAIN = {"convlstm": (PlainConvLSTM, 2), "predrnn": (PlainSTLSTM, 2), "sa_convlstm": (PlainSAConvLSTM, 3),
         "cms_lstm": (PlainCMSLSTM, 2), "moderrnn": (PlainMoDeRNN, 2), "ms_lstm": (PlainMKLSTM, 3)}


class Straightforward(nn.Module):
    """The straightforward form of a model's full variant, with a copy of its weights."""

    def __init__(self, name, model):
        super().__init__()
        model = copy.deepcopy(model)
        cell, self.states = PLAIN[name]
        self.embed, self.output, self.patch, self.hidden = model.embed, model.output, model.patch, model.hidden
        self.cells = nn.ModuleList(cell(own) for own in model.cells)
        self.memory, self.depths = name == "predrnn", getattr(model, "depths", None)

    def forward(self, frames, use_truth):
        B, T, C, height, width = frames.shape
        p = self.patch
        patches = frames.view(B, T, C, height // p, p, width // p, p).permute(0, 1, 2, 4, 6, 3, 5)
        patches = patches.reshape(B, T, C * p * p, height // p, width // p)
        flags = []
        for b in range(B):                                        # one by one, as large as the frames
            for t in range(T - 1):
                shape = patches.shape[2:]
                flags.append(np.ones(shape, np.float32) if use_truth[t][b] else np.zeros(shape, np.float32))
        flags = torch.from_numpy(np.reshape(np.array(flags), (B, T - 1, *patches.shape[2:]))).to(frames.dtype)
        state = []
        for layer in range(len(self.cells)):
            scale = 2 ** self.depths[layer] if self.depths else 1
            state.append([torch.zeros(B, self.hidden, height // p // scale, width // p // scale, dtype=frames.dtype)
                          for _ in range(self.states)])
        memory = torch.zeros(B, self.hidden, height // p, width // p, dtype=frames.dtype)
        predictions = []
        for t in range(T - 1):
            if t == 0:
                x = patches[:, 0]
            else:
                x = flags[:, t] * patches[:, t] + (1 - flags[:, t]) * x
            h = self.embed(x)
            for layer, cell in enumerate(self.cells):
                if self.depths and layer and self.depths[layer] > self.depths[layer - 1]:
                    h = F.max_pool2d(h, 2)
                if self.depths and layer and self.depths[layer] < self.depths[layer - 1]:
                    h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
                    h = h + state[len(self.cells) - 1 - layer][0]
                if self.memory:
                    *state[layer], memory = cell(h, *state[layer], memory)
                else:
                    state[layer] = cell(h, *state[layer])
                h = state[layer][0]
            x = self.output(h)
            predictions.append(x)
        predictions = torch.stack(predictions, 1).view(B, T - 1, C, p, p, height // p, width // p)
        return predictions.permute(0, 1, 2, 5, 3, 6, 4).reshape(B, T - 1, C, height, width)


def training_step(model, frames, bf16):
    """Sampling masks, half of them true, forward pass and backward pass; returns the mask and the predictions."""
    mask = torch.rand(frames.shape[1] - 1, len(frames), generator=torch.Generator().manual_seed(0)) < 0.5
    mask[0] = True
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        predictions = model(frames, use_truth=mask)
    (predictions.float() - frames[:, 1:]).square().sum((2, 3, 4)).mean().backward()
    return predictions.detach()


def bare(model, frames):
    """A function that computes the convolutions and attention of one training step, forward and backward, and no more."""
    calls, attention = [], F.scaled_dot_product_attention

    def record(function, inputs, weights, output):
        inputs = [torch.rand_like(x).requires_grad_(x.requires_grad) for x in inputs]       # as laid out in memory
        calls.append((function, inputs, [x for x in inputs if x.requires_grad] + weights, torch.rand_like(output)))

    def attend(*qkv, scale):
        output = attention(*qkv, scale=scale)
        record(lambda *qkv: attention(*qkv, scale=scale), qkv, [], output)
        return output

    hooks = [layer.register_forward_hook(lambda layer, x, y: record(layer, x, [*layer.parameters()], y))
             for layer in model.modules() if isinstance(layer, nn.Conv2d)]
    with mock.patch.object(F, "scaled_dot_product_attention", attend):
        training_step(model, frames, bf16=False)
    for hook in hooks:
        hook.remove()

    def compute():
        for function, inputs, needed, gradient in calls:
            torch.autograd.grad(function(*inputs), needed, gradient)

    return compute


def compare(name, args):
    """One model: {form: {"seconds": median, "spread": [least, most], "bytes": kept}}, the bound without bytes; "error"."""
    torch.manual_seed(0)
    module = importlib.import_module(name)
    ours = module.MODEL()
    frames = torch.rand(args.batch, args.frames, 1, 64, 64)
    plain = Straightforward(name, ours)
    has_bf16 = train.cpu_has_bf16()
    forms = {form: (plain if form == "straightforward" else ours) for form in FORMS if form != "ours, bf16" or has_bf16}
    clock = {"wall": time.perf_counter, "cpu": time.process_time}[args.clock]

    def step(form):
        ours.recompute = form == "ours, recompute"
        return training_step(forms[form], frames, form == "ours, bf16")

    mask = torch.tensor([True, False, True, False])[:, None] ^ (torch.arange(args.batch) % 2 > 0)
    mask[0] = True                                                # sequences that read truth and predictions in turn
    with torch.no_grad():                                         # in fp64: fp32's rounding grows from step to step
        exact = [copy.deepcopy(model).double()(frames[:, :5].double(), use_truth=mask) for model in (plain, ours)]
    torch.testing.assert_close(*exact, rtol=0, atol=1e-5)

    predictions, gradients = {}, {}
    for form in forms:                                            # also warms up
        predictions[form] = step(form)
        gradients[form] = [p.grad.clone() for p in forms[form].parameters()]
    error = (predictions["ours"] - predictions["straightforward"]).abs().max().item()
    for a, b in zip(gradients["ours"], gradients["ours, recompute"]):
        torch.testing.assert_close(a, b)

    ours.recompute = False
    steps = {form: lambda form=form: step(form) for form in forms} | {BOUND: bare(ours, frames)}
    times = {form: [] for form in steps}
    for _ in range(args.repeats):
        for form in steps:
            start = clock()
            steps[form]()
            times[form].append(clock() - start)
    found = {form: dict(seconds=statistics.median(each), spread=[min(each), max(each)]) for form, each in times.items()}
    for form, model in forms.items():
        ours.recompute = form == "ours, recompute"
        mask = torch.ones(args.frames - 1, args.batch, dtype=torch.bool)
        with torch.autocast("cpu", torch.bfloat16, enabled=form == "ours, bf16"):
            found[form]["bytes"] = train.kept_bytes(model, frames, use_truth=mask)
    return found | {"error": error}


def mean(ratios):
    return math.exp(statistics.mean(map(math.log, ratios)))


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("models", nargs="*", default=[*PLAIN])
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's own time, on a busy machine")
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--frames", type=int, default=20)
    p.add_argument("--repeats", type=int, default=5)
    p.add_argument("--json", metavar="FILE")
    args = p.parse_args()
    torch.set_num_threads(args.threads)

    print(f"seconds (ratio to the straightforward form's; bf16 and recompute: to ours, fp32), then MB kept for backward\n"
          f"{BOUND}: our convolutions and attention without all else, the bound of what can be reached\n"
          f"batch {args.batch}, {args.frames} frames of 64×64, {args.threads} threads, {args.clock} clock, "
          f"median of {args.repeats} steps in turn\n")
    print(f"{'':12} {'straightforward':>15} {'ours':>16} {'bf16':>16} {'recompute':>16} {BOUND:>16}")
    results, ratios = {}, {}
    for name in args.models:
        results[name] = found = compare(name, args)
        for what, unit in (("seconds", 1), ("bytes", 1e6)):
            cells = []
            for form in (*FORMS[1:], BOUND):
                if what in found.get(form, ()):
                    base = "straightforward" if form in ("ours", BOUND) else "ours"
                    ratio = found[form][what] / found[base][what]
                    ratios.setdefault((form, what), []).append(ratio)
                    cells.append(f"{found[form][what] / unit:8.3f} ({ratio:.3f})" if unit == 1 else
                                 f"{found[form][what] / unit:8.1f} ({ratio:.3f})")
                else:
                    cells.append(" " * 15 + "–")
            plain = found["straightforward"][what] / unit
            print(f"{name if what == 'seconds' else '':12} {plain:15.{3 if unit == 1 else 1}f} {' '.join(cells)}", flush=True)
    means = {f"{form}, {what}": mean(values) for (form, what), values in ratios.items()}
    print("\ngeometric means: " + "; ".join(f"{key} {value:.3f}" for key, value in means.items()))
    if args.json:
        settings = vars(args) | {"torch": torch.__version__}
        Path(args.json).write_text(json.dumps(dict(settings=settings, models=results, means=means), indent=1) + "\n")


if __name__ == "__main__":
    main()
