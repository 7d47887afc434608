"""ConvLSTM: the LSTM whose matrix products are convolutions.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    X. Shi, Z. Chen, H. Wang, D.-Y. Yeung, W.-K. Wong, W.-C. Woo.
    "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting." NeurIPS 2015.

A fully connected LSTM flattens its input and forgets where things are. ConvLSTM keeps input, hidden state and cell as
feature maps and replaces every matrix product by a convolution, so a cell decides what to keep from what its neighbours
were one step ago: motion is a local, translation-invariant rule. All later models in this project start from this cell.

    frame t ──patch──embed──▶ cell 1 ──H──▶ cell 2 ──H──▶ … ──▶ cell L ──output──unpatch──▶ prediction of frame t + 1
                              ↻ H, C        ↻ H, C              ↻ H, C           (each ↻ runs from t to t + 1)

Eq. 2 is that of Z. Ma et al., "MS-LSTM" (2023), in its letters: without peepholes, as all later papers have it. Eq. 3
is that of Shi et al., which has them. Where no paper speaks, this file decides, at the line concerned:
  - `patch4` (the SA-ConvLSTM, CMS-LSTM and MoDeRNN papers): one LayerNorm over all of (C, H, W) after every gate
    convolution and on the cell state. Its weights have that shape, so A CHECKPOINT FITS ONE FRAME SIZE ONLY. The patch,
    where LayerNorm stands, σ(f + 1) and all of the training that no paper tells are from PredRNN's and CMS-LSTM's code.
  - `fullres` (the MS-LSTM paper): no patches, no normalisation; weights fit any frame size.

    model = ConvLSTM(channels=1, size=64)                       # patch4; setup="fullres" for the other one
    prediction = model(frames)                                  # (B, T, C, H, W) in [0, 1] -> (B, T-1, C, H, W)
    forecast = model(frames, horizon=10)[:, -10:]               # T observed frames -> the 10 that follow
    mask = torch.rand(19, B) < torch.tensor(model.truth_probability(k, iterations, 10, 19))[:, None]
    loss = ((model(frames, use_truth=mask) - frames[:, 1:]) ** 2).sum((2, 3, 4)).mean()     # 20 frames; then backward
"""

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VARIANTS = {
    "full": "ConvLSTM without peepholes, the baseline of all later papers",
    "peephole": "with the peepholes of Shi et al. 2015: the gates also see the cell state",
}
DEFAULT_SETUP = "patch4"
NETWORK = {
    "patch4": dict(patch=4, layers=4, hidden=64, kernel=5),
    "fullres": dict(patch=1, layers=6, hidden=32, kernel=3),
}
# How the papers train it. `sampling` is the part of the iterations over which ε falls from 1 to 0 (50,000 of 80,000 in
# PredRNN's released code, all in MS-LSTM's); `reverse`: every batch once more, backwards in time (released code);
# `epochs` stands where the paper counts them instead of iterations; `data` overrides for one dataset.
TRAINING = {
    "patch4": dict(optimizer="adam", lr=1e-3, batch=8, iterations=80_000, loss="l2", sampling=0.625, reverse=True,
                   data={"kth": dict(loss="l1+l2"), "taxibj": dict(patch=2), "typhoon": dict(iterations=100_000)}),
    "fullres": dict(optimizer="adam", lr=3e-4, batch=4, epochs=40, loss="l1+l2", sampling=1.0, reverse=False,
                    data={"taxibj": dict(epochs=15), "kth": dict(epochs=20), "germany": dict(epochs=20)}),
}
# What papers report for this model: figures as they print them, `mse` and the like averaged over the forecast, or,
# where `over` says so, over all T - 1 predictions (MS-LSTM's released code).
PUBLISHED = [
    dict(variant="full", setup="patch4", data="moving_mnist", source="CMS-LSTM, Table 3",
         psnr=18.523, ssim=0.877, mse=70.4, mae=115.9),
    dict(variant="full", setup="patch4", data="typhoon", source="MoDeRNN, Table 2",
         psnr=26.353, ssim=0.851, mse=10.43, mae=119.6),
    dict(variant="full", setup="fullres", data="moving_mnist", source="MS-LSTM, Tables 1-3", over="all",
         ssim=0.810, mse=90.36, mae=142.5, params="0.4M", macs="34.4G"),
    dict(variant="full", setup="fullres", data="taxibj", source="MS-LSTM, Tables 4-5",
         mse_frames=[0.199, 0.268, 0.315, 0.356], params="0.4M", macs="3.2G"),
    dict(variant="full", setup="fullres", data="kth", source="MS-LSTM, Table 6", params="0.4M", macs="137.7G"),
    dict(variant="full", setup="fullres", data="germany", source="MS-LSTM, Tables 7-8", params="0.4M", macs="100.3G",
         csi=[0.341, 0.199, 0.079], hss=[0.490, 0.315, 0.138]),
]


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


