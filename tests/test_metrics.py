"""metrics.py against slow literal versions, values worked out by hand and values of scikit-image."""

import json
import math
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
import torch

import metrics

SVG = "{http://www.w3.org/2000/svg}"
PIXEL_METRICS = ("mse", "mae", "psnr", "ssim")
RAIN = (0.5, 2, 5)


def clips(*shape, noise=0.2):
    truth = torch.rand(shape)
    return truth + noise * torch.randn(shape), truth


def frames(*values):
    """Frames of one number per pixel as (1, T, 1, H, W)."""
    return torch.tensor(values)[None, :, None]


# ---- Scores of frames, literally -------------------------------------------------------------------------------------

def slow_ssim(x, y, window, top, sample):
    """SSIM of two (H, W) arrays, position by position. window: (k, k) weights that add up to one."""
    k, (height, width) = len(window), x.shape
    correction = k * k / (k * k - 1) if sample else 1
    values = []
    for i in range(height - k + 1):
        for j in range(width - k + 1):
            a, b = x[i:i + k, j:j + k], y[i:i + k, j:j + k]
            mean_a, mean_b = (window * a).sum(), (window * b).sum()
            var_a = correction * (window * (a - mean_a) ** 2).sum()
            var_b = correction * (window * (b - mean_b) ** 2).sum()
            cov = correction * (window * (a - mean_a) * (b - mean_b)).sum()
            c1, c2 = (0.01 * top) ** 2, (0.03 * top) ** 2
            values.append((2 * mean_a * mean_b + c1) * (2 * cov + c2)
                          / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2)))
    return np.mean(values)


def slow_scores(pred, truth):
    """All scores of one (C, H, W) frame, one pixel after the other."""
    squares = absolutes = squares8 = 0.0
    pred8, truth8 = np.zeros(pred.shape), np.zeros(pred.shape)
    clipped = np.zeros(pred.shape)
    for at in np.ndindex(*pred.shape):
        clipped[at] = min(max(pred[at], np.float32(0)), np.float32(1))
        pred8[at] = np.uint8(np.float32(clipped[at]) * np.float32(255))
        truth8[at] = np.uint8(truth[at] * np.float32(255))
        squares += (clipped[at] - float(truth[at])) ** 2
        absolutes += abs(clipped[at] - float(truth[at]))
        squares8 += (pred8[at] - truth8[at]) ** 2
    gauss = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    gauss, uniform = gauss / gauss.sum(), np.full((7, 7), 1 / 49)
    channels = range(len(pred))
    return {
        "mse": squares,
        "mae": absolutes,
        "psnr": 20 * math.log10(255) - 10 * math.log10(squares8 / pred.size),
        "ssim": np.mean([slow_ssim(pred8[c], truth8[c], uniform, 255, True) for c in channels]),
        "psnr_float": 10 * math.log10(1 / (squares / pred.size + 1e-5)),
        "ssim_gaussian": np.mean([slow_ssim(clipped[c], truth[c].astype(np.float64), gauss, 1, False)
                                  for c in channels]),
    }


@pytest.mark.parametrize("channels, height, width", [(1, 16, 16), (2, 13, 18)])
def test_frame_scores_against_literal_versions(channels, height, width):
    pred, truth = clips(2, 2, channels, height, width)
    truth[0, 0] *= truth[0, 0] > 0.7  # mostly black, as digits are
    assert (pred < 0).any() and (pred > 1).any()  # clipping matters
    scores = metrics.frame_scores(pred, truth)
    assert list(scores) == ["mse", "mae", "psnr", "ssim", "psnr_float", "ssim_gaussian", "pixels"]
    for b, t in np.ndindex(2, 2):
        for name, value in slow_scores(pred[b, t].numpy(), truth[b, t].numpy()).items():
            assert scores[name][b, t].item() == pytest.approx(value, rel=1e-11), name


# skimage.metrics.structural_similarity and peak_signal_noise_ratio (scikit-image 0.26) of the 8-bit images below;
# the Gaussian one with gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1 of them over 255.
SKIMAGE = [
    (7, 7, 0.971535678221077, 21.860072541898038, math.nan),
    (12, 10, 0.7594731400805435, 14.03540308230793, math.nan),
    (16, 20, 0.6416296042955644, 12.888291088974725, 0.5769260570605191),
    (64, 64, 0.6107532991940633, 11.871523484444008, 0.6103313807555822),
]


@pytest.mark.parametrize("height, width, ssim, psnr, ssim_gaussian", SKIMAGE)
def test_values_of_scikit_image(height, width, ssim, psnr, ssim_gaussian):
    i, j = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    truth = 7 * i * i + 13 * j + 3 * i * j
    pred = truth + (5 * i * j) % 41
    scores = metrics.frame_scores(*((x % 256).double()[None, None, None] / 255 for x in (pred, truth)))
    assert scores["ssim"].item() == pytest.approx(ssim, abs=1e-9)
    assert scores["ssim_gaussian"].item() == pytest.approx(ssim_gaussian, abs=1e-9, nan_ok=True)
    assert scores["psnr"].item() == pytest.approx(psnr, abs=1e-9)


