"""MoDeRNN: a ConvLSTM whose input and context reweight each other before they meet in the gates.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    Z. Chai, Z. Xu, C. Yuan. "MoDeRNN: Towards Fine-grained Motion Details for Spatiotemporal Predictive Learning."
    ICASSP 2022.

In a ConvLSTM the input X_t and the context H_{t-1} meet only as a sum inside the gates. MoDeRNN lets them talk first:
its Detail Context Block (DCB) looks at the context through convolutions of three sizes, makes weights in (0, 1) of what
it sees and multiplies the input with them; the new input then reweights the context, and so on, five times in turn.
Doubling each product keeps the features from fading. What comes out goes into the ordinary ConvLSTM gates.

    frame t ──patch──embed──▶ cell 1 ──H──▶ cell 2 ──H──▶ … ──▶ cell L ──output──unpatch──▶ prediction of frame t + 1
                              ↻ H, C        ↻ H, C              ↻ H, C           (each ↻ runs from t to t + 1)
    inside a cell
      X_t ─────▶ ∘ ──┬──────▶ ∘ ──┬──────▶ ∘ ──▶ X̂_t ────┐
                 ▲   ▼        ▲   ▼        ▲             │
            Attn_H   Attn_X  Attn_H Attn_X Attn_H        ├──▶ ConvLSTM gates ──▶ H_t, C_t
                 │   ▼        │   ▼        │             │
      H_{t-1} ───┴─▶ ∘ ───────┴─▶ ∘ ───────┴───▶ Ĥ_{t-1}─┘

Where the paper is silent or wrong, this file decides, at the line concerned:
  - Eq. 2 as printed multiplies the wrong tensors; the text of §2.2 and the released code say what is meant. Its |k| is
    n here, its i × i is k×k.
  - "m stacked DCB": the released code makes five half-steps X, H, X, H, X that share their weights; s = 2.
  - The gates are 3×3, as in the released script; the text says 5×5 (`kernel=5`). Neither meets the published 4.590M
    parameters: the full model has 5,867,600 or 7,964,752. (5×5 gates with LN, no DCB at all and one more LN would be
    4,589,648: an observation, not an explanation.)
  - `patch4`: LayerNorm over all of (C, H, W) after every convolution of DCB and gates, and on the cell state. Its
    weights have that shape, so A CHECKPOINT FITS ONE FRAME SIZE ONLY. `fullres`: no normalisation, any size; there the
    DCB's three convolutions are run as one, see `merge`.
  - The paper has no ablation: the variants here are this file's own.

    model = MoDeRNN(channels=1, size=64)                        # patch4; setup="fullres" for the other one
    prediction = model(frames)                                  # (B, T, C, H, W) in [0, 1] -> (B, T-1, C, H, W)
    forecast = model(frames, horizon=10)[:, -10:]               # T observed frames -> the 10 that follow
    mask = torch.rand(19, B) < torch.tensor(model.truth_probability(k, iterations, 10, 19))[:, None]
    error = model(frames, use_truth=mask) - frames[:, 1:]       # 20 frames
    loss = (error**2 + error.abs()).sum((2, 3, 4)).mean()       # then backward
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VARIANTS = {
    "full": "the model of the paper: a DCB with 3×3, 5×5 and 7×7 kernels before the gates",
    "no_dcb": "without the DCB, which is ConvLSTM (this file's ablation, as are all below)",
    "k3": "a DCB with 3×3 kernels only",
    "k5": "a DCB with 5×5 kernels only",
    "k7": "a DCB with 7×7 kernels only",
    "k35": "a DCB with 3×3 and 5×5 kernels",
}
DCB_KERNELS = dict(full=(3, 5, 7), no_dcb=(), k3=(3,), k5=(5,), k7=(7,), k35=(3, 5))
DEFAULT_SETUP = "patch4"
NETWORK = {                                                       # `kernel` is the gates'
    "patch4": dict(patch=4, layers=4, hidden=64, kernel=3),       # Eq. 3 says 5×5, the released training script 3×3
    "fullres": dict(patch=1, layers=6, hidden=32, kernel=3),
}
# How the paper (`patch4`) and MS-LSTM's (`fullres`) train it. `sampling` is the part of the iterations over which ε
# falls from 1 to 0; the learning rate falls from `lr` to `final_lr` along a cosine over all of them; `reverse`: every
# batch once more, backwards in time: these three are the released code's. `epochs` stands where the paper counts them
# instead; `data` overrides for one dataset.
TRAINING = {
    "patch4": dict(optimizer="adamw", weight_decay=0.01, lr=1e-3, final_lr=1e-6, batch=32, iterations=80_000,
                   loss="l1+l2", sampling=0.5, reverse=True,
                   data={"taxibj": dict(patch=2), "typhoon": dict(iterations=100_000)}),
    "fullres": dict(optimizer="adam", lr=3e-4, batch=4, epochs=40, loss="l1+l2", sampling=1.0, reverse=False,
                    data={"taxibj": dict(epochs=15), "kth": dict(epochs=20), "germany": dict(epochs=20)}),
}
# What papers report for this model: figures as they print them, averaged over the forecast.
PUBLISHED = [
    dict(variant="full", setup="patch4", data="moving_mnist", source="MoDeRNN, Table 1",
         psnr=22.472, ssim=0.936, mse=30.6, mae=68.7, params="4.590M",
         note="4.590M is not met: the model has 5.868M, with the text's 5×5 gates 7.965M"),
    dict(variant="full", setup="patch4", data="typhoon", source="MoDeRNN, Table 2",
         psnr=29.446, ssim=0.910, mse=6.06, mae=83.1),
]


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


def merge(convs):
    """The mean of "same" convolutions of several sizes as one convolution of the largest: weight and bias.

    Convolution is linear in its kernel, so Σ_k W^{k×k} * X / n = (Σ_k W^{k×k} / n) * X once the smaller kernels are
    padded with zeros. For 3×3, 5×5 and 7×7 that is 49 taps instead of 83, and one pass over X instead of three.
    """
    largest = max(layer.kernel_size[0] for layer in convs)
    weight = sum(F.pad(layer.weight, [(largest - layer.kernel_size[0]) // 2] * 4) for layer in convs) / len(convs)
    return weight, sum(layer.bias for layer in convs) / len(convs)   # (C, C, largest, largest), (C,)


class DetailContextBlock(nn.Module):
    """DCB, §2.2 and Eq. 2: input and context reweight each other in turn.

    Args: channels of both, the (H, W) of the feature maps, whether LayerNorm is used, the kernel sizes (odd), the
    number of half-steps (at least 2), the scale factor s.
    Called with x and h (B, channels, H, W); returns x̂, ĥ and the last weight maps (Attn_H, Attn_X), each in (0, 1),
    all of that shape. `merged` may hold what `self.merged()` returned, so that a roll-out builds it once.
    """

    def __init__(self, channels, size, norm, kernels=(3, 5, 7), steps=5, scale=2.0):
        super().__init__()
        self.of_h = nn.ModuleList(conv(channels, channels, k, size, norm) for k in kernels)     # W_h^{k×k}
        self.of_x = nn.ModuleList(conv(channels, channels, k, size, norm) for k in kernels)     # W_x^{k×k}
        self.norm, self.steps, self.scale = norm, steps, scale

    def merged(self):
        """(weight, bias) of the one convolution of h, and of that of x; None with LayerNorm, which is not linear."""
        return None if self.norm else (merge(self.of_h), merge(self.of_x))

    def forward(self, x, h, merged=None):
        of_h, of_x = merged or self.merged() or (self.of_h, self.of_x)
        # Eq. 2 prints X̂_t = s × Attn_H × H_{t-1} and Ĥ_{t-1} = s × Attn_X × X̂_{t-1}, with Attn_X of X̂_{t-1} too. The
        # input itself would never enter the cell; steps 1 and 2 of §2.2 and the released code reweight X by the map of
        # H, and H by the map of the new X.
        for step in range(self.steps):
            if step % 2 == 0:
                # Eq. 2   Attn_H = σ(Σ_k W_h^{k×k} * H / n)       X ← s · Attn_H ∘ X
                attn_h = torch.sigmoid(self.mean(of_h, h))        # (B, channels, H, W)
                x = self.scale * attn_h.to(x.dtype) * x
            else:
                # Eq. 2   Attn_X = σ(Σ_k W_x^{k×k} * X / n)       H ← s · Attn_X ∘ H
                attn_x = torch.sigmoid(self.mean(of_x, x))        # (B, channels, H, W)
                h = self.scale * attn_x.to(h.dtype) * h
        return x, h, (attn_h, attn_x)

    def mean(self, convs, features):
        """Σ_k W^{k×k} * features / n: over normalised convolutions, or as the one of `merge`."""
        if self.norm:
            return torch.stack([layer(features) for layer in convs]).mean(0)
        weight, bias = convs
        return F.conv2d(features, weight, bias, padding=weight.shape[-1] // 2)


class MoDeRNNCell(nn.Module):
    """One layer: the DCB, then a ConvLSTM cell (Eq. 3).

    Args: channels of input and hidden state, the gates' kernel size, the (H, W) of the feature maps, whether LayerNorm
    is used (`patch4`), the DCB's kernel sizes (none: no DCB).
    Called with x, h, c (B, hidden, H, W) and, if wanted, `self.dcb.merged()`; returns the new h and c, and the DCB's
    weight maps (Attn_H, Attn_X), None without a DCB.
    """

    def __init__(self, hidden, kernel, size, norm, dcb_kernels=(3, 5, 7)):
        super().__init__()
        self.dcb = DetailContextBlock(hidden, size, norm, dcb_kernels) if dcb_kernels else None
        self.x2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_x* and b_*, for i, f, g, o in this order
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_h*
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: cells start by remembering

    def forward(self, x, h, c, merged=None):
        maps = None
        if self.dcb is not None:
            x, h, maps = self.dcb(x, h, merged)                   # X̂_t, Ĥ_{t-1}
        # Eq. 3   i = σ(W_xi * X̂_t + W_hi * Ĥ_{t-1} + b_i)           f = σ(W_xf * X̂_t + W_hf * Ĥ_{t-1} + b_f)
        #         g = tanh(W_xg * X̂_t + W_hg * Ĥ_{t-1} + b_g)        o = σ(W_xo * X̂_t + W_ho * Ĥ_{t-1} + b_o)
        # One convolution of each serves all four.
        gates = (self.x2h(x) + self.h2h(h)).to(c.dtype)           # (B, 4·hidden, H, W); c stays fp32 under autocast
        i, f, g, o = gates.chunk(4, 1)                            # each (B, hidden, H, W)
        if self.forget_offset:
            f = f + self.forget_offset
        # Eq. 3   C_t = f_t ∘ C_{t-1} + i_t ∘ g_t
        c = self.norm_c(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g))
        # Eq. 3   H_t = o_t ∘ tanh(C_t)
        h = (torch.sigmoid(o) * torch.tanh(c)).to(x.dtype)        # H is read by convolutions: theirs is its type
        return h, c, maps


class MoDeRNN(nn.Module):
    """A stack of MoDeRNN cells that reads frames and predicts the next one.

    Args:
        channels: of a frame. size: of a frame, an int or (H, W), each side divisible by the patch.
        setup: "patch4" or "fullres". variant: a key of VARIANTS.
        hidden, layers, kernel (of the gates, odd), patch: override the set-up.
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
            raise ValueError("channels, hidden, layers, kernel and patch must be positive and the kernel odd: "
                             f"{network | dict(channels=channels)}")
        height, width = (size, size) if isinstance(size, int) else size
        self.channels, self.size, self.setup, self.variant = channels, (height, width), setup, variant
        self.hidden, self.patch, self.recompute = hidden, patch, False
        self.one_size = setup == "patch4"                         # LayerNorm: weights of the shape of the maps
        self.check((1, 1, channels, height, width))
        self.map_names = {"weights": ("Attn_H", "Attn_X")}

        norm, tokens, grid = setup == "patch4", channels * patch**2, (height // patch, width // patch)
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(
            MoDeRNNCell(hidden, kernel, grid, norm, DCB_KERNELS[variant]) for _ in range(layers))
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

    def step(self, x, state, merged):
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, [(h, c) of every layer], [the DCB's merged kernels of
        every layer] -> tokens of the next frame, the new state, [(Attn_H, Attn_X) of every layer]."""
        # Eq. 1   D(M(E(X_t))): E and D are 1×1 convolutions (§2.1), M is the layers.
        h, new_state, maps = self.embed(x), [], []
        for cell, (h_before, c_before), kernels in zip(self.cells, state, merged):
            h, c, attn = cell(h, h_before, c_before, kernels)
            new_state.append((h, c))
            maps.append(attn)
        return self.output(h).to(x.dtype), new_state, maps

    def forward(self, frames, horizon=0, use_truth=None, extras=False):
        """Read frames, predict each next one, then `horizon` further ones from the model's own predictions.

        Args:
            frames: (B, T, C, H, W), values in [0, 1].
            horizon: how many frames to forecast beyond frame T.
            use_truth: training with scheduled sampling: bool (T-1, B); where True, step t reads the true frame t, where
                False the last prediction. Row 0 is taken as True. None: every observed frame is read.
            extras: True, "loss" or query points [(y, x), …]: also return a dict. This model adds nothing to the loss
                and has no attention to points; except for "loss" the dict holds "layers", one (B, steps, hidden, H/p,
                W/p) a layer: its hidden states; and, with a DCB, "weights", one (B, steps, 2, hidden, H/p, W/p) a
                layer, values in (0, 1): the DCB's last weight maps (Fig. 3), first Attn_H, which the input was
                multiplied with, then Attn_X, which the context was.
        Returns: predictions (B, T-1+horizon, C, H, W), not clamped; entry k predicts frame k + 1. With extras: a pair.
        """
        self.check(frames.shape, horizon)
        # The p²C channels are in the order (C, y, x), in the released code (C, x, y).
        truth = F.pixel_unshuffle(frames, self.patch)             # (B, T, p²C, H/p, W/p)
        B, T, _, height, width = truth.shape
        zero = truth.new_zeros(B, self.hidden, height, width)
        state = [(zero, zero) for _ in self.cells]                # states start at zero
        merged = [cell.dcb.merged() if cell.dcb else None for cell in self.cells]
        x, predictions, layers, weights = truth[:, 0], [], [[] for _ in self.cells], [[] for _ in self.cells]
        for t in range(T - 1 + horizon):
            if 0 < t < T:                                         # beyond the observed frames x is the last prediction
                x = truth[:, t] if use_truth is None else torch.where(
                    use_truth[t, :, None, None, None], truth[:, t], x)
            if self.recompute and t % 7 and torch.is_grad_enabled():   # every seventh keeps all: faster
                x, state, maps = checkpoint(self.step, x, state, merged, use_reentrant=False, preserve_rng_state=False)
            else:
                x, state, maps = self.step(x, state, merged)      # x (B, p²C, H/p, W/p)
            predictions.append(x)
            if extras and extras != "loss":
                for l, (h, _) in enumerate(state):
                    layers[l].append(h)
                    if maps[l] is not None:
                        weights[l].append(torch.stack(maps[l], 1))    # (B, 2, hidden, H/p, W/p)
        predictions = F.pixel_shuffle(torch.stack(predictions, 1), self.patch)   # (B, T-1+horizon, C, H, W)
        if not extras:
            return predictions
        if extras == "loss":
            return predictions, {}
        found = {"layers": layers} if self.variant == "no_dcb" else {"layers": layers, "weights": weights}
        return predictions, {name: [torch.stack(kept, 1) for kept in lists] for name, lists in found.items()}

    def truth_probability(self, iteration, iterations, frames_in, steps):
        """Scheduled sampling (Bengio et al. 2015): with which probability each of `steps` steps reads the true frame.

        1 inside the `frames_in` observed frames; beyond them ε, which falls linearly from 1 to 0.
        """
        epsilon = max(0.0, 1 - iteration / (TRAINING[self.setup]["sampling"] * iterations))
        return [1.0] * frames_in + [epsilon] * (steps - frames_in)


MODEL = MoDeRNN

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model, frames = MoDeRNN(setup=setup), torch.empty(1, 20, 1, 64, 64)
            shape = tuple(model(frames).shape)
        print(f"MoDeRNN, {setup}: {tuple(frames.shape)} -> {shape}, {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {counter.get_total_flops() / 2e9:.1f}G multiply-accumulates a sequence")
