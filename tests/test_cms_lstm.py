"""CMS-LSTM: CE, SE and the cells against the equations, SE's tokens, its counts against the spec's tables."""

import numpy as np
import pytest
import torch
from conftest import count_macs, count_parameters, layers_of
from literal import apply, arrays, conv2d, layer_norm, randomize, sigmoid, softmax

from cms_lstm import (BUILT_OF, PUBLISHED, VARIANTS, CMSLSTM, CMSLSTMCell, ContextEmbedding, PredRNNCell,
                      SAConvLSTMCell, SpatiotemporalExpression, cut, join)
from train import maps


def literal_ce(w, name, x, h, steps=5):
    """Eq. 1, half-steps X, H, X, H, X."""
    for step in range(steps):
        if step % 2 == 0:
            x = 2 * sigmoid(apply(w, f"{name}conv_h", h)) * x
        else:
            h = 2 * sigmoid(apply(w, f"{name}conv_x", x)) * h
    return x, h


def literal_express(w, name, h, c, scales):
    """§3.2, Part 1: token by token. Returns ẑ (scales·C, H, 2W), H's half on the left."""
    channels, height, width = h.shape
    weight, bias = w[f"{name}qkv.weight"][:, :, 0, 0], w[f"{name}qkv.bias"]
    result = np.zeros((len(scales) * channels, height, 2 * width))
    for n, s in enumerate(scales):
        rows, columns = height // s, width // s
        Q, K, V = (slice((3 * n + part) * channels, (3 * n + part + 1) * channels) for part in range(3))
        for block_y in range(s):
            for block_x in range(s):
                # The positions of one block, in H and in C, are one sequence: (which of the two, y, x).
                tokens = [(side, y, x) for side in (0, 1) for y in range(block_y * rows, (block_y + 1) * rows)
                          for x in range(block_x * columns, (block_x + 1) * columns)]
                z = np.array([(h, c)[side][:, y, x] for side, y, x in tokens])           # (2HW/s², C)
                projected = z @ weight.T + bias
                attended = softmax(projected[:, Q] @ projected[:, K].T) @ projected[:, V] + z
                for (side, y, x), value in zip(tokens, attended):
                    result[n * channels : (n + 1) * channels, y, side * width + x] = value
    return result


def literal_se(w, name, h, c, scales, norm):
    channels, _, width = h.shape
    a = conv2d(literal_express(w, name, h, c, scales), w[f"{name}fuse.weight"], w[f"{name}fuse.bias"])
    if norm:
        a = layer_norm(a, w[f"{name}norm_a.weight"], w[f"{name}norm_a.bias"])
    a = apply(w, f"{name}mix", np.concatenate([a[:, :, :width], a[:, :, width:]]))
    gates = apply(w, f"{name}a2g", a) + apply(w, f"{name}h2g", h)
    i, g, o = sigmoid(gates[:channels]), np.tanh(gates[channels : 2 * channels]), sigmoid(gates[2 * channels :])
    c = (1 - i) * c + i * g
    if norm:
        c = layer_norm(c, w[f"{name}norm_c.weight"], w[f"{name}norm_c.bias"])
    return o * c, c


def literal_convlstm(w, x, h, c, norm):
    a = apply(w, "x2h", x) + apply(w, "h2h", h)
    i, f, g, o = np.split(a, 4)
    c = sigmoid(f + (1 if norm else 0)) * c + sigmoid(i) * np.tanh(g)
    if norm:
        c = layer_norm(c, w["norm_c.weight"], w["norm_c.bias"])
    return sigmoid(o) * np.tanh(c), c


def draw(number, channels=2, size=(4, 8)):
    return [torch.randn(1, channels, *size, dtype=torch.float64) for _ in range(number)]


def attended(se, h, c):
    """Part 1 of SE: what its first large convolution reads, (B, scales·C, H, 2W)."""
    read = []
    with se.fuse.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])):
        se(h, c)
    return read[0]


def same(got, want):
    np.testing.assert_allclose(got[0].detach().numpy(), want, atol=1e-11)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("steps", [2, 5])
def test_ce_is_the_equation(norm, steps):
    ce = randomize(ContextEmbedding(2, 3, (4, 8), norm, steps))
    x, h = draw(2)
    for got, want in zip(ce(x, h), literal_ce(arrays(ce), "", x[0].numpy(), h[0].numpy(), steps)):
        same(got, want)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 2, 4)])
