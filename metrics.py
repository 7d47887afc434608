"""What a forecast is worth: scores of predicted frames, the table at the end of a run, curves as SVG, pictures as PNG.

Frames are tensors (B, T, C, H, W) with values in [0, 1], scored where they lie (CPU or CUDA) in float64.

    summary = summarize(frame_scores(pred, truth, mask))            # {"mse": {"mean": 61.2, "frames": [40.1, …], …}, …}
    summary |= csi_hss(event_counts(pred_mm, truth_mm, (0.5, 2, 5), mask), (0.5, 2, 5))             # {"csi_0.5": …, …}
    summary |= unit_summary(unit_errors(pred_mm, truth_mm, mask))                                   # {"rmse": …, …}
    print(table({"forecast": summary}, unit="mm/h"))
    svg = score_curves({"ConvLSTM": summary}, unit="mm/h")          # training_curves likewise
    picture = png(film_sheet([Film("", 10, frames, {"": forecast})]))   # layer_sheet, map_sheets: what models hold

Of several batches, scores are joined; event counts and errors in units are added up. What has no data (mask False) has
no score, and means are over what has. Nothing here waits for the device before a summary is made: what only values
tell, such as NaN or a truth beyond [0, 1], travels with the scores.
"""

import math
import struct
import textwrap
import unicodedata
import zlib
from html import escape
from itertools import cycle, groupby
from typing import NamedTuple

import numpy as np
import torch

NAMES = {  # metric -> its name in a table, its name and unit on an axis
    "mse": ("MSE", "MSE (sum over a frame)"),
    "mae": ("MAE", "MAE (sum over a frame)"),
    "psnr": ("PSNR", "PSNR (dB)"),
    "ssim": ("SSIM", "SSIM (1 = identical)"),
    "psnr_float": ("PSNR*", "PSNR on floats (dB)"),
    "ssim_gaussian": ("SSIM*", "SSIM, Gaussian window (1 = identical)"),
    "rmse": ("RMSE{1}, {0}", "RMSE{1} ({0})"),  # in the data's unit; {1}: the channel, of several
    "mae_units": ("MAE{1}, {0}", "MAE{1} ({0})"),
    "csi": ("CSI {}", "CSI at {} {}"),
    "hss": ("HSS {}", "HSS at {} {}"),
}


def name_of(metric, unit=None):
    """The name of a metric in a table, and its name with its unit on an axis. unit: the data's, None for none."""
    kind, _, which = metric.rpartition("_")  # such as csi_0.5, and rmse_2 of the second channel
    if metric in NAMES:
        return tuple(name.format(unit or "own unit", "") for name in NAMES[metric])
    if kind in ("csi", "hss"):
        return tuple(name.format(which, unit or "").strip() for name in NAMES[kind])
    return tuple(name.format(unit or "own unit", f" {which}") for name in NAMES[kind])


# ---- Scores of frames ------------------------------------------------------------------------------------------------

def _check(pred, truth, mask, floating=False):
    """ValueError for shapes, dtypes and devices outside the contract; values are never looked at."""
    numbers = "floats in [0, 1] (8-bit levels are divided by 255)" if floating else "numbers"
    for what, x in (("truth", truth), ("predictions", pred), ("mask", mask)):
        if what == "mask" and x is None:
            continue
        found = f"{x.dtype} {tuple(x.shape)} on {x.device}" if torch.is_tensor(x) else type(x).__name__
        if not torch.is_tensor(x) or x.ndim != 5 or 0 in x.shape or (x.shape, x.device) != (truth.shape, truth.device) \
                or (x.dtype == torch.bool) != (what == "mask") or x.is_complex() \
                or floating and what != "mask" and not x.is_floating_point():
            raise ValueError(f"{what}: a tensor (B, T, C, H, W) of {'bools' if what == 'mask' else numbers}, of the "
                             f"shape and on the device of the truth, is needed, not {found}")


