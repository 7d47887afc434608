"""What a forecast is worth: scores of predicted frames, the table at the end of a run, curves as SVG, pictures as PNG.

    summary = summarize(frame_scores(pred, truth, mask))            # {"mse": {"mean": 61.2, "frames": [40.1, …], …}, …}
    summary |= csi_hss(event_counts(pred_mm, truth_mm, (0.5, 2, 5), mask), (0.5, 2, 5))             # {"csi_0.5": …, …}
    summary |= unit_summary(unit_errors(pred_mm, truth_mm, mask))                                   # {"rmse": …, …}
    print(table({"forecast": summary}, unit="mm/h"))
    svg = score_curves({"ConvLSTM": summary}, unit="mm/h")
    picture = png(film_sheet([Film("", 10, frames, {"": forecast})]))   # model_sheets: what a model holds

Frames (B, T, C, H, W) are scored where they lie (CPU or CUDA), in float64, and the device is waited for only when a
summary is made. Scores of several batches are joined; event counts and errors in units are added up. What has no data
(mask False) has no score, and means are over what has.
"""

import math
import struct
import textwrap
import unicodedata
import zlib
from collections import namedtuple
from html import escape
from itertools import chain, cycle, groupby

import numpy as np
import torch

NAMES = {  # {0}: which threshold, or channel of several; {1}: the data's unit
    "mse": "MSE (sum over a frame)", "mae": "MAE (sum over a frame)", "psnr": "PSNR (dB)",
    "ssim": "SSIM (1 = identical)", "psnr_float": "PSNR* (dB)", "ssim_gaussian": "SSIM* (1 = identical)",
    "rmse": "RMSE{0} ({1})", "mae_units": "MAE{0} ({1})", "csi": "CSI{0} ({1})", "hss": "HSS{0} ({1})"}


