"""What a training step costs: time, memory, FLOP/s. Not a test: run it.

    python tests/bench.py                              all models; 20 random frames of 64×64
    python tests/bench.py cms_lstm --clock cpu         one of them, on a machine that is not idle

A training step of each model in these forms, from the same weights, half of the frames its own:

    ours              the model file; also in bf16, with --recompute and, on CUDA, as training runs it: as one graph,
                      and as one of compiled steps
    straightforward   the same as the papers' own released code writes it: frames cut into patches by reshapes, sampling
                      masks built one sequence and step at a time and as large as the frames, one convolution per input
                      (Q, K, V: one each), split, gate by gate; softmax(QᵀK) stored, then multiplied with V; SE's blocks
                      sliced out in loops. Before anything is measured, the two must agree in fp64.
    bound             our convolutions and attention from inputs that lie ready, and nothing else: what is left to gain

They take turns in one process, so that whatever else the machine does meets all of them: what counts are the ratios.
"""

import argparse
import copy
import statistics
import time
from functools import partial

import numpy as np
import torch
from conftest import ROOT  # noqa: F401  puts the project on the import path
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.benchmark import timer

import train

# ---------------------------------------------------------------------------------------- the straightforward form

def gates(of_x, of_h, hidden):
    """What x and h have for each gate, from convolutions of their own."""
    return zip(torch.split(of_x, hidden, 1), torch.split(of_h, hidden, 1))


def convlstm(cell, x, h, c):
    (i_x, i_h), (f_x, f_h), (g_x, g_h), (o_x, o_h) = gates(cell.x2h(x), cell.h2h(h), h.shape[1])
    i = torch.sigmoid(i_x + i_h)
    f = torch.sigmoid(f_x + f_h + cell.forget_offset)
    g = torch.tanh(g_x + g_h)
    o = torch.sigmoid(o_x + o_h)
    c = cell.norm_c(f * c + i * g)
    return o * torch.tanh(c), c


def st_lstm(cell, x, h, c, m):
    i_x, f_x, g_x, i_xm, f_xm, g_xm, o_x = torch.split(cell.x2h(x), h.shape[1], 1)
    i_h, f_h, g_h, o_h = torch.split(cell.h2h(h), h.shape[1], 1)
    i_m, f_m, g_m = torch.split(cell.m2h(m), h.shape[1], 1)
    i = torch.sigmoid(i_x + i_h)
    f = torch.sigmoid(f_x + f_h + cell.forget_offset)
    g = torch.tanh(g_x + g_h)
    c = f * c + i * g
    i_prime = torch.sigmoid(i_xm + i_m)
    f_prime = torch.sigmoid(f_xm + f_m + cell.forget_offset)
    g_prime = torch.tanh(g_xm + g_m)
    m = f_prime * m + i_prime * g_prime
    memory = torch.cat((c, m), 1)
    o = torch.sigmoid(o_x + o_h + cell.cm2o(memory))
    return o * torch.tanh(cell.mix(memory)), c, m


def sa_convlstm(cell, x, h, c, m):
    h, c = convlstm(cell, x, h, c)
    memory, (q, k, v), (k_m, v_m) = cell.memory, each(cell.memory.qkv_h, h), each(cell.memory.kv_m, m)
    z = memory.fuse(torch.cat([attend(q, k, v), attend(q, k_m, v_m)], 1))
    i, g, o = torch.split(memory.gates(torch.cat([z, h], 1)), h.shape[1], 1)
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
            x = 2 * torch.sigmoid(cell.ce.of_h(h)) * x
        else:
            h = 2 * torch.sigmoid(cell.ce.of_x(x)) * h
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
    (i_a, i_h), (g_a, g_h), (o_a, o_h) = gates(se.a2g(a), se.h2g(h), h.shape[1])
    i = torch.sigmoid(i_a + i_h)
    c = se.norm_c((1 - i) * c + i * torch.tanh(g_a + g_h))
    return torch.sigmoid(o_a + o_h) * c, c


def moderrnn(cell, x, h, c):
    for step in range(cell.dcb.steps):
        if step % 2 == 0:
            x = cell.dcb.scale * torch.sigmoid(sum(each(cell.dcb.of_h, h)) / 3) * x
        else:
            h = cell.dcb.scale * torch.sigmoid(sum(each(cell.dcb.of_x, x)) / 3) * h
    return convlstm(cell, x, h, c)


