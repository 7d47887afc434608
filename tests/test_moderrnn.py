"""MoDeRNN: the DCB and the cell against the equations, the one-7×7 identity, its counts against the spec's tables."""

import numpy as np
import pytest
import torch
from conftest import count_macs, count_parameters
from literal import apply, arrays, layer_norm, randomize, sigmoid

from moderrnn import DetailContextBlock, MoDeRNN, MoDeRNNCell, merge


def literal_dcb(w, name, x, h, kernels):
    """§2.2, steps 1 and 2, in turn: X, H, X, H, X; each size a convolution of its own."""
    def attention(side, features):
        return sigmoid(sum(apply(w, f"{name}{side}.{n}", features) for n in range(kernels)) / kernels)

    attn_h = attention("of_h", h)
    x = 2 * attn_h * x
    attn_x = attention("of_x", x)
    h = 2 * attn_x * h
    x = 2 * attention("of_h", h) * x
    attn_x = attention("of_x", x)
    h = 2 * attn_x * h
    attn_h = attention("of_h", h)
    return 2 * attn_h * x, h, attn_h, attn_x


def features(*channels, size=(4, 5)):
    return [torch.randn(1, n, *size, dtype=torch.float64) for n in channels]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kernels", [(3, 5, 7), (3, 5), (7,)])
def test_block_is_the_equation(norm, kernels):
    block = randomize(DetailContextBlock(2, (4, 5), norm, kernels))
    x, h = features(2, 2)
    got_x, got_h, (got_attn_h, got_attn_x) = block(x, h)
    want = literal_dcb(arrays(block), "", x[0].numpy(), h[0].numpy(), len(kernels))
    for got, expected in zip((got_x, got_h, got_attn_h, got_attn_x), want):
        np.testing.assert_allclose(got[0].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kernels", [(3, 5, 7), ()])
def test_cell_is_the_equations(norm, kernels):
    cell = randomize(MoDeRNNCell(3, 3, (4, 5), norm, kernels))
    x, h, c = features(3, 3, 3)
    got_h, got_c, maps = cell(x, h, c)
    assert (maps is None) == (kernels == ())

    w, (x, h, c) = arrays(cell), (v[0].numpy() for v in (x, h, c))
    if kernels:
        x, h, _, _ = literal_dcb(w, "dcb.", x, h, 3)
    a = apply(w, "x2h", x) + apply(w, "h2h", h)
    i, f, g, o = a[0:3], a[3:6], a[6:9], a[9:12]
    c = sigmoid(f + (1 if norm else 0)) * c + sigmoid(i) * np.tanh(g)
    if norm:
        c = layer_norm(c, w["norm_c.weight"], w["norm_c.bias"])
    np.testing.assert_allclose(got_c[0].detach().numpy(), c, atol=1e-12)
    np.testing.assert_allclose(got_h[0].detach().numpy(), sigmoid(o) * np.tanh(c), atol=1e-12)


@pytest.mark.parametrize("kernels", [(3, 5, 7), (3, 5), (7,)])
def test_one_convolution_equals_the_three(kernels):
    """Values and gradients, on maps smaller and larger than the kernel; and one convolution is what runs."""
    block = randomize(DetailContextBlock(3, None, False, kernels))
    for size in ((2, 3), (9, 11)):
        (features_in,) = features(3, size=size)
        gradients = []
        one, apart = block.mean(merge(block.of_h), features_in), sum(c(features_in) for c in block.of_h) / len(kernels)
        torch.testing.assert_close(one, apart, rtol=0, atol=1e-12)
        for out in (one, apart):
            gradients.append(torch.autograd.grad(out.square().sum(), [*block.of_h.parameters()]))
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
    assert merge(block.of_h)[0].shape == (3, 3, max(kernels), max(kernels))


def test_one_convolution_is_what_runs(monkeypatch):
    """Under `fullres` nothing calls the three, and the kernels are added once a roll-out, not at every step."""
    import moderrnn

    called, merges = [], []
    monkeypatch.setattr(moderrnn, "merge", lambda convs: merges.append(1) or merge(convs))
    model = MoDeRNN(size=8, setup="fullres", hidden=4, layers=2)
    for cell in model.cells:
        for layer in (*cell.dcb.of_h, *cell.dcb.of_x):
            layer.register_forward_hook(lambda *_: called.append(1))
    model(torch.rand(1, 4, 1, 8, 8), horizon=3)
    assert not called and len(merges) == 2 * len(model.cells)


@pytest.mark.parametrize("setup, options, parameters", [
    ("patch4", dict(), 5_867_600), ("patch4", dict(kernel=5), 7_964_752), ("fullres", dict(), 1_465_057),
    ("patch4", dict(variant="no_dcb"), 2_361_424), ("fullres", dict(variant="no_dcb"), 444_001)])
def test_parameters(setup, options, parameters):
    assert count_parameters(MoDeRNN(setup=setup, **options)) == parameters


def test_multiply_accumulates():
    assert round(count_macs(MoDeRNN, 20) / 1e9, 1) == 38.8
    assert round(count_macs(MoDeRNN, 20, setup="fullres", variant="no_dcb") / 1e9, 1) == 34.4
    # One 7×7 convolution in each of five half-steps, at 19 steps of 6 layers: 49 taps, where three would be 83.
    dcb = count_macs(MoDeRNN, 20, setup="fullres") - count_macs(MoDeRNN, 20, setup="fullres", variant="no_dcb")
    assert dcb == 19 * 6 * 5 * 49 * 32 * 32 * 64 * 64


def test_variants_differ_by_their_kernels_only():
    for variant, kernels in dict(full=[3, 5, 7], k3=[3], k5=[5], k7=[7], k35=[3, 5]).items():
        dcb = MoDeRNN(size=8, hidden=4, setup="fullres", variant=variant).cells[0].dcb
        assert [layer.kernel_size[0] for layer in dcb.of_x] == [layer.kernel_size[0] for layer in dcb.of_h] == kernels


@pytest.mark.parametrize("setup, size", [("patch4", 4), ("fullres", 16)])
def test_weight_maps(setup, size):
    """Asked for, each layer's last maps come in (0, 1); the first step has no context, so Attn_H is that of H = 0."""
    model = MoDeRNN(size=16, setup=setup, hidden=4, layers=2)
    _, found = model(torch.rand(2, 4, 1, 16, 16), horizon=2, extras=True)
    assert [w.shape for w in found["weights"]] == 2 * [(2, 5, 2, 4, size, size)]
    maps = torch.stack(found["weights"])
    assert (maps > 0).all() and (maps < 1).all()
    dcb = model.cells[0].dcb
    nothing = torch.zeros(2, 4, size, size)
    torch.testing.assert_close(found["weights"][0][:, 0, 0], dcb(nothing, nothing)[2][0])
    assert "weights" not in MoDeRNN(size=16, setup=setup, variant="no_dcb")(torch.rand(2, 4, 1, 16, 16), extras=True)[1]