@torch.no_grad()
def frame_scores(pred, truth, mask=None):
    """Score every predicted frame.

    pred, truth: (B, T, C, H, W), any floating dtype, one device. truth: in [0, 1], to rounding. pred may overshoot, as
    a network does: it is clipped to [0, 1].
    mask: None or bool of the same shape, True where a pixel counts. What does not count is 0 in both, so it adds no
    error; SSIM leaves out the positions whose window has no data.

    Returns a dict of float64 (B, T) on the device of truth:
      mse, mae       error² and |error|, summed over the pixels and channels of the frame
      psnr           dB, of values truncated to 8 bits; inf for an exact frame
      ssim           of 8-bit values, 7×7 uniform window, sample covariance, mean over the positions where the window
                     fits and over channels: scikit-image's default
      psnr_float     dB, 10·log10(1 / (mean error² + 1e-5)) on floats, as MS-LSTM's released code has it
      ssim_gaussian  on floats, 11×11 Gaussian window (σ = 1.5), likewise
      pixels         how many count: 0 for a frame without data; NaN for one whose truth is not in [0, 1]
    A frame without data, with a truth beyond [0, 1] or with a NaN that counts has scores of NaN; `pixels` tells
    `summarize` which it is. An SSIM whose window is larger than the frame is NaN. A frame's scores do not depend on the
    batch it comes in, to the last bit: all sums are elementwise additions in a fixed order.
    Raises ValueError for other shapes, dtypes (uint8 levels) and devices.
    """
    _check(pred, truth, mask, floating=True)
    # Few frames at a time: on a GPU some gigabytes of intermediates; on the CPU what stays in the cache and below the
    # 2^15 values from which torch splits an operation over threads, which costs more than it gains when they are busy.
    pixels = 2**25 if truth.is_cuda else 2**15 - 1
    frames = max(1, pixels // truth[0, 0].numel())
    chunks = [x.flatten(0, 1).split(frames) for x in (pred, truth)]
    chunks.append([None] * len(chunks[0]) if mask is None else mask.flatten(0, 1).split(frames))
    parts = [_chunk_scores(*chunk) for chunk in zip(*chunks)]
    return {name: torch.cat([part[name] for part in parts]).view(truth.shape[:2]) for name in parts[0]}


def _chunk_scores(pred, truth, mask):
    """frame_scores of (n, C, H, W): a dict of (n,)."""
    if mask is not None:
        pred, truth = torch.where(mask, pred, 0), torch.where(mask, truth, 0)
    valid = ((truth >= -1e-6) & (truth <= 1 + 1e-6)).flatten(1).all(1)  # False for NaN, too
    count = (torch.ones_like(valid) * truth[0].numel() if mask is None else mask.flatten(1).sum(1)).double()
    pred8, truth8 = _to_8bit(pred), _to_8bit(truth)
    pred, truth = pred.double().clamp(0, 1), truth.double()
    error, error8 = pred - truth, pred8 - truth8
    mse, mse8 = _frame_sum(error * error), _frame_sum(error8 * error8)
    scores = {
        "mse": mse,
        "mae": _frame_sum(error.abs()),
        "psnr": 20 * math.log10(255) - 10 * torch.log10(mse8 / count),
        "ssim": _ssim(pred8, truth8, mask, UNIFORM_7, top=255, covariance=49 / 48),
        "psnr_float": 10 * torch.log10(1 / (mse / count + 1e-5)),
        "ssim_gaussian": _ssim(pred, truth, mask, GAUSSIAN_11, top=1, covariance=1),
    }
    scored = valid & (count > 0)
    scores = {name: torch.where(scored, score, math.nan) for name, score in scores.items()}
    return scores | {"pixels": torch.where(valid, count, math.nan)}


def _to_8bit(x):
    """uint8(x·255), truncated, as float64. In float32 (float64 where x is): there k/255 gives back k for every k."""
    x = x if x.dtype == torch.float64 else x.float()
    return (x * 255).clamp(0, 255).floor_divide(1).double()  # .floor() would go to all threads, however little it is


def _frame_sum(x):
    """(n, …) -> (n,): the sums over frames, by adding the second half to the first until one value is left.

    Unlike torch.sum, whose order of additions depends on the number of frames, the device and the threads. Works in x.
    """
    x = x.flatten(1)
    while (size := x.shape[1]) > 1:
        x[:, :size // 2] += x[:, size - size // 2:]
        x = x[:, :size - size // 2]
    return x[:, 0]


# A separable window: (weight, the offsets that have it), in one dimension.
UNIFORM_7 = [(1 / 7, range(7))]
_gauss = [math.exp(-k * k / (2 * 1.5**2)) for k in range(6)]
GAUSSIAN_11 = [(g / (2 * sum(_gauss) - _gauss[0]), sorted({5 - k, 5 + k})) for k, g in enumerate(_gauss)]


def _ssim(x, y, mask, window, top, covariance):
    """Mean structural similarity (Wang et al. 2004) of (n, C, H, W) float64 frames with values in [0, top]: (n,).

    covariance: n/(n−1) of the window for sample covariance (scikit-image's default), 1 for the population's (MS-LSTM's
    released code, after TensorFlow's). Both take only positions where the window fits; with a mask, those of them whose
    window holds a pixel that counts.
    """
    size = 1 + max(max(offsets) for _, offsets in window)
    if min(x.shape[-2:]) < size:
        return x.new_full(x.shape[:1], math.nan)

    def local_mean(x):  # (n, C, H, W) -> (n, C, H', W')
        for dim in (-1, -2):
            fits = x.shape[dim] - size + 1
            x = sum(weight * sum(x.narrow(dim, k, fits) for k in offsets) for weight, offsets in window)
        return x

    mean_x, mean_y, squares, product = map(local_mean, (x, y, x * x + y * y, x * y))
    c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
    means, mean_squares = mean_x * mean_y, mean_x * mean_x + mean_y * mean_y
    similarity = (2 * means + c1) * (2 * covariance * (product - means) + c2)
    similarity /= (mean_squares + c1) * (covariance * (squares - mean_squares) + c2)
    if mask is None:
        return _frame_sum(similarity) / means[0].numel()
    seen = local_mean(mask.double()) > 0
    return _frame_sum(similarity * seen) / seen.flatten(1).sum(1)


def summarize(scores):
    """Means of frame_scores over a test set: {name: (N, T)} -> {name: {"mean", "frames", "left_out"}}, fit for JSON.

    N counts sequences, all batches concatenated. "frames" are T means over sequences, "mean" over frames and sequences.
    Frames without data (`pixels` of 0) are left out of all means and counted under "left_out". An exact frame has no
    finite PSNR: "psnr" leaves it out of its means and counts it under "exact". None stands for what is undefined: no
    frame left, a frame smaller than SSIM's window, NaN in a prediction.
    Raises ValueError where the truth of a frame was not in [0, 1] (`pixels` of NaN).
    """
    scores = {name: values.double().cpu() for name, values in scores.items()}
    pixels = scores.pop("pixels", torch.ones(()))
    if bad := int(pixels.isnan().sum()):
        raise ValueError(f"the truth of {bad} of {pixels.numel()} frames holds NaN or values outside [0, 1]")
    summary = {}
    for name, values in scores.items():
        kept = (pixels > 0).expand(values.shape)
        entry = {"left_out": int((~kept).sum())}
        if name == "psnr":
            entry["exact"] = int((kept & (values == math.inf)).sum())
            kept = kept & (values != math.inf)
        frames = [frame[keep].tolist() for frame, keep in zip(values.T, kept.T)]  # T lists
        summary[name] = {"mean": _mean(sum(frames, [])), "frames": [_mean(frame) for frame in frames], **entry}
    return summary


def _mean(values):
    """The mean, correctly rounded; None if there are no values or one is NaN."""
    mean = math.fsum(values) / len(values) if values else math.nan
    return None if math.isnan(mean) else mean


# ---- Scores in the data's unit ---------------------------------------------------------------------------------------

@torch.no_grad()
def event_counts(pred, truth, thresholds, mask=None):
    """Count hits, misses, false alarms and correct negatives of "at least so much", for each threshold and lead time.

    pred, truth: (B, T, C, H, W), any numbers, in the thresholds' unit; mask: None or bool, True where a pixel counts.
    Returns int64 (thresholds, T, 5) on their device; the fifth column counts the pixels where one is NaN, which is no
    event and no absence of one. Add up the counts of all batches and processes, then csi_hss.
    Raises ValueError as frame_scores does.
    """
    _check(pred, truth, mask)
    nan = pred.isnan() | truth.isnan()
    known = ~nan if mask is None else mask & ~nan
    counts = truth.new_zeros((len(thresholds), truth.shape[1], 5), dtype=torch.int64)
    for row, threshold in zip(counts, thresholds):
        event, fell = pred >= threshold, truth >= threshold
        for k, cell in enumerate((event & fell, ~event & fell, event & ~fell, ~event & ~fell)):
            row[:, k] = (cell & known).sum((0, 2, 3, 4))
        row[:, 4] = (nan if mask is None else nan & mask).sum((0, 2, 3, 4))
    return counts


def csi_hss(counts, thresholds):
    """CSI and HSS of event_counts: {"csi_0.5": {"mean": float, "frames": [float] * T, "undefined": int}, "hss_0.5": …}.

    Scored per lead time, then averaged. A lead time without a defined score (0/0: no event forecast, none happened, or
    no data) is None; the mean leaves it out, "undefined" counts it. A NaN that counts makes its lead time and the mean
    None. Raises ValueError for counts of other thresholds.
    """
    if counts.shape != (len(thresholds), *counts.shape[1:2], 5):
        raise ValueError(f"counts {tuple(counts.shape)} are not (thresholds, T, 5) for {len(thresholds)} thresholds")
    summary, nan = {}, math.nan
    for threshold, rows in zip(thresholds, counts.tolist()):
        frames = {"csi": [], "hss": []}
        for hits, misses, alarms, negatives, nans in rows:  # whole numbers in Python: nothing overflows
            events = hits + misses + alarms
            chance = (hits + misses) * (misses + negatives) + (hits + alarms) * (alarms + negatives)
            skill = 2 * (hits * negatives - misses * alarms)
            frames["csi"].append(nan if nans else hits / events if events else None)
            frames["hss"].append(nan if nans else skill / chance if chance else None)
        for score, values in frames.items():
            defined = [v for v in values if v is not None]
            summary[f"{score}_{threshold:.12g}"] = {"mean": _mean(defined), "undefined": len(values) - len(defined),
                                                    "frames": [None if v != v else v for v in values]}
    return summary


@torch.no_grad()
def unit_errors(pred, truth, mask=None):
    """Errors in the data's unit: float64 (T, C, 3) on their device, Σ error², Σ |error| and the pixels that count.

    pred, truth: (B, T, C, H, W), any numbers, in one unit; mask: None or bool, True where a pixel counts. Add up those
    of all batches and processes, then unit_summary. Raises ValueError as frame_scores does.
    """
    _check(pred, truth, mask)
    sums = truth.new_zeros((*truth.shape[1:3], 3), dtype=torch.float64)
    for t, row in enumerate(sums):
        error = pred[:, t].double() - truth[:, t].double()  # (B, C, H, W)
        counts = torch.ones_like(error) if mask is None else mask[:, t].double()
        error = error if mask is None else torch.where(mask[:, t], error, 0)
        for k, values in enumerate((error * error, error.abs(), counts)):
            row[:, k] = _frame_sum(values.transpose(0, 1))
    return sums


def unit_summary(sums):
    """RMSE and MAE of unit_errors, in that unit: {"rmse": {"mean": float, "frames": [float] * T}, "mae_units": …}.

    Pooled over pixels: "frames" over all sequences and channels, "mean" over the lead times, too. With several channels
    "rmse_1", "mae_units_1", … are those of each. None where nothing counts, and for NaN or infinity among what counts.
    """
    if sums.ndim != 3 or sums.shape[2] != 3:
        raise ValueError(f"sums {tuple(sums.shape)} are not (T, C, 3)")
    summary, sums = {}, sums.double().cpu()
    channels = {"": sums.sum(1)} | ({f"_{c + 1}": x for c, x in enumerate(sums.unbind(1))} if sums.shape[1] > 1 else {})
    for suffix, rows in channels.items():
        rows = torch.cat([rows, rows.sum(0, keepdim=True)]).tolist()
        for name, k, root in (("rmse", 0, math.sqrt), ("mae_units", 1, float)):
            *frames, mean = (root(row[k] / row[2]) if row[2] and math.isfinite(row[k]) else None for row in rows)
            summary[name + suffix] = {"mean": mean, "frames": frames}
    return summary


# ---- The table -------------------------------------------------------------------------------------------------------

def table(results, published=(), metrics=("mse", "mae", "psnr", "ssim"), unit=None, precision=None):
    """The text table at the end of a run, at most 100 columns wide.

    results: summaries (of summarize, with unit_summary and csi_hss merged in where the data have a unit) under
    "forecast" and, where there are any, "all_predictions", "repeat_last", "black" and "first_channel" (the forecast's).
    Forecast and repeated last frame stand side by side, frame by frame, with their means; below them the means of the
    others, and of `published`: dicts
    with "source" and some metrics. metrics: what the first block shows, four at most; errors in the data's unit, CSI
    and HSS follow in blocks of their own where there are any. precision: of the run, said beside published figures.
    """
    forecast = results["forecast"]
    blocks = [[m for m in metrics if m in forecast]]
    errors = [m.removeprefix("rmse") for m in forecast if m.startswith("rmse")]
    blocks += [[f"rmse{c}", f"mae_units{c}"] for c in (errors if len(errors) < 2 else errors[1:])]  # else each channel
    blocks += [[m for m in forecast if m.startswith(score)] for score in ("csi_", "hss_")]
    blocks = [block for block in blocks if block]
    text = "\n\n".join(_block(results, published, block, unit) for block in blocks)
    notes = ("mse", "left_out", "frames without data are left out"), ("psnr", "exact", "PSNR leaves out exact frames")
    for m, key, what in notes:
        counts = {name.replace("_", " "): summary[m].get(key) for name, summary in results.items() if m in summary}
        if any(counts.values()) and (key != "exact" or m in metrics):
            text += f"\n{what}: " + ", ".join(f"{n} ({name})" for name, n in counts.items() if n)
    if {"psnr_float", "ssim_gaussian"} & set(metrics):
        text += "\n* on floats, SSIM with a Gaussian window: as MS-LSTM scores"
    if published and precision:
        text += f"\nthe papers' figures are of fp32 runs; this run computed in {precision}"
    if len(errors) > 1:
        text += f"\nRMSE and MAE 1 to {len(errors) - 1}: each channel's, in its own unit"
    names = dict.fromkeys(name_of(m)[0].split()[0].strip("*,") for block in blocks for m in block)
    errors = ("MSE", "MAE", "RMSE")
    better = {"lower": [n for n in names if n in errors], "higher": [n for n in names if n not in errors]}
    better = " and ".join(f"{way} {', '.join(those)}" for way, those in better.items() if those)
    return text + "\n" + textwrap.fill(
        f"How to read it: {better} are better; the repeated last frame is what a forecast must beat.", 100)


def _block(results, published, metrics, unit):
    """One block of the table: these metrics of the forecast on the left, of the repeated last frame on the right."""
    forecast, repeat = results["forecast"], results.get("repeat_last")
    sides = [forecast, repeat] if repeat else [forecast]
    digits = {m: 2 if max(side[m]["mean"] or 0 for side in sides) >= 10 else 4 for m in metrics}

    def cells(*summaries, frame=None):
        values = [(summary[m]["mean"] if frame is None else summary[m]["frames"][frame], digits[m])
                  for summary in summaries for m in metrics]
        return ["–" if value is None else f"{value:.{places}f}" for value, places in values]

    length = len(forecast[metrics[0]]["frames"])
    rows = [["frame"] + [name_of(m, unit)[0] for m in metrics] * len(sides)]
    rows += [[str(k + 1)] + cells(*sides, frame=k) for k in range(length)] + [["mean"] + cells(*sides)]
    for name in ("all_predictions", "black", "first_channel"):
        if metrics[0] in results.get(name, {}):
            count = len(results[name][metrics[0]]["frames"])
            label = f"all {count} predictions" if name == "all_predictions" else name.replace("_", " ")
            rows.append([label] + cells(results[name]))
    for paper in published:
        if any(paper.get(m) is not None for m in metrics):  # digits as the paper prints them
            source = textwrap.shorten(paper["source"], 32, placeholder=" …")
            rows.append([source] + ["–" if paper.get(m) is None else f"{paper[m]:g}" for m in metrics])

    widths = [2 * (k > 0) + max(len(row[k]) for row in rows if k < len(row)) for k in range(len(rows[0]))]
    bar = 1 + len(metrics)  # the first column of the right side

    def line(row):
        text = row[0].ljust(widths[0])
        return text + "".join(("  |" if k == bar else "") + row[k].rjust(widths[k]) for k in range(1, len(row)))

    head, *lines = map(line, rows)
    title = "forecast".rjust(sum(widths[:bar]))
    if repeat:
        title += "  |" + "repeated last frame".rjust(sum(widths[bar:]))
    dashes = "-" * len(head)
    return "\n".join([title, head, dashes, *lines[:length], dashes, *lines[length:]])


# ---- Curves ----------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours for every kind of colour vision, without the yellow that white paper swallows. Dashes and
# markers change along with them, so that curves can be told apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("none", "7 3", "2 2", "9 3 2 3", "4 4")
MARKERS = ("M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z", "M-3,-3h6v6h-6z", "M0,-4l4,7h-8z", "M0,-4l4,4l-4,4l-4,-4z")
PANEL = (400, 260)  # width and height of a panel with its labels
PLOT = (64, 34, 384, 214)  # left, top, right, bottom of its axes


def score_curves(summaries, title="", unit=None, metrics=("mse", "mae", "psnr", "ssim")):
    """Frame-wise scores of several forecasts, {label: summary}, as SVG: `metrics`, and what the data's unit adds."""
    first = next(iter(summaries.values()))
    shown = [m for m in first if m in (*metrics, "rmse", "mae_units") or m.startswith(("csi_", "hss_"))]
    return curve_panels_svg([(*name_of(m, unit), "forecast frame", {
        label: [*enumerate(summary[m]["frames"], 1)] for label, summary in summaries.items() if m in summary})
        for m in shown], title)


def training_curves(curves, title=""):
    """Values over the iterations as SVG: {name of a panel: (name of the values, [(iteration, value), …])}."""
    panels = [(name, of, "iteration", {name: points}) for name, (of, points) in curves.items()]
    return curve_panels_svg(panels, title, log=True)


def curve_panels_svg(panels, title="", log=False, columns=2):
    """Panels of curves with axes, ticks and one legend, as the text of a self-contained SVG file.

    panels: (title, name of the y axis with its unit, name of the x axis, curves), curves: {label: [(x, y), …]}. A label
    looks the same in every panel. A y of None is a gap. title: a line above all panels; say model, variant, data and
    iteration there. log: with logarithmic y axes, where all values allow them.
    Every unbroken piece of a curve is a <polyline> with its label and its numbers in full as data-label, data-x and
    data-values. Raises ValueError for NaN and infinity.
    """
    labels = list(dict.fromkeys(label for panel in panels for label in panel[3]))
    styles = dict(zip(labels, zip(cycle(COLOURS), cycle(DASHES), cycle(MARKERS))))
    columns = min(columns, len(panels))
    width, top = PANEL[0] * columns, 30 if title else 0
    body = [_panel(*panel, log, styles, (k % columns) * PANEL[0], top + k // columns * PANEL[1])
            for k, panel in enumerate(panels)]
    x, y = 20, top + math.ceil(len(panels) / columns) * PANEL[1] + 14
    for label, (colour, dash, marker) in styles.items():
        needed = 60 + 6.5 * len(label)  # 11-pixel letters are about that wide
        if x > 20 and x + needed > width:
            x, y = 20, y + 18
        body.append(f'<path d="M{x},{y}h34" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"/>'
                    f'<path d="{marker}" transform="translate({x + 17},{y})" fill="{colour}"/>'
                    + _text(x + 40, y + 4, label, "start"))
        x += needed
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 16}" '
            f'viewBox="0 0 {width} {y + 16}" font-family="sans-serif" font-size="11">\n'
            f'<rect width="{width}" height="{y + 16}" fill="white"/>\n'
            + "\n".join(body + [_text(width / 2, 20, title, size=14)] * bool(title)) + "\n</svg>\n")


def _panel(title, ylabel, xlabel, curves, log, styles, x0, y0):
    """One panel as an SVG group whose upper left corner is at (x0, y0)."""
    pieces = [(label, [*piece]) for label, curve in curves.items()
              for gap, piece in groupby(curve, lambda point: point[1] is None) if not gap]
    xs, ys = ([point[axis] for _, piece in pieces for point in piece] for axis in (0, 1))
    if not all(map(math.isfinite, xs + ys)):
        raise ValueError(f"{title}: a curve cannot show NaN or infinity")
    left, top, right, bottom = PLOT
    (x_ticks, x_of), (y_ticks, y_of) = _axis(xs, left, right), _axis(ys, bottom, top, log and all(y > 0 for y in ys))
    out = [f'<g transform="translate({x0},{y0})">', _text((left + right) / 2, top - 12, title, size=13),
           _text((left + right) / 2, bottom + 34, xlabel), _text(14, (top + bottom) / 2, ylabel, turn=-90)]
    out += [f'<path d="M{left},{y_of(tick):.2f}H{right}" stroke="#ddd"/>'
            + _text(left - 6, y_of(tick) + 4, f"{tick:g}", "end") for tick in y_ticks]
    out += [f'<path d="M{x_of(tick):.2f},{bottom}v4" stroke="black"/>' + _text(x_of(tick), bottom + 17, f"{tick:g}")
            for tick in x_ticks]
    out.append(f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="black"/>')
    for label, piece in pieces:
        colour, dash, marker = styles[label]
        points = [f"{x_of(x):.2f},{y_of(y):.2f}" for x, y in piece]
        numbers = [" ".join(repr(float(v)) for v in values) for values in zip(*piece)]
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}" '
                   f'points="{" ".join(points)}" data-label="{_safe(label)}" data-x="{numbers[0]}" '
                   f'data-values="{numbers[1]}"/>')
        out += [f'<path d="{marker}" transform="translate({point})" fill="{colour}"/>'
                for point in points[::math.ceil(len(points) / 20)]]
    return "\n".join(out + [_text((left + right) / 2, (top + bottom) / 2, "no values")] * (not pieces)) + "\n</g>"


def _axis(values, start, end, log=False):
    """Ticks of an axis that holds the values, and the map from a value to its place between start and end (pixels)."""
    low, high = (min(values), max(values)) if values else (1, 10)
    scale = math.log10 if log else float
    a, b = scale(low), scale(high)
    margin = 0.05 * (b - a) or 0.05 * abs(b) or 0.5
    a, b = a - margin, b + margin
    if log and b - a > 1:
        mantissas = (1,) if b - a > 3 else (1, 2, 5)
        ticks = [m * 10.0**e for e in range(math.floor(a), math.ceil(b), math.ceil((b - a) / 6)) for m in mantissas]
    else:  # a logarithmic axis of less than a decade is nearly linear
        lowest, highest = (10**a, 10**b) if log else (a, b)
        power = 10 ** math.floor(math.log10((highest - lowest) / 4))
        step = next(m * power for m in (1, 2, 5, 10) if (highest - lowest) / (m * power) <= 6)
        if all(isinstance(v, int) for v in values):
            step = max(1, round(step))
        ticks = [k * step for k in range(math.ceil(lowest / step), math.floor(highest / step) + 1)]
    return [t for t in ticks if a <= scale(t) <= b], lambda value: start + (scale(value) - a) / (b - a) * (end - start)


def _safe(text):
    """Text for XML: control characters and lone surrogates, of names that are not UTF-8, as escapes."""
    return escape("".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text))


