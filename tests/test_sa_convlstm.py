"""SA-ConvLSTM against its equations, its counts against the spec's, its attention against the literal softmax."""

import numpy as np
import pytest
import torch
from conftest import count_macs, count_parameters, layers_of
from literal import apply, arrays, conv2d, layer_norm, randomize, sigmoid, softmax
from torch.nn.attention import SDPBackend, sdpa_kernel

from sa_convlstm import VARIANTS, SAConvLSTM, SAConvLSTMCell, SelfAttentionMemory, attend
from train import maps

SMALL = dict(size=16, hidden=8, layers=3, kernel=3)
ATTENDS = {"full": ["Z_h", "Z_m"], "no_zm": ["Z_h"], "base": ["X", "H"]}    # variants with attention: labels of maps


def weights_of(q, k):
    """α of Eq. 2-3 as an (N, N) matrix, from q and k (C, H, W), one product after the other."""
    q, k = q.reshape(len(q), -1), k.reshape(len(k), -1)
    scores = np.array([[sum(q[c, i] * k[c, j] for c in range(len(q))) for j in range(k.shape[1])]
                       for i in range(q.shape[1])])
    return softmax(scores)


def gathered(q, k, v):
    """Z of Eq. 4: a weighted sum over all positions for every position."""
    alpha, flat = weights_of(q, k), v.reshape(len(v), -1)
    z = np.stack([sum(alpha[i, j] * flat[:, j] for j in range(len(alpha))) for i in range(len(alpha))], 1)
    return z.reshape(v.shape)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_cell_is_the_equations(variant, norm):
    cell = randomize(SAConvLSTMCell(2, 3, 3, (4, 5), norm, variant))
    x, h, c, m = (torch.randn(1, n, 4, 5, dtype=torch.float64) for n in (2, 3, 3, 3))
    got = cell(x, h, c, m)

    w, (x, h, c, m) = arrays(cell), (v[0].numpy() for v in (x, h, c, m))
    if variant == "base":
        for name, v in (("attend_x", x), ("attend_h", h)):
            qkv = apply(w, f"{name}.qkv", v)
            z = gathered(*np.split(qkv, 3))
            v += apply(w, f"{name}.fuse", z)                      # in place: Ĥ = W_f Z + H
    a = apply(w, "x2h", x) + apply(w, "h2h", h)
    i, f, g, o = a[0:3], a[3:6], a[6:9], a[9:12]
    c = sigmoid(f + (1 if norm else 0)) * c + sigmoid(i) * np.tanh(g)
    if norm:
        c = layer_norm(c, w["norm_c.weight"], w["norm_c.bias"])
    h = sigmoid(o) * np.tanh(c)
    if variant in ("full", "no_zm", "memory"):
        z_and_h = h
        if variant != "memory":
            q, k, v = np.split(apply(w, "memory.qkv_h", h), 3)
            z = gathered(q, k, v)
            if variant == "full":
                k_m, v_m = np.split(apply(w, "memory.kv_m", m), 2)
                z = np.concatenate([z, gathered(q, k_m, v_m)])
            z_and_h = np.concatenate([apply(w, "memory.fuse", z), h])
        inputs = conv2d(z_and_h, w["memory.gates.0.weight"], w["memory.gates.0.bias"])          # depth-wise
        i, g, o = np.split(apply(w, "memory.gates.1", inputs), 3)
        m = (1 - sigmoid(i)) * m + sigmoid(i) * np.tanh(g)
        h = sigmoid(o) * m
    for computed, expected in zip(got, (h, c, m)):
        np.testing.assert_allclose(computed[0].detach().numpy(), expected, atol=1e-12)


def test_attention_is_the_literal_softmax():
    q, k, v = torch.randn(3, 2, 3, 4, 5, dtype=torch.float64) * 2
    for b in range(2):
        np.testing.assert_allclose(attend(q, k, v)[b].numpy(), gathered(*(u[b].numpy() for u in (q, k, v))), atol=1e-12)


@pytest.mark.parametrize("variant", ATTENDS)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_runs_on_the_fused_kernel(variant, precision):
    """Forward and backward with nothing but the kernel that stores no N×N matrix allowed."""
    model = SAConvLSTM(variant=variant, **SMALL)
    frames = torch.rand(2, 4, 1, 16, 16)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            out = model(frames, horizon=1)
        out.sum().backward()
    assert out.isfinite().all() and all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("variant, parameters", [
    ("full", 4_678_992), ("no_zm", 4_629_328), ("memory", 4_511_056), ("base", 4_591_696), ("convlstm", 4_458_576)])
def test_parameters(variant, parameters):
    assert count_parameters(SAConvLSTM(variant=variant)) == parameters


