"""The slow, literal second form: NumPy loops in float64, written from the equations and nothing else."""

import numpy as np


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def conv2d(x, weight, bias=None):
    """ "Same" convolution (as the papers and torch mean it: no flip), x (C, H, W), weight (O, C or 1, k, k)."""
    outputs, group, k, _ = weight.shape
    _, height, width = x.shape
    padded = np.pad(x, ((0, 0), (k // 2, k // 2), (k // 2, k // 2)))
    result = np.zeros((outputs, height, width))
    for o in range(outputs):
        channels = padded if group == len(x) else padded[o * group : (o + 1) * group]   # depth-wise where group is 1
        for y in range(height):
            for z in range(width):
                result[o, y, z] = (channels[:, y : y + k, z : z + k] * weight[o]).sum()
    return result if bias is None else result + bias[:, None, None]


def layer_norm(x, weight, bias, eps=1e-5):
    """Over all of (C, H, W)."""
    return (x - x.mean()) / np.sqrt(x.var() + eps) * weight + bias


def softmax(scores):
    """Over the last axis."""
    e = np.exp(scores - scores.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def arrays(module):
    """A module's parameters as float64 arrays by name."""
    return {name: p.detach().double().numpy() for name, p in module.named_parameters()}


def apply(weights, name, x):
    """The convolution called `name`, or the convolution `name`.0 and the LayerNorm `name`.1 after it."""
    if f"{name}.weight" in weights:
        return conv2d(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))
    x = conv2d(x, weights[f"{name}.0.weight"], weights.get(f"{name}.0.bias"))
    return layer_norm(x, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"])


def randomize(module):
    """Random values for every parameter, the zeros and ones of a fresh network too, so that none goes unnoticed."""
    import torch

    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return module.double()