def _text(x, y, text, anchor="middle", size=11, turn=0):
    rotate = f' transform="rotate({turn} {x:.2f} {y:.2f})"' if turn else ""
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size}"{rotate}>{_safe(text)}</text>'


# ---- Pictures: images are uint8 (H, W, 3) ----------------------------------------------------------------------------

def png(images, delay_ms=300):
    """A PNG file of an image (H, W, 3), or of images (T, H, W, 3) an animated one that loops for ever."""
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3:
        raise ValueError(f"an image is uint8 (H, W, 3), not {images.dtype} {images.shape}")
    chunks, frames = [], images if images.ndim == 4 else images[None]
    if (frames == frames[..., :1]).all():
        frames = frames[..., :1]
    count, height, width, colours = frames.shape

    def chunk(kind, content):
        chunks.append(struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content)))

    chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colours - 1, 0, 0, 0))  # colour type 0: grey, 2: RGB
    if images.ndim == 4:
        chunk(b"acTL", struct.pack(">II", count, 0))
    for t, frame in enumerate(frames):
        if images.ndim == 4:  # numbered together with the data of all frames but the first
            chunk(b"fcTL", struct.pack(">IIIIIHHBB", max(2 * t - 1, 0), width, height, 0, 0, delay_ms, 1000, 0, 0))
        rows = np.pad(frame.reshape(height, -1), ((0, 0), (1, 0)))  # a zero before each row: no filter
        packed = zlib.compress(rows.tobytes(), 6)
        chunk(*((b"fdAT", struct.pack(">I", 2 * t) + packed) if t else (b"IDAT", packed)))
    chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


