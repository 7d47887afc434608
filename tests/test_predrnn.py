"""PredRNN against its equations, its counts against the spec's tables, its memory's path, V2's loss and sampling."""

import math

import numpy as np
import pytest
import torch
from conftest import count_macs, count_parameters
from literal import apply, arrays, conv2d, randomize, sigmoid

from predrnn import TRAINING, PredRNN, STLSTMCell

SMALL = dict(size=16, hidden=8, layers=3, kernel=3)


@pytest.mark.parametrize("norm", [True, False])
def test_cell_is_the_equations(norm):
    cell = randomize(STLSTMCell(2, 3, 3, (4, 5), norm))
    x, h, c, m = (torch.randn(1, n, 4, 5, dtype=torch.float64) for n in (2, 3, 3, 3))
    got = cell(x, h, c, m)

    w, (x, h, c, m) = arrays(cell), (v[0].numpy() for v in (x, h, c, m))
    from_x, from_h, from_m = apply(w, "x2h", x), apply(w, "h2h", h), apply(w, "m2h", m)
    offset = 1 if norm else 0
    i, f, g = sigmoid(from_x[0:3] + from_h[0:3]), sigmoid(from_x[3:6] + from_h[3:6] + offset), from_x[6:9] + from_h[6:9]
    c = f * c + i * np.tanh(g)
    i2, f2, g2 = (sigmoid(from_x[9:12] + from_m[0:3]), sigmoid(from_x[12:15] + from_m[3:6] + offset),
                  from_x[15:18] + from_m[6:9])
    m = f2 * m + i2 * np.tanh(g2)
    o = from_x[18:21] + from_h[9:12]
    if norm:                                                      # one LayerNorm over the sum of the two
        o = sigmoid(o + apply(w, "cm2o", np.concatenate([c, m])))
    else:                                                         # W_co * C + W_mo * M + b_o, written as two
        weight = w["cm2o.weight"]
        o = sigmoid(o + conv2d(c, weight[:, :3]) + conv2d(m, weight[:, 3:]) + w["cm2o.bias"][:, None, None])
    h = o * np.tanh(apply(w, "mix", np.concatenate([c, m])))
    for computed, expected in zip(got, (h, c, m, i * np.tanh(g), i2 * np.tanh(g2))):
        np.testing.assert_allclose(computed[0].detach().numpy(), expected, atol=1e-12)


@pytest.mark.parametrize("setup, variant, parameters", [
    ("patch4", "full", 8_554_576), ("patch4", "v2", 8_558_672), ("patch4", "decouple", 8_558_672),
    ("patch4", "reverse_sampling", 8_554_576), ("fullres", "full", 900_193), ("fullres", "v2", 901_249)])
def test_parameters(setup, variant, parameters):
    assert count_parameters(PredRNN(setup=setup, variant=variant)) == parameters


def test_multiply_accumulates():
    """test_costs.py counts training steps. A prediction alone does not run W_dec: V2's costs what PredRNN's costs."""
    assert round(count_macs(PredRNN, 20) / 1e9, 1) == 32.0
    assert round(count_macs(PredRNN, 20, setup="fullres", variant="v2") / 1e9, 1) == 69.8


@pytest.mark.parametrize("setup", ["patch4", "fullres"])
def test_memory_zigzags(setup):
    """What the top layer writes into M at step 1 is what the bottom layer reads at step 2, and no layer before."""
    model = PredRNN(setup=setup, patch=4, **SMALL)
    frames, disturb = torch.rand(1, 5, 1, 16, 16), False
    calls = []                                                    # (step, layer) in order: m in, m out, h out

    def record(layer):
        def hook(cell, inputs, outputs):
            h, c, m, *increments = outputs
            if disturb and len(calls) == 1 * 3 + 2:               # step 1, top layer
                m = m + 0.5
            calls.append((inputs[3], m, h))
            return h, c, m, *increments
        return hook

    for layer, cell in enumerate(model.cells):
        cell.register_forward_hook(record(layer))
    with torch.no_grad():
        plain, before = model(frames), calls.copy()
        calls.clear()
        disturb = True
        other, after = model(frames), calls
    assert torch.equal(before[0][0], torch.zeros_like(before[0][0]))
    for k in range(1, 12):                                        # M has one path
        assert torch.equal(before[k][0], before[k - 1][1]) and torch.equal(after[k][0], after[k - 1][1])
    for k, (a, b) in enumerate(zip(before, after)):
        same = [torch.equal(u, v) for u, v in zip(a, b)]
        if k < 5:
            assert same == [True, True, True]                     # nothing earlier
        elif k == 5:
            assert same == [True, False, True]                    # the change itself
        else:
            assert same == [False, False, False]                  # k = 6 is the bottom layer, one step later
    torch.testing.assert_close(plain[:, :2], other[:, :2], rtol=0, atol=0)
    assert not torch.allclose(plain[:, 2], other[:, 2])


