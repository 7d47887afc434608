"""MS-LSTM: ConvLSTMs at several scales in space, a mirrored pyramid of layers, and in time, two kernels per cell.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    Z. Ma, H. Zhang, J. Liu.
    "MS-LSTM: Exploring Spatiotemporal Multiscale Representations in Video Prediction Domain." 2023.

Deeper and wider ConvRNNs predict better and cost more. MS-LSTM sees further at a lower cost. In space, the first half
of the layers pools from layer to layer and the second half mirrors it, with skip connections as in a U-Net: most
layers work on small maps, where a 3×3 kernel covers much. In time, its cell (MK-LSTM) is two ConvLSTMs, 3×3 for slower
and 5×5 for faster motion, each with a cell state of its own, that share one output gate.

    full size  frame t ─embed─▶ L0 ──────────────────── skip ────────────────────▶ + ─▶ L5 ─output─▶ frame t + 1
    ½                           └─ pool ─▶ L1 ─────── skip ────────▶ + ─▶ L4 ─ ×2 ─┘
    ¼                                      └─ pool ─▶ L2 ─▶ L3 ─ ×2 ─┘

    Each layer, L0 to L5, hands its H, C and C̃ to itself from step t to t + 1.

    model = MSLSTM(channels=1, size=64)                         # variants and set-ups: at the end of this file
    forecast = model(frames, horizon=10)[:, -10:]               # (B, T, C, H, W) in [0, 1] -> the 10 frames that follow

Where the paper is silent, a comment at the line says what is done here. Its equations have no biases.
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
    after every gate convolution and on the cell state (`patch4`)."""

    states = 2                                                    # h and c

    def __init__(self, inputs, hidden, kernel, size, norm):
        super().__init__()
        self.x2h = conv(inputs, 4 * hidden, kernel, size, norm)   # W_*x and a bias, for i, f, g, o
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_*h
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: cells start by remembering

    def forward(self, x, h, c):
        # Eq. 2   i = σ(W_ix * X_t + W_ih * H_{t-1})          f = σ(W_fx * X_t + W_fh * H_{t-1})
        #         g = tanh(W_gx * X_t + W_gh * H_{t-1})       o = σ(W_ox * X_t + W_oh * H_{t-1})
        # One convolution of each serves all four.
        i, f, g, o = (self.x2h(x) + self.h2h(h)).to(c.dtype).chunk(4, 1)                # each (B, hidden, H, W)
        i, f, g, o = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g), torch.sigmoid(o)
        c = self.norm_c(f * c + i * g)                            # Eq. 2   C_t = f ∘ C_{t-1} + i ∘ g
        h = o * torch.tanh(c)                                     # Eq. 2   H_t = o ∘ tanh(C_t)
        return h.to(x.dtype), c                                   # h in the convolutions' dtype: bf16 under autocast


class MKLSTMCell(nn.Module):
    """One MK-LSTM layer, Eq. 3: two ConvLSTMs with kernels and cell states of their own, and one output gate.

    As ConvLSTMCell, with c_wide, the paper's C̃, as a third state. `_wide` marks the larger kernel, kernel + 2: the
    paper's W' and 5×5."""

    states = 3                                                    # h, c and c_wide

    def __init__(self, inputs, hidden, kernel, size, norm):
        super().__init__()
        wide = kernel + 2
        self.x2h = conv(inputs, 4 * hidden, kernel, size, norm)   # W_*x, for i, f, g and the 3×3 part of o
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_*h
        self.c2o = conv(hidden, hidden, kernel, size, norm)       # W_oc
        self.x2h_wide = conv(inputs, 4 * hidden, wide, size, norm)    # W'_*x
        self.h2h_wide = conv(hidden, 4 * hidden, wide, size, norm)    # W'_*h
        self.c2o_wide = conv(hidden, hidden, wide, size, norm)    # W'_oc
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.norm_c_wide = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.mix = nn.Conv2d(2 * hidden, hidden, 1, bias=not norm)    # W_1×1, which has no LayerNorm
        self.forget_offset = 1.0 if norm else 0.0

    def forward(self, x, h, c, c_wide):
        # Eq. 3   i_3×3 = σ(W_ix * X_t + W_ih * H_{t-1})          f_3×3 = σ(W_fx * X_t + W_fh * H_{t-1})
        #         g_3×3 = tanh(W_gx * X_t + W_gh * H_{t-1})       i_5×5, f_5×5, g_5×5 alike, with W'
        i, f, g, o = (self.x2h(x) + self.h2h(h)).to(c.dtype).chunk(4, 1)                # each (B, hidden, H, W)
        i, f, g = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g)
        c = self.norm_c(f * c + i * g)                            # Eq. 3   C_t = f_3×3 ∘ C_{t-1} + i_3×3 ∘ g_3×3
        i, f, g, o_wide = (self.x2h_wide(x) + self.h2h_wide(h)).to(c.dtype).chunk(4, 1)
        i, f, g = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g)
        c_wide = self.norm_c_wide(f * c_wide + i * g)             # Eq. 3   C̃_t = f_5×5 ∘ C̃_{t-1} + i_5×5 ∘ g_5×5
        # Eq. 3   o_t = σ(W_ox * X_t + W_oh * H_{t-1} + W_oc * C_t + W'_ox * X_t + W'_oh * H_{t-1} + W'_oc * C̃_t)
        # 3×3 and 5×5 could be merged into one kernel. They stay two, as printed and as the paper counts its cost.
        o = torch.sigmoid(o + self.c2o(c) + o_wide + self.c2o_wide(c_wide))
        h = o * torch.tanh(self.mix(torch.cat([c, c_wide], 1)))   # Eq. 3   H_t = o_t ∘ tanh(W_1×1 * [C_t, C̃_t])
        return h.to(x.dtype), c, c_wide


