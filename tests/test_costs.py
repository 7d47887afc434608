"""What the papers print about cost, against what the models here count to; and the cost model of the MS-LSTM paper."""

import importlib
import itertools
import math
import re
import runpy

import pytest
import torch
from conftest import ROOT, count_parameters
from test_contract import NAMES, predictions_and_loss, small
from torch.utils.flop_counter import FlopCounterMode

MODULES = {name: importlib.import_module(name) for name in NAMES}
ROWS = [pytest.param(name, row, id="-".join((name, row["variant"], row["setup"], row["data"])))
        for name in NAMES for row in MODULES[name].PUBLISHED if "params" in row or "macs" in row]
MS_LSTM = [row for row in MODULES["ms_lstm"].PUBLISHED if "macs" in row]
CMS_LSTM = [row for row in MODULES["cms_lstm"].PUBLISHED if "macs" in row]
SIDE_AND_FRAMES = {"moving_mnist": (64, 20), "taxibj": (32, 8), "kth": (128, 20), "germany": (180, 8)}


def as_printed(value, like):
    """A count as a paper would print it: as_printed(444_001, "0.9M") is "0.4M"."""
    decimals = len(like[:-1].partition(".")[2])
    return f"{value / dict(M=1e6, G=1e9)[like[-1]]:.{decimals}f}{like[-1]}"


def built(name, row, size):
    """The row's model, without values."""
    with torch.device("meta"):
        return MODULES[name].MODEL(channels=1, size=size, setup=row["setup"], variant=row["variant"])


def count(name, row, size=None, upsampling=0):
    """Parameters, and multiply-accumulates of one sequence in training by the operation that makes them.

    One step is counted: all cost the same. upsampling: how many operations a pixel of a bilinear up-sampling counts as.
    """
    def bilinear(*shapes, out_shape, **_):
        return 2 * upsampling * math.prod(out_shape)              # the counter counts 2 per multiply-accumulate

    side, frames = SIDE_AND_FRAMES[row["data"]]
    size = size or side
    model = built(name, row, size)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.upsample_bilinear2d: bilinear}) as counter:
        with torch.no_grad():
            predictions_and_loss(model, torch.empty(1, 2, 1, size, size, device="meta"))
    counts = counter.get_flop_counts()["Global"]
    return count_parameters(model), {str(op): (frames - 1) * n / 2 for op, n in counts.items()}


@pytest.mark.parametrize("name", NAMES)
def test_every_step_costs_the_same(name):
    model, counts = small(name, "fullres", "v2" if name == "predrnn" else "full"), []
    for steps in (1, 2, 7):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            predictions_and_loss(model, torch.rand(1, 1 + steps, 1, 16, 16))
        counts.append(counter.get_total_flops() / steps)
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("name", NAMES)
def test_each_file_lists_its_variants(name, capsys):
    """python NAME.py: every variant under both set-ups, with its parameters and multiply-accumulates."""
    runpy.run_path(str(ROOT / f"{name}.py"), run_name="__main__")
    listed = re.findall(r"^(\S+) +(\S+) +([\d,]+) p\S+ +([\d.]+G) m\S+   (\S.*)$", capsys.readouterr().out, re.MULTILINE)
    expected = []
    for setup, variant in itertools.product(MODULES[name].NETWORK, MODULES[name].VARIANTS):
        parameters, macs = count(name, dict(setup=setup, variant=variant, data="moving_mnist"))
        macs = as_printed(sum(macs.values()), "0.0G")
        expected.append((setup, variant, f"{parameters:,}", macs, MODULES[name].VARIANTS[variant]))
    assert listed == expected


@pytest.mark.parametrize("name, row", ROWS)
def test_published_cost(name, row):
    """Every figure comes out to the printed digit; where one does not, the row's note says what does."""
    parameters, macs = count(name, row)
    counted = dict(params=parameters, macs=sum(macs.values()))
    counted = {key: as_printed(counted[key], like=row[key]) for key in counted if key in row}
    wrong = {key: figure for key, figure in counted.items() if figure != row[key]}
    assert bool(wrong) == ("note" in row), wrong
    assert all(figure in row["note"] for figure in wrong.values()), wrong


