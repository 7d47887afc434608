"""CMS-LSTM: CE, SE and the cells against the equations, SE's tokens, its counts against the spec's tables."""

import numpy as np
import pytest
import torch
from conftest import count_macs, count_parameters
from literal import apply, arrays, conv2d, layer_norm, randomize, sigmoid, softmax

from cms_lstm import (BUILT_OF, PUBLISHED, VARIANTS, CMSLSTM, CMSLSTMCell, ContextEmbedding, PredRNNCell,
                      SAConvLSTMCell, SpatiotemporalExpression, cut, uncut)


def literal_ce(w, name, x, h, steps=5):
    """Eq. 1, half-steps X, H, X, H, X."""
    for step in range(steps):
        if step % 2 == 0:
            x = 2 * sigmoid(apply(w, f"{name}of_h", h)) * x
        else:
            h = 2 * sigmoid(apply(w, f"{name}of_x", x)) * h
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


def maps(number, channels=2, size=(4, 8)):
    return [torch.randn(1, channels, *size, dtype=torch.float64) for _ in range(number)]


def same(got, want):
    np.testing.assert_allclose(got[0].detach().numpy(), want, atol=1e-11)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("steps", [2, 5])
def test_ce_is_the_equation(norm, steps):
    ce = randomize(ContextEmbedding(2, 3, steps, norm, (4, 8)))
    x, h = maps(2)
    for got, want in zip(ce(x, h), literal_ce(arrays(ce), "", x[0].numpy(), h[0].numpy(), steps)):
        same(got, want)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("scales", [(1,), (1, 2), (1, 2, 4)])
def test_se_is_the_equations(norm, scales):
    se = randomize(SpatiotemporalExpression(2, scales, 5, norm, (4, 8)))
    h, c = maps(2)
    for got, want in zip(se(h, c), literal_se(arrays(se), "", h[0].numpy(), c[0].numpy(), scales, norm)):
        same(got, want)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("ce_steps, scales", [(5, (1, 2, 4)), (0, (1, 2)), (5, ()), (0, ())])
def test_cell_is_the_equations(norm, ce_steps, scales):
    cell = randomize(CMSLSTMCell(2, 3, (4, 8), norm, ce_steps, scales))
    x, h, c = maps(3)
    (got_h, got_c), memory, seen = cell(x, (h, c), "handed on")
    assert memory == "handed on" and seen == {}

    w, (x, h, c) = arrays(cell), (v[0].numpy() for v in (x, h, c))
    if ce_steps:
        x, h = literal_ce(w, "ce.", x, h, ce_steps)
    h, c = literal_convlstm(w, x, h, c, norm)
    if scales:
        h, c = literal_se(w, "se.", h, c, scales, norm)
    same(got_h, h)
    same(got_c, c)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("ce_steps, scales", [(5, (1, 2, 4)), (0, ())])
def test_predrnn_cell_is_the_equations(norm, ce_steps, scales):
    """The ST-LSTM, CE on (X_t, H_{t-1}) before it, SE on (H_t, C_t) after it, M untouched by both."""
    cell = randomize(PredRNNCell(2, 3, (4, 8), norm, ce_steps, scales))
    x, h, c, m = maps(4)
    (got_h, got_c), got_m, _ = cell(x, (h, c), m)

    w, (x, h, c, m) = arrays(cell), (v[0].numpy() for v in (x, h, c, m))
    if ce_steps:
        x, h = literal_ce(w, "ce.", x, h)
    offset = 1 if norm else 0
    xs, hs, ms = np.split(apply(w, "x2h", x), 7), np.split(apply(w, "h2h", h), 4), np.split(apply(w, "m2h", m), 3)
    c = sigmoid(xs[1] + hs[1] + offset) * c + sigmoid(xs[0] + hs[0]) * np.tanh(xs[2] + hs[2])
    m = sigmoid(xs[4] + ms[1] + offset) * m + sigmoid(xs[3] + ms[0]) * np.tanh(xs[5] + ms[2])
    cm = np.concatenate([c, m])
    h = sigmoid(xs[6] + hs[3] + apply(w, "cm2o", cm)) * np.tanh(apply(w, "last", cm))
    if scales:
        h, c = literal_se(w, "se.", h, c, scales, norm)
    for got, want in ((got_h, h), (got_c, c), (got_m, m)):
        same(got, want)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("ce_steps, scales", [(5, (1, 2, 4)), (0, ())])