def name_of(metric, unit=None):
    """The name of a metric, such as "mse", "csi_0.5" or "rmse_2", with its unit."""
    kind, which = (metric, "") if metric in NAMES else metric.rsplit("_", 1)
    return NAMES[kind].format(which and f" {which}", unit or "own unit")


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
    """Score every predicted frame: a dict of float64 (B, T) on the device of truth.

    pred, truth: (B, T, C, H, W), any floating dtype, one device. truth: in [0, 1], to rounding; pred is clipped to it.
    mask: None or bool of the same shape, True where a pixel counts; what does not is 0 in both.

      mse, mae       error² and |error|, summed over the pixels and channels of the frame
      psnr           dB, of values truncated to 8 bits; inf for an exact frame
      ssim           of 8-bit values, 7×7 uniform window, sample covariance: scikit-image's default
      psnr_float     dB, 10·log10(1 / (mean error² + 1e-5)) on floats, as MS-LSTM's released code has it
      ssim_gaussian  on floats, 11×11 Gaussian window (σ = 1.5), population covariance: likewise
      pixels         how many count: 0 for a frame without data; NaN for one whose truth is not in [0, 1]
    A frame without data, with a truth beyond [0, 1] or with a NaN that counts has scores of NaN. Scores do not depend
    on the batch, to the last bit: all sums are elementwise additions in a fixed order.
    Raises ValueError for other shapes, dtypes (uint8 levels) and devices.
    """
    _check(pred, truth, mask, floating=True)
    # Few frames at a time: on a GPU some gigabytes of intermediates; on the CPU what stays in the cache and below the
    # 2^15 values from which torch splits an operation over threads, which costs more than it gains when they are busy.
    frames = max(1, (2**25 if truth.is_cuda else 2**15 - 1) // truth[0, 0].numel())
    chunks = (x.flatten(0, 1).split(frames) for x in (pred, truth, mask) if x is not None)
    parts = [_chunk_scores(*chunk) for chunk in zip(*chunks)]
    return {name: torch.cat([part[name] for part in parts]).view(truth.shape[:2]) for name in parts[0]}


def _chunk_scores(pred, truth, mask=None):
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
    """(n, …) -> (n,): the sums over frames, by adding the second half to the first until one value is left. Unlike
    torch.sum, whose order of additions depends on the number of frames, the device and the threads. Works in x."""
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

    covariance: n/(n−1) of the window for sample covariance, 1 for the population's. The mean is over channels and the
    positions where the window fits (NaN where it fits nowhere) and, with a mask, holds a pixel that counts.
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

    "frames" are T means over N sequences, "mean" is over both; "left_out" counts frames without data, "exact" those
    without a finite PSNR, which no mean has. None is what is undefined: no frame left, a frame smaller than SSIM's
    window, NaN in a prediction. Raises ValueError where the truth of a frame was not in [0, 1] (`pixels` of NaN).
    """
    scores = {name: values.double().cpu() for name, values in scores.items()}
    pixels = scores.pop("pixels", torch.ones(()))
    if bad := int(pixels.isnan().sum()):
        raise ValueError(f"the truth of {bad} of {pixels.numel()} frames holds NaN or values outside [0, 1]")
    summary = {}
    for name, values in scores.items():
        scored, exact = (pixels > 0).expand(values.shape), values == math.inf
        frames = [frame[kept].tolist() for frame, kept in zip(values.T, (scored & ~exact).T)]  # T lists
        summary[name] = {"mean": _mean(sum(frames, [])), "frames": [_mean(frame) for frame in frames],
                         "left_out": int((~scored).sum())}
        if name == "psnr":
            summary[name]["exact"] = int((scored & exact).sum())
    return summary


def _mean(values):
    """The mean, correctly rounded; None if there are no values or one is NaN."""
    mean = math.fsum(values) / len(values) if values else math.nan
    return None if math.isnan(mean) else mean


# ---- Scores in the data's unit ---------------------------------------------------------------------------------------

@torch.no_grad()
def event_counts(pred, truth, thresholds, mask=None):
    """Count hits, misses, false alarms, correct negatives of "at least so much" and pixels where one is NaN, which is
    neither: int64 (thresholds, T, 5) on their device.

    pred, truth: (B, T, C, H, W), any numbers, in the thresholds' unit; mask: None or bool, True where a pixel counts.
    Raises ValueError as frame_scores does.
    """
    _check(pred, truth, mask)
    mask = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask
    nan = mask & (pred.isnan() | truth.isnan())
    known = mask & ~nan
    counts = truth.new_zeros((len(thresholds), truth.shape[1], 5), dtype=torch.int64)
    for row, threshold in zip(counts, thresholds):
        event, fell = pred >= threshold, truth >= threshold
        cells = event & fell & known, ~event & fell & known, event & ~fell & known, ~event & ~fell & known, nan
        row[:] = torch.stack([cell.sum((0, 2, 3, 4)) for cell in cells], 1)
    return counts


def csi_hss(counts, thresholds):
    """CSI and HSS of event_counts: {"csi_0.5": {"mean": float, "frames": [float] * T, "undefined": int}, "hss_0.5": …}.

    A lead time of 0/0 (no event forecast, none happened, or no data) is None, which the mean leaves out and "undefined"
    counts. A NaN that counts makes its lead time and the mean None. Raises ValueError for counts of other thresholds.
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

    pred, truth: (B, T, C, H, W), any numbers, in one unit; mask and ValueError as in event_counts.
    """
    _check(pred, truth, mask)
    mask = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask
    sums = truth.new_zeros((*truth.shape[1:3], 3), dtype=torch.float64)
    for t, row in enumerate(sums):
        error = torch.where(mask[:, t], pred[:, t].double() - truth[:, t].double(), 0)  # (B, C, H, W)
        for k, values in enumerate((error * error, error.abs(), mask[:, t].double())):
            row[:, k] = _frame_sum(values.transpose(0, 1))
    return sums


def unit_summary(sums):
    """RMSE and MAE of unit_errors, in that unit: {"rmse": {"mean": float, "frames": [float] * T}, "mae_units": …}.

    Pooled over pixels, sequences and channels, "mean" over lead times, too. With several channels "rmse_1",
    "mae_units_1", … are those of each. None where nothing counts, and for NaN or infinity among what counts.
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

    results: {"forecast": summary, "repeat_last": …, "all_predictions": …, "black": …, "first_channel": …}, all but the
    first where there are any. The first two stand side by side, frame by frame; below them the means of the others, and
    of `published`: dicts with "source" and some metrics. metrics: of the first block, four at most; what the data's
    unit adds follows in blocks of its own. precision: of the run, said beside published figures.
    """
    forecast = results["forecast"]
    errors = [m.removeprefix("rmse") for m in forecast if m.startswith("rmse")]  # "", and _1, … of several channels
    blocks = [metrics, *([f"rmse{c}", f"mae_units{c}"] for c in errors[1:] or errors)]
    for score in ("csi_", "hss_"):
        events = [m for m in forecast if m.startswith(score)]
        blocks += [events[k:k + 3] for k in range(0, len(events), 3)]
    text = "\n\n".join(_block(results, published, block, unit) for block in blocks)
    for key, what in (("left_out", "frames without data are left out"), ("exact", "PSNR leaves out exact frames")):
        counts = {name: max(s[m].get(key, 0) for m in metrics) for name, s in results.items()}
        counts = [f"{count} ({name.replace('_', ' ')})" for name, count in counts.items() if count]
        text += f"\n{what}: {', '.join(counts)}" if counts else ""
    if {"psnr_float", "ssim_gaussian"} & set(metrics):
        text += "\n* on floats, SSIM with a Gaussian window: as MS-LSTM scores"
    if published and precision:
        text += f"\nthe papers' figures are of fp32 runs; this run computed in {precision}"
    if len(errors) > 1:
        text += f"\nRMSE and MAE 1 to {len(errors) - 1}: each channel's, in its own unit"
    lower = "MSE, MAE, RMSE" if errors else "MSE, MAE"
    higher = "PSNR, SSIM, CSI, HSS" if any(m.startswith("csi_") for m in forecast) else "PSNR, SSIM"
    how = (f"How to read it: lower {lower} and higher {higher} are better; "
           "the repeated last frame is what a forecast must beat.")
    return text + "\n" + textwrap.fill(how, 100)


def _block(results, published, metrics, unit):
    """One block of the table: these metrics of the forecast on the left, of the repeated last frame on the right."""
    sides = [results[name] for name in ("forecast", "repeat_last") if name in results]
    length, bar = len(sides[0][metrics[0]]["frames"]), 1 + len(metrics)

    def cell(m, value):
        mean = max(side[m]["mean"] or 0 for side in sides)
        return "–" if value is None else format(value, ".2f" if mean >= 10 else ".2e" if 0 < mean < 0.001 else ".4f")

    columns = [["frame", *map(str, range(1, length + 1)), "mean"]]
    for side in sides:
        columns += [["|"] * (length + 2)] * (len(columns) > 1)
        columns += [[name_of(m).partition(" (")[0], *(cell(m, v) for v in (*side[m]["frames"], side[m]["mean"]))]
                    for m in metrics]
    rows = [*zip(*columns)]
    for name in ("all_predictions", "black", "first_channel"):
        if metrics[0] in results.get(name, {}):
            count = len(results[name][metrics[0]]["frames"])
            label = f"all {count} predictions" if name == "all_predictions" else name.replace("_", " ")
            rows.append([label, *(cell(m, results[name][m]["mean"]) for m in metrics)])
    for paper in published:
        if any(paper.get(m) is not None for m in metrics):  # digits as the paper prints them
            source = textwrap.shorten(paper["source"], 32, placeholder=" …")
            rows.append([source, *("–" if paper.get(m) is None else f"{paper[m]:g}" for m in metrics)])

    widths = [2 * (k > 0) + max(len(row[k]) for row in rows if k < len(row)) for k in range(len(rows[0]))]
    head, *lines = (row[0].ljust(widths[0]) + "".join(map(str.rjust, row[1:], widths[1:])) for row in rows)
    title = f"in {unit or 'own unit'}" if metrics[0].startswith("rmse") else ""
    title += " forecast".rjust(sum(widths[:bar]) - len(title))
    if len(sides) > 1:
        title += "  |" + " repeated last frame".rjust(sum(widths[bar + 1:]))
    dashes = "-" * len(head)
    return "\n".join([title, head, dashes, *lines[:length], dashes, *lines[length:]])


# ---- Curves ----------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours for every kind of colour vision, without the yellow that white paper swallows. Dashes and
# markers change along with them, so that curves can be told apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("none", "7 3", "2 2", "9 3 2 3", "4 4")
MARKERS = ("M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z", "M-3,-3h6v6h-6z", "M0,-4l4,7h-8z", "M0,-4l4,4l-4,4l-4,-4z")
PANEL = (400, 260)  # width and height of a panel with its labels


def score_curves(summaries, title="", unit=None):
    """Frame-wise scores of several forecasts, {label: summary}, as SVG: of frames, and what the unit adds."""
    shown = [m for m in next(iter(summaries.values())) if m.startswith(("csi_", "hss_"))
             or m in ("mse", "mae", "psnr", "ssim", "rmse", "mae_units")]
    return curves_svg([(name_of(m, unit), "forecast frame", {
        label: [*enumerate(summary[m]["frames"], 1)] for label, summary in summaries.items() if m in summary})
        for m in shown], title)


def curves_svg(panels, title="", log=False):
    """Panels of curves with axes, ticks and one legend, two beside each other, as the text of an SVG file.

    panels: (name with unit, name of the x axis, {label: [(x, y), …]}). A label looks the same in every panel. A y of
    None is a gap. log: with logarithmic y axes, where all values allow them. Every unbroken piece is a <polyline> with
    its numbers in full as data-x, data-values. Raises ValueError for NaN and infinity.
    """
    labels = dict.fromkeys(label for *_, curves in panels for label in curves)
    styles = {label: (f'stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"',
                      f'<path d="{marker}" transform="translate({{}})" fill="{colour}"/>')
              for label, colour, dash, marker in zip(labels, cycle(COLOURS), cycle(DASHES), cycle(MARKERS))}
    width, top = PANEL[0] * min(2, len(panels)), 30 if title else 0
    body = [_panel(*panel, log, styles, k % 2 * PANEL[0], top + k // 2 * PANEL[1]) for k, panel in enumerate(panels)]
    if title:
        body.append(_text(width / 2, 20, title, size=14))
    x, y = 20, top + math.ceil(len(panels) / 2) * PANEL[1] + 14
    for label, (stroke, marker) in styles.items():
        needed = 60 + 6.5 * len(label)  # 11-pixel letters are about that wide
        if x > 20 and x + needed > width:
            x, y = 20, y + 18
        body.append(f'<path d="M{x},{y}h34" {stroke}/>' + marker.format(f"{x + 17},{y}")
                    + _text(x + 40, y + 4, label, "start"))
        x += needed
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y + 16}" '
            f'viewBox="0 0 {width} {y + 16}" font-family="sans-serif" font-size="11">\n'
            f'<rect width="{width}" height="{y + 16}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n")


def _panel(name, xlabel, curves, log, styles, x0, y0):
    """One panel as an SVG group whose upper left corner is at (x0, y0)."""
    pieces = [(label, [*piece]) for label, curve in curves.items()
              for gap, piece in groupby(curve, lambda point: point[1] is None) if not gap]
    xs, ys = ([point[axis] for _, piece in pieces for point in piece] for axis in (0, 1))
    if not all(map(math.isfinite, xs + ys)):
        raise ValueError(f"{name}: a curve cannot show NaN or infinity")
    left, top, right, bottom = 64, 34, 384, 214  # of the axes
    middle = (left + right) / 2
    (x_ticks, x_of), (y_ticks, y_of) = _axis(xs, left, right), _axis(ys, bottom, top, log and all(y > 0 for y in ys))
    out = [f'<g transform="translate({x0},{y0})">', _text(middle, top - 12, name, size=13),
           _text(middle, bottom + 34, xlabel)]
    out += [f'<path d="M{left},{y_of(tick):.2f}H{right}" stroke="#ddd"/>'
            + _text(left - 6, y_of(tick) + 4, f"{tick:g}", "end") for tick in y_ticks]
    out += [f'<path d="M{x_of(tick):.2f},{bottom}v4" stroke="black"/>' + _text(x_of(tick), bottom + 17, f"{tick:g}")
            for tick in x_ticks]
    out.append(f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="black"/>')
    for label, piece in pieces:
        stroke, marker = styles[label]
        points = [f"{x_of(x):.2f},{y_of(y):.2f}" for x, y in piece]
        data_x, values = (" ".join(repr(float(v)) for v in axis) for axis in zip(*piece))
        out.append(f'<polyline fill="none" {stroke} points="{" ".join(points)}" '
                   f'data-label="{escape(_printable(label))}" data-x="{data_x}" data-values="{values}"/>')
        out += map(marker.format, points[::math.ceil(len(points) / 20)])
    if not pieces:
        out.append(_text(middle, (top + bottom) / 2, "no values"))
    return "\n".join([*out, "</g>"])


def _axis(values, start, end, log=False):
    """Ticks of an axis that holds the values, and the map from a value to its place between start and end (pixels)."""
    scale = math.log10 if log else float
    low, high = scale(min(values, default=1)), scale(max(values, default=10))
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    low, high = low - margin, high + margin
    if log and high - low > 1:
        mantissas = (1,) if high - low > 3 else (1, 2, 5)
        powers = range(math.floor(low), math.ceil(high), math.ceil((high - low) / 6))
        ticks = [m * 10.0**power for power in powers for m in mantissas]
    else:  # a logarithmic axis of less than a decade is nearly linear
        lowest, highest = (10**low, 10**high) if log else (low, high)
        power = 10 ** math.floor(math.log10((highest - lowest) / 4))
        step = next(m * power for m in (1, 2, 5, 10) if (highest - lowest) / (m * power) <= 6)
        if all(isinstance(v, int) for v in values):
            step = max(1, round(step))
        ticks = [k * step for k in range(math.ceil(lowest / step), math.floor(highest / step) + 1)]
    return ([tick for tick in ticks if low <= scale(tick) <= high],
            lambda value: start + (scale(value) - low) / (high - low) * (end - start))


def _printable(text):
    """Text with its control characters and, of names that are not UTF-8, lone surrogates as escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _text(x, y, text, anchor="middle", size=11):
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size}">{escape(_printable(text))}</text>'


