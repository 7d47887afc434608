"""PredRNN: a second memory, which climbs the layers and zigzags through time. And PredRNN-V2, which trains it better.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    Y. Wang, M. Long, J. Wang, Z. Gao, P. S. Yu. "PredRNN: Recurrent Neural Networks for Predictive Learning using
    Spatiotemporal LSTMs." NeurIPS 2017.
    Y. Wang, H. Wu, J. Zhang, Z. Gao, J. Wang, P. S. Yu, M. Long. "PredRNN: A Recurrent Neural Network for
    Spatiotemporal Predictive Learning." TPAMI 2022 (PredRNN-V2).

In a stack of ConvLSTMs every layer keeps its cell state C to itself, so what the top layer learns about a frame never
reaches the bottom layer at the next step. PredRNN adds a memory M that all layers share: they update it one after the
other, from bottom to top, and the top layer hands it to the bottom layer of the next step. PredRNN-V2 adds a loss that
keeps C and M from learning the same, and scheduled sampling inside the observed frames too.

      cell L ════ M ═════╗             cell L ════ M ═════▶ …      the top layer's H gives the prediction
         ▲ H, M          ║                ▲ H, M
         ⋮               ║                ⋮                        each layer also hands its own H and C
         ▲ H, M          ║                ▲ H, M                   to itself, from step t to t + 1
      cell 1             ╚═════ M ═════▶ cell 1
         ▲                                ▲
      frame t                          frame t + 1

    model = PredRNN(channels=1, size=64, variant="v2")          # variants and set-ups: at the end of this file
    forecast = model(frames, horizon=10)[:, -10:]               # (B, T, C, H, W) in [0, 1] -> the 10 frames that follow
    predictions, decoupling = model(frames, use_truth=mask, with_loss=True)      # mask: bool (19, B)
    loss = ((predictions - frames[:, 1:]) ** 2).sum((2, 3, 4)).mean() + decoupling        # 20 frames; then backward
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


class STLSTMCell(nn.Module):
    """One ST-LSTM layer, (a)-(d), of this file's numbering; l is the layer, X_t = H^{l-1}_t above the first.

    x (B, inputs, H, W); h and c of one step earlier, m of the layer below, (B, hidden, H, W) -> the new h, c and m, and
    their increments i ∘ g and i' ∘ g'. size: the (H, W) of the maps. norm: LayerNorm after each gate convolution."""

    def __init__(self, inputs, hidden, kernel, size, norm):
        super().__init__()
        self.x2h = conv(inputs, 7 * hidden, kernel, size, norm)   # W_x*, W'_x*: for i, f, g, i', f', g', o
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_h*: for i, f, g, o
        self.m2h = conv(hidden, 3 * hidden, kernel, size, norm)   # W_m*: for i', f', g'
        # W_co and W_mo as one convolution of [C, M], as in the authors' code; MS-LSTM's has two, and one more bias.
        self.cm2o = conv(2 * hidden, hidden, kernel, size, norm)
        self.mix = nn.Conv2d(2 * hidden, hidden, 1, bias=not norm)                    # W_1×1
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: memories start by remembering

    def forward(self, x, h, c, m):
        # (a)  i = σ(W_xi * X_t + W_hi * H^l_{t-1} + b_i)          f = σ(W_xf * X_t + W_hf * H^l_{t-1} + b_f)
        #      g = tanh(W_xg * X_t + W_hg * H^l_{t-1} + b_g)
        n = c.shape[1]                                            # hidden
        x_c, x_m, x_o = self.x2h(x).split((3 * n, 3 * n, n), 1)
        h_c, h_o = self.h2h(h).split((3 * n, n), 1)
        i, f, g = (x_c + h_c).to(c.dtype).chunk(3, 1)             # each (B, hidden, H, W)
        i, f, g = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g)
        delta_c = i * g
        c = f * c + delta_c                                       # (a)  C^l_t = f ∘ C^l_{t-1} + i ∘ g
        # (b)  i' = σ(W'_xi * X_t + W_mi * M^{l-1}_t + b'_i)       f' = σ(W'_xf * X_t + W_mf * M^{l-1}_t + b'_f)
        #      g' = tanh(W'_xg * X_t + W_mg * M^{l-1}_t + b'_g)
        i, f, g = (x_m + self.m2h(m)).to(c.dtype).chunk(3, 1)     # i', f', g'
        i, f, g = torch.sigmoid(i), torch.sigmoid(f + self.forget_offset), torch.tanh(g)
        delta_m = i * g
        m = f * m + delta_m                                       # (b)  M^l_t = f' ∘ M^{l-1}_t + i' ∘ g'
        # (c)  o = σ(W_xo * X_t + W_ho * H^l_{t-1} + W_co * C^l_t + W_mo * M^l_t + b_o)
        cm = torch.cat([c, m], 1).to(x.dtype)                     # [C^l_t, M^l_t]  (B, 2·hidden, H, W)
        o = torch.sigmoid((x_o + h_o + self.cm2o(cm)).to(c.dtype))
        h = o * torch.tanh(self.mix(cm).to(c.dtype))              # (d)  H^l_t = o ∘ tanh(W_1×1 * [C^l_t, M^l_t])
        return h.to(x.dtype), c, m, delta_c, delta_m              # H in the convolutions' dtype: bf16 under autocast


def overlap(delta_c, delta_m):
    """PredRNN-V2: |⟨ΔC, ΔM⟩| / (‖ΔC‖ ‖ΔM‖) over the pixels of a channel, in [0, 1], of two (B, C, H, W): its mean."""
    return F.cosine_similarity(delta_c.flatten(2), delta_m.flatten(2), dim=2).abs().mean()


class PredRNN(nn.Module):
    """A stack of ST-LSTM layers, joined by one memory, that reads frames and predicts the next one.

    channels, size (int or (H, W)): of a frame, each side a multiple of the patch. setup: "patch4" or "fullres".
    variant: a key of VARIANTS. hidden, layers, kernel (odd), patch: in place of the set-up's. decouple_weight: β, the
    weight of the decoupling loss beside a loss that sums over the pixels of a frame; None: released code's.
    reverse_sampling: k₁, k₂ and α of reverse scheduled sampling as parts of the iterations; None: the set-up's.
    ValueError for what cannot be built."""

    def __init__(self, channels=1, size=64, setup="patch4", variant="full",
                 hidden=None, layers=None, kernel=None, patch=None, decouple_weight=None, reverse_sampling=None):
        super().__init__()
        if setup not in NETWORK or variant not in VARIANTS:
            raise ValueError(f"setup {setup!r}, variant {variant!r}: choose from {[*NETWORK]} and {[*VARIANTS]}")
        overrides = dict(hidden=hidden, layers=layers, kernel=kernel, patch=patch)
        network = NETWORK[setup] | {name: value for name, value in overrides.items() if value is not None}
        hidden, layers, kernel, patch = (network[name] for name in overrides)
        if min(network.values()) < 1 or kernel % 2 == 0:
            raise ValueError(f"{network}: all of them must be positive, and the kernel odd")
        height, width = (size, size) if isinstance(size, int) else size
        self.channels, self.size, self.setup, self.variant = channels, (height, width), setup, variant
        self.hidden, self.patch = hidden, patch
        self.one_size = setup == "patch4"                         # LayerNorm: a checkpoint fits one frame size only
        self.check((1, 1, channels, height, width))

        norm, tokens, grid = setup == "patch4", channels * patch**2, (height // patch, width // patch)
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(STLSTMCell(hidden, hidden, kernel, grid, norm) for _ in range(layers))
        self.output = nn.Conv2d(hidden, tokens, 1)
        self.has_auxiliary_loss = variant in ("v2", "decouple")
        self.decouple = nn.Conv2d(hidden, hidden, 1, bias=not norm) if self.has_auxiliary_loss else None      # W_dec
        if decouple_weight is None:                               # released code only
            decouple_weight = 0.1 * channels * height * width if norm else 0.01 * layers * hidden
        self.decouple_weight = decouple_weight
        self.reverse_sampling = reverse_sampling or TRAINING[setup]["reverse_sampling"]

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
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, ([(h, c) per layer], m, overlaps) -> those of the next.

        overlaps: their sum over all layers and steps so far, for the decoupling loss; None where it is not wanted."""
        (layers, m, overlaps), h, new_layers = state, self.embed(x), []
        for cell, (h_before, c) in zip(self.cells, layers):
            h, c, m, delta_c, delta_m = cell(h, h_before, c, m)   # M^{l-1}_t -> M^l_t
            new_layers.append((h, c))
            if self.has_auxiliary_loss and overlaps is not None:  # ΔC = W_dec * (i ∘ g), ΔM = W_dec * (i' ∘ g')
                delta_c, delta_m = self.decouple(delta_c).to(c.dtype), self.decouple(delta_m).to(c.dtype)
                overlaps = overlaps + overlap(delta_c, delta_m)
        return self.output(h).to(x.dtype), (new_layers, m, overlaps)                    # (e)  M^0_{t+1} = M^L_t

    def forward(self, frames, horizon=0, use_truth=None, with_loss=False):
        """Read frames (B, T, C, H, W) in [0, 1], predict each next one, then `horizon` further ones from the model's
        own predictions: (B, T-1+horizon, C, H, W), not clamped; entry k predicts frame k + 1.

        use_truth: scheduled sampling: bool (T-1, B); where True, step t reads the true frame t, where False the last
        prediction. Row 0 is taken as True. None: every observed frame is read.
        with_loss: return (predictions, loss), where loss, a scalar, is β times the mean overlap of ΔC and ΔM over all
        layers and steps; 0 for a variant without that loss."""
        self.check(frames.shape, horizon)
        # The p²C channels are in the order (C, y, x); in the authors' checkpoints it is (y, x, C).
        # contiguous: on the CPU pixel_unshuffle and pixel_shuffle refuse five axes in channels-last memory.
        truth = F.pixel_unshuffle(frames.contiguous(), self.patch)    # (B, T, p²C, H/p, W/p)
        B, T, _, height, width = truth.shape
        zero = truth.new_zeros(B, self.hidden, height, width)
        overlaps = truth.new_zeros(()) if with_loss else None
        state, x, predictions = ([(zero, zero) for _ in self.cells], zero, overlaps), truth[:, 0], []
        for t in range(T - 1 + horizon):
            if 0 < t < T:                                         # beyond the observed frames x is the last prediction
                x = truth[:, t] if use_truth is None else torch.where(
                    use_truth[t, :, None, None, None], truth[:, t], x)
            x, state = self.step(x, state)                        # x (B, p²C, H/p, W/p)
            predictions.append(x)
        predictions = F.pixel_shuffle(torch.stack(predictions, 1).contiguous(), self.patch)  # (B, T-1+horizon, C, H, W)
        if not with_loss:
            return predictions
        _, _, overlaps = state
        return predictions, self.decouple_weight * overlaps / (len(self.cells) * (T - 1 + horizon))

    def truth_probability(self, iteration, iterations, frames_in, steps):
        """Scheduled sampling (Bengio et al. 2015), the probability that each of `steps` steps reads the true frame: 1
        inside the `frames_in` observed frames; beyond them ε, which falls linearly from 1 to 0. "v2" and
        "reverse_sampling": 1 for the first frame, from 0.5 to 1 inside the others, from 0.5 to 0 beyond them."""
        if self.variant in ("full", "decouple"):
            epsilon = max(0.0, 1 - iteration / (TRAINING[self.setup]["sampling"] * iterations))
            return [1.0] * frames_in + [epsilon] * (steps - frames_in)
        k1, k2, alpha = (part * iterations for part in self.reverse_sampling)
        if iteration < k1:
            rising, falling = 0.5, 0.5
        elif iteration < k2:
            rising = 1 - 0.5 * math.exp(-(iteration - k1) / alpha)
            falling = 0.5 * (k2 - iteration) / (k2 - k1)
        else:
            rising, falling = 1.0, 0.0
        return [1.0] + [rising] * (frames_in - 1) + [falling] * (steps - frames_in)


