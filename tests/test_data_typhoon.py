"""Typhoon from gridded Himawari-8 files in the true format: 6000×6000 big-endian counts, plain and .bz2."""

import bz2
import datetime

import numpy as np
import pytest
from conftest import data_refused
import torch

import data

START = datetime.datetime(2018, 8, 1, 20)
BOX = [10, 120, 13.2, 123.2]               # 160 rows and columns, of the 2,340th row and the 1,750th column on


def name(hour, minute=0):
    return f"{START + datetime.timedelta(hours=hour, minutes=minute):%Y%m%d%H%M}.tir.01.fld.geoss"


def write_counts(path, value):
    """A grid that is `value` in the box of `BOX`, one more in its north half, and 0 elsewhere."""
    with open(path, "wb") as file:                                         # sparse: takes little room
        for row in range(2340, 2500):
            file.seek(2 * (6000 * row + 1750))
            file.write(np.full(160, value + (row < 2420), ">u2").tobytes())
        file.truncate(2 * 6000**2)


HOURS = [hour for hour in range(24) if hour != 13]


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The file of hour 1 as .bz2."""
    path = tmp_path_factory.mktemp("one") / "plain"
    write_counts(path, 1010)
    return bz2.compress(path.read_bytes(), 1)


@pytest.fixture
def folder(tmp_path, packed):
    folder = tmp_path / "typhoon"
    folder.mkdir()
    for hour in HOURS:
        write_counts(folder / name(hour), 2000 if hour == 0 else 1000 + 10 * hour)
    (folder / name(1)).unlink()
    (folder / f"{name(1)}.bz2").write_bytes(packed)
    (folder / f"{name(3, 10)}.bz2").write_bytes(b"not hourly: not read")
    return folder


def opened(folder, box=BOX, **options):
    return data.open_data("typhoon", folder.parent, box=box, **{"frames_in": 2, "horizon": 2, **options})


def hours(clips, frames):
    values = clips.to_units(frames)
    assert torch.allclose(values[:, :, 0, :32], values[:, :, :1, 0, :1].expand_as(values[:, :, 0, :32]), atol=1e-2)
    north, south = values[:, :, 0, :32], values[:, :, 0, 32:]
    assert torch.allclose(north - south, torch.ones_like(south), atol=1e-2)
    return ((values[:, :, 0, 0, 0] - 1001) / 10).round().long()


def test_windows_parts_and_scale(folder):
    clips = opened(folder)
    assert (clips.channels, clips.size) == (1, (64, 64))
    # hours 0-12 and 14-23: 10 + 7 windows of 4, of which the last 4 begin at hours 17-20
    assert hours(clips, clips.test(0, 9)).tolist() == [[k, k + 1, k + 2, k + 3] for k in range(17, 21)]
    assert clips.info()["scale"] == [1010, 2001] and "1 gaps" in " ".join(clips.info()["notes"])
    assert "box 10 120 13.2 123.2" in clips.test_set
    # the window at 14 would share hour 17 with the test; the last one before it is for validation
    assert hours(clips, clips.valid(0, 9)).tolist() == [[9, 10, 11, 12]]
    train = sorted(hours(clips, clips.train(0, 0, clips.train_count)).tolist())
    assert train == [*([k, k + 1, k + 2, k + 3] for k in range(1, 6)), [100, 1, 2, 3]]        # hour 0 reads as 100


def test_counts_beyond_twelve_bits_are_no_data(folder):
    """They leave the scale as it is; a block's mean is that of its known pixels; where none are known is a gap."""
    for hour, count in ((2, 65_535), (3, 65_534), (4, 4_096), (5, 65_535)):
        with open(folder / name(hour), "r+b") as file:
            for row in range(2340, 2500 if hour == 5 else 2343):    # 2.5 rows make one of the 64
                file.seek(2 * (6000 * row + 1750))
                file.write(np.full(160, count, ">u2").tobytes())
    clips = opened(folder)
    assert clips.info()["scale"] == [1010, 2001] and clips.masked and "2 gaps" in " ".join(clips.info()["notes"])
    assert "1 hours without any data" in " ".join(clips.info()["notes"])
    frames = np.load(next(folder.glob("frames-*.npy")))[:, 0]
    assert len(frames) == len(HOURS) - 1
    for hour in (2, 3, 4):
        assert np.isnan(frames[hour, 0]).all() and (frames[hour, 1:32] == 1001 + 10 * hour).all()
    assert not np.isnan(frames[[0, 1, *range(5, len(frames))]]).any()


def refused(folder, *texts, **options):
    return data_refused(lambda: opened(folder, **options), folder, *texts)


def test_boxes(folder):
    for box in (None, [13, 120, 10, 130], [10, 80, 20, 130], [10, 120, 11, 130], [10, 200, 20, 206], [-61, 90, 0, 95]):
        refused(folder, "typhoon needs --box SOUTH WEST NORTH EAST, such as --box 5 110 45 150", box=box)
    (folder / name(2)).unlink()
    west = opened(folder, [10, 120, 13.2, -236.8])                       # -236.8 is 123.2
    assert "box 10 120 13.2 123.2" in west.test_set
    with pytest.raises(data.DataError, match="--box is for typhoon"):
        data.open_data("moving_digits", box=BOX)


def test_bad_files(folder, packed):
    (folder / name(5)).unlink()
    path = folder / f"{name(5)}.bz2"
    for content in (b"", b"not bzip2", packed[:-50], bz2.compress(b"too short")):
        path.write_bytes(content)
        refused(folder, path.name)
    path.unlink()
    with open(folder / name(5), "wb") as file:
        file.truncate(72_000_002)
    refused(folder, name(5))
    for each in folder.iterdir():
        each.unlink()
    write_counts(folder / name(0), 1)
    with pytest.raises(data.DataError, match="typhoon: too few frames"):
        opened(folder)