# ---- Pictures: images are uint8 (H, W, 3) ----------------------------------------------------------------------------

def png(images, delay_ms=300):
    """A PNG file of an image, uint8 (H, W, 3), or of images (T, H, W, 3) an animated one that loops for ever."""
    frames = images if images.ndim == 4 else images[None]
    if (frames == frames[..., :1]).all():
        frames = frames[..., :1]
    count, height, width, colours = frames.shape
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colours - 1, 0, 0, 0))]  # type 0: grey, 2: RGB
    if images.ndim == 4:
        chunks.append((b"acTL", struct.pack(">II", count, 0)))
    for t, frame in enumerate(frames):
        if images.ndim == 4:  # numbered together with the data of all frames but the first
            control = struct.pack(">IIIIIHHBB", max(2 * t - 1, 0), width, height, 0, 0, delay_ms, 1000, 0, 0)
            chunks.append((b"fcTL", control))
        rows = np.pad(frame.reshape(height, -1), ((0, 0), (1, 0)))  # a zero before each row: no filter
        packed = zlib.compress(rows.tobytes(), 6)
        chunks.append((b"fdAT", struct.pack(">I", 2 * t) + packed) if t else (b"IDAT", packed))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in (*chunks, (b"IEND", b"")))


# The printable ASCII characters from the blank on, five columns of seven dots each, the lowest bit at the top.
FONT = np.unpackbits(np.frombuffer(bytes.fromhex(
    "000000000000005f00000007000700147f147f14242a7f2a12231308646236495620500000070000001c2241000041221c002a1c7f1c2a"
    "08083e080800403000000808080808000060600020100804023e5149453e00427f4000625149494622414949361814127f102745454539"
    "3c4a49493001710905033649494936064949291e0000363600004036000000081422411414141414412214080002015909063e415d555e"
    "7c1211127c7f494949363e414141227f4141413e7f494949417f090909013e4149497a7f0808087f00417f41002040413f017f08142241"
    "7f404040407f020c027f7f0408107f3e4141413e7f090909063e4151215e7f09192946264949493201017f01013f4040403f1f2040201f"
    "3f4038403f631408146307087008076151494543007f41410002040810200041417f000402010204404040404000010204002054545478"
    "7f484444383844444428384444487f3854545418087e0901020c5252523e7f0804047800447d40002040443d007f1028440000417f4000"
    "7c041804787c0804047838444444387c14141408081414147c7c080404084854545424043f4440203c4040207c1c2040201c3c4030403c"
    "44281028440c5050503c4464544c44000836410000007f000000413608000804081008"
), np.uint8).reshape(95, 5, 1), axis=2, count=7, bitorder="little").swapaxes(1, 2)
FONT = np.pad(255 - 255 * FONT, ((0, 0), (0, 0), (0, 1)), constant_values=255)[..., None].repeat(3, 3)  # (95, 7, 6, 3)


