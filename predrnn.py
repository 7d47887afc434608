"""PredRNN: a second memory that climbs the layers and zigzags through time. And PredRNN-V2, which trains it better.

From "ConvRNNs for next-frame prediction". MIT licence, copyright (c) 2026 The authors; keep its text with a copy.

    Y. Wang, M. Long, J. Wang, Z. Gao, P. S. Yu. "PredRNN: Recurrent Neural Networks for Predictive Learning using
    Spatiotemporal LSTMs." NeurIPS 2017.
    Y. Wang, H. Wu, J. Zhang, Z. Gao, J. Wang, P. S. Yu, M. Long. "PredRNN: A Recurrent Neural Network for
    Spatiotemporal Predictive Learning." TPAMI 2022 (PredRNN-V2).

In a stack of ConvLSTMs each layer's cell C talks only to itself one step later: what the top layer found out about the
frame never reaches the bottom of the next step. PredRNN adds one memory M for the whole stack. It climbs the layers
inside a step and is handed from the top of one step to the bottom of the next, so detail takes a single path through
space and time. A layer (the ST-LSTM) updates both, C with the gates i, f, g and M with i', f', g', and shows a mixture.
PredRNN-V2 adds two things to the training and, but for one 1×1 convolution, nothing to the network: a loss that keeps C
and M from learning the same, and scheduled sampling inside the observed frames too, where the true frame comes ever
more often, so that the model has to find motion over long spans before it may rely on the frame it is given.

    prediction of frame t + 1               prediction of frame t + 2
               ▲                                       ▲
        output, unpatch                         output, unpatch
               ▲ H                                     ▲ H
            cell L ═════ M ═════╗                   cell L ═════ M ═════▶ …
               ▲ H, M           ║                      ▲ H, M
               ⋮                ║                      ⋮                      each cell also takes its own H, C
               ▲ H, M           ║                      ▲ H, M                 from t to t + 1
    … ═ M ═▶ cell 1             ╚═════ M ════════▶ cell 1
               ▲                                       ▲
         patch, embed                            patch, embed
               ▲                                       ▲
            frame t                               frame t + 1

The labels (a)-(e) are this file's, the letters the papers'; the superscript is the layer, X_t = H^{l-1}_t above the
first. Where no paper speaks, this file decides, at the line concerned:
  - `patch4` (frames in 4×4 patches, four layers of 64, 5×5: the defaults of the authors' code): one LayerNorm over all
    of (C, H, W) after every gate convolution, none on C and M, and σ(f + 1) for both forget gates. Its weights have
    that shape, so A CHECKPOINT FITS ONE FRAME SIZE ONLY. The authors' scripts for Moving MNIST and KTH have 128 hidden
    channels, no LayerNorm and an lr of 3e-4 (V2 1e-4) instead, but σ(f + 1) too.
  - the 1×1 embedding and the output's bias, as in the other models. The authors' code has neither, and so 8,015,872
    parameters (V2 8,019,968) where this file has 8,554,576 (8,558,672).
  - `fullres` (the MS-LSTM paper): no patches, no normalisation; weights fit any frame size.
  - W_co * C + W_mo * M is one convolution over [C, M]: the same sum, and how the authors' code has it. MS-LSTM's code
    has two, and so one more bias a hidden channel.
  - the weight β of the decoupling loss is the released code's, for a loss that sums over the pixels of a frame.

    model = PredRNN(channels=1, size=64, variant="v2")          # patch4; setup="fullres" for the other one
    forecast = model(frames, horizon=10)[:, -10:]               # (B, T, C, H, W) in [0, 1] -> the 10 frames that follow
    mask = torch.rand(19, B) < torch.tensor(model.truth_probability(k, iterations, 10, 19))[:, None]
    prediction, extra = model(frames, use_truth=mask, extras="loss")                   # 20 frames -> 19 predictions
    loss = ((prediction - frames[:, 1:]) ** 2).sum((2, 3, 4)).mean() + extra.get("loss", 0)              # then backward
"""

import math

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

