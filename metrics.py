"""What a forecast is worth: scores of predicted frames, the table at the end of a run, curves as SVG, pictures as PNG.

Frames are tensors (B, T, C, H, W) with values in [0, 1], scored where they lie (CPU or CUDA) in float64.

    scores = frame_scores(pred, truth, mask)        # {"mse": (B, T), "mae": …, "psnr": …, "ssim": …, …}
    summary = summarize(scores)                     # {"mse": {"mean": 61.2, "frames": [40.1, …], …}, …}, fit for JSON
    counts = event_counts(pred_mm, truth_mm, (0.5, 2, 5), mask)     # hits, misses, …: add them up over the batches
    summary |= csi_hss(counts, (0.5, 2, 5))         # {"csi_0.5": {"mean": …, "frames": […]}, …}
    sums = unit_errors(pred_mm, truth_mm, mask)     # likewise
    summary |= unit_summary(sums)                   # {"rmse": {"mean": …, "frames": […]}, …}
    print(table({"forecast": summary, …}))
    svg = curve_panels_svg(score_panels({"ConvLSTM": summary}))

One rule for what has no data (mask False): it has no score, and means are over what has. Nothing here waits for the
device before a summary is made: what only values tell, such as NaN or a truth beyond [0, 1], travels with the scores.
"""

import math
import struct
import textwrap
import zlib
from html import escape
from typing import NamedTuple

import numpy as np
import torch

RAIN_THRESHOLDS = (0.5, 2, 5)  # mm/h
NAMES = {  # metric -> its name in a table, its name and unit on an axis
    "mse": ("MSE", "MSE (sum over a frame)"),
    "mae": ("MAE", "MAE (sum over a frame)"),
    "psnr": ("PSNR", "PSNR (dB)"),
    "ssim": ("SSIM", "SSIM (1 = identical)"),
    "psnr_float": ("PSNR*", "PSNR on floats (dB)"),
    "ssim_gaussian": ("SSIM*", "SSIM, Gaussian window (1 = identical)"),
}


def name_of(metric, unit=None):
    """The name of a metric in a table, and its name with its unit on an axis. unit: the data's, None for none."""
    kind, _, rest = metric.partition("_")
    if kind in ("csi", "hss"):
        return f"{kind.upper()} {rest}", f"{kind.upper()} at {rest} {unit or ''}".strip()
    if kind == "rmse" or metric.startswith("mae_units"):
        name = kind.upper() + metric.removeprefix("mae_units").removeprefix("rmse").replace("_", " ")
        return (f"{name}, {unit}", f"{name} ({unit})") if unit else (name, name)
    return NAMES[metric]


# ---- Scores of frames ------------------------------------------------------------------------------------------------

def _check(pred, truth, mask, floating):
    """ValueError for what is wrong whatever the values are; these are never looked at."""
    for what, x in (("predictions", pred), ("truth", truth)):
        if not torch.is_tensor(x) or x.ndim != 5 or 0 in x.shape:
            raise ValueError(f"{what}: a tensor (B, T, C, H, W) with no side of 0 is needed, not "
                             f"{tuple(x.shape) if hasattr(x, 'shape') else type(x).__name__}")
        if x.dtype in (torch.bool, torch.complex64, torch.complex128) or floating and not x.is_floating_point():
            raise ValueError(f"{what} of dtype {x.dtype}: " + (
                "floats in [0, 1] are needed; 8-bit levels are divided by 255" if floating else "numbers are needed"))
    if pred.shape != truth.shape:
        raise ValueError(f"predictions {tuple(pred.shape)} and truth {tuple(truth.shape)} differ in shape")
    if mask is not None and not (torch.is_tensor(mask) and mask.dtype == torch.bool and mask.shape == truth.shape):
        raise ValueError(f"mask: a bool tensor of the shape of the truth, {tuple(truth.shape)}, is needed")
    if len({x.device for x in (pred, truth, mask) if x is not None}) > 1:
        raise ValueError("predictions, truth and mask lie on different devices")


