"""Files of every kind, cut, flipped, edited and swapped: each works, or is refused in one line with nothing written."""

import bz2
import contextlib
import datetime
import gzip
import hashlib
import io
import os
import pickle
import random
import shutil
import signal
import tarfile
import warnings
import zipfile

import numpy as np
import pytest
from test_data_germany import composite

import data
import train

pytestmark = pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="what hangs is found by SIGALRM")
EACH = 33    # mutations of a kind
MOMENT = datetime.datetime(2014, 6, 1, 0, 10)


# ------------------------------------------------------------------------------------------------------------ mutations

def cut(path, content, numbers):
    path.write_bytes(content[:numbers.choice((0, 1, len(content) - 1, numbers.randrange(len(content))))])


def flip(path, content, numbers, within=None):
    content = bytearray(content)
    for _ in range(numbers.choice((1, 1, 8))):
        content[numbers.randrange(min(len(content), within or len(content)))] ^= 1 << numbers.randrange(8)
    path.write_bytes(content)


def edit_header(path, content, numbers):
    flip(path, content, numbers, 200)


def edit_digits(path, content, numbers):
    """Other numbers where text has some: sizes, dates, versions."""
    places = [at for at, byte in enumerate(content[:2000]) if 48 <= byte < 58]
    content = bytearray(content)
    for at in numbers.sample(places, min(len(places), numbers.choice((1, 3)))):
        content[at] = 48 + numbers.randrange(10)
    path.write_bytes(content)


def splice(path, content, numbers):
    """Some bytes gone, some added, or some there twice."""
    first, last = sorted(numbers.randrange(len(content)) for _ in range(2))
    middle = numbers.choice((b"", numbers.randbytes(50), content[first:last] * 2))
    path.write_bytes(content[:first] + middle + content[last:])


def append(path, content, numbers):
    path.write_bytes(content + numbers.choice((b"\n", bytes(5000), content)))


def packed(path, content, numbers):
    """Packed once more, or in another way."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", numbers.choice((zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2))) as file:
        for name in ("train.npy", "test.npy", "X_train.npy"):
            file.writestr(name, content)
    path.write_bytes(numbers.choice((gzip.compress(content), bz2.compress(content), archive.getvalue())))


def another_kind(path, content, numbers):
    path.write_bytes(numbers.choice(others()))


def others():
    """Small files of other kinds, types and shapes."""
    saved = []
    structured = np.zeros(30, [("a", "f4"), ("b", "i4")])
    for array in (np.array([{}] * 30, object), np.array(["a"] * 30), np.zeros(30, complex), np.float32(1), structured,
                  np.zeros((0, 8, 8)), np.zeros((30, 8, 8), "M8[s]"), np.zeros((1, 1, 1, 30, 8, 8)),
                  np.full((30, 8, 8), 1e308), np.full((30, 8, 8), np.nan), np.zeros((30, 20, 8, 8), np.uint8)):
        saved.append(io.BytesIO())
        np.save(saved[-1], array, allow_pickle=True)
    saved.append(io.BytesIO())
    np.savez(saved[-1], train=np.zeros((30, 8, 8)), test=np.array([{}], object))
    return [file.getvalue() for file in saved] + [
        pickle.dumps(print), b"{}", b"[]", b"null", b"[" * 100_000, b"9" * 10_000, b"\xff\xfe", bytes(3000),
        b"PK\x05\x06" + bytes(18), b"\x89HDF\r\n\x1a\n" + bytes(500), b"\x93NUMPY\x01\x00\xff\xff{",
        b"\x93NUMPY\x09\x00", b"a: b\n" * 99]


def no_file(path, content, numbers):
    kinds = (os.mkfifo, lambda path: os.symlink("/dev/zero", path), lambda path: os.symlink(path, path),
             lambda path: os.symlink("nowhere", path), lambda path: None, os.mkdir)
    numbers.choice(kinds[:-1] if path.name.startswith(("frames-", "ranges-")) else kinds)(path)    # ours is no folder


MUTATIONS = (cut, flip, flip, edit_header, edit_digits, splice, append, packed, another_kind, another_kind, no_file)


class Hangs(BaseException):
    pass


def hold(opened, folder):
    """Whether `opened` works; if not, it is a DataError of one printable line, and all files are as before."""
    def hangs(*_):
        raise Hangs

    before = tree(folder)
    old = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(20)
    try:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            opened()
            works = True
    except (data.DataError, train.UserError) as error:        # train.py's own are made printable where they are printed
        said_of_it = str(error) if isinstance(error, data.DataError) else data.printable(str(error))
        assert said_of_it.isprintable() and len(said_of_it) < 1000, said_of_it
        assert tree(folder) == before
        works = False
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    assert not said, said[0].message
    return works


def tree(folder):
    """Every file but the ranges of an array, a finding that is kept so that it need not be looked at again."""
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in folder.rglob("*")
                  if not path.is_dir() and not path.name.startswith("ranges-"))


# --------------------------------------------------------------------------------------------------------- valid files

def unpacked(read, name, **options):
    """Germany's files, unpacked without the years that its windows need."""
    def opened(folder):
        sources = [folder / name]
        array, _ = data.unpack_once(folder, sources, data._half_hours(read, sources))
        return np.array(array)
    return opened