def test_se_is_the_equations(norm, scales):
    se = randomize(SpatiotemporalExpression(2, 5, (4, 8), norm, scales))
    h, c = draw(2)
    for got, want in zip(se(h, c), literal_se(arrays(se), "", h[0].numpy(), c[0].numpy(), scales, norm)):
        same(got, want)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("ce, scales", [(True, (1, 2, 4)), (False, (1, 2)), (True, ()), (False, ())])
def test_cell_is_the_equations(norm, ce, scales):
    cell = randomize(CMSLSTMCell(2, 3, (4, 8), norm, ce, scales))
    x, h, c = draw(3)
    got_h, got_c = cell(x, h, c)

    w, (x, h, c) = arrays(cell), (v[0].numpy() for v in (x, h, c))
    if ce:
        x, h = literal_ce(w, "ce.", x, h)
    h, c = literal_convlstm(w, x, h, c, norm)
    if scales:
        h, c = literal_se(w, "se.", h, c, scales, norm)
    same(got_h, h)
    same(got_c, c)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("ce, scales", [(True, (1, 2, 4)), (False, ())])
def test_predrnn_cell_is_the_equations(norm, ce, scales):
    """The ST-LSTM, CE on (X_t, H_{t-1}) before it, SE on (H_t, C_t) after it, M untouched by both."""
    cell = randomize(PredRNNCell(2, 3, (4, 8), norm, ce, scales))
    x, h, c, m = draw(4)
    got_h, got_c, got_m = cell(x, h, c, m)

    w, (x, h, c, m) = arrays(cell), (v[0].numpy() for v in (x, h, c, m))
    if ce:
        x, h = literal_ce(w, "ce.", x, h)
    offset = 1 if norm else 0
    xs, hs, ms = np.split(apply(w, "x2h", x), 7), np.split(apply(w, "h2h", h), 4), np.split(apply(w, "m2h", m), 3)
    c = sigmoid(xs[1] + hs[1] + offset) * c + sigmoid(xs[0] + hs[0]) * np.tanh(xs[2] + hs[2])
    m = sigmoid(xs[4] + ms[1] + offset) * m + sigmoid(xs[3] + ms[0]) * np.tanh(xs[5] + ms[2])
    cm = np.concatenate([c, m])
    h = sigmoid(xs[6] + hs[3] + apply(w, "cm2o", cm)) * np.tanh(apply(w, "mix", cm))
    if scales:
        h, c = literal_se(w, "se.", h, c, scales, norm)
    for got, want in ((got_h, h), (got_c, c), (got_m, m)):
        same(got, want)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("ce, scales", [(True, (1, 2, 4)), (False, ())])
def test_sa_convlstm_cell_is_the_equations(norm, ce, scales):
    cell = randomize(SAConvLSTMCell(2, 3, (4, 8), norm, ce, scales))
    x, h, c, m = draw(4)
    got_h, got_c, got_m = cell(x, h, c, m)

    w, (x, h, c, m) = arrays(cell), (v[0].numpy() for v in (x, h, c, m))
    if ce:
        x, h = literal_ce(w, "ce.", x, h)
    h, c = literal_convlstm(w, x, h, c, norm)
    if scales:
        h, c = literal_se(w, "se.", h, c, scales, norm)
    (q, k, v), (k_m, v_m) = ([part.reshape(2, -1) for part in np.split(apply(w, name, of), n)]
                             for name, of, n in (("qkv_h", h, 3), ("kv_m", m, 2)))
    z = np.concatenate([v @ softmax(q.T @ k).T, v_m @ softmax(q.T @ k_m).T]).reshape(4, 4, 8)
    a = np.concatenate([apply(w, "fuse", z), h])
    i, g, o = np.split(apply(w, "gates.1", conv2d(a, w["gates.0.weight"], w["gates.0.bias"])), 3)
    m = (1 - sigmoid(i)) * m + sigmoid(i) * np.tanh(g)
    for got, want in ((got_h, sigmoid(o) * m), (got_c, c), (got_m, m)):
        same(got, want)