@pytest.mark.parametrize("setup", ["patch4", "fullres"])
@pytest.mark.parametrize("variant", ["v2", "decouple"])
def test_decoupling_loss(setup, variant):
    model = randomize(PredRNN(setup=setup, variant=variant, patch=4, decouple_weight=3.0, **SMALL))
    increments = []                                               # (i ∘ g, i' ∘ g') of every step and layer
    for cell in model.cells:
        cell.register_forward_hook(lambda cell, inputs, outputs: increments.append(outputs[3:]))
    frames = torch.rand(2, 4, 1, 16, 16, dtype=torch.float64)
    predictions, loss = model(frames, horizon=2, with_loss=True)

    w, values = arrays(model.decouple), []
    assert ("bias" in w) == (setup == "fullres") and len(increments) == 5 * 3         # steps × layers
    for into_c, into_m in increments:
        for b in range(2):
            delta_c, delta_m = (conv2d(v[b].detach().numpy(), w["weight"], w.get("bias")) for v in (into_c, into_m))
            for a, b_ in zip(delta_c, delta_m):                   # a channel
                values.append(abs((a * b_).sum()) / (math.sqrt((a**2).sum()) * math.sqrt((b_**2).sum())))
    assert model.has_auxiliary_loss and loss.item() == pytest.approx(3.0 * np.mean(values), rel=1e-9)
    torch.testing.assert_close(predictions, model(frames, horizon=2), rtol=0, atol=0)


def test_decoupling_loss_teaches_the_gates():
    model = PredRNN(variant="v2", **SMALL)
    model(torch.rand(1, 4, 1, 16, 16), with_loss=True)[1].backward()
    assert model.decouple.weight.grad.norm() > 0
    assert all(cell.x2h[0].weight.grad.norm() > 0 for cell in model.cells)
    assert model.output.weight.grad is None                       # no prediction is in this loss, or read again


@pytest.mark.parametrize("variant", ["full", "reverse_sampling"])
def test_no_decoupling_loss(variant):
    model, frames = PredRNN(variant=variant, **SMALL), torch.rand(1, 4, 1, 16, 16)
    predictions, loss = model(frames, with_loss=True)
    assert not model.has_auxiliary_loss and loss.item() == 0 and torch.equal(predictions, model(frames))


def test_decoupling_weight():
    assert PredRNN(variant="v2").decouple_weight == pytest.approx(409.6)            # 0.1·C·H·W
    assert PredRNN(variant="v2", size=(32, 64), channels=2, patch=2).decouple_weight == pytest.approx(409.6)
    assert PredRNN(variant="v2", setup="fullres").decouple_weight == pytest.approx(1.92)      # 0.01·layers·hidden
    kth = TRAINING["patch4"]["data"]["kth"]["model"]
    assert PredRNN(variant="v2", size=128, **kth).decouple_weight == pytest.approx(163.84)    # 0.01·C·H·W


@pytest.mark.parametrize("variant", ["v2", "reverse_sampling"])
@pytest.mark.parametrize("setup, data, iteration, iterations, rising, falling", [
    # k₁, k₂, α = 25,000, 50,000, 2,500 of 80,000
    ("patch4", None, 0, 80_000, 0.5, 0.5), ("patch4", None, 25_000, 80_000, 0.5, 0.5),
    ("patch4", None, 27_500, 80_000, 1 - 0.5 / math.e, 0.45),
    ("patch4", None, 37_500, 80_000, 1 - 0.5 * math.exp(-5), 0.25),
    ("patch4", None, 50_000, 80_000, 1, 0), ("patch4", None, 79_999, 80_000, 1, 0),
    ("patch4", None, 275, 800, 1 - 0.5 / math.e, 0.45),           # scaled with the length
    # KTH: 5,000, 50,000, 2,000 of 80,000
    ("patch4", "kth", 4_999, 80_000, 0.5, 0.5), ("patch4", "kth", 50_000, 80_000, 1, 0),
    ("patch4", "kth", 9_000, 80_000, 1 - 0.5 * math.exp(-2), 0.5 * 41 / 45),
    # 100,000, 200,000, 20,000 of 300,000
    ("fullres", None, 99_999, 300_000, 0.5, 0.5), ("fullres", None, 200_000, 300_000, 1, 0),
    ("fullres", None, 120_000, 300_000, 1 - 0.5 / math.e, 0.4)])
def test_reverse_scheduled_sampling(variant, setup, data, iteration, iterations, rising, falling):
    options = TRAINING[setup]["data"][data]["model"] if data else {}
    model = PredRNN(setup=setup, variant=variant, patch=4, **SMALL, **options)
    p = model.truth_probability(iteration, iterations, 4, 7)
    assert p == pytest.approx([1] + 3 * [rising] + 3 * [falling], abs=1e-12)


@pytest.mark.parametrize("variant", ["full", "decouple"])
def test_scheduled_sampling_without_reversal(variant):
    model = PredRNN(variant=variant, **SMALL)
    assert model.truth_probability(25_000, 80_000, 4, 7) == [1, 1, 1, 1, 0.5, 0.5, 0.5]
    assert model.truth_probability(60_000, 80_000, 4, 7) == [1, 1, 1, 1, 0, 0, 0]