VARIANTS = {
    "full": "PredRNN (2017): the ST-LSTM and its zigzag memory",
    "v2": "PredRNN-V2 (2022): with the decoupling loss and reverse scheduled sampling",
    "decouple": "PredRNN with the decoupling loss alone",
    "reverse_sampling": "PredRNN with reverse scheduled sampling alone",
}
DEFAULT_SETUP = "patch4"
NETWORK = {
    "patch4": dict(patch=4, layers=4, hidden=64, kernel=5),
    "fullres": dict(patch=1, layers=6, hidden=32, kernel=3),
}
# How the papers train it. `sampling` is the part of the iterations over which ε falls from 1 to 0 (50,000 of 80,000 in
# the authors' code, all in MS-LSTM's); `reverse_sampling` PredRNN-V2's k₁, k₂ and α as parts of the iterations (25,000,
# 50,000, 2,500 of 80,000 in the authors' Moving MNIST script; ⅓, ⅔ and k₁/5 in MS-LSTM's code); `reverse`: every batch
# once more, backwards in time (released code); `epochs` stands where the paper counts them instead of iterations;
# `data` overrides for one dataset, and its `model` holds further arguments of the class: the authors' KTH script has
# β = 0.01·C·H·W, and k₁, k₂, α of 5,000, 50,000, 2,000.
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
PUBLISHED = [
    dict(variant="full", setup="patch4", data="moving_mnist", source="CMS-LSTM, Tables 1 and 3",
         psnr=19.603, ssim=0.867, mse=56.8, mae=126.1, params="13.799M",
         note="13.799M is another layout: four layers of 64 have 8.555M, and no paper or released code gives 13.799M"),
    dict(variant="full", setup="patch4", data="taxibj", source="SA-ConvLSTM, Table 3a; CMS-LSTM, Table 2",
         mse_frames=[0.318, 0.427, 0.516, 0.595]),
    dict(variant="full", setup="patch4", data="kth", source="SA-ConvLSTM, Table 3b", psnr=27.55, ssim=0.839),
    dict(variant="full", setup="patch4", data="typhoon", source="MoDeRNN, Table 2",
         psnr=27.637, ssim=0.887, mse=7.71, mae=107.3),
    dict(variant="full", setup="fullres", data="moving_mnist", source="MS-LSTM, Tables 2-3", over="all",
         ssim=0.845, mse=66.17, mae=118.0, params="0.9M", macs="69.8G"),
    dict(variant="v2", setup="fullres", data="moving_mnist", source="MS-LSTM, Tables 2-3", over="all",
         ssim=0.855, mse=61.57, mae=112.9, params="0.9M", macs="70.8G"),
    dict(variant="full", setup="fullres", data="taxibj", source="MS-LSTM, Tables 4-5",
         mse_frames=[0.170, 0.222, 0.257, 0.287], params="0.9M", macs="6.4G"),
    dict(variant="full", setup="fullres", data="kth", source="MS-LSTM, Table 6", params="0.9M", macs="279.3G"),
    dict(variant="full", setup="fullres", data="germany", source="MS-LSTM, Tables 7-8", params="0.9M", macs="203.5G",
         csi=[0.380, 0.231, 0.092], hss=[0.533, 0.358, 0.158]),
]


def conv(inputs, outputs, kernel, size, norm):
    """A "same" convolution; with `norm`, LayerNorm over all of (C, H, W) follows and takes the place of the bias."""
    layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=not norm)
    return nn.Sequential(layer, nn.LayerNorm([outputs, *size])) if norm else layer


