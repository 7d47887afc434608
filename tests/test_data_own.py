"""Arrays of one's own: windows, parts, scales, what is refused, what is kept, and films to forecast."""

import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import data


def save(path, array):
    np.save(path, array)
    return path


def numbered(count, channels=None, height=4, width=6, dtype=np.uint8):
    """Frames whose every pixel is the frame's number, so that a clip tells where it was cut."""
    shape = (count, height, width) if channels is None else (count, channels, height, width)
    return np.broadcast_to(np.arange(count).reshape(-1, *[1] * (len(shape) - 1)), shape).astype(dtype)


def opened(path, tmp_path, frames_in=3, horizon=2, **options):
    return data.open_data(str(path), tmp_path / "data", frames_in=frames_in, horizon=horizon, **options)


def numbers(frames):
    """The frame numbers of uint8 clips made by `numbered`: a list per clip."""
    frames = frames * 255
    assert (frames == frames[..., :1, :1, :1]).all()
    return frames[:, :, 0, 0, 0].round().long().tolist()


def everything(clips, part):
    return numbers(getattr(clips, part)(0, getattr(clips, f"{part}_count")))


def all_training(clips):
    return sorted(numbers(clips.train(0, 0, clips.train_count)))


# -------------------------------------------------------------------------------------------------------------- windows

def test_one_film_is_cut_into_windows_and_parts(tmp_path):
    clips = opened(save(tmp_path / "film.npy", numbered(100)), tmp_path)
    assert (clips.name, clips.channels, clips.size) == ("film_npy", 1, (4, 6))
    assert all_training(clips) == [list(range(k, k + 5)) for k in range(77)]            # 0 … 80; the rest is held back
    assert everything(clips, "valid") == [[81, 82, 83, 84, 85], [83, 84, 85, 86, 87], [85, 86, 87, 88, 89]]
    assert everything(clips, "test") == [[90, 91, 92, 93, 94], [92, 93, 94, 95, 96], [94, 95, 96, 97, 98]]
    assert clips.train(0, 0, 2).dtype == torch.float32 and clips.train(0, 0, 2).shape == (2, 5, 1, 4, 6)
    assert "film.npy" in clips.test_set and json.dumps(clips.info())


def test_parts_have_at_least_one_window(tmp_path):
    clips = opened(save(tmp_path / "film.npy", numbered(15)), tmp_path)
    assert all_training(clips) == [[0, 1, 2, 3, 4]]
    assert everything(clips, "valid") == [[5, 6, 7, 8, 9]] and everything(clips, "test") == [[10, 11, 12, 13, 14]]