def test_sa_convlstm_cell_is_the_equations(norm, ce_steps, scales):
    """CE before the gates, SE between the gates and the self-attention memory."""
    cell = randomize(SAConvLSTMCell(2, 3, (4, 8), norm, ce_steps, scales))
    x, h, c, m = maps(4)
    (got_h, got_c, got_m), _, _ = cell(x, (h, c, m))

    w, (x, h, c, m) = arrays(cell), (v[0].numpy() for v in (x, h, c, m))
    if ce_steps:
        x, h = literal_ce(w, "ce.", x, h)
    h, c = literal_convlstm(w, x, h, c, norm)
    if scales:
        h, c = literal_se(w, "se.", h, c, scales, norm)
    (q, k, v), (k_m, v_m) = ([part.reshape(2, -1) for part in np.split(apply(w, name, of), n)]
                             for name, of, n in (("qkv_h", h, 3), ("kv_m", m, 2)))
    z = np.concatenate([v @ softmax(q.T @ k).T, v_m @ softmax(q.T @ k_m).T]).reshape(4, 4, 8)
    a = np.concatenate([apply(w, "mix_z", z), h])
    i, g, o = np.split(apply(w, "zh2g.1", conv2d(a, w["zh2g.0.weight"], w["zh2g.0.bias"])), 3)
    m = (1 - sigmoid(i)) * m + sigmoid(i) * np.tanh(g)
    for got, want in ((got_h, sigmoid(o) * m), (got_c, c), (got_m, m)):
        same(got, want)


@pytest.mark.parametrize("variant", ["predrnn", "predrnn_full"])
def test_the_transplanted_memory_zigzags(variant):
    """Up the layers inside a step, from the top to the bottom between steps; C and H stay in their layer."""
    model = CMSLSTM(size=16, hidden=4, layers=3, variant=variant).double()
    states = torch.randn(6, 1, 4, 4, 4, dtype=torch.float64)
    frame, memory = torch.randn(1, 16, 4, 4, dtype=torch.float64), torch.randn(1, 4, 4, 4, dtype=torch.float64)
    states = list(zip(states[::2], states[1::2]))
    for _ in range(2):
        h, want, m = model.embed(frame), [], memory
        for cell, state in zip(model.cells, states):
            state, m, _ = cell(h, state, m)
            h = state[0]
            want.append(state)
        frame, (states, memory), _ = model.step(frame, (states, memory))
        torch.testing.assert_close((frame, states, memory), (model.output(h), want, m), rtol=0, atol=0)


def test_every_row_of_table_3():
    """Every variant is built of something and published, and what it is built of is what its cells hold."""
    assert set(VARIANTS) == set(BUILT_OF) == {row["variant"] for row in PUBLISHED if "Table" in row["source"]}
    cells = dict(convlstm=CMSLSTMCell, predrnn=PredRNNCell, sa_convlstm=SAConvLSTMCell)
    for variant, (backbone, with_ce, scales) in BUILT_OF.items():
        for cell in CMSLSTM(size=16, hidden=4, variant=variant).cells:
            assert type(cell) is cells[backbone] and (cell.ce is not None) == with_ce
            assert (cell.se.scales if cell.se else ()) == scales


def test_blocks_stand_on_their_own():
    """Without LayerNorm they need no size: round any cell, on any maps that the scales divide."""
    ce, se = ContextEmbedding(6), SpatiotemporalExpression(6)
    for size in ((4, 8), (12, 4)):
        x, h, c = torch.randn(3, 2, 6, *size)
        assert [v.shape for v in (*ce(x, h), *se(h, c))] == 4 * [(2, 6, *size)]