# The printable ASCII characters from the blank on, five columns of seven dots each, the lowest bit at the top.
FONT = np.unpackbits(np.frombuffer(bytes.fromhex(
    "000000000000005f00000007000700147f147f14242a7f2a12231308646236495620500000070000001c2241000041221c00"
    "2a1c7f1c2a08083e080800403000000808080808000060600020100804023e5149453e00427f400062514949462241494936"
    "1814127f1027454545393c4a49493001710905033649494936064949291e0000363600004036000000081422411414141414"
    "412214080002015909063e415d555e7c1211127c7f494949363e414141227f4141413e7f494949417f090909013e4149497a"
    "7f0808087f00417f41002040413f017f081422417f404040407f020c027f7f0408107f3e4141413e7f090909063e4151215e"
    "7f09192946264949493201017f01013f4040403f1f2040201f3f4038403f631408146307087008076151494543007f414100"
    "02040810200041417f0004020102044040404040000102040020545454787f484444383844444428384444487f3854545418"
    "087e0901020c5252523e7f0804047800447d40002040443d007f1028440000417f40007c041804787c080404783844444438"
    "7c14141408081414147c7c080404084854545424043f4440203c4040207c1c2040201c3c4030403c44281028440c5050503c"
    "4464544c44000836410000007f000000413608000804081008"
), np.uint8).reshape(95, 5, 1), axis=2, bitorder="little")[:, :, :7].swapaxes(1, 2).astype(bool)
FONT = np.pad(FONT, ((0, 0), (0, 0), (0, 1)))  # (95, 7, 6)


