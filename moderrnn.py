"""MoDeRNN: a ConvLSTM whose input and context reweight each other before they meet in the gates.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    Z. Chai, Z. Xu, C. Yuan. "MoDeRNN: Towards Fine-grained Motion Details for Spatiotemporal Predictive Learning."
    ICASSP 2022.

In a ConvLSTM the input X_t and the context H_{t-1} meet only as a sum inside the gates. Here a Detail Context Block
(DCB) lets them interact first: convolutions of three sizes turn the context into weights Attn_H in (0, 1), which the
input is multiplied with; the new input reweights the context in the same way, and so on, five times in turn.

    X_t ──────▶ ∘ ───┬─────▶ ∘ ───┬─────▶ ∘ ──▶ X̂_t ─────┐              X_t: H_t of the layer below;
                ▲    ▼       ▲    ▼       ▲              │              in the bottom layer, the frame
             Attn_H Attn_X Attn_H Attn_X Attn_H          ├──▶ ConvLSTM ──▶ H_t, C_t
                │    ▼       │    ▼       │              │
    H_{t-1} ────┴──▶ ∘ ──────┴──▶ ∘ ──────┴──▶ Ĥ_{t-1} ──┘

    model = MoDeRNN(channels=1, size=64)                        # variants and set-ups: at the end of this file
    forecast = model(frames, horizon=10)[:, -10:]               # (B, T, C, H, W) in [0, 1] -> the 10 frames that follow

Where the paper is silent or contradicts itself, a comment at the line says what is done here. C is `hidden`.
"""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


class DetailContextBlock(nn.Module):
    """The DCB, §2.2: x and h (B, C, H, W) reweight each other in turn -> x̂ and ĥ.

    kernels: the sizes k of its convolutions, odd. size, norm: as the cell's."""

    def __init__(self, channels, kernels, size, norm):
        super().__init__()
        self.conv_h = nn.ModuleList(conv(channels, channels, k, size, norm) for k in kernels)     # W_h^{k×k}
        self.conv_x = nn.ModuleList(conv(channels, channels, k, size, norm) for k in kernels)     # W_x^{k×k}
        self.norm = norm

    def forward(self, x, h):
        mean_h, mean_x = mean_of(self.conv_h, self.norm), mean_of(self.conv_x, self.norm)
        # Eq. 2 as printed multiplies the wrong tensors: X̂_t = s × Attn_H × H_{t-1} would keep X_t out of the cell.
        # Steps 1 and 2 of §2.2 and the released code say what is meant. "m stacked DCB" are five half-steps that share
        # their weights, as released; so is s = 2. n is the number of kernels, the paper's |k|.
        for half_step in range(5):
            if half_step % 2 == 0:
                attn = torch.sigmoid(mean_h(h)).to(x.dtype)       # Eq. 2   Attn_H = σ(Σ_k W_h^{k×k} * H / n)
                x = 2 * attn * x                                  # step 1  X ← s · Attn_H ∘ X
            else:
                attn = torch.sigmoid(mean_x(x)).to(h.dtype)       # Eq. 2   Attn_X = σ(Σ_k W_x^{k×k} * X / n)
                h = 2 * attn * h                                  # step 2  H ← s · Attn_X ∘ H
        return x, h


