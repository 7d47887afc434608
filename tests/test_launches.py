"""How many kernels a training step launches, and that every parameter gets a gradient.

A ConvRNN at these sizes waits on a GPU for launches rather than for arithmetic, and one aten operation is one launch or
a few. They are counted on the CPU. Two things differ on CUDA: under autocast its LayerNorms get and give fp32, each at
the cost of another cast there and back, and its attention and its convolutions' biases take more kernels than one.
"""

import collections

import pytest
import torch
from test_contract import CASES, small
from torch.utils._python_dispatch import TorchDispatchMode

import train

# Of one step of one cell of the full model, forward and backward: {(model, set-up): (in fp32, under bf16 autocast)}. A
# fourth of what embedding, output and sampling cost a step is in it.
OPERATIONS = {
    ("convlstm", "patch4"): (37.25, 42.5),
    ("convlstm", "fullres"): (30.25, 35.5),
    ("predrnn", "patch4"): (54.25, 71.5),
    ("predrnn", "fullres"): (45.25, 62.5),
    ("sa_convlstm", "patch4"): (76.25, 87.5),
    ("sa_convlstm", "fullres"): (69.25, 80.5),
    ("cms_lstm", "patch4"): (171.25, 182.5),
    ("cms_lstm", "fullres"): (143.25, 154.5),
    ("moderrnn", "patch4"): (189.25, 194.5),
    ("moderrnn", "fullres"): (90.25, 115.5),
    ("ms_lstm", "patch4"): (84, 99.25),
    ("ms_lstm", "fullres"): (66, 81.25),
}
SHARES_MEMORY = {"alias", "as_strided", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty",
                 "new_empty_strided", "permute", "select", "slice", "split", "split_with_sizes", "squeeze", "t",
                 "transpose", "unbind", "unsqueeze", "view", "_unsafe_view"}   # or is left unwritten: nothing to launch


class Operations(TorchDispatchMode):
    """Counts what computes or copies, by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name not in SHARES_MEMORY:
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def training_step(model, steps, bf16=False):
    model.zero_grad()
    frames = torch.rand(2, steps + 1, 1, 16, 16)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16), \
            train.weights_handed_on(model, dict(precision="bf16" if bf16 else "fp32")):
        out, found = model(frames, use_truth=torch.zeros(steps, 2, dtype=torch.bool), extras="loss")
    (((out - frames[:, 1:]) ** 2).sum() + found.get("loss", 0)).backward()


def count(model, bf16):
    """By how much one more time step adds to the count, a cell."""
    totals = []
    for steps in (4, 3):
        with Operations() as operations:
            training_step(model, steps, bf16)
        totals.append(operations.counts)
    totals[0].subtract(totals[1])
    return {name: n / len(model.cells) for name, n in totals[0].items() if n}


@pytest.mark.parametrize("name, setup", OPERATIONS)
def test_operations_of_a_cell_step(name, setup):
    """Fewer is better: then lower the table. More has to be worth it."""
    model = small(name, setup, "full")
    for bf16, allowed in zip((False, True), OPERATIONS[name, setup]):
        counted = count(model, bf16)
        assert sum(counted.values()) == allowed, counted


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_every_parameter_gets_a_gradient(name, setup, variant):
    """In several processes each waits for the gradients of all: one that never came would be waited for without end."""
    model = small(name, setup, variant)
    training_step(model, 2)
    assert [key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()] == []
