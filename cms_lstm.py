"""CMS-LSTM: input and context interact before the ConvLSTM gates; hidden and cell state attend at three scales after.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    Z. Chai, C. Yuan, Z. Lin, Y. Bai. "CMS-LSTM: Context-Embedding and Multi-Scale Spatiotemporal-Expression LSTM for
    Video Prediction." ICME 2022.

Two blocks surround a ConvLSTM cell. Context-Embedding (CE), before the gates: a convolution of the context H_{t-1}
makes weights for the input X_t, a convolution of the new input makes weights for the context, and so on, five times in
turn. Spatiotemporal-Expression (SE), after the gates: the positions of H_t and C_t attend to one another, over the
whole map, within the blocks of a 2×2 grid and within those of a 4×4 grid; gates write the result into both states.

                                          C_{t-1}
                                            ▼
    X_t ─────▶┌──────────┐─── X̂_t ────▶┌──────────┐─ H_t ─▶┌─ SE ────────────────────────────────┐─▶ Ĥ_t
              │ CE, 5 ×  │             │ ConvLSTM │        │ attention at scales 1, 2, 4         │
    H_{t-1} ─▶└──────────┘─ Ĥ_{t-1} ──▶└──────────┘─ C_t ─▶└─▶ A_H, A_C ─▶ i, g, o ──────────────┘─▶ Ĉ_t

    X_t: Ĥ_t of the layer below; in the bottom layer, the frame. Ĥ_t and Ĉ_t are H_{t-1} and C_{t-1} of step t + 1.

    model = CMSLSTM(channels=1, size=64)                        # variants and set-ups: at the end of this file
    forecast = model(frames, horizon=10)[:, -10:]               # (B, T, C, H, W) in [0, 1] -> the 10 frames that follow
    x, h = ContextEmbedding(64)(x, h)                           # the blocks fit around any cell:
    h, c = SpatiotemporalExpression(64)(h, c)                   # (B, 64, H, W), H and W multiples of 4

Where the paper is silent or contradicts itself, a comment at the line says what is done here. C is `hidden`.
"""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


class ContextEmbedding(nn.Module):
    """CE, §3.1: x and h (B, C, H, W) weight each other in turn -> x̂ and ĥ.

    kernel: of its two convolutions, odd. size, norm: as the cell's. steps: how many half-steps, at least 2."""

    def __init__(self, channels, kernel=3, size=None, norm=False, steps=5):
        super().__init__()
        self.conv_h = conv(channels, channels, kernel, size, norm)    # W_H and b_H
        self.conv_x = conv(channels, channels, kernel, size, norm)    # W_X and b_X
        self.steps = steps

    def forward(self, x, h):
        # "5-layer stacked CE blocks" would be ten half-steps; the released code makes five: X, H, X, H, X. They share
        # the two convolutions.
        for step in range(self.steps):
            if step % 2 == 0:
                # Eq. 1   X̂_t = 2 × σ(W_H * H_{t-1} + b_H) ∘ X_t
                x = 2 * torch.sigmoid(self.conv_h(h)).to(x.dtype) * x
            else:
                # Eq. 1   Ĥ_{t-1} = 2 × σ(W_X * X̂_t + b_X) ∘ H_{t-1}
                h = 2 * torch.sigmoid(self.conv_x(x)).to(h.dtype) * h
        return x, h