def test_one_wrong_pixel():
    truth = torch.zeros(1, 1, 1, 8, 8)
    pred = truth.clone()
    pred[..., 0, 0] = 0.5
    scores = metrics.frame_scores(pred, truth)
    assert scores["mse"].item() == 0.25 and scores["mae"].item() == 0.5
    assert scores["psnr"].item() == pytest.approx(20 * math.log10(255) - 10 * math.log10(127**2 / 64), rel=1e-14)
    assert scores["psnr_float"].item() == pytest.approx(-10 * math.log10(0.25 / 64 + 1e-5), rel=1e-14)
    # Of the four 7×7 positions only the first sees the pixel: mean 127/49, variance 127²/49, truth and covariance 0.
    c1, c2 = 2.55**2, 7.65**2
    first = c1 * c2 / (((127 / 49) ** 2 + c1) * (127**2 / 49 + c2))
    assert scores["ssim"].item() == pytest.approx((first + 3) / 4, rel=1e-12)


def test_constant_frames():
    pred, truth = torch.full((1, 1, 1, 12, 12), 100 / 255), torch.full((1, 1, 1, 12, 12), 50 / 255)
    scores = metrics.frame_scores(pred, truth)
    c1 = 2.55**2
    assert scores["ssim"].item() == pytest.approx((2 * 100 * 50 + c1) / (100**2 + 50**2 + c1), rel=1e-12)
    assert scores["psnr"].item() == pytest.approx(20 * math.log10(255 / 50), rel=1e-14)


def test_eight_bit_values_are_truncated_and_survive_the_way_there_and_back():
    levels = torch.arange(256)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert torch.equal(metrics._to_8bit(levels.to(dtype) / 255), levels.double()), dtype
    assert metrics._to_8bit(torch.tensor([0.999, 1.3, -0.1])).tolist() == [254, 255, 0]


def test_predictions_are_clipped():
    truth = frames([[0.0, 1.0]])
    assert metrics.frame_scores(frames([[-3.0, 7.0]]), truth)["mse"].item() == 0
    assert metrics.frame_scores(frames([[math.inf, 7.0]]), truth)["mae"].item() == 1


def test_exact_frames_are_left_out_of_psnr_and_counted():
    pred, truth = clips(3, 2, 1, 12, 12)
    pred[1, 0] = truth[1, 0]
    pred[:, 1] = truth[:, 1]
    scores = metrics.frame_scores(pred, truth)
    assert scores["psnr"][1, 0] == math.inf
    assert scores["ssim"][1, 0] == 1 and scores["ssim_gaussian"][1, 0] == 1
    assert scores["psnr_float"][1, 0].item() == pytest.approx(50)  # 10·log10(1/1e-5)
    psnr = metrics.summarize(scores)["psnr"]
    mean = (scores["psnr"][0, 0] + scores["psnr"][2, 0]).item() / 2
    assert psnr == {"mean": pytest.approx(mean), "frames": [pytest.approx(mean), None], "exact": 4, "left_out": 0}


def test_frames_smaller_than_the_window_have_no_ssim():
    scores = metrics.frame_scores(*clips(1, 2, 1, 6, 20))
    assert scores["ssim"].isnan().all() and scores["ssim_gaussian"].isnan().all()
    assert scores["psnr"].isfinite().all()
    scores = metrics.frame_scores(*clips(1, 2, 1, 10, 20))
    assert scores["ssim"].isfinite().all() and scores["ssim_gaussian"].isnan().all()
    assert metrics.summarize(scores)["ssim_gaussian"] == {"mean": None, "frames": [None, None], "left_out": 0}


def test_what_shapes_and_dtypes_tell_is_refused_by_every_score():
    x = torch.rand(1, 2, 1, 8, 8)
    wrong = [(x, x[:, :1], None, r"predictions: .* not torch.float32 \(1, 2"), (x[0], x[0], None, "truth: a tensor"),
             (x, x.numpy(), None, "truth: .* not ndarray"), (x[:0], x[:0], None, r"truth: .* \(0, 2, 1, 8, 8\)"),
             (x, x > 0.5, None, "truth: .* not torch.bool"), (x + 0j, x, None, "predictions: .* not torch.complex64"),
             (x, x, torch.ones(1, 2, 1, 8, 8), "mask: .* of bools, .* not torch.float32"),
             (x, x, torch.ones(2, 1, 8, 8, dtype=torch.bool), r"mask: .* \(2, 1, 8, 8\)"),
             (x, x.to("meta"), None, "predictions: .* on the device of the truth, .* on cpu"),
             (x, x, (x > 0).to("meta"), "mask: .* on meta")]
    for pred, truth, mask, text in wrong:
        for score in (metrics.frame_scores, metrics.unit_errors,
                      lambda pred, truth, mask: metrics.event_counts(pred, truth, (1,), mask)):
            with pytest.raises(ValueError, match=text):
                score(pred, truth, mask)
    for levels in ((x * 255).to(torch.uint8), x.long()):
        with pytest.raises(ValueError, match=r"of floats in \[0, 1\] .* not torch"):
            metrics.frame_scores(levels, levels)


