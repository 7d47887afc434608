"""SA-ConvLSTM: a ConvLSTM with self-attention over the whole frame and over a memory of earlier frames.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    Z. Lin, M. Li, Z. Zheng, Y. Cheng, C. Yuan. "Self-Attention ConvLSTM for Spatiotemporal Prediction." AAAI 2020.

A convolution reads a neighbourhood, so distant positions influence each other only through many layers and steps. Here
each layer ends in a self-attention memory (SAM): every position of the hidden state H_t gathers what resembles it from
all positions, once from H_t itself (Z_h) and once from a memory M_{t-1} of earlier such summaries (Z_m). Gates write
the fusion of the two into the memory and read the layer's output Ĥ_t from it.

                         X_t: Ĥ_t of the layer below; in the bottom layer, the frame
                          ▼
    Ĥ_{t-1}, C_{t-1} ─▶ ConvLSTM ─▶ C_t
                          │ H_t
                          ├──▶ Q_h, K_h, V_h ─▶ Z_h ─┐
                          │    │                     ├─ W_z ─▶ Z ─▶ i', g', o'
    M_{t-1} ─▶ K_m, V_m ──│────┴──────────────▶ Z_m ─┘                ▲
                          └───────────────────────────────────────────┘

    M_t = (1 − i') ∘ M_{t-1} + i' ∘ g'       Ĥ_t = o' ∘ M_t ──▶ the layer above; with C_t and M_t, step t + 1

    model = SAConvLSTM(channels=1, size=64)                     # variants and set-ups: at the end of this file
    forecast = model(frames, horizon=10)[:, -10:]               # (B, T, C, H, W) in [0, 1] -> the 10 frames that follow

Where the paper is silent or contradicts itself, a comment at the line says what is done here. C is `hidden`, N = H·W.
"""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


class SelfAttention(nn.Module):
    """Self-attention of the base model, §3.1: Eq. 2-4 and a shortcut. h (B, C, H, W) -> ĥ, of the same shape."""

    def __init__(self, channels):
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)           # W_q, W_k, W_v; the paper gives Ĉ no value: C
        self.fuse = nn.Conv2d(channels, channels, 1)              # W_f

    def forward(self, h):
        q, k, v = self.qkv(h).chunk(3, 1)                         # each (B, C, H, W)
        return self.fuse(attend(q, k, v)).to(h.dtype) + h         # §3.1    Ĥ_t = W_f Z + H_t


def attend(q, k, v):
    """Z of Eq. 2-4 (and 5-7): every position of q gathers v from all positions. All (B, C, H, W).

    Eq. 2   e = Qᵀ K      Eq. 3   α_ij = exp e_ij / Σ_k exp e_ik      Eq. 4   Z_i = Σ_j α_ij V_j
    The text normalises Eq. 3 "along columns", Eq. 6 "along each row, same as the Eq. 3": both formulas sum over the
    keys k of one query i. The paper has no 1/√d."""
    tokens = (u.flatten(2).mT.unsqueeze(1).contiguous() for u in (q, k, v))             # each (B, 1, N, C)
    z = F.scaled_dot_product_attention(*tokens, scale=1.0)        # (B, 1, N, C); α (N, N) is never stored
    return z[:, 0].mT.unflatten(2, q.shape[2:])                   # (B, C, H, W)


