"""Germany: the real RADOLAN composites against values worked out by hand, archives, RYDL.hdf5, windows, bad files."""

import bz2
import datetime
import gzip
import io
import struct
import tarfile

import numpy as np
import pytest
from conftest import data_refused
import torch

import data

RY, RW = "raa01-ry_10000-1408102050-dwd---bin.gz", "raa01-rw_10000-1408030950-dwd---bin.gz"


def composite(time, value, **header):
    """A RADOLAN composite of one value in 0.01 mm, or of 900 rows of raw numbers from the south."""
    fields = {"product": "RY", "PR": "E-02", "INT": "   5", "GP": " 900x 900", **header}
    text = f"{fields['product']}{time:%d%H%M}10000{time:%m%y}BY1620134VS 3SW   2.13.1PR {fields['PR']}"
    text += f"INT{fields['INT']}GP{fields['GP']}MS 62<boo,ros,emd,hnr,umd,pro,ess,asd,neu,nhb,oft,tur,isn,fbg,mem> "
    grid = (1100, 900) if fields["GP"] == "1100x 900" and fields["product"] == "YW" else (900, 900)
    return text.encode() + b"\x03" + np.broadcast_to(np.asarray(value, "<u2"), grid).tobytes()


def name(time):
    return f"raa01-ry_10000-{time:%y%m%d%H%M}-dwd---bin"


def later(time, minutes):
    return time + datetime.timedelta(minutes=minutes)


OLD, NEW = datetime.datetime(2014, 6, 1, 0, 10), datetime.datetime(2015, 6, 1, 0, 10)


def write_tar(path, times):
    with tarfile.open(path, "w:gz", compresslevel=1) as archive:
        for number, time in enumerate(times):
            content = composite(time, time.hour * 60 + time.minute)
            packed = number % 2
            content = gzip.compress(content, 1) if packed else content
            entry = tarfile.TarInfo(f"./2014/{name(time)}{'.gz' if packed else ''}")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "germany"
    folder.mkdir()
    return folder


def opened(folder, **options):
    return data.open_data("germany", folder.parent, **{"frames_in": 2, "horizon": 2, **options})


def read(path):
    with data.reading(path) as file:
        (time, values), = data._composites(file, path.name)
        return time, values()


def test_the_real_composite_holds_what_was_worked_out_by_hand(real_radolan):
    time, values = read(real_radolan / RY)
    assert datetime.datetime(1970, 1, 1) + datetime.timedelta(minutes=time) == datetime.datetime(2014, 8, 10, 20, 50)
    assert np.isnan(values).sum() == 202_093 and (values > 0).sum() == 129_382
    assert np.nansum(values.astype(np.float64)) == pytest.approx(44_919.78, abs=0.01)
    assert values[899 - 62, 288] == np.nanmax(values) == 10.79      # the file's row 62 from the south
    rain = 12 * data.block_means(values, 180)
    assert rain[179 - 12, 57] == pytest.approx(9883 * 0.01 * 12 / 25)      # the 25 values of that block add up to 98.83
    with gzip.open(real_radolan / RY) as file:
        raw = struct.unpack("<810000H", file.read().partition(b"\x03")[2])
    for row, column in ((0, 0), (3, 100), (90, 90), (100, 31), (179, 179), (60, 10)):
        block = [raw[(5 * (179 - row) + y) * 900 + 5 * column + x] for y in range(5) for x in range(5)]
        known = [level * 0.12 for level in block if level != 0x29C4]
        assert np.isnan(rain[row, column]) if not known else rain[row, column] == pytest.approx(sum(known) / len(known))


def test_flags(tmp_path):
    raw = np.zeros((900, 900), np.uint16)
    raw[0, :6] = [123, 0x1000 | 123, 0x2000 | 123, 0x4000 | 123, 0x8000 | 123, 4095]
    (tmp_path / name(OLD)).write_bytes(composite(OLD, raw))
    _, values = read(tmp_path / name(OLD))
    assert np.allclose(values[899, :6], [1.23, 1.23, np.nan, -1.23, 0, 40.95], equal_nan=True)
    assert np.isnan(values).sum() == 1


def test_a_yw_composite_lies_where_ry_does(tmp_path):
    """Its corner is at (-443.4622, -4758.645) km of the projection, RY's at (-523.4622, -4658.645), both of 1 km."""
    raw = np.arange(1100 * 900).reshape(1100, 900) % 4096
    path = tmp_path / f"raa01-yw2017.002_10000-{OLD:%y%m%d%H%M}-dwd---bin"
    path.write_bytes(composite(OLD, raw, product="YW", INT="   5U0", GP="1100x 900"))
    _, values = read(path)
    assert values.shape == (900, 900) and np.isnan(values[:, :80]).all() and not np.isnan(values[:, 80:]).any()
    for north, east in ((-4658, -443), (-4000, 0), (-3760, 376)):                # kilometres; the pixels they lie in
        x, y = east + 523, north + 4658
        assert values[899 - y, x] == raw[north + 4758, east + 443] / 100


