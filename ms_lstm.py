"""MS-LSTM: a recurrent network that sees several scales in space (a mirrored pyramid) and in time (two kernels a cell).

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    Z. Ma, H. Zhang, J. Liu.
    "MS-LSTM: Exploring Spatiotemporal Multiscale Representations in Video Prediction Domain." 2023.

Deeper and wider ConvRNNs predict better and cost more. MS-LSTM looks further for less. In space, the first half of the
layers pools between its layers and the second half mirrors it back, with skip connections as in a U-Net: most layers
work on small maps, where a 3×3 kernel covers much. In time, the cell (MK-LSTM) is two ConvLSTMs with kernels 3×3 and
5×5 and a cell state each, one for slower and one for faster motion, behind one common output gate.

    full size    frame t ──patch──embed──▶ L0 ─────────────── skip ────────────────▶ + ──▶ L5 ──output──unpatch──▶ t + 1
                                           └─pool─▶ L1 ────── skip ──────▶ + ──▶ L4 ─×2─┘
    ½                                               └─pool─▶ L2 ──▶ L3 ─×2─┘
    ¼                                                                      (each layer keeps H, C, C̃ from t to t + 1)

What this file decides where the paper is silent, at the line concerned:
  - The equations have the paper's numbers and no biases, as there. `fullres` (the paper's set-up) gives every
    convolution one, no normalisation, and its weights fit any size that the poolings divide. `patch4` (the SA-ConvLSTM,
    CMS-LSTM and MoDeRNN papers) has LayerNorm over all of (C, H, W) after every 3×3 and 5×5 convolution and on both
    cell states. Its weights have that shape, so SUCH A CHECKPOINT FITS ONE FRAME SIZE ONLY.
  - Any even number of layers mirrors in the same way; four (`patch4`) pool once: 16, 8, 8, 16 tokens a side.
  - `kernel` is the kernel of ConvLSTM and the smaller one of MK-LSTM, whose other is 2 wider: 3 gives 3×3 and 5×5.
  - §4.1: "the RNN unit can be replaced by any existing model block": pass its class as `cell`, see MSLSTM.

    model = MSLSTM(channels=1, size=64)                         # fullres; setup="patch4" for the other one
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
    "convlstm": "ConvLSTM cells at full size: depth is the only source of scales",
    "sms": "SMS-LSTM: ConvLSTM cells in the mirrored pyramid",
    "tms": "TMS-LSTM: MK-LSTM cells at full size",
    "full": "MS-LSTM: MK-LSTM cells in the mirrored pyramid",
}
DEFAULT_SETUP = "fullres"
NETWORK = {
    "patch4": dict(patch=4, layers=4, hidden=64, kernel=3),
    "fullres": dict(patch=1, layers=6, hidden=32, kernel=3),
}
# How it is trained: §5.1, and for `sampling`, the part of the iterations over which ε falls from 1 to 0, the released
# code. `epochs` stands where the paper counts them instead of iterations; `data` overrides for one dataset. `patch4` is
# not this paper's: there the model is trained as PredRNN's released code trains (ε: 50,000 of 80,000; `reverse`: every
# batch once more, backwards in time).
TRAINING = {
    "patch4": dict(optimizer="adam", lr=1e-3, batch=8, iterations=80_000, loss="l2", sampling=0.625, reverse=True,
                   data={"kth": dict(loss="l1+l2"), "taxibj": dict(patch=2), "typhoon": dict(iterations=100_000)}),
    "fullres": dict(optimizer="adam", lr=3e-4, batch=4, epochs=40, loss="l1+l2", sampling=1.0, reverse=False,
                    data={"taxibj": dict(epochs=15), "kth": dict(epochs=20), "germany": dict(epochs=20)}),
}
# What the paper reports: figures as printed, `mse` and the like averaged over the forecast, or, where `over` says so,
# over all T - 1 predictions (released code). `note`: what the convolutions count to where that is not the `macs`
# printed, and why.
PUBLISHED = [
    dict(variant="convlstm", setup="fullres", data="moving_mnist", source="MS-LSTM, Table 1", over="all",
         mse=90.36, params="0.4M", macs="34.4G", memory="3.6G"),
    dict(variant="sms", setup="fullres", data="moving_mnist", source="MS-LSTM, Table 1", over="all",
         mse=63.90, params="0.4M", macs="15.1G", memory="2.7G"),
    dict(variant="tms", setup="fullres", data="moving_mnist", source="MS-LSTM, Table 1", over="all",
         mse=67.70, params="1.9M", macs="147.3G", memory="9.5G"),
    dict(variant="full", setup="fullres", data="moving_mnist", source="MS-LSTM, Tables 1-3", over="all",
         ssim=0.879, mse=52.63, mae=97.9, params="1.9M", macs="64.5G", memory="5.2G",
         note="64.4G without the up-sampling, 64.5G with it"),
    dict(variant="full", setup="fullres", data="taxibj", source="MS-LSTM, Tables 4-5",
         mse_frames=[0.141, 0.173, 0.199, 0.230], params="1.9M", macs="5.9G", memory="2.3G"),
    dict(variant="full", setup="fullres", data="kth", source="MS-LSTM, Table 6", params="1.9M", macs="257.9G",
         memory="14.5G", note="257.7G without the up-sampling, 257.9G with it"),
    dict(variant="full", setup="fullres", data="germany", source="MS-LSTM, Tables 7-8", params="1.9M", macs="260.6G",
         memory="14.8G", csi=[0.405, 0.243, 0.096], hss=[0.562, 0.378, 0.164],
         note="187.8G at 180×180, the size of the table's other rows; 260.6G is the cost at 212×212"),
]


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


class ConvLSTMCell(nn.Module):
    """One ConvLSTM layer, Eq. 2.

    Args: channels of the input and of the hidden state, the gates' kernel size, the (H, W) of the feature maps, whether
    LayerNorm is used (`patch4`).
    Called with x (B, inputs, H, W), h and c (B, hidden, H, W); returns the new h and c.
    """

    states = 2

    def __init__(self, inputs, hidden, kernel, size, norm):
        super().__init__()
        self.x2h = conv(inputs, 4 * hidden, kernel, size, norm)   # W_*x and a bias, for i, f, g, o in this order
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_*h
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: cells start by remembering

    def forward(self, x, h, c):
        # Eq. 2   i = σ(W_ix * X_t + W_ih * H_{t-1})          f = σ(W_fx * X_t + W_fh * H_{t-1})
        #         g = tanh(W_gx * X_t + W_gh * H_{t-1})       o = σ(W_ox * X_t + W_oh * H_{t-1})
        # One convolution of X_t and one of H_{t-1} serve all four.
        gates = (self.x2h(x) + self.h2h(h)).to(c.dtype)           # (B, 4·hidden, H, W); c stays fp32 under autocast
        i, f, g, o = gates.chunk(4, 1)                            # each (B, hidden, H, W)
        if self.forget_offset:
            f = f + self.forget_offset
        # Eq. 2   C_t = f ∘ C_{t-1} + i ∘ g
        c = self.norm_c(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g))
        # Eq. 2   H_t = o ∘ tanh(C_t)
        return (torch.sigmoid(o) * torch.tanh(c)).to(x.dtype), c  # H is read by convolutions: theirs is its type


class MKLSTMCell(nn.Module):
    """One MK-LSTM layer, Eq. 3: two ConvLSTMs with different kernels and own cell states, and one output gate.

    Args: as ConvLSTMCell's; the kernels are `kernel` and `kernel` + 2. In the names below `_wide` marks what belongs to
    the larger one, the paper's W', C̃ and index 5×5; the index 3×3 is left out.
    Called with x (B, inputs, H, W), h, c and c_wide (B, hidden, H, W); returns the new h, c and c_wide.
    """

    states = 3

    def __init__(self, inputs, hidden, kernel, size, norm):
        super().__init__()
        wide = kernel + 2
        self.x2h = conv(inputs, 4 * hidden, kernel, size, norm)   # W_*x, for i, f, g (3×3) and the 3×3 part of o
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_*h
        self.c2o = conv(hidden, hidden, kernel, size, norm)       # W_oc
        self.x2h_wide = conv(inputs, 4 * hidden, wide, size, norm)
        self.h2h_wide = conv(hidden, 4 * hidden, wide, size, norm)
        self.c2o_wide = conv(hidden, hidden, wide, size, norm)
        self.norm_c = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.norm_c_wide = nn.LayerNorm([hidden, *size]) if norm else nn.Identity()
        self.mix = nn.Conv2d(2 * hidden, hidden, 1, bias=not norm)  # W_1×1, which has no LayerNorm
        self.forget_offset = 1.0 if norm else 0.0

    def forward(self, x, h, c, c_wide):
        # Eq. 3   i_3×3 = σ(W_ix * X_t + W_ih * H_{t-1})         i_5×5 = σ(W'_ix * X_t + W'_ih * H_{t-1})
        #         f_3×3 = σ(W_fx * X_t + W_fh * H_{t-1})         f_5×5 = σ(W'_fx * X_t + W'_fh * H_{t-1})
        #         g_3×3 = tanh(W_gx * X_t + W_gh * H_{t-1})      g_5×5 = tanh(W'_gx * X_t + W'_gh * H_{t-1})
        # The 3×3 and 5×5 parts of o are linear and could be one 5×5 kernel. They stay two, as printed and as counted in
        # the paper.
        i, f, g, o = (self.x2h(x) + self.h2h(h)).to(c.dtype).chunk(4, 1)          # each (B, hidden, H, W)
        i_wide, f_wide, g_wide, o_wide = (self.x2h_wide(x) + self.h2h_wide(h)).to(c.dtype).chunk(4, 1)
        if self.forget_offset:
            f, f_wide = f + self.forget_offset, f_wide + self.forget_offset
        # Eq. 3   C_t = f_3×3 ∘ C_{t-1} + i_3×3 ∘ g_3×3
        c = self.norm_c(torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g))
        # Eq. 3   C̃_t = f_5×5 ∘ C̃_{t-1} + i_5×5 ∘ g_5×5
        c_wide = self.norm_c_wide(torch.sigmoid(f_wide) * c_wide + torch.sigmoid(i_wide) * torch.tanh(g_wide))
        # Eq. 3   o_t = σ(W_ox * X_t + W_oh * H_{t-1} + W_oc * C_t + W'_ox * X_t + W'_oh * H_{t-1} + W'_oc * C̃_t)
        o = torch.sigmoid(o + o_wide + (self.c2o(c) + self.c2o_wide(c_wide)))
        # Eq. 3   H_t = o_t ∘ tanh(W_1×1 * [C_t, C̃_t])
        h = o * torch.tanh(self.mix(torch.cat([c, c_wide], 1)))
        return h.to(x.dtype), c, c_wide                           # H is read by convolutions: theirs is its type


class MSLSTM(nn.Module):
    """Recurrent cells in a mirrored pyramid (or a plain stack) that read frames and predict the next one.

    Args:
        channels: of a frame. size: of a frame, an int or (H, W), each side divisible by the patch and by the poolings:
            by patch · 2^(layers/2 - 1), which is 4 under `fullres` and 8 under `patch4`.
        setup: "patch4" or "fullres". variant: a key of VARIANTS.
        hidden, layers (even, in a pyramid), kernel (odd), patch: override the set-up.
        cell: a class that replaces the variant's cell. It is built as cell(inputs, hidden, kernel, (H, W), norm), an
            nn.Module with an attribute `states`, the number of its state tensors; called as cell(x, *state), it returns
            the new ones as a tuple, hidden state first: that one goes to the next layer. x is (B, inputs, H, W), each
            state (B, hidden, H, W), zero before the first frame. `norm` is whether the set-up normalises.
    Attributes: `recompute`: set it to True to keep, of six steps in seven, only the states for the backward pass, and
    compute the rest again there: less memory, more time, same gradients.
    Raises ValueError, in one line that names the way out, for what cannot be built and frames it cannot read.
    """

    def __init__(self, channels=1, size=64, setup=DEFAULT_SETUP, variant="full",
                 hidden=None, layers=None, kernel=None, patch=None, cell=None):
        super().__init__()
        for name, value, known in ("setup", setup, NETWORK), ("variant", variant, VARIANTS):
            if value not in known:
                raise ValueError(f"{name} {value!r}: choose from {', '.join(known)}")
        given = dict(hidden=hidden, layers=layers, kernel=kernel, patch=patch)
        network = NETWORK[setup] | {name: value for name, value in given.items() if value is not None}
        hidden, layers, kernel, patch = (network[name] for name in given)
        if min(channels, hidden, layers, kernel, patch) < 1 or kernel % 2 == 0:
            raise ValueError(f"channels, hidden, layers, kernel, patch must be positive and the kernel odd: {network}")
        pyramid = variant in ("sms", "full")
        if pyramid and layers % 2:
            raise ValueError(f"layers={layers} cannot be mirrored: a pyramid needs an even number (as {layers + 1}); "
                             "the variants 'convlstm' and 'tms' take any")
        # The depth of each layer in the pyramid, 0, 1, 2, 2, 1, 0 for six: its maps are 2^depth times smaller.
        depths = [min(layer, layers - 1 - layer) if pyramid else 0 for layer in range(layers)]
        height, width = (size, size) if isinstance(size, int) else size
        self.channels, self.size, self.setup, self.variant = channels, (height, width), setup, variant
        self.hidden, self.patch, self.unit, self.recompute = hidden, patch, patch * 2 ** max(depths), False
        self.pyramid, self.depths = pyramid, depths
        self.one_size = setup == "patch4"                         # LayerNorm: weights of the shape of the maps
        self.check((1, 1, channels, height, width))

        norm, tokens = setup == "patch4", channels * patch**2
        cell = cell or (MKLSTMCell if variant in ("tms", "full") else ConvLSTMCell)
        grids = [(height // patch // 2**depth, width // patch // 2**depth) for depth in depths]
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(cell(hidden, hidden, kernel, grid, norm) for grid in grids)
        self.output = nn.Conv2d(hidden, tokens, 1)
        self.to(memory_format=self.layout)

    @property
    def layout(self):
        """A pixel's channels together in memory: a tenth faster for full frames. LayerNorm would copy."""
        return torch.contiguous_format if self.one_size else torch.channels_last

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
                             f"the patch times all poolings; the nearest sizes: {near}")

    def step(self, x, state):
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, the states of every layer -> those of the next frame."""
        h, new_state, half = self.embed(x).contiguous(memory_format=self.layout), [], len(self.cells) // 2
        for layer, (cell, before) in enumerate(zip(self.cells, state)):
            if self.pyramid and 0 < layer < half:                 # §4.1, Fig. 2: max pooling in the encoder
                h = F.max_pool2d(h, 2)                            # (B, hidden, h/2, w/2)
            if self.pyramid and layer > half:                     # bilinear in the decoder, and the skip connection, +
                h = F.interpolate(h, scale_factor=2, mode="bilinear", align_corners=False)
                h = h + new_state[len(self.cells) - 1 - layer][0]
            new_state.append(cell(h, *before))
            h = new_state[-1][0]                                  # (B, hidden, H/p/2^depth, W/p/2^depth)
        return self.output(h).to(x.dtype).clone(memory_format=torch.contiguous_format), new_state

    def forward(self, frames, horizon=0, use_truth=None, extras=False):
        """Read frames, predict each next one, then `horizon` further ones from the model's own predictions.

        Args:
            frames: (B, T, C, H, W), values in [0, 1].
            horizon: how many frames to forecast beyond frame T.
            use_truth: training with scheduled sampling: bool (T-1, B); where True, step t reads the true frame t, where
                False the last prediction. Row 0 is taken as True. None: every observed frame is read.
            extras: True, "loss" or query points [(y, x), …]: also return a dict. This model adds nothing to the loss
                and has no attention; except for "loss" the dict holds "layers", one (B, steps, hidden, h, w) a layer,
                each at that layer's own resolution: its hidden states, which Fig. 4 and 5 draw.
        Returns: predictions (B, T-1+horizon, C, H, W), not clamped; entry k predicts frame k + 1. With extras: a pair.
        """
        self.check(frames.shape, horizon)
        truth = F.pixel_unshuffle(frames, self.patch)             # (B, T, p²C, H/p, W/p)
        B, T, _, height, width = truth.shape
        state = []                                                # states start at zero
        for cell, depth in zip(self.cells, self.depths):
            zero = truth.new_zeros(B, self.hidden, height // 2**depth, width // 2**depth)
            state.append((zero.contiguous(memory_format=self.layout),) * cell.states)
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
                for kept, (h, *_) in zip(layers, state):
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


MODEL = MSLSTM

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model, frames = MSLSTM(setup=setup), torch.empty(1, 20, 1, 64, 64)
            shape = tuple(model(frames).shape)
        print(f"MS-LSTM, {setup}: {tuple(frames.shape)} -> {shape}, {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {counter.get_total_flops() / 2e9:.1f}G multiply-accumulates a sequence")