class SelfAttentionMemory(nn.Module):
    """The SAM, §3.2, Eq. 2-9. h and m (B, C, H, W) -> ĥ and the new m.

    attention: False for "w/o SA, w Mem". z_m: False for "w/o Z_m"."""

    def __init__(self, channels, attention=True, z_m=True):
        super().__init__()
        self.qkv_h = nn.Conv2d(channels, 3 * channels, 1) if attention else None      # W_q, W_k, W_v
        self.kv_m = nn.Conv2d(channels, 2 * channels, 1) if attention and z_m else None   # W_mk, W_mv
        self.fuse = nn.Conv2d((2 if z_m else 1) * channels, channels, 1) if attention else None      # W_z
        # "Depth-wise separable convolution": a 3×3 in each channel of [Z; H_t], then a 1×1 to i', g' and o'.
        inputs = (2 if attention else 1) * channels
        self.gates = nn.Sequential(nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs),
                                   nn.Conv2d(inputs, 3 * channels, 1))

    def forward(self, h, m):
        z_and_h = h
        if self.qkv_h is not None:
            q, k, v = self.qkv_h(h).chunk(3, 1)                   # Q_h, K_h, V_h: each (B, C, H, W)
            z = attend(q, k, v)                                   # Eq. 2-4   Z_h
            if self.kv_m is not None:
                k, v = self.kv_m(m).chunk(2, 1)                   # K_m = W_mk M_{t-1}, V_m = W_mv M_{t-1}
                z = torch.cat([z, attend(q, k, v)], 1)            # Eq. 5-7   Z_m, for the queries Q_h; [Z_h; Z_m]
            z = self.fuse(z).to(h.dtype)                          # §3.2   Z = W_z [Z_h; Z_m]
            z_and_h = torch.cat([z, h], 1)                        # [Z; H_t]  (B, 2C, H, W)
        # Eq. 8   i' = σ(W_m;zi * Z + W_m;hi * H_t + b_m;i)     g' = tanh(W_m;zg * Z + W_m;hg * H_t + b_m;g)
        # Eq. 9   o' = σ(W_m;zo * Z + W_m;ho * H_t + b_m;o)
        i, g, o = self.gates(z_and_h).to(m.dtype).chunk(3, 1)     # each (B, C, H, W); M stays fp32 under autocast
        i, g, o = torch.sigmoid(i), torch.tanh(g), torch.sigmoid(o)
        m = (1 - i) * m + i * g                                   # Eq. 8   M_t = (1 − i') ∘ M_{t-1} + i' ∘ g'
        return (o * m).to(h.dtype), m                             # Eq. 9   Ĥ_t = o' ∘ M_t


class SAConvLSTMCell(nn.Module):
    """One layer: a ConvLSTM step (Eq. 1), and what the variant puts before or after it.

    x (B, inputs, H, W); h, c and m (B, hidden, H, W) -> the new h, c and m. size: the (H, W) of the maps. norm:
    LayerNorm after every gate convolution and on the cell state (`patch4`)."""

    def __init__(self, inputs, hidden, kernel, size, norm, variant="full"):
        super().__init__()
        self.attend_x = SelfAttention(inputs) if variant == "base" else None
        self.attend_h = SelfAttention(hidden) if variant == "base" else None
        self.x2h = conv(inputs, 4 * hidden, kernel, size, norm)   # W_x* and b_*, for i, f, g (its W_xc), o
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_h*
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: cells start by remembering
        self.memory = (SelfAttentionMemory(hidden, attention=variant != "memory", z_m=variant == "full")
                       if variant in ("full", "no_zm", "memory") else None)

    def forward(self, x, h, c, m):
        if self.attend_x is not None:
            # Eq. 1 attends before the gates; §4.3 says "constructed as in Figure 2", after them. Here: Eq. 1.
            x, h = self.attend_x(x), self.attend_h(h)             # Eq. 1   X̂_t = SA(X_t), Ĥ_{t-1} = SA(H_{t-1})
        # Eq. 1   i = σ(W_xi * X̂_t + W_hi * Ĥ_{t-1} + b_i)           f = σ(W_xf * X̂_t + W_hf * Ĥ_{t-1} + b_f)
        #         g = tanh(W_xc * X̂_t + W_hc * Ĥ_{t-1} + b_c)        o = σ(W_xo * X̂_t + W_ho * Ĥ_{t-1} + b_o)
        # One convolution of each serves all four. The hats are the base model's; elsewhere they are X_t and H_{t-1}.
        i, f, g, o = (self.x2h(x) + self.h2h(h)).to(c.dtype).chunk(4, 1)                # each (B, hidden, H, W)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g), torch.sigmoid(o)
        c = self.norm_c(f * c + i * g)                            # Eq. 1   C_t = f ∘ C_{t-1} + i ∘ g
        h = o * torch.tanh(c)                                     # Eq. 1   H_t = o ∘ tanh(C_t)
        h = h.to(x.dtype)                                         # in the convolutions' dtype: bf16 under autocast
        if self.memory is not None:                               # Figure 2: Ĥ_t takes the place of H_t from here on
            h, m = self.memory(h, m)
        return h, c, m


