"""metrics.py against slow literal versions, values worked out by hand and values of scikit-image."""

import json
import math

import numpy as np
import pytest
import torch

import metrics

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_eight_bit_values_are_truncated_and_survive_the_way_there_and_back(dtype):
    levels = torch.arange(256).view(1, 1, 1, 16, 16)
    exact = (levels / 255).to(dtype)
    for share, psnr in ((0.5, math.inf), (1.001, 20 * math.log10(255) - 10 * math.log10(255 / 256))):
        truth = ((levels + share) / 255).clamp(max=1).double()         # truncated it is the level, or the next one
        assert metrics.frame_scores(exact, truth)["psnr"].item() == pytest.approx(psnr, rel=1e-14)


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


def test_other_shapes_devices_and_dtypes_are_refused():
    x = torch.rand(1, 2, 1, 8, 8)
    wrong = [(x, x[:, :1], None, r"predictions \(1, 2, .* as of the truth, \(1, 1"), (x[0], x[0], None, "truth"),
             (x, x, torch.ones(2, 1, 8, 8, dtype=torch.bool), r"mask \(2, 1, 8, 8\)"),
             (x, x.to("meta"), None, "predictions .* on cpu"), (x, x, (x > 0).to("meta"), "mask .* on meta")]
    for pred, truth, mask, text in wrong:
        for score in (metrics.frame_scores, metrics.unit_errors,
                      lambda pred, truth, mask: metrics.event_counts(pred, truth, (1,), mask)):
            with pytest.raises(ValueError, match=text):
                score(pred, truth, mask)
    with pytest.raises(ValueError, match=r"floats in \[0, 1\] are needed"):
        metrics.frame_scores((x * 255).to(torch.uint8), (x * 255).to(torch.uint8))


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
    if dtype != torch.float32:  # 255·x is exact in float32 of what has so few bits
        assert metrics.frame_scores(pred.double(), truth.double())["psnr"].equal(scores["psnr"])


# In the last shape one frame fills more than a chunk.
@pytest.mark.parametrize("shape", [(5, 3, 1, 16, 16), (40, 5, 2, 13, 21), (3, 1, 1, 182, 190)])
def test_scores_do_not_depend_on_the_batch(shape):
    pred, truth = clips(*shape)
    mask = torch.rand(pred.shape) > 0.3
    whole = metrics.frame_scores(pred, truth, mask)
    parts = [metrics.frame_scores(pred[rows], truth[rows], mask[rows]) for rows in (slice(0, 1), slice(1, None))]
    for name in whole:
        joined = torch.cat([part[name] for part in parts])
        assert torch.allclose(whole[name], joined, rtol=3e-14, atol=0), name


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
    with_data = (1, 0), (1, 1), (3, 0), (3, 1), (3, 2)
    literal = [slow_scores(pred[at].numpy(), truth[at].numpy()) for at in with_data]
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
    scores = {"mse": torch.tensor([[1.0, 2.0], [3.0, 6.0]]), "psnr": torch.tensor([[10.0, math.inf], [20.0, 60.0]]),
              "pixels": torch.ones(2, 2)}
    summary = metrics.summarize(scores)
    assert summary["mse"] == {"mean": 3.0, "frames": [2.0, 4.0], "left_out": 0}
    assert summary["psnr"] == {"mean": 30.0, "frames": [15.0, 60.0], "exact": 1, "left_out": 0}  # 30: of three
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_what_the_cpu_gives():
    pred, truth = clips(3, 4, 1, 64, 64)
    on_device = metrics.frame_scores(pred.cuda(), truth.cuda())
    for name, values in metrics.frame_scores(pred, truth).items():
        assert on_device[name].is_cuda and torch.allclose(on_device[name].cpu(), values, rtol=1e-12, atol=0), name


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
    for thresholds in ((0.5,), (0.5, 2, 5)):
        with pytest.raises(ValueError):
            metrics.csi_hss(counts, thresholds)


