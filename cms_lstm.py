"""CMS-LSTM: input and context interact before the ConvLSTM gates, hidden state and cell attend at three scales after.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    Z. Chai, C. Yuan, Z. Lin, Y. Bai. "CMS-LSTM: Context-Embedding and Multi-Scale Spatiotemporal-Expression LSTM for
    Video Prediction." ICME 2022.

Two blocks go round a ConvLSTM cell. Context-Embedding (CE), before the gates: a convolution of the context H_{t-1}
makes weights that the input X_t is multiplied with, the new input makes weights for the context, and so on, five times
in turn. Spatiotemporal-Expression (SE), after the gates: hidden state and cell attend to themselves and to each other,
over the whole map, inside the four blocks of a 2×2 cut and inside the sixteen of a 4×4 one; the find rewrites both.

    frame t ──patch──embed──▶ cell 1 ──H──▶ cell 2 ──H──▶ … ──▶ cell L ──output──unpatch──▶ prediction of frame t + 1
                              ↻ H, C        ↻ H, C              ↻ H, C           (each ↻ runs from t to t + 1)
    inside a cell                               C_{t-1}
                                                 ▼
      X_t ─────▶┌────────────┐──X̂_t─────▶┌──────────────┐──H_t──▶┌─ SE ───────────────────────────────┐──▶ Ĥ_t
                │ CE, 5 times│           │ConvLSTM gates│        │ attention at scales 1, 2, 4 ▶ 5×5  │
      H_{t-1} ─▶└────────────┘──Ĥ_{t-1}─▶└──────────────┘──C_t──▶└─▶ A_H, A_C ▶ 1×1 ▶ 5×5 ▶ gates ────┘──▶ Ĉ_t

Where the paper is silent or the released code differs, this file decides, at the line concerned:
  - "5-layer stacked CE blocks" would be ten half-steps; the released code makes five, X, H, X, H, X (`ce_steps`).
  - SE as released lays H and C side by side, so that its 5×5 convolution sees both at the seam and its LayerNorm both
    everywhere; it adds a shortcut that no figure draws and a 1×1 convolution that the text leaves out.
  - Gates and CE are 3×3, as in the released script. The text has 5×5 for CE (Fig. 1) and SE, and no kernel for the
    gates. 3×3 gives the published 7.968M parameters; 5×5 for CE alone would give 8,491,856, for the gates alone
    10,064,720, for both (`kernel=5`) 10,589,008.
  - `patch4`: LayerNorm over all of (C, H, W) after the gate convolutions and on the cell state. Its weights have that
    shape, so A CHECKPOINT FITS ONE FRAME SIZE ONLY. `fullres`: no normalisation, any size that the scales divide.
The blocks stand on their own, `x, h = ContextEmbedding(64)(x, h)` and `h, c = SpatiotemporalExpression(64)(h, c)`, and
go round any cell; the paper's transplants into PredRNN and SA-ConvLSTM (Table 3) are the last part of the file. Their
code was never released: they follow what Eq. 5 suggests.

    model = CMSLSTM(channels=1, size=64)                        # patch4; setup="fullres" for the other one
    prediction = model(frames)                                  # (B, T, C, H, W) in [0, 1] -> (B, T-1, C, H, W)
    forecast = model(frames, horizon=10)[:, -10:]               # T observed frames -> the 10 that follow
    maps = model(frames, horizon=10, extras=[(20, 30)])[1]["attention"][0]   # layer 1: what pixel (20, 30) looks at
    mask = torch.rand(19, B) < torch.tensor(model.truth_probability(k, iterations, 10, 19))[:, None]
    loss = ((model(frames, use_truth=mask) - frames[:, 1:]) ** 2).sum((2, 3, 4)).mean()     # 20 frames; then backward
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

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
# What a variant is built of: the cell, whether CE comes before it, the scales of SE after it (none: no SE).
BUILT_OF = {
    "full": ("convlstm", True, (1, 2, 4)), "convlstm": ("convlstm", False, ()), "no_se": ("convlstm", True, ()),
    "se1": ("convlstm", True, (1,)), "se2": ("convlstm", True, (1, 2)), "no_ce": ("convlstm", False, (1, 2, 4)),
    "predrnn": ("predrnn", False, ()), "predrnn_no_se": ("predrnn", True, ()),
    "predrnn_no_ce": ("predrnn", False, (1, 2, 4)), "predrnn_full": ("predrnn", True, (1, 2, 4)),
    "sa_convlstm": ("sa_convlstm", False, ()), "sa_convlstm_no_ce": ("sa_convlstm", False, (1, 2, 4)),
    "sa_convlstm_no_se": ("sa_convlstm", True, ()),
}
DEFAULT_SETUP = "patch4"
NETWORK = {
    "patch4": dict(patch=4, layers=4, hidden=64, kernel=3),
    "fullres": dict(patch=1, layers=6, hidden=32, kernel=3),
}
# How the paper (`patch4`) and MS-LSTM's (`fullres`) train it; on Moving MNIST also for 400,000 iterations. `sampling`
# is the part of the iterations over which ε falls from 1 to 0; the learning rate falls from `lr` to `final_lr` along a
# cosine over all of them; `reverse`: every batch once more, backwards in time: these three are the released code's.
# `epochs` stands where the paper counts them instead; `data` overrides for one dataset: KTH's loss and typhoon's
# iterations are other papers' (SA-ConvLSTM, MoDeRNN), as this one has neither.
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
    dict(variant="full", setup="patch4", data="taxibj", source="CMS-LSTM, Table 2", channels=1,
         mse_frames=[0.162, 0.203, 0.254, 0.294], mse=0.228),
    dict(variant="full", setup="fullres", data="taxibj", source="MS-LSTM, Tables 4-5",
         mse_frames=[0.169, 0.210, 0.249, 0.289], params="1.1M", macs="11.5G",
         note="the roll-out costs 25.6G: 11.5G are its convolutions (10.8G) and softmax alone; the tool that counted "
              "them does not see the attention's matrix products"),
]


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


class ContextEmbedding(nn.Module):
    """CE block, §3.1: input and context weight each other in turn.

    Args: channels of both; the kernel of the two convolutions (odd); `steps`, the half-steps (at least 2); with `norm`,
    LayerNorm follows the convolutions, and `size`, the (H, W) of the maps, is needed.
    Called with x and h (B, channels, H, W); returns x̂ and ĥ of the same shape.
    """

    def __init__(self, channels, kernel=3, steps=5, norm=False, size=None):
        super().__init__()
        self.of_h = conv(channels, channels, kernel, size, norm)  # W_H* and b_H
        self.of_x = conv(channels, channels, kernel, size, norm)  # W_X* and b_X
        self.steps = steps

    def forward(self, x, h):
        # "5-layer stacked CE blocks" would be ten half-steps; the released training code makes these five. All share
        # the two convolutions, so that the parameter count is the same either way.
        for step in range(self.steps):
            if step % 2 == 0:
                # Eq. 1   X̂_t = 2 × σ(W_H * H_{t-1} + b_H) ∘ X_t
                x = 2 * torch.sigmoid(self.of_h(h)).to(x.dtype) * x       # (B, channels, H, W)
            else:
                # Eq. 1   Ĥ_{t-1} = 2 × σ(W_X * X̂_t + b_X) ∘ H_{t-1}
                h = 2 * torch.sigmoid(self.of_x(x)).to(h.dtype) * h       # (B, channels, H, W)
        return x, h


def cut(z, s):
    """Cut H and C, side by side in z (B, n, H, 2W), into s × s blocks: (B, s², 2HW/s², n), H's block with C's."""
    B, n, height, width = z.shape
    # height: s blocks of H/s rows; width: H or C, then s blocks of W/s columns
    z = z.reshape(B, n, s, height // s, 2, s, width // 2 // s).permute(0, 2, 5, 3, 4, 6, 1)
    return z.reshape(B, s * s, -1, n).contiguous()                # fused attention wants a token's channels together


def uncut(tokens, s, height, width):
    """The inverse of `cut`: (B, s², 2HW/s², n) -> (B, n, H, 2W), for maps of height H and width W."""
    B, _, _, n = tokens.shape
    tokens = tokens.reshape(B, s, s, height // s, 2, width // s, n)
    return tokens.permute(0, 6, 1, 3, 4, 2, 5).reshape(B, n, height, 2 * width)


class SpatiotemporalExpression(nn.Module):
    """SE block, §3.2: hidden state and cell attend to themselves and to each other at several scales.

    Args: channels of both; the `scales` s, each cutting the maps into s × s blocks (H and W divisible by every one);
    the kernel of its three large convolutions (odd); with `norm`, LayerNorm follows these and the cell, and `size`,
    the (H, W) of the maps, is needed.
    Called with h and c (B, channels, H, W); returns ĥ and ĉ of the same shape.
    """

    def __init__(self, channels, scales=(1, 2, 4), kernel=5, norm=False, size=None):
        super().__init__()
        self.scales = scales
        # Query, Key, Value of every scale: 1×1 convolutions, shared by H and C ("weight-shared", §3.2).
        self.qkv = nn.Conv2d(channels, 3 * len(scales) * channels, 1)
        self.fuse = nn.Conv2d(len(scales) * channels, channels, kernel, padding=kernel // 2)
        self.norm_a = nn.LayerNorm([channels, size[0], 2 * size[1]]) if norm else nn.Identity()
        self.mix = nn.Conv2d(2 * channels, channels, 1)
        self.a2g = conv(channels, 3 * channels, kernel, size, norm)     # W_A* and b_*, for i, g, o in this order
        self.h2g = conv(channels, 3 * channels, kernel, size, norm)     # W_h*
        self.norm_c = nn.LayerNorm([channels, *size]) if norm else nn.Identity()

    def express(self, z):
        """Part 1: H and C side by side, z (B, channels, H, 2W) -> ẑ at every scale, (B, scales·channels, H, 2W)."""
        expressed = []
        for s, qkv in zip(self.scales, self.qkv(z).chunk(len(self.scales), 1)):
            q, k, v = cut(qkv, s).chunk(3, -1)                    # each (B, s², 2HW/s², channels)
            # Eq. 2   Ĥ_t, Ĉ_t = Softmax(Queryᵀ × Key) × Value    no 1/√d; the scores are never stored
            attended = F.scaled_dot_product_attention(q, k, v, scale=1.0)
            expressed.append(uncut(attended, s, z.shape[2], z.shape[3] // 2))         # (B, channels, H, 2W)
        # The shortcut + z, at every scale, is drawn nowhere in the paper; it is in the released code.
        return (torch.stack(expressed, 1) + z.unsqueeze(1)).flatten(1, 2)

    def forward(self, h, c):
        # Part 1. The text's Z ∈ C×H×W×2 would keep H and C apart. The released code lays them side by side along the
        # width: the 5×5 kernel sees both at the seam, the LayerNorm both everywhere.
        z = self.express(torch.cat([h, c.to(h.dtype)], 3))        # (B, scales·channels, H, 2W)
        a_h, a_c = self.norm_a(self.fuse(z)).chunk(2, 3)          # each (B, channels, H, W)
        # Part 2. The 1×1 convolution is absent from the text and from Fig. 3; it is in the released code.
        a = self.mix(torch.cat([a_h, a_c], 1))                    # (B, channels, H, W)
        # Eq. 3   i = σ(W_Ai * [A_H, A_C] + W_hi * Z_H + b_i)        g = tanh(W_Ag * [A_H, A_C] + W_hg * Z_H + b_g)
        # Eq. 4   o = σ(W_Ao * [A_H, A_C] + W_ho * Z_H + b_o)
        # As released: A for [A_H, A_C], and the paper's Z_H is H_t. One convolution of each serves all three.
        i, g, o = (self.a2g(a) + self.h2g(h)).to(c.dtype).chunk(3, 1)   # each (B, channels, H, W)
        # Eq. 3   Ĉ_t = (1 - i_t) ∘ C_t + i_t ∘ g_t
        c = self.norm_c(torch.lerp(c, torch.tanh(g), torch.sigmoid(i)))
        # Eq. 4   Ĥ_t = o_t ∘ Ĉ_t
        return (torch.sigmoid(o) * c).to(h.dtype), c

    def attention(self, h, c, points):
        """What H looks at from `points`, [(y, x), …] on the maps: (B, points, 2·scales, H, W).

        For each scale one map over H, then one over C: the softmax of Eq. 2, sum 1 over the two; 0 outside the block.
        """
        z, (height, width), maps = torch.cat([h, c.to(h.dtype)], 3), h.shape[2:], []
        for s, qkv in zip(self.scales, self.qkv(z).chunk(len(self.scales), 1)):
            q, k, _ = cut(qkv, s).chunk(3, -1)
            rows, columns = height // s, width // s               # of a block
            for y, x in points:
                block, token = y // rows * s + x // columns, y % rows * 2 * columns + x % columns
                weights = torch.zeros_like(k[..., :1])            # (B, s², 2HW/s², 1)
                weights[:, block] = torch.softmax(k[:, block] @ q[:, block, token, :, None], 1).to(k.dtype)
                maps.append(uncut(weights, s, height, width).reshape(-1, height, 2, width).transpose(1, 2))
        maps = torch.stack(maps, 1).unflatten(1, (len(self.scales), len(points)))   # (B, scales, points, 2, H, W)
        return maps.transpose(1, 2).flatten(2, 3)


class CMSLSTMCell(nn.Module):
    """One CMS-LSTM layer, Eq. 5: CE, a ConvLSTM cell, SE.

    Args: channels of input and hidden state, the gates' and CE's kernel size, the (H, W) of the feature maps, whether
    LayerNorm is used (`patch4`), CE's half-steps (0: no CE), SE's scales (none: no SE).
    Called with x (B, hidden, H, W), the state (h, c) of that shape each, a memory that is handed on as it is (only
    PredRNN's cell, below, has one) and query points or None; returns the new state, the memory and a dict, empty
    without points: "ce_input" (B, 2, hidden, H, W), X_t and X̂_t; "attention", as SpatiotemporalExpression gives it.
    """

    states = 2                                                    # h, c

    def __init__(self, hidden, kernel, size, norm, ce_steps=5, scales=(1, 2, 4)):
        super().__init__()
        self.ce = ContextEmbedding(hidden, kernel, ce_steps, norm, size) if ce_steps else None
        self.x2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_x* and b_*, for i, f, g, o in this order
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_h*
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: cells start by remembering
        # Under `patch4` SE's convolutions are 5×5 whatever the gates', as released; under `fullres` as the gates'.
        self.se = SpatiotemporalExpression(hidden, scales, 5 if norm else kernel, norm, size) if scales else None

    def forward(self, x, state, memory=None, points=None):
        (h, c), seen = state, {}
        if self.ce is not None:
            # Eq. 5   X̂_t, Ĥ_{t-1} = CE(⋯ CE(X_t, H_{t-1}))
            x_hat, h = self.ce(x, h)
            if points is not None:
                seen["ce_input"] = torch.stack([x, x_hat], 1)     # (B, 2, hidden, H, W)
            x = x_hat
        h, c, memory = self.lstm(x, h, c, memory)
        if self.se is not None:
            if points is not None:
                seen["attention"] = self.se.attention(h, c, points)
            # Eq. 5   Ĥ_t, Ĉ_t = SE(H_t, C_t)
            h, c = self.se(h, c)
        return (h, c), memory, seen

    def lstm(self, x, h, c, memory):
        # Eq. 5   i = σ(W_xi * X̂_t + W_hi * Ĥ_{t-1} + b_i)           f = σ(W_xf * X̂_t + W_hf * Ĥ_{t-1} + b_f)
        #         g = tanh(W_xg * X̂_t + W_hg * Ĥ_{t-1} + b_g)        o = σ(W_xo * X̂_t + W_ho * Ĥ_{t-1} + b_o)
        # One convolution of each serves all four.
        gates = (self.x2h(x) + self.h2h(h)).to(c.dtype)           # (B, 4·hidden, H, W); c stays fp32 under autocast
        i, f, g, o = gates.chunk(4, 1)                            # each (B, hidden, H, W)
        if self.forget_offset:
            f = f + self.forget_offset
        # Eq. 5   C_t = f_t ∘ C_{t-1} + i_t ∘ g_t
        c = self.norm_c(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g))
        # Eq. 5   H_t = o_t ∘ tanh(C_t)
        h = (torch.sigmoid(o) * torch.tanh(c)).to(x.dtype)        # H is read by convolutions: theirs is its type
        return h, c, memory


class CMSLSTM(nn.Module):
    """A stack of CMS-LSTM cells that reads frames and predicts the next one.

    Args:
        channels: of a frame. size: of a frame, an int or (H, W), each side divisible by the patch times SE's largest
            scale. setup: "patch4" or "fullres". variant: a key of VARIANTS.
        hidden, layers, kernel (of the gates and CE, odd), patch: override the set-up.
        ce_steps: CE's half-steps, at least 2.
    Attributes: `recompute`: set it to True to keep, of six steps in seven, only the states for the backward pass, and
    compute the rest again there: less memory, more time, same gradients. `map_names`: what the maps of each entry of
    `extras` are, in their order.
    Raises ValueError, in one line that names the way out, for what cannot be built and frames it cannot read.
    """

    def __init__(self, channels=1, size=64, setup=DEFAULT_SETUP, variant="full",
                 hidden=None, layers=None, kernel=None, patch=None, ce_steps=5):
        super().__init__()
        for name, value, known in ("setup", setup, NETWORK), ("variant", variant, VARIANTS):
            if value not in known:
                raise ValueError(f"{name} {value!r}: choose from {', '.join(known)}")
        given = dict(hidden=hidden, layers=layers, kernel=kernel, patch=patch)
        network = NETWORK[setup] | {name: value for name, value in given.items() if value is not None}
        hidden, layers, kernel, patch = (network[name] for name in given)
        if min(channels, hidden, layers, kernel, patch) < 1 or kernel % 2 == 0 or ce_steps < 2:
            raise ValueError("channels, hidden, layers, kernel and patch must be positive, the kernel odd, ce_steps at "
                             f"least 2: {network | dict(channels=channels, ce_steps=ce_steps)}")
        backbone, with_ce, scales = BUILT_OF[variant]
        height, width = (size, size) if isinstance(size, int) else size
        self.channels, self.size, self.setup, self.variant = channels, (height, width), setup, variant
        self.hidden, self.patch, self.unit, self.recompute = hidden, patch, patch * max(scales, default=1), False
        self.one_size = setup == "patch4"                         # LayerNorm: weights of the shape of the maps
        self.check((1, 1, channels, height, width))
        self.map_names = {"ce_input": ("X before CE", "X after CE"),
                          "attention": [f"scale {s}, {state}" for s in scales for state in "HC"]}

        norm, tokens, grid = setup == "patch4", channels * patch**2, (height // patch, width // patch)
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(
            CELLS[backbone](hidden, kernel, grid, norm, ce_steps if with_ce else 0, scales) for _ in range(layers))
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
        unit = self.unit
        near = [sorted({max((side + half) // unit, 1) * unit for half in ((unit - 1) // 2, unit // 2)})
                for side in (height, width)]                      # the nearest multiple, or both where two are as near
        if near != [[height], [width]]:
            near = ", ".join(f"{h}×{w}" for h in near[0] for w in near[1])
            raise ValueError(f"frames of {height}×{width}: each side must be a multiple of {unit}, "
                             f"the patch times SE's largest scale; the nearest sizes: {near}")

    def step(self, x, state, points=None):
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, ([state of every layer], memory), query points or None
        -> tokens of the next frame, the new state, [a dict of what was seen for every layer]."""
        (states, memory), new_states, seen = state, [], []
        h = self.embed(x)
        for cell, before in zip(self.cells, states):
            after, memory, found = cell(h, before, memory, points)
            h = after[0]
            new_states.append(after)
            seen.append(found)
        return self.output(h).to(x.dtype), (new_states, memory), seen

    def forward(self, frames, horizon=0, use_truth=None, extras=False):
        """Read frames, predict each next one, then `horizon` further ones from the model's own predictions.

        Args:
            frames: (B, T, C, H, W), values in [0, 1].
            horizon: how many frames to forecast beyond frame T.
            use_truth: training with scheduled sampling: bool (T-1, B); where True, step t reads the true frame t, where
                False the last prediction. Row 0 is taken as True. None: every observed frame is read.
            extras: "loss", True or query points [(y, x), …] in pixels of the frame, True being its centre: also return
                a dict. This model adds nothing to the loss. Except for "loss" the dict holds a list with an entry a
                layer, h × w being H/p × W/p:
                "layers", (B, steps, hidden, h, w): the hidden states Ĥ_t;
                "ce_input" (with CE), (B, steps, 2, hidden, h, w): the layer's input before and after CE, X_t and X̂_t;
                "attention" (with SE), (B, steps, points, 2·scales, h, w): how much H_t, at the patch that holds the
                point, attends to each patch of H_t and, in the next map, of C_t, at scale 1, then 2, then 4. The two
                maps of a scale sum to 1 together; outside the point's block they are 0.
        Returns: predictions (B, T-1+horizon, C, H, W), not clamped; entry k predicts frame k + 1. With extras: a pair.
        Raises ValueError for a query point outside the frame.
        """
        self.check(frames.shape, horizon)
        # The p²C channels are in the order (C, y, x), in the released code (C, x, y).
        truth = F.pixel_unshuffle(frames, self.patch)             # (B, T, p²C, H/p, W/p)
        B, T, _, height, width = truth.shape
        points = None
        if extras and extras != "loss":
            pixels = [(frames.shape[3] // 2, frames.shape[4] // 2)] if extras is True else extras
            if not all(0 <= y < frames.shape[3] and 0 <= x < frames.shape[4] for y, x in pixels):
                raise ValueError(f"query points {pixels} must lie in frames of {frames.shape[3]}×{frames.shape[4]}")
            points = [(y // self.patch, x // self.patch) for y, x in pixels]
        zero = truth.new_zeros(B, self.hidden, height, width)
        state = ([(zero,) * cell.states for cell in self.cells], zero)          # states and memory start at zero
        x, predictions, found = truth[:, 0], [], {}
        for t in range(T - 1 + horizon):
            if 0 < t < T:                                         # beyond the observed frames x is the last prediction
                x = truth[:, t] if use_truth is None else torch.where(
                    use_truth[t, :, None, None, None], truth[:, t], x)
            if self.recompute and t % 7 and torch.is_grad_enabled():   # every seventh keeps all: faster
                x, state, seen = checkpoint(self.step, x, state, points, use_reentrant=False, preserve_rng_state=False)
            else:
                x, state, seen = self.step(x, state, points)      # x (B, p²C, H/p, W/p)
            predictions.append(x)
            if points is not None:
                for l, (layer, new) in enumerate(zip(seen, state[0])):
                    for name, value in (layer | {"layers": new[0]}).items():
                        found.setdefault(name, [[] for _ in self.cells])[l].append(value)
        predictions = F.pixel_shuffle(torch.stack(predictions, 1), self.patch)   # (B, T-1+horizon, C, H, W)
        if not extras:
            return predictions
        return predictions, {name: [torch.stack(kept, 1) for kept in lists] for name, lists in found.items()}

    def truth_probability(self, iteration, iterations, frames_in, steps):
        """Scheduled sampling (Bengio et al. 2015): with which probability each of `steps` steps reads the true frame.

        1 inside the `frames_in` observed frames; beyond them ε, which falls linearly from 1 to 0.
        """
        epsilon = max(0.0, 1 - iteration / (TRAINING[self.setup]["sampling"] * iterations))
        return [1.0] * frames_in + [epsilon] * (steps - frames_in)


# --- The transplants of Table 3: the same blocks round two other cells. Their gate kernel is this file's, 3×3, so that
# --- the rows compare, where the cells' own papers have 5×5.


class PredRNNCell(CMSLSTMCell):
    """CE, PredRNN's ST-LSTM (Wang et al. 2017), SE on (H_t, C_t).

    Arguments, call and returns as CMSLSTMCell's; `memory` (B, hidden, H, W) is M, which CE and SE leave untouched: it
    climbs the layers inside a step, and what leaves the top layer enters the bottom one a step later.
    """

    def __init__(self, hidden, kernel, size, norm, ce_steps=5, scales=(1, 2, 4)):
        super().__init__(hidden, kernel, size, norm, ce_steps, scales)
        self.x2h = conv(hidden, 7 * hidden, kernel, size, norm)   # W_x* and W'_x*, for i, f, g, i', f', g', o
        self.m2h = conv(hidden, 3 * hidden, kernel, size, norm)   # W_m*, for i', f', g'
        self.cm2o = conv(2 * hidden, hidden, kernel, size, norm)  # W_co and W_mo
        self.last = nn.Conv2d(2 * hidden, hidden, 1, bias=not norm)     # W_1×1
        self.norm_c = nn.Identity()                               # C and M get no LayerNorm

    def lstm(self, x, h, c, memory):
        n, m = c.shape[1], memory                                 # hidden; M^{l-1}_t
        # i, f, g from W_x* * X̂_t + W_h* * Ĥ_{t-1} + b_*;  i', f', g' from W'_x* * X̂_t + W_m* * M^{l-1}_t + b'_*
        x_cm, x_o = self.x2h(x).to(c.dtype).split((6 * n, n), 1)
        h_c, h_o = self.h2h(h).to(c.dtype).split((3 * n, n), 1)
        # C and M obey the same equation: both at once, side by side in a dimension of their own.
        gates = x_cm + torch.cat([h_c, self.m2h(m).to(c.dtype)], 1)
        i, f, g = gates.unflatten(1, (2, 3, n)).unbind(2)         # [i, i'], [f, f'], [g, g']: each (B, 2, hidden, H, W)
        if self.forget_offset:
            f = f + self.forget_offset
        # C_t = f ∘ C_{t-1} + i ∘ g        M^l_t = f' ∘ M^{l-1}_t + i' ∘ g'
        cm = torch.sigmoid(f) * torch.stack([c, m], 1) + torch.sigmoid(i) * torch.tanh(g)
        # o = σ(W_xo * X_t + W_ho * H_{t-1} + W_co * C_t + W_mo * M_t + b_o)
        both = cm.flatten(1, 2).to(x.dtype)                       # [C_t, M_t]  (B, 2·hidden, H, W)
        o = torch.sigmoid(x_o + h_o + self.cm2o(both).to(c.dtype))
        # H_t = o ∘ tanh(W_1×1 * [C_t, M_t])
        h = o * torch.tanh(self.last(both).to(c.dtype))
        return h.to(x.dtype), *cm.unbind(1)


class SAConvLSTMCell(CMSLSTMCell):
    """CE, a ConvLSTM cell, SE, then the self-attention memory of SA-ConvLSTM (Lin et al. 2020) on SE's Ĥ_t.

    Arguments, call and returns as CMSLSTMCell's, but the state is (h, c, m): every layer has a memory M of its own,
    which runs through time. Without LayerNorm a fresh layer damps a change of its input far more than the other cells
    do, gate upon gate at ½, SE's among them: there, use few layers.
    """

    states = 3                                                    # h, c, m

    def __init__(self, hidden, kernel, size, norm, ce_steps=5, scales=(1, 2, 4)):
        super().__init__(hidden, kernel, size, norm, ce_steps, scales)
        self.qkv_h = nn.Conv2d(hidden, 3 * hidden, 1)             # W_q, W_k, W_v
        self.kv_m = nn.Conv2d(hidden, 2 * hidden, 1)              # W_mk, W_mv
        self.mix_z = nn.Conv2d(2 * hidden, hidden, 1)             # W_z
        self.zh2g = nn.Sequential(                                # i', g', o' from [Z; H_t], depth-wise separable
            nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden), nn.Conv2d(2 * hidden, 3 * hidden, 1))

    def forward(self, x, state, memory=None, points=None):
        h, c, m = state
        (h, c), memory, seen = super().forward(x, (h, c), memory, points)
        q, kv_h = self.qkv_h(h).split((h.shape[1], 2 * h.shape[1]), 1)            # (B, hidden or 2·hidden, H, W)
        # All positions are tokens of one sequence; fused attention wants a token's channels together. What the query
        # attends to, H_t and M_{t-1}, takes the place of the heads.
        q = q.flatten(2).mT.unsqueeze(1).contiguous()             # (B, 1, HW, hidden)
        k, v = torch.stack([u.flatten(2).mT for u in (kv_h, self.kv_m(m))], 1).chunk(2, -1)   # each (B, 2, HW, hidden)
        # Eq. 2-4   Z_h = softmax(Q_hᵀ K_h) V_h        Eq. 5-7   Z_m = softmax(Q_hᵀ K_m) V_m       no 1/√d
        z = F.scaled_dot_product_attention(q.expand_as(k), k, v, scale=1.0)
        z = z.mT.flatten(1, 2).unflatten(2, h.shape[2:])          # [Z_h; Z_m]  (B, 2·hidden, H, W)
        # Z = W_z [Z_h; Z_m]        Eq. 8-9   i', g', o' from W_z* * Z + W_h* * H_t + b_*, H_t being SE's Ĥ_t
        i, g, o = self.zh2g(torch.cat([self.mix_z(z), h], 1)).to(m.dtype).chunk(3, 1)     # each (B, hidden, H, W)
        # Eq. 8   M_t = (1 - i') ∘ M_{t-1} + i' ∘ g'
        m = torch.lerp(m, torch.tanh(g), torch.sigmoid(i))
        # Eq. 9   Ĥ_t = o' ∘ M_t
        return ((torch.sigmoid(o) * m).to(h.dtype), c, m), memory, seen


CELLS = {"convlstm": CMSLSTMCell, "predrnn": PredRNNCell, "sa_convlstm": SAConvLSTMCell}
MODEL = CMSLSTM

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model, frames = CMSLSTM(setup=setup), torch.empty(1, 20, 1, 64, 64)
            shape = tuple(model(frames).shape)
        print(f"CMS-LSTM, {setup}: {tuple(frames.shape)} -> {shape}, {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {counter.get_total_flops() / 2e9:.1f}G multiply-accumulates a sequence")