class ConvLSTMCell(nn.Module):
    """One ConvLSTM layer, Eq. 2.

    Args: channels of the input and of the hidden state, the gates' kernel size, the (H, W) of the feature maps, whether
    LayerNorm is used (`patch4`), whether peepholes are.
    Called with x (B, inputs, H, W), h and c (B, hidden, H, W); returns the new h and c.
    """

    def __init__(self, inputs, hidden, kernel, size, norm, peephole=False):
        super().__init__()
        self.x2h = conv(inputs, 4 * hidden, kernel, size, norm)   # W_*x and a bias, for i, f, g, o in this order
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_*h
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: cells start by remembering
        # W_ci, W_cf, W_co of Eq. 3; zero at the start, so that both variants start as the same network
        self.peephole = nn.Parameter(torch.zeros(3, hidden, *size)) if peephole else None

    def forward(self, x, h, c):
        # Eq. 2   i = σ(W_ix * X_t + W_ih * H_{t-1})          f = σ(W_fx * X_t + W_fh * H_{t-1})
        #         g = tanh(W_gx * X_t + W_gh * H_{t-1})       o = σ(W_ox * X_t + W_oh * H_{t-1})
        # One convolution of X_t and one of H_{t-1} serve all four; each gate has a bias, which Eq. 2 leaves out.
        gates = (self.x2h(x) + self.h2h(h)).to(c.dtype)           # (B, 4·hidden, H, W); c stays fp32 under autocast
        i, f, g, o = gates.chunk(4, 1)                            # each (B, hidden, H, W)
        if self.forget_offset:
            f = f + self.forget_offset
        if self.peephole is not None:                             # Eq. 3   + W_ci ∘ C_{t-1}, + W_cf ∘ C_{t-1}
            i, f = i + self.peephole[0] * c, f + self.peephole[1] * c
        # Eq. 2   C_t = f ∘ C_{t-1} + i ∘ g
        c = self.norm_c(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g))
        if self.peephole is not None:                             # Eq. 3   + W_co ∘ C_t: o sees the new cell
            o = o + self.peephole[2] * c
        # Eq. 2   H_t = o ∘ tanh(C_t)
        return (torch.sigmoid(o) * torch.tanh(c)).to(x.dtype), c  # H is read by convolutions: theirs is its type


class ConvLSTM(nn.Module):
    """A stack of ConvLSTM cells that reads frames and predicts the next one.

    Args:
        channels: of a frame. size: of a frame, an int or (H, W), each side divisible by the patch.
        setup: "patch4" or "fullres". variant: a key of VARIANTS.
        hidden, layers, kernel (odd), patch: override the set-up.
    Attributes: `recompute`: set it to True to keep, of six steps in seven, only the states for the backward pass, and
    compute the rest again there: less memory, more time, same gradients.
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
        self.one_size = setup == "patch4" or variant == "peephole"    # weights of the shape of the maps
        self.check((1, 1, channels, height, width))

        norm, tokens, grid = setup == "patch4", channels * patch**2, (height // patch, width // patch)
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(
            ConvLSTMCell(hidden, hidden, kernel, grid, norm, variant == "peephole") for _ in range(layers))
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

    def step(self, x, state):
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, [(h, c) of every layer] -> those of the next frame."""
        h, new_state = self.embed(x), []
        for cell, (h_before, c_before) in zip(self.cells, state):
            h, c = cell(h, h_before, c_before)
            new_state.append((h, c))
        return self.output(h).to(x.dtype), new_state

    def forward(self, frames, horizon=0, use_truth=None, extras=False):
        """Read frames, predict each next one, then `horizon` further ones from the model's own predictions.

        Args:
            frames: (B, T, C, H, W), values in [0, 1].
            horizon: how many frames to forecast beyond frame T.
            use_truth: training with scheduled sampling: bool (T-1, B); where True, step t reads the true frame t, where
                False the last prediction. Row 0 is taken as True. None: every observed frame is read.
            extras: True, "loss" or query points [(y, x), …]: also return a dict. This model adds nothing to the loss
                and has no attention; except for "loss" the dict holds "layers", one (B, steps, hidden, H/p, W/p) a
                layer: its hidden states.
        Returns: predictions (B, T-1+horizon, C, H, W), not clamped; entry k predicts frame k + 1. With extras: a pair.
        """
        self.check(frames.shape, horizon)
        truth = F.pixel_unshuffle(frames, self.patch)             # (B, T, p²C, H/p, W/p)
        B, T, _, height, width = truth.shape
        zero = truth.new_zeros(B, self.hidden, height, width)
        state = [(zero, zero) for _ in self.cells]                # states start at zero
        x, predictions, layers = truth[:, 0], [], [[] for _ in self.cells]
        for t in range(T - 1 + horizon):
            if 0 < t < T:                                         # beyond the observed frames x is the last prediction
                x = truth[:, t] if use_truth is None else torch.where(
                    use_truth[t, :, None, None, None], truth[:, t], x)
            if self.recompute and t % 7 and torch.is_grad_enabled():   # every seventh keeps all: faster
                x, state = checkpoint(self.step, x, state, use_reentrant=False, preserve_rng_state=False)
            else:
                x, state = self.step(x, state)                    # x (B, p²C, H/p, W/p)
            predictions.append(x)
            if extras and extras != "loss":
                for kept, (h, _) in zip(layers, state):
                    kept.append(h)
        predictions = F.pixel_shuffle(torch.stack(predictions, 1), self.patch)   # (B, T-1+horizon, C, H, W)
        if not extras:
            return predictions
        return predictions, {} if extras == "loss" else {"layers": [torch.stack(kept, 1) for kept in layers]}

    def truth_probability(self, iteration, iterations, frames_in, steps):
        """Scheduled sampling (Bengio et al. 2015): with which probability each of `steps` steps reads the true frame.

        1 inside the `frames_in` observed frames; beyond them ε, which falls linearly from 1 to 0.
        """
        epsilon = max(0.0, 1 - iteration / (TRAINING[self.setup]["sampling"] * iterations))
        return [1.0] * frames_in + [epsilon] * (steps - frames_in)


MODEL = ConvLSTM

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model, frames = ConvLSTM(setup=setup), torch.empty(1, 20, 1, 64, 64)
            shape = tuple(model(frames).shape)
        print(f"ConvLSTM, {setup}: {tuple(frames.shape)} -> {shape}, {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {counter.get_total_flops() / 2e9:.1f}G multiply-accumulates a sequence")