def words(text):
    """A line of text, black on white: an image 7 high. Letters lose their accents; what the font lacks is escaped."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    text = "".join(c if " " <= c <= "~" else c.encode("unicode_escape").decode() for c in letters)
    dots = FONT[np.frombuffer(text.encode(), np.uint8) - 32].swapaxes(0, 1).reshape(7, 6 * len(text), 1)
    return np.where(dots, 0, 255).astype(np.uint8).repeat(3, 2)


# From black through red to yellow, on a curve in Oklab (Ottosson 2020) of evenly rising lightness: equal steps look
# equal, also in grey print and to the colour-blind.
_stops = np.frombuffer(bytes.fromhex(
    "0900231a012b2f0632430e395818406d2347812f4d953d54a74c5ab85c5fc86e65d7816be59571f0aa77f9c07dffd882fff088"), np.uint8)
PALETTE = np.rint([np.interp(np.arange(256), np.linspace(0, 255, 17), stop) for stop in _stops.reshape(17, 3).T])
PALETTE = PALETTE.T.astype(np.uint8)  # (256, 3)
GREY = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
NO_DATA = (150, 160, 170)                                         # a grey that no palette has
RAIN_CLASSES = (0.1, 0.5, 1, 2, 5, 10)                            # mm/h, the lower bounds of all classes but the first
RAIN_COLOURS = np.concatenate([[[255, 255, 255]], PALETTE[::-1][np.linspace(8, 255, 6).astype(int)]]).astype(np.uint8)
RAIN_LEGEND = [*zip(RAIN_COLOURS.tolist(), ["< 0.1 mm/h"] + [
    f"{low:g} - {high:g}" for low, high in zip(RAIN_CLASSES, RAIN_CLASSES[1:])] + [f">= {RAIN_CLASSES[-1]:g} mm/h"])]


def paint(values, scale, palette=PALETTE):
    """Values (...) in the palette's colours, uint8 (..., 3): the scale's low and less in the first, its high and more
    in the last; NaN as NO_DATA."""
    low, high = scale
    share = (values - low) / (high - low) if high > low else 0 * values
    images = palette[np.rint(255 * np.nan_to_num(share).clip(0, 1)).astype(int)]
    images[np.isnan(values)] = NO_DATA
    return images


def fit(images, size):
    """Images (..., H, W) as (..., *size), every pixel that of the place it comes from: nothing is smoothed."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, images.shape[-2:]))
    return images[..., rows[:, None], columns]


