"""TaxiBJ from files in the true formats: HDF5 with days missing, and dataset.npz."""

import datetime
import fcntl
import sys

import numpy as np
import pytest
from conftest import data_refused
import torch

import data

h5py = pytest.importorskip("h5py", reason="TaxiBJ's files are HDF5, which needs h5py")


def day(year, month, number):
    return datetime.date(year, month, 1) + datetime.timedelta(number)


def write_year(path, days, first):
    """One file: slot k of all its slots has inflow `first` + k and outflow minus that, in every cell."""
    dates = [f"{date:%Y%m%d}{slot:02d}".encode() for date, slots in days for slot in slots]
    flow = np.arange(first, first + len(dates), dtype=np.float32)
    with h5py.File(path, "w") as file:
        file["data"] = np.broadcast_to(np.stack([flow, -flow], 1)[:, :, None, None], (len(dates), 2, 32, 32))
        file["date"] = np.array(dates)
    return dates


ALL = range(1, 49)


@pytest.fixture
def folder(tmp_path):
    """2013: 10 days, day 4 without a slot. 2014: 12 days, a gap after day 5. 2015, 2016: 8 and 9 days, whole."""
    folder = tmp_path / "taxibj"
    folder.mkdir()
    years = {13: [(day(2013, 7, n), [s for s in ALL if (n, s) != (4, 20)]) for n in range(10)],
             14: [(day(2014, 3, n + 3 * (n > 5)), ALL) for n in range(12)],
             15: [(day(2015, 3, n), ALL) for n in range(8)], 16: [(day(2015, 12, n), ALL) for n in range(9)]}
    for year, days in years.items():
        write_year(folder / f"BJ{year}_M32x32_T30_InOut.h5", days, 1000 * (year - 12))
    return folder


def flows(clips, frames):
    """Inflow of each frame of each clip, in the numbers of `write_year`."""
    return clips.to_units(frames)[:, :, 0, 0, 0].round().long()


def test_windows_days_and_scale(folder):
    clips = data.open_data("taxibj", folder.parent)
    assert (clips.channels, clips.size, clips.frames_in, clips.horizon, clips.test_count) == (2, (32, 32), 4, 4, 1344)
    #       runs of 4 + 5, 6 + 6, 8 and 9 whole days, each with 7 fewer windows than slots
    total = (4 + 5 + 6 + 6 + 8 + 9) * 48 - 6 * 7
    side = total - 1344
    assert clips.valid_count == (side - 7) // 20
    frames = torch.cat([clips.train(0, 0, clips.train_count), clips.valid(0, 10**6), clips.test(0, 10**6)])
    assert frames.shape[1:] == (8, 2, 32, 32) and 0 <= frames.min() and frames.max() <= 1
    numbers = flows(clips, frames)
    inside = clips.scale.high
    ascending = numbers.clamp(max=int(inside))
    assert ((ascending[:, 1:] - ascending[:, :-1] == 1) | (ascending[:, 1:] == inside)).all()     # oldest first
    assert frames[:, :, 1].max() == 0                                                             # negative flows to 0
    parts = [set(flows(clips, part).ravel().tolist()) for part in
             (clips.train(0, 0, clips.train_count), clips.valid(0, 10**6))]
    assert not parts[0] & parts[1]
    incomplete = set(range(1000 + 4 * 48, 1000 + 4 * 48 + 47))
    assert not incomplete & (parts[0] | parts[1])
    windows = {tuple(row) for row in flows(clips, clips.train(0, 0, clips.train_count)).tolist()}
    assert all(row[-1] - row[0] == 7 for row in windows)
    for first in (1000 + 4 * 48, 1000 + 10 * 48 - 1, 2000 + 6 * 48):      # over the dropped day, a file's end, a gap
        assert not any(row[0] < first <= row[-1] for row in windows)
    assert clips.scale.low == 0 and clips.scale.high == numbers.max()
    inflow = data.open_data("taxibj", folder.parent, "fullres")
    assert inflow.train(0, 3, 4).equal(clips.train(0, 3, 4)[:, :, :1]) and "inflow alone" in inflow.test_set
    note = " ".join(clips.info()["notes"])
    assert "1 days without all 48 slots" in note and "would share frames with others: 14" in note and "19,560" in note


def write_npz(path, train=300, test=20, **others):
    """Clips one slot apart, as published: the value of slot k is k / 1000."""
    slots = np.broadcast_to((np.arange(train + test + 8) / 1000)[:, None, None, None], (train + test + 8, 2, 32, 32))
    clips = np.stack([slots[k:k + 8] for k in range(train + test)]).astype(np.float32)
    np.savez(path, **{"X_train": clips[:train, :4], "Y_train": clips[:train, 4:], "X_test": clips[train:, :4],
                      "Y_test": clips[train:, 4:], **others})