VARIANTS = {
    "full": "PredRNN (2017): the ST-LSTM and its zigzag memory",
    "v2": "PredRNN-V2 (2022): with the decoupling loss and reverse scheduled sampling",
    "decouple": "PredRNN with the decoupling loss alone",
    "reverse_sampling": "PredRNN with reverse scheduled sampling alone",
}
DEFAULT_SETUP = "patch4"
# patch4: the defaults of the authors' code (4×4 patches, four layers of 64, 5×5 kernels, LayerNorm) with the embedding
# and the output's bias of the other models: the authors' code has neither, hence 8,015,872 parameters (V2 8,019,968)
# instead of 8,554,576 (8,558,672). The authors' scripts for Moving MNIST and KTH have 128 hidden channels, no LayerNorm
# and an lr of 3e-4 (V2 1e-4). fullres: no patches, no LayerNorm (the MS-LSTM paper).
NETWORK = {
    "patch4": dict(patch=4, layers=4, hidden=64, kernel=5),
    "fullres": dict(patch=1, layers=6, hidden=32, kernel=3),
}
# How the papers train it. `sampling` is the part of the iterations over which ε falls from 1 to 0 (50,000 of 80,000 in
# the authors' code, all in MS-LSTM's); `reverse_sampling`: k₁, k₂ and α as parts of the iterations (the authors' script
# for Moving MNIST; MS-LSTM's code); `reverse`: every batch once more, backwards in time (the authors' code); `epochs`
# stands where the paper counts them instead of iterations; `data` overrides for one dataset, its `model` arguments of
# the class (β = 0.01·C·H·W and the sampling of the authors' script for KTH).
TRAINING = {
    "patch4": dict(optimizer="adam", lr=1e-3, batch=8, iterations=80_000, loss="l2", sampling=0.625, reverse=True,
                   reverse_sampling=(25 / 80, 50 / 80, 2.5 / 80),
                   data={"kth": dict(loss="l1+l2", model=dict(decouple_weight=0.01 * 1 * 128 * 128,
                                                              reverse_sampling=[5 / 80, 50 / 80, 2 / 80])),
                         "taxibj": dict(patch=2), "typhoon": dict(iterations=100_000)}),
    "fullres": dict(optimizer="adam", lr=3e-4, batch=4, epochs=40, loss="l1+l2", sampling=1.0, reverse=False,
                    reverse_sampling=(1 / 3, 2 / 3, 1 / 15),
                    data={"taxibj": dict(epochs=15), "kth": dict(epochs=20), "germany": dict(epochs=20)}),
}
# What papers report for this model: figures as they print them, `mse` and the like averaged over the forecast, or,
# where `over` says so, over all T - 1 predictions (MS-LSTM's released code).
PATCH4, FULLRES = dict(variant="full", setup="patch4"), dict(variant="full", setup="fullres", params="0.9M")
PUBLISHED = [
    dict(**PATCH4, data="moving_mnist", source="CMS-LSTM, Tables 1 and 3", psnr=19.603, ssim=0.867, mse=56.8, mae=126.1,
         params="13.799M",
         note="13.799M is another layout: four layers of 64 have 8.555M, and no paper or released code gives 13.799M"),
    dict(**PATCH4, data="taxibj", source="SA-ConvLSTM, Table 3a; CMS-LSTM, Table 2",
         mse_frames=[0.318, 0.427, 0.516, 0.595]),
    dict(**PATCH4, data="kth", source="SA-ConvLSTM, Table 3b", psnr=27.55, ssim=0.839),
    dict(**PATCH4, data="typhoon", source="MoDeRNN, Table 2", psnr=27.637, ssim=0.887, mse=7.71, mae=107.3),
    dict(**FULLRES, data="moving_mnist", source="MS-LSTM, Tables 2-3, all", ssim_gaussian=0.845, mse=66.17,
         mae=118.0, macs="69.8G"),
    dict(**FULLRES | dict(variant="v2"), data="moving_mnist", source="MS-LSTM, Tables 2-3, all",
         ssim_gaussian=0.855, mse=61.57, mae=112.9, macs="70.8G"),
    dict(**FULLRES, data="taxibj", source="MS-LSTM, Tables 4-5", mse_frames=[0.170, 0.222, 0.257, 0.287], macs="6.4G"),
    dict(**FULLRES, data="kth", source="MS-LSTM, Table 6", macs="279.3G"),
    dict(**FULLRES, data="germany", source="MS-LSTM, Tables 7-8", csi=[0.380, 0.231, 0.092], hss=[0.533, 0.358, 0.158],
         macs="203.5G"),
]

MODEL = PredRNN

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        for variant, meaning in VARIANTS.items():
            with torch.device("meta"), FlopCounterMode(display=False) as counter:     # on "meta" nothing is computed
                model = MODEL(setup=setup, variant=variant)
                model(torch.empty(1, 2, 1, 64, 64), with_loss=True)  # one of 19 steps of 20 frames; all cost the same
            parameters, macs = sum(p.numel() for p in model.parameters()), 19 * counter.get_total_flops() / 2e9
            print(f"{setup:8} {variant:18} {parameters:>10,} parameters {macs:7.1f}G multiply-accumulates   {meaning}")