def mean_of(convs, norm):
    """The function features -> Σ_k W^{k×k} * features / n, of n convolutions of several sizes k.

    Without LayerNorm it is linear in the kernels: 3×3 and 5×5, padded with zeros to 7×7, and 7×7 add up to a single
    7×7 convolution with the same result, 49 taps instead of 83."""
    if norm:
        return lambda features: sum(layer(features) for layer in convs) / len(convs)
    largest = max(layer.kernel_size[0] for layer in convs)
    weights = [F.pad(layer.weight, [(largest - layer.kernel_size[0]) // 2] * 4) for layer in convs]
    weight, bias = sum(weights) / len(convs), sum(layer.bias for layer in convs) / len(convs)
    return lambda features: F.conv2d(features, weight, bias, padding=largest // 2)


class MoDeRNNCell(nn.Module):
    """One layer: the DCB, then a ConvLSTM step (Eq. 3).

    x, h and c (B, hidden, H, W) -> the new h and c. size: the (H, W) of the maps. norm: LayerNorm after every
    convolution of DCB and gates, and on the cell state (`patch4`). dcb_kernels: the DCB's; none for no DCB."""

    def __init__(self, hidden, kernel, size, norm, dcb_kernels=(3, 5, 7)):
        super().__init__()
        self.dcb = DetailContextBlock(hidden, dcb_kernels, size, norm) if dcb_kernels else None
        self.x2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_x* and b_*, for i, f, g, o
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_h*
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: cells start by remembering

    def forward(self, x, h, c):
        if self.dcb is not None:
            x, h = self.dcb(x, h)                                 # X̂_t, Ĥ_{t-1}
        # Eq. 3   i = σ(W_xi * X̂_t + W_hi * Ĥ_{t-1} + b_i)           f = σ(W_xf * X̂_t + W_hf * Ĥ_{t-1} + b_f)
        #         g = tanh(W_xg * X̂_t + W_hg * Ĥ_{t-1} + b_g)        o = σ(W_xo * X̂_t + W_ho * Ĥ_{t-1} + b_o)
        # One convolution of each serves all four.
        i, f, g, o = (self.x2h(x) + self.h2h(h)).to(c.dtype).chunk(4, 1)                # each (B, hidden, H, W)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g), torch.sigmoid(o)
        c = self.norm_c(f * c + i * g)                            # Eq. 3   C_t = f ∘ C_{t-1} + i ∘ g
        h = o * torch.tanh(c)                                     # Eq. 3   H_t = o ∘ tanh(C_t)
        return h.to(x.dtype), c                                   # h in the convolutions' dtype: bf16 under autocast


class MoDeRNN(nn.Module):
    """A stack of MoDeRNN layers that reads frames and predicts the next one.

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
            MoDeRNNCell(hidden, kernel, grid, norm, DCB_KERNELS[variant]) for _ in range(layers))
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
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, [(h, c) per layer] -> those of the next frame."""
        h, new_state = self.embed(x), []
        for cell, (h_before, c) in zip(self.cells, state):
            h, c = cell(h, h_before, c)
            new_state.append((h, c))
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
        state, x, predictions = [(zero, zero) for _ in self.cells], truth[:, 0], []
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


def weights(dcb, inputs, output, *_):
    """For pictures (Fig. 3), by a forward hook: the last Attn_H and Attn_X of a step, (B, hidden, H, W)."""
    (x, h), mean_h, mean_x = inputs, mean_of(dcb.conv_h, dcb.norm), mean_of(dcb.conv_x, dcb.norm)
    for _ in range(2):                                            # the first four half-steps
        x = 2 * torch.sigmoid(mean_h(h)) * x
        attn_x = torch.sigmoid(mean_x(x))
        h = 2 * attn_x * h
    return torch.sigmoid(mean_h(h)), attn_x


# Pictures: name, block of a cell, function of the block's call, and what it returns.
MAPS = [("weights", "dcb", weights, ["Attn_H", "Attn_X"])]
VARIANTS = {
    "full": "the model of the paper: a DCB with 3×3, 5×5 and 7×7 kernels before the gates",
    "no_dcb": "without the DCB, which is ConvLSTM (an ablation of this file, as are all below; the paper has none)",
    "k3": "a DCB with 3×3 kernels only",
    "k5": "a DCB with 5×5 kernels only",
    "k7": "a DCB with 7×7 kernels only",
    "k35": "a DCB with 3×3 and 5×5 kernels",
}
DCB_KERNELS = dict(full=(3, 5, 7), no_dcb=(), k3=(3,), k5=(5,), k7=(7,), k35=(3, 5))
DEFAULT_SETUP = "patch4"
# patch4: frames in 4×4 patches, LayerNorm. The gates' kernel is the released script's; §2.3 says 5×5. Neither gives
# the published 4.590M parameters. fullres: no patches, no LayerNorm, as in the MS-LSTM paper, which omits this model.
NETWORK = {
    "patch4": dict(patch=4, layers=4, hidden=64, kernel=3),
    "fullres": dict(patch=1, layers=6, hidden=32, kernel=3),
}
# How the papers train it. Only the released code has `sampling`, the part of the iterations over which ε falls from 1
# to 0; `final_lr`, to which the rate falls along a cosine; and `reverse`, every batch once more, backwards in time.
# `epochs` stands where the paper counts them instead of iterations; `data` overrides for one dataset.
TRAINING = {
    "patch4": dict(optimizer="adamw", weight_decay=0.01, lr=1e-3, final_lr=1e-6, batch=32, iterations=80_000,
                   loss="l1+l2", sampling=0.5, reverse=True,
                   data={"taxibj": dict(patch=2), "typhoon": dict(iterations=100_000)}),
    "fullres": dict(optimizer="adam", lr=3e-4, batch=4, epochs=40, loss="l1+l2", sampling=1.0, reverse=False,
                    data={"taxibj": dict(epochs=15), "kth": dict(epochs=20), "germany": dict(epochs=20)}),
}
# What the paper reports: figures as printed, averaged over the forecast.
PUBLISHED = [
    dict(variant="full", setup="patch4", data="moving_mnist", source="MoDeRNN, Table 1",
         psnr=22.472, ssim=0.936, mse=30.6, mae=68.7, params="4.590M",
         note="4.590M is not met: the model has 5.868M, with the text's 5×5 gates 7.965M"),
    dict(variant="full", setup="patch4", data="typhoon", source="MoDeRNN, Table 2",
         psnr=29.446, ssim=0.910, mse=6.06, mae=83.1),
]

MODEL = MoDeRNN

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        for variant, meaning in VARIANTS.items():
            with torch.device("meta"), FlopCounterMode(display=False) as counter:     # on "meta" nothing is computed
                model = MODEL(setup=setup, variant=variant)
                model(torch.empty(1, 2, 1, 64, 64))               # one of the 19 steps of 20 frames; all cost the same
            parameters, macs = sum(p.numel() for p in model.parameters()), 19 * counter.get_total_flops() / 2e9
            print(f"{setup:8} {variant:18} {parameters:>10,} parameters {macs:7.1f}G multiply-accumulates   {meaning}")