@pytest.mark.parametrize("fault", [math.nan, math.inf, 1.5, -0.25, 200.0])
def test_a_truth_outside_the_contract_has_no_score_and_is_said(fault):
    pred, truth = clips(3, 2, 1, 12, 12)
    truth[1, 1, 0, 2, 3] = fault
    scores = metrics.frame_scores(pred, truth)
    wrong = torch.zeros(3, 2, dtype=torch.bool)
    wrong[1, 1] = True
    assert all(scores[name].isnan().equal(wrong) for name in scores)
    with pytest.raises(ValueError, match=r"the truth of 1 of 6 frames holds NaN or values outside \[0, 1\]"):
        metrics.summarize(scores)
    mask = truth != fault if fault == fault else ~truth.isnan()
    assert metrics.summarize(metrics.frame_scores(pred, truth, mask))["mse"]["mean"] > 0


def test_frames_of_0_to_255_are_refused_and_right_once_divided():
    """10 against 200, which clipping to [0, 1] made perfect; scikit-image with data_range=255: 2.56 dB, .0999."""
    pred, truth = torch.full((1, 1, 1, 12, 12), 10.0), torch.full((1, 1, 1, 12, 12), 200.0)
    with pytest.raises(ValueError, match="outside"):
        metrics.summarize(metrics.frame_scores(pred, truth))
    scores = metrics.frame_scores(pred / 255, truth / 255)
    assert scores["psnr"].item() == pytest.approx(2.556, abs=5e-4)
    assert scores["ssim"].item() == pytest.approx(0.0999, abs=5e-5)


def test_rounding_beyond_one_is_none_of_it():
    truth = torch.full((1, 1, 1, 8, 8), 1 + 1e-7)
    assert metrics.summarize(metrics.frame_scores(truth, truth))["mse"]["mean"] == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_scores_are_float64_whatever_comes_in(dtype):
    pred, truth = (x.to(dtype) for x in clips(2, 3, 1, 16, 16))
    scores = metrics.frame_scores(pred, truth)
    assert all(values.dtype == torch.float64 and values.shape == (2, 3) for values in scores.values())
    error = pred.double().clamp(0, 1) - truth.double()  # no rounding beyond that of the input itself
    assert torch.allclose(scores["mse"], error.square().sum((2, 3, 4)), rtol=1e-14, atol=0)


# In the last shape one frame fills more than a chunk.
@pytest.mark.parametrize("shape", [(5, 3, 1, 16, 16), (40, 5, 2, 13, 21), (3, 1, 1, 182, 190)])
def test_batch_split_changes_no_bit(shape):
    pred, truth = clips(*shape)
    mask = torch.rand(pred.shape) > 0.3
    for masked in (False, True):
        def score(rows):
            return metrics.frame_scores(pred[rows], truth[rows], mask[rows] if masked else None)

        whole, parts = score(slice(None)), [score(slice(0, 1)), score(slice(1, None))]
        joined = {name: torch.cat([part[name] for part in parts]) for name in whole}
        assert all(torch.equal(whole[name], joined[name]) for name in whole)
        assert metrics.summarize(whole) == metrics.summarize(joined)


def test_a_mask_leaves_pixels_out():
    pred, truth = clips(2, 3, 2, 16, 16)
    mask = torch.rand(pred.shape) > 0.4
    scores = metrics.frame_scores(pred, truth, mask)
    error = (pred.double().clamp(0, 1) - truth.double()) * mask
    assert torch.allclose(scores["mse"], error.square().sum((2, 3, 4)), rtol=1e-13, atol=0)
    assert torch.allclose(scores["mae"], error.abs().sum((2, 3, 4)), rtol=1e-13, atol=0)
    error8 = ((pred.clamp(0, 1) * 255).floor() - (truth * 255).floor()).double() * mask
    mse8 = error8.square().sum((2, 3, 4)) / mask.sum((2, 3, 4))
    assert torch.allclose(scores["psnr"], 10 * torch.log10(255**2 / mse8), rtol=1e-13, atol=0)

    disturbed, elsewhere = torch.where(mask, pred, math.nan), torch.where(mask, truth, torch.rand(truth.shape))
    again = metrics.frame_scores(disturbed, elsewhere, mask)
    assert all(torch.equal(scores[name], again[name]) for name in scores)
    everything = metrics.frame_scores(pred, truth, torch.ones_like(mask))
    assert all(torch.equal(everything[name], values) for name, values in metrics.frame_scores(pred, truth).items())


def test_ssim_under_a_mask_takes_the_windows_that_hold_data():
    pred, truth = clips(1, 1, 1, 16, 17)
    mask = torch.zeros_like(pred, dtype=torch.bool)
    mask[..., 3:9, 5:] = torch.rand(6, 12) > 0.5
    x, y = ((v * mask)[0, 0, 0].double().numpy() for v in (pred.clamp(0, 1), truth))
    gauss = np.array([[math.exp(-((i - 5) ** 2 + (j - 5) ** 2) / 4.5) for j in range(11)] for i in range(11)])
    scores = metrics.frame_scores(pred, truth, mask)
    for name, a, b, window, top, sample in (
            ("ssim", np.floor(255 * x), np.floor(255 * y), np.full((7, 7), 1 / 49), 255, True),
            ("ssim_gaussian", x, y, gauss / gauss.sum(), 1, False)):
        k, values = len(window), []
        for i, j in np.ndindex(17 - k, 18 - k):
            if mask[0, 0, 0, i:i + k, j:j + k].any():
                values.append(slow_ssim(a[i:i + k, j:j + k], b[i:i + k, j:j + k], window, top, sample))
        assert len(values) < (17 - k) * (18 - k) or name == "ssim_gaussian"
        assert scores[name].item() == pytest.approx(np.mean(values), rel=1e-10)


