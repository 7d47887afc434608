"""Unpacking once into one array: what survives a kill, what a change does, and the array's file."""

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
import train

KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import data

def pieces():
    yield numbers.repeat(10_000, 0)     # more than a file buffers
    os.kill(os.getpid(), signal.SIGKILL)

import numpy as np
numbers = np.arange(24, dtype=np.uint8).reshape(4, 1, 2, 3)
folder = Path({folder!r})
if {late}:      # killed between the frames and their index, which comes first
    whole = data.write_whole
    data.write_whole = lambda path, content: os.kill(os.getpid(), 9) if path.suffix == ".json" else whole(path, content)
    pieces = lambda: (piece for piece in (numbers, {{}}))
data.unpack_once(folder, [folder / "source"], pieces())
"""
NUMBERS = np.arange(24, dtype=np.uint8).reshape(4, 1, 2, 3)


@pytest.mark.parametrize("name", ["taxibj", "kth", "germany", "typhoon"])
@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_a_run_without_its_data_says_in_one_line_where_to_get_them(tmp_path, capsys, name, folder):
    if folder == "empty":
        (tmp_path / "data" / name).mkdir(parents=True)
    box = ["--box", "5", "110", "45", "150"] if name == "typhoon" else []
    status = train.main(["convlstm", "--device", "cpu", "--data", name, "--data-dir", str(tmp_path / "data"), "--out",
                         str(tmp_path / "runs"), *box])
    out, err = capsys.readouterr()
    assert status == 2 and out == "" and err.count("\n") == 1
    assert f"{tmp_path / 'data' / name} has no files of {name}: put " in err
    assert not (tmp_path / "runs").exists()


def test_a_run_on_a_pickle_ends_in_one_line(tmp_path, capsys):
    np.save(tmp_path / "pickled.npy", np.array([{"a": 1}] * 30, object), allow_pickle=True)
    status = train.main(["convlstm", "--device", "cpu", "--data", str(tmp_path / "pickled.npy"), "--data-dir",
                         str(tmp_path / "data"), "--out", str(tmp_path / "runs")])
    err = capsys.readouterr().err
    assert status == 2 and err.count("\n") == 1 and "pickled objects" in err
    assert os.listdir(tmp_path) == ["pickled.npy"]


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").write_bytes(b"packed")
    return tmp_path / "source"


def unpack(source, pieces=None, about=""):
    sources = [source] if source.exists() else []
    return data.unpack_once(source.parent, sources, (pieces or all_of_them)(), about)


def all_of_them():
    yield NUMBERS[:3]
    yield NUMBERS[3:]
    yield {"frames": 4}


def last_three():
    yield from (NUMBERS[1:], {})


def fail():
    raise AssertionError("unpacked again")
    yield


@pytest.mark.parametrize("late", [False, True])
def test_an_unpacking_that_is_killed_is_never_taken_for_whole(source, late):
    script = KILLED.format(root=str(Path(data.__file__).parent), folder=str(source.parent), late=late)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(os.listdir(source.parent)) == 2                             # the source, and what the kill left
    array, index = unpack(source)
    assert (array == NUMBERS).all() and index["frames"] == 4
    assert sorted(path.suffix for path in source.parent.iterdir()) == ["", ".json", ".npy"]


def test_it_is_done_once_until_the_source_changes(source):
    unpack(source)
    array, index = unpack(source, fail)
    assert (array == NUMBERS).all() and isinstance(array, np.memmap)
    assert index == {"frames": 4, "about": "", "array": ["|u1", 4, 1, 2, 3]}
    source.write_bytes(b"packed anew")
    array, _ = unpack(source, last_three)
    assert (array == NUMBERS[1:]).all() and len(list(source.parent.glob("frames-*"))) == 2
    source.unlink()
    assert (unpack(source, fail)[0] == NUMBERS[1:]).all()


def test_another_about_is_another_array(source):
    unpack(source, about="one")
    unpack(source, last_three, about="two")
    assert len(unpack(source, fail, "one")[0]) == 4 and len(unpack(source, fail, "two")[0]) == 3
    source.unlink()
    assert len(unpack(source, fail, "one")[0]) == 4 and unpack(source, fail, "three") is None


def test_a_writer_can_start_again(source):
    def pieces():
        yield from (NUMBERS, None, NUMBERS[2:], {})
    assert (unpack(source, pieces)[0] == NUMBERS[2:]).all()


def test_the_array_is_an_ordinary_npy_file(source):
    unpack(source)
    path, = source.parent.glob("*.npy")
    assert (np.load(path) == NUMBERS).all() and path.stat().st_size == 128 + 24


WAITING = """
import sys, time
from pathlib import Path
sys.path.insert(0, {root!r})
import data, numpy as np

def pieces():
    print("unpacking", flush=True)
    time.sleep(1)
    yield np.arange(24, dtype=np.uint8).reshape(4, 1, 2, 3)
    yield {{}}

