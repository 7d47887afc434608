"""MoDeRNN: the DCB and the cell against the equations, the one-7×7 identity, its counts against the spec's tables."""

import numpy as np
import pytest
import torch
from conftest import count_macs, count_parameters, layers_of
from literal import apply, arrays, layer_norm, randomize, sigmoid

from moderrnn import DetailContextBlock, MoDeRNN, MoDeRNNCell, mean_of
from train import maps


def literal_dcb(w, name, x, h, kernels):
    """§2.2, steps 1 and 2, in turn: X, H, X, H, X; each size a convolution of its own."""
    def attention(side, features):
        return sigmoid(sum(apply(w, f"{name}{side}.{n}", features) for n in range(kernels)) / kernels)

    attn_h = attention("conv_h", h)
    x = 2 * attn_h * x
    attn_x = attention("conv_x", x)
    h = 2 * attn_x * h
    x = 2 * attention("conv_h", h) * x
    attn_x = attention("conv_x", x)
    h = 2 * attn_x * h
    attn_h = attention("conv_h", h)
    return 2 * attn_h * x, h, attn_h, attn_x                      # and the last weights


def features(*channels, size=(4, 5)):
    return [torch.randn(1, n, *size, dtype=torch.float64) for n in channels]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kernels", [(3, 5, 7), (3, 5), (7,)])
def test_block_is_the_equation(norm, kernels):
    block = randomize(DetailContextBlock(2, kernels, (4, 5), norm))
    x, h = features(2, 2)
    want = literal_dcb(arrays(block), "", x[0].numpy(), h[0].numpy(), len(kernels))
    for got, expected in zip(block(x, h), want):
        np.testing.assert_allclose(got[0].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("kernels", [(3, 5, 7), ()])
def test_cell_is_the_equations(norm, kernels):
    cell = randomize(MoDeRNNCell(3, 3, (4, 5), norm, kernels))
    x, h, c = features(3, 3, 3)
    got_h, got_c = cell(x, h, c)

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
    block = randomize(DetailContextBlock(3, kernels, None, False))
    called = []
    for layer in block.conv_h:
        layer.register_forward_hook(lambda *_: called.append(1))
    for size in ((2, 3), (9, 11)):
        (features_in,) = features(3, size=size)
        one = mean_of(block.conv_h, False)(features_in)
        assert not called
        apart = sum(layer(features_in) for layer in block.conv_h) / len(kernels)
        torch.testing.assert_close(one, apart, rtol=0, atol=1e-12)
        gradients = [torch.autograd.grad(out.square().sum(), [*block.conv_h.parameters()]) for out in (one, apart)]
        torch.testing.assert_close(*gradients, rtol=0, atol=1e-9)
        called.clear()


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
        assert [layer.kernel_size[0] for layer in dcb.conv_x] == [layer.kernel_size[0] for layer in dcb.conv_h] == kernels


@pytest.mark.parametrize("setup, size", [("patch4", 4), ("fullres", 16)])
def test_weight_maps(setup, size):
    """The last of each layer and step, in (0, 1): here those of layer 2 in the fourth step."""
    model = randomize(MoDeRNN(size=16, setup=setup, hidden=4, layers=2))
    frames, block, inputs = torch.rand(2, 4, 1, 16, 16, dtype=torch.float64), model.cells[1].dcb, []
    block.register_forward_pre_hook(lambda _, both: inputs.append(both))
    weights = layers_of(maps(model, frames, horizon=2), "weights")
    for layer in weights:
        assert {label: w.shape for label, w in layer.items()} == dict.fromkeys(
            ("Attn_H", "Attn_X"), (2, 5, 4, size, size))
    *_, attn_h, attn_x = literal_dcb(arrays(block), "", *(v[1].detach().numpy() for v in inputs[3]), kernels=3)
    for got, want in (weights[1]["Attn_H"], attn_h), (weights[1]["Attn_X"], attn_x):
        np.testing.assert_allclose(got[1, 3].numpy(), want, atol=1e-12)
        assert 0 < want.min() and want.max() < 1
    plain = maps(MoDeRNN(size=16, setup=setup, variant="no_dcb"), frames.float())
    assert {picture for picture, *_ in plain} == {"layers"}