def test_dataset_npz(folder):
    for path in folder.glob("*.h5"):
        path.unlink()
    write_npz(folder / "dataset.npz")
    clips = data.open_data("taxibj", folder.parent)
    assert (clips.train_count, clips.valid_count, clips.test_count) == (300 - 7 - 14 - 7, 14, 20)
    slots = [(clips.to_units(part)[:, :, 1, 5, 5] * 1000).round().long() for part in
             (clips.train(0, 0, clips.train_count), clips.valid(0, 99), clips.test(0, 99))]
    assert all((rows[:, 1:] - rows[:, :-1] == 1).all() for rows in slots)
    used = [set(rows.ravel().tolist()) for rows in slots]
    assert not (used[0] & used[1] or used[1] & used[2] or used[0] & used[2])
    assert used[2] == set(range(300, 327)) and "dataset.npz" in clips.test_set
    assert clips.test(0, 1)[0, 0, 0, 0, 0] == np.float32((0.3 + 1) / 2)
    with pytest.raises(data.DataError, match="8 frames"):
        data.open_data("taxibj", folder.parent, horizon=5)


def refused(folder, *texts):
    return data_refused(lambda: data.open_data("taxibj", folder.parent), folder, *texts)


def test_bad_files(folder):
    path = folder / "BJ15_M32x32_T30_InOut.h5"
    whole = path.read_bytes()
    path.unlink()
    refused(folder, "has 3 of BJ13_M32x32_T30_InOut.h5", "all four are needed")
    for content in (b"", b"not HDF5", whole[:len(whole) // 2]):
        path.write_bytes(content)
        refused(folder, "BJ15_M32x32_T30_InOut.h5 cannot be read")
    for keys in ({"flow": 1}, {"data": 1.0, "date": 2.0}, {"data": np.zeros((3, 1, 32, 32)), "date": [b"20150301xx"]},
                 {"data": np.zeros((48, 1, 32, 32)), "date": [f"20150301{slot:02}".encode() for slot in ALL]},
                 {"data": np.zeros((1, 2, 32, 32)), "date": [b"yesterday!"]}):
        with h5py.File(path, "w") as file:
            for key, value in keys.items():
                file[key] = value
        refused(folder, "BJ15_M32x32_T30_InOut.h5")
    write_year(path, [(day(2015, 3, 0), ALL)], 0)
    with h5py.File(path, "r+") as file:
        file["data"][20, 1, 3, 3] = np.nan
    refused(folder, "finite numbers")


def test_the_same_day_twice_is_refused(folder):
    """It could be in training and in the test."""
    path = folder / "BJ16_M32x32_T30_InOut.h5"
    path.write_bytes((folder / "BJ13_M32x32_T30_InOut.h5").read_bytes())
    refused(folder, f"{path} cannot be read: its day 2013-07-01 is not", "once in all files")
    write_year(path, [(day(2015, 12, n), ALL) for n in (0, 1, 2, 1)], 0)
    refused(folder, f"{path} cannot be read: its day 2015-12-02")


def test_a_file_that_cannot_be_locked_is_read(folder):
    """As on a file system without locks: h5py locks a file that it opens by its name."""
    with open(folder / "BJ15_M32x32_T30_InOut.h5", "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(OSError):
            h5py.File(file.name, "r", locking=True)
        assert data.open_data("taxibj", folder.parent).test_count == 1344


def test_a_bad_npz(folder):
    for path in folder.glob("*.h5"):
        path.unlink()
    path = folder / "dataset.npz"
    write_npz(path, Y_test=np.zeros((20, 4, 2, 32, 31), np.float32))
    refused(folder, "dataset.npz cannot be read")
    for value in (1.5, np.nan):
        write_npz(path, X_test=np.full((20, 4, 2, 32, 32), value, np.float32))
        refused(folder, "X_test and Y_test are not (N, 4, 2, 32, 32) each in [-1, 1]")
    np.savez(path, X_train=np.zeros((3, 4, 2, 32, 32), np.float32))
    refused(folder, "Y_train")
    write_npz(path)
    content = path.read_bytes()
    path.write_bytes(content[:200_000] + b"\xff" + content[200_001:])
    refused(folder, "dataset.npz cannot be read")


def test_without_h5py_it_is_asked_for_by_name(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    refused(folder, "which needs the package h5py: pip install h5py")