class STLSTMCell(nn.Module):
    """One ST-LSTM layer, (a)-(e).

    Args: channels of the input and of the hidden state, the gates' kernel size, the (H, W) of the feature maps, whether
    LayerNorm is used (`patch4`).
    Called with x (B, inputs, H, W) and, (B, hidden, H, W) each, h and c of this layer one step ago and m of the layer
    below; returns the new h, c and m, and what the gates let into C and into M, (i ∘ g, i' ∘ g').
    """

    def __init__(self, inputs, hidden, kernel, size, norm):
        super().__init__()
        self.x2h = conv(inputs, 7 * hidden, kernel, size, norm)   # W_x*, W'_x*: i, f, g, i', f', g', o in this order
        self.h2h = conv(hidden, 4 * hidden, kernel, size, norm)   # W_h*: i, f, g, o
        self.m2h = conv(hidden, 3 * hidden, kernel, size, norm)   # W_m*: i', f', g'
        self.cm2o = conv(2 * hidden, hidden, kernel, size, norm)  # W_co and W_mo side by side
        self.mix = nn.Conv2d(2 * hidden, hidden, 1, bias=not norm)                    # W_1×1
        self.forget_offset = 1.0 if norm else 0.0                 # released code only: memories start by remembering

    def forward(self, x, h, c, m):
        # i = σ(W_xi * X_t + W_hi * H^l_{t-1} + b_i)          i' = σ(W'_xi * X_t + W_mi * M^{l-1}_t + b'_i)
        # f = σ(W_xf * X_t + W_hf * H^l_{t-1} + b_f)          f' = σ(W'_xf * X_t + W_mf * M^{l-1}_t + b'_f)
        # g = tanh(W_xg * X_t + W_hg * H^l_{t-1} + b_g)       g' = tanh(W'_xg * X_t + W_mg * M^{l-1}_t + b'_g)
        # Chunks of three convolutions, in c's type, so that C and M stay fp32 under autocast.
        n = c.shape[1]                                            # hidden
        x_cm, x_o = self.x2h(x).to(c.dtype).split((6 * n, n), 1)
        h_c, h_o = self.h2h(h).to(c.dtype).split((3 * n, n), 1)
        # C and M obey the same equation: both at once, side by side in a dimension of their own.
        gates = x_cm + torch.cat([h_c, self.m2h(m).to(c.dtype)], 1)
        i, f, g = gates.unflatten(1, (2, 3, n)).unbind(2)         # [i, i'], [f, f'], [g, g']: each (B, 2, hidden, H, W)
        if self.forget_offset:
            f = f + self.forget_offset
        # (a)  C^l_t = f ∘ C^l_{t-1} + i ∘ g                      this layer's own past
        # (b)  M^l_t = f' ∘ M^{l-1}_t + i' ∘ g'                   the layer below, in this step
        growth = torch.sigmoid(i) * torch.tanh(g)
        cm = torch.sigmoid(f) * torch.stack([c, m], 1) + growth   # (B, 2, hidden, H, W)
        # (c)  o = σ(W_xo * X_t + W_ho * H^l_{t-1} + W_co * C^l_t + W_mo * M^l_t + b_o)
        both = cm.flatten(1, 2).to(x.dtype)                       # [C^l_t, M^l_t]  (B, 2·hidden, H, W)
        o = torch.sigmoid(x_o + h_o + self.cm2o(both).to(c.dtype))
        # (d)  H^l_t = o ∘ tanh(W_1×1 * [C^l_t, M^l_t])
        h = o * torch.tanh(self.mix(both).to(c.dtype))
        return h.to(x.dtype), *cm.unbind(1), growth.unbind(1)     # H is read by convolutions: theirs is its type


def overlap(delta_c, delta_m):
    """How much alike two (B, C, H, W) are: |⟨ΔC, ΔM⟩| / (‖ΔC‖ ‖ΔM‖) over the pixels of a channel, in [0, 1].

    Returns its mean over batch and channels, a scalar.
    """
    return F.cosine_similarity(delta_c.flatten(2), delta_m.flatten(2), dim=2).abs().mean()


