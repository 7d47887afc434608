"""MS-LSTM against its equations and its figure, and the receptive fields of the paper's §4.3.2."""

import numpy as np
import pytest
import torch
from conftest import count_macs, count_parameters, layers_of
from literal import apply, arrays, conv2d, layer_norm, randomize, sigmoid
from torch import nn

from convlstm import ConvLSTM
from ms_lstm import MSLSTM, MKLSTMCell
from train import maps


def literal_mk_lstm(w, x, h, c, c_wide, norm):
    """Eq. 3, line by line, on (C, H, W) arrays; `w` are the cell's parameters by name."""
    n, offset = len(c), 1 if norm else 0
    small, wide = (apply(w, f"x2h{k}", x) + apply(w, f"h2h{k}", h) for k in ("", "_wide"))
    i, f, g, o = (small[k * n : (k + 1) * n] for k in range(4))
    i5, f5, g5, o5 = (wide[k * n : (k + 1) * n] for k in range(4))
    c = sigmoid(f + offset) * c + sigmoid(i) * np.tanh(g)
    c_wide = sigmoid(f5 + offset) * c_wide + sigmoid(i5) * np.tanh(g5)
    if norm:
        c = layer_norm(c, w["norm_c.weight"], w["norm_c.bias"])
        c_wide = layer_norm(c_wide, w["norm_c_wide.weight"], w["norm_c_wide.bias"])
    o = sigmoid(o + apply(w, "c2o", c) + o5 + apply(w, "c2o_wide", c_wide))
    return o * np.tanh(conv2d(np.concatenate([c, c_wide]), w["mix.weight"], w.get("mix.bias"))), c, c_wide


