"""What the papers print about cost, against what the models here count to; and the cost model of the MS-LSTM paper."""

import importlib
import math

import pytest
import torch
from bench import kept_bytes, layer_output_bytes
from conftest import count_parameters
from test_contract import CASES, NAMES, small
from torch.utils.flop_counter import FlopCounterMode

from train import PAPER_FRAMES, as_printed, cost

MODULES = {name: importlib.import_module(name) for name in NAMES}
ROWS = [pytest.param(name, row, id="-".join((name, row["variant"], row["setup"], row["data"])))
        for name in NAMES for row in MODULES[name].PUBLISHED if "params" in row or "macs" in row]
MS_LSTM = [row for row in MODULES["ms_lstm"].PUBLISHED if "macs" in row]
CMS_LSTM = [row for name, row in (p.values for p in ROWS) if name == "cms_lstm" and "macs" in row]


def built(name, row, size):
    """The row's model, without values."""
    with torch.device("meta"):
        return MODULES[name].MODEL(channels=1, size=size, setup=row["setup"], variant=row["variant"])


def count(name, row, size=None, upsampling=0):
    """Parameters, and multiply-accumulates of one sequence by the operation that makes them, of a published row.

    Two steps are counted: all cost the same.
    upsampling: how many operations one pixel of a bilinear up-sampling counts as.
    """
    def bilinear(*shapes, out_shape, **_):
        return 2 * upsampling * math.prod(out_shape)              # the counter counts 2 a multiply-accumulate

    _, side, frames = PAPER_FRAMES[row["data"]]
    size = size or side
    model = built(name, row, size)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.upsample_bilinear2d: bilinear}) as counter:
        with torch.no_grad():
            model(torch.empty(1, 3, 1, size, size, device="meta"), extras="loss")        # as in training
    counts = counter.get_flop_counts()["Global"]
    return count_parameters(model), {str(op): (frames - 1) / 2 * n / 2 for op, n in counts.items()}


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_every_step_costs_the_same(name, setup, variant):
    model, counts = small(name, setup, variant), []
    for steps in (1, 2, 7):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(torch.rand(1, 1 + steps, 1, 16, 16), extras="loss")
        counts.append(counter.get_total_flops() / steps)
    assert counts[0] == counts[1] == counts[2] > 0


@pytest.mark.parametrize("name, row", ROWS)
def test_published_cost(name, row):
    """Every figure comes out to the printed digit; where one does not, the row's note says what does."""
    parameters, macs = count(name, row)
    counted = dict(params=parameters, macs=sum(macs.values()))
    channels, size, frames = PAPER_FRAMES[row["data"]]
    found = cost(MODULES[name], frames, channels, size, setup=row["setup"], variant=row["variant"])
    assert found == tuple(counted.values())
    counted = {key: as_printed(counted[key], like=row[key]) for key in counted if key in row}
    wrong = {key: figure for key, figure in counted.items() if figure != row[key]}
    assert bool(wrong) == ("note" in row), wrong
    assert all(figure in row["note"] for figure in wrong.values()), wrong


@pytest.mark.parametrize("row", MS_LSTM, ids=lambda row: f"{row['variant']}-{row['data']}")
def test_ms_lstm_with_its_up_sampling(row):
    """The paper's counts have the bilinear up-sampling in them, at 11 operations a pixel that it makes.

    That is what thop, a common counter, takes. With it every row of MS-LSTM comes out, 64.5G and 257.9G too, except for
    Germany.
    """
    macs = sum(count("ms_lstm", row, upsampling=11)[1].values())
    assert (as_printed(macs, row["macs"]) == row["macs"]) == (row["data"] != "germany")


def test_table_7_is_the_cost_of_212_pixels():
    row, = (row for row in MS_LSTM if row["data"] == "germany")
    assert as_printed(sum(count("ms_lstm", row)[1].values()), "260.6G") == "187.8G"
    larger = sum(count("ms_lstm", row, size=212, upsampling=11)[1].values())
    assert as_printed(larger, "260.6G") == row["macs"] == "260.6G"


@pytest.mark.parametrize("row", CMS_LSTM, ids=lambda row: row["data"])
def test_table_4_leaves_out_the_products_of_cms_lstm(row):
    """11.5G are CMS-LSTM's convolutions and what thop takes for a softmax, three operations a score.

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


def test_cost_model_of_convlstm_by_hand():
    """Six layers of 32 at 64×64 over 19 steps: what the paper's model says, and what is kept."""
    row = dict(setup="fullres", variant="full")
    model, frames = built("convlstm", row, 64), torch.empty(1, 20, 1, 64, 64, device="meta")
    one = 64 * 64 * 4                                             # a channel, in bytes
    # Layer outputs: of the embedding, of two convolutions to four gates a layer, of the output.
    assert layer_output_bytes(model, frames) == 19 * one * (32 + 6 * 2 * 4 * 32 + 1)
    # Kept: the embedded frame; in each layer i, f, g, o, tanh(C), H and C, of which the last C is read no more; the one
    # zero state; the frames that the embedding read. No gate before its σ: neither + nor the convolution needs it.
    assert kept_bytes(model, frames) == one * (19 * (32 + 6 * 7 * 32) - 6 * 32 + 32 + 20)


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_kept_bytes_need_no_computation(name, setup, variant):
    """Counting on device="meta" is counting on the CPU, but for fused attention, which alone keeps less: no scores."""
    options = dict(size=16, hidden=4, layers=2, kernel=3, setup=setup, variant=variant)
    cpu = kept_bytes(MODULES[name].MODEL(**options), torch.rand(1, 3, 1, 16, 16))
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        meta = kept_bytes(MODULES[name].MODEL(**options), torch.empty(1, 3, 1, 16, 16))
    attends = any("convolution" not in str(op) for op in counter.get_flop_counts()["Global"])
    assert 0 < cpu < meta if attends else 0 < cpu == meta


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