def tar_of(*members):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def own(folder, monkeypatch):
    frames = np.random.default_rng(0).random((40, 8, 8), np.float32)
    np.save(folder / "own.npy", frames)
    return "own.npy", lambda: clips(data.open_data(str(folder / "own.npy"), folder / "data", frames_in=2, horizon=2))


def own_packed(folder, monkeypatch):
    frames = np.random.default_rng(0).integers(0, 9, (40, 8, 8), np.uint8)
    np.savez_compressed(folder / "own.npz", train=frames, test=frames)
    return "own.npz", lambda: clips(data.open_data(str(folder / "own.npz"), folder / "data", frames_in=2, horizon=2))


def to_forecast(folder, monkeypatch):
    np.save(folder / "own.npy", np.zeros((3, 40, 1, 8, 8), np.uint8))
    info = {"frames_in": 2, "channels": 1, "size": [8, 8], "horizon": 2, "test_horizon": 2}
    return "own.npy", lambda: data.open_films(folder / "own.npy", folder / "data", info, {})


def mnist(folder, monkeypatch, pack=True):
    name = "train-images-idx3-ubyte"
    content = bytes(16) + np.random.default_rng(0).integers(0, 256, 50 * 28**2, np.uint8).tobytes()
    monkeypatch.setattr(data, "MNIST_FILES", {name: (len(content), hashlib.sha256(content).hexdigest())})
    monkeypatch.setattr(data, "MNIST_MIRRORS", ())
    (folder / (name + pack * ".gz")).write_bytes(gzip.compress(content) if pack else content)
    return name + pack * ".gz", lambda: data.mnist_digits(folder, name)


def mnist_plain(folder, monkeypatch):
    return mnist(folder, monkeypatch, False)


def taxibj(folder, monkeypatch):
    h5py = pytest.importorskip("h5py", reason="TaxiBJ's files are HDF5, which needs h5py")
    monkeypatch.setattr(data, "TAXIBJ_TEST", 8)
    for day, name in enumerate(data.TAXIBJ_FILES, 10):
        with h5py.File(folder / name, "w") as file:
            file.create_dataset("data", data=np.full((48, 2, 32, 32), day, "f4"), chunks=(48, 2, 32, 32), compression=1)
            file["date"] = [f"201503{day}{slot:02d}".encode() for slot in range(1, 49)]
            file["data"][0, 0] = 0
    return data.TAXIBJ_FILES[2], lambda: clips(data.open_taxibj(folder))


def taxibj_clips(folder, monkeypatch):
    clip = np.zeros((60, 4, 2, 32, 32), np.float32)
    np.savez_compressed(folder / "dataset.npz", X_train=clip, Y_train=clip, X_test=clip[:5], Y_test=clip[:5])
    return "dataset.npz", lambda: clips(data.open_taxibj(folder))


def kth(folder, monkeypatch):
    monkeypatch.setattr(data, "_film", lambda path: np.zeros((60, 1, 128, 128), np.uint8))
    monkeypatch.setattr(shutil, "which", lambda name: name)
    (folder / "boxing").mkdir()
    lines = [f"person{person:02d}_boxing_d1\t\tframes\t1-35, 36-60" for person in (1, 16, 17)]
    for line in lines:
        (folder / "boxing" / f"{line.split()[0]}_uncomp.avi").write_bytes(b"")
    (folder / "00sequences.txt").write_text("\n".join(lines))
    data.open_kth(folder)
    return "00sequences.txt", lambda: clips(data.open_kth(folder))


def radolan(folder, monkeypatch, name="raa01-ry_10000-1406010010-dwd---bin", content=None):
    (folder / name).write_bytes(content or composite(MOMENT, 7))
    return name, lambda: unpacked(data._composites, name)(folder)


def radolan_packed(folder, monkeypatch):
    return radolan(folder, monkeypatch, "raa01-ry_10000-1406010010-dwd---bin.gz", gzip.compress(composite(MOMENT, 7)))


def radolan_archive(folder, monkeypatch):
    day = tar_of(("raa01-ry_10000-1406010010-dwd---bin.gz", gzip.compress(composite(MOMENT, 7))))
    return radolan(folder, monkeypatch, "RY.tar.gz", tar_of(("day.tar.gz", day), ("notes.txt", b"")))


def rydl(folder, monkeypatch):
    h5py = pytest.importorskip("h5py", reason="RYDL.hdf5 needs h5py")
    with h5py.File(folder / "RYDL.hdf5", "w") as file:
        file.create_dataset("201406010010", data=np.ones((900, 900), "f4"), chunks=(900, 900), compression=1)
    return "RYDL.hdf5", lambda: unpacked(data._rydl, "RYDL.hdf5")(folder)