@pytest.mark.parametrize("s", [1, 2, 4])
def test_cut_and_uncut(s):
    z = torch.arange(3 * 8 * 24.0).reshape(1, 3, 8, 24)
    tokens = cut(z, s)
    assert tokens.shape == (1, s * s, 2 * 8 * 12 // s**2, 3)
    torch.testing.assert_close(uncut(tokens, s, 8, 12), z, rtol=0, atol=0)
    # The first block: the top left corner of H (columns 0…) and that of C (columns 12…).
    corner = torch.stack([z[..., : 8 // s, : 12 // s], z[..., : 8 // s, 12 : 12 + 12 // s]])
    assert set(tokens[0, 0, :, 0].tolist()) == set(corner[:, 0, 0].flatten().tolist())


def test_one_pixel_of_c_is_seen_inside_its_block_only():
    """At every scale, before the 5×5: in H's half and in C's half alike, everywhere in the block and nowhere else."""
    se = randomize(SpatiotemporalExpression(3, (1, 2, 4)))
    h, c = maps(2, 3, (8, 16))
    y, x = 2, 9
    moved = c.clone()
    moved[..., y, x] += 1
    change = (se.express(torch.cat([h, moved], 3)) - se.express(torch.cat([h, c], 3))).abs()[0]    # (9, 8, 32)
    for change, s in zip(change.chunk(3), (1, 2, 4)):
        rows, columns = 8 // s, 16 // s
        inside = torch.zeros(8, 16, dtype=torch.bool)
        top, left = y // rows * rows, x // columns * columns
        inside[top : top + rows, left : left + columns] = True
        for half in change.amax(0).chunk(2, 1):                   # H's, C's
            assert (half[~inside] == 0).all() and (half[inside] > 0).all()


def test_scale_1_is_attention_over_all_tokens():
    """Plain softmax(QᵀK)V over the 2·H·W positions of H and C, whatever their order, plus the shortcut."""
    se = randomize(SpatiotemporalExpression(3, (1,)))
    h, c = maps(2, 3)
    z = torch.cat([h.flatten(2), c.flatten(2)], 2)[0]             # (C, 2HW)
    q, k, v = (se.qkv.weight[:, :, 0, 0] @ z + se.qkv.bias[:, None]).chunk(3)
    attended = (torch.softmax(q.T @ k, -1) @ v.T).T + z
    got = torch.cat([half.flatten(2) for half in se.express(torch.cat([h, c], 3)).chunk(2, 3)], 2)[0]
    torch.testing.assert_close(got, attended, rtol=0, atol=1e-12)


def test_attention_maps_are_the_softmax():
    """The maps of a point, times Value, give what SE computes there; one a scale over H and C, 0 outside the block."""
    se, points = randomize(SpatiotemporalExpression(3, (1, 2, 4))), [(2, 9), (7, 0)]
    h, c = maps(2, 3, (8, 16))
    found, z = se.attention(h, c, points), torch.cat([h, c], 3)
    assert found.shape == (1, 2, 6, 8, 16)
    found = found.unflatten(2, (3, 2))                            # (1, points, scales, H or C, H, W)
    torch.testing.assert_close(found.sum((3, 4, 5)), torch.ones(1, 2, 3, dtype=torch.float64))
    for n, (y, x) in enumerate(points):
        for scale, qkv in enumerate(se.qkv(z).chunk(3, 1)):
            side_by_side = torch.cat([*found[0, n, scale]], 1)    # (H, 2W)
            want = (qkv.chunk(3, 1)[2][0] * side_by_side).sum((1, 2)) + h[0, :, y, x]
            torch.testing.assert_close(se.express(z)[0, 3 * scale : 3 * scale + 3, y, x], want)


def test_no_score_matrix_is_stored():
    """For the backward pass nothing near the size of one score matrix of 2HW × 2HW is kept."""
    se, kept = SpatiotemporalExpression(4, (1, 2, 4), 3), []
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
    assert count_parameters(CMSLSTM(ce_steps=10)) == 7_967_568    # the half-steps share their weights


def test_multiply_accumulates():
    assert round(count_macs(CMSLSTM, 20) / 1e9, 1) == 38.2
    taxibj = dict(setup="fullres", size=32, channels=2)
    assert round(count_macs(CMSLSTM, 8, **taxibj) / 1e9, 1) == 25.6
    # The attention's matrix products: two of 2HW/s² × 2HW/s² × C in each of s² blocks, at 7 steps of 6 layers.
    attention = 7 * 6 * sum(s**2 * 2 * (2 * 32 * 32 // s**2) ** 2 * 32 for s in (1, 2, 4))
    assert round((count_macs(CMSLSTM, 8, **taxibj) - attention) / 1e9, 1) == 10.8      # Table 4's 11.5G, less softmax


def test_half_steps():
    """`ce_steps` reaches the cells, and changes what they do."""
    models = []
    for steps in (5, 10):
        torch.manual_seed(0)
        models.append(CMSLSTM(size=16, hidden=8, variant="no_se", ce_steps=steps))
    assert [cell.ce.steps for cell in models[1].cells] == 4 * [10]
    frames = torch.rand(1, 4, 1, 16, 16)
    assert not torch.allclose(models[0](frames), models[1](frames))
    with pytest.raises(ValueError, match="ce_steps"):
        CMSLSTM(ce_steps=1)


@pytest.mark.parametrize("variant, size, works", [
    ("full", 48, True), ("full", 40, False), ("se2", 40, True), ("se2", 36, False), ("se1", 36, True),
    ("no_se", 36, True)])
def test_sizes_that_the_scales_divide(variant, size, works):
    if works:
        CMSLSTM(size=size, variant=variant, hidden=4)
    else:
        nearest = dict(full="32×32, 32×48, 48×32, 48×48", se2="32×32, 32×40, 40×32, 40×40")[variant]
        with pytest.raises(ValueError, match=nearest):
            CMSLSTM(size=size, variant=variant, hidden=4)


def test_extras():
    model = CMSLSTM(size=(16, 32), hidden=8, layers=2, channels=2)
    frames = torch.rand(2, 4, 2, 16, 32)
    _, found = model(frames, horizon=2, extras=[(0, 1), (15, 31), (8, 8)])
    assert set(found) == {"layers", "ce_input", "attention"}
    assert [v.shape for v in found["ce_input"]] == 2 * [(2, 5, 2, 8, 4, 8)]
    assert [v.shape for v in found["attention"]] == 2 * [(2, 5, 3, 6, 4, 8)]
    # A pixel is asked for, the patch that holds it answers; at scale 4 its block of 1 × 2 patches.
    answered = found["attention"][1][0, -1, 1, 4:].sum(0).nonzero()
    assert set(map(tuple, answered.tolist())) == {(3, 6), (3, 7)}
    centre = model(frames, extras=True)[1]["attention"][0]
    torch.testing.assert_close(centre, model(frames, extras=[(8, 16)])[1]["attention"][0])
    # The input of layer 1 before CE is the embedded frame, that of layer 2 the first layer's hidden state.
    embedded = model.embed(torch.nn.functional.pixel_unshuffle(frames[:, 1], 4))
    torch.testing.assert_close(found["ce_input"][0][:, 1, 0], embedded)
    torch.testing.assert_close(found["ce_input"][1][:, :, 0], found["layers"][0])
    for variant, keys in dict(convlstm={"layers"}, no_se={"layers", "ce_input"}, no_ce={"layers", "attention"}).items():
        assert set(CMSLSTM(size=16, hidden=8, variant=variant)(torch.rand(1, 3, 1, 16, 16), extras=True)[1]) == keys
    with pytest.raises(ValueError, match="query points"):
        model(frames, extras=[(16, 0)])