def test_whole_numbers_have_events_too_and_a_threshold_is_named_as_it_is():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 1, 1, 16, 16)
    counts = metrics.event_counts(levels, levels, (99.5, 240.0))
    assert counts[:, 0].tolist() == [[156, 0, 0, 100, 0], [16, 0, 0, 240, 0]]
    assert [*metrics.csi_hss(counts, (99.5, 240.0))] == ["csi_99.5", "hss_99.5", "csi_240", "hss_240"]


@pytest.mark.parametrize("channels", [1, 3])
def test_errors_in_units_against_literal_versions(channels):
    pred, truth = (280 + 30 * torch.randn(3, 4, channels, 5, 6) for _ in range(2))
    mask = torch.rand(truth.shape) > 0.3
    mask[:, 2] = False                                            # a lead time without data
    truth[~mask] = math.nan
    sums = metrics.unit_errors(pred, truth, mask)
    assert sums.dtype == torch.float64 and sums.shape == (4, channels, 3)
    parts = metrics.unit_errors(pred[:2], truth[:2], mask[:2]) + metrics.unit_errors(pred[2:], truth[2:], mask[2:])
    torch.testing.assert_close(parts, sums, rtol=3e-14, atol=0)
    squares, absolutes, pixels = np.zeros((3, 4, channels))
    for b, t, c, y, x in np.ndindex(*truth.shape):
        if mask[b, t, c, y, x]:
            error = float(pred[b, t, c, y, x]) - float(truth[b, t, c, y, x])
            squares[t, c] += error**2
            absolutes[t, c] += abs(error)
            pixels[t, c] += 1
    summary = metrics.unit_summary(sums)
    suffixes = [f"_{c + 1}" for c in range(channels)] if channels > 1 else [""]
    assert list(summary) == [name + suffix for suffix in suffixes for name in ("rmse", "mae_units")]
    for c, suffix in enumerate(suffixes):
        for name, errors, root in (("rmse", squares, math.sqrt), ("mae_units", absolutes, float)):
            entry = summary[name + suffix]
            for t in (0, 1, 3):
                assert entry["frames"][t] == pytest.approx(root(errors[t, c] / pixels[t, c]), rel=1e-12)
            assert entry["frames"][2] is None
            assert entry["mean"] == pytest.approx(root(errors[:, c].sum() / pixels[:, c].sum()), rel=1e-12)


def test_errors_in_units_by_hand_and_with_nan():
    pred, truth = frames([[1, 2], [3, 4]], [[1, 1], [1, 1]]), frames([[1, 2], [3, 8]], [[1, 1], [1, 3]])
    assert metrics.unit_errors(pred, truth).tolist() == [[[16, 4, 4]], [[4, 2, 4]]]
    assert metrics.unit_summary(metrics.unit_errors(pred, truth)) == {
        "rmse": {"mean": math.sqrt(20 / 8), "frames": [2.0, 1.0]}, "mae_units": {"mean": 6 / 8, "frames": [1.0, 0.5]}}
    for bad in (math.nan, math.inf):
        spoilt = pred.double()
        spoilt[0, 1, 0, 0, 0] = bad
        assert metrics.unit_summary(metrics.unit_errors(spoilt, truth))["rmse"] == {"mean": None, "frames": [2.0, None]}


# ---- The table -------------------------------------------------------------------------------------------------------