def test_frames_without_data_have_no_score():
    """With half the sequences masked the scores stay those of the others; as exact frames they halved MSE."""
    pred, truth = torch.rand(4, 3, 1, 16, 16), torch.rand(4, 3, 1, 16, 16)
    mask = torch.ones_like(truth, dtype=torch.bool)
    mask[::2] = False
    mask[1, 2] = False
    truth[~mask] = math.nan
    scores = metrics.frame_scores(pred, truth, mask)
    shown = (1, 0), (1, 1), (3, 0), (3, 1), (3, 2)
    literal = [slow_scores(pred[at].numpy(), truth[at].numpy()) for at in shown]
    summary = metrics.summarize(scores)
    assert set(summary) == set(literal[0])
    for name, entry in summary.items():
        values = [frame[name] for frame in literal]
        assert scores[name].isnan().sum() == 7 == entry["left_out"]
        assert entry["mean"] == pytest.approx(np.mean(values), rel=1e-10)
        means = [np.mean(values[0:3:2]), np.mean(values[1:4:2]), values[4]]
        assert entry["frames"] == pytest.approx(means, rel=1e-10)
    empty = metrics.summarize(metrics.frame_scores(pred, truth, torch.zeros_like(mask)))
    assert all(entry["mean"] is None and entry["left_out"] == 12 for entry in empty.values())
    assert empty["psnr"]["exact"] == 0


def test_nan_in_a_prediction_shows():
    pred, truth = clips(2, 2, 1, 12, 12)
    pred[0, 1, 0, 3, 3] = math.nan
    summary = metrics.summarize(metrics.frame_scores(pred, truth))
    for entry in summary.values():
        assert entry["mean"] is None and entry["frames"][1] is None and entry["frames"][0] is not None


def test_summary_by_hand_and_fit_for_json():
    scores = {"mse": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "psnr": torch.tensor([[10.0, math.inf], [20.0, 60.0]])}
    summary = metrics.summarize(scores)
    assert summary["mse"] == {"mean": 3.0, "frames": [2.0, 4.0], "left_out": 0}
    assert summary["psnr"] == {"mean": 30.0, "frames": [15.0, 60.0], "exact": 1, "left_out": 0}  # 30: of three
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives():
    pred, truth = clips(3, 4, 1, 64, 64)
    there = metrics.frame_scores(pred.cuda(), truth.cuda())
    for name, values in metrics.frame_scores(pred, truth).items():
        assert there[name].is_cuda and torch.allclose(there[name].cpu(), values, rtol=1e-12, atol=0), name


@pytest.mark.parametrize("mask", [False, True])
def test_nothing_is_asked_of_the_device_before_the_summary(mask):
    """The meta device has no values: whatever needs one raises."""
    x = torch.empty(2, 3, 2, 16, 16, device="meta")
    mask = (x > 0) if mask else None
    assert metrics.frame_scores(x, x, mask)["ssim"].shape == (2, 3)
    assert metrics.event_counts(x, x, (1, 2), mask).shape == (2, 3, 5)
    assert metrics.unit_errors(x, x, mask).shape == (3, 2, 3)


# ---- Scores in the data's unit ---------------------------------------------------------------------------------------

def test_event_counts_and_scores_by_hand():
    pred = frames([[0.5, 3.0], [0.4, 0.0]], [[0.0, 0.0], [0.0, 0.0]])
    truth = frames([[0.5, 0.1], [2.5, 0.0]], [[0.0, 0.0], [0.0, 9.0]])
    counts = metrics.event_counts(pred, truth, RAIN)  # hits, misses, false alarms, correct negatives, NaN
    assert counts.dtype == torch.int64
    assert counts.tolist() == [[[1, 1, 1, 1, 0], [0, 1, 0, 3, 0]],   # 0.5 mm/h: "at least", so 0.5 itself is an event
                               [[0, 1, 1, 2, 0], [0, 1, 0, 3, 0]],   # 2 mm/h
                               [[0, 0, 0, 4, 0], [0, 1, 0, 3, 0]]]   # 5 mm/h
    scores = metrics.csi_hss(counts, RAIN)
    assert list(scores) == ["csi_0.5", "hss_0.5", "csi_2", "hss_2", "csi_5", "hss_5"]
    assert scores["csi_0.5"] == {"mean": pytest.approx(1 / 6), "frames": [pytest.approx(1 / 3), 0.0], "undefined": 0}
    assert scores["hss_0.5"]["frames"] == [0.0, 0.0]  # 2(1·1 − 1·1) = 0
    assert scores["hss_2"]["frames"] == [pytest.approx(2 * (0 - 1) / (1 * 3 + 1 * 3)), 0.0]
    # No rain of 5 mm/h at the first lead time, forecast or fallen: 0/0 is no score, and no zero in the mean either.
    assert scores["csi_5"] == {"mean": 0.0, "frames": [None, 0.0], "undefined": 1}
    assert scores["hss_5"] == {"mean": 0.0, "frames": [None, 0.0], "undefined": 1}
    json.dumps(scores, allow_nan=False)