@pytest.mark.parametrize("form", ["plain", ".gz", ".bz2"])
def test_composites_plain_and_packed_hold_the_same(tmp_path, form):
    content = composite(OLD, 7)
    path = tmp_path / (name(OLD) + form.replace("plain", ""))
    path.write_bytes(gzip.compress(content) if form == ".gz" else bz2.compress(content) if form == ".bz2" else content)
    assert (read(path)[1] == 0.07).all()


def test_a_month_of_days_as_published(folder):
    """A .tar of .tar.gz, with what a Mac adds and a file of another kind."""
    def add(archive, name, content):
        entry = tarfile.TarInfo(name)
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))

    for start, count in ((OLD, 12), (NEW, 4)):
        with tarfile.open(folder / f"YW2017.002_{start:%Y%m}.tar", "w") as month:
            add(month, "._YW2017.002_20140601.tar.gz", b"of a Mac")
            add(month, "README.txt", b"read me")
            for day in range(2):
                packed = io.BytesIO()
                with tarfile.open(fileobj=packed, mode="w:gz", compresslevel=1) as archive:
                    for k in range(day * count // 2, (day + 1) * count // 2):
                        time = later(start, 30 * k)
                        add(archive, f"raa01-yw2017.002_10000-{time:%y%m%d%H%M}-dwd---bin",
                            composite(time, time.hour * 60 + time.minute, product="YW", GP="1100x 900"))
                add(month, f"YW2017.002_{start:%Y%m}{day:02d}.tar.gz", packed.getvalue())
    (folder / "._YW2017.002_201406.tar").write_bytes(b"of a Mac")
    (folder / "notes.txt").write_text("mine")
    clips = opened(folder)
    units = clips.test_units(0, 1)[0, :, 0].float()
    assert units[..., :16].isnan().all()
    assert torch.allclose(units[:, :, 16:], 0.12 * torch.tensor([10., 40, 70, 100])[:, None, None], rtol=1e-4)
    assert "from 16 composites" in clips.info()["notes"][0]


def test_another_product_is_refused_by_name(real_radolan, folder):
    (folder / RW).write_bytes((real_radolan / RW).read_bytes())
    refused(folder, f"{RW} is no 5-minute RY or YW composite", "RW030950100000814BY")
    (folder / RW).unlink()
    path = folder / name(OLD)
    for header in ({"INT": "  60"}, {"GP": "1100x 901"}, {"PR": "E-01"}, {"product": "RX"}, {"GP": "1100x 900"}):
        path.write_bytes(composite(OLD, 0, **header))
        refused(folder, path.name, "1620000 bytes")


def refused(folder, *texts, **options):
    return data_refused(lambda: opened(folder, **options), folder, *texts)


@pytest.mark.parametrize("content", [b"", b"RY", b"\x03", composite(OLD, 1)[:-1], composite(OLD, 1) + b"x",
                                     b"RY" * 900_000])
def test_damaged_composites_are_refused_by_name(folder, content):
    (folder / name(OLD)).write_bytes(content)
    refused(folder, name(OLD))
    (folder / name(OLD)).unlink()
    (folder / f"{name(OLD)}.gz").write_bytes(gzip.compress(content))
    refused(folder, name(OLD))
    (folder / f"{name(OLD)}.gz").write_bytes(gzip.compress(composite(OLD, 1))[:-900])
    refused(folder, name(OLD))


def test_a_truncated_archive_is_refused_and_leaves_nothing(folder):
    path = folder / "RY2014.tar.gz"
    write_tar(path, [later(OLD, 30 * k) for k in range(4)])
    whole = path.read_bytes()
    for size in (0, 10, len(whole) // 2, len(whole) - 20):
        path.write_bytes(whole[:size])
        refused(folder, "RY2014.tar.gz")


def write_years(folder):
    """2014: 24 half hours and the composites between the first ones, the one at 7 missing. 2015: 12 half hours."""
    old = [later(OLD, 30 * k) for k in range(24) if k != 7] + [later(OLD, 5 * k) for k in range(1, 12) if k != 6]
    write_tar(folder / "RY2014.tar.gz", sorted(old))
    for k in range(12):
        time = later(NEW, 30 * k)
        (folder / f"{name(time)}.gz").write_bytes(gzip.compress(composite(time, time.hour * 60 + time.minute), 1))


def rates(clips, frames):
    """The half hour of the day of each frame, from the rates in mm/h of `write_tar`."""
    rain = clips.to_units(frames)[:, :, 0]
    assert torch.allclose(rain, rain[..., :1, :1].expand_as(rain))
    return ((rain[:, :, 0, 0] / 0.12).round().long() - 10) / 30


def test_windows_years_and_missing_composites(folder):
    write_years(folder)
    clips = opened(folder)
    assert (clips.name, clips.channels, clips.size, clips.unit) == ("germany", 1, (180, 180), "mm/h")
    train = sorted(rates(clips, clips.train(0, 0, clips.train_count)).tolist())
    # every fourth half hour; the window at 4 touches the missing one at 7; the last is for validation
    assert train == [[k, k + 1, k + 2, k + 3] for k in (0, 8, 12, 16)]
    assert rates(clips, clips.valid(0, 9)).tolist() == [[20, 21, 22, 23]]
    assert rates(clips, clips.test(0, 9)).tolist() == [[0, 1, 2, 3], [8, 9, 10, 11]]
    assert "1 in training, 0 in the test" in " ".join(clips.info()["notes"]) and clips.test_count == 2
    assert clips.masked and clips.test(0, 2).isfinite().all() and clips.thresholds == (0.5, 2, 5)
    default = data.open_data("germany", folder.parent, setup="fullres", frames_in=4, horizon=4)
    assert default.test_count == 1 and default.frames_in == default.horizon == 4


def test_no_data_is_black_and_left_out_of_the_scores(folder):
    raw = np.full((900, 900), 100, np.uint16)
    raw[:5, 5:10] = 0x29C4                                      # the second block of the southernmost row
    raw[:3, :5] = 0x29C4                                        # part of the first: the mean of the rest
    for start, count in ((OLD, 12), (NEW, 4)):
        for k in range(count):
            (folder / name(later(start, 30 * k))).write_bytes(composite(later(start, 30 * k), raw))
    clips = opened(folder)
    frames = clips.test(0, 1)
    missing = frames.isnan()
    assert missing.sum() == 4 and missing[:, :, :, 179, 1].all() and clips.test_units(0, 1).isnan().equal(missing)
    assert torch.allclose(clips.to_units(frames[~missing]), torch.tensor(12.0, dtype=torch.float64), rtol=1e-5)
    assert (clips.test_units(0, 1)[~missing] == 12).all()
    assert clips.train(0, 0, 2).isnan().sum() == 2 * 4 and clips.valid(0, 1).isnan().sum() == 4


def test_pixels_and_rates(folder):
    scale = data.RainScale()
    rain = torch.tensor([0, 0.01, 0.5, 2, 5, 30, 1000, np.nan], dtype=torch.float64)
    pixels = scale.to_network(rain)
    assert pixels[0] == 0 and pixels[-1].isnan() and pixels.dtype == torch.float32
    by_hand = [(10 * np.log10(256 * r**1.42) + 10) / 70 for r in (0.01, 0.5, 2, 5, 30)]
    assert np.allclose(pixels[1:6], by_hand) and pixels[6] == 1
    assert np.allclose(scale.to_units(pixels[:6]), rain[:6], rtol=1e-4)
    assert isinstance(data.scale_of({"scale": scale.note()}), data.RainScale)


def test_an_archive_may_hold_composites_in_any_order(folder):
    write_years(folder)
    clips = opened(folder)
    times = [later(OLD, 30 * k) for k in (0, 5, 9, 22, 1, 23, 8, 2, 3, 4, 6, 10, *range(11, 22))]
    write_tar(folder / "RY2014.tar.gz", times)
    again = opened(folder)
    assert again.test(0, 9).equal(clips.test(0, 9))
    assert rates(again, again.valid(0, 9)).tolist() == rates(clips, clips.valid(0, 9)).tolist()


def test_rydl(folder):
    h5py = pytest.importorskip("h5py", reason="RYDL.hdf5 needs h5py")
    path = folder / "RYDL.hdf5"
    with h5py.File(path, "w") as file:
        for start, count in ((OLD, 13), (NEW, 4)):
            for k in range(count):
                rain = np.full((900, 900), 0.01 * k, np.float32)
                rain[:5, :5], rain[:5, 5:10] = np.nan, -1
                file.create_dataset(f"{later(start, 30 * k):%Y%m%d%H%M}", data=rain, chunks=(900, 900), compression=1)
        file.create_dataset(f"{later(OLD, 5):%Y%m%d%H%M}", data=np.full((900, 900), 9, np.float32))
    clips = opened(folder)
    assert torch.allclose(clips.to_units(clips.test(0, 1))[0, :, 0, 0, 0], 0.12 * torch.arange(4.0).double(), rtol=1e-4)
    missing = clips.test(0, 1).isnan()
    assert missing.sum() == 4 * 2 and missing[:, :, :, 179, :2].all()
    whole = path.read_bytes()
    for old in folder.glob("frames-*"):
        old.unlink()
    path.write_bytes(whole[:len(whole) // 2])
    refused(folder, "RYDL.hdf5 cannot be read")
    for key, value, text in (("a", 1, "nothing can be read"), ("201406010000", np.zeros((9, 9)), "900 x 900"),
                             ("201406010000", np.zeros((900, 900), int), "floats"), ("201499010000", 1.0, "RYDL.hdf5")):
        with h5py.File(path, "w") as file:
            file[key] = value
        refused(folder, text)