def mk_lstm(cell, x, h, c, c_wide):
    (i_x, i_h), (f_x, f_h), (g_x, g_h), (o_x, o_h) = gates(cell.x2h(x), cell.h2h(h), h.shape[1])
    (i_x5, i_h5), (f_x5, f_h5), (g_x5, g_h5), (o_x5, o_h5) = gates(cell.x2h_wide(x), cell.h2h_wide(h), h.shape[1])
    i = torch.sigmoid(i_x + i_h)
    f = torch.sigmoid(f_x + f_h + cell.forget_offset)
    g = torch.tanh(g_x + g_h)
    c = cell.norm_c(f * c + i * g)
    i5 = torch.sigmoid(i_x5 + i_h5)
    f5 = torch.sigmoid(f_x5 + f_h5 + cell.forget_offset)
    g5 = torch.tanh(g_x5 + g_h5)
    c_wide = cell.norm_c_wide(f5 * c_wide + i5 * g5)
    o = torch.sigmoid(o_x + o_h + cell.c2o(c) + o_x5 + o_h5 + cell.c2o_wide(c_wide))
    return o * torch.tanh(cell.mix(torch.cat([c, c_wide], 1))), c, c_wide


# Of each model: its cell, and how many states of its own a layer has (PredRNN's M, handed from layer to layer, aside).
CELLS = {"convlstm": (convlstm, 2), "predrnn": (st_lstm, 2), "sa_convlstm": (sa_convlstm, 3), "cms_lstm": (cms_lstm, 2),
         "moderrnn": (moderrnn, 2), "ms_lstm": (mk_lstm, 3)}


class Straightforward(nn.Module):
    """The straightforward form of a model's full variant, with a copy of its weights."""

    def __init__(self, name, model):
        super().__init__()
        self.model, (self.cell, self.states), self.memory = copy.deepcopy(model), CELLS[name], name == "predrnn"
        for module in [*self.model.modules()]:                    # Q, K, V: a convolution each
            for fused in {"qkv", "qkv_h", "kv_m"} & {*dict(module.named_children())}:
                layer, parts = getattr(module, fused), nn.ModuleList()
                for weight, bias in zip(layer.weight.data.split(model.hidden), layer.bias.data.split(model.hidden)):
                    parts.append(nn.Conv2d(layer.in_channels, model.hidden, 1))
                    parts[-1].weight.data, parts[-1].bias.data = weight.clone(), bias.clone()
                setattr(module, fused, parts)

    def forward(self, frames, use_truth, extras=False):
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
                if self.memory:
                    *state[layer], memory = self.cell(cell, h, *state[layer], memory)
                else:
                    state[layer] = self.cell(cell, h, *state[layer])
                h = state[layer][0]
            x = model.output(h)
            predictions.append(x)
        predictions = torch.stack(predictions, 1).view(B, T - 1, C, p, p, height, width)
        predictions = predictions.permute(0, 1, 2, 5, 3, 6, 4).reshape(B, T - 1, *frames.shape[2:])
        return (predictions, {}) if extras else predictions


def check_equal(plain, ours, frames):
    """In fp64, predictions and the gradient of the first layer, which all others and all steps go into.

    Sequences read truth and predictions in turn.
    """
    mask = (torch.arange(frames.shape[1] - 1)[:, None] + torch.arange(len(frames)) % 2).to(frames.device) % 2 == 0
    found = []
    for form, embed in ((plain, lambda form: form.model.embed), (ours, lambda form: form.embed)):
        form = copy.deepcopy(form).double()
        predictions = form(frames.double(), use_truth=mask)
        found.append((predictions, *torch.autograd.grad(predictions.square().sum(), embed(form).weight)))
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- instruments

class Alive(TorchDispatchMode):
    """Counts the memory of the tensors that were made inside and are still alive, each storage once."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return out

    def bytes(self, apart=()):
        apart = {tensor.untyped_storage()._cdata for tensor in apart}
        return sum(size for key, (ref, size) in self.storages.items() if key not in apart and not ref.expired())


def kept_bytes(model, frames, **options):
    """Bytes that one roll-out keeps for its backward pass; parameters, frames and predictions left out.

    The gradients that are alive at any moment of the backward pass come on top. With model and frames on device="meta"
    nothing is computed; the count is the same but for attention, which stores its scores there and not on the CPU.
    """
    with Alive() as alive:
        predictions = model(frames, **options)
    return alive.bytes(apart=(frames, predictions, *model.parameters()))


def layer_output_bytes(model, frames):
    """M_out of the MS-LSTM paper, §4.3: bytes that the layers with weights (convolutions, LayerNorms) put out in one
    roll-out over frames."""
    total = 0

    def add(module, inputs, output):
        nonlocal total
        total += output.nbytes

    layers = [m for m in model.modules() if not [*m.children()] and [*m.parameters(recurse=False)]]
    hooks = [layer.register_forward_hook(add) for layer in layers]
    with torch.no_grad():
        model(frames)
    for hook in hooks:
        hook.remove()
    return total


class Record(TorchFunctionMode):
    """Records the convolutions and attention computed inside; called, it computes them again, forward and backward."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        if func in (F.conv2d, F.scaled_dot_product_attention):
            # other numbers, but as laid out in memory
            args = [torch.rand_like(x).requires_grad_(x.requires_grad)
                    if isinstance(x, torch.Tensor) and not isinstance(x, nn.Parameter) else x for x in args]
            needed = [x for x in args if isinstance(x, torch.Tensor) and x.requires_grad]
            self.calls.append((func, args, kwargs or {}, needed, torch.rand_like(output)))
        return output

    def __call__(self):
        for func, args, kwargs, needed, gradient in self.calls:
            torch.autograd.grad(func(*args, **kwargs), needed, gradient)


