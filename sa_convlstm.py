"""SA-ConvLSTM: a ConvLSTM that looks at the whole frame, and at the whole frame as it remembers it.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    Z. Lin, M. Li, Z. Zheng, Y. Cheng, C. Yuan. "Self-Attention ConvLSTM for Spatiotemporal Prediction." AAAI 2020.

A convolution sees a neighbourhood, so what is far away has to travel through many layers and steps to matter. Here each
layer ends in a self-attention memory (SAM): every position of the hidden state H_t gathers what resembles it from all
positions, once out of H_t itself (Z_h) and once out of a memory M_{t-1} of earlier such summaries (Z_m). A gate writes
the two, fused, into the memory; a second gate reads the layer's output from it. M thus has seen the whole frame and the
whole past, which the cell C, fed by convolutions alone, has not.

                         X_t: Ĥ_t of the layer below; at the bottom, the frame
                          ▼
    Ĥ_{t-1}, C_{t-1} ─▶ ConvLSTM ─▶ C_t
                          │ H_t
                          ├──▶ Q_h, K_h, V_h ─▶ Z_h ─┐
                          │    │                     ├─ W_z ─▶ Z ─▶ i', g', o'
    M_{t-1} ─▶ K_m, V_m ──│────┴──────────────▶ Z_m ─┘                ▲
                          └───────────────────────────────────────────┘

    M_t = (1 − i') ∘ M_{t-1} + i' ∘ g'       Ĥ_t = o' ∘ M_t ──▶ the layer above; with C_t and M_t, step t + 1

The equations carry the paper's numbers. Where the paper is silent or at odds with itself, this file decides, at the
line concerned:
  - queries and keys have C channels (the paper's Ĉ has no value), all 1×1 convolutions a bias; the gates' "depth-wise
    separable convolution" is a depth-wise 3×3 over [Z; H_t], then one 1×1 to all three gates, without LayerNorm.
  - the base model: Eq. 1 puts self-attention before the gates; §4.3 says "constructed as in Figure 2", that is, after
    them. Eq. 1 is followed.
  - `patch4` (frames in 4×4 patches): one LayerNorm over all of (C, H, W) after every gate convolution of the ConvLSTM
    and on its cell state, and σ(f + 1). Its weights have that shape, so A CHECKPOINT FITS ONE FRAME SIZE ONLY. The
    paper gives neither patch nor gate kernel: they, and what it leaves out of its training, are of PredRNN's code.
  - `fullres` (the MS-LSTM paper, which does not test this model): no patches, no normalisation. Every pixel then
    attends to every pixel: 16 times the positions, 256 times the products of `patch4`. And without LayerNorm a
    fresh layer of the full model, gate upon gate at ½, passes on about a hundredth of what it is given: six of them
    overfit one batch all right, but take about a thousand iterations before the input shows in the output.

    model = SAConvLSTM(channels=1, size=64)                     # patch4; setup="fullres" for the other one
    forecast = model(frames, horizon=10)[:, -10:]               # (B, T, C, H, W) in [0, 1] -> the 10 frames that follow
    maps = model(frames, horizon=10, extras=[(20, 30)])[1]["attention"][0]   # layer 1: what pixel (20, 30) looks at
    mask = torch.rand(19, B) < torch.tensor(model.truth_probability(k, iterations, 10, 19))[:, None]
    loss = ((model(frames, use_truth=mask) - frames[:, 1:]) ** 2).sum((2, 3, 4)).mean()     # 20 frames; then backward
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

# The rows of Table 1, bottom first.
VARIANTS = {
    "full": "SA-ConvLSTM: self-attention over the hidden state and over the memory",
    "no_zm": "w SA, w Mem, w/o Z_m: the memory is written by self-attention but not attended to",
    "memory": "w/o SA, w Mem: a memory with gates, no attention",
    "base": "w SA, w/o Mem: self-attention on the ConvLSTM's two inputs, no memory (the base model, Eq. 1)",
    "convlstm": "the plain ConvLSTM",
}
DEFAULT_SETUP = "patch4"
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
PUBLISHED = [
    dict(variant="full", setup="patch4", data="moving_mnist", source="SA-ConvLSTM, Tables 1-2; PSNR: CMS-LSTM, Table 1",
         psnr=20.500, ssim=0.913, mse=43.92, mae=94.73, params="10.471M",
         note="10.471M is another layout: four layers of 64 have 4.679M, and the paper does not give its kernels"),
    dict(variant="no_zm", setup="patch4", data="moving_mnist", source="SA-ConvLSTM, Table 1",
         ssim=0.884, mse=55.60, mae=113.19),
    dict(variant="memory", setup="patch4", data="moving_mnist", source="SA-ConvLSTM, Table 1",
         ssim=0.872, mse=56.17, mae=114.02),
    dict(variant="base", setup="patch4", data="moving_mnist", source="SA-ConvLSTM, Tables 1-2",
         ssim=0.869, mse=58.25, mae=118.08, params="10.102M",
         note="10.102M is another layout: four layers of 64 have 4.592M, and the paper does not give its kernels"),
    dict(variant="convlstm", setup="patch4", data="moving_mnist", source="SA-ConvLSTM, Table 1",
         ssim=0.852, mse=63.98, mae=133.34),
    dict(variant="full", setup="patch4", data="taxibj", source="SA-ConvLSTM, Tables 1 and 3a",
         ssim=0.984, mse=0.390, mae=3.822, mse_frames=[0.269, 0.356, 0.426, 0.507]),
    dict(variant="no_zm", setup="patch4", data="taxibj", source="SA-ConvLSTM, Table 1",
         ssim=0.982, mse=0.408, mae=3.872),
    dict(variant="memory", setup="patch4", data="taxibj", source="SA-ConvLSTM, Table 1",
         ssim=0.982, mse=0.431, mae=3.948),
    dict(variant="base", setup="patch4", data="taxibj", source="SA-ConvLSTM, Tables 1 and 3a",
         ssim=0.982, mse=0.410, mae=3.881, mse_frames=[0.291, 0.367, 0.460, 0.524]),
    dict(variant="convlstm", setup="patch4", data="taxibj", source="SA-ConvLSTM, Table 1",
         ssim=0.979, mse=0.527, mae=4.253),
    dict(variant="full", setup="patch4", data="kth", source="SA-ConvLSTM, Table 3b", psnr=29.33, ssim=0.891),
    dict(variant="base", setup="patch4", data="kth", source="SA-ConvLSTM, Table 3b", psnr=27.25, ssim=0.837),
    dict(variant="convlstm", setup="patch4", data="kth", source="SA-ConvLSTM, Table 3b", psnr=23.58, ssim=0.712),
    dict(variant="full", setup="patch4", data="typhoon", source="MoDeRNN, Table 2",
         psnr=28.456, ssim=0.898, mse=7.07, mae=94.2),
]


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


def attend(q, *kv, points=None):
    """softmax(Qᵀ K) V among all N = H·W positions, Eq. 2-4: no 1/√d, which the paper does not have.

    Args: query (B, C, H, W); n times key and value, one above the other, (B, 2C, H, W); `points` (P,), positions
    0 … N-1 whose attention is to be looked at, or None.
    Returns Z for each key and value side by side, (B, n·C, H, W), and the maps α of these points, (B, P, n, H, W), each
    with sum 1; None without points.
    """
    # Fused kernels want (B, heads, N, C) with C dense in memory: given them so, no N×N matrix is ever stored. What the
    # one query attends to takes the place of the heads.
    grid, q = q.shape[2:], q.flatten(2).mT.unsqueeze(1).contiguous()                  # (B, 1, N, C)
    k, v = torch.stack([u.flatten(2).mT for u in kv], 1).chunk(2, -1)                 # each (B, n, N, C)
    # Eq. 2   e = Qᵀ K      Eq. 3   α_ij = exp e_ij / Σ_k exp e_ik      Eq. 4   Z_i = Σ_j α_ij V_j
    # The text has Eq. 3 normalise "along columns" and Eq. 6 "along each row, same as the Eq. 3": both formulas sum over
    # the keys k of one query i.
    z = F.scaled_dot_product_attention(q.expand_as(k), k, v, scale=1.0)               # (B, n, N, C)
    z = z.mT.flatten(1, 2).unflatten(2, grid)                     # (B, n·C, H, W)
    if points is None:
        return z, None
    scores = q[:, :, points] @ k.mT                               # (B, n, P, N): these rows of Eq. 2 alone
    maps = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32))
    return z, maps.transpose(1, 2).unflatten(3, grid)


class SelfAttention(nn.Module):
    """The self-attention of the base model, §3.1: Eq. 2-4 and a shortcut.

    Called with h (B, channels, H, W) and perhaps points; returns ĥ alike, and maps (B, P, 1, H, W) or None: `attend`.
    """

    def __init__(self, channels):
        super().__init__()
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)           # W_q, W_k, W_v
        self.fuse = nn.Conv2d(channels, channels, 1)              # W_f

    def forward(self, h, points=None):
        q, kv = self.qkv(h).split((h.shape[1], 2 * h.shape[1]), 1)
        z, maps = attend(q, kv, points=points)
        # §3.1    Ĥ_t = W_f Z + H_t
        return self.fuse(z).to(h.dtype) + h, maps


class SelfAttentionMemory(nn.Module):
    """The SAM, §3.2, Eq. 2-9.

    Args: channels of h and m; whether it attends at all, and whether to the memory too (Z_m).
    Called with h and m (B, channels, H, W) and perhaps points; returns ĥ, the new m, and the maps (B, P, n, H, W) of
    Z_h and, where there is one, Z_m (n = 1 or 2; None without points or attention), see `attend`.
    """

    def __init__(self, channels, attention=True, z_m=True):
        super().__init__()
        self.qkv_h = nn.Conv2d(channels, 3 * channels, 1) if attention else None      # W_q, W_k, W_v
        self.kv_m = nn.Conv2d(channels, 2 * channels, 1) if attention and z_m else None   # W_mk, W_mv
        self.fuse = nn.Conv2d((2 if z_m else 1) * channels, channels, 1) if attention else None      # W_z
        seen = (2 if attention else 1) * channels                 # what the gates see: [Z; H_t], or H_t
        # One separable convolution for i', g', o': a 3×3 in each channel, then a 1×1 across them.
        self.gates = nn.Sequential(nn.Conv2d(seen, seen, 3, padding=1, groups=seen), nn.Conv2d(seen, 3 * channels, 1))

    def forward(self, h, m, points=None):
        seen, maps = h, None
        if self.qkv_h is not None:
            q, kv_h = self.qkv_h(h).split((h.shape[1], 2 * h.shape[1]), 1)    # Q_h and [K_h; V_h]: (B, C or 2C, H, W)
            # K_m = W_mk M_{t-1}, V_m = W_mv M_{t-1}; the query is H's
            kv = (kv_h,) if self.kv_m is None else (kv_h, self.kv_m(m))
            # Eq. 2-4   Z_h        Eq. 5   e_m = Q_hᵀ K_m        Eq. 6   α_m;ij = exp e_m;ij / Σ_k exp e_m;ik
            # Eq. 7     Z_m;i = Σ_j α_m;ij V_m;j
            z, maps = attend(q, *kv, points=points)               # [Z_h; Z_m]  (B, 2C, H, W)
            seen = torch.cat([self.fuse(z).to(h.dtype), h], 1)    # §3.2   Z = W_z [Z_h; Z_m]; (B, 2C, H, W)
        # Eq. 8   i' = σ(W_m;zi * Z + W_m;hi * H_t + b_m;i)     g' = tanh(W_m;zg * Z + W_m;hg * H_t + b_m;g)
        # Eq. 9   o' = σ(W_m;zo * Z + W_m;ho * H_t + b_m;o)
        i, g, o = self.gates(seen).to(m.dtype).chunk(3, 1)        # each (B, C, H, W); m stays fp32 under autocast
        # Eq. 8   M_t = (1 − i') ∘ M_{t-1} + i' ∘ g'
        m = torch.lerp(m, torch.tanh(g), torch.sigmoid(i))
        # Eq. 9   Ĥ_t = o' ∘ M_t
        return (torch.sigmoid(o) * m).to(h.dtype), m, maps


class SAConvLSTMCell(nn.Module):
    """One layer: a ConvLSTM step (Eq. 1), and what the variant puts before or after it.

    Args: channels of the input and of the hidden state, the gates' kernel size, the (H, W) of the feature maps, whether
    LayerNorm is used (`patch4`), the variant.
    Called with x (B, inputs, H, W); h, c and m (B, hidden, H, W); points (P,) or None. Returns the new h, c and m, and
    attention maps (B, P, n, H, W): n = 2 for "full" (Z_h, Z_m) and "base" (of x, of h), 1 for "no_zm" (Z_h); else None.
    """

    def __init__(self, inputs, hidden, kernel, size, norm, variant="full"):
        super().__init__()
        self.attend_x = SelfAttention(inputs) if variant == "base" else None
        self.attend_h = SelfAttention(hidden) if variant == "base" else None
        self.x2h = conv(inputs, 4 * hidden, kernel, size, norm)   # W_x* and b_*, for i, f, g (W_xc there), o
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_h*
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: cells start by remembering
        self.memory = (SelfAttentionMemory(hidden, attention=variant != "memory", z_m=variant == "full")
                       if variant in ("full", "no_zm", "memory") else None)

    def forward(self, x, h, c, m, points=None):
        maps = None
        if self.attend_x is not None:                             # Eq. 1   X̂_t = SA(X_t), Ĥ_{t-1} = SA(H_{t-1})
            (x, map_x), (h, map_h) = self.attend_x(x, points), self.attend_h(h, points)
            maps = None if points is None else torch.cat([map_x, map_h], 2)
        # Eq. 1   i = σ(W_xi * X̂_t + W_hi * Ĥ_{t-1} + b_i)           f = σ(W_xf * X̂_t + W_hf * Ĥ_{t-1} + b_f)
        #         g = tanh(W_xc * X̂_t + W_hc * Ĥ_{t-1} + b_c)        o = σ(W_xo * X̂_t + W_ho * Ĥ_{t-1} + b_o)
        # One convolution of each serves all four. The hats are the base model's: elsewhere X_t and H_{t-1}.
        i, f, g, o = (self.x2h(x) + self.h2h(h)).to(c.dtype).chunk(4, 1)              # each (B, hidden, H, W)
        if self.forget_offset:
            f = f + self.forget_offset
        # Eq. 1   C_t = f ∘ C_{t-1} + i ∘ g      H_t = o ∘ tanh(C_t)
        c = self.norm_c(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g))
        h = (torch.sigmoid(o) * torch.tanh(c)).to(x.dtype)        # H is read by convolutions: theirs is its type
        if self.memory is not None:                               # Figure 2: Ĥ_t takes the place of H_t from here on
            h, m, maps = self.memory(h, m, points)
        return h, c, m, maps


class SAConvLSTM(nn.Module):
    """A stack of SA-ConvLSTM layers that reads frames and predicts the next one.

    Args:
        channels: of a frame. size: of a frame, an int or (H, W), each side divisible by the patch.
        setup: "patch4" or "fullres". variant: a key of VARIANTS.
        hidden, layers, kernel (odd), patch: override the set-up.
    Attributes: `recompute`: set it to True to keep, of six steps in seven, only the states for the backward pass, and
    compute the rest again there: less memory, more time, same gradients. `map_names`: what the maps of each entry of
    `extras` are, in their order.
    Raises ValueError, in one line that names the way out, for what cannot be built and frames it cannot read.
    """

    def __init__(self, channels=1, size=64, setup=DEFAULT_SETUP, variant="full",
                 hidden=None, layers=None, kernel=None, patch=None):
        super().__init__()
        for name, value, known in ("setup", setup, NETWORK), ("variant", variant, VARIANTS):
            if value not in known:
                raise ValueError(f"{name} {value!r}: choose from {', '.join(known)}")
        given = dict(hidden=hidden, layers=layers, kernel=kernel, patch=patch)
        network = NETWORK[setup] | {name: value for name, value in given.items() if value is not None}
        hidden, layers, kernel, patch = (network[name] for name in given)
        if min(channels, hidden, layers, kernel, patch) < 1 or kernel % 2 == 0:
            raise ValueError(f"channels and all of {network} must be positive, and the kernel odd")
        height, width = (size, size) if isinstance(size, int) else size
        self.channels, self.size, self.setup, self.variant = channels, (height, width), setup, variant
        self.hidden, self.patch, self.recompute = hidden, patch, False
        self.one_size = setup == "patch4"                         # LayerNorm: weights of the shape of the maps
        self.check((1, 1, channels, height, width))
        self.map_names = {"attention": {"full": ("Z_h", "Z_m"), "no_zm": ("Z_h",), "base": ("X", "H")}.get(variant, ())}

        norm, tokens, grid = setup == "patch4", channels * patch**2, (height // patch, width // patch)
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(
            SAConvLSTMCell(hidden, hidden, kernel, grid, norm, variant) for _ in range(layers))
        self.output = nn.Conv2d(hidden, tokens, 1)

    def check(self, shape, horizon=1):
        """Raise ValueError, in one line that names the way out, for frames of a shape that this model cannot read."""
        if len(shape) != 5 or shape[2] != self.channels or min(shape[1], shape[1] - 1 + horizon) < 1:
            raise ValueError(f"frames {(*shape,)}, horizon {horizon}: frames must be (B, T, {self.channels}, H, W), "
                             "and where T is 1 the horizon at least 1")
        height, width = shape[3:]
        if self.one_size and (height, width) != self.size:
            raise ValueError(f"frames of {height}×{width}: these weights fit {self.size[0]}×{self.size[1]} alone; "
                             f"build the model with size=({height}, {width})")
        unit = self.patch
        near = [sorted({max((side + half) // unit, 1) * unit for half in ((unit - 1) // 2, unit // 2)})
                for side in (height, width)]                      # the nearest multiple, or both where two are as near
        if near != [[height], [width]]:
            near = ", ".join(f"{h}×{w}" for h in near[0] for w in near[1])
            raise ValueError(f"frames of {height}×{width}: each side must be a multiple of the patch, {unit}; "
                             f"the nearest sizes: {near}")

    def step(self, x, state, points=None):
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, [(h, c, m) of every layer] -> those of the next frame.

        Third come the attention maps of the points, (B, P, n, H/p, W/p) a layer; None a layer without points.
        """
        h, new_state, maps = self.embed(x), [], []
        for cell, before in zip(self.cells, state):
            h, c, m, seen = cell(h, *before, points)
            new_state.append((h, c, m))
            maps.append(seen)
        return self.output(h).to(x.dtype), new_state, maps

    def forward(self, frames, horizon=0, use_truth=None, extras=False):
        """Read frames, predict each next one, then `horizon` further ones from the model's own predictions.

        Args:
            frames: (B, T, C, H, W), values in [0, 1].
            horizon: how many frames to forecast beyond frame T.
            use_truth: training with scheduled sampling: bool (T-1, B); where True, step t reads the true frame t, where
                False the last prediction. Row 0 is taken as True. None: every observed frame is read.
            extras: "loss", True or query points [(y, x), …] in pixels of the frame, True being its centre: also return
                a dict. This model adds nothing to the loss. Except for "loss" the dict holds "layers", one
                (B, steps, hidden, H/p, W/p) a layer: its hidden states Ĥ; and, where the variant attends, "attention",
                one (B, steps, points, n, H/p, W/p) a layer: how much the patch that holds the point looks at each
                patch, sum 1. The n maps are those of Z_h and Z_m ("full"), Z_h ("no_zm"), X̂_t and Ĥ_{t-1} ("base").
        Returns: predictions (B, T-1+horizon, C, H, W), not clamped; entry k predicts frame k + 1. With extras: a pair.
        Raises ValueError for a query point outside the frame.
        """
        self.check(frames.shape, horizon)
        truth = F.pixel_unshuffle(frames, self.patch)             # (B, T, p²C, H/p, W/p)
        B, T, _, height, width = truth.shape
        points = None
        if extras and extras != "loss":
            pixels = [(frames.shape[3] // 2, frames.shape[4] // 2)] if extras is True else extras
            if not all(0 <= y < frames.shape[3] and 0 <= x < frames.shape[4] for y, x in pixels):
                raise ValueError(f"query points {pixels} must lie in frames of {frames.shape[3]}×{frames.shape[4]}")
            points = torch.tensor([y // self.patch * width + x // self.patch for y, x in pixels], device=frames.device)
        zero = truth.new_zeros(B, self.hidden, height, width)
        state = [(zero, zero, zero) for _ in self.cells]          # states and memories start at zero
        x, predictions = truth[:, 0], []
        layers, attention = [[] for _ in self.cells], [[] for _ in self.cells]
        for t in range(T - 1 + horizon):
            if 0 < t < T:                                         # beyond the observed frames x is the last prediction
                x = truth[:, t] if use_truth is None else torch.where(
                    use_truth[t, :, None, None, None], truth[:, t], x)
            if self.recompute and t % 7 and torch.is_grad_enabled():   # every seventh keeps all: faster
                x, state, maps = checkpoint(self.step, x, state, points, use_reentrant=False, preserve_rng_state=False)
            else:
                x, state, maps = self.step(x, state, points)      # x (B, p²C, H/p, W/p)
            predictions.append(x)
            if points is not None:
                for layer in range(len(self.cells)):
                    layers[layer].append(state[layer][0])
                    attention[layer].append(maps[layer])
        predictions = F.pixel_shuffle(torch.stack(predictions, 1), self.patch)   # (B, T-1+horizon, C, H, W)
        if not extras:
            return predictions
        found = {}
        if points is not None:
            found["layers"] = [torch.stack(kept, 1) for kept in layers]
            if self.variant in ("full", "no_zm", "base"):
                found["attention"] = [torch.stack(kept, 1) for kept in attention]
        return predictions, found

    def truth_probability(self, iteration, iterations, frames_in, steps):
        """Scheduled sampling (Bengio et al. 2015): with which probability each of `steps` steps reads the true frame.

        1 inside the `frames_in` observed frames; beyond them ε, which falls linearly from 1 to 0.
        """
        epsilon = max(0.0, 1 - iteration / (TRAINING[self.setup]["sampling"] * iterations))
        return [1.0] * frames_in + [epsilon] * (steps - frames_in)


MODEL = SAConvLSTM

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:      # meta counts the attention too
            model, frames = SAConvLSTM(setup=setup), torch.empty(1, 20, 1, 64, 64)
            shape = tuple(model(frames).shape)
        print(f"SA-ConvLSTM, {setup}: {tuple(frames.shape)} -> {shape}, {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {counter.get_total_flops() / 2e9:.1f}G multiply-accumulates a sequence")