class Row(NamedTuple):
    """A row of a sheet: panels of one size."""

    label: str
    images: np.ndarray          # uint8 (n, h, w, 3)
    scale: tuple = None         # (low, high) of the palette, drawn to the right of the row
    notes: tuple = ()           # of each panel: a word written across it, or ""


def _constant(values):
    """Notes for panels (n, h, w) that show nothing: all of one value, but for rounding."""
    known = [panel[~np.isnan(panel)] for panel in values]
    return ["constant" if v.size and np.ptp(v) <= 1e-6 * np.abs(v).max() else "" for v in known]


def heat_row(label, values, size):
    """Maps (n, h, w) of any values as a row of panels of `size`, in one scale from their least to their greatest value.

    A constant panel is noted as such. Raises ValueError for NaN and infinity.
    """
    values = torch.as_tensor(values).detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise ValueError(f"{label}: NaN or infinity among the values to be drawn")
    scale = values.min().item(), values.max().item()
    return Row(label, paint(fit(values, size), scale), scale, _constant(values))


def film_rows(label, frames, unit=None, scale=None):
    """Frames (T, C, H, W), NaN where there are no data, as rows of panels, one a channel, numbered if several.

    unit: None, for grey frames in [0, 1]; "mm/h", for rain, in classes; any other, for a heat map of values in it with
    the scale (low, high). A constant panel is noted as such.
    """
    values = torch.as_tensor(frames).detach().cpu().float().numpy()
    count, (height, width) = values.shape[1], values.shape[2:]
    step = -(-max(height, width) // 256)  # thinned out, for a longer side of 256 pixels at most, or magnified
    times = max(1, 64 // min(height, width)) if step == 1 else 1
    panels = fit(values, (-(-height // step) * times, -(-width // step) * times))
    if unit == "mm/h":
        images = RAIN_COLOURS[np.searchsorted(np.float32(RAIN_CLASSES), np.nan_to_num(panels), side="right")]
        images[np.isnan(panels)] = NO_DATA
    else:
        images = paint(panels, scale, PALETTE) if unit else paint(panels, (0, 1), GREY)
    return [Row(f"{label} {c + 1}/{count}" if count > 1 else label, images[:, c],
                scale if unit not in (None, "mm/h") else None, _constant(values[:, c])) for c in range(count)]


def _place(canvas, image, down=0.5, across=0.5):
    """Put an image onto a canvas, in its middle or at another share of the way; what does not fit is cut off."""
    image = image[:canvas.shape[0], :canvas.shape[1]]
    y, x = int(down * (canvas.shape[0] - len(image))), int(across * (canvas.shape[1] - image.shape[1]))
    canvas[y:y + len(image), x:x + image.shape[1]] = image
    return canvas


def _white(height, width):
    return np.full((height, width, 3), 255, np.uint8)


def _join(images, axis, gap=2):
    """Images below (axis 0) or beside (axis 1) each other on white."""
    most = max(image.shape[1 - axis] for image in images)
    sizes = [(gap + n, most) if axis == 0 else (most, gap + n) for n in (image.shape[axis] for image in images)]
    return np.concatenate([_place(_white(*size), image, 0, 0) for size, image in zip(sizes, images)], axis)


def sheet(rows, title="", legend=()):
    """Rows of panels below each other on white.

    rows: of three kinds: a text, which gets a line of its own; a list of texts, each above a column; a `Row`, its label
    to the left. All panels have one width. legend: (colour, text) pairs for the foot of the sheet.
    """
    panels = [row for row in rows if isinstance(row, Row)]
    width, left = panels[0].images.shape[2], max(words(row.label).shape[1] for row in panels) + 4
    lines = []
    for row in [title, *rows] if title else rows:
        if isinstance(row, str):
            line = np.pad(words(row), ((4, 2), (0, 0), (0, 0)), constant_values=255)
        elif isinstance(row, list):
            line = _join([_white(11, left), *(_place(_white(11, width), words(text)) for text in row)], 1)
        else:
            high = row.images.shape[1]
            cells = [_place(_white(high, left), words(row.label), across=0), *row.images]
            for k, note in enumerate(row.notes, 1):
                if note:
                    tag = np.pad(words(note), ((2, 2), (2, 1), (0, 0)), constant_values=255)
                    cells[k] = _place(cells[k].copy(), tag)
            if row.scale:
                low, top = (words(f"{v:.0f}" if abs(v) >= 1000 else f"{v:.3g}") for v in row.scale)
                ends = _white(high, max(low.shape[1], top.shape[1]))
                bar = PALETTE[np.linspace(255, 0, high).round().astype(int)][:, None].repeat(8, 1)
                cells += [bar, _place(_place(ends, top, 0, 0), low, 1, 0)]
            line = _join(cells, 1)
        lines.append(line)
    if legend:
        swatches = [np.pad(np.full((9, 9, 3), colour, np.uint8), ((1, 1), (1, 1), (0, 0))) for colour, _ in legend]
        texts = [_place(_white(11, words(text).shape[1] + 6), words(text), across=0) for _, text in legend]
        lines += [_white(4, 1), _join([cell for pair in zip(swatches, texts) for cell in pair], 1)]
    return np.pad(_join(lines, 0), ((2, 0), (2, 0), (0, 0)), constant_values=255)


# ---- Sheets of films, and of what a model holds ----------------------------------------------------------------------

class Film(NamedTuple):
    """A sequence and forecasts of it, in one unit, NaN where there are no data."""

    caption: str                # a line above it, or ""
    past: int                   # how many frames were read
    truth: torch.Tensor         # (T, C, H, W): the frames read and, where they are known, those that followed
    forecasts: dict             # {label: (horizon, C, H, W)}; a label of "" gets no line


def _range(*films):
    """The least and the greatest value of films."""
    values = torch.cat([film[~film.isnan()] for film in films])
    return (values.min().item(), values.max().item()) if len(values) else (0.0, 0.0)


def _film_sheet(films, rows, title, unit):
    legend = RAIN_LEGEND if unit == "mm/h" else []
    if any(frames.isnan().any() for film in films for frames in (film.truth, *film.forecasts.values())):
        legend = [(NO_DATA, "no data"), *legend]
    return sheet(rows, f"{title}, in {unit}" if unit else title, legend)


def film_sheet(films, title="", unit=None):
    """Films below each other: the frames read, what followed, and each forecast with its |error|, under their times.

    unit: as in film_rows. What followed and the errors are left out where a film has no truth for them.
    """
    rows = []
    for caption, past, truth, forecasts in films:
        times = [f"t={t + 1}" for t in range(past + max(map(len, forecasts.values())))]
        followed, scale = truth[past:], _range(truth, *forecasts.values())
        rows += [caption] * bool(caption) + [times[:past], *film_rows("input", truth[:past], unit, scale), times[past:]]
        if len(followed):
            rows += film_rows("truth", followed, unit, scale)
        for label, forecast in forecasts.items():
            rows += [label] * bool(label)
            if not len(followed):
                rows += film_rows("forecast", forecast, unit, scale)
                continue
            error = (forecast - followed).abs()
            rows += film_rows("forecast", forecast.where(~followed.isnan(), math.nan), unit, scale)
            rows += film_rows("|error|", error, unit, (0.0, _range(error)[1]))
    return _film_sheet(films, rows, title, unit)


def film_animation(films, title="", unit=None):
    """The same in motion, for `png`: truth, forecast and |error| of films of one length, one forecast each, beside each
    other. Returns images (T, h, w, 3)."""
    strips, sheets, length = [], [], len(films[0].truth)
    for film in films:
        forecast = torch.cat([film.truth[:film.past] * math.nan, *film.forecasts.values()])
        forecast = forecast.where(~film.truth.isnan(), math.nan)
        error, scale = (forecast - film.truth).abs(), _range(film.truth, forecast)
        strips.append([*zip(film_rows("", film.truth, unit, scale), film_rows("", forecast, unit, scale),
                            film_rows("", error, unit, (0.0, _range(error)[1])))])
    for t in range(length):
        reads = t < films[0].past
        rows = [f"frame {t + 1} of {length}, {'read' if reads else 'forecast'}", ["truth", "forecast", "|error|"]]
        for film, channels in zip(films, strips):
            rows.append(film.caption)
            for trio in channels:
                images, notes = np.stack([row.images[t] for row in trio]), [row.notes[t] for row in trio]
                if reads:
                    images[1:], notes[1:] = 230, ["reading", ""]
                rows.append(trio[0]._replace(images=images, notes=notes))
        sheets.append(_film_sheet(films, rows, title, unit))
    return np.stack(sheets)


def ranked(scores):
    """Sequences to show, by the MSE of their forecast: {"best": (number, MSE), "median": …, "worst": …}.

    scores: frame_scores, (N, T) each. Different sequences, so fewer where there are fewer; none without data. Raises
    ValueError where a forecast holds NaN, and where no sequence has data.
    """
    counts = scores["pixels"] > 0
    if bad := (counts & scores["mse"].isnan()).any(1).nonzero().flatten().tolist():
        raise ValueError(f"the forecast of test sequence {bad[0]} holds NaN")
    mse = torch.where(counts, scores["mse"], 0).sum(1) / counts.sum(1)
    order = [n for n in mse.argsort(stable=True).tolist() if counts[n].any()]
    if not order:
        raise ValueError("no test sequence has data")
    names = {order[-1]: "worst", order[0]: "best", order[len(order) // 2]: "median"}
    return {names[n]: (n, mse[n].item()) for n in order if n in names}


def query_points(frame):
    """Two pixels (y, x) of a frame (C, H, W) to query attention at: in its brightest spot and in its emptiest area."""
    grey, side, points = frame.mean(0, keepdim=True), min(frame.shape[1:]), []
    for sign, window in ((1, side // 12 | 1), (-1, side // 4 | 1)):
        means = torch.nn.functional.avg_pool2d(sign * grey, window, 1)[0]
        y, x = divmod(int(means.argmax()), means.shape[1])
        points.append((y + window // 2, x + window // 2))
    return points


COLUMNS = 10                        # of a sheet over a model's steps, at the most
FEATURES = "mean of |x| over channels"


def crossed(row, point, frames):
    """A row with a pixel (y, x) of the frames (..., H, W) marked in all panels, by a white "+" that leaves it open."""
    y, x = ((2 * p + 1) * new // (2 * old) for p, new, old in zip(point, row.images.shape[1:3], frames.shape[-2:]))
    far = np.maximum(*(distance := np.abs(np.mgrid[-5:6, -5:6])))
    images = np.pad(row.images, ((0, 0), (5, 5), (5, 5), (0, 0)))
    spot = images[:, y:y + 11, x:x + 11]
    spot[:, (distance.min(0) <= 1) & (far > 0)] = 0
    spot[:, (distance.min(0) == 0) & (far > 0) & (far < 5)] = 255
    return row._replace(images=images[:, 5:-5, 5:-5])


def _reads(reads):
    """The steps that are shown, evenly spread, and what was read there, under its time."""
    steps = slice(0, len(reads), -(-len(reads) // COLUMNS))
    return steps, [f"t={t + 1}" for t in range(len(reads))[steps]], film_rows("reads", reads[steps])


def layer_sheet(runs, title=""):
    """What models hold after each step: mean |x| over the channels of every layer, with one scale a row.

    runs: {label: (reads, extras)}; reads: the frames (S, C, H, W) in [0, 1] that a model read, step by step; extras:
    {name: one tensor a layer}, of which those (1, S, C, h, w) are drawn, "layers" above all.
    """
    rows = [FEATURES]
    for label, (reads, extras) in runs.items():
        steps, times, shown = _reads(reads)
        rows += [label, times, *shown]
        rows += [heat_row(f"layer {k + 1}" if name == "layers" else name, layer[0, steps].abs().mean(1),
                          shown[0].images.shape[1:3])
                 for name, layers in extras.items() for k, layer in enumerate(layers) if layer.ndim == 5]
    return sheet(rows, title)


def map_sheets(reads, extras, names, points, about="", title=""):
    """Attention and weight maps of the first and the last layer, a sheet for each name and query point: {name: image}.

    reads, extras: as in layer_sheet. "attention" is (1, S, points, n, h, w): n maps of what each point (y, x) looks at.
    Any other with six dimensions is (1, S, n, C, h, w); drawn is the mean of |x| over C. names: {name: n texts}.
    """
    sheets = {}
    for name, layers in ((name, layers) for name, layers in extras.items() if layers[0].ndim == 6):
        for p, point in enumerate(points if name == "attention" else [None]):
            steps, times, shown = _reads(reads)
            maps = {k: layers[k][0, steps] for k in sorted({0, len(layers) - 1})}  # (steps, points or n, n or C, h, w)
            maps = {k: x[:, p] if point else x.abs().mean(2) for k, x in maps.items()}
            shown += [heat_row(f"layer {k + 1}: {text}", x[:, n], shown[0].images.shape[1:3]) for k, x in maps.items()
                      for n, text in enumerate(names.get(name) or [f"{name} {n + 1}" for n in range(x.shape[1])])]
            what = f"{name}: {FEATURES}"
            if point:
                shown, what = [crossed(row, point, reads) for row in shown], f"{name} of + (y={point[0]}, x={point[1]})"
            sheets[f"{name}_{p + 1}" if point else name] = sheet([about, what, times, *shown], title)
    return sheets