@pytest.mark.parametrize("variant", ["predrnn", "predrnn_full"])
def test_the_transplanted_memory_zigzags(variant):
    """Up the layers inside a step, from the top to the bottom between steps; C and H stay in their layer."""
    model = CMSLSTM(size=16, hidden=4, layers=3, variant=variant).double()
    state = [tuple(torch.randn(3, 1, 4, 4, 4, dtype=torch.float64)) for _ in range(3)]
    frame, m = torch.randn(1, 16, 4, 4, dtype=torch.float64), state[-1][2]
    for _ in range(2):
        h, want = model.embed(frame), []
        for cell, (h_before, c, _) in zip(model.cells, state):
            h, c, m = cell(h, h_before, c, m)
            want.append((h, c, m))
        frame, state = model.step(frame, state)
        torch.testing.assert_close((frame, state), (model.output(h), want), rtol=0, atol=0)


def test_every_row_of_table_3():
    """Every variant is built of something and published, and what it is built of is what its cells hold."""
    assert set(VARIANTS) == set(BUILT_OF) == {row["variant"] for row in PUBLISHED if "Table" in row["source"]}
    for variant, (cell_class, with_ce, scales) in BUILT_OF.items():
        for cell in CMSLSTM(size=16, hidden=4, variant=variant).cells:
            assert type(cell) is cell_class and (cell.ce is not None) == with_ce
            assert (cell.se.scales if cell.se else ()) == scales


def test_blocks_stand_on_their_own():
    ce, se = ContextEmbedding(6), SpatiotemporalExpression(6)
    for size in ((4, 8), (12, 4)):
        x, h, c = torch.randn(3, 2, 6, *size)
        assert [v.shape for v in (*ce(x, h), *se(h, c))] == 4 * [(2, 6, *size)]