@pytest.mark.parametrize("setup, patch, layers, C, kernel", [("patch4", 4, 4, 64, 5), ("fullres", 1, 6, 32, 3)])
def test_multiply_accumulates(setup, patch, layers, C, kernel):
    """ConvLSTM, and what each variant adds to it, counted by hand; `attention`: Qᵀ K and α V."""
    N = (64 // patch) ** 2
    convlstm = 19 * N * (layers * 8 * C * C * kernel**2 + 2 * C * patch**2)
    attention, one = 2 * N * N * C, N * C * C                     # one: a 1×1 convolution C → C
    added = {
        "convlstm": 0,
        "base": 2 * (attention + 3 * one + one),
        "memory": 9 * N * C + 3 * one,
        "no_zm": attention + 3 * one + one + 9 * N * 2 * C + 2 * 3 * one,
        "full": 2 * attention + 5 * one + 2 * one + 9 * N * 2 * C + 2 * 3 * one,
    }
    assert round(convlstm / 1e9, 1) == dict(patch4=15.9, fullres=34.4)[setup]
    for variant, macs in added.items():
        assert count_macs(SAConvLSTM, 20, setup=setup, variant=variant) == convlstm + 19 * layers * macs


def test_memory_without_z_m_is_no_zm():
    """Where W_z does not look at Z_m, the full SAM is the one that never computes it."""
    full, cut = SelfAttentionMemory(8), SelfAttentionMemory(8, z_m=False)
    with torch.no_grad():
        full.fuse.weight[:, 8:] = 0
        full.fuse.weight[:, :8] = cut.fuse.weight
    full.load_state_dict({name: w for name, w in cut.state_dict().items() if name != "fuse.weight"}, strict=False)
    h, m = torch.randn(2, 2, 8, 4, 4)
    for a, b in zip(full(h, m), cut(h, m)):
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        full.fuse.weight[:, 8:] = 0.1
    assert not torch.allclose(full(h, m)[0], cut(h, m)[0])


@pytest.mark.parametrize("variant", VARIANTS)
def test_sees_the_whole_frame(variant):
    """In one layer and one step the far corner matters where there is attention, and only there."""
    model = SAConvLSTM(setup="fullres", variant=variant, size=16, hidden=8, layers=1, kernel=3)
    frames = torch.rand(1, 2, 1, 16, 16)
    changed = frames.clone()
    changed[0, 0, 0, 0, 0] += 1
    with torch.no_grad():
        same = torch.equal(model(frames)[..., 15, 15], model(changed)[..., 15, 15])
    assert same == (variant not in ATTENDS)


@pytest.mark.parametrize("setup", ["patch4", "fullres"])
@pytest.mark.parametrize("variant", ATTENDS)
@pytest.mark.parametrize("point, patch", [((0, 0), 0), ((7, 15), 1 * 4 + 3), ((15, 3), 3 * 4 + 0)])   # 4×4 patches
def test_attention_maps(setup, variant, point, patch):
    """The map of a query point, a pixel, is that row of the α that each layer used."""
    model = SAConvLSTM(setup=setup, variant=variant, patch=4, **SMALL)
    inputs = {}                                                   # of each attention block, one per step
    for module in model.modules():
        module.register_forward_hook(lambda module, given, _: inputs.setdefault(module, []).append(given))
    frames = torch.rand(2, 3, 1, 16, 16)
    attention = layers_of(maps(model, frames, horizon=2, point=point), "attention")
    assert len(attention) == len(model.cells)
    for cell, weights in zip(model.cells, attention):
        assert [*weights] == ATTENDS[variant]
        for step in range(4):
            if variant == "base":
                blocks = cell.attend_x, cell.attend_h
                pairs = [block.qkv(inputs[block][step][0]).chunk(3, 1)[:2] for block in blocks]
            else:
                h, m = inputs[cell.memory][step]
                q, k, _ = cell.memory.qkv_h(h).chunk(3, 1)
                pairs = [(q, k)] + ([(q, cell.memory.kv_m(m).chunk(2, 1)[0])] if variant == "full" else [])
            for weight, (q, k) in zip(weights.values(), pairs):
                assert weight.shape == (2, 4, 4, 4)
                alpha = weights_of(*(u[1].detach().double().numpy() for u in (q, k)))[patch]
                np.testing.assert_allclose(weight[1, step].numpy(), alpha.reshape(4, 4), atol=1e-6)


@pytest.mark.parametrize("variant", ["memory", "convlstm"])
def test_no_attention_maps_without_attention(variant):
    pictures = maps(SAConvLSTM(variant=variant, **SMALL), torch.rand(1, 3, 1, 16, 16), point=(8, 8))
    assert {picture for picture, *_ in pictures} == {"layers"}