class MSLSTM(nn.Module):
    """Recurrent cells in a mirrored pyramid (or a plain stack) that read frames and predict the next one.

    channels, size (int or (H, W)): of a frame, each side a multiple of the patch times the poolings: of 4 under
    `fullres`, 8 under `patch4`. setup: "patch4" or "fullres". variant: a key of VARIANTS. hidden, layers (even in a
    pyramid), kernel (odd), patch: in place of the set-up's. ValueError for what cannot be built.
    cell: a class in place of the variant's cell (§4.1: "can be replaced by any existing model block"). It is built as
    cell(inputs, hidden, kernel, (H, W), norm) and called as cell(x, *state): as many tensors (B, hidden, H, W) as its
    attribute `states` says. It returns the new ones as a tuple, first the hidden state, which the next layer reads."""

    def __init__(self, channels=1, size=64, setup="fullres", variant="full",
                 hidden=None, layers=None, kernel=None, patch=None, cell=None):
        super().__init__()
        if setup not in NETWORK or variant not in VARIANTS:
            raise ValueError(f"setup {setup!r}, variant {variant!r}: choose from {[*NETWORK]} and {[*VARIANTS]}")
        overrides = dict(hidden=hidden, layers=layers, kernel=kernel, patch=patch)
        network = NETWORK[setup] | {name: value for name, value in overrides.items() if value is not None}
        hidden, layers, kernel, patch = (network[name] for name in overrides)
        if min(network.values()) < 1 or kernel % 2 == 0:
            raise ValueError(f"{network}: all of them must be positive, and the kernel odd")
        pyramid = variant in ("sms", "full")
        if pyramid and layers % 2:
            raise ValueError(f"layers={layers}: a pyramid needs an even number; 'convlstm' and 'tms' take any")
        height, width = (size, size) if isinstance(size, int) else size
        self.channels, self.size, self.setup, self.hidden, self.patch = channels, (height, width), setup, hidden, patch
        # The maps of a layer are 2^depth times smaller than the tokens: 0, 1, 2, 2, 1, 0 for six layers.
        self.depths = [min(layer, layers - 1 - layer) if pyramid else 0 for layer in range(layers)]
        self.unit = patch * 2 ** max(self.depths)
        self.one_size = setup == "patch4"                         # LayerNorm: a checkpoint fits one frame size only
        self.check((1, 1, channels, height, width))

        norm, tokens = setup == "patch4", channels * patch**2
        cell = cell or (MKLSTMCell if variant in ("tms", "full") else ConvLSTMCell)
        grids = [(height // patch // 2**depth, width // patch // 2**depth) for depth in self.depths]
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(cell(hidden, hidden, kernel, grid, norm) for grid in grids)
        self.output = nn.Conv2d(hidden, tokens, 1)
        if not norm:                                              # a tenth faster; LayerNorm would have to copy
            self.to(memory_format=torch.channels_last)

    def check(self, shape, horizon=1):
        """Raise ValueError for frames of a shape (B, T, C, H, W) that this model cannot read."""
        if len(shape) != 5 or shape[2] != self.channels or min(shape) < 1 or shape[1] + horizon < 2:
            raise ValueError(f"frames {tuple(shape)}, horizon {horizon}: they must be (B, T, {self.channels}, H, W), "
                             "none of these 0, and T + horizon at least 2")
        height, width = shape[3:]
        if height % self.unit or width % self.unit:
            raise ValueError(f"frames of {height}×{width}: sides must be multiples of {self.unit}, patch × poolings")
        if self.one_size and (height, width) != self.size:
            raise ValueError(f"frames of {height}×{width}: weights fit one size; build with size=({height}, {width})")

    def step(self, x, state):
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, [(h, c, …) per layer] -> those of the next frame."""
        h, new_state, depth_below = self.embed(x), [], 0
        for cell, before, depth in zip(self.cells, state, self.depths):
            if depth > depth_below:                               # §4.1: max pooling in the encoder
                h = F.max_pool2d(h, 2)                            # (B, hidden, h/2, w/2)
            if depth < depth_below:                               # bilinear up-sampling in the decoder, and the skip
                h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
                h = h + new_state[depth][0]                       # (B, hidden, 2h, 2w)
            new_state.append(cell(h, *before))
            h, depth_below = new_state[-1][0], depth
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
        state, x, predictions = [], truth[:, 0], []
        for cell, depth in zip(self.cells, self.depths):
            zero = truth.new_zeros(B, self.hidden, height // 2**depth, width // 2**depth)
            state.append((zero,) * cell.states)
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


# The rows of Table 1.
VARIANTS = {
    "convlstm": "ConvLSTM cells at full size: depth is the only source of scales",
    "sms": "SMS-LSTM: ConvLSTM cells in the mirrored pyramid",
    "tms": "TMS-LSTM: MK-LSTM cells at full size",
    "full": "MS-LSTM: MK-LSTM cells in the mirrored pyramid",
}
DEFAULT_SETUP = "fullres"
# fullres: the paper's. patch4: that of the SA-ConvLSTM, CMS-LSTM and MoDeRNN papers, with 4×4 patches and LayerNorm.
NETWORK = {
    "patch4": dict(patch=4, layers=4, hidden=64, kernel=3),
    "fullres": dict(patch=1, layers=6, hidden=32, kernel=3),
}
# How it is trained: `fullres` as in §5.1, `patch4` as in PredRNN's released code. `sampling` is the part of the
# iterations over which ε falls from 1 to 0 (released code); `reverse`: every batch once more, backwards in time.
# `epochs` stands where the paper counts them instead of iterations; `data` overrides for one dataset.
TRAINING = {
    "patch4": dict(optimizer="adam", lr=1e-3, batch=8, iterations=80_000, loss="l2", sampling=0.625, reverse=True,
                   data={"kth": dict(loss="l1+l2"), "taxibj": dict(patch=2), "typhoon": dict(iterations=100_000)}),
    "fullres": dict(optimizer="adam", lr=3e-4, batch=4, epochs=40, loss="l1+l2", sampling=1.0, reverse=False,
                    data={"taxibj": dict(epochs=15), "kth": dict(epochs=20), "germany": dict(epochs=20)}),
}
# What the paper reports: figures as printed, averaged over the forecast, or, where `over` says so, over all T - 1
# predictions (released code). `note`: what the convolutions count to where that is not the `macs` printed, and why.
MNIST = dict(setup="fullres", data="moving_mnist", source="MS-LSTM, Table 1, all")
FULL = dict(variant="full", setup="fullres", params="1.9M")
PUBLISHED = [
    dict(variant="convlstm", **MNIST, mse=90.36, params="0.4M", macs="34.4G", memory="3.6G"),
    dict(variant="sms", **MNIST, mse=63.90, params="0.4M", macs="15.1G", memory="2.7G"),
    dict(variant="tms", **MNIST, mse=67.70, params="1.9M", macs="147.3G", memory="9.5G"),
    dict(variant="full", **MNIST | dict(source="MS-LSTM, Tables 1-3, all"), ssim_gaussian=0.879, mse=52.63, mae=97.9,
         params="1.9M", macs="64.5G", memory="5.2G", note="64.4G without the up-sampling, 64.5G with it"),
    dict(**FULL, data="taxibj", source="MS-LSTM, Tables 4-5", mse_frames=[0.141, 0.173, 0.199, 0.230],
         macs="5.9G", memory="2.3G"),
    dict(**FULL, data="kth", source="MS-LSTM, Table 6", macs="257.9G", memory="14.5G",
         note="257.7G without the up-sampling, 257.9G with it"),
    dict(**FULL, data="germany", source="MS-LSTM, Tables 7-8", csi=[0.405, 0.243, 0.096], hss=[0.562, 0.378, 0.164],
         macs="260.6G", memory="14.8G",
         note="187.8G at 180×180, the size of the table's other rows; 260.6G is the cost at 212×212"),
]

MODEL = MSLSTM

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        for variant, meaning in VARIANTS.items():
            with torch.device("meta"), FlopCounterMode(display=False) as counter:     # on "meta" nothing is computed
                model = MODEL(setup=setup, variant=variant)
                model(torch.empty(1, 2, 1, 64, 64))               # one of the 19 steps of 20 frames; all cost the same
            parameters, macs = sum(p.numel() for p in model.parameters()), 19 * counter.get_total_flops() / 2e9
            print(f"{setup:8} {variant:18} {parameters:>10,} parameters {macs:7.1f}G multiply-accumulates   {meaning}")