@torch.no_grad()
def frame_scores(pred, truth, mask=None):
    """Score every predicted frame.

    pred, truth: (B, T, C, H, W), any floating dtype, one device. truth: in [0, 1], to rounding. pred: may overshoot,
    as a network's output does; it is clipped to [0, 1].
    mask: None or bool of the same shape, True where a pixel counts. What does not count is set to 0 in both, so it adds
    no error; SSIM leaves out the positions whose window has no data.

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
    valid = ((truth >= -1e-6) & (truth <= 1 + 1e-6)).flatten(1).all(1)      # False for NaN, too
    count = torch.full_like(valid, truth[0].numel(), dtype=torch.float64) if mask is None else \
        mask.flatten(1).sum(1).double()
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
    _check(pred, truth, mask, floating=False)
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
    summary = {}
    for threshold, rows in zip(thresholds, counts.tolist()):
        frames = {"csi": [], "hss": []}
        for hits, misses, alarms, negatives, nans in rows:  # whole numbers in Python: nothing overflows
            events = hits + misses + alarms
            chance = (hits + misses) * (misses + negatives) + (hits + alarms) * (alarms + negatives)
            frames["csi"].append(math.nan if nans else hits / events if events else None)
            frames["hss"].append(
                math.nan if nans else 2 * (hits * negatives - misses * alarms) / chance if chance else None)
        for score, values in frames.items():
            defined = [v for v in values if v is not None]
            summary[f"{score}_{threshold:.12g}"] = {
                "mean": _mean(defined), "frames": [None if v != v else v for v in values],
                "undefined": len(values) - len(defined)}
    return summary


@torch.no_grad()
def unit_errors(pred, truth, mask=None):
    """Errors in the data's unit: float64 (T, C, 3) on their device, Σ error², Σ |error| and the pixels that count.

    pred, truth: (B, T, C, H, W), any numbers, in one unit; mask: None or bool, True where a pixel counts. Add up those
    of all batches and processes, then unit_summary. Raises ValueError as frame_scores does.
    """
    _check(pred, truth, mask, floating=False)
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
    def entries(suffix, sums):  # (T, 3)
        rows = [*sums.tolist(), sums.sum(0).tolist()]
        values = [[power(row[k] / row[2]) if row[2] and math.isfinite(row[k]) else None for row in rows]
                  for k, power in ((0, math.sqrt), (1, float))]
        return {name + suffix: {"mean": mean, "frames": frames}
                for name, (*frames, mean) in zip(("rmse", "mae_units"), values)}

    if sums.ndim != 3 or sums.shape[2] != 3:
        raise ValueError(f"sums {tuple(sums.shape)} are not (T, C, 3)")
    sums, summary = sums.double().cpu(), entries("", sums.double().cpu().sum(1))
    for c in range(sums.shape[1] if sums.shape[1] > 1 else 0):
        summary |= entries(f"_{c + 1}", sums[:, c])
    return summary


# ---- The table -------------------------------------------------------------------------------------------------------

def table(results, published=(), metrics=("mse", "mae", "psnr", "ssim")):
    """The text table at the end of a run, at most 100 columns wide.

    results: summaries (of summarize, with csi_hss merged in for rain) under "forecast" and, where there are any,
    "all_predictions", "repeat_last" and "black". Forecast and repeated last frame stand side by side, frame by frame,
    with their means; below them the means of the others, and of `published`: dicts with "source" and some metrics.
    metrics: what the first block shows, four at most; CSI and HSS follow in blocks of their own where there are any.
    """
    forecast = results["forecast"]
    blocks = [[m for m in metrics if m in forecast]]
    blocks += [[m for m in forecast if m.startswith(score)] for score in ("csi_", "hss_")]
    text = "\n\n".join(_block(results, published, block) for block in blocks if block)
    exact = {name: summary["psnr"]["exact"] for name, summary in results.items() if "psnr" in summary}
    if "psnr" in metrics and any(exact.values()):
        counts = ", ".join(f"{n} ({name.replace('_', ' ')})" for name, n in exact.items() if n)
        text += f"\nPSNR leaves out exact frames: {counts}"
    if {"psnr_float", "ssim_gaussian"} & set(metrics):
        text += "\n* on floats, SSIM with a Gaussian window: as MS-LSTM scores"
    return text


def _block(results, published, metrics):
    """One block of the table: these metrics of the forecast on the left, of the repeated last frame on the right."""
    forecast, repeat = results["forecast"], results.get("repeat_last")
    sides = [forecast, repeat] if repeat else [forecast]
    digits = {m: 2 if max(side[m]["mean"] or 0 for side in sides) >= 10 else 4 for m in metrics}

    def cells(summaries, pick=lambda entry: entry["mean"]):
        values = [(pick(summary[m]), digits[m]) for summary in summaries for m in metrics]
        return ["–" if value is None else f"{value:.{places}f}" for value, places in values]

    rows = [["frame"] + [name_of(m)[0] for m in metrics] * len(sides)]
    for k in range(len(forecast[metrics[0]]["frames"])):
        rows.append([str(k + 1)] + cells(sides, lambda entry: entry["frames"][k]))
    rule = len(rows)
    rows.append(["mean"] + cells(sides))
    for name in ("all_predictions", "black"):
        if metrics[0] in results.get(name, {}):
            count = len(results[name][metrics[0]]["frames"])
            rows.append([name if name == "black" else f"all {count} predictions"] + cells([results[name]]))
    for paper in published:
        if any(paper.get(m) is not None for m in metrics):  # digits as the paper prints them
            source = textwrap.shorten(paper["source"], 32, placeholder=" …")
            rows.append([source] + ["–" if paper.get(m) is None else f"{paper[m]:g}" for m in metrics])

    widths = [2 * (k > 0) + max(len(row[k]) for row in rows if k < len(row)) for k in range(len(rows[0]))]
    bar = 1 + len(metrics)  # the first column of the right side

    def line(row):
        text = row[0].ljust(widths[0])
        return text + "".join(("  |" if k == bar else "") + row[k].rjust(widths[k]) for k in range(1, len(row)))

    lines = [line(row) for row in rows]
    title = "forecast".rjust(sum(widths[:bar]))
    if repeat:
        title += "  |" + "repeated last frame".rjust(sum(widths[bar:]))
    dashes = "-" * len(lines[0])
    return "\n".join([title, lines[0], dashes, *lines[1:rule], dashes, *lines[rule:]])


# ---- Curves ----------------------------------------------------------------------------------------------------------

# Okabe and Ito's colours for every kind of colour vision, without the yellow that white paper swallows. Dashes and
# markers change along with them, so that curves can be told apart in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#000000", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("none", "7 3", "2 2", "9 3 2 3", "4 4")
MARKERS = ("M-3,0a3,3 0 1,0 6,0a3,3 0 1,0 -6,0z", "M-3,-3h6v6h-6z", "M0,-4l4,7h-8z", "M0,-4l4,4l-4,4l-4,-4z")
PANEL = (400, 260)  # width and height of a panel with its labels
PLOT = (64, 34, 384, 214)  # left, top, right, bottom of its axes


def score_panels(summaries, metrics=("mse", "mae", "psnr", "ssim"), xlabel="forecast frame", unit=None):
    """Panels for curve_panels_svg, one a metric: frame-wise scores of several runs, {label: summary}."""
    panels = []
    for metric in metrics:
        curves = {label: summary[metric]["frames"] for label, summary in summaries.items() if metric in summary}
        name, ylabel = name_of(metric, unit)
        panels.append({"curves": curves, "title": name, "xlabel": xlabel, "ylabel": ylabel})
    return panels


def curve_panels_svg(panels, title="", columns=2):
    """Panels of curves with axes, ticks and one legend, as the text of a self-contained SVG file.

    panels: dicts with "title", "xlabel", "ylabel" (with the unit), "log" (a logarithmic y axis; default False) and
    "curves": {label: [y at x = 1, 2, …]} or {label: ([x, …], [y, …])}. A label looks the same in every panel. None is a
    gap in a curve. title: a line above all panels; say model, variant, data and iteration there.
    Every unbroken piece of a curve is a <polyline> with its label and its numbers in full as data-label, data-x and
    data-values. ValueError for NaN, infinity, or a value that a logarithmic axis cannot show.
    """
    labels = list(dict.fromkeys(label for panel in panels for label in panel["curves"]))
    styles = {label: (COLOURS[k % len(COLOURS)], DASHES[k % len(DASHES)], MARKERS[k % len(MARKERS)])
              for k, label in enumerate(labels)}
    columns = min(columns, len(panels))
    width, top = PANEL[0] * columns, 30 if title else 0
    body = [_panel(panel, styles, (k % columns) * PANEL[0], top + k // columns * PANEL[1])
            for k, panel in enumerate(panels)]

    x, y = 20, top + math.ceil(len(panels) / columns) * PANEL[1] + 14
    for label in labels:
        needed = 60 + 6.5 * len(label)  # 11-pixel letters are about that wide
        if x > 20 and x + needed > width:
            x, y = 20, y + 18
        colour, dash, marker = styles[label]
        body.append(f'<path d="M{x},{y}h34" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}"/>'
                    f'<path d="{marker}" transform="translate({x + 17},{y})" fill="{colour}"/>'
                    + _text(x + 40, y + 4, label, "start"))
        x += needed
    if title:
        body.append(_text(width / 2, 20, title, size=14))
    height = y + 16
    return (f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
            f'viewBox="0 0 {width} {height}" font-family="sans-serif" font-size="11">\n'
            f'<rect width="{width}" height="{height}" fill="white"/>\n' + "\n".join(body) + "\n</svg>\n")


def _panel(panel, styles, x0, y0):
    """One panel as an SVG group whose upper left corner is at (x0, y0)."""
    log = panel.get("log", False)
    pieces = [(label, piece) for label, curve in panel["curves"].items() for piece in _pieces(curve, panel, log)]
    left, top, right, bottom = PLOT
    x_ticks, x_of = _axis([x for _, piece in pieces for x, _ in piece], left, right, False)
    y_ticks, y_of = _axis([y for _, piece in pieces for _, y in piece], bottom, top, log)

    out = [f'<g transform="translate({x0},{y0})">',
           _text((left + right) / 2, top - 12, panel["title"], size=13),
           _text((left + right) / 2, bottom + 34, panel["xlabel"]),
           _text(14, (top + bottom) / 2, panel["ylabel"], turn=-90)]
    for tick in y_ticks:
        out.append(f'<path d="M{left},{y_of(tick):.2f}H{right}" stroke="#ddd"/>'
                   + _text(left - 6, y_of(tick) + 4, f"{tick:g}", "end"))
    for tick in x_ticks:
        out.append(f'<path d="M{x_of(tick):.2f},{bottom}v4" stroke="black"/>'
                   + _text(x_of(tick), bottom + 17, f"{tick:g}"))
    out.append(f'<path d="M{left},{top}V{bottom}H{right}" fill="none" stroke="black"/>')
    for label, piece in pieces:
        colour, dash, marker = styles[label]
        points = [f"{x_of(x):.2f},{y_of(y):.2f}" for x, y in piece]
        xs, ys = zip(*piece)
        out.append(f'<polyline fill="none" stroke="{colour}" stroke-width="1.8" stroke-dasharray="{dash}" '
                   f'points="{" ".join(points)}" data-label="{escape(label)}" '
                   f'data-x="{" ".join(repr(float(x)) for x in xs)}" '
                   f'data-values="{" ".join(repr(float(y)) for y in ys)}"/>')
        out += [f'<path d="{marker}" transform="translate({point})" fill="{colour}"/>'
                for point in points[::math.ceil(len(points) / 20)]]
    if not pieces:
        out.append(_text((left + right) / 2, (top + bottom) / 2, "no values"))
    return "\n".join(out) + "\n</g>"


def _pieces(curve, panel, log):
    """The unbroken pieces of a curve: lists of (x, y)."""
    xs, ys = curve if isinstance(curve, tuple) else (range(1, len(curve) + 1), curve)
    pieces = [[]]
    for x, y in zip(xs, ys, strict=True):
        if y is None:
            pieces.append([])
            continue
        if not (math.isfinite(x) and math.isfinite(y)) or log and y <= 0:
            raise ValueError(f"{panel['title']}: a curve cannot show {y} at {x}" + " on a logarithmic axis" * log)
        pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _axis(values, start, end, log):
    """Ticks of an axis that holds the values, and the map from a value to its place between start and end (pixels)."""
    low, high = (min(values), max(values)) if values else (1, 10)
    scale = math.log10 if log else float
    a, b = scale(low), scale(high)
    margin = 0.05 * (b - a) or 0.05 * abs(b) or 0.5
    a, b = a - margin, b + margin
    if log and b - a > 1:
        stride = math.ceil((b - a) / 6)
        mantissas = (1,) if b - a > 3 else (1, 2, 5)
        ticks = [m * 10.0**e for e in range(math.floor(a), math.ceil(b), stride) for m in mantissas]
    else:  # a logarithmic axis of less than a decade is nearly linear
        lowest, highest = (10**a, 10**b) if log else (a, b)
        power = 10 ** math.floor(math.log10((highest - lowest) / 4))
        step = next(m * power for m in (1, 2, 5, 10) if (highest - lowest) / (m * power) <= 6)
        if all(isinstance(v, int) for v in values):
            step = max(1, round(step))
        ticks = [k * step for k in range(math.ceil(lowest / step), math.floor(highest / step) + 1)]
    ticks = [t for t in ticks if a <= scale(t) <= b]
    return ticks, lambda value: start + (scale(value) - a) / (b - a) * (end - start)


def _text(x, y, text, anchor="middle", size=11, turn=0):
    rotate = f' transform="rotate({turn} {x:.2f} {y:.2f})"' if turn else ""
    return f'<text x="{x:.2f}" y="{y:.2f}" text-anchor="{anchor}" font-size="{size}"{rotate}>{escape(text)}</text>'


# ---- Pictures --------------------------------------------------------------------------------------------------------

def _chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png_header(image):
    """The signature and IHDR of a uint8 image (H, W), grey, or (H, W, 3), RGB."""
    height, width = image.shape[:2]
    colour = 0 if image.ndim == 2 else 2
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0))


def _png_pixels(image):
    """The compressed rows of an image, each behind a zero: "no filter"."""
    rows = np.ascontiguousarray(image).reshape(len(image), -1)
    return zlib.compress(np.pad(rows, ((0, 0), (1, 0))).tobytes(), 6)


def png_bytes(image):
    """A PNG file of a uint8 image (H, W), grey, or (H, W, 3), RGB."""
    return _png_header(image) + _chunk(b"IDAT", _png_pixels(image)) + _chunk(b"IEND", b"")


def apng_bytes(images, delay_ms=200):
    """An animated PNG that loops for ever, from uint8 images (T, H, W), grey, or (T, H, W, 3), RGB."""
    height, width = images[0].shape[:2]
    content, number = _png_header(images[0]) + _chunk(b"acTL", struct.pack(">II", len(images), 0)), 0
    for t, image in enumerate(images):
        content += _chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, 0, 0, delay_ms, 1000, 0, 0))
        number += 1
        if t == 0:
            content += _chunk(b"IDAT", _png_pixels(image))
        else:
            content += _chunk(b"fdAT", struct.pack(">I", number) + _png_pixels(image))
            number += 1
    return content + _chunk(b"IEND", b"")


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
), np.uint8).reshape(95, 5, 1), axis=2, bitorder="little")[:, :, :7].swapaxes(1, 2).astype(bool)  # (95, 7, 5)


def text_size(text, scale=1):
    """(height, width) in pixels of a line of text as `draw_text` draws it."""
    return 7 * scale, max(6 * len(text) - 1, 0) * scale


def draw_text(canvas, y, x, text, colour=0, scale=1):
    """Write a line of ASCII text into a uint8 canvas (H, W) or (H, W, 3), its upper left corner at (y, x).

    colour: a level, or three of them. What does not fit is cut off; other characters come out as "?".
    """
    for character in text:
        index = ord(character) - 32
        dots = FONT[index if 0 <= index < 95 else ord("?") - 32].repeat(scale, 0).repeat(scale, 1)
        place = canvas[max(y, 0):max(y + 7 * scale, 0), max(x, 0):max(x + 5 * scale, 0)]
        dots = dots[max(-y, 0):, max(-x, 0):][:place.shape[0], :place.shape[1]]
        place[dots] = colour
        x += 6 * scale


def levels(frames):
    """Frames in [0, 1] as uint8 levels for a picture; clipped, NaN as 0."""
    frames = torch.as_tensor(frames).detach().float().cpu().nan_to_num(0.0)
    return (frames.clamp(0, 1) * 255).round().to(torch.uint8).numpy()


def resize(images, smallest=64, largest=256):
    """Images (..., H, W) magnified by a whole number until their shorter side has `smallest` pixels, or thinned out
    until the longer side has at most `largest`."""
    height, width = images.shape[-2:]
    step = -(-max(height, width) // largest)
    images = images[..., ::step, ::step]
    times = max(1, smallest // min(images.shape[-2:])) if step == 1 else 1
    return images.repeat(times, -2).repeat(times, -1)


def fit(images, size):
    """Images (..., H, W) as (..., *size), every pixel that of the place it comes from: nothing is smoothed."""
    rows, columns = (np.arange(new) * old // new for new, old in zip(size, images.shape[-2:]))
    return images[..., rows[:, None], columns]


def _palette():
    """256 colours from black through red to yellow: uint8 (256, 3).

    A curve in Oklab (Ottosson 2020) of evenly rising lightness: equal steps look equal, also in grey print and to the
    colour-blind.
    """
    t = np.linspace(0, 1, 256)[:, None]
    lab = ((1 - t)**2 * [0.12, 0.03, -0.08] + 2 * t * (1 - t) * [0.535, 0.23, 0.03] + t**2 * [0.95, -0.02, 0.125])
    cones = lab @ [[1, 1, 1], [0.3963377774, -0.1055613458, -0.0894841775],
                   [0.2158037573, -0.0638541728, -1.291485548]]
    linear = cones**3 @ [[4.0767416621, -1.2684380046, -0.0041960863], [-3.3077115913, 2.6097574011, -0.7034186147],
                         [0.2309699292, -0.3413193965, 1.7076147010]]
    linear = linear.clip(0, 1)
    srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear**(1 / 2.4) - 0.055)
    return np.rint(255 * srgb).astype(np.uint8)


PALETTE = _palette()
NO_DATA = (150, 160, 170)                                         # a grey that no palette has
RAIN_CLASSES = (0.1, 0.5, 1, 2, 5, 10)                            # mm/h, the lower bounds of all classes but the first
RAIN_COLOURS = np.concatenate([[[255, 255, 255]], PALETTE[::-1][np.linspace(8, 255, 6).astype(int)]]).astype(np.uint8)
RAIN_LEGEND = [(NO_DATA, "no data")] + list(zip(RAIN_COLOURS.tolist(), ["< 0.1 mm/h"] + [
    f"{low:g} - {high:g}" for low, high in zip(RAIN_CLASSES, RAIN_CLASSES[1:])] + [f">= {RAIN_CLASSES[-1]:g} mm/h"]))


def heat(values, low, high):
    """Values (...) in colours of PALETTE, uint8 (..., 3): `low` and less the darkest, `high` and more the lightest.

    Raises ValueError for NaN and infinity, which no colour stands for.
    """
    values = torch.as_tensor(values).detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        raise ValueError("NaN or infinity among the values to be drawn")
    share = (values - low) / (high - low) if high > low else np.zeros_like(values)
    return PALETTE[np.rint(share.clip(0, 1) * 255).astype(int)]


def draw_cross(images, y, x, reach=4):
    """Mark a pixel of uint8 images (..., H, W, 3) with a white "+" edged in black, its centre left open."""
    height, width = images.shape[-3:-1]
    for thick, colour in ((1, 0), (0, 255)):
        for arm in (*range(-reach - thick, 0), *range(1, reach + thick + 1)):
            for side in range(-thick, thick + 1):
                for dy, dx in ((arm, side), (side, arm)):
                    if (dy or dx) and 0 <= y + dy < height and 0 <= x + dx < width:
                        images[..., y + dy, x + dx, :] = colour


class Row(NamedTuple):
    """A row of a sheet: panels of one size."""

    label: str
    images: np.ndarray          # uint8 (n, h, w), grey, or (n, h, w, 3), RGB
    scale: tuple = None         # (low, high) of the palette, drawn to the right of the row
    notes: dict = {}            # {number of a panel: a word written across it}


def _constant(values):
    """The notes of panels (n, h, w) that show nothing: all of one value, but for rounding."""
    spread = values.max((1, 2)) - values.min((1, 2))
    return {k: "constant" for k in np.flatnonzero(spread <= 1e-6 * np.abs(values).max((1, 2)))}


def heat_row(label, values, size):
    """Maps (n, h, w) of any values as a row of panels of `size`, in one scale from their least to their greatest value.

    A constant panel is noted as such. Raises ValueError for NaN and infinity.
    """
    values = torch.as_tensor(values).detach().cpu().double().numpy()
    scale = values.min().item(), values.max().item()
    return Row(label, heat(fit(values, size), *scale), scale, _constant(values))


def film_rows(label, frames, unit=None, scale=None, shown=None):
    """Frames (T, C, H, W) as rows of panels, one a channel, numbered where there are several.

    unit: None, for grey frames in [0, 1]; "mm/h", for rain, in classes; any other, for a heat map of values in it with
    its scale (low, high). shown: bool of the shape of frames, False where there are no data, or None.
    A constant panel is noted as such.
    """
    values = torch.as_tensor(frames).detach().float().cpu()
    notes = [_constant(channel) for channel in values.nan_to_num(0).numpy().swapaxes(0, 1)]
    values = resize(values.numpy())
    if unit is None:
        images = levels(values)
    elif unit == "mm/h":
        images = RAIN_COLOURS[np.searchsorted(np.float32(RAIN_CLASSES), values, side="right")]
    else:
        images = heat(values, *scale)
    if unit is not None and shown is not None:
        images[~resize(torch.as_tensor(shown).cpu().numpy())] = NO_DATA
    names = [label] if len(notes) == 1 else [f"{label} {c + 1}/{len(notes)}" for c in range(len(notes))]
    bar = None if unit in (None, "mm/h") else scale
    return [Row(name, images[:, c], bar, notes[c]) for c, name in enumerate(names)]


def sheet(rows, title="", legend=(), gap=2):
    """Rows of panels below each other on white: a uint8 image (H, W) where all panels are grey, else (H, W, 3).

    rows: of three kinds: a text, which gets a line of its own; a list of texts, each above a column; a `Row`, its label
    to the left. All panels have one width. legend: (colour, text) pairs for the foot of the sheet.
    """
    panels = [row for row in rows if isinstance(row, Row)]
    width = panels[0].images.shape[2]
    left = max(text_size(row.label)[1] for row in panels) + 3 * gap
    right = left + max(len(row.images) for row in panels) * (width + gap)
    across = max(right, *(text_size(text)[1] + 2 * gap for text in (title, *rows) if isinstance(text, str)))
    bars = [row for row in panels if row.scale]
    ends = {id(row): [f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}" for value in row.scale] for row in bars}
    if bars:
        across = max(across, right + 5 * gap + 8 + max(text_size(end)[1] for both in ends.values() for end in both))
    across = max(across, sum(text_size(text)[1] + 22 for _, text in legend) + 2 * gap)
    line = 7 + 3 * gap
    heights = [row.images.shape[1] + gap if isinstance(row, Row) else line for row in rows]
    top = line + gap if title else gap
    down = top + sum(heights) + (line + 3 * gap if legend else 0)
    grey = not legend and not bars and all(row.images.ndim == 3 for row in panels)
    canvas = np.full((down, across) if grey else (down, across, 3), 255, np.uint8)

    draw_text(canvas, 2 * gap, gap, title)
    y = top
    for row, height in zip(rows, heights):
        if isinstance(row, str):
            draw_text(canvas, y + gap, gap, row)
        elif isinstance(row, list):
            for column, text in enumerate(row):
                draw_text(canvas, y + gap, left + column * (width + gap) + (width - text_size(text)[1]) // 2, text)
        else:
            high = height - gap
            draw_text(canvas, y + (high - 7) // 2, gap, row.label)
            for k, image in enumerate(row.images):
                x = left + k * (width + gap)
                canvas[y:y + high, x:x + width] = image if grey or image.ndim == 3 else image[..., None]
                if note := row.notes.get(k):
                    tall, wide = text_size(note)
                    ny, nx = y + (high - tall) // 2, x + (width - wide) // 2
                    canvas[ny - 2:ny + tall + 2, max(nx - 2, x):min(nx + wide + 2, x + width)] = 255
                    draw_text(canvas, ny, nx, note)
            if row.scale:
                x = right + 2 * gap
                canvas[y:y + high, x:x + 8] = PALETTE[np.linspace(255, 0, high).round().astype(int)][:, None]
                draw_text(canvas, y + gap, x + 8 + gap, ends[id(row)][1])
                draw_text(canvas, y + high - 7 - gap, x + 8 + gap, ends[id(row)][0])
        y += height
    x = gap
    for colour, text in legend:
        canvas[y + gap:y + gap + 11, x:x + 11] = 0
        canvas[y + gap + 1:y + gap + 10, x + 1:x + 10] = colour
        draw_text(canvas, y + gap + 2, x + 14, text)
        x += text_size(text)[1] + 22
    return canvas


def film_strip(rows, title=""):
    """Films below each other, a label to the left of each: a uint8 image (H, W), black on white.

    rows: a list of (label, frames), frames (T, C, H, W) in [0, 1], all of one frame size. Every channel gets a row of
    its own, numbered where there are several.
    """
    return sheet([row for label, frames in rows for row in film_rows(label, frames)], title)