@pytest.mark.parametrize("s", [1, 2, 4])
def test_cut_and_join(s):
    z = torch.arange(3 * 8 * 24.0).reshape(1, 3, 8, 24)
    tokens = cut(z, s)
    assert tokens.shape == (1, s * s, 2 * 8 * 12 // s**2, 3)
    torch.testing.assert_close(join(tokens, s, 8, 24), z, rtol=0, atol=0)
    # The first block: the top left corner of H (columns 0…) and that of C (columns 12…).
    corner = torch.stack([z[..., : 8 // s, : 12 // s], z[..., : 8 // s, 12 : 12 + 12 // s]])
    assert set(tokens[0, 0, :, 0].tolist()) == set(corner[:, 0, 0].flatten().tolist())


@pytest.mark.parametrize("variant", ["full", "se2", "predrnn_no_ce", "sa_convlstm_no_ce"])
def test_attention_maps_are_the_softmax(variant):
    """What a point attends to, times Value, is what SE computes there; of sum 1 over H and C at each scale."""
    model = randomize(CMSLSTM(size=(32, 64), hidden=3, layers=2, variant=variant))
    frames, se, read = torch.rand(2, 3, 1, 32, 64, dtype=torch.float64), model.cells[1].se, []
    se.register_forward_pre_hook(lambda _, both: read.append(both))
    for y, x in ((9, 39), (31, 0)):
        read.clear()
        weights = layers_of(maps(model, frames, horizon=1, point=(y, x)), "attention")[1]
        assert list(weights) == [f"scale {s}, {state}" for s in se.scales for state in "HC"]
        for n, s in enumerate(se.scales):
            side_by_side = torch.cat([weights[f"scale {s}, {state}"] for state in "HC"], 3)       # (B, steps, H, 2W)
            torch.testing.assert_close(side_by_side.sum((2, 3)), torch.ones(2, 3, dtype=torch.float64))
            inside = (side_by_side > 0).sum((2, 3))
            assert (inside == 2 * 8 * 16 // s**2).all()           # a block of H and that of C, 0 outside
            for t, (h, c) in enumerate(read[:3]):
                z = torch.cat([h, c], 3)
                value = se.qkv(z).chunk(3 * len(se.scales), 1)[3 * n + 2]
                want = (value * side_by_side[:, t, None]).sum((2, 3)) + z[:, :, y // 4, x // 4]
                torch.testing.assert_close(attended(se, h, c)[:, 3 * n : 3 * n + 3, y // 4, x // 4], want)


def test_no_score_matrix_is_stored():
    """For the backward pass nothing near the size of one score matrix of 2HW × 2HW is kept."""
    se, kept = SpatiotemporalExpression(4, 3), []
    h, c = torch.randn(2, 1, 4, 16, 32)
    with torch.autograd.graph.saved_tensors_hooks(lambda v: kept.append(v.numel()) or v, lambda v: v):
        se(h.requires_grad_(), c)
    assert 0 < max(kept) < (2 * 16 * 32) ** 2 / 10


@pytest.mark.parametrize("variant, parameters", [
    ("full", 7_967_568), ("no_se", 2_918_480), ("no_ce", 7_410_512), ("se1", 7_048_528), ("se2", 7_508_048),
    ("convlstm", 2_361_424),
    # PredRNN's and SA-ConvLSTM's own counts under `patch4`, 8,554,576 and 4,678,992, with 3×3 gates for 5×5; plus CE's
    # 557,056 = 2,918,480 - 2,361,424 and SE's 5,049,088 = 7,410,512 - 2,361,424.
    ("predrnn", 8_554_576 - 4 * 16 * 64 * 64 * 16), ("predrnn_full", 4_360_272 + 557_056 + 5_049_088),
    ("predrnn_no_se", 4_360_272 + 557_056), ("predrnn_no_ce", 4_360_272 + 5_049_088),
    ("sa_convlstm", 4_678_992 - 4 * 16 * 64 * 64 * 8), ("sa_convlstm_no_se", 2_581_840 + 557_056),
    ("sa_convlstm_no_ce", 2_581_840 + 5_049_088)])
def test_parameters(variant, parameters):
    assert count_parameters(CMSLSTM(variant=variant)) == parameters


def test_parameters_of_other_forms():
    assert count_parameters(CMSLSTM(setup="fullres")) == 1_123_489
    assert count_parameters(CMSLSTM(setup="fullres", variant="predrnn")) == 900_193
    assert round(count_parameters(CMSLSTM(kernel=5)) / 1e6, 3) == 10.589


def test_multiply_accumulates():
    assert round(count_macs(CMSLSTM, 20) / 1e9, 1) == 38.2
    taxibj = dict(setup="fullres", size=32, channels=2)
    assert round(count_macs(CMSLSTM, 8, **taxibj) / 1e9, 1) == 25.6
    # The attention's matrix products: two of 2HW/s² × 2HW/s² × C in each of s² blocks, at 7 steps of 6 layers.
    attention = 7 * 6 * sum(s**2 * 2 * (2 * 32 * 32 // s**2) ** 2 * 32 for s in (1, 2, 4))
    assert round((count_macs(CMSLSTM, 8, **taxibj) - attention) / 1e9, 1) == 10.8      # Table 4's 11.5G, less softmax


@pytest.mark.parametrize("variant, size, works", [
    ("full", 48, True), ("full", 40, False), ("se2", 40, True), ("se2", 36, False), ("se1", 36, True)])
def test_sizes_that_the_scales_divide(variant, size, works):
    if works:
        CMSLSTM(size=size, variant=variant, hidden=4)
    else:
        with pytest.raises(ValueError, match=f"{size}×{size}: .* of {dict(full=16, se2=8)[variant]}, patch × scale"):
            CMSLSTM(size=size, variant=variant, hidden=4)


def test_maps():
    """X before CE is the embedded frame, or the output of the layer below; no picture without its block."""
    model = CMSLSTM(size=(16, 32), hidden=8, layers=2, channels=2)
    frames = torch.rand(2, 4, 2, 16, 32)
    pictures = maps(model, frames, horizon=2)
    assert {picture for picture, *_ in pictures} == {"layers", "ce_input", "attention"}
    hidden, inputs = layers_of(pictures, "layers"), layers_of(pictures, "ce_input")
    for layers in (hidden, inputs):
        assert [w.shape for layer in layers for w in layer.values()] == len(layers[0]) * 2 * [(2, 5, 8, 4, 8)]
    before, after = zip(*(layer.values() for layer in inputs))
    embedded = model.embed(torch.nn.functional.pixel_unshuffle(frames[:, 1], 4))
    torch.testing.assert_close(before[0][:, 1], embedded)
    torch.testing.assert_close(before[1], hidden[0]["H"])
    torch.testing.assert_close(after[0][:, 1], model.cells[0].ce(embedded, hidden[0]["H"][:, 0])[0])
    for variant, keys in dict(convlstm={"layers"}, no_se={"layers", "ce_input"}, no_ce={"layers", "attention"}).items():
        model = CMSLSTM(size=16, hidden=8, variant=variant)
        assert {picture for picture, *_ in maps(model, torch.rand(1, 3, 1, 16, 16), point=(8, 8))} == keys