def test_scores_of_a_contingency_table():
    counts = torch.tensor([[[50, 20, 30, 900, 0]]])
    scores = metrics.csi_hss(counts, thresholds=[1])
    assert scores["csi_1"]["mean"] == 0.5
    # 2(50·900 − 20·30) / (70·920 + 80·930) = 88800 / 138800
    assert scores["hss_1"]["mean"] == pytest.approx(88800 / 138800, rel=1e-15)
    dry = metrics.csi_hss(torch.tensor([[[0, 0, 0, 10, 0]]]), thresholds=[1])
    assert dry["csi_1"] == {"mean": None, "frames": [None], "undefined": 1}


def test_event_counts_add_up_and_respect_the_mask():
    pred, truth = (10 * torch.rand(4, 3, 1, 9, 9) for _ in range(2))
    mask = torch.rand(pred.shape) > 0.5
    counts = metrics.event_counts(pred, truth, RAIN, mask)
    parts = [metrics.event_counts(pred[rows], truth[rows], RAIN, mask[rows]) for rows in (slice(0, 1), slice(1, 4))]
    assert torch.equal(counts, parts[0] + parts[1])
    assert torch.equal(counts.sum(-1), mask.sum((0, 2, 3, 4)).expand(3, 3))
    expected = torch.zeros(3, 3, 5, dtype=torch.int64)
    for b, t, c, y, x in np.ndindex(*pred.shape):
        if mask[b, t, c, y, x]:
            for k, threshold in enumerate((0.5, 2, 5)):
                forecast, fell = pred[b, t, c, y, x] >= threshold, truth[b, t, c, y, x] >= threshold
                expected[k, t, 0 if forecast and fell else 1 if fell else 2 if forecast else 3] += 1
    assert torch.equal(counts, expected)


def test_nan_is_no_event_and_no_absence_of_one():
    """64 of 64 correct negatives were made of a forecast of NaN on a dry day."""
    pred, truth = torch.zeros(2, 2, 1, 8, 8), torch.zeros(2, 2, 1, 8, 8)
    truth[:, :, 0, 0, 0] = 3
    pred[0, 0, 0, 4, 4:6] = math.nan
    truth[1, 0, 0, 4, 6] = math.nan
    counts = metrics.event_counts(pred, truth, (2,))
    assert counts.tolist() == [[[0, 2, 0, 123, 3], [0, 2, 0, 126, 0]]]
    scores = metrics.csi_hss(counts, (2,))
    assert scores["csi_2"] == scores["hss_2"] == {"mean": None, "frames": [None, 0.0], "undefined": 0}
    mask = ~(pred.isnan() | truth.isnan())
    assert metrics.csi_hss(metrics.event_counts(pred, truth, (2,), mask), (2,))["csi_2"]["mean"] == 0.0
    nothing = metrics.csi_hss(metrics.event_counts(pred, truth, (2,), torch.zeros_like(mask)), (2,))
    assert nothing["hss_2"] == {"mean": None, "frames": [None, None], "undefined": 2}


def test_counts_of_other_thresholds_are_refused():
    counts = metrics.event_counts(*clips(1, 2, 1, 4, 4), (0.5, 2))
    for wrong in ((0.5,), (0.5, 2, 5)):
        with pytest.raises(ValueError, match="are not"):
            metrics.csi_hss(counts, wrong)
    with pytest.raises(ValueError, match="are not"):
        metrics.csi_hss(counts[..., :4], (0.5, 2))
    assert metrics.csi_hss(metrics.event_counts(*clips(1, 2, 1, 4, 4), ()), ()) == {}


def test_whole_numbers_have_events_too_and_a_threshold_is_named_as_it_is():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16)
    counts = metrics.event_counts(levels, levels, (99.5, 240.0))
    assert counts[:, 0].tolist() == [[156, 0, 0, 100, 0], [16, 0, 0, 240, 0]]
    assert list(metrics.csi_hss(counts, (99.5, 240.0))) == ["csi_99.5", "hss_99.5", "csi_240", "hss_240"]


@pytest.mark.parametrize("channels", [1, 3])
def test_errors_in_units_are_pooled_over_pixels(channels):
    pred, truth = (280 + 30 * torch.randn(5, 4, channels, 6, 7) for _ in range(2))
    mask = torch.rand(truth.shape) > 0.3
    mask[:, 2] = False                                            # a lead time without data
    truth[~mask] = math.nan
    sums = metrics.unit_errors(pred, truth, mask)
    assert sums.dtype == torch.float64 and sums.shape == (4, channels, 3)
    parts = metrics.unit_errors(pred[:2], truth[:2], mask[:2]) + metrics.unit_errors(pred[2:], truth[2:], mask[2:])
    torch.testing.assert_close(parts, sums, rtol=1e-14, atol=0)
    summary = metrics.unit_summary(sums)
    suffixes = [""] + ([f"_{c + 1}" for c in range(channels)] if channels > 1 else [])
    assert list(summary) == [name + suffix for suffix in suffixes for name in ("rmse", "mae_units")]
    error = np.where(mask, pred.double().numpy() - truth.double().numpy(), np.nan)
    for suffix in suffixes:
        of = error[:, :, int(suffix[1:]) - 1] if suffix else error
        for name, power, root in (("rmse", 2, np.sqrt), ("mae_units", 1, float)):
            frames = [None if t == 2 else root(np.nanmean(np.abs(of[:, t]) ** power)) for t in range(4)]
            assert summary[name + suffix]["frames"] == [v if v is None else pytest.approx(v, rel=1e-12) for v in frames]
            assert summary[name + suffix]["mean"] == pytest.approx(root(np.nanmean(np.abs(of) ** power)), rel=1e-12)
    json.dumps(summary, allow_nan=False)