class PredRNN(nn.Module):
    """A stack of ST-LSTM layers, joined by one memory, that reads frames and predicts the next one.

    Args:
        channels: of a frame. size: of a frame, an int or (H, W), each side divisible by the patch.
        setup: "patch4" or "fullres". variant: a key of VARIANTS.
        hidden, layers, kernel (odd), patch: override the set-up.
        decouple_weight: β, the weight of the decoupling loss beside a loss that sums over the pixels of a frame; None:
            the set-up's. It matters to the variants that have that loss, "v2" and "decouple".
        reverse_sampling: k₁, k₂ and α of "v2" and "reverse_sampling", as parts of the iterations; None: the set-up's.
    Attributes: `recompute`: set it to True to keep, of six steps in seven, only the states for the backward pass, and
    compute the rest again there: less memory, more time, same gradients.
    Raises ValueError, in one line that names the way out, for what cannot be built and frames it cannot read.
    """

    def __init__(self, channels=1, size=64, setup=DEFAULT_SETUP, variant="full",
                 hidden=None, layers=None, kernel=None, patch=None, decouple_weight=None, reverse_sampling=None):
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

        norm, tokens, grid = setup == "patch4", channels * patch**2, (height // patch, width // patch)
        self.embed = nn.Conv2d(tokens, hidden, 1)
        self.cells = nn.ModuleList(STLSTMCell(hidden, hidden, kernel, grid, norm) for _ in range(layers))
        self.output = nn.Conv2d(hidden, tokens, 1)
        # W_dec, one for all layers: where it looks for likeness is learned, but it takes no part in the prediction.
        self.decouple = nn.Conv2d(hidden, hidden, 1, bias=not norm) if variant in ("v2", "decouple") else None
        if decouple_weight is None:                               # released code only
            decouple_weight = 0.1 * channels * height * width if norm else 0.01 * layers * hidden
        self.decouple_weight = decouple_weight
        self.reverse_sampling = reverse_sampling or TRAINING[setup]["reverse_sampling"]

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

    def step(self, x, state, with_loss=False):
        """One time step: tokens (B, p²C, H/p, W/p) of a frame, ([(h, c) of every layer], m) -> those of the next frame.

        Third comes how alike C and M grew, a scalar in [0, 1]: None unless `with_loss`.
        """
        (layers, m), h, new_layers, alike = state, self.embed(x), [], []
        for cell, (h_before, c_before) in zip(self.cells, layers):
            h, c, m, growth = cell(h, h_before, c_before, m)      # m: up the layers, M^{l-1}_t -> M^l_t
            new_layers.append((h, c))
            if with_loss:
                # V2: ΔC = W_dec * (i ∘ g), ΔM = W_dec * (i' ∘ g')
                alike.append(overlap(*(self.decouple(v).to(c.dtype) for v in growth)))
        # (e)  M^0_{t+1} = M^L_t: the state takes the top's m to the bottom of the next step
        return self.output(h).to(x.dtype), (new_layers, m), torch.stack(alike).mean() if with_loss else None

    def forward(self, frames, horizon=0, use_truth=None, extras=False):
        """Read frames, predict each next one, then `horizon` further ones from the model's own predictions.

        Args:
            frames: (B, T, C, H, W), values in [0, 1].
            horizon: how many frames to forecast beyond frame T.
            use_truth: training with scheduled sampling: bool (T-1, B); where True, step t reads the true frame t, where
                False the last prediction. Row 0 is taken as True. None: every observed frame is read.
            extras: True, "loss" or query points [(y, x), …]: also return a dict. For the variants with the decoupling
                loss it holds "loss", a scalar: β times the mean likeness of ΔC and ΔM over all steps and layers. Except
                for "loss" it holds "layers", one (B, steps, hidden, H/p, W/p) a layer: its hidden states; and
                "memory", (B, steps, hidden, H/p, W/p): M as it leaves the top layer. There is no attention.
        Returns: predictions (B, T-1+horizon, C, H, W), not clamped; entry k predicts frame k + 1. With extras: a pair.
        """
        self.check(frames.shape, horizon)
        # The p²C channels are in the order (C, y, x), in the authors' checkpoints in the order (y, x, C).
        truth = F.pixel_unshuffle(frames, self.patch)             # (B, T, p²C, H/p, W/p)
        B, T, _, height, width = truth.shape
        zero = truth.new_zeros(B, self.hidden, height, width)
        state = ([(zero, zero) for _ in self.cells], zero)        # states and memory start at zero
        with_loss = bool(extras) and self.decouple is not None
        x, predictions, alike, memory, layers = truth[:, 0], [], [], [], [[] for _ in self.cells]
        for t in range(T - 1 + horizon):
            if 0 < t < T:                                         # beyond the observed frames x is the last prediction
                x = truth[:, t] if use_truth is None else torch.where(
                    use_truth[t, :, None, None, None], truth[:, t], x)
            if self.recompute and t % 7 and torch.is_grad_enabled():   # every seventh keeps all: faster
                x, state, likeness = checkpoint(self.step, x, state, with_loss, use_reentrant=False,
                                                preserve_rng_state=False)
            else:
                x, state, likeness = self.step(x, state, with_loss)                   # x (B, p²C, H/p, W/p)
            predictions.append(x)
            alike.append(likeness)
            if extras and extras != "loss":
                memory.append(state[1])
                for kept, (h, _) in zip(layers, state[0]):
                    kept.append(h)
        predictions = F.pixel_shuffle(torch.stack(predictions, 1), self.patch)   # (B, T-1+horizon, C, H, W)
        if not extras:
            return predictions
        found = {"loss": self.decouple_weight * torch.stack(alike).mean()} if with_loss else {}
        if extras != "loss":
            found |= {"layers": [torch.stack(kept, 1) for kept in layers], "memory": torch.stack(memory, 1)}
        return predictions, found

    def truth_probability(self, iteration, iterations, frames_in, steps):
        """Scheduled sampling: with which probability each of `steps` steps reads the true frame.

        "full", "decouple" (Bengio et al. 2015): 1 inside the `frames_in` observed frames; beyond them ε, which falls
        linearly from 1 to 0. "v2", "reverse_sampling": the first frame is always read; inside the other observed ones
        the probability rises from 0.5 to 1, beyond them it falls from 0.5 to 0.
        """
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


MODEL = PredRNN

if __name__ == "__main__":
    from torch.utils.flop_counter import FlopCounterMode

    for setup in NETWORK:
        with torch.device("meta"), FlopCounterMode(display=False) as counter:
            model, frames = PredRNN(setup=setup), torch.empty(1, 20, 1, 64, 64)
            shape = tuple(model(frames).shape)
        print(f"PredRNN, {setup}: {tuple(frames.shape)} -> {shape}, {sum(p.numel() for p in model.parameters()):,} "
              f"parameters, {counter.get_total_flops() / 2e9:.1f}G multiply-accumulates a sequence")
