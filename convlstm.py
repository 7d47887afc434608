"""ConvLSTM: an LSTM whose matrix products are convolutions.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    X. Shi, Z. Chen, H. Wang, D.-Y. Yeung, W.-K. Wong, W.-C. Woo.
    "Convolutional LSTM Network: A Machine Learning Approach for Precipitation Nowcasting." NeurIPS 2015.

A fully connected LSTM flattens its input and loses the positions in it. ConvLSTM keeps input, hidden state and cell
state as feature maps and replaces every matrix product by a convolution: each position is updated from its neighbours
one step earlier, so motion becomes a local, translation-invariant rule. The other models extend this cell.

    frame t ──patch──embed──▶ cell 1 ──H──▶ cell 2 ──H──▶ … ──▶ cell L ──output──unpatch──▶ prediction of frame t + 1
                              ↻ H, C        ↻ H, C              ↻ H, C           (each ↻ runs from t to t + 1)

    model = ConvLSTM(channels=1, size=64)                       # variants and set-ups: at the end of this file
    forecast = model(frames, horizon=10)[:, -10:]               # (B, T, C, H, W) in [0, 1] -> the 10 frames that follow
    loss = ((model(frames) - frames[:, 1:]) ** 2).sum((2, 3, 4)).mean()

Eq. 2 is that of the MS-LSTM paper (Z. Ma et al. 2023), in its letters: without peepholes, as in all later papers. Eq. 3
is that of Shi et al., with peepholes.
"""

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


class ConvLSTMCell(nn.Module):
    """One ConvLSTM layer, Eq. 2.

    x (B, inputs, H, W); h and c (B, hidden, H, W) -> the new h and c. size: the (H, W) of the maps. norm: LayerNorm
    after every gate convolution and on the cell state (`patch4`). peephole: the gates also see the cell state, Eq. 3.
    """

    def __init__(self, inputs, hidden, kernel, size, norm, peephole=False):
        super().__init__()
        self.x2h = conv(inputs, 4 * hidden, kernel, size, norm)   # W_ix, W_fx, W_gx, W_ox
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_ih, W_fh, W_gh, W_oh
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: cells start by remembering
        # W_ci, W_cf, W_co of Eq. 3: zero at the start, so that both variants start as the same network.
        self.peephole = nn.Parameter(torch.zeros(3, hidden, *size)) if peephole else None

    def forward(self, x, h, c):
        # Eq. 2   i = σ(W_ix * X_t + W_ih * H_{t-1})          f = σ(W_fx * X_t + W_fh * H_{t-1})
        #         g = tanh(W_gx * X_t + W_gh * H_{t-1})       o = σ(W_ox * X_t + W_oh * H_{t-1})
        # One convolution of each serves all four gates. Each gate has a bias, which Eq. 2 leaves out.
        i, f, g, o = (self.x2h(x) + self.h2h(h)).to(c.dtype).chunk(4, 1)                # each (B, hidden, H, W)
        if self.peephole is not None:
            i = i + self.peephole[0] * c                          # Eq. 3   + W_ci ∘ C_{t-1}
            f = f + self.peephole[1] * c                          # Eq. 3   + W_cf ∘ C_{t-1}
        i, f, g = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g)
        c = self.norm_c(f * c + i * g)                            # Eq. 2   C_t = f ∘ C_{t-1} + i ∘ g
        if self.peephole is not None:
            o = o + self.peephole[2] * c                          # Eq. 3   + W_co ∘ C_t, the new cell state
        h = torch.sigmoid(o) * torch.tanh(c)                      # Eq. 2   H_t = o ∘ tanh(C_t)
        return h.to(x.dtype), c                                   # H in the convolutions' dtype: bf16 under autocast


class ConvLSTM(nn.Module):
    """A stack of ConvLSTM layers that reads frames and predicts the next one.

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
        self.one_size = setup == "patch4" or variant == "peephole"    # weights of the shape of the maps
        self.check((1, 1, channels, height, width))

        norm, tokens, grid = setup == "patch4", channels * patch**2, (height // patch, width // patch)
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(
            ConvLSTMCell(hidden, hidden, kernel, grid, norm, variant == "peephole") for _ in range(layers))
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


VARIANTS = {
    "full": "ConvLSTM without peepholes, the baseline of all later papers",
    "peephole": "with the peepholes of Shi et al. 2015: the gates also see the cell state",
}
DEFAULT_SETUP = "patch4"
# patch4: frames in 4×4 patches, LayerNorm (the SA-ConvLSTM, CMS-LSTM and MoDeRNN papers; what they leave out is from
# PredRNN's and CMS-LSTM's code). fullres: no patches, no LayerNorm (the MS-LSTM paper).
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
FULLRES = dict(variant="full", setup="fullres", params="0.4M")
PUBLISHED = [
    dict(variant="full", setup="patch4", data="moving_mnist", source="CMS-LSTM, Table 3",
         psnr=18.523, ssim=0.877, mse=70.4, mae=115.9),
    dict(variant="full", setup="patch4", data="typhoon", source="MoDeRNN, Table 2",
         psnr=26.353, ssim=0.851, mse=10.43, mae=119.6),
    dict(**FULLRES, data="moving_mnist", source="MS-LSTM, Tables 1-3, all", ssim_gaussian=0.810, mse=90.36,
         mae=142.5, macs="34.4G"),
    dict(**FULLRES, data="taxibj", source="MS-LSTM, Tables 4-5", mse_frames=[0.199, 0.268, 0.315, 0.356], macs="3.2G"),
    dict(**FULLRES, data="kth", source="MS-LSTM, Table 6", macs="137.7G"),
    dict(**FULLRES, data="germany", source="MS-LSTM, Tables 7-8", csi=[0.341, 0.199, 0.079], hss=[0.490, 0.315, 0.138],
         macs="100.3G"),
]

MODEL = ConvLSTM

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        for variant, meaning in VARIANTS.items():
            with torch.device("meta"), FlopCounterMode(display=False) as counter:     # on "meta" nothing is computed
                model = MODEL(setup=setup, variant=variant)
                model(torch.empty(1, 2, 1, 64, 64))               # one of the 19 steps of 20 frames; all cost the same
            parameters, macs = sum(p.numel() for p in model.parameters()), 19 * counter.get_total_flops() / 2e9
            print(f"{setup:8} {variant:18} {parameters:>10,} parameters {macs:7.1f}G multiply-accumulates   {meaning}")