def test_errors_in_units_by_hand_and_with_nan():
    pred, truth = frames([[1, 2], [3, 4]], [[1, 1], [1, 1]]), frames([[1, 2], [3, 8]], [[1, 1], [1, 3]])
    assert metrics.unit_errors(pred, truth).tolist() == [[[16, 4, 4]], [[4, 2, 4]]]
    assert metrics.unit_summary(metrics.unit_errors(pred, truth)) == {
        "rmse": {"mean": math.sqrt(20 / 8), "frames": [2.0, 1.0]}, "mae_units": {"mean": 6 / 8, "frames": [1.0, 0.5]}}
    for bad in (math.nan, math.inf):
        spoilt = pred.double()
        spoilt[0, 1, 0, 0, 0] = bad
        assert metrics.unit_summary(metrics.unit_errors(spoilt, truth))["rmse"] == {"mean": None, "frames": [2.0, None]}
    with pytest.raises(ValueError, match="are not"):
        metrics.unit_summary(torch.zeros(4, 3))


# ---- The table -------------------------------------------------------------------------------------------------------

def summary_of(frames, **others):
    """A made-up summary: MSE as given, MAE, PSNR and SSIM two, three and four times as much."""
    summary = {name: {"mean": sum(frames) / len(frames) * k, "frames": [f * k for f in frames]}
               for k, name in enumerate(PIXEL_METRICS, 1)}
    summary["psnr"]["exact"] = 0
    return summary | others


def test_table_holds_the_numbers():
    results = {
        "forecast": summary_of([10.5, 20.25], csi_2={"mean": 0.25, "frames": [0.25, None], "undefined": 1}),
        "all_predictions": summary_of([7.0] * 5),
        "repeat_last": summary_of([100.0, 101.0], csi_2={"mean": 0.125, "frames": [0.0, 0.25], "undefined": 0}),
        "black": summary_of([300.0, 302.0]),
    }
    results["black"]["psnr"]["exact"] = 3
    published = [{"source": "CMS-LSTM, Table 1", "mse": 61.2, "ssim": 0.888, "params": "0.4M"},
                 {"source": "a paper without these", "params": "1M"}]
    text = metrics.table(results, published)
    assert max(map(len, text.splitlines())) <= 100
    rows = {line.split("  ")[0]: line.replace("|", " ").split() for line in text.split("\n\n")[0].splitlines()}
    assert rows["frame"] == ["frame"] + ["MSE", "MAE", "PSNR", "SSIM"] * 2
    assert rows["1"][1:] == ["10.50", "21.00", "31.50", "42.00", "100.00", "200.00", "300.00", "400.00"]
    assert rows["2"][1:5] == ["20.25", "40.50", "60.75", "81.00"]
    assert rows["mean"][1] == f"{(10.5 + 20.25) / 2:.2f}" and rows["mean"][5] == "100.50"
    assert rows["all 5 predictions"][3] == "7.00"
    assert rows["black"][1:] == ["301.00", "602.00", "903.00", "1204.00"]
    assert rows["CMS-LSTM, Table 1"][3:] == ["61.2", "–", "–", "0.888"]
    assert "without these" not in text
    assert "PSNR leaves out exact frames: 3 (black)" in text
    rain = text.split("\n\n")[1]
    assert "CSI 2" in rain and "0.2500" in rain and "0.1250" in rain
    assert rain.splitlines()[4].split() == ["2", "–", "|", "0.2500"]