class SAConvLSTM(nn.Module):
    """A stack of SA-ConvLSTM layers that reads frames and predicts the next one.

    channels, size (int or (H, W)): of a frame, each side a multiple of the patch. setup: "patch4" or "fullres".
    variant: a key of VARIANTS. hidden, layers, kernel (odd), patch: override the set-up. Anything else: ValueError."""

    def __init__(self, channels=1, size=64, setup="patch4", variant="full",
                 hidden=None, layers=None, kernel=None, patch=None):
        super().__init__()
        if setup not in NETWORK or variant not in VARIANTS:
            raise ValueError(f"setup {setup!r}, variant {variant!r}: choose from {[*NETWORK]} and {[*VARIANTS]}")
        overrides = dict(hidden=hidden, layers=layers, kernel=kernel, patch=patch)
        network = NETWORK[setup] | {name: value for name, value in overrides.items() if value is not None}
        hidden, layers, kernel, patch = (network[name] for name in overrides)
        if min(network.values()) < 1 or kernel % 2 == 0:
            raise ValueError(f"{network}: all of them must be positive, and the kernel odd")
        height, width = (size, size) if isinstance(size, int) else size
        self.channels, self.size, self.setup, self.hidden, self.patch = channels, (height, width), setup, hidden, patch
        self.one_size = setup == "patch4"                         # LayerNorm: a checkpoint fits one frame size only
        self.check((1, 1, channels, height, width))

        norm, tokens, grid = setup == "patch4", channels * patch**2, (height // patch, width // patch)
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(
            SAConvLSTMCell(hidden, hidden, kernel, grid, norm, variant) for _ in range(layers))
        self.output = nn.Conv2d(hidden, tokens, 1)

    def check(self, shape, horizon=1):
        """Raise ValueError for frames of a shape (B, T, C, H, W) that this model cannot read."""
        if len(shape) != 5 or shape[2] != self.channels or min(shape) < 1 or shape[1] + horizon < 2:
            raise ValueError(f"frames {tuple(shape)}, horizon {horizon}: they must be (B, T, {self.channels}, H, W), "
                             "none of these 0, and T + horizon at least 2")
        height, width = shape[3:]
        if height % self.patch or width % self.patch:
            raise ValueError(f"frames of {height}×{width}: each side must be a multiple of the patch, {self.patch}")
        if self.one_size and (height, width) != self.size:
            raise ValueError(f"frames of {height}×{width}: weights fit one size; build with size=({height}, {width})")

    def step(self, x, state):
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, [(h, c, m) per layer] -> those of the next frame."""
        h, new_state = self.embed(x), []
        for cell, (h_before, c, m) in zip(self.cells, state):
            h, c, m = cell(h, h_before, c, m)
            new_state.append((h, c, m))
        return self.output(h).to(x.dtype), new_state

    def forward(self, frames, horizon=0, use_truth=None):
        """Read frames (B, T, C, H, W) in [0, 1], predict each next one, then `horizon` further ones from the model's
        own predictions: (B, T-1+horizon, C, H, W), not clamped; entry k predicts frame k + 1.

        use_truth: scheduled sampling: bool (T-1, B); where True, step t reads the true frame t, where False the last
        prediction. Row 0 is taken as True. None: every observed frame is read."""
        self.check(frames.shape, horizon)
        # contiguous: on the CPU pixel_unshuffle and pixel_shuffle refuse five axes in channels-last memory.
        truth = F.pixel_unshuffle(frames.contiguous(), self.patch)    # (B, T, p²C, H/p, W/p)
        B, T, _, height, width = truth.shape
        zero = truth.new_zeros(B, self.hidden, height, width)
        state, x, predictions = [(zero, zero, zero) for _ in self.cells], truth[:, 0], []
        for t in range(T - 1 + horizon):
            if 0 < t < T:                                         # beyond the observed frames x is the last prediction
                x = truth[:, t] if use_truth is None else torch.where(
                    use_truth[t, :, None, None, None], truth[:, t], x)
            x, state = self.step(x, state)                        # x (B, p²C, H/p, W/p)
            predictions.append(x)
        return F.pixel_shuffle(torch.stack(predictions, 1).contiguous(), self.patch)    # (B, T-1+horizon, C, H, W)

    def truth_probability(self, iteration, iterations, frames_in, steps):
        """Scheduled sampling (Bengio et al. 2015), the probability that each of `steps` steps reads the true frame: 1
        inside the `frames_in` observed frames; beyond them ε, which falls linearly from 1 to 0."""
        epsilon = max(0.0, 1 - iteration / (TRAINING[self.setup]["sampling"] * iterations))
        return [1.0] * frames_in + [epsilon] * (steps - frames_in)


def attention(block, inputs, output, y, x):
    """For pictures, by a forward hook: how much position (y, x) attends to each position, (B, H, W), of sum 1: α of
    Eq. 3 and, in a SelfAttentionMemory that attends to the memory, of Eq. 6."""
    qkv, weights = block.qkv if isinstance(block, SelfAttention) else block.qkv_h, []
    if qkv is None:                                               # "w/o SA, w Mem"
        return weights
    q, *keys, _ = qkv(inputs[0]).chunk(3, 1)
    if getattr(block, "kv_m", None) is not None:
        keys.append(block.kv_m(inputs[1]).chunk(2, 1)[0])
    for k in keys:                                                # each (B, C, H, W)
        scores = torch.einsum("bc,bchw->bhw", q[:, :, y, x], k)   # Eq. 2 or 5, for this query alone
        weights.append(scores.flatten(1).softmax(1).view_as(scores))
    return weights


# Pictures: name, block of a cell, function of the block's call, and what it returns.
MAPS = [("attention", "memory", attention, ["Z_h", "Z_m"]),
        ("attention", "attend_x", attention, ["X"]), ("attention", "attend_h", attention, ["H"])]
# The rows of Table 1, bottom first.
VARIANTS = {
    "full": "SA-ConvLSTM: self-attention over the hidden state and over the memory",
    "no_zm": "w SA, w Mem, w/o Z_m: the memory is written by self-attention but not attended to",
    "memory": "w/o SA, w Mem: a memory with gates, no attention",
    "base": "w SA, w/o Mem: self-attention on the ConvLSTM's two inputs, no memory (the base model, Eq. 1)",
    "convlstm": "the plain ConvLSTM",
}
DEFAULT_SETUP = "patch4"
# patch4: frames in 4×4 patches, LayerNorm. The paper gives neither patch nor gate kernel; both, and what it leaves out
# of its training, are from PredRNN's code. fullres: the MS-LSTM paper's, which does not test this model: no patches, no
# LayerNorm. Every pixel then attends to every pixel, and a fresh layer passes on about a hundredth of its input: six
# layers take about a thousand iterations before the input shows in the output.
NETWORK = {
    "patch4": dict(patch=4, layers=4, hidden=64, kernel=5),
    "fullres": dict(patch=1, layers=6, hidden=32, kernel=3),
}
# How the papers train it. `sampling` is the part of the iterations over which ε falls from 1 to 0 (50,000 of 80,000 in
# PredRNN's released code, all in MS-LSTM's); `reverse`: every batch once more, backwards in time (PredRNN's code);
# `epochs` stands where the paper counts them instead of iterations; `data` overrides for one dataset.
TRAINING = {
    "patch4": dict(optimizer="adam", lr=1e-3, batch=8, iterations=80_000, loss="l2", sampling=0.625, reverse=True,
                   data={"kth": dict(loss="l1+l2"), "taxibj": dict(patch=2), "typhoon": dict(iterations=100_000)}),
    "fullres": dict(optimizer="adam", lr=3e-4, batch=4, epochs=40, loss="l1+l2", sampling=1.0, reverse=False,
                    data={"taxibj": dict(epochs=15), "kth": dict(epochs=20), "germany": dict(epochs=20)}),
}
# What papers report for this model: figures as they print them, `mse` and the like averaged over the forecast.
MNIST = dict(setup="patch4", data="moving_mnist", source="SA-ConvLSTM, Table 1")
TAXIBJ, KTH = MNIST | dict(data="taxibj"), MNIST | dict(data="kth", source="SA-ConvLSTM, Table 3b")
PUBLISHED = [
    dict(variant="full", **MNIST | dict(source="SA-ConvLSTM, Tables 1-2; PSNR: CMS-LSTM, Table 1"),
         psnr=20.500, ssim=0.913, mse=43.92, mae=94.73, params="10.471M",
         note="10.471M is another layout: four layers of 64 have 4.679M, and the paper does not give its kernels"),
    dict(variant="no_zm", **MNIST, ssim=0.884, mse=55.60, mae=113.19),
    dict(variant="memory", **MNIST, ssim=0.872, mse=56.17, mae=114.02),
    dict(variant="base", **MNIST | dict(source="SA-ConvLSTM, Tables 1-2"), ssim=0.869, mse=58.25, mae=118.08,
         params="10.102M",
         note="10.102M is another layout: four layers of 64 have 4.592M, and the paper does not give its kernels"),
    dict(variant="convlstm", **MNIST, ssim=0.852, mse=63.98, mae=133.34),
    dict(variant="full", **TAXIBJ | dict(source="SA-ConvLSTM, Tables 1 and 3a"), ssim=0.984, mse=0.390, mae=3.822,
         mse_frames=[0.269, 0.356, 0.426, 0.507]),
    dict(variant="no_zm", **TAXIBJ, ssim=0.982, mse=0.408, mae=3.872),
    dict(variant="memory", **TAXIBJ, ssim=0.982, mse=0.431, mae=3.948),
    dict(variant="base", **TAXIBJ | dict(source="SA-ConvLSTM, Tables 1 and 3a"), ssim=0.982, mse=0.410, mae=3.881,
         mse_frames=[0.291, 0.367, 0.460, 0.524]),
    dict(variant="convlstm", **TAXIBJ, ssim=0.979, mse=0.527, mae=4.253),
    dict(variant="full", **KTH, psnr=29.33, ssim=0.891),
    dict(variant="base", **KTH, psnr=27.25, ssim=0.837),
    dict(variant="convlstm", **KTH, psnr=23.58, ssim=0.712),
    dict(variant="full", setup="patch4", data="typhoon", source="MoDeRNN, Table 2",
         psnr=28.456, ssim=0.898, mse=7.07, mae=94.2),
]

MODEL = SAConvLSTM

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        for variant, meaning in VARIANTS.items():
            with torch.device("meta"), FlopCounterMode(display=False) as counter:     # on "meta" nothing is computed
                model = MODEL(setup=setup, variant=variant)
                model(torch.empty(1, 2, 1, 64, 64))               # one of the 19 steps of 20 frames; all cost the same
            parameters, macs = sum(p.numel() for p in model.parameters()), 19 * counter.get_total_flops() / 2e9
            print(f"{setup:8} {variant:18} {parameters:>10,} parameters {macs:7.1f}G multiply-accumulates   {meaning}")