class SpatiotemporalExpression(nn.Module):
    """SE, §3.2: h and c (B, C, H, W) attend to themselves and to each other at several scales -> ĥ and ĉ.

    kernel: of its three large convolutions, odd. size, norm: as the cell's. scales: each s cuts both maps into s × s
    blocks, so H and W must be multiples of it."""

    def __init__(self, channels, kernel=5, size=None, norm=False, scales=(1, 2, 4)):
        super().__init__()
        self.scales = scales
        # Query, Key and Value of every scale, one after the other; H and C share them ("weight-shared", §3.2).
        self.qkv = nn.Conv2d(channels, 3 * len(scales) * channels, 1)
        self.fuse = nn.Conv2d(len(scales) * channels, channels, kernel, padding=kernel // 2)
        self.norm_a = nn.LayerNorm([channels, size[0], 2 * size[1]]) if norm else nn.Identity()
        self.mix = nn.Conv2d(2 * channels, channels, 1)
        self.a2g = conv(channels, 3 * channels, kernel, size, norm)   # W_A* and b_*, for i, g, o
        self.h2g = conv(channels, 3 * channels, kernel, size, norm)   # W_h*
        self.norm_c = nn.LayerNorm([channels, *size]) if norm else nn.Identity()

    def forward(self, h, c):
        # Part 1. The text's Z ∈ C×H×W×2 would keep H and C apart. The released code puts them side by side: the 5×5
        # convolution reads both at the seam, and LayerNorm is over both.
        z, z_hat = torch.cat([h, c.to(h.dtype)], 3), []           # (B, C, H, 2W)
        for s, qkv in zip(self.scales, self.qkv(z).chunk(len(self.scales), 1)):
            q, k, v = cut(qkv, s).chunk(3, -1)                    # each (B, s², 2HW/s², C)
            # Eq. 2   Ĥ_t, Ĉ_t = Softmax(Queryᵀ × Key) × Value      no 1/√d; the scores are never stored
            tokens = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            z_hat.append(z + join(tokens, s, *z.shape[2:]))       # the shortcut z is the released code's alone
        z_hat = self.fuse(torch.cat(z_hat, 1))                    # (B, scales·C, H, 2W) -> (B, C, H, 2W)
        a_h, a_c = self.norm_a(z_hat).chunk(2, 3)                 # A_H, A_C: each (B, C, H, W)
        a = self.mix(torch.cat([a_h, a_c], 1))                    # released code only: a 1×1 before W_A
        # Part 2. The paper's Z_H is H_t. One convolution of each serves all three.
        # Eq. 3   i = σ(W_Ai * [A_H, A_C] + W_hi * Z_H + b_i)        g = tanh(W_Ag * [A_H, A_C] + W_hg * Z_H + b_g)
        # Eq. 4   o = σ(W_Ao * [A_H, A_C] + W_ho * Z_H + b_o)
        i, g, o = (self.a2g(a) + self.h2g(h)).to(c.dtype).chunk(3, 1)   # each (B, C, H, W)
        i, g, o = torch.sigmoid(i), torch.tanh(g), torch.sigmoid(o)
        c = self.norm_c((1 - i) * c + i * g)                      # Eq. 3   Ĉ_t = (1 − i) ∘ C_t + i ∘ g
        return (o * c).to(h.dtype), c                             # Eq. 4   Ĥ_t = o ∘ Ĉ_t


def cut(z, s):
    """Cut H and C into s × s blocks: z (B, n, H, 2W) -> one sequence of tokens per block, (B, s², 2HW/s², n).

    s = 2:   ┌─── H ───┬─── C ───┐
             │  a │  b │  a │  b │      four sequences: the positions of both a, of both b,
             │  c │  d │  c │  d │      of both c and of both d
             └─────────┴─────────┘"""
    B, n, height, width = z.shape
    # height: s blocks of H/s rows; width: H or C, then s blocks of W/s columns
    z = z.reshape(B, n, s, height // s, 2, s, width // 2 // s)
    z = z.permute(0, 2, 5, 3, 4, 6, 1)                            # (B, s, s, H/s, 2, W/s, n)
    return z.reshape(B, s * s, -1, n).contiguous()                # fused attention needs a token's channels together


def join(tokens, s, height, width):
    """The inverse of `cut`: (B, s², 2HW/s², n) -> (B, n, height, width), width being 2W."""
    B, _, _, n = tokens.shape
    tokens = tokens.reshape(B, s, s, height // s, 2, width // 2 // s, n)
    return tokens.permute(0, 6, 1, 3, 4, 2, 5).reshape(B, n, height, width)


class CMSLSTMCell(nn.Module):
    """One layer, Eq. 5: CE, a ConvLSTM step, SE.

    x, h and c (B, hidden, H, W) -> the new h and c. kernel: of CE and the gates. size: the (H, W) of the maps. norm:
    LayerNorm after the large convolutions and on the cell state (`patch4`). ce: False for no CE. scales: () for no SE.
    """

    states = 2                                                    # h and c

    def __init__(self, hidden, kernel, size, norm, ce=True, scales=(1, 2, 4)):
        super().__init__()
        self.ce = ContextEmbedding(hidden, kernel, size, norm) if ce else None
        self.x2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_x* and b_*, for i, f, g, o
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_h*
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: cells start by remembering
        # Under `patch4` SE's kernel is 5×5 whatever the gates', as released; under `fullres` it is the gates'.
        self.se = SpatiotemporalExpression(hidden, 5 if norm else kernel, size, norm, scales) if scales else None

    def forward(self, x, h, c):
        if self.ce is not None:
            x, h = self.ce(x, h)                                  # Eq. 5   X̂_t, Ĥ_{t-1} = CE(⋯ CE(X_t, H_{t-1}))
        # Eq. 5   i = σ(W_xi * X̂_t + W_hi * Ĥ_{t-1} + b_i)           f = σ(W_xf * X̂_t + W_hf * Ĥ_{t-1} + b_f)
        #         g = tanh(W_xg * X̂_t + W_hg * Ĥ_{t-1} + b_g)        o = σ(W_xo * X̂_t + W_ho * Ĥ_{t-1} + b_o)
        # One convolution of each serves all four.
        i, f, g, o = (self.x2h(x) + self.h2h(h)).to(c.dtype).chunk(4, 1)                # each (B, hidden, H, W)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g), torch.sigmoid(o)
        c = self.norm_c(f * c + i * g)                            # Eq. 5   C_t = f ∘ C_{t-1} + i ∘ g
        h = o * torch.tanh(c)                                     # Eq. 5   H_t = o ∘ tanh(C_t)
        h = h.to(x.dtype)                                         # in the convolutions' dtype: bf16 under autocast
        if self.se is not None:
            h, c = self.se(h, c)                                  # Eq. 5   Ĥ_t, Ĉ_t = SE(H_t, C_t)
        return h, c


class CMSLSTM(nn.Module):
    """A stack of CMS-LSTM layers that reads frames and predicts the next one.

    channels, size (int or (H, W)): of a frame, each side a multiple of the patch times SE's largest scale. setup:
    "patch4" or "fullres". variant: a key of VARIANTS. hidden, layers, kernel (of CE and the gates, odd), patch: in
    place of the set-up's. ValueError for what cannot be built."""

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
        cell, ce, scales = BUILT_OF[variant]
        self.unit = patch * max(scales, default=1)
        self.one_size = setup == "patch4"                         # LayerNorm: a checkpoint fits one frame size only
        self.check((1, 1, channels, height, width))

        norm, tokens, grid = setup == "patch4", channels * patch**2, (height // patch, width // patch)
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(cell(hidden, kernel, grid, norm, ce, scales) for _ in range(layers))
        self.output = nn.Conv2d(hidden, tokens, 1)

    def check(self, shape, horizon=1):
        """Raise ValueError for frames of a shape (B, T, C, H, W) that this model cannot read."""
        if len(shape) != 5 or shape[2] != self.channels or min(shape) < 1 or shape[1] + horizon < 2:
            raise ValueError(f"frames {tuple(shape)}, horizon {horizon}: they must be (B, T, {self.channels}, H, W), "
                             "none of these 0, and T + horizon at least 2")
        height, width = shape[3:]
        if height % self.unit or width % self.unit:
            raise ValueError(f"frames of {height}×{width}: each side must be a multiple of {self.unit}, patch × scale")
        if self.one_size and (height, width) != self.size:
            raise ValueError(f"frames of {height}×{width}: weights fit one size; build with size=({height}, {width})")

    def step(self, x, state):
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, [(h, c) or (h, c, m) per layer] -> of the next."""
        h, new_state = self.embed(x), []
        for cell, before in zip(self.cells, state):
            if isinstance(cell, PredRNNCell):                     # M: from the layer below, or the top one a step ago
                before = (*before[:2], (new_state or state)[-1][2])
            new_state.append(cell(h, *before))
            h = new_state[-1][0]
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
        state, x, predictions = [(zero,) * cell.states for cell in self.cells], truth[:, 0], []
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


def ce_input(ce, inputs, output, *_):
    """For pictures, by a forward hook: X_t and X̂_t, (B, hidden, H, W)."""
    return inputs[0], output[0]


def attention(se, inputs, output, y, x):
    """For pictures, by a forward hook: how much H_t at position (y, x) attends to each position of H_t and of C_t, each
    (B, H, W), scale by scale: the softmax of Eq. 2, of sum 1 over both, and 0 outside the position's block."""
    (h, c), weights = inputs, []
    qkv, (height, width) = se.qkv(torch.cat([h, c.to(h.dtype)], 3)), h.shape[2:]
    for s, qkv_s in zip(se.scales, qkv.chunk(len(se.scales), 1)):
        q, k, _ = qkv_s.chunk(3, 1)                               # each (B, C, H, 2W)
        scores = torch.einsum("bc,bchw->bhw", q[..., y, x], k).unflatten(2, (2, width))
        top, left = y * s // height * height // s, x * s // width * width // s
        block = (..., slice(top, top + height // s), slice(None), slice(left, left + width // s))   # in H and in C
        alpha = torch.zeros_like(scores)                          # (B, H, 2, W)
        alpha[block] = scores[block].flatten(1).softmax(1).view_as(scores[block])
        weights += alpha.unbind(2)
    return weights


# Pictures: name, block of a cell, function of the block's call, and what it returns.
MAPS = [("ce_input", "ce", ce_input, ["X before CE", "X after CE"]),
        ("attention", "se", attention, [f"scale {s}, {state}" for s in (1, 2, 4) for state in "HC"])]


# Transplants (Table 3): CE and SE around two other cells. They are a reading of Eq. 5: the paper has no equations for
# them, and their code was never released. Their gates are 3×3 like those above, so that the rows are comparable.


class PredRNNCell(nn.Module):
    """CE, the ST-LSTM of PredRNN (Wang et al. 2017), SE. As CMSLSTMCell, with PredRNN's memory M as a third state."""

    states = 3                                                    # h, c and m

    def __init__(self, hidden, kernel, size, norm, ce=True, scales=(1, 2, 4)):
        super().__init__()
        self.ce = ContextEmbedding(hidden, kernel, size, norm) if ce else None
        self.x2h = conv(hidden, 7 * hidden, kernel, size, norm)   # W_x*, W'_x*: for i, f, g, i', f', g', o
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_h*: for i, f, g, o
        self.m2h = conv(hidden, 3 * hidden, kernel, size, norm)   # W_m*: for i', f', g'
        self.cm2o = conv(2 * hidden, hidden, kernel, size, norm)  # W_co and W_mo
        self.mix = nn.Conv2d(2 * hidden, hidden, 1, bias=not norm)    # W_1×1
        self.forget_offset = 1.0 if norm else 0.0
        self.se = SpatiotemporalExpression(hidden, 5 if norm else kernel, size, norm, scales) if scales else None

    def forward(self, x, h, c, m):
        if self.ce is not None:
            x, h = self.ce(x, h)
        n = c.shape[1]                                            # hidden
        x_c, x_m, x_o = self.x2h(x).split((3 * n, 3 * n, n), 1)
        h_c, h_o = self.h2h(h).split((3 * n, n), 1)
        i, f, g = (x_c + h_c).to(c.dtype).chunk(3, 1)             # each (B, hidden, H, W)
        i, f, g = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g)
        c = f * c + i * g                                         # C^l_t = f ∘ C^l_{t-1} + i ∘ g
        i, f, g = (x_m + self.m2h(m)).to(c.dtype).chunk(3, 1)
        i, f, g = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g)
        m = f * m + i * g                                         # M^l_t = f' ∘ M^{l-1}_t + i' ∘ g'
        cm = torch.cat([c, m], 1).to(x.dtype)                     # [C_t, M_t]  (B, 2·hidden, H, W)
        o = torch.sigmoid((x_o + h_o + self.cm2o(cm)).to(c.dtype))
        h = (o * torch.tanh(self.mix(cm).to(c.dtype))).to(x.dtype)    # H_t = o ∘ tanh(W_1×1 * [C_t, M_t])
        if self.se is not None:
            h, c = self.se(h, c)
        return h, c, m


class SAConvLSTMCell(CMSLSTMCell):
    """CMSLSTMCell, then the memory of SA-ConvLSTM (Lin et al. 2020), M, a third state.

    Without LayerNorm a fresh layer passes on little of its input: use few layers there."""

    states = 3                                                    # h, c and m

    def __init__(self, hidden, kernel, size, norm, ce=True, scales=(1, 2, 4)):
        super().__init__(hidden, kernel, size, norm, ce, scales)
        self.qkv_h = nn.Conv2d(hidden, 3 * hidden, 1)             # W_q, W_k, W_v
        self.kv_m = nn.Conv2d(hidden, 2 * hidden, 1)              # W_mk, W_mv
        self.fuse = nn.Conv2d(2 * hidden, hidden, 1)              # W_z
        self.gates = nn.Sequential(nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden),
                                   nn.Conv2d(2 * hidden, 3 * hidden, 1))

    def forward(self, x, h, c, m):
        h, c = super().forward(x, h, c)
        qkv_h = self.qkv_h(h).flatten(2).mT.unsqueeze(1).contiguous()                   # (B, 1, HW, 3·hidden)
        kv_m = self.kv_m(m).flatten(2).mT.unsqueeze(1).contiguous()                     # (B, 1, HW, 2·hidden)
        q, k_h, v_h = qkv_h.chunk(3, -1)
        k_m, v_m = kv_m.chunk(2, -1)
        z_h = F.scaled_dot_product_attention(q, k_h, v_h, scale=1.0)
        z_m = F.scaled_dot_product_attention(q, k_m, v_m, scale=1.0)
        z = torch.cat([z_h, z_m], -1)[:, 0].mT.unflatten(2, h.shape[2:])          # [Z_h; Z_m]  (B, 2·hidden, H, W)
        i, g, o = self.gates(torch.cat([self.fuse(z).to(h.dtype), h], 1)).to(m.dtype).chunk(3, 1)
        i, g, o = torch.sigmoid(i), torch.tanh(g), torch.sigmoid(o)
        m = (1 - i) * m + i * g                                   # M_t = (1 − i') ∘ M_{t-1} + i' ∘ g'
        return (o * m).to(h.dtype), c, m                          # Ĥ_t = o' ∘ M_t


# The rows of Table 3, by backbone.
VARIANTS = {
    "full": "CMS-LSTM: ConvLSTM with CE before its gates and SE at scales 1, 2 and 4 after them",
    "convlstm": "ConvLSTM: neither CE nor SE",
    "no_se": "w CE, w/o SE",
    "se1": "w CE, w 1-scale SE: attention over the whole map only",
    "se2": "w CE, w 2-scale SE: scales 1 and 2",
    "no_ce": "w/o CE, w SE",
    "predrnn": "PredRNN: neither CE nor SE",
    "predrnn_no_se": "PredRNN w CE, w/o SE",
    "predrnn_no_ce": "PredRNN w/o CE, w SE",
    "predrnn_full": "PredRNN w CE, w SE",
    "sa_convlstm": "SA-ConvLSTM: neither CE nor SE",
    "sa_convlstm_no_ce": "SA-ConvLSTM w/o CE, w SE",
    "sa_convlstm_no_se": "SA-ConvLSTM w CE, w/o SE",
}
# What a variant is built of: the cell, whether it has CE, the scales of its SE.
BUILT_OF = {
    "full": (CMSLSTMCell, True, (1, 2, 4)), "convlstm": (CMSLSTMCell, False, ()), "no_se": (CMSLSTMCell, True, ()),
    "se1": (CMSLSTMCell, True, (1,)), "se2": (CMSLSTMCell, True, (1, 2)), "no_ce": (CMSLSTMCell, False, (1, 2, 4)),
    "predrnn": (PredRNNCell, False, ()), "predrnn_no_se": (PredRNNCell, True, ()),
    "predrnn_no_ce": (PredRNNCell, False, (1, 2, 4)), "predrnn_full": (PredRNNCell, True, (1, 2, 4)),
    "sa_convlstm": (SAConvLSTMCell, False, ()), "sa_convlstm_no_ce": (SAConvLSTMCell, False, (1, 2, 4)),
    "sa_convlstm_no_se": (SAConvLSTMCell, True, ()),
}
DEFAULT_SETUP = "patch4"
# patch4: frames in 4×4 patches, LayerNorm. CE and gates are 3×3, as in the released script, which gives the published
# 7.968M parameters. Fig. 1 has 5×5 for CE, and no kernel for the gates: 8,491,856; 5×5 for both: 10,589,008.
# fullres: the MS-LSTM paper's: no patches, no LayerNorm.
NETWORK = {
    "patch4": dict(patch=4, layers=4, hidden=64, kernel=3),
    "fullres": dict(patch=1, layers=6, hidden=32, kernel=3),
}
# How the papers train it; on Moving MNIST also for 400,000 iterations. Only the released code has `sampling`, the part
# of the iterations over which ε falls from 1 to 0; `final_lr`, to which the rate falls along a cosine; and `reverse`,
# every batch once more, backwards in time. `epochs` stands where the paper counts them instead of iterations; `data`
# overrides for one dataset. This paper has neither KTH nor typhoon: SA-ConvLSTM's loss, MoDeRNN's iterations.
TRAINING = {
    "patch4": dict(optimizer="adamw", weight_decay=0.01, lr=1e-3, final_lr=1e-6, batch=8, iterations=80_000, loss="l2",
                   sampling=0.5, reverse=True,
                   data={"taxibj": dict(loss="l1+l2", patch=2), "kth": dict(loss="l1+l2"),
                         "typhoon": dict(iterations=100_000)}),
    "fullres": dict(optimizer="adam", lr=3e-4, batch=4, epochs=40, loss="l1+l2", sampling=1.0, reverse=False,
                    data={"taxibj": dict(epochs=15), "kth": dict(epochs=20), "germany": dict(epochs=20)}),
}
# What papers report for this model and its variants: figures as they print them, averaged over the forecast.
MNIST = dict(setup="patch4", data="moving_mnist", source="CMS-LSTM, Table 3")
PUBLISHED = [
    dict(variant="full", **MNIST | dict(source="CMS-LSTM, Tables 1 and 3"),
         psnr=21.955, ssim=0.931, mse=33.6, mae=73.1, params="7.968M"),
    dict(variant="full", **MNIST | dict(source="CMS-LSTM, Table 1, 400,000 iterations"), iterations=400_000,
         psnr=23.682, ssim=0.949, mse=24.3, mae=58.1, params="7.968M"),
    dict(variant="convlstm", **MNIST, psnr=18.523, ssim=0.877, mse=70.4, mae=115.9),
    dict(variant="no_se", **MNIST, psnr=21.189, ssim=0.918, mse=39.1, mae=82.8),
    dict(variant="se1", **MNIST, psnr=21.708, ssim=0.927, mse=35.1, mae=76.3),
    dict(variant="no_ce", **MNIST, psnr=21.712, ssim=0.927, mse=34.8, mae=76.2),
    dict(variant="se2", **MNIST, psnr=21.858, ssim=0.929, mse=33.8, mae=74.3),
    dict(variant="predrnn", **MNIST, psnr=19.603, ssim=0.867, mse=56.8, mae=126.1),
    dict(variant="predrnn_no_se", **MNIST, psnr=22.356, ssim=0.924, mse=30.7, mae=82.7),
    dict(variant="predrnn_no_ce", **MNIST, psnr=22.761, ssim=0.931, mse=28.7, mae=76.9),
    dict(variant="predrnn_full", **MNIST, psnr=23.210, ssim=0.935, mse=26.3, mae=74.2),
    dict(variant="sa_convlstm", **MNIST, psnr=20.500, ssim=0.913, mse=43.9, mae=94.7),
    dict(variant="sa_convlstm_no_ce", **MNIST, psnr=20.970, ssim=0.918, mse=39.8, mae=84.2),
    dict(variant="sa_convlstm_no_se", **MNIST, psnr=22.591, ssim=0.929, mse=27.3, mae=79.0),
    # Of inflow alone: the released evaluation scores channel 0, and MS-LSTM's rerun on inflow (the next row) agrees,
    # where PredRNN halves from the two channels of this table (.318 … .595) to the one of that rerun (.170 … .287).
    dict(variant="full", setup="patch4", data="taxibj", source="CMS-LSTM, Table 2, first channel",
         mse_frames=[0.162, 0.203, 0.254, 0.294], mse=0.228),
    dict(variant="full", setup="fullres", data="taxibj", source="MS-LSTM, Tables 4-5",
         mse_frames=[0.169, 0.210, 0.249, 0.289], params="1.1M", macs="11.5G",
         note="the roll-out costs 25.6G: 11.5G are its convolutions (10.8G) and softmax alone; the tool that counted "
              "them does not see the attention's matrix products"),
]

MODEL = CMSLSTM

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        for variant, meaning in VARIANTS.items():
            with torch.device("meta"), FlopCounterMode(display=False) as counter:     # on "meta" nothing is computed
                model = MODEL(setup=setup, variant=variant)
                model(torch.empty(1, 2, 1, 64, 64))               # one of the 19 steps of 20 frames; all cost the same
            parameters, macs = sum(p.numel() for p in model.parameters()), 19 * counter.get_total_flops() / 2e9
            print(f"{setup:8} {variant:18} {parameters:>10,} parameters {macs:7.1f}G multiply-accumulates   {meaning}")