folder = Path({folder!r})
array, _ = data.unpack_once(folder, [folder / "source"], pieces())
print(array.sum())
"""


@pytest.mark.skipif(data.fcntl is None, reason="processes wait for each other only where files can be locked")
def test_one_of_several_processes_unpacks_and_the_others_wait(source):
    script = WAITING.format(root=str(Path(data.__file__).parent), folder=str(source.parent))
    processes = [subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = [process.communicate(timeout=120)[0] for process in processes]
    assert sorted(said) == ["276\n", "276\n", "unpacking\n276\n"]


def test_an_unwritable_folder_is_named(source, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(data.DataError, match="cannot unpack into .*frames-.*: No space left on device"):
        unpack(source)
    assert os.listdir(source.parent) == ["source"]


def test_a_full_disk_while_a_file_is_read_is_not_that_file_s_fault(source):
    def pieces():
        with data.reading(source):
            raise OSError(28, "No space left on device")
        yield

    with pytest.raises(data.DataError, match=r"cannot unpack into .*frames-[0-9a-f]{12}.npy: No space left on device"):
        unpack(source, pieces)
    assert os.listdir(source.parent) == ["source"]


def test_only_what_this_program_wrote_is_removed(source):
    users = ("frames-mine.npy", ".notes.tmp", ".my.document.tmp", ".frames-0123456789ab.npy.tmp", "frames-a.json",
             "frames-0123456789ab.npy", "frames-0123456789ab.json", ".source.abcdefgh.tmp", "notes.json")
    for name in users:
        (source.parent / name).write_text('{"about": ""}')
    (source.parent / ".frames-0123456789ab.npy.ab_d3fgh.tmp").write_bytes(b"of a killed process")
    unpack(source)
    first, = (path.name for path in source.parent.glob("frames-*.npy") if path.name not in users)
    source.write_bytes(b"packed anew")
    unpack(source)
    there = {path.name for path in source.parent.iterdir()} - set(users)
    assert set(users) <= {path.name for path in source.parent.iterdir()} and len(there) == 3 and first not in there


def damages(array, index):
    """Names of the file to be damaged and functions that do so."""
    for damage in (b"", b"{}", b"[]", b"null", b"[" * 100_000, b'"' + b"9" * 10_000, b"\xff\xfe", b'{"check": []}',
                   index.read_bytes().replace(b'"frames": 4', b'"frames": 5'), index.read_bytes()[:-1]):
        yield index, lambda path, damage=damage: path.write_bytes(damage)
    whole = array.read_bytes()
    for damage in (b"", whole[:-1], whole[:100], b"PK\x03\x04" + whole, whole.replace(b"(4,", b"(3,"),
                   whole.replace(b"|u1", b"|O8")):
        yield array, lambda path, damage=damage: path.write_bytes(damage)
    for path in (array, index):
        yield path, os.mkfifo
        yield path, lambda path: path.symlink_to("/dev/zero")
        yield path, lambda path: None


def test_what_was_unpacked_and_is_damaged_is_made_anew(source):
    unpack(source)
    array, = source.parent.glob("*.npy")
    index = array.with_suffix(".json")
    whole = array.read_bytes(), index.read_bytes()
    for count, (path, damage) in enumerate(damages(array, index), 1):
        path.unlink()
        damage(path)
        assert (unpack(source)[0] == NUMBERS).all() and (array.read_bytes(), index.read_bytes()) == whole, count
    assert count == 22 and len(os.listdir(source.parent)) == 3


def test_an_old_array_that_cannot_be_removed_stays(source, monkeypatch):
    """As on Windows, where another process has it mapped."""
    def mapped(path, *_, **__):
        raise PermissionError(13, "being used by another process", str(path))

    unpack(source)
    source.write_bytes(b"packed anew")
    monkeypatch.setattr(Path, "unlink", mapped)
    assert (unpack(source, last_three)[0] == NUMBERS[1:]).all()
    assert len(list(source.parent.glob("frames-*"))) == 4


def test_an_array_that_another_process_made_meanwhile_is_taken(source, monkeypatch):
    """As on Windows, where nobody waits, and nobody replaces a file that is mapped."""
    whole = data.write_whole

    def second(path, content):
        whole(path, content)
        if path.suffix == ".npy":
            raise PermissionError(13, "being used by another process", str(path))

    monkeypatch.setattr(data, "write_whole", second)
    assert (unpack(source)[0] == NUMBERS).all()


@pytest.mark.parametrize("names", [["._source"], [".DS_Store", "._a"]])
def test_hidden_files_are_neither_read_nor_counted(tmp_path, names):
    for name in [*names, "source", "other", "frames-0123456789ab.npy"]:
        (tmp_path / name).write_text("")
    others = []
    assert data._listed(tmp_path, ".*source", others) == ["source"] and others == ["other"]
    assert data._listed(tmp_path / "none", ".*") == []
    with pytest.raises(data.DataError, match="source cannot be read: Not a directory"):
        data._listed(tmp_path / "source", ".*")


# ---------------------------------------------------------------------------------------- unpacked by a version before

MINUTES = [23_300_010 + 30 * k for k in range(16)] + [24_200_010 + 30 * k for k in range(8)]    # of 2014 and of 2016
UNPACKED = {    # name: (sources, about, shape of the array, index, options), as all versions since the first keep them
    "taxibj": (data.TAXIBJ_FILES, "h5", (150, 2, 32, 32), {"runs": [[0, 96], [96, 150]], "dropped": 3}, {}),
    "taxibj, clips": (["dataset.npz"], "npz", (65 * 8, 2, 32, 32), {"train": 60, "test": 5}, {}),
    "kth": ([f"boxing/person{person}_boxing_d1_uncomp.avi" for person in ("01", "16", "17")], "", (120, 1, 128, 128),
            {"films": [[f"person{person}_boxing_d1", first, 40] for person, first in
                       (("01", 0), ("16", 40), ("17", 80))], "skipped": ["person03_boxing_d1_uncomp.avi"]}, {}),
    "germany": (["RY2014.tar.gz", "RY2016.tar.gz"], "", (24, 1, 180, 180),
                {"times": MINUTES[::-1], "composites": 30, "repeated": 6, "unread": ["README.txt"]}, {}),
    "typhoon": ([f"20180801{hour:02d}00.tir.01.fld.geoss.bz2" for hour in range(20)], "box 5 110 45 150",
                (19, 1, 64, 64), {"hours": [*range(10), *range(11, 20)], "empty": 1, "missing": 0},
                {"box": [5, 110, 45, 150], "frames_in": 2, "horizon": 2}),
    "own.npz": (["own.npz"], "None 1", (60, 2, 8, 8), {"films": [[0, 30], [30, 60]], "layout": "NCHW", "test": 1,
                                                       "notes": ["of its 3 arrays only train and test were read"]},
                {"normalize": "range", "frames_in": 2, "horizon": 2}),
}


def keep(folder, sources, about, frames, index):
    """An array and its index, and the files that they came from, of which nothing can be read any more."""
    for path in sources:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"gone")
    folder.mkdir(parents=True, exist_ok=True)
    state = [about, *((str(path.relative_to(folder) if path.is_relative_to(folder) else path), path.stat().st_size,
                       path.stat().st_mtime_ns) for path in sources)]
    path = folder / f"frames-{hashlib.sha256(repr(state).encode()).hexdigest()[:12]}"
    np.save(path.with_suffix(".npy"), frames)
    index = {**index, "about": about, "array": [frames.dtype.str, *frames.shape]}
    check = hashlib.sha256(json.dumps(index).encode()).hexdigest()[:16]
    path.with_suffix(".json").write_text(json.dumps({**index, "check": check}))
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("frames-*")}


@pytest.mark.parametrize("name", UNPACKED)
def test_what_a_version_before_unpacked_is_used_with_its_sources_and_without(tmp_path, monkeypatch, name):
    monkeypatch.setattr(data, "TAXIBJ_TEST", 20)
    sources, about, shape, index, options = UNPACKED[name]
    own, dataset = name.startswith("own"), name.split(",")[0]
    folder = tmp_path / dataset
    sources = [(tmp_path if own else folder) / source for source in sources]
    if own:
        mark = hashlib.sha256(os.fsencode(sources[0].resolve())).hexdigest()[:12]
        folder, dataset = tmp_path / "own" / f"own-{mark}", str(sources[0])
    frames = np.random.default_rng(0).integers(0, 256, shape).astype("uint8" if name == "kth" else "float32")
    before = keep(folder, sources, about, frames, index)
    if name == "kth":
        (folder / "00sequences.txt").write_text("\n".join(f"{film} frames 1-40" for film, *_ in index["films"]))
    clips = data.open_data(dataset, tmp_path, **options)
    assert clips.array.filename == next(file for file in before if file.suffix == ".npy")
    assert (clips.array == frames).all()
    if not own:
        info, first = clips.info(), clips.train(0, 0, 3)
        for path in sources:
            path.unlink()
        again = data.open_data(dataset, tmp_path, **options)
        assert again.info() == info and again.train(0, 0, 3).equal(first)
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.glob("frames-*")}


@pytest.mark.parametrize("name", UNPACKED)
def test_the_files_of_that_test_could_not_be_unpacked_again(tmp_path, name):
    sources, *_, options = UNPACKED[name]
    own, dataset = name.startswith("own"), name.split(",")[0]
    sources = [(tmp_path if own else tmp_path / dataset) / source for source in sources]
    for path in sources:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"gone")
    with pytest.raises(data.DataError, match=f"(?i){dataset}"):
        data.open_data(str(sources[0]) if own else dataset, tmp_path, **options)
