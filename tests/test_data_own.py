"""Arrays of one's own: layouts, windows, parts, missing values, scales, what is refused, and films to forecast."""

import json
import re

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


def test_one_film_is_cut_into_windows_and_parts(tmp_path):
    clips = opened(save(tmp_path / "film.npy", numbered(100)), tmp_path)
    assert (clips.name, clips.channels, clips.size) == ("film_npy", 1, (4, 6))
    assert all_training(clips) == [list(range(k, k + 5)) for k in range(77)]            # 0 … 80; the rest is held back
    assert everything(clips, "valid") == [[81, 82, 83, 84, 85], [83, 84, 85, 86, 87], [85, 86, 87, 88, 89]]
    assert everything(clips, "test") == [[90, 91, 92, 93, 94], [92, 93, 94, 95, 96], [94, 95, 96, 97, 98]]
    assert clips.train(0, 0, 2).dtype == torch.float32 and clips.train(0, 0, 2).shape == (2, 5, 1, 4, 6)
    assert "film.npy" in clips.test_set and json.dumps(clips.info())


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


@pytest.mark.parametrize("names", [("train", "test"), ("X_train", "X_test"), ("x_train", "TEST")])
def test_names_say_which_part_an_array_is(tmp_path, names):
    path = tmp_path / "two.npz"
    np.savez(path, **{names[0]: numbered(50), names[1]: numbered(12) + 100, "Y_train": numbered(50), "lat": np.zeros(4)})
    clips = opened(path, tmp_path)
    assert clips.name == "two_npz" and max(max(window) for window in all_training(clips)) == 44
    assert everything(clips, "valid")[0] == [45, 46, 47, 48, 49]
    assert [window[0] for window in everything(clips, "test")] == [100, 102, 104, 106]
    assert f"{path}: read are {', '.join(names)}; not read: Y_train, lat" in clips.notes
    other = data.open_other(path, clips.info(), {})                                     # not what the run trained on
    assert everything(other, "test") == everything(clips, "test")


@pytest.mark.parametrize("name", ["val", "valid", "X_val", "validation"])
def test_a_validation_part_is_taken(tmp_path, name):
    np.savez(tmp_path / "x.npz", test=numbered(10) + 200, train=numbered(20), **{name: numbered(7) + 100})
    clips = opened(tmp_path / "x.npz", tmp_path)
    assert len(all_training(clips)) == 16 and all_training(clips)[-1] == [15, 16, 17, 18, 19]
    assert everything(clips, "valid") == [[100, 101, 102, 103, 104], [102, 103, 104, 105, 106]]
    assert [window[0] for window in everything(clips, "test")] == [200, 202, 204]
    np.savez(tmp_path / "x.npz", train=numbered(40), **{name: numbered(7) + 100})       # then the test is cut off train
    clips = opened(tmp_path / "x.npz", tmp_path)
    assert everything(clips, "test") == [[35, 36, 37, 38, 39]] and everything(clips, "valid")[0][0] == 100
    assert all_training(clips)[-1] == [30, 31, 32, 33, 34]


def test_a_line_says_how_an_array_was_read(tmp_path):
    clips = opened(save(tmp_path / "film.npy", numbered(200)), tmp_path)
    assert clips.info()["notes"] == [
        f"{tmp_path}/film.npy: NHW, 1 film(s) of 200 frames, 1 channel(s) of 4×6, uint8 from 0 to 199, scale 0.0 to 255.0, "
        f"windows of 3 + 2: 158 train, 7 valid, 8 test"]
    films = np.random.default_rng(0).random((8, 7, 2, 4, 6), dtype=np.float32).clip(0.25, 0.75)
    line, = opened(save(tmp_path / "films.npy", films), tmp_path).notes
    assert ("MTCHW, 8 film(s) of 7 frames, 2 channel(s) of 4×6, float32 from 0.25 to 0.75, scale 0.0 to 1.0, windows of "
            "3 + 2: 18 train, 2 valid, 2 test") in line