def in_turn(steps, repeats, clock=timer):
    """Seconds of `repeats` calls of each step, {form: [seconds, …]}; torch's timer waits for the device."""
    seconds = {form: [] for form in steps}
    for _ in range(repeats):
        for form, step in steps.items():
            begun = clock()
            step()
            seconds[form].append(clock() - begun)
    return seconds


def ceiling(device, precision):
    """FLOP/s of one large matrix product, as such or as a 1×1 convolution, which may go through another library."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    image, kernel = b.view(1, n, 32, n // 32), a.view(n, n, 1, 1)
    with train.autocast(device, precision):
        seconds = in_turn({"product": lambda: a @ b, "convolution": lambda: torch.conv2d(image, kernel)}, repeats=6)
    return 2 * n**3 / min(second for each in seconds.values() for second in each[1:])


# ------------------------------------------------------------------------------------------------------------ bench

def bench(name, setup, batch, frames, device, precision, repeats, clock=timer):
    """One model: ({form: seconds of each repeat}, {form: bytes}), without the forms that do not fit the device."""
    module = train.model_file(name)
    torch.manual_seed(0)
    ours = module.MODEL(setup=setup).to(device)
    plain = Straightforward(name, ours)
    frames = torch.rand(batch, frames, 1, 64, 64, device=device)
    mask = torch.rand(frames.shape[1] - 1, batch, device=device) < 0.5
    check_equal(plain, ours, frames[:, :5])
    config = dict(batch=batch, loss="l2", lr=1e-3, weight_decay=0.0, optimizer=module.TRAINING[setup]["optimizer"])
    optimizers = {model: train.make_optimizer(model, config) for model in (plain, ours)}
    forms = {"ours": (ours, precision), "ours, bf16": (ours, "bf16"), "ours, recompute": (ours, precision),
             "straightforward": (plain, precision)}
    if precision == "bf16" or not train.computes_in(device, "bf16"):
        del forms["ours, bf16"]
    record, steps, sizes = Record(), {}, {}

    def step(form):
        model, arithmetic = forms[form]
        model.recompute = form == "ours, recompute"
        train.train_step(model, optimizers[model], frames, mask, config | dict(precision=arithmetic))

    def memory(form):
        """The allocator's peak on CUDA; elsewhere weights, gradients, Adam's moments and what autograd keeps."""
        model, arithmetic = forms[form]
        weights = sum(p.nbytes for p in model.parameters())
        if device.type == "cuda":
            model.zero_grad()
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)          # its weights and moments among it
            step(form)
            return torch.cuda.max_memory_allocated(device) - before + 3 * weights
        with train.autocast(device, arithmetic):
            return 4 * weights + kept_bytes(model, frames, use_truth=mask)

    def bound():
        with train.autocast(device, precision):
            record()

    for form in forms:
        try:
            step(form)                                            # warms up
            steps[form], sizes[form] = partial(step, form), memory(form)
        except (MemoryError, RuntimeError) as error:
            if not train.out_of_memory(error):
                raise
            print(f"{name}, {setup}, {form}: out of memory; a smaller --batch would fit")
    if "ours" in steps:
        with record:
            step("ours")
        steps["bound"] = bound
        if device.type == "cuda":
            for form, compile in ("ours, graph", False), ("ours, compiled", True):
                graph = train.Step(ours, config | dict(precision=precision, reverse=False, compile=compile), device)
                steps[form] = partial(graph, frames, mask, config["lr"])
                try:
                    for _ in range(4):                            # the third is recorded, the fourth replays
                        steps[form]()
                except RuntimeError as error:
                    if not train.not_compiled(error):
                        raise
                    del steps[form]
                    print(f"{name}, {setup}, {form}: {train.not_compiled(error)}")
    weights = sum(p.nbytes for p in ours.parameters())
    sizes["4·M_par + 2·M_out"] = 4 * weights + 2 * layer_output_bytes(ours, frames)
    return in_turn(steps, repeats, clock), sizes


FORMS = ("ours", "ours, graph", "ours, compiled", "ours, bf16", "ours, recompute", "straightforward", "bound",
         "4·M_par + 2·M_out")
ROW = "{:20} {:>24} {:>7} {:>9} {:>8} {:>8} {:>10} {:>7}"


def main(argv=None):
    p = argparse.ArgumentParser(prog="bench.py", description=__doc__.splitlines()[0])
    p.add_argument("models", metavar="MODEL", nargs="*", help=", ".join(train.MODELS))
    p.add_argument("--device", help="cuda, cuda:N or cpu (cuda where there is one)")
    p.add_argument("--setup", choices=("patch4", "fullres"), help="(the model's own paper's; on CUDA both)")
    p.add_argument("--batch", type=train.POSITIVE, help="(the set-up's on CUDA, 2 on the CPU)")
    p.add_argument("--frames", type=train.POSITIVE, default=20, help="of a sequence (20)")
    p.add_argument("--precision", choices=("fp32", "tf32", "bf16"), help="(bf16 on CUDA, fp32 on the CPU)")
    p.add_argument("--repeats", type=train.POSITIVE, default=5, help="steps that are timed (5)")
    p.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's own time (wall)")
    args = p.parse_args(argv)
    try:
        device = train.device_of(args.device, quick=True)
        precision = train.precision_of(args.precision, device)
        modules = {name: train.model_file(name) for name in args.models or train.MODELS}
    except train.UserError as error:
        p.exit(2, f"bench.py: {error}\n")
    on_cuda, found = device.type == "cuda", []
    peaks = {name: ceiling(device, name) for name in (precision, "bf16") if train.computes_in(device, name)}
    print(f"{train.versions(device)['device']}, torch {torch.__version__}, {precision}; {args.frames} frames of 64×64; "
          f"ceiling: {', '.join(f'{peak / 1e9:,.0f} GFLOP/s in {name}' for name, peak in peaks.items())}\n")
    print(ROW.format("", "seconds a step:", "", "sequences", "", "of the", "", ""))
    print(ROW.format("", "median (least – most)", "÷ ours", "a second", "GFLOP/s", "ceiling", "memory, MB", "÷ ours"))
    for name, module in modules.items():
        # On the CPU full frames take minutes a step for the models with attention: there only if asked for.
        for setup in [args.setup] if args.setup else [*module.NETWORK] if on_cuda else [module.DEFAULT_SETUP]:
            batch = args.batch or (module.TRAINING[setup]["batch"] if on_cuda else 2)
            seconds, sizes = bench(name, setup, batch, args.frames, device, precision, args.repeats,
                                   timer if args.clock == "wall" else time.process_time)
            medians = {form: statistics.median(each) for form, each in seconds.items()}
            flop = 6 * batch * train.cost(module, args.frames, setup=setup)[1]
            found.append((medians, sizes))
            print(f"\n{name}, {setup}, batch {batch}")
            for form in FORMS:
                cells = [""] * 7
                if form in medians:
                    median, peak = medians[form], peaks["bf16" if "bf16" in form else precision]
                    cells[:5] = (f"{median:.3f} ({min(seconds[form]):.3f} – {max(seconds[form]):.3f})",
                                 over_ours([medians], form), f"{batch / median:.2f}", f"{flop / median / 1e9:,.0f}",
                                 f"{flop / median / peak:.1%}")
                if form in sizes:
                    cells[5:] = f"{sizes[form] / 1e6:,.0f}", over_ours([sizes], form)
                if any(cells):
                    print(ROW.format(form, *cells), flush=True)
    medians, sizes = zip(*found)
    print("\ngeometric means")
    for form in FORMS[1:]:
        print(ROW.format(form, "", over_ours(medians, form), "", "", "", "", over_ours(sizes, form)))
    print(f"""
memory: {"the allocator's peak" if on_cuda else "weights, gradients, Adam's moments and what autograd keeps"}
4·M_par + 2·M_out: the same by the MS-LSTM paper, §4.3, of the weights and the outputs of the layers
GFLOP/s: six times the counted multiply-accumulates (forward, and twice that backward), by the median""")


def over_ours(found, form):
    """The geometric mean, over those that have both, of what a form takes beside what ours takes; "" if none has."""
    ratios = [each[form] / each["ours"] for each in found if form in each and "ours" in each]
    return f"{statistics.geometric_mean(ratios):.3f}" if ratios else ""


if __name__ == "__main__":
    main()