@pytest.mark.parametrize("count", [3, 12, 40])
def test_windows_never_cross_from_one_film_to_the_next(tmp_path, count):
    films = numbered(count * 6, 1, 2, 2).reshape(count, 6, 1, 2, 2)
    clips = opened(save(tmp_path / "films.npy", films), tmp_path)
    parts = {"train": all_training(clips), "valid": everything(clips, "valid"), "test": everything(clips, "test")}
    used = {part: {number // 6 for window in windows for number in window} for part, windows in parts.items()}
    for windows in parts.values():
        assert all(window == list(range(window[0], window[0] + 5)) and window[0] // 6 == window[-1] // 6
                   for window in windows)
    tenth = max(1, -(-count // 10))
    assert used["test"] == set(range(count - tenth, count))                             # whole films, and all of them
    assert used["train"] | used["valid"] | used["test"] == set(range(count))
    assert sum(len(films) for films in used.values()) == count
    assert len(parts["train"]) == 2 * len(used["train"])


def test_channels_stay_apart(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 6), dtype=np.uint8)
    clips = opened(save(tmp_path / "film.npy", array), tmp_path)
    expected = torch.from_numpy(array[36 - 1:40]) if clips.test_count == 1 else None
    assert clips.channels == 3 and expected is not None
    assert (clips.test(0, 1)[0] * 255).round().byte().equal(expected)


def test_floats_pass_as_they_are(tmp_path):
    for dtype in (np.float16, np.float32, np.float64, ">f4"):
        array = np.random.default_rng(0).random((40, 4, 6)).astype(dtype)
        clips = opened(save(tmp_path / "film.npy", array), tmp_path)
        assert (clips.test(0, 1)[0, :, 0].numpy() == array[35:].astype(np.float32)).all()


def test_an_npz_has_a_training_and_a_test_part(tmp_path):
    for save_npz in (np.savez, np.savez_compressed):
        path = tmp_path / "two.npz"
        save_npz(path, train=numbered(50), test=numbered(12) + 100)
        clips = opened(path, tmp_path)
        assert clips.name == "two_npz" and max(max(w) for w in all_training(clips)) == 44
        assert everything(clips, "valid")[0] == [45, 46, 47, 48, 49]
        assert [w[0] for w in everything(clips, "test")] == [100, 102, 104, 106]
        copies = sorted((tmp_path / "data" / "own").glob("two-*/*"))
        assert len(copies) == 3                                   # array, index, ranges: the old copies are gone
        times = [copy.stat().st_mtime_ns for copy in copies]
        opened(path, tmp_path)
        assert [copy.stat().st_mtime_ns for copy in copies] == times                    # unpacked once


def test_a_batch_is_a_function_of_seed_and_iteration(tmp_path):
    path = save(tmp_path / "film.npy", numbered(100))
    clips, again = opened(path, tmp_path), opened(path, tmp_path)
    again.train(3, 0, 8)
    assert clips.train(3, 5, 8).equal(again.train(3, 5, 8)) and not clips.train(3, 5, 8).equal(clips.train(4, 5, 8))
    assert clips.train(3, 5, 8, slice(1, None, 2)).equal(clips.train(3, 5, 8)[1::2])


# ---------------------------------------------------------------------------------------------------- how it was read

def test_a_line_says_how_an_array_was_read(tmp_path):
    clips = opened(save(tmp_path / "film.npy", numbered(100)), tmp_path)
    assert clips.info()["notes"] == [
        f"{tmp_path}/film.npy: films: 1 of 100 frames, channels: 1, 4×6, uint8 from 0 to 99, read as NHW; windows of "
        f"3 + 2: 77 for training (frames 0 … 80), 3 for validation (frames 81 … 89), 3 for the test (frames 90 … 98)"]
    films = np.random.default_rng(0).random((8, 7, 2, 4, 6), dtype=np.float32).clip(0.25, 0.75)
    line = opened(save(tmp_path / "films.npy", films), tmp_path).notes[0]
    assert "films: 8 of 7 frames, channels: 2, 4×6, float32 from 0.25 to 0.75, read as MTCHW;" in line
    assert "18 for training (frames 0 … 41), 2 for validation (frames 42 … 48), 2 for the test (frames 49 … 55)" in line


LAYOUTS = {"NHW": (40, 4, 6), "NCHW": (40, 3, 4, 6), "NHWC": (40, 4, 6, 3), "MTHW": (4, 10, 4, 6),
           "MTCHW": (4, 10, 3, 4, 6), "MTHWC": (4, 10, 4, 6, 3)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_every_layout_is_read_as_it_says(tmp_path, layout, suffix):
    array = np.random.default_rng(0).integers(0, 256, LAYOUTS[layout], dtype=np.uint8)
    path = tmp_path / f"mine{suffix}"
    np.save(path, array) if suffix == ".npy" else np.savez(path, array)
    clips = opened(path, tmp_path, layout=layout)
    film = array[-1] if layout[0] == "M" else array
    film = film[..., None] if "C" not in layout else film if layout[-1] == "C" else np.moveaxis(film, 1, -1)
    assert (clips.channels, clips.size) == (3 if "C" in layout else 1, (4, 6))
    first = 0 if layout[0] == "M" else 35                                               # the last film, or its end
    for units in (clips.test_units(0, 1), clips.to_units(clips.test(0, 1))):
        assert np.allclose(units[0].permute(0, 2, 3, 1), film[first:first + 5], atol=1e-4)
    assert clips.test_units(0, 1).dtype == torch.float64
    info = {**INFO, "channels": clips.channels}
    films = films_of(path, tmp_path, info, layout=layout)
    saved = films.as_file(films.test(0, films.test_count))
    assert saved.dtype == np.uint8
    assert (saved == (array[:, -3:] if layout[0] == "M" else array[-3:])).all()


def test_four_axes_are_read_by_their_sizes_and_otherwise_as_layout_says(tmp_path):
    for shape, read, films in (((40, 16, 8, 8), "NCHW", 1), ((4, 17, 8, 8), "MTHW", 4), ((40, 8, 9, 3), "NHWC", 1)):
        clips = opened(save(tmp_path / "x.npy", np.zeros(shape, np.uint8)), tmp_path)
        assert f"films: {films} of " in clips.notes[0] and f"read as {read}" in clips.notes[0]
        assert ("--layout MTHW takes the first axis for films" in clips.notes[0]) == (read == "NCHW")
    path = save(tmp_path / "x.npy", np.zeros((40, 16, 8, 8), np.uint8))
    clips = opened(path, tmp_path, layout="MTHW")                                       # the advice, taken
    assert clips.channels == 1 and "films: 40 of 16 frames, channels: 1, 8×8, uint8 from 0 to 0, read as MTHW;" in \
        clips.notes[0]
    for layout, text in (("NHW", "is not NHW of --layout"), ("TMHW", "--layout TMHW is none of NHW, NCHW")):
        with pytest.raises(data.DataError, match=text):
            opened(path, tmp_path, layout=layout)
    array = np.lib.format.open_memmap(tmp_path / "seq.npy", "w+", np.uint8, (20, 10_000, 64, 64))      # sparse
    with pytest.raises(data.DataError, match=r"save numpy.swapaxes\(a, 0, 1\)"):
        opened(tmp_path / "seq.npy", tmp_path)
    assert data._layout(np.swapaxes(array, 0, 1).shape, None, "x") == "MTHW"            # the advice, taken


# ------------------------------------------------------------------------------------------------------------- missing

def holes():
    """Two channels of floats; a corner of the second is missing, and all of frame 95."""
    array = np.random.default_rng(0).random((100, 2, 4, 6)).astype(np.float32)
    array[:, 1, :2, :2] = array[95] = np.nan
    return array


def test_nan_is_no_data(tmp_path):
    array = holes()
    clips = opened(save(tmp_path / "film.npy", array), tmp_path)
    assert clips.masked and clips.info()["masked"] and clips.own
    window = array[94:99]
    for found in (clips.test(2, 3), clips.test_units(2, 3), clips.to_units(clips.test(2, 3))):
        assert np.array_equal(found[0].float().numpy(), window, equal_nan=True)
    assert clips.train(0, 0, 4).isnan().sum() == 4 * 5 * 4
    # of 99 frames 4 of 48 values, of one all: (99 · 4 + 48) / 4800
    assert any("9.25% of the values are missing (NaN): the network reads 0 there" in note for note in clips.notes)
    assert not opened(save(tmp_path / "film.npy", np.nan_to_num(array)), tmp_path).masked


def test_the_range_leaves_out_what_is_missing(tmp_path):
    array = holes() * 10 + 5
    clips = opened(save(tmp_path / "film.npy", array), tmp_path, normalize="range")
    low, high = np.nanmin(array[:90], (0, 2, 3)).tolist(), np.nanmax(array[:90], (0, 2, 3)).tolist()
    assert clips.info()["scale"] == [low, high]


def test_a_window_without_any_data_is_refused_and_the_way_out_works(tmp_path):
    array = np.random.default_rng(0).random((100, 4, 6))
    array[20:24] = np.nan
    assert opened(save(tmp_path / "film.npy", array), tmp_path).masked                  # one of five frames is left
    array[24] = np.nan
    with pytest.raises(data.DataError, match=r"no data at all \(NaN\) in frames 20 to 24.*two arrays of a .npz"):
        opened(save(tmp_path / "film.npy", array), tmp_path)
    np.savez(tmp_path / "film.npz", array[:20], array[25:])
    clips = opened(tmp_path / "film.npz", tmp_path)
    assert not clips.masked and "films: 2 of 20 to 75 frames" in clips.notes[0]


# -------------------------------------------------------------------------------------------------------------- numbers

@pytest.mark.parametrize("code", ["i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "?", ">i2", ">u2", ">i4", ">u4",
                                  ">i8", "f2", "f4", "f8", ">f2", ">f4", ">f8", "g"])
def test_every_kind_of_number_trains(tmp_path, code):
    array = np.random.default_rng(0).integers(0, 2 if code == "?" else 100, (40, 4, 6)).astype(code)
    path = save(tmp_path / "film.npy", array)
    fixed = opened(path, tmp_path, normalize=[0, 70])
    expected = array[35:].astype(np.float64)
    assert (fixed.test_units(0, 1)[0, :, 0].numpy() == expected).all()
    assert (fixed.test(0, 1)[0, :, 0].numpy() == (expected / 70).clip(0, 1).astype(np.float32)).all()
    fitted = opened(path, tmp_path, normalize="range")
    assert fitted.info()["scale"] == [array[:36].min(), array[:36].max()] and fitted.train(0, 0, 2).isfinite().all()
    films = films_of(path, tmp_path, {**INFO, "scale": [0, 100]})
    saved = films.as_file(films.test(0, 1))
    assert saved.dtype == array.dtype and np.allclose(saved, array[-3:], rtol=1e-3)


def test_a_forecast_stays_within_the_integers_of_the_file(tmp_path):
    films = films_of(save(tmp_path / "x.npy", np.full((9, 4, 6), 7, np.int8)), tmp_path, {**INFO, "scale": [0, 1000]})
    assert (films.as_file(torch.ones(1, 2, 1, 4, 6)) == 127).all()


# --------------------------------------------------------------------------------------------------------------- scales

def test_normalize_scales_by_the_training_part_and_is_undone(tmp_path):
    array = numbered(100, dtype=np.float64) * 3 - 50
    clips = opened(save(tmp_path / "film.npy", array), tmp_path, normalize="range")
    assert clips.info()["scale"] == [-50, 217] and "clipped" in " ".join(clips.info()["notes"])
    valid = clips.valid(0, 1)
    assert np.allclose(clips.to_units(valid)[0, :, 0, 0, 0], [193, 196, 199, 202, 205], atol=1e-4)
    assert clips.test(0, 1).min() == 1                                                  # beyond the training part
    levels = opened(save(tmp_path / "levels.npy", numbered(100)), tmp_path, normalize="range")
    assert levels.info()["scale"] == [0, 89] and levels.valid(0, 1)[0, 0].unique().item() == np.float32(81 / 89)


def weather(count=100):
    """Rain of 0 to 4 mm and pressure of 950 to 1050 hPa."""
    array = np.random.default_rng(0).random((count, 2, 4, 6))
    array[0, 0, 0, :2], array[0, 1, 0, :2] = (0, 1), (0, 1)
    return array * np.array([4, 100])[:, None, None] + np.array([0, 950])[:, None, None]


def test_each_channel_has_its_own_range(tmp_path):
    array = weather()
    clips = opened(save(tmp_path / "film.npy", array), tmp_path, normalize="range")
    assert clips.info()["scale"] == [[0, 950], [4, 1050]]
    frames, expected = clips.test(0, 1)[0].numpy(), array[90:95]
    assert np.allclose(frames[:, 0], expected[:, 0] / 4) and np.allclose(frames[:, 1], (expected[:, 1] - 950) / 100)
    assert np.allclose(clips.to_units(clips.test(0, 1))[0], expected) and (clips.test_units(0, 1)[0] == expected).all()
    assert "channel 2: scaled by the training part's minimum and maximum, 950 and 1050" in " ".join(clips.notes)
    films = films_of(tmp_path / "film.npy", tmp_path, {**INFO, "channels": 2, "scale": clips.info()["scale"]})
    assert np.allclose(films.as_file(films.test(0, 1)), array[-3:])
    array[:, 1] = 1000
    with pytest.raises(data.DataError, match="channel 2: the training part is 1000 everywhere.*--normalize LOW HIGH"):
        opened(save(tmp_path / "film.npy", array), tmp_path, normalize="range")
    assert opened(tmp_path / "film.npy", tmp_path, normalize=[0, 1050]).channels == 2   # the advice, taken


def test_a_fixed_scale_is_shared_and_says_what_it_clips(tmp_path):
    calm, storm = np.linspace(0, 50, 100), np.linspace(-32, 75, 100)
    for name, values in (("calm", calm), ("storm", storm)):
        path = save(tmp_path / f"{name}.npy", values[:, None, None] * np.ones((4, 6)))
        clips = opened(path, tmp_path, normalize=[0, 70])
        assert clips.info()["scale"] == [0, 70] and clips.unit is None
        assert np.allclose(clips.test(0, 1)[0, :, 0, 0, 0], (values[90:95] / 70).clip(0, 1))
        said = "go from -32 to 75; what lies outside the scale is clipped" in " ".join(clips.notes)
        assert said == (name == "storm")
    for ends in ([70, 0], [5, 5], [0, np.nan], [0, np.inf], [-1.7e308, 1.7e308]):
        with pytest.raises(data.DataError, match="is no scale"):
            opened(tmp_path / "calm.npy", tmp_path, normalize=ends)


def test_a_range_wider_than_floats_is_refused_and_a_wide_one_stays_finite(tmp_path):
    array = np.random.default_rng(0).random((40, 4, 6))
    path = save(tmp_path / "film.npy", (array - 0.5) * 2 * 1.7e308)
    with pytest.raises(data.DataError, match="is no scale"):
        opened(path, tmp_path, normalize="range")
    clips = opened(save(path, array * 1.7e308), tmp_path, normalize="range")
    assert np.allclose(clips.train(0, 0, 4).mean(), 0.5, atol=0.1) and clips.to_units(clips.test(0, 1)).isfinite().all()


def test_another_runs_scale_is_taken_over(tmp_path):
    path = save(tmp_path / "film.npy", numbered(100, dtype=np.float64))
    clips = opened(path, tmp_path, scale=[-50, 150])
    assert clips.info()["scale"] == [-50, 150] and np.allclose(clips.test(0, 1)[0, :, 0, 0, 0],
                                                               (np.arange(90, 95) + 50) / 200)
    assert isinstance(opened(path, tmp_path, scale="rain").scale, data.RainScale)
    with pytest.raises(data.DataError, match="leave --normalize out"):
        opened(path, tmp_path, scale=[0, 100], normalize="range")
    with pytest.raises(data.DataError, match="has 1 channels, the run's scale 2"):
        opened(path, tmp_path, scale=[[0, 0], [1, 2]])


@pytest.mark.parametrize("extremes", [[-9999], [1e20], [65535], [65534, 65535], [-9999, -8888], [-32768, 1e20]])
def test_a_lone_extreme_is_said_and_the_way_out_works(tmp_path, extremes):
    array = np.random.default_rng(0).integers(0, 71, (100, 8, 8)).astype(np.float64)
    array[0, 0, :2] = 0, 70
    quiet = opened(save(tmp_path / "film.npy", array), tmp_path, normalize="range")
    assert not any("squeezes" in note for note in quiet.notes)
    array[50, 3, :len(extremes)] = extremes
    clips = opened(save(tmp_path / "film.npy", array), tmp_path, normalize="range")
    note, = [note for note in clips.notes if "squeezes" in note]
    assert ", ".join(f"{value:g}" for value in extremes) + " squeezes all other values, 0 … 70, into 1/" in note
    assert f"numpy.where(a == {extremes[0]:g}, numpy.nan, a)" in note
    array[np.isin(array, extremes)] = np.nan
    clips = opened(save(tmp_path / "film.npy", array), tmp_path, normalize="range")
    assert clips.info()["scale"] == [0, 70] and clips.masked and not any("squeezes" in note for note in clips.notes)


def test_rain_with_a_heavy_tail_is_no_lone_extreme(tmp_path):
    rain = np.random.default_rng(0).lognormal(0, 1.5, (200, 32, 32))
    clips = opened(save(tmp_path / "film.npy", rain), tmp_path, normalize="range")
    assert rain.max() > 300 and np.median(rain) < 1.1 and not any("squeezes" in note for note in clips.notes)


def test_thresholds_meet_the_data_as_stored(tmp_path):
    values = np.linspace(0, 70, 36)                                                     # every 2 dBZ: 20 is one of them
    array = np.broadcast_to(values.astype(np.float32), (40, 4, 36))
    path = save(tmp_path / "film.npy", array)
    clips = opened(path, tmp_path, normalize=[-31.5, 95.5], unit="dBZ", thresholds=[20, 36])
    assert (clips.unit, clips.thresholds) == ("dBZ", (20, 36)) and clips.info()["thresholds"] == [20, 36]
    stored, back = clips.test_units(0, 1)[0, 0, 0, 0], clips.to_units(clips.test(0, 1))[0, 0, 0, 0]
    for threshold, count in ((20, 26), (36, 18)):
        assert (stored >= threshold).sum() == count
    assert any((back >= value).sum() != 36 - k for k, value in enumerate(array[0, 0].astype(float)))    # as it was


def test_other_values_have_another_checksum(tmp_path):
    array = numbered(100, dtype=np.float32) / 100
    first = opened(save(tmp_path / "film.npy", array), tmp_path).info()["checksum"]
    assert first == opened(save(tmp_path / "other.npy", array), tmp_path).info()["checksum"]
    array[40, 2, 3] = 0.123
    assert first != opened(save(tmp_path / "film.npy", array), tmp_path).info()["checksum"]


def test_units_of_levels_are_levels(tmp_path):
    clips = opened(save(tmp_path / "film.npy", numbered(100)), tmp_path)
    assert clips.to_units(torch.tensor([0.0, 1.0])).tolist() == [0, 255] and clips.info()["scale"] is None


# -------------------------------------------------------------------------------------------------------------- refused

def pickled():
    array = np.empty((30, 4, 4), object)
    array[:] = {"a": 1}
    return array


REFUSED = {
    "one axis": (lambda: np.zeros(30, np.uint8), "has shape (30,)"),
    "six axes": (lambda: np.zeros((1,) * 6, np.uint8), "has shape"),
    "no frames": (lambda: np.zeros((0, 4, 4), np.uint8), "has shape (0, 4, 4)"),
    "int32": (lambda: np.full((30, 4, 4), 7, np.int32), "from 7 to 7; what is not uint8 must lie in [0, 1]"),
    "complex": (lambda: np.zeros((30, 4, 4), complex), "holds complex128"),
    "text": (lambda: np.full((30, 4, 4), "a"), "holds <U1"),
    "record": (lambda: np.zeros((30, 4, 4), [("a", "u1")]), "holds"),
    "objects": (pickled, "pickled objects"),
    "channels": (lambda: np.zeros((3, 30, 17, 4, 4), np.uint8), "as MTCHW more than 16 channels"),
    "no data": (lambda: np.where(np.arange(30) // 5 == 1, np.nan, 0.5)[:, None, None] * np.ones((4, 4)),
                "no data at all (NaN) in frames 5 to 9"),
    "infinity": (lambda: np.where(np.arange(30) == 29, -np.inf, 0.5)[:, None, None] * np.ones((4, 4)), "in frame 29"),
    "below": (lambda: np.linspace(-0.1, 1, 30)[:, None, None] * np.ones((4, 4)), "--normalize"),
    "above": (lambda: np.linspace(0, 1.5, 30)[:, None, None] * np.ones((4, 4)), "from 0 to 1.5"),
    "short": (lambda: np.zeros((4, 4, 4), np.uint8), "films of 4 frames, fewer than one window of 3 + 2"),
    "short films": (lambda: np.zeros((50, 4, 1, 4, 4), np.uint8), "films of 4 frames"),
    "two windows": (lambda: np.zeros((10, 4, 4), np.uint8), "not one window of 3 + 2 each"),
    "Fortran": (lambda: np.asfortranarray(np.zeros((30, 4, 4), np.uint8)), "Fortran order"),
}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_what_is_refused(tmp_path, fault, suffix):
    make, text = REFUSED[fault]
    path = tmp_path / f"mine{suffix}"
    if suffix == ".npy":
        np.save(path, make())
    else:
        np.savez(path, train=make(), test=make())
    if (fault, suffix) == ("two windows", ".npz"):
        np.savez(path, train=make()[:9], test=make())
    with pytest.raises(data.DataError) as error:
        opened(path, tmp_path)
    assert text in str(error.value) and "\n" not in str(error.value)
    assert str(path) in str(error.value)
    assert not list(tmp_path.rglob("*.tmp"))


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x76\x00{'descr': 'oops'", b"PK\x03\x04",
                                     b"\x93NUMPY\x09\x00", b"hello" * 100])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_files_are_refused_by_name(tmp_path, content, suffix):
    path = tmp_path / f"mine{suffix}"
    path.write_bytes(content)
    with pytest.raises(data.DataError) as error:
        opened(path, tmp_path)
    assert "mine" in str(error.value) and "\n" not in str(error.value)
    assert os.listdir(tmp_path) == [path.name]


def test_truncated_files_are_refused_and_leave_nothing(tmp_path):
    path = save(tmp_path / "mine.npy", numbered(100))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(data.DataError, match="mine.npy cannot be read"):
        opened(path, tmp_path)
    packed = io.BytesIO()
    np.savez(packed, train=np.random.default_rng(0).integers(0, 256, (90, 64, 64), dtype=np.uint8), test=numbered(20))
    broken = bytearray(packed.getvalue())
    (tmp_path / "cut.npz").write_bytes(broken[:len(broken) // 2])
    broken[100_000] ^= 255                                                              # a wrong byte: the CRC tells
    (tmp_path / "bit.npz").write_bytes(broken)
    for name in ("cut.npz", "bit.npz"):
        with pytest.raises(data.DataError, match=f"{name} cannot be read"):
            opened(tmp_path / name, tmp_path)
    assert not list((tmp_path / "data").rglob("*.*"))


def test_other_faults(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("words")
    np.savez(tmp_path / "unlike.npz", train=numbered(30), test=numbered(30, height=5))
    with zipfile.ZipFile(tmp_path / "nothing.npz", "w"):
        pass
    save(tmp_path / "flat.npy", np.full((30, 4, 4), 0.5))
    for name, options, text in (("empty", {}, "an empty folder"), ("words.txt", {}, "is no array (.npy, .npz), film ("),
                                ("unlike.npz", {}, "must be alike"), ("nothing.npz", {}, "holds no array"),
                                ("flat.npy", {"normalize": "range"}, "0.5 everywhere"),
                                ("absent.npy", {}, "no dataset and no file is called")):
        with pytest.raises(data.DataError) as error:
            opened(tmp_path / name, tmp_path, **options)
        assert text in str(error.value) and name in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(data.DataError, match="--normalize"):
        data.open_data("moving_digits", normalize="range")
    (tmp_path / "data2").write_text("")
    with pytest.raises(data.DataError, match="cannot make the folder"):
        data.open_data(save(tmp_path / "fine.npy", numbered(100)), tmp_path / "data2", frames_in=3, horizon=2)


ADVICE = {      # an array that is refused, and what its refusal says, done
    "infinity": (lambda: np.where(np.arange(24).reshape(4, 6) == 3, np.inf, numbered(100) / 100),
                 "numpy.where(numpy.isfinite(a), a, numpy.nan)", lambda a: np.where(np.isfinite(a), a, np.nan), {}),
    "integers": (lambda: numbered(100).astype(np.int16) * 9, "--normalize", lambda a: a, {"normalize": "range"}),
    "negative": (lambda: numbered(100) - 50.0, "--normalize LOW HIGH", lambda a: a, {"normalize": [-50, 50]}),
    "Fortran": (lambda: np.asfortranarray(numbered(100)), "numpy.ascontiguousarray(a)", np.ascontiguousarray, {}),
    "objects": (lambda: np.array([*numbered(100), None], object)[:-1], "numpy.stack(a).astype(float)",
                lambda a: np.stack(a).astype(float), {"normalize": "range"}),
    "complex": (lambda: numbered(100).astype(complex), "a.astype(float)",
                lambda a: a.real.astype(float), {"normalize": "range"}),
    "channels": (lambda: np.zeros((3, 30, 17, 4, 4), np.uint8), "--layout says what its axes are",
                 lambda a: a.reshape(90, 17, 4, 4), {"layout": "MTHW"}),
    "short": (lambda: numbered(12), "lower --frames-in or --horizon", lambda a: a, {"frames_in": 2, "horizon": 1}),
}


@pytest.mark.parametrize("fault", ADVICE)
def test_the_way_out_of_a_refusal_works(tmp_path, fault):
    make, text, follow, options = ADVICE[fault]
    array = make()
    with pytest.raises(data.DataError) as error:
        opened(save(tmp_path / "mine.npy", array), tmp_path)
    assert text in str(error.value)
    assert opened(save(tmp_path / "mine.npy", follow(array)), tmp_path, **options).train(0, 0, 2).shape[0] == 2


def test_an_option_that_does_not_go_with_the_data_is_named(tmp_path):
    path = save(tmp_path / "film.npy", numbered(100))
    for name, options, text in (("moving_digits", {"layout": "NHW"}, "--layout is for files of your own, not for mov"),
                                ("moving_digits", {"thresholds": [1]}, "--thresholds is for files of your own"),
                                (str(path), {"box": [1, 2, 3, 4]}, "--box is for typhoon, not for"),
                                (str(path), {"channels": 3}, "--channels is for films and images, not for")):
        with pytest.raises(data.DataError, match=text):
            data.open_data(name, tmp_path / "data", **options)
    assert data.open_data("moving_digits", normalize=None, box=None).name == "moving_digits"


# --------------------------------------------------------------------------------------------- more than one array

LENGTHS = (12, 4, 20, 9, 5, 15)


def unequal(directory=None):
    """Films of unequal length, one too short for a window, whose pixels are 100 · film + frame; also as .npy files."""
    films = [100 * k + np.arange(length)[:, None, None] * np.ones((4, 6), np.int16) for k, length in enumerate(LENGTHS)]
    films = [film.astype(np.int16) for film in films]
    if directory:
        directory.mkdir()
        for k, film in enumerate(films):
            np.save(directory / f"film{k + 8}.npy", film)                               # film8, film9, film10, …
    return films


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_films_of_unequal_length(tmp_path, form):
    path = tmp_path / ("films" if form == "folder" else "films.npz")
    films = unequal(path if form == "folder" else None)
    if form == "npz":
        np.savez(path, *films)
    else:
        (path / "._film8.npy").write_bytes(b"a Mac's")
        (path / "readme.txt").write_text("words")
    clips = opened(path, tmp_path, normalize=[0, 1000])
    assert clips.name == ("films" if form == "folder" else "films_npz")

    def windows(part):
        frames = clips.train(0, 0, clips.train_count) if part == "train" else getattr(clips, part)(0, 99)
        return sorted(map(tuple, (clips.to_units(frames)[:, :, 0, 0, 0].round().long().tolist())))

    def whole(film, stride):
        return [tuple(range(100 * film + k, 100 * film + k + 5)) for k in range(0, LENGTHS[film] - 4, stride)]

    assert windows("test") == whole(5, 2)                               # the last tenth of the frames, as whole films
    assert windows("valid") == whole(4, 2)                              # of the 50 frames before, the last 5
    assert windows("train") == whole(0, 1) + whole(2, 1) + whole(3, 1)
    notes = " ".join(clips.notes)
    assert "films: 6 of 4 to 20 frames" in notes and "1 of 6 films are passed over, shorter than 3 + 2 frames" in notes
    assert ("1 files passed over, such as readme.txt" in notes) == (form == "folder")


def test_arrays_that_are_unlike_are_refused(tmp_path):
    np.savez(tmp_path / "films.npz", numbered(30), numbered(30).astype(np.float32))
    with pytest.raises(data.DataError, match=r"films.npz \(arr_1\) has frames \(1, 4, 6\) of float32, those before it"):
        opened(tmp_path / "films.npz", tmp_path)
    np.savez(tmp_path / "coordinates.npz", rain=numbered(60), latitude=np.arange(4.0))
    with pytest.raises(data.DataError, match=r"coordinates.npz \(latitude\) has shape \(4,\)"):
        opened(tmp_path / "coordinates.npz", tmp_path)
    assert not (tmp_path / "data").exists()


ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="films and images are read through ffmpeg")


def encode(path, frames, *options):
    """A film or an image, without loss, of frames (N, H, W, 3)."""
    count, height, width, _ = frames.shape
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}",
                    "-r", "10", "-i", "-", *options, str(path)], input=frames.tobytes(), check=True)
    return path


def colours(count, height=16, width=24):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@ffmpeg
def test_a_film_gives_every_frame_once_grey_or_in_colour(tmp_path):
    frames = colours(40)
    # frame k is shown at k² / 30 seconds: at a constant rate, frames would be dropped and repeated
    path = encode(tmp_path / "clip.mkv", frames, "-vf", "setpts=N*N/30/TB", "-vsync", "0", "-c:v", "ffv1", "-pix_fmt",
                  "gbrp")
    clips = opened(path, tmp_path, channels=3)
    assert (clips.channels, clips.size, clips.test_count, clips.name) == (3, (16, 24), 1, "clip_mkv")
    assert (clips.test_units(0, 1)[0].permute(0, 2, 3, 1).numpy() == frames[35:]).all()
    assert "films: 1 of 40 frames" in clips.notes[0] and "read by ffmpeg as 8-bit colour" in clips.notes[0]
    grey = opened(path, tmp_path)
    expected = frames[35:] @ [0.299, 0.587, 0.114]                                      # ITU-R BT.601
    assert grey.channels == 1 and np.abs(grey.test_units(0, 1)[0, :, 0].numpy() - expected).max() <= 1.5
    arrays = sorted((tmp_path / "data" / "own").glob("clip-*/frames-*.npy"))
    times = [array.stat().st_mtime_ns for array in arrays]
    assert len(arrays) == 2 and opened(path, tmp_path, channels=3).test(0, 1).equal(clips.test(0, 1))
    assert [array.stat().st_mtime_ns for array in arrays] == times                      # unpacked once


@ffmpeg
def test_a_folder_of_images_is_a_film_and_one_of_films_several(tmp_path):
    frames = colours(21)
    for name in ("images", "films"):
        (tmp_path / name).mkdir()
    for k, frame in enumerate(frames[:11]):                                             # frame2 comes before frame10
        (tmp_path / "images" / f"frame{k}.ppm").write_bytes(b"P6 24 16 255\n" + frame.tobytes())
    (tmp_path / "images" / "frame9.ppm").unlink()
    encode(tmp_path / "images" / "frame9.png", frames[9:10], "-frames:v", "1")
    (tmp_path / "images" / "._frame0.png").write_bytes(b"a Mac's")
    clips = opened(tmp_path / "images", tmp_path, frames_in=2, horizon=1, channels=3)
    assert (clips.test_units(0, 1)[0].permute(0, 2, 3, 1).numpy() == frames[8:11]).all() and clips.name == "images"
    (tmp_path / "images" / "frame11.ppm").write_bytes(b"P6 24 18 255\n" + bytes(3 * 24 * 18))
    with pytest.raises(data.DataError, match="frame11.ppm has 24 x 18 pixels, frame0.ppm 24 x 16"):
        opened(tmp_path / "images", tmp_path)
    for name, some in (("a.mkv", frames[:5]), ("b.mkv", frames[5:12]), ("c.avi", frames[12:])):
        encode(tmp_path / "films" / name, some, "-c:v", "ffv1", "-pix_fmt", "bgr0")
    clips = opened(tmp_path / "films", tmp_path, channels=3)
    assert "films: 3 of 5 to 9 frames" in clips.notes[0]
    assert (clips.test_units(0, 1)[0].permute(0, 2, 3, 1).numpy() == frames[12:17]).all()


@ffmpeg
def test_films_that_cannot_be_read(tmp_path, monkeypatch):
    path = encode(tmp_path / "clip.mkv", colours(40), "-c:v", "ffv1")
    whole = path.read_bytes()
    (tmp_path / "words.mkv").write_text("words")
    with pytest.raises(data.DataError, match="words.mkv cannot be read by ffmpeg"):
        opened(tmp_path / "words.mkv", tmp_path)
    (tmp_path / "list.mp4").write_text(f"#EXTM3U\n#EXTINF:1,\n{path}\n")              # a list that names another file
    with pytest.raises(data.DataError, match="list.mp4 cannot be read by ffmpeg"):
        opened(tmp_path / "list.mp4", tmp_path)
    (tmp_path / "cut.mkv").write_bytes(whole[:len(whole) * 3 // 4])
    clips = opened(tmp_path / "cut.mkv", tmp_path)
    assert "films: 1 of 29 frames" in clips.notes[0] or "films: 1 of 30 frames" in clips.notes[0]
    assert any("frames of cut.mkv and says:" in note for note in clips.notes)
    with pytest.raises(data.DataError, match="--layout is for arrays, not for"):
        opened(path, tmp_path, layout="NHW")
    monkeypatch.setenv("PATH", "")
    assert opened(tmp_path / "cut.mkv", tmp_path).test_count                            # unpacked before
    with pytest.raises(data.DataError, match="clip.mkv is read through the program ffmpeg, which is not installed"):
        opened(path, tmp_path)


# ----------------------------------------------------------------------------------------------------------------- kept

def test_a_file_is_checked_once_until_it_changes(tmp_path, monkeypatch):
    path = save(tmp_path / "film.npy", numbered(100) / 100)
    looks = []
    look = data.frame_ranges
    monkeypatch.setattr(data, "frame_ranges", lambda *arguments: looks.append(1) or look(*arguments))
    for horizon in (2, 3, 2):
        opened(path, tmp_path, horizon=horizon)
        assert len(looks) == 1
    array = numbered(100) / 100
    array[50] = np.inf
    save(path, array)
    with pytest.raises(data.DataError, match="frame 50"):
        opened(path, tmp_path)
    assert not list(tmp_path.rglob("*.tmp"))


def test_ranges_that_a_version_before_kept_are_used(tmp_path):
    """In the form that they have always had; they are not the file's, which tells."""
    path, ranges = save(tmp_path / "film.npy", numbered(100)), np.array([[[0.0, 250.0, 0.0]]] * 100)
    stat = path.stat()
    state = [str(path), stat.st_size, stat.st_mtime_ns, (100, 1, 4, 6), (24, 24, 6, 1)]
    mark, name = (hashlib.sha256(text.encode()).hexdigest()[:12] for text in (str(path), repr(state)))
    folder = tmp_path / "data" / "own" / f"film-{mark}"
    folder.mkdir(parents=True)
    (folder / f"ranges-{name}").write_bytes(hashlib.sha256(ranges.tobytes()).digest() + ranges.tobytes())
    assert "uint8 from 0 to 250, read as NHW" in opened(path, tmp_path).notes[0]
    assert os.listdir(folder) == [f"ranges-{name}"]


def test_pieces_make_no_difference(tmp_path, monkeypatch):
    array = np.random.default_rng(0).random((57, 1, 4, 6))
    array[20, 0, 1, 1] = array[30] = np.nan
    whole = data.frame_ranges(array, "x")
    monkeypatch.setattr(data, "PIECE", 1000)
    assert np.array_equal(data.frame_ranges(array, "x"), whole, equal_nan=True)
    assert np.array_equal(whole[:, 0, 0], [np.nan if k == 30 else np.nanmin(array[k]) for k in range(57)], True)
    assert np.array_equal(whole[:, 0, 1], [np.nan if k == 30 else np.nanmax(array[k]) for k in range(57)], True)
    assert whole[:, 0, 2].nonzero()[0].tolist() == [20, 30] and whole[[20, 30], 0, 2].tolist() == [1, 24]
    array[31, 0, 2, 3] = np.inf
    with pytest.raises(data.DataError, match="frame 31"):
        data.frame_ranges(array, "x")


def bytes_of(array):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


LIMITED = """
import re, resource, sys
sys.path.insert(0, {root!r})
import data, torch
from convlstm import ConvLSTM
model = ConvLSTM(channels=1, size=64, hidden=4, layers=1)
optimiser = torch.optim.Adam(model.parameters())       # before the limit: under torch 2.6 this imports half of torch
held = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10    # with CUDA 0.6 GB
limit = held + (600 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    bytearray(limit)
except MemoryError:
    pass
else:
    sys.exit("the limit does not hold")
clips = data.open_data({path!r}, {folder!r}, frames_in=10, horizon=10)
for iteration in range(3):
    frames = clips.train(0, iteration, 8)
    optimiser.zero_grad()
    ((model(frames) - frames[:, 1:]) ** 2).sum().backward()
    optimiser.step()
print(clips.train_count, frames.shape, clips.test(0, 4).mean().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what it should on Linux only")
@pytest.mark.parametrize("suffix", [".npy", pytest.param(".npz", marks=pytest.mark.slow)])
def test_an_array_larger_than_memory_trains(tmp_path, suffix):
    path = tmp_path / "large.npy"
    array = np.lib.format.open_memmap(path, "w+", np.uint8, (300_000, 64, 64))           # 1.2 GB, sparse: takes no room
    array[-30_000:-29_900] = 255
    del array
    if suffix == ".npz":
        with zipfile.ZipFile(path.with_suffix(".npz"), "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            archive.write(path, "train.npy")
            archive.writestr("test.npy", bytes_of(np.full((100, 64, 64), 255, np.uint8)))
        path = path.with_suffix(".npz")
    script = LIMITED.format(root=str(Path(data.__file__).parent), path=str(path), folder=str(tmp_path / "data"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split(" ", 1)[0] == ("242981" if suffix == ".npy" else "269981")
    assert "[8, 20, 1, 64, 64]" in done.stdout and done.stdout.endswith(" 1.0\n")


# ---------------------------------------------------------------------------------------------------------------- films

INFO = {"frames_in": 3, "test_horizon": 2, "channels": 1, "size": [4, 6], "scale": None}


def films_of(path, tmp_path, info=INFO, any_size=False, **options):
    return data.open_films(path, tmp_path / "data", info, options, any_size)


@pytest.mark.parametrize("axes", [3, 4, 5])
def test_films_give_their_last_frames_and_take_the_forecast_back(tmp_path, axes):
    array = np.random.default_rng(0).integers(0, 256, (2, 7, 1, 4, 6), dtype=np.uint8)
    array = array if axes == 5 else array[0] if axes == 4 else array[0, :, 0]
    films = films_of(save(tmp_path / "x.npy", array), tmp_path)
    frames = films.test(0, films.test_count)
    assert films.test_count == (2 if axes == 5 else 1) and frames.dtype == torch.float32
    saved = films.as_file(frames)
    expected = array[:, -3:] if axes == 5 else array[-3:]
    assert saved.dtype == np.uint8 and saved.shape == expected.shape and (saved == expected).all()
    assert films.as_file(torch.full_like(frames, 1.7)).min() == 255


def test_films_are_scaled_as_the_run_was(tmp_path):
    array = np.linspace(-50, 217, 7 * 24).reshape(7, 4, 6)
    path = save(tmp_path / "x.npy", array)
    films = films_of(path, tmp_path, {**INFO, "scale": [-50, 217]})
    assert films.test(0, 1).max() == 1 and np.allclose(films.as_file(films.test(0, 1)), array[-3:], atol=1e-4)
    assert films.as_file(films.test(0, 1)).dtype == np.float64
    with pytest.raises(data.DataError, match="must lie in"):
        films_of(path, tmp_path)
    floats = films_of(save(path, array.clip(0, 1).astype(np.float32)), tmp_path)
    assert (floats.as_file(floats.test(0, 1)) == array.clip(0, 1).astype(np.float32)[-3:]).all()


def test_films_that_cannot_be_forecast(tmp_path):
    nan = np.zeros((5, 4, 6), np.float32)
    nan[2:] = np.nan
    early = np.zeros((5, 4, 6), np.float32)
    early[1] = np.nan
    for name, array, text in (("short", numbered(2), "films of 2 frames, fewer than one window of 3"),
                              ("nan", nan, "no data at all"),
                              ("size", numbered(9, height=5), "the model takes 1 x 4 x 6"),
                              ("channels", numbered(9, 2), "2 x 4 x 6"), ("int", np.full((9, 4, 6), 5), "from 5 to 5")):
        with pytest.raises(data.DataError) as error:
            films_of(save(tmp_path / f"{name}.npy", array), tmp_path)
        assert text in str(error.value) and f"{name}.npy" in str(error.value) and "\n" not in str(error.value)
    assert films_of(save(tmp_path / "early.npy", early), tmp_path).test(0, 1).sum() == 0    # before what is read
    for name in ("absent.npy", "x.txt"):
        with pytest.raises(data.DataError, match=name):
            films_of(tmp_path / name, tmp_path)


def test_every_window_of_another_file_is_for_the_test(tmp_path):
    run = opened(save(tmp_path / "film.npy", numbered(100, dtype=np.float64)), tmp_path, normalize="range", unit="mm",
                 thresholds=[2])
    storm = save(tmp_path / "storm.npy", numbered(13, dtype=np.float64) * 10)
    clips = data.open_test(storm, tmp_path / "data", run.info())
    assert (clips.test_count, clips.train_count, clips.frames_in, clips.test_horizon) == (5, 0, 3, 2)
    assert clips.test_units(0, 9)[:, :, 0, 0, 0].tolist() == [[10.0 * n for n in range(k, k + 5)]
                                                              for k in (0, 2, 4, 6, 8)]
    assert clips.info()["scale"] == [0, 89] and (clips.unit, clips.thresholds) == ("mm", (2,)) and clips.own
    assert "what lies outside the scale is clipped" in " ".join(clips.notes)
    assert "frames 0 to 12 of storm.npy" in clips.test_set
    longer = data.open_test(storm, tmp_path / "data", run.info(), {"thresholds": [5], "unit": "m"}, horizon=6)
    assert longer.test(0, 9).shape == (1, 9, 1, 4, 6) and (longer.unit, longer.thresholds) == ("m", (5,))
    with pytest.raises(data.DataError, match="films of 13 frames, fewer than one window of 3 [+] 11: lower --horizon"):
        data.open_test(storm, tmp_path / "data", run.info(), horizon=11)
    large = save(tmp_path / "large.npy", numbered(13, height=8, dtype=np.float64))
    with pytest.raises(data.DataError, match="frames of 1 x 8 x 6 .*, the model takes 1 x 4 x 6"):
        data.open_test(large, tmp_path / "data", run.info())
    assert data.open_test(large, tmp_path / "data", run.info(), any_size=True).size == (8, 6)


def test_films_of_any_form_and_size_are_forecast(tmp_path):
    films = unequal(tmp_path / "films")
    np.savez(tmp_path / "films.npz", *films)
    info = {**INFO, "scale": [0, 1000]}
    for path in (tmp_path / "films", tmp_path / "films.npz"):
        found = films_of(path, tmp_path, info)
        assert found.test_count == 6
        saved = found.as_file(found.test(0, 6))
        assert saved.dtype == np.int16 and (saved == np.stack([film[-3:] for film in films])).all()
    large = films_of(save(tmp_path / "large.npy", numbered(9, height=32, width=48)), tmp_path, any_size=True)
    assert large.size == (32, 48) and (large.as_file(large.test(0, 1)) == numbered(9, height=32, width=48)[-3:]).all()
    with pytest.raises(data.DataError, match="the model takes 1$"):
        films_of(save(tmp_path / "two.npy", numbered(9, 2)), tmp_path, any_size=True)
    holes = np.where(np.arange(6) == 2, np.nan, numbered(9) / 10)
    found = films_of(save(tmp_path / "holes.npy", holes), tmp_path)
    assert found.masked and found.test(0, 1).isnan().sum() == 3 * 4


@ffmpeg
def test_a_film_of_the_runs_colours_is_forecast(tmp_path):
    frames = colours(9)
    path = encode(tmp_path / "clip.mkv", frames, "-c:v", "ffv1", "-pix_fmt", "gbrp")
    # whatever the run's own data needed: a layout, a scale
    films = films_of(path, tmp_path, {**INFO, "channels": 3, "size": [16, 24]}, layout="NHW", normalize="range")
    saved = films.as_file(films.test(0, 1))
    assert saved.shape == (3, 16, 24, 3) and saved.dtype == np.uint8 and (saved == frames[-3:]).all()


def test_names_that_are_no_utf8_are_printable(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9gion\n.npy"))
    clips = opened(save(path, numbered(100)), tmp_path)
    for text in (clips.name, clips.test_set, *clips.notes):
        assert text.encode() and "\n" not in text and "r\\udce9gion" in text
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.npz"))
    np.savez(path, numbered(30), numbered(40))
    assert opened(path, tmp_path).test_count and opened(path, tmp_path).test_count
    with pytest.raises(data.DataError, match=r"\\udce9.npy has films of 3 frames"):
        opened(save(path.with_suffix(".npy"), numbered(3)), tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_fuzzed_headers_are_refused_or_read(tmp_path):
    rng = np.random.default_rng(0)
    whole = bytes_of(numbered(60))
    path = tmp_path / "mine.npy"
    accepted = 0
    for _ in range(1000):
        head = bytearray(whole[:128])
        for at in rng.integers(0, 90, rng.integers(1, 4)):
            head[at] = rng.choice(list(b"0123456789(),: <>|ufObi{}'") if rng.random() < 0.7 else np.arange(256))
        path.write_bytes(bytes(head) + whole[128:])
        try:
            assert opened(path, tmp_path).train(0, 0, 2).isfinite().all()
            accepted += 1
        except data.DataError as error:
            assert "mine.npy" in str(error) and "\n" not in str(error)
    assert 0 < accepted < 300
    huge = whole[:128].replace(b"(60, 4, 6)", b"(9" + b"9" * 30 + b", 4, 6)")[:128 - 31] + b"\n"
    path.write_bytes(huge.ljust(128, b"\n") + whole[128:])
    with pytest.raises(data.DataError, match="mine.npy"):
        opened(path, tmp_path)