def test_table_says_units_precision_what_is_left_out_and_how_to_read_it():
    entry = {"mean": 1.5, "frames": [1.0, 2.0]}
    units = dict.fromkeys(("rmse", "mae_units", "csi_273.15", "hss_273.15"), entry)
    results = {"forecast": summary_of([10.5, 20.25], **units), "repeat_last": summary_of([100.0, 101.0], **units)}
    results["forecast"]["mse"]["left_out"] = results["repeat_last"]["mse"]["left_out"] = 3
    published = [{"source": "A paper, Table 1", "mse": 61.2}]
    text = metrics.table(results, published, unit="K", precision="bf16")
    blocks = text.split("\n\n")
    assert [block.splitlines()[1].split()[1:] for block in blocks] == [
        ["MSE", "MAE", "PSNR", "SSIM", "|", "MSE", "MAE", "PSNR", "SSIM"],
        ["RMSE", "MAE", "|", "RMSE", "MAE"],
        ["CSI", "273.15", "|", "CSI", "273.15"], ["HSS", "273.15", "|", "HSS", "273.15"]]
    assert [block.split("forecast")[0].strip() for block in blocks] == ["", "in K", "", ""]
    assert "the papers' figures are of fp32 runs; this run computed in bf16" in text
    assert "frames without data are left out: 3 (forecast), 3 (repeat last)" in text
    assert " ".join(text.split()).endswith(
        "How to read it: lower MSE, MAE, RMSE and higher PSNR, SSIM, CSI, HSS are better; the repeated last frame is "
        "what a forecast must beat.")
    assert max(map(len, text.splitlines())) <= 100
    plain = metrics.table(results, precision="bf16")
    assert "bf16" not in plain and "in own unit" in plain
    for side in results.values():  # of two channels, pooled, the larger would hide the other
        side |= dict.fromkeys(("rmse_1", "mae_units_1", "rmse_2", "mae_units_2"), entry)
    text = metrics.table(results, unit="K")
    heads = [" ".join(block.split("---")[0].split()) for block in text.split("\n\n")[1:3]]
    assert heads == [f"in K forecast | repeated last frame frame {of_two} | {of_two}" for of_two in (
        "RMSE 1 MAE 1", "RMSE 2 MAE 2")]
    assert "each channel's" in text


def test_table_shows_small_numbers_and_stays_narrow_with_many_thresholds():
    small, events = {"mean": 1.5e-5, "frames": [1e-5, 2e-5]}, {"mean": 0.5, "frames": [0.5, None]}
    names = [f"{score}_{273.15 + k:g}" for score in ("csi", "hss") for k in range(7)]
    summary = summary_of([10.5, 20.25], rmse=small, mae_units=small, **dict.fromkeys(names, events))
    results = dict.fromkeys(("forecast", "repeat_last", "all_predictions"), summary)
    text = metrics.table(results, unit="kg m-2 s-1")
    assert max(map(len, text.splitlines())) <= 100
    assert all(text.count(name.replace("_", " ").upper()) == 2 for name in names)
    rows = [line.split() for line in text.split("\n\n")[1].splitlines()]
    assert rows[3][1:] == ["1.00e-05", "1.00e-05", "|", "1.00e-05", "1.00e-05"] and rows[6][1] == "1.50e-05"
    assert "in vehicles within 30 minutes and cell forecast" in metrics.table(
        results, unit="vehicles within 30 minutes and cell")


def test_table_of_a_real_evaluation_stays_narrow():
    pred, truth = clips(2, 12, 2, 128, 128)
    summary = metrics.summarize(metrics.frame_scores(pred, truth))
    summary |= metrics.csi_hss(metrics.event_counts(pred * 8, truth * 8, RAIN), RAIN)
    results = dict.fromkeys(("forecast", "all_predictions", "repeat_last", "black"), summary)
    for shown in (PIXEL_METRICS, ("mse", "mae", "psnr_float", "ssim_gaussian")):
        text = metrics.table(results, [{"source": "A very long name of a source, Table 12", "mse": 1.5}], shown)
        assert max(map(len, text.splitlines())) <= 100
        assert all(f"{score} {mm}" in text for score in ("CSI", "HSS") for mm in (0.5, 2, 5))
    text = metrics.table({"forecast": summary}, metrics=["psnr_float"])
    assert "PSNR*" in text and "* on floats" in text


# ---- Curves ----------------------------------------------------------------------------------------------------------

def one_panel(curves, name, xlabel, log=False):
    curves = {label: [*zip(*curve)] if isinstance(curve, tuple) else [*enumerate(curve, 1)]
              for label, curve in curves.items()}
    return metrics.curves_svg([(name, xlabel, curves)], log=log)


def curves_in(svg):
    """{label: [(xs, values, points) per piece]} of an SVG text."""
    found = {}
    for line in ElementTree.fromstring(svg).iter(f"{SVG}polyline"):
        xs, values = ([float(v) for v in line.get(name).split()] for name in ("data-x", "data-values"))
        points = [tuple(map(float, point.split(","))) for point in line.get("points").split()]
        assert len(xs) == len(values) == len(points)
        found.setdefault(line.get("data-label"), []).append((xs, values, points))
    return found


