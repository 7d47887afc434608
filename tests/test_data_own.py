"""Arrays of one's own: windows, parts, scales, what is refused, what is kept, and films to forecast."""

import io
import json
import os
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
        copies = sorted((tmp_path / "data" / "own").glob("two-*/*.npy"))
        assert len(copies) == 2                                                         # the old copies are gone
        times = [copy.stat().st_mtime_ns for copy in copies]
        opened(path, tmp_path)
        assert [copy.stat().st_mtime_ns for copy in copies] == times                    # unpacked once


def test_a_batch_is_a_function_of_seed_and_iteration(tmp_path):
    path = save(tmp_path / "film.npy", numbered(100))
    clips, again = opened(path, tmp_path), opened(path, tmp_path)
    again.train(3, 0, 8)
    assert clips.train(3, 5, 8).equal(again.train(3, 5, 8)) and not clips.train(3, 5, 8).equal(clips.train(4, 5, 8))
    assert clips.train(3, 5, 8, slice(1, None, 2)).equal(clips.train(3, 5, 8)[1::2])


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
    "int32": (lambda: np.full((30, 4, 4), 7, np.int32), "from 7 to 7: what is not uint8 must lie in [0, 1]"),
    "complex": (lambda: np.zeros((30, 4, 4), complex), "holds complex128"),
    "text": (lambda: np.full((30, 4, 4), "a"), "holds <U1"),
    "record": (lambda: np.zeros((30, 4, 4), [("a", "u1")]), "holds"),
    "objects": (pickled, "pickled objects"),
    "channels": (lambda: np.zeros((3, 30, 17, 4, 4), np.uint8), "17 channels, more than 16"),
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
    with pytest.raises(data.DataError, match="frame 41"):
        data.frame_ranges(array, "x", 10)


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
held = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10    # by torch, with CUDA 0.6 GB
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


def films_of(path, tmp_path, info=INFO, **options):
    return data.open_films(path, tmp_path / "data", info, options)


@pytest.mark.parametrize("axes", [3, 4, 5])
def test_films_give_their_last_frames_and_take_the_forecast_back(tmp_path, axes):
    array = np.random.default_rng(0).integers(0, 256, (2, 7, 1, 4, 6), dtype=np.uint8)
    array = array if axes == 5 else array[0] if axes == 4 else array[0, :, 0]
    films = films_of(save(tmp_path / "x.npy", array), tmp_path)
    frames = films.frames(0, films.count)
    assert films.count == (2 if axes == 5 else 1) and frames.dtype == torch.float32
    saved = films.as_file(frames)
    expected = array[:, -3:] if axes == 5 else array[-3:]
    assert saved.dtype == np.uint8 and saved.shape == expected.shape and (saved == expected).all()
    assert films.as_file(torch.full_like(frames, 1.7)).min() == 255


def test_films_are_scaled_as_the_run_was(tmp_path):
    array = np.linspace(-50, 217, 7 * 24).reshape(7, 4, 6)
    path = save(tmp_path / "x.npy", array)
    films = films_of(path, tmp_path, {**INFO, "scale": [-50, 217]})
    assert films.frames(0, 1).max() == 1 and np.allclose(films.as_file(films.frames(0, 1)), array[-3:], atol=1e-4)
    assert films.as_file(films.frames(0, 1)).dtype == np.float64
    with pytest.raises(data.DataError, match="must lie in"):
        films_of(path, tmp_path)
    floats = films_of(save(path, array.clip(0, 1).astype(np.float32)), tmp_path)
    assert (floats.as_file(floats.frames(0, 1)) == array.clip(0, 1).astype(np.float32)[-3:]).all()


def test_films_that_cannot_be_forecast(tmp_path):
    nan = np.zeros((5, 4, 6), np.float32)
    nan[2:] = np.nan
    early = np.zeros((5, 4, 6), np.float32)
    early[1] = np.nan
    for name, array, text in (("short", numbered(2), "films of 2 frames, fewer than the 3 that the model reads"),
                              ("nan", nan, "no data at all"),
                              ("size", numbered(9, height=5), "the model takes 1 x 4 x 6"),
                              ("channels", numbered(9, 2), "2 x 4 x 6"), ("int", np.full((9, 4, 6), 5), "from 5 to 5")):
        with pytest.raises(data.DataError) as error:
            films_of(save(tmp_path / f"{name}.npy", array), tmp_path)
        assert text in str(error.value) and f"{name}.npy" in str(error.value) and "\n" not in str(error.value)
    assert films_of(save(tmp_path / "early.npy", early), tmp_path).frames(0, 1).sum() == 0    # before what is read
    for name in ("absent.npy", "x.txt"):
        with pytest.raises(data.DataError, match=name):
            films_of(tmp_path / name, tmp_path)


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