def words(text):
    """A line of text as an image 7 high, black on white. Letters lose their accents; what the font lacks is escaped."""
    letters = (c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    codes = _printable(letters).encode("ascii", "backslashreplace")
    return FONT[[code - 32 for code in codes]].swapaxes(0, 1).reshape(7, -1, 3)


# From black through red to yellow, on a curve in Oklab (Ottosson 2020) of evenly rising lightness: equal steps look
# equal, also in grey print and to the colour-blind.
PALETTE = np.frombuffer(bytes.fromhex(
    "0900231a012b2f0632430e395818406d2347812f4d953d54a74c5ab85c5fc86e65d7816be59571f0aa77f9c07dffd882fff088"), np.uint8)
PALETTE = [np.interp(np.arange(256), np.linspace(0, 255, 17), stops) for stops in PALETTE.reshape(17, 3).T]
PALETTE = np.rint(PALETTE).T.astype(np.uint8)  # (256, 3)
GREY = np.arange(256, dtype=np.uint8)[:, None].repeat(3, 1)
NO_DATA = (150, 160, 170)                                         # a grey that no palette has
RAIN_CLASSES = (0.1, 0.5, 1, 2, 5, 10)                            # mm/h, the lower bounds of all classes but the first
RAIN_COLOURS = np.concatenate([[[255, 255, 255]], PALETTE[[247, 198, 149, 99, 50, 0]]]).astype(np.uint8)
RAIN_LEGEND = [*zip(RAIN_COLOURS, ("< 0.1 mm/h", "0.1 - 0.5", "0.5 - 1", "1 - 2", "2 - 5", "5 - 10", ">= 10 mm/h"))]

# A row of a sheet: panels of one size, uint8 (n, h, w, 3), or (n, T, h, w, 3) in motion, their label to the left and,
# to the right, the palette with its scale (low, high), if any.
Row = namedtuple("Row", "label images scale")
# A sequence (T, C, H, W), of which `past` frames were read and those that followed may be unknown, with forecasts of
# it, {label: (horizon, C, H, W)}: in one unit, NaN where there are no data. No line is made for an empty text.
Film = namedtuple("Film", "caption past truth forecasts")


def paint(values, unit=None, scale=None):
    """Values (...) as colours, uint8 (..., 3); NaN as NO_DATA. unit: None, for grey in [0, 1]; "mm/h", for rain, in
    classes; any other, for the palette over the scale (low, high), what lies beyond in its first and last colour."""
    if unit == "mm/h":
        images = RAIN_COLOURS[np.searchsorted(np.float32(RAIN_CLASSES), values, side="right")]
    else:
        low, high = (0, 1) if unit is None else scale
        share = (values - low) / (high - low) if high > low else 0 * values
        images = (GREY if unit is None else PALETTE)[np.rint(255 * np.nan_to_num(share).clip(0, 1)).astype(int)]
    images[np.isnan(values)] = NO_DATA
    return images


def _range(*values):
    """The least and the greatest value that is not NaN; (0, 0) of none."""
    values = np.concatenate([np.ravel(v) for v in values])
    values = values[~np.isnan(values)]
    return (values.min().item(), values.max().item()) if len(values) else (0.0, 0.0)


def panel_rows(label, values, unit=None, scale=None, size=None, cross=None):
    """Values (n, C, h, w) as rows of n panels, one a channel, numbered if several. A constant panel is noted as such.

    unit, scale: as in `paint`; by default from the least to the greatest value. size: (height, width) of a panel; by
    default the values', thinned out to 256 pixels at most or magnified to some 64; nothing is smoothed. cross: where to
    put a "+" that leaves its middle open, (y, x) in shares of height and width.
    """
    values = np.asarray(values, dtype=float)
    scale = None if unit in (None, "mm/h") else scale or _range(values)
    count, *shape = values.shape[1:]
    if not size:
        step = -(-max(shape) // 256)
        size = [-(-side // step) * max(1, min(64 // min(shape), 256 // max(shape))) for side in shape]
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, shape))
    images = paint(values[..., rows[:, None], columns], unit, scale)
    if cross:
        y, x = (np.abs(np.arange(side) - int(share * side)) for share, side in zip(cross, size))
        near, far = np.minimum(y[:, None], x), np.maximum(y[:, None], x)
        images[..., (near <= 1) & (far > 0) & (far <= 5), :] = 0
        images[..., (near == 0) & (far > 0) & (far < 5), :] = 255
    tag = np.pad(words("constant"), ((2, 2), (2, 1), (0, 0)), constant_values=255)[:size[0], :size[1]]
    y, x = ((side - of_tag) // 2 for side, of_tag in zip(size, tag.shape))
    low, high = (end.reduce(values, (2, 3)) for end in (np.fmin, np.fmax))  # (n, C), without what is NaN
    images[..., y:y + tag.shape[0], x:x + tag.shape[1], :][np.isclose(low, high, rtol=1e-6, atol=0)] = tag
    return [Row(f"{label} {c + 1}/{count}" if count > 1 else label, images[:, c], scale) for c in range(count)]


def sheet(rows, title="", unit=None):
    """Rows below each other on white: an image, or images (T, h, w, 3) where one is in motion.

    rows: a text or an image, on a line of its own; a list of texts, each above a column; a `Row`. All panels have one
    width. unit: as in `paint`; said with the title, its colours at the foot.
    """
    drawn = [row for row in rows if isinstance(row, Row)]
    wide = max((row.images.shape[-2] for row in drawn), default=0)
    left = 8 + max((words(row.label).shape[1] for row in drawn), default=0)
    parts, y = [], 2  # images, and the places of their upper left corners
    for row in (f"{title}, in {unit}" if unit else title, *rows):
        if isinstance(row, list):
            for k, text in enumerate(words(text)[:, :wide] for text in row):
                parts.append((text, y + 2, left + k * (wide + 2) + (wide - text.shape[1]) // 2))
            y += 13
        elif isinstance(row, Row):
            high, end = row.images.shape[-3], left + len(row.images) * (wide + 2)
            parts.append((words(row.label), y + (high - 7) // 2, 2))
            parts += [(image, y, left + k * (wide + 2)) for k, image in enumerate(row.images)]
            if row.scale:
                parts.append((PALETTE[np.linspace(255, 0, high).round().astype(int)][:, None].repeat(8, 1), y, end))
                parts += [(words(f"{value:.4g}"), at, end + 10) for value, at in zip(row.scale, (y + high - 7, y))]
            y += high + 2
        elif len(row):
            image = words(row) if isinstance(row, str) else row
            parts.append((image, y + 4, 2))
            y += 8 + image.shape[-3]
    no_data = any((row.images == NO_DATA).all(-1).any() for row in drawn)
    x = 2
    for colour, text in [(NO_DATA, "no data")] * no_data + RAIN_LEGEND * (unit == "mm/h"):
        swatch = np.pad(np.full((9, 9, 3), colour, np.uint8), ((1, 1), (1, 1), (0, 0)))
        parts += [(swatch, y + 6, x), (words(text), y + 8, x + 13)]
        x += 21 + 6 * len(text)
    size = [2 + max(place[axis] + image.shape[axis - 3] for image, *place in parts) for axis in (0, 1)]
    canvas = np.full((*max((image.shape[:-3] for image, *_ in parts), key=len), *size, 3), 255, np.uint8)
    for image, y, x in parts:
        canvas[..., y:y + image.shape[-3], x:x + image.shape[-2], :] = image
    return canvas


def _against(truth, forecast, unit, scale):
    """Rows of a forecast and of its |error|, both where the truth has data; of the forecast alone without a truth."""
    if not len(truth):
        return [panel_rows("forecast", forecast, unit, scale)]
    forecast = forecast.where(~truth.isnan(), math.nan)
    error = (forecast - truth).abs()
    return panel_rows("forecast", forecast, unit, scale), panel_rows("|error|", error, unit, _range(error, [0.0]))


def film_sheet(films, title="", unit=None):
    """Films below each other: the frames read, what followed, and each forecast with its |error|, under their times."""
    rows = []
    for caption, past, truth, forecasts in films:
        times = [f"t={t + 1}" for t in range(past + max(map(len, forecasts.values())))]
        followed, scale = truth[past:], _range(truth, *forecasts.values())
        rows += [caption, times[:past], *panel_rows("input", truth[:past], unit, scale), times[past:]]
        if len(followed):
            rows += panel_rows("truth", followed, unit, scale)
        for label, forecast in forecasts.items():
            rows += [label, *chain(*_against(followed, forecast, unit, scale))]
    return sheet(rows, title, unit)


def film_animation(films, title="", unit=None):
    """Films in motion, (T, h, w, 3): truth, forecast and |error| beside each other. All have one length and past, and
    one forecast each."""
    past, length = films[0].past, len(films[0].truth)
    heads = [f"frame {t + 1} of {length}, {'reading' if t < past else 'forecast'}" for t in range(length)]
    rows = [np.stack([words(head.ljust(len(heads[-1]))) for head in heads]), ["truth", "forecast", "|error|"]]
    for film in films:
        forecast = torch.cat([film.truth[:past] * math.nan, *film.forecasts.values()])
        scale = _range(film.truth, forecast)
        rows.append(film.caption)
        for trio in zip(panel_rows("", film.truth, unit, scale), *_against(film.truth, forecast, unit, scale)):
            images = np.stack([row.images for row in trio])  # (3, T, h, w, 3)
            images[1:, :past] = 230  # no forecast yet
            rows.append(trio[0]._replace(images=images))
    return sheet(rows, title, unit)


def ranked(scores):
    """Sequences to show, by the MSE of their forecast: {"best": (number, MSE), "median": …, "worst": …}.

    scores: frame_scores, (N, T) each. Different sequences with data, so fewer where there are fewer. Raises ValueError
    where there is none, and where a forecast holds NaN.
    """
    counts = scores["pixels"] > 0
    mse = torch.where(counts, scores["mse"], 0).sum(1) / counts.sum(1)
    order = [n for n in mse.argsort(stable=True).tolist() if counts[n].any()]  # NaN comes last
    if not order or mse[order[-1]].isnan():
        raise ValueError(f"test sequence {order[-1]}: NaN in the forecast" if order else "no test sequence has data")
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


def model_sheets(reads, extras, names, points=(), about="", title=""):
    """What a model holds after each step, ten of them at most, evenly spread, with one scale a row: {name: image}.

    reads: the frames (S, C, H, W) in [0, 1] that it read; extras: {name: [one tensor a layer]}. "layers" are all that
    are (1, S, C, h, w), as the mean of |x| over C. Each of `names`, {name: n texts}, is a sheet of n maps of the first
    and the last layer: (1, S, n, C, h, w), likewise, or, "attention", (1, S, points, n, h, w), a sheet for each point
    (y, x) of the frames. about: a line for all. Raises ValueError for NaN and infinity.
    """
    mean = "mean of |x| over channels"
    found = {"layers": (mean, None, [
        (f"layer {k + 1}" if name == "layers" else name, layer[0].abs().mean(1))
        for name, layers in extras.items() for k, layer in enumerate(layers) if layer.ndim == 5])}
    for name in (name for name in names if name in extras):
        for p, point in enumerate(points if name == "attention" else [None]):
            maps = []
            for k in sorted({0, len(extras[name]) - 1}):
                x = extras[name][k][0]
                x = x[:, p] if point else x.abs().mean(2)  # (S, n, h, w)
                maps += [(f"layer {k + 1}: {text}", x[:, n]) for n, text in enumerate(names[name])]
            found[f"{name}_{p + 1}" if point else name] = (
                f"{name} of + (y={point[0]}, x={point[1]})" if point else f"{name}: {mean}", point, maps)
    sheets, steps = {}, slice(0, len(reads), -(-len(reads) // 10))
    times = [f"t={t + 1}" for t in range(len(reads))[steps]]
    for name, (what, point, maps) in found.items():
        cross = point and [(p + 0.5) / side for p, side in zip(point, reads.shape[2:])]
        rows = panel_rows("reads", reads[steps], cross=cross)
        for label, values in maps:
            if not values.isfinite().all():
                raise ValueError(f"{label}: NaN or infinity among the values to be drawn")
            rows += panel_rows(label, values[steps, None], "", size=rows[0].images.shape[1:3], cross=cross)
        sheets[name] = sheet([about, what, times, *rows], title)
    return sheets