@pytest.mark.parametrize("row", MS_LSTM, ids=lambda row: f"{row['variant']}-{row['data']}")
def test_ms_lstm_with_its_up_sampling(row):
    """The paper's counts include the bilinear up-sampling, at 11 operations per pixel of its output (as does thop, a
    common counter). With it every row comes out, 64.5G and 257.9G too, and Table 7's 260.6G at 212×212 pixels."""
    size = 212 if row["data"] == "germany" else None
    macs = sum(count("ms_lstm", row, size, upsampling=11)[1].values())
    assert as_printed(macs, row["macs"]) == row["macs"]


@pytest.mark.parametrize("row", CMS_LSTM, ids=lambda row: row["data"])
def test_table_4_leaves_out_the_products_of_cms_lstm(row):
    """11.5G are CMS-LSTM's convolutions and what thop counts for a softmax, three operations per score.

    The scores: for s of 1, 2, 4, in each of s² blocks, (2·H·W/s²)² of them, per layer (6) and step (7).
    """
    macs = count("cms_lstm", row)[1]
    convolutions = sum(n for op, n in macs.items() if "convolution" in op)
    scores = 6 * 7 * sum(s * s * (2 * 32 * 32 // s**2) ** 2 for s in (1, 2, 4))
    assert as_printed(convolutions, "11.5G") == "10.8G"
    assert as_printed(convolutions + 3 * scores, "11.5G") == row["macs"]
    assert sum(macs.values()) - convolutions == 2 * 32 * scores   # Qᵀ K and its product with V


# §4.3.1: training takes M_all = 4·M_par + 2·M_out: the weights, as much again for their gradients and for each of the
# two moments of Adam; the outputs of the layers over the roll-out, and as much again for their gradients.

def layer_output_bytes(model, frames):
    """M_out: bytes that the layers with weights (convolutions, LayerNorms) put out in one roll-out."""
    sizes = []
    for layer in model.modules():
        if [*layer.parameters(recurse=False)] and not [*layer.children()]:
            layer.register_forward_hook(lambda layer, inputs, output: sizes.append(output.nbytes))
    model(frames)
    return sum(sizes)


def kept_bytes(model, frames):
    """Bytes that autograd keeps of one roll-out for its backward pass, without parameters and frames."""
    storages = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(frames)
    for tensor in (frames, *model.parameters()):
        storages.pop(tensor.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def test_cost_model_of_convlstm_by_hand():
    """Six layers of 32 at 64×64 over 19 steps: what the paper's model says, and what is kept."""
    row = dict(setup="fullres", variant="full")
    model, frames = built("convlstm", row, 64), torch.empty(1, 20, 1, 64, 64, device="meta")
    one = 64 * 64 * 4                                             # a channel, in bytes
    # Kept: the embedded frame; in each layer i, f, g, o, tanh(C), H and C, of which the last C is read no more; the one
    # zero state; the frames that the embedding read. No gate before its σ: neither + nor the convolution needs it.
    assert kept_bytes(model, frames) == one * (19 * (32 + 6 * 7 * 32) - 6 * 32 + 32 + 20)
    # Layer outputs: of the embedding, of two convolutions to four gates per layer, of the output.
    assert layer_output_bytes(model, frames) == 19 * one * (32 + 6 * 2 * 4 * 32 + 1)


def test_what_section_4_3_1_concludes():
    """Pooling saves memory, a second kernel costs some, and M_all is two to three times what is kept."""
    frames, kept, model_says = torch.empty(1, 20, 1, 64, 64, device="meta"), {}, {}
    for variant in ("convlstm", "sms", "tms", "full"):
        model = built("ms_lstm", dict(setup="fullres", variant=variant), 64)
        weights = 4 * sum(p.nbytes for p in model.parameters())
        kept[variant] = weights + kept_bytes(model, frames)
        model_says[variant] = weights + 2 * layer_output_bytes(model, frames)
        assert 2 < model_says[variant] / kept[variant] < 3
    for memory in (kept, model_says):
        assert memory["sms"] < memory["convlstm"] < memory["tms"] and memory["sms"] < memory["full"] < memory["tms"]
    # The model puts MS-LSTM above ConvLSTM ("moderate memory"). What is kept by cells that fuse their gates is below.
    assert kept["full"] < kept["convlstm"] and model_says["full"] > model_says["convlstm"]