def texts_in(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def ticks_of(svg, turned=False):
    """(value, place in pixels) of an axis: x, or y if turned."""
    anchor, place = ("end", "y") if turned else ("middle", "x")
    ticks = []
    for text in ElementTree.fromstring(svg).iter(f"{SVG}text"):
        if text.get("text-anchor") == anchor and text.text.replace(".", "").replace("e-", "").isdigit():
            ticks.append((float(text.text), float(text.get(place)) - (4 if turned else 0)))
    return ticks


def test_curves_are_the_metrics():
    pred, truth = clips(3, 6, 1, 16, 16)
    runs = {"ConvLSTM": metrics.summarize(metrics.frame_scores(pred, truth)),
            "a <run> & \"more\"": metrics.summarize(metrics.frame_scores(truth * 0, truth))}
    svg = metrics.score_curves(runs, "ConvLSTM full, moving_digits, iteration 7")
    found = curves_in(svg)
    assert list(found) == list(runs)
    for label, summary in runs.items():
        assert [values for _, values, _ in found[label]] == [summary[metric]["frames"] for metric in PIXEL_METRICS]
        assert all(xs == [1, 2, 3, 4, 5, 6] for xs, _, _ in found[label])
    texts = texts_in(svg)
    assert {"MSE (sum over a frame)", "PSNR (dB)", "forecast frame", "ConvLSTM full, moving_digits, iteration 7",
            *runs} <= set(texts)
    lines = list(ElementTree.fromstring(svg).iter(f"{SVG}polyline"))
    assert len({(line.get("stroke"), line.get("stroke-dasharray")) for line in lines}) == 2


def test_points_lie_where_the_axes_say():
    for log, values in ((False, [3.0, 17.5, 8.25, 40.0]), (True, [900.0, 45.0, 3.0, 0.5]), (True, [40.0, 55.0])):
        svg = one_panel({"loss": ([0, 100, 250, 400][:len(values)], values)}, "L1 loss", "iteration", log)
        (xs, found, points), = curves_in(svg)["loss"]
        assert found == values
        for turned, numbers, places in ((False, xs, [x for x, _ in points]), (True, found, [y for _, y in points])):
            ticks = ticks_of(svg, turned)
            assert len(ticks) >= 3
            scale = math.log10 if log and turned else float
            (v0, p0), (v1, p1) = ticks[0], ticks[-1]
            for value, place in zip(numbers, places):
                expected = p0 + (scale(value) - scale(v0)) / (scale(v1) - scale(v0)) * (p1 - p0)
                assert place == pytest.approx(expected, abs=0.05)


def test_none_is_a_gap_and_an_empty_panel_says_so():
    svg = one_panel({"psnr": [None, 20.5, 21.5, None, 23.0]}, "PSNR (dB)", "frame")
    assert [(xs, values) for xs, values, _ in curves_in(svg)["psnr"]] == [([2, 3], [20.5, 21.5]), ([5], [23.0])]
    empty = one_panel({"ssim": [None, None]}, "SSIM", "frame")
    assert not curves_in(empty) and "no values" in texts_in(empty)
    constant = one_panel({"black": [0.0, 0.0, 0.0]}, "MSE", "frame")
    assert len({y for _, y in curves_in(constant)["black"][0][2]}) == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_cannot_be_shown_is_refused(value):
    with pytest.raises(ValueError, match="MSE: a curve cannot show"):
        one_panel({"run": [1.0, value]}, "MSE", "frame")


def test_training_curves_have_a_logarithmic_axis_where_the_values_allow_one():
    points = [(10, 1000.0), (20, 10.0), (30, 1.0)]
    for last, log in ((0.1, True), (0.0, False)):
        panels = [("L1 loss", "iteration", {"training": [*points, (40, last)]}),
                  ("MSE", "iteration", {"validation": []})]
        svg = metrics.curves_svg(panels, "a run", log=True)
        (xs, values, places), = curves_in(svg)["training"]
        assert xs == [10, 20, 30, 40] and values == [1000, 10, 1, last]
        steps = np.diff([y for _, y in places])
        assert (abs(steps[0] - 2 * steps[1]) < 0.1) == log
        assert {"a run", "L1 loss", "MSE", "iteration", "no values"} <= set(texts_in(svg))


def test_names_that_are_not_utf_8_leave_a_valid_file():
    name = "r\udce9gion\x00\n <&> \"é\""
    svg = metrics.score_curves({name: summary_of([1.0, 2.0])}, name)
    svg.encode()
    assert list(curves_in(svg)) == ["r\\udce9gion\\x00\\n <&> \"é\""]
    assert texts_in(svg).count("r\\udce9gion\\x00\\n <&> \"é\"") == 2


def test_curves_show_what_the_unit_adds():
    summary = summary_of([1.0, 2.0], **{name: {"mean": 1.0, "frames": [1.0, k]} for k, name in enumerate(
        ("rmse", "mae_units", "rmse_1", "csi_273.15", "hss_280"))})
    panels = [text for text in texts_in(metrics.score_curves({"run": summary, "other": summary}, "", "K")) if text]
    assert [text for text in ("RMSE (K)", "MAE (K)", "CSI 273.15 (K)", "HSS 280 (K)") if text not in panels] == []
    assert not any("rmse_1" in text for text in panels)


def test_many_curves_stay_apart_and_inside():
    curves = {f"run number {k:02d} with a long name": [float(k), float(k + 1)] for k in range(12)}
    svg = one_panel(curves, "MSE", "frame")
    root = ElementTree.fromstring(svg)
    styles = {(line.get("stroke"), line.get("stroke-dasharray")) for line in root.iter(f"{SVG}polyline")}
    assert len(styles) == 12
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.get("x")) <= float(root.get("width"))
        assert 0 <= float(text.get("y")) <= float(root.get("height"))


def test_long_training_curves_are_kept_whole():
    steps, losses = list(range(0, 80000, 40)), [100 / (k + 1) for k in range(2000)]
    svg = one_panel({"loss": (steps, losses)}, "loss", "iteration", log=True)
    (xs, values, _), = curves_in(svg)["loss"]
    assert xs == steps and values == losses
    markers = [path for path in ElementTree.fromstring(svg).iter(f"{SVG}path") if path.get("transform")]
    assert len(markers) <= 21  # twenty along the curve, one in the legend