def typhoon(folder, monkeypatch, pack=bytes):
    monkeypatch.setattr(data, "HIMAWARI_SIDE", 100)
    for hour in range(12):
        counts = np.full((100, 100), 1000 + hour, ">u2")
        (folder / f"20180801{hour:02d}00.tir.01.fld.geoss{'.bz2' * (pack is not bytes)}").write_bytes(
            pack(counts.tobytes()))
    monkeypatch.setattr(data, "_box", lambda box: (slice(0, 80), slice(0, 80)))
    name = f"201808010400.tir.01.fld.geoss{'.bz2' * (pack is not bytes)}"
    return name, lambda: clips(data.open_typhoon(folder, frames_in=1, horizon=1, box=(1, 2, 3, 4)))


def typhoon_packed(folder, monkeypatch):
    return typhoon(folder, monkeypatch, bz2.compress)


def run(folder):
    np.save(folder / "own.npy", np.random.default_rng(0).random((40, 8, 8), np.float32))
    options = ("--device cpu --hidden 2 --layers 1 --kernel 1 --frames-in 2 --horizon 2 --batch 2 --iterations 1 "
               "--name a")
    with contextlib.redirect_stdout(io.StringIO()):
        assert train.main(["convlstm", "--data", str(folder / "own.npy"), "--data-dir", str(folder / "data"),
                           "--out", str(folder / "runs"), *options.split()]) == 0


def checkpoint(folder, monkeypatch):
    run(folder)
    return "runs/a/last.pt", lambda: train.open_run(folder / "runs/a")


def results(folder, monkeypatch):
    run(folder)
    return "runs/a/results.json", lambda: train.read_results(folder / "runs/a/results.json")


def log(folder, monkeypatch):
    run(folder)
    return "runs/a/log.csv", lambda: train.read_log(folder / "runs/a/log.csv")


def clips(opened):
    """Read some of each part."""
    return [part.numpy() for part in (opened.train(0, 0, 2), opened.valid(0, 2), opened.test(0, 2))]


KINDS = (own, own_packed, to_forecast, mnist, mnist_plain, taxibj, taxibj_clips, kth, radolan, radolan_packed,
         radolan_archive, rydl, typhoon, typhoon_packed, checkpoint, results, log)
OURS = (own, own_packed, taxibj, kth, typhoon)


# ---------------------------------------------------------------------------------------------------------------- tests

def mutate(folder, names, opened, kind, capfd):
    """EACH mutations of the files, one at a time, each in the folder as it was; how many of them work.

    opened: called with the path of the mutated file.
    """
    numbers, works = random.Random(f"{kind}"), 0
    valid = folder.with_name("valid")
    shutil.copytree(folder, valid)
    for number in range(EACH):
        path = folder / names[number % len(names)]
        content = path.read_bytes()
        path.unlink()
        mutation = MUTATIONS[number % len(MUTATIONS)]
        mutation(path, content, numbers)
        try:
            works += hold(lambda: opened(path), folder)
        except BaseException as error:
            raise AssertionError(f"{mutation.__name__} number {number} of {path.name}") from error
        shutil.rmtree(folder)
        shutil.copytree(valid, folder)
    out, err = capfd.readouterr()
    assert out == err == ""
    return works


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_mutated_file_works_or_is_refused(tmp_path, monkeypatch, capfd, kind):
    folder = tmp_path / "control \x1b[31m characters"
    folder.mkdir()
    name, opened = kind(folder, monkeypatch)
    works = mutate(folder, [name], lambda path: opened(), kind.__name__, capfd)
    assert hold(opened, folder) and works < EACH                            # unmutated, and mutated


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_a_mutated_file_of_our_own_is_made_anew(tmp_path, monkeypatch, capfd, kind):
    """What is kept beside the data: arrays, their indices, ranges. Of an array the form alone, not every value."""
    folder = tmp_path / "data"
    folder.mkdir()
    _, opened = kind(folder, monkeypatch)
    users = {str(path) for path in folder.rglob("*")}
    expected = opened()
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*")
                   if path.is_file() and (str(path) not in users or path.name.startswith("frames-")))

    def same(path):
        found = opened()
        assert [part.shape for part in found] == [part.shape for part in expected]
        assert path.suffix == ".npy" or all(map(np.array_equal, found, expected))

    assert names and mutate(folder, names, same, f"{kind.__name__}, ours", capfd) == EACH


def test_there_are_300_mutations_and_more():
    assert EACH * (len(KINDS) + len(OURS)) > 300


@pytest.mark.parametrize("dtype, bits", [("<f4", 0x7F800001), ("<f2", 0x7C01), ("<f8", 0x7FF0000000000001)])
def test_a_signalling_nan_is_missing_without_a_word(tmp_path, dtype, bits):
    frames = np.random.default_rng(0).random((40, 8, 8)).astype(dtype)
    frames.view(dtype.replace("f", "u"))[3, 2, 2] = bits
    np.save(tmp_path / "own.npy", frames)
    for options in ({}, {"normalize": "range"}):
        assert hold(lambda: clips(data.open_data(str(tmp_path / "own.npy"), tmp_path / "data", frames_in=2, horizon=2,
                                                 **options)), tmp_path)
