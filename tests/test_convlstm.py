"""ConvLSTM against its equations, its counts against the spec's tables."""

import numpy as np
import pytest
import torch
from conftest import count_macs, count_parameters
from literal import apply, arrays, layer_norm, randomize, sigmoid

from convlstm import ConvLSTM, ConvLSTMCell


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("peephole", [True, False])
def test_cell_is_the_equations(norm, peephole):
    cell = randomize(ConvLSTMCell(2, 3, 3, (4, 5), norm, peephole))
    x, h, c = (torch.randn(1, n, 4, 5, dtype=torch.float64) for n in (2, 3, 3))
    got_h, got_c = (v[0].detach().numpy() for v in cell(x, h, c))

    w, (x, h, c) = arrays(cell), (v[0].numpy() for v in (x, h, c))
    a = apply(w, "x2h", x) + apply(w, "h2h", h)
    i, f, g, o = a[0:3], a[3:6], a[6:9], a[9:12]
    if peephole:
        i, f = i + w["peephole"][0] * c, f + w["peephole"][1] * c
    c = sigmoid(f + (1 if norm else 0)) * c + sigmoid(i) * np.tanh(g)
    if norm:
        c = layer_norm(c, w["norm_c.weight"], w["norm_c.bias"])
    if peephole:
        o = o + w["peephole"][2] * c
    np.testing.assert_allclose(got_c, c, atol=1e-12)
    np.testing.assert_allclose(got_h, sigmoid(o) * np.tanh(c), atol=1e-12)


@pytest.mark.parametrize("setup, options, parameters", [
    ("patch4", dict(), 4_458_576), ("patch4", dict(kernel=3), 2_361_424), ("fullres", dict(), 444_001)])
def test_parameters(setup, options, parameters):
    assert count_parameters(ConvLSTM(setup=setup, **options)) == parameters


@pytest.mark.parametrize("setup, size, frames, macs", [
    ("fullres", 64, 20, 34.4), ("fullres", 32, 8, 3.2), ("fullres", 128, 20, 137.7), ("fullres", 180, 8, 100.3),
    ("patch4", 64, 20, 15.9)])
def test_multiply_accumulates(setup, size, frames, macs):
    assert round(count_macs(ConvLSTM, frames, size=size, setup=setup) / 1e9, 1) == macs


def test_peepholes_start_as_nothing():
    torch.manual_seed(0)
    plain = ConvLSTM(size=16, hidden=8)
    torch.manual_seed(0)
    peephole = ConvLSTM(size=16, hidden=8, variant="peephole")
    frames = torch.rand(1, 4, 1, 16, 16)
    torch.testing.assert_close(plain(frames), peephole(frames))