LAYOUTS = {"NHW": (40, 4, 6), "NCHW": (40, 3, 4, 6), "NHWC": (40, 4, 6, 3), "MTHW": (4, 10, 4, 6),
           "TMHW": (10, 4, 4, 6),
           "MTCHW": (4, 10, 3, 4, 6), "MTHWC": (4, 10, 4, 6, 3)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_every_layout_is_read_as_it_says(tmp_path, layout, suffix):
    array = np.random.default_rng(0).integers(0, 256, LAYOUTS[layout], dtype=np.uint8)
    path = tmp_path / f"mine{suffix}"
    np.save(path, array) if suffix == ".npy" else np.savez(path, array)
    clips = opened(path, tmp_path, layout=layout.lower())                                # its case does not matter
    film = array[-1] if layout[0] == "M" else array[:, -1] if layout[0] == "T" else array
    film = film[..., None] if "C" not in layout else film if layout[-1] == "C" else np.moveaxis(film, 1, -1)
    assert (clips.channels, clips.size) == (3 if "C" in layout else 1, (4, 6))
    first = 35 if layout[0] == "N" else 0                                               # the last film, or its end
    for units in (clips.test_units(0, 1), clips.to_units(clips.test(0, 1))):
        assert np.allclose(units[0].permute(0, 2, 3, 1), film[first:first + 5], atol=1e-4)
    films = films_of(path, {**INFO, "channels": clips.channels}, layout=layout)
    saved = films.as_file(films.test(0, films.test_count))
    assert saved.dtype == np.uint8
    assert (saved == (array[:, -3:] if layout[0] == "M" else array[-3:])).all()


def axes(*shape):
    return data.axes_of(shape, None, "x.npy")


def test_what_a_shape_says_is_not_asked_for(tmp_path):
    for shape, layout in (((40, 8, 9), "NHW"), ((40, 3, 8, 9), "NCHW"), ((40, 8, 9, 1), "NHWC"), ((8, 4, 32, 32), "NCHW"),
                          ((4, 5, 2, 8, 9), "MTCHW"), ((4, 5, 3, 8, 3), "MTCHW"), ((20, 10_000, 64, 64), "TMHW")):
        assert axes(*shape) == layout
    assert data.axes_of((20, 50, 64, 64), None, tmp_path / "mnist_test_seq.npy") == "TMHW"


@pytest.mark.parametrize("shape, readings", [
    ((8, 10, 32, 32), ["NCHW (8 frames, 10×32×32)", "MTHW (8 films of 10 frames, 1×32×32)",
                       "TMHW (10 films of 8 frames, 1×32×32)"]),
    ((40, 20, 32, 32), ["MTHW (40 films of 20 frames, 1×32×32)", "TMHW (20 films of 40 frames, 1×32×32)"]),
    ((40, 3, 32, 3), ["NCHW (40 frames, 3×32×3)", "NHWC (40 frames, 3×3×32)", "MTHW (40 films of 3 frames, 1×32×3)",
                      "TMHW (3 films of 40 frames, 1×32×3)"]),
    ((8, 10, 12, 12, 3), ["MTCHW (8 films of 10 frames, 12×12×3)", "MTHWC (8 films of 10 frames, 3×12×12)"]),
    ((64, 64, 500), ["NHW (64 frames, 1×64×500)"])])
def test_what_could_be_read_in_more_ways_is_refused_and_every_way_works(tmp_path, shape, readings):
    path = tmp_path / "x.npy"
    np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    with pytest.raises(data.DataError) as error:
        opened(path, tmp_path, frames_in=1, horizon=1)
    assert f"{path} has shape {shape}; say what it is: --layout {' or --layout '.join(readings)}, with" in str(error.value)
    for layout in re.findall(r"--layout (\w+)", str(error.value)):
        assert f"x.npy: {layout}, " in opened(path, tmp_path, frames_in=1, horizon=1, layout=layout).notes[0]
    assert ("save numpy.moveaxis(a, -1, 0)" in str(error.value)) == (len(shape) == 3)
    with pytest.raises(data.DataError, match="not --layout NHWCX"):
        opened(path, tmp_path, layout="NHWCX")


def test_the_standard_test_file_is_read_as_it_is_meant(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (20, 6, 64, 64), dtype=np.uint8)
    clips = opened(save(tmp_path / "mnist_test_seq.npy", array), tmp_path, frames_in=10, horizon=10)
    assert (clips.train_count, clips.valid_count, clips.test_count) == (4, 1, 1)
    assert (clips.test_units(0, 1)[0, :, 0].numpy() == array[:, 5]).all()
    films = films_of(tmp_path / "mnist_test_seq.npy", {**INFO, "size": [64, 64]})
    assert (films.as_file(films.test(0, 6)) == array[-3:]).all()


def holes():
    """Two channels of floats; a corner of the second is missing, and all of frame 95."""
    array = np.random.default_rng(0).random((100, 2, 4, 6)).astype(np.float32)
    array[:, 1, :2, :2] = array[95] = np.nan
    return array


def test_nan_is_no_data(tmp_path):
    array = holes()
    clips = opened(save(tmp_path / "film.npy", array), tmp_path, layout="NCHW")
    assert clips.masked and clips.info()["masked"] and clips.own
    window = array[94:99]
    for found in (clips.test(2, 3), clips.test_units(2, 3), clips.to_units(clips.test(2, 3))):
        assert np.array_equal(found[0].float().numpy(), window, equal_nan=True)
    assert clips.train(0, 0, 4).isnan().sum() == 4 * 5 * 4
    # of 99 frames 4 of 48 values, of one all: (99 · 4 + 48) / 4800
    assert any("9.25% of the values are missing (NaN: not measured): the network reads 0 there" in note for note in clips.notes)
    assert not opened(save(tmp_path / "film.npy", np.nan_to_num(array)), tmp_path, layout="NCHW").masked


def test_a_window_without_any_data_is_refused_and_the_way_out_works(tmp_path):
    array = np.random.default_rng(0).random((100, 4, 6))
    array[20:24] = np.nan
    assert opened(save(tmp_path / "film.npy", array), tmp_path).masked                  # one of five frames is left
    array[24] = np.nan
    with pytest.raises(data.DataError, match=r"no data at all \(NaN\) in frames 20 to 24.*two arrays of a .npz"):
        opened(save(tmp_path / "film.npy", array), tmp_path)
    np.savez(tmp_path / "film.npz", array[:20], array[25:])
    clips = opened(tmp_path / "film.npz", tmp_path)
    assert not clips.masked and "2 film(s) of 20 to 75 frames" in clips.notes[0]


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
    films = films_of(path, {**INFO, "scale": [0, 100]})
    saved = films.as_file(films.test(0, 1))
    assert saved.dtype == array.dtype and np.allclose(saved, array[-3:], rtol=1e-3)


def test_a_forecast_stays_within_the_integers_of_the_file(tmp_path):
    """The top of the range of 64-bit integers, too, is none that a float64 holds."""
    for code in ("i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8"):
        least, most = np.iinfo(code).min, np.iinfo(code).max
        path = save(tmp_path / "x.npy", np.full((9, 4, 6), 7, code))
        films = films_of(path, {**INFO, "scale": [float(least), float(most)]})
        saved = films.as_file(torch.ones(1, 2, 1, 4, 6))
        assert saved.dtype == code and (saved == most).all() and (films.as_file(torch.zeros(1, 2, 1, 4, 6)) == least).all()
    films = films_of(save(tmp_path / "x.npy", np.full((9, 4, 6), 7, np.int8)), {**INFO, "scale": [0, 1000]})
    assert (films.as_file(torch.ones(1, 2, 1, 4, 6)) == 127).all()
    films = films_of(save(tmp_path / "x.npy", np.zeros((9, 4, 6), bool)))
    assert not films.as_file(torch.full((1, 2, 1, 4, 6), 0.3)).any()


def test_normalize_scales_by_the_training_part_and_is_undone(tmp_path):
    array = numbered(100, dtype=np.float64) * 3 - 50
    clips = opened(save(tmp_path / "film.npy", array), tmp_path, normalize="range")
    assert clips.info()["scale"] == [-50, 217] and "are clipped" in clips.notes[2]
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
    clips = opened(save(tmp_path / "film.npy", array), tmp_path, normalize="range", layout="NCHW")
    assert clips.info()["scale"] == [[0, 950], [4, 1050]]
    frames, expected = clips.test(0, 1)[0].numpy(), array[90:95]
    assert np.allclose(frames[:, 0], expected[:, 0] / 4) and np.allclose(frames[:, 1], (expected[:, 1] - 950) / 100)
    assert np.allclose(clips.to_units(clips.test(0, 1))[0], expected) and (clips.test_units(0, 1)[0] == expected).all()
    assert "scaled by the training part's minimum and maximum, [0.0, 950.0] … [4.0, 1050.0]" in clips.notes[1]
    films = films_of(tmp_path / "film.npy", {**INFO, "channels": 2, "scale": clips.info()["scale"]}, layout="NCHW")
    assert np.allclose(films.as_file(films.test(0, 1)), array[-3:])
    array[:, 1] = 1000
    with pytest.raises(data.DataError, match="channel 2 of the training part is 1000 everywhere: --normalize LOW HIGH"):
        opened(save(tmp_path / "film.npy", array), tmp_path, normalize="range", layout="NCHW")
    assert opened(tmp_path / "film.npy", tmp_path, normalize=[0, 1050], layout="NCHW").channels == 2   # the advice, taken


def test_a_fixed_scale_is_shared_and_counts_what_it_clips(tmp_path):
    calm, storm = np.linspace(0, 50, 100), np.linspace(-32, 75, 100)
    for name, values in (("calm", calm), ("storm", storm)):
        path = save(tmp_path / f"{name}.npy", values[:, None, None] * np.ones((4, 6)))
        clips = opened(path, tmp_path, normalize=[0, 70])
        assert clips.info()["scale"] == [0, 70] and clips.unit is None
        assert np.allclose(clips.test(0, 1)[0, :, 0, 0, 0], (values[90:95] / 70).clip(0, 1))
        count = 24 * ((values < 0) | (values > 70)).sum()
        said = f"{count} values are clipped, they go from -32 to 75, the scale from 0.0 to 70.0; where -32 means no data"
        assert (said in " ".join(clips.notes)) == (name == "storm")
    for ends in ([70, 0], [5, 5], [0, np.nan], [0, np.inf], [-1.7e308, 1.7e308]):
        with pytest.raises(data.DataError, match="is no scale"):
            opened(tmp_path / "calm.npy", tmp_path, normalize=ends)


def test_a_number_that_means_no_data_is_said_and_the_way_out_works(tmp_path):
    array = np.random.default_rng(0).uniform(0, 70, (100, 4, 6))
    array[3:50, 1, 2] = -999
    clips = opened(save(tmp_path / "x.npy", array), tmp_path, normalize=[0, 70])
    assert "47 values are clipped" in clips.notes[1] and clips.notes[1].endswith("numpy.where(a == -999, numpy.nan, a)")
    clips = opened(save(tmp_path / "x.npy", np.where(array == -999, np.nan, array)), tmp_path, normalize=[0, 70])
    assert clips.masked and not any("clipped" in note for note in clips.notes)
    rain = {**INFO, "scale": "rain"}
    assert any("from -999 to" in note for note in films_of(save(tmp_path / "x.npy", array), rain).notes)


@pytest.mark.parametrize("top, said", [(1, True), (100, True), (127, True), (128, False), (255, False)])
def test_masks_in_8_bits_are_told_how_to_use_their_scale(tmp_path, top, said):
    array = np.where(np.arange(40)[:, None, None] % 2, top, 0).astype(np.uint8) * np.ones((4, 6), np.uint8)
    clips = opened(save(tmp_path / "mask.npy", array), tmp_path)
    assert any(f"its highest value is {top}, uint8 is scaled by 255: try --normalize 0 {top}" in note
               for note in clips.notes) == said
    clips = opened(tmp_path / "mask.npy", tmp_path, normalize=[0, top])                 # the advice, taken
    assert clips.test(0, 1).max() == 1 and len(clips.notes) == 1


def test_an_array_of_another_kind_beside_the_frames_is_refused_and_the_way_out_works(tmp_path):
    path = tmp_path / "weather.npz"
    for others in ({"lat": np.zeros(4), "lon": np.zeros(6)}, {"mask": np.zeros((20, 5, 6), bool)}, {"a": np.float64(3)}):
        np.savez(path, rain=numbered(60), **others)
        with pytest.raises(data.DataError, match=r"weather.npz has arrays that are not alike, rain uint8 \(60, 4, 6\),") as e:
            opened(path, tmp_path)
        code = str(e.value).split("keep those of one kind: ")[1].replace("films.npz", str(tmp_path / "films.npz"))
        exec(code, {"numpy": np})                                                       # the advice, taken
        assert opened(tmp_path / "films.npz", tmp_path).test_count == 1


LENGTHS = (12, 3, 20, 9, 5, 15)


def unequal(directory):
    """Films of unequal length, one too short for a window, whose pixels are 100 · film + frame, as .npy files."""
    directory.mkdir()
    films = [(100 * k + np.arange(n)[:, None, None] * np.ones((4, 6))).astype(np.int16) for k, n in enumerate(LENGTHS)]
    for k, film in enumerate(films):
        np.save(directory / f"film{k + 8}.npy", film)                                   # film8, film9, film10, …
    return films


@pytest.mark.parametrize("form", ["npz", "folder"])
def test_films_of_unequal_length(tmp_path, form):
    path, films = tmp_path / "films", unequal(tmp_path / "films")
    if form == "npz":
        path = tmp_path / "films.npz"
        np.savez(path, *films)
    (tmp_path / "films" / "._film8.npy").write_bytes(b"a Mac's")
    clips = opened(path, tmp_path, normalize=[0, 1000])
    assert clips.name == f"films_{form}"

    def windows(part):
        frames = clips.train(0, 0, clips.train_count) if part == "train" else getattr(clips, part)(0, 99)
        return sorted(map(tuple, (clips.to_units(frames)[:, :, 0, 0, 0].round().long().tolist())))

    def whole(film, stride):
        return [tuple(range(100 * film + k, 100 * film + k + 5)) for k in range(0, LENGTHS[film] - 4, stride)]

    assert windows("test") == whole(5, 2)                               # the last tenth of the frames, as whole films
    assert windows("valid") == whole(4, 2)                              # of the 49 frames before, the last 5
    assert windows("train") == whole(0, 1) + whole(2, 1) + whole(3, 1)
    assert "6 film(s) of 3 to 20 frames" in clips.notes[0] and "1 of 6 films are shorter than a window" in clips.notes[1]
    found = films_of(path, {**INFO, "scale": [0, 1000]})
    assert (found.as_file(found.test(0, 6)) == np.stack([film[-3:] for film in films])).all()


@pytest.mark.parametrize("names", [["t0.25", "t0.5", "t0.75"], ["film9", "film10", "film11"], ["2014.09", "2014.10", "2015.01"],
                                   ["a1b2", "a1b10", "a2b1"], ["a", "b1", "b2"]])
def test_the_files_of_a_folder_are_read_in_the_order_of_their_numbers(tmp_path, names):
    (tmp_path / "films").mkdir()
    for k, name in reversed([*enumerate(names)]):
        save(tmp_path / "films" / f"{name}.npy", numbered(10) + 100 * k)
    frames, *_ = data.own_frames(tmp_path / "films")
    assert frames[::10, 0, 0, 0].tolist() == [0, 100, 200]


def test_time_steps_and_folders_of_folders_get_the_line_that_makes_an_array(tmp_path):
    for k in range(30):
        for name in ("steps", "clips/a", "clips/b"):
            (tmp_path / name).mkdir(parents=True, exist_ok=True)
            save(tmp_path / name / f"{k:02}.npy", numbered(30)[k])
    with pytest.raises(data.DataError, match=r"00.*has shape \(4, 6\).*make a film: numpy.stack\(\[numpy.load\(f\) for f in"):
        opened(tmp_path / "steps", tmp_path)
    with pytest.raises(data.DataError, match="clips has no .npy files; make an array of each folder in it") as error:
        opened(tmp_path / "clips", tmp_path)
    code = str(error.value).split("for images): ")[1].split("; ", 1)[1]
    exec(code.replace("films.npz", str(tmp_path / "films.npz")), {"numpy": np, "pathlib": __import__("pathlib")})
    with np.load(tmp_path / "films.npz") as films:
        assert {name: films[name].shape for name in films} == {"a": (30, 4, 6), "b": (30, 4, 6)}
    with pytest.raises(data.DataError, match="films of 1 frames, too few .* numpy.concatenate"):
        for k in range(30):
            save(tmp_path / "steps" / f"{k:02}.npy", numbered(30)[k:k + 1])
        opened(tmp_path / "steps", tmp_path)


@pytest.mark.parametrize("name, line", [
    ("clip.mp4", "import numpy, pathlib, imageio.v3; numpy.save('clip.npy', imageio.v3.imread('{path}', plugin='pyav'))"),
    ("clip.GIF", "import numpy, pathlib, imageio.v3; numpy.save('clip.npy', imageio.v3.imread('{path}'))"),
    ("a.h5", "import numpy, pathlib, h5py; numpy.save('a.npy', h5py.File('{path}')['NAME'][:])"),
    ("a.nc", "import numpy, pathlib, xarray; numpy.save('a.npy', xarray.open_dataset('{path}')['NAME'].values)"),
    ("a.tif", "import numpy, pathlib, tifffile; numpy.save('a.npy', tifffile.imread('{path}'))"),
    ("a.png", "numpy.stack([imageio.v3.imread(f) for f in sorted(pathlib.Path('{folder}').glob('*.png'))]))"),
    ("films/a.tif", "numpy.save('films.npy', numpy.stack([tifffile.imread(f) for f in sorted(pathlib.Path('{folder}/films')"
                    ".glob('*.tif'))]))"),
    ("words.txt", "words.txt is no .npy or .npz file and no folder of .npy files: numpy.save(")])
def test_files_of_other_kinds_are_refused_with_the_python_that_makes_an_array(tmp_path, name, line):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"#EXTM3U")
    with pytest.raises(data.DataError) as error:
        opened(path.parent if "/" in name else path, tmp_path)
    assert line.format(path=path, folder=tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_an_option_that_does_not_go_with_the_data_is_named(tmp_path):
    path = save(tmp_path / "film.npy", numbered(100))
    for name, options, text in (("moving_digits", {"layout": "NHW"}, "--layout is for your own arrays, not for mov"),
                                ("moving_digits", {"thresholds": [1]}, "--thresholds is for your own arrays"),
                                (str(path), {"box": [1, 2, 3, 4]}, "--box is for typhoon, not for")):
        with pytest.raises(data.DataError, match=text):
            data.open_data(name, tmp_path / "data", **options)
    assert data.open_data("moving_digits", normalize=None, box=None).name == "moving_digits"


INFO = {"frames_in": 3, "test_horizon": 2, "channels": 1, "size": [4, 6], "scale": None}


def films_of(path, info=INFO, any_size=False, **options):
    return data.open_other(path, info, options, any_size, "last")


def test_films_that_cannot_be_forecast(tmp_path):
    nan = np.zeros((5, 4, 6), np.float32)
    nan[2:] = np.nan
    early = np.zeros((5, 4, 6), np.float32)
    early[1] = np.nan
    for array, text in ((numbered(2), "x.npy has films of 2 frames, too few"), (nan, "x.npy has no data at all"),
                        (numbered(9, height=5), r"the model takes \(1, 4, 6\)"), (numbered(9, 3), r"of \(3, 4, 6\)"),
                        (np.full((9, 4, 6), 5), "x.npy goes from 5 to 5")):
        with pytest.raises(data.DataError, match=text):
            films_of(save(tmp_path / "x.npy", array))
    assert films_of(save(tmp_path / "early.npy", early)).test(0, 1).sum() == 0          # before what is read
    for name in ("absent.npy", "x.txt"):
        with pytest.raises(data.DataError, match=name):
            films_of(tmp_path / name)
    large = films_of(save(tmp_path / "large.npy", numbered(9, height=32, width=48)), any_size=True)
    assert large.size == (32, 48) and (large.as_file(large.test(0, 1)) == numbered(9, height=32, width=48)[-3:]).all()


def test_windows_of_another_file_begin_every_horizon_frames(tmp_path):
    run = opened(save(tmp_path / "film.npy", numbered(100, dtype=np.float64)), tmp_path, normalize="range", unit="mm",
                 thresholds=[2])
    storm = save(tmp_path / "storm.npy", numbered(13, dtype=np.float64) * 10)
    clips = data.open_other(storm, run.info(), {})
    assert (clips.test_count, clips.train_count, clips.frames_in, clips.test_horizon) == (5, 0, 3, 2)
    assert clips.test_units(0, 9)[:, :, 0, 0, 0].tolist() == [[10.0 * n for n in range(k, k + 5)]
                                                              for k in (0, 2, 4, 6, 8)]
    assert clips.info()["scale"] == [0, 89] and (clips.unit, clips.thresholds) == ("mm", (2,)) and clips.own
    assert "96 values are clipped" in " ".join(clips.notes) and "frames 0 to 12 of storm.npy" in clips.test_set
    longer = data.open_other(storm, run.info(), {"thresholds": [5], "unit": "m", "layout": None}, horizon=6)
    assert longer.test(0, 9).shape == (1, 9, 1, 4, 6) and (longer.unit, longer.thresholds) == ("m", (5,))
    with pytest.raises(data.DataError, match="films of 13 frames, too few for --frames-in 3 and --horizon 11"):
        data.open_other(storm, run.info(), {}, horizon=11)