def summary_of(frames, **others):
    """A made-up summary: MSE as given, MAE, PSNR and SSIM two, three and four times as much."""
    summary = {name: {"mean": sum(frames) / len(frames) * k, "frames": [f * k for f in frames], "left_out": 0}
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
    results["black"]["psnr"] |= {"exact": 3, "left_out": 2}
    published = [{"source": "CMS-LSTM, Table 1", "mse": 61.2, "ssim": 0.888, "params": "0.4M"},
                 {"source": "A table by frame", "mse_frames": [0.1, 0.3], "csi": [0.341]},
                 {"source": "a paper without these", "params": "1M"}]
    text = metrics.table(results, published, precision="bf16")
    blocks = text.split("\n\n")
    rows = {line[:25].strip(): line[25:].replace("|", " ").split() for line in blocks[0].splitlines()}
    assert rows["frame"] == ["MSE", "MAE", "PSNR", "SSIM"] * 2
    assert rows["1"] == ["10.50", "21.00", "31.50", "42.00", "100.00", "200.00", "300.00", "400.00"]
    assert rows["2"][:4] == ["20.25", "40.50", "60.75", "81.00"]
    assert rows["mean"][0] == f"{(10.5 + 20.25) / 2:.2f}" and rows["mean"][4] == "100.50"
    assert rows["all 5 predictions"][2] == "21.00"
    assert rows["black"] == ["301.00", "602.00", "903.00", "1204.00"]
    assert rows["CMS-LSTM, Table 1"] == ["61.2", "–", "–", "0.888"]
    assert rows["A table by frame"][0] == "0.2" and "without these" not in text
    rain = [line.split() for line in blocks[1].splitlines()]
    assert rain[1] == ["frame", "CSI", "2", "|", "CSI", "2"] and rain[4] == ["2", "–", "|", "0.2500"]
    assert rain[-1] == ["A", "table", "by", "frame", "0.341"]
    for note in ("PSNR leaves out exact frames: 3 (black)", "frames without data are left out: 2 (black)",
                 "the papers' figures are of fp32 runs; this run computed in bf16"):
        assert note in blocks[-1]
    assert "fp32" not in metrics.table(results, precision="bf16")


def test_table_has_blocks_for_what_the_unit_adds_and_stays_narrow():
    small, events = {"mean": 1.5e-5, "frames": [1e-5, 2e-5]}, {"mean": 0.5, "frames": [0.5, None]}
    thresholds = [f"{score}_{273.15 + k:g}" for score in ("csi", "hss") for k in range(4)]
    summary = summary_of([10.5, 123456.78], rmse_1=small, mae_units_1=small, rmse_2=events, mae_units_2=events,
                         **dict.fromkeys(thresholds, events))
    results = dict.fromkeys(("forecast", "repeat_last", "all_predictions"), summary)
    text = metrics.table(results, [{"source": "A very long name of a source, Table 12", "mse": 1.5}], unit="kg m-2 s-1")
    assert max(map(len, text.splitlines())) <= 100
    blocks = text.split("\n\n")[:-1]
    heads = [" ".join(block.splitlines()[1].split(" |")[0].split()[1:]) for block in blocks]
    assert heads == ["MSE MAE PSNR SSIM", "RMSE 1 MAE 1", "RMSE 2 MAE 2", "CSI 273.15 CSI 274.15 CSI 275.15",
                     "CSI 276.15", "HSS 273.15 HSS 274.15 HSS 275.15", "HSS 276.15"]
    assert [block.split("forecast")[0].strip() for block in blocks[:4]] == ["", *["in kg m-2 s-1"] * 2, ""]
    rows = [line.split() for line in blocks[1].splitlines()]
    assert rows[3][1:] == ["1.00e-05", "1.00e-05", "|", "1.00e-05", "1.00e-05"] and rows[6][1] == "1.50e-05"
    assert "in own unit" in metrics.table(results)


def test_table_of_a_real_evaluation():
    pred, truth = clips(2, 12, 2, 128, 128)
    summary = metrics.summarize(metrics.frame_scores(pred, truth))
    summary |= metrics.csi_hss(metrics.event_counts(pred * 8, truth * 8, RAIN), RAIN)
    results = dict.fromkeys(("forecast", "all_predictions", "repeat_last", "black"), summary)
    text = metrics.table(results, metrics=("mse", "mae", "psnr_float", "ssim_gaussian"))
    assert max(map(len, text.splitlines())) <= 100
    assert all(f"{score} {mm}" in text for score in ("CSI", "HSS") for mm in RAIN)
    assert "PSNR*" in text and "* on floats" in text