def literal_pool(x):
    """Max over 2×2 blocks of (C, H, W)."""
    result = np.empty((x.shape[0], x.shape[1] // 2, x.shape[2] // 2))
    for y in range(result.shape[1]):
        for z in range(result.shape[2]):
            result[:, y, z] = x[:, 2 * y : 2 * y + 2, 2 * z : 2 * z + 2].max((1, 2))
    return result


def literal_double(x):
    """Bilinear, corners not aligned: output pixel k lies at (k + ½)/2 - ½ of the input, whose edge goes on for ever."""
    result = np.zeros((x.shape[0], 2 * x.shape[1], 2 * x.shape[2]))
    for y in range(result.shape[1]):
        for z in range(result.shape[2]):
            at_y, at_z = ((k + 0.5) / 2 - 0.5 for k in (y, z))
            for dy in (0, 1):
                for dz in (0, 1):
                    near_y, near_z = int(np.floor(at_y)) + dy, int(np.floor(at_z)) + dz
                    weight = (1 - abs(at_y - near_y)) * (1 - abs(at_z - near_z))
                    inside = x[:, np.clip(near_y, 0, x.shape[1] - 1), np.clip(near_z, 0, x.shape[2] - 1)]
                    result[:, y, z] += weight * inside
    return result


@pytest.mark.parametrize("norm", [True, False])
def test_cell_is_equation_3(norm):
    cell = randomize(MKLSTMCell(2, 3, 3, (5, 6), norm))
    x, *state = (torch.randn(1, n, 5, 6, dtype=torch.float64) for n in (2, 3, 3, 3))
    expected = literal_mk_lstm(arrays(cell), x[0].numpy(), *(s[0].numpy() for s in state), norm)
    for got, want in zip(cell(x, *state), expected):
        np.testing.assert_allclose(got[0].detach().numpy(), want, atol=1e-12)


def test_pyramid_is_figure_2():
    """Six layers over two time steps, the second of which reads the first prediction."""
    model = randomize(MSLSTM(size=8, hidden=2))
    frame = torch.rand(1, 1, 1, 8, 8, dtype=torch.float64)
    predictions, layers = model(frame, horizon=2), layers_of(maps(model, frame, horizon=2), "layers")
    w, cells = arrays(model), [arrays(cell) for cell in model.cells]
    state, x = [[np.zeros((2, s, s))] * 3 for s in (8, 4, 2, 2, 4, 8)], frame[0, 0].numpy()
    for t in range(2):
        def cell(layer, h):
            state[layer] = literal_mk_lstm(cells[layer], h, *state[layer], norm=False)
            return state[layer][0]

        h0 = cell(0, conv2d(x, w["embed.weight"], w["embed.bias"]))
        h1 = cell(1, literal_pool(h0))
        h2 = cell(2, literal_pool(h1))
        h3 = cell(3, h2)
        h4 = cell(4, literal_double(h3) + h1)
        h5 = cell(5, literal_double(h4) + h0)
        x = conv2d(h5, w["output.weight"], w["output.bias"])
        np.testing.assert_allclose(predictions[0, t].detach().numpy(), x, atol=1e-10)
        for got, want in zip(layers, (h0, h1, h2, h3, h4, h5)):
            np.testing.assert_allclose(got["H"][0, t], want, atol=1e-10)


@pytest.mark.parametrize("setup", ["patch4", "fullres"])
def test_depth_alone_is_convlstm(setup):
    """The first row of Table 1 is convlstm.py's model, weight for weight."""
    options = dict(size=16, setup=setup, hidden=4, kernel=3)
    here, there = MSLSTM(variant="convlstm", **options), ConvLSTM(**options)
    here.load_state_dict(there.state_dict())
    frames = torch.rand(2, 4, 1, 16, 16, dtype=torch.float64)     # the two lay their maps differently: rounding differs
    torch.testing.assert_close(here.double()(frames, horizon=2), there.double()(frames, horizon=2), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layers, depths", [(2, [0, 0]), (4, [0, 1, 1, 0]), (6, [0, 1, 2, 2, 1, 0]),
                                            (8, [0, 1, 2, 3, 3, 2, 1, 0])])
def test_any_even_number_of_layers_mirrors(layers, depths):
    model = MSLSTM(size=(16, 24), hidden=4, layers=layers)
    layers = layers_of(maps(model, torch.rand(2, 3, 1, 16, 24)), "layers")
    assert [layer["H"].shape for layer in layers] == [(2, 2, 4, 16 >> d, 24 >> d) for d in depths]


@pytest.mark.parametrize("variant", ["sms", "full"])
def test_odd_layers_and_sizes_that_do_not_halve_are_refused(variant):
    with pytest.raises(ValueError, match="layers=5: .* even"):
        MSLSTM(variant=variant, layers=5)
    with pytest.raises(ValueError, match="62×64: .* multiples of 4,"):
        MSLSTM(variant=variant, size=(62, 64))
    with pytest.raises(ValueError, match="36×36: .* multiples of 8,"):
        MSLSTM(variant=variant, setup="patch4", size=36)
    MSLSTM(variant=variant, size=(60, 180), hidden=2)
    alone = MSLSTM(variant=dict(sms="convlstm", full="tms")[variant], layers=3, size=(13, 10), hidden=2)    # any will do
    assert alone(torch.rand(1, 3, 1, 13, 10)).shape == (1, 2, 1, 13, 10)


class ConvGRUCell(nn.Module):
    """A cell that is not this project's: one state, no cell memory, no normalisation."""

    states = 1

    def __init__(self, inputs, hidden, kernel, size, norm):
        super().__init__()
        self.size = size
        self.gates = nn.Conv2d(inputs + hidden, 2 * hidden, kernel, padding=kernel // 2)
        self.new = nn.Conv2d(inputs + hidden, hidden, kernel, padding=kernel // 2)

    def forward(self, x, h):
        assert x.shape[2:] == h.shape[2:] == self.size
        r, z = torch.sigmoid(self.gates(torch.cat([x, h], 1))).chunk(2, 1)
        return ((1 - z) * h + z * torch.tanh(self.new(torch.cat([x, r * h], 1))),)


@pytest.mark.parametrize("variant, sizes", [("sms", [16, 8, 4, 4, 8, 16]), ("convlstm", [16] * 6)])
def test_a_foreign_cell_fits_in(variant, sizes):
    model = MSLSTM(size=16, hidden=4, variant=variant, cell=ConvGRUCell)
    frames = torch.rand(2, 4, 1, 16, 16)
    assert [layer["H"].shape[-1] for layer in layers_of(maps(model, frames, horizon=1), "layers")] == sizes
    model(frames, horizon=1).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize("options, parameters", [
    (dict(setup="patch4"), 6_686_800), (dict(setup="patch4", variant="convlstm"), 2_361_424),
    (dict(variant="convlstm"), 444_001), (dict(variant="sms"), 444_001), (dict(variant="tms"), 1_896_097),
    (dict(), 1_896_097), (dict(kernel=5), 6 * (9 * 32 * 32 * (5**2 + 7**2) + 9 * 64 + 64 * 32 + 32) + 97)])
def test_parameters(options, parameters):
    """With `kernel` 5 the second one is 7×7: nine convolutions from 32 to 32 channels of each, and W_1×1."""
    assert count_parameters(MSLSTM(**options)) == parameters


@pytest.mark.parametrize("variant, macs", [
    ("convlstm", [34.4, 3.2, 137.7, 100.3]), ("sms", [15.1, 1.4, 60.3, 43.9]),
    ("tms", [147.3, 13.6, 589.1, 429.2]), ("full", [64.4, 5.9, 257.7, 187.8])])
def test_multiply_accumulates(variant, macs):
    """Of Moving MNIST, TaxiBJ, KTH and Germany."""
    for (size, frames), expected in zip(((64, 20), (32, 8), (128, 20), (180, 8)), macs):
        assert round(count_macs(MSLSTM, frames, size=size, variant=variant) / 1e9, 1) == expected


@pytest.mark.parametrize("variant, field", [("convlstm", 7), ("sms", 18), ("tms", 25), ("full", 60)])
def test_receptive_field_of_the_encoder(variant, field):
    """§4.3.2, measured: which pixels of a frame move one pixel of layer 2's hidden state in the same step.

    ConvLSTM: 1 + 3·2 = 7, as the paper says. SMS-LSTM: a pooling adds one pixel of the size it reads, a 3×3 layer two
    of its own: 1 + 2 + 1 + 2·2 + 2 + 4·2 = 18, where the paper has "approximately 15". An MK-LSTM layer reaches further
    than its 5×5 kernel: W'_oc * C̃_t sees 5×5 of a cell that saw 5×5 in this very step. That is 9×9, and 8 pixels more
    from layer to layer: TMS-LSTM 1 + 3·8 = 25, MS-LSTM 1 + 8 + 1 + 2·8 + 2 + 4·8 = 60 ("much larger than 15").
    """
    model = MSLSTM(size=96, hidden=8, variant=variant).double()
    frames = torch.rand(4, 2, 1, 96, 96, dtype=torch.float64, requires_grad=True)
    read = []                                                     # (4, hidden, 96 or 24, 96 or 24), after one step
    model.cells[2].register_forward_hook(lambda _, inputs, outputs: read.append(outputs[0]))
    model(frames)
    h = read[0]
    # A max-pooling passes the gradient to the largest pixel only: channels and random frames together show them all.
    h[:, :, h.shape[2] // 2, h.shape[3] // 2].sum().backward()
    seen = (frames.grad[:, 0, 0] != 0).any(0)                     # (96, 96)
    assert (seen.any(1).sum(), seen.any(0).sum()) == (field, field)
