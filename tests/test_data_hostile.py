"""Damaged and hostile files, full disks, kills, file systems without locks: one line each, and nothing half-written."""

import errno
import fcntl
import gzip
import io
import os
import signal
import socketserver
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest

import data

T10K = "t10k-images-idx3-ubyte"
NUMBERS = np.arange(24, dtype=np.uint8).reshape(4, 1, 2, 3)


def refused(call, *texts):
    with pytest.raises(data.DataError) as error:
        call()
    text = str(error.value)
    assert all(part in text for part in texts) and text.isprintable() and len(text) < 600, text
    return text


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = data.write_whole(tmp_path / "a", b"old")
    assert path.read_bytes() == b"old"

    def broken(file):
        file.write(b"new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write_whole(path, broken)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    data.write_whole(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and os.listdir(tmp_path) == ["a"]


def test_only_what_a_killed_process_left_of_the_same_file_is_removed_and_only_when_old(tmp_path):
    old = [".log.123.tmp", ".log.9.tmp"]
    others = [".log.tmp", ".log.12a.tmp", ".other.123.tmp", "log.123.tmp", ".log.123.tmp.bak", ".xlog.123.tmp"]
    for name in [*old, *others, ".log.77.tmp"]:
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - 3700,) * 2)
    os.utime(tmp_path / ".log.77.tmp", (time.time() - 3500,) * 2)                       # maybe still being written
    data.write_whole(tmp_path / "log", b"x")
    assert {path.name for path in tmp_path.iterdir()} == {*others, ".log.77.tmp", "log"}


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/a'"):
        data.write_whole(tmp_path / "a", b"x")
    (tmp_path / "source").write_bytes(b"packed")
    with pytest.raises(OSError, match="No space left on device: .*frames-[0-9a-f]{12}.npy"):
        unpack(tmp_path / "source")
    assert os.listdir(tmp_path) == ["source"]


def test_writing_needs_neither_chmod_nor_links_nor_locks(tmp_path, monkeypatch):
    """As on file systems that refuse them."""
    def unsupported(*_, **__):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    for name in ("chmod", "fchmod", "link", "symlink"):
        monkeypatch.setattr(os, name, unsupported)
    monkeypatch.setattr(fcntl, "flock", unsupported)
    with data.alone_in(tmp_path):
        data.write_whole(tmp_path / "a", b"x")
    assert (tmp_path / "a").read_bytes() == b"x"


def test_a_second_process_in_a_folder_is_refused(tmp_path):
    with data.alone_in(tmp_path):
        refused(lambda: data.alone_in(tmp_path).__enter__(), str(tmp_path), "another process is at work in it")
    with data.alone_in(tmp_path):
        pass


@pytest.mark.parametrize("error", [ValueError("bad\n  value"), KeyError("key"), MemoryError(), RecursionError("deep"),
                                   zipfile.BadZipFile("no zip"), OSError(5, "Input/output"), RuntimeError("a" * 5000)])
def test_whatever_a_reader_raises_is_one_line_with_the_way_out(tmp_path, error):
    path = tmp_path / "a\x1b[2J\udce9\n"
    path.write_bytes(b"content")

    def read():
        with data.reading(path, "delete it"):
            raise error

    text = refused(read, f"{tmp_path}/a\\x1b[2J\\udce9\\n cannot be read: ")
    reason = text.split("cannot be read: ")[1].removesuffix("; delete it")
    assert text.endswith("; delete it") and reason
    assert str(error.args[-1] if error.args else type(error).__name__).split()[0][:150] in reason


@pytest.mark.parametrize("kind", ["folder", "FIFO", "/dev/zero", "absent", "dangling"])
def test_what_is_no_regular_file_is_refused_at_once(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "folder":
        path.mkdir()
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind != "absent":
        path.symlink_to(kind)
    refused(lambda: data.reading(path).__enter__(), "a cannot be read: it ")


@pytest.mark.parametrize("fault", ["cut off", "bit", "not gzip", "another file", "bomb"])
def test_a_damaged_mnist_file_is_refused_by_name(real_mnist, tmp_path, fault):
    path = tmp_path / f"{T10K}.gz"
    whole = (real_mnist / path.name).read_bytes()
    path.write_bytes({"cut off": whole[:len(whole) // 2], "bit": whole[:5000] + bytes([whole[5000] ^ 16]) + whole[5001:],
                      "not gzip": b"<html>not found</html>", "another file": gzip.compress(b"something else"),
                      "bomb": gzip.compress(bytes(100 << 20), 1)}[fault])
    refused(lambda: data.mnist_digits(tmp_path, T10K), f"{path} cannot be read: ", "; delete it")
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("answer", [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n500\r\ncut off",
                                    b"no HTTP at all\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n", b"",
                                    b"HTTP/1.1 404 None\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n" + b"endless" * 4_000_000])
def test_after_a_broken_answer_the_second_mirror_is_asked(real_mnist, tmp_path, monkeypatch, answer):
    whole = (real_mnist / f"{T10K}.gz").read_bytes()
    answers = [answer, b"HTTP/1.1 200 OK\r\n\r\n" + whole]

    class Handler(socketserver.StreamRequestHandler):
        def handle(self):
            self.rfile.readline()
            try:
                self.wfile.write(answers.pop(0))
            except OSError:                                       # the client has had enough
                pass

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        url = "http://127.0.0.1:%d/" % server.server_address[1]
        monkeypatch.setattr(data, "MNIST_MIRRORS", (url, url))
        assert (data.mnist_digits(tmp_path, T10K) == data.mnist_digits(real_mnist, T10K)).all()
        server.shutdown()
    assert os.listdir(tmp_path) == [f"{T10K}.gz"]


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
import data
import numpy as np

def pieces():
    yield numbers.repeat(10_000, 0)     # more than a file buffers
    os.kill(os.getpid(), signal.SIGKILL)

numbers = np.arange(24, dtype=np.uint8).reshape(4, 1, 2, 3)
folder = Path({folder!r})
if {late}:      # killed between the index, which comes first, and the frames
    whole = os.replace
    os.replace = lambda old, new: os.kill(os.getpid(), 9) if str(new).endswith(".npy") else whole(old, new)
    pieces = lambda: iter((numbers, {{}}))
data.unpack_once("numbers", folder, [folder / "source"], pieces())
"""


def all_of_them():
    yield from (NUMBERS[:3], NUMBERS[3:], {"frames": 4})


def unpack(source, pieces=all_of_them, about=""):
    return data.unpack_once("taxibj", source.parent, [source] if source.exists() else [], pieces(), about)


def fail():
    raise AssertionError("unpacked again")
    yield


@pytest.fixture
def source(tmp_path):
    (tmp_path / "source").write_bytes(b"packed")
    return tmp_path / "source"


@pytest.mark.parametrize("late", [False, True])
def test_an_unpacking_that_is_killed_is_never_taken_for_whole(source, late):
    script = KILLED.format(root=str(Path(data.__file__).parent), folder=str(source.parent), late=late)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list(source.parent.glob("frames-*.npy"))
    array, index = unpack(source)
    assert (array == NUMBERS).all() and index["frames"] == 4


def test_it_is_done_once_until_the_source_changes(source):
    unpack(source)
    array, index = unpack(source, fail)
    assert (array == NUMBERS).all() and isinstance(array, np.memmap) and index == {"frames": 4, "about": ""}
    path, = source.parent.glob("frames-*.npy")
    assert (np.load(path) == NUMBERS).all() and path.stat().st_size == 128 + 24          # an ordinary .npy file
    os.utime(path, (0, 0))
    source.write_bytes(b"packed anew")
    assert (unpack(source, lambda: iter((NUMBERS[1:], {})))[0] == NUMBERS[1:]).all()
    stat = source.stat()
    source.write_bytes(b"packed newx")                                                  # as long, at another time
    os.utime(source, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    assert (unpack(source, lambda: iter((NUMBERS[2:], {})))[0] == NUMBERS[2:]).all()
    source.unlink()
    assert (unpack(source, fail)[0] == NUMBERS[2:]).all()                               # the last


@pytest.mark.parametrize("suffix", [".npy", ".json"])
@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"[" * 100_000, b"\xff\xfe", None])
def test_what_was_unpacked_and_is_damaged_is_blamed_itself(source, suffix, content):
    unpack(source)
    array, = source.parent.glob("frames-*.npy")
    damaged = array.with_suffix(suffix)
    content = damaged.read_bytes()[:-1] if content is None else content
    damaged.write_bytes(content)
    refused(lambda: unpack(source), f"{array} cannot be read: ", "; delete it to have it unpacked again")
    array.unlink()                                                                      # the advice, taken
    assert (unpack(source)[0] == NUMBERS).all()


@pytest.mark.parametrize("name", ["taxibj", "kth", "germany", "typhoon"])
@pytest.mark.parametrize("folder", ["absent", "empty"])
def test_without_its_data_a_dataset_says_where_to_get_them(tmp_path, name, folder):
    if folder == "empty":
        (tmp_path / name).mkdir()
    box = {"box": [5, 110, 45, 150]} if name == "typhoon" else {}
    refused(lambda: data.open_data(name, tmp_path, **box), f"{tmp_path / name} has no files of {name}; put there: ")
    assert os.listdir(tmp_path) == [name] * (folder == "empty")


def own(path, **options):
    return data.open_data(str(path), frames_in=3, horizon=2, **options)


def save(path, array):
    np.save(path, array)
    return path


def ramp(low, high):
    return np.linspace(low, high, 30)[:, None, None] * np.ones((4, 4))


REFUSED = {
    "no axis": (lambda: np.array(7), "has shape ()"),
    "one axis": (lambda: np.zeros(30, np.uint8), "has shape (30,)"),
    "no frames": (lambda: np.zeros((0, 4, 4), np.uint8), "has shape (0, 4, 4)"),
    "int32": (lambda: np.full((30, 4, 4), 7, np.int32), "from 7 to 7; what is not uint8 must lie in [0, 1]"),
    "complex": (lambda: np.zeros((30, 4, 4), complex), "holds complex128, not real numbers"),
    "text": (lambda: np.full((30, 4, 4), "a"), "holds <U1"),
    "record": (lambda: np.zeros((30, 4, 4), [("a", "u1")]), "holds"),
    "objects": (lambda: np.full((30, 4, 4), {"a": 1}, object), "save it again, as an array of numbers"),
    "channels": (lambda: np.zeros((3, 30, 17, 4, 4), np.uint8), "say what it is: --layout MTHWC"),
    "no data": (lambda: np.where(np.arange(30) // 5 == 1, np.nan, 0.5)[:, None, None] * np.ones((4, 4)),
                "no data at all (NaN) in frames 5 to 9"),
    "all NaN": (lambda: np.full((30, 4, 4), np.nan), "no data at all (NaN) in frames 0 to 4"),
    "infinity": (lambda: np.where(np.arange(30) == 29, -np.inf, 0.5)[:, None, None] * np.ones((4, 4)), "in frame 29"),
    "below": (lambda: ramp(-0.1, 1), "--normalize"),
    "short": (lambda: np.zeros((4, 4, 4), np.uint8), "films of 4 frames, too few for --frames-in 3 and --horizon 2"),
    "two windows": (lambda: np.zeros((10, 4, 4), np.uint8), "not one window of --frames-in 3 and --horizon 2 for"),
}


@pytest.mark.parametrize("fault", REFUSED)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_what_is_refused(tmp_path, fault, suffix):
    make, text = REFUSED[fault]
    path = tmp_path / f"mine{suffix}"
    np.save(path, make()) if suffix == ".npy" else np.savez(path, make())
    refused(lambda: own(path), text, str(path))
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("fault, follow, options", [
    ("infinity", lambda a: np.where(np.isfinite(a), a, np.nan), {}), ("int32", lambda a: a, {"normalize": [0, 9]}),
    ("below", lambda a: a, {"normalize": "range"}), ("complex", lambda a: a.real.astype(float), {}),
    ("text", lambda a: (a == "a").astype(float), {}), ("two windows", lambda a: np.tile(a, (2, 1, 1)), {})])
def test_the_way_out_of_a_refusal_works(tmp_path, fault, follow, options):
    assert own(save(tmp_path / "mine.npy", follow(REFUSED[fault][0]())), **options).train(0, 0, 2).shape[0] == 2


def test_an_array_without_a_range_has_no_scale(tmp_path):
    for value, text in ((0.5, "is 0.5 everywhere"), (np.nan, "no data at all")):
        path = save(tmp_path / "flat.npy", np.full((40, 4, 4), value))
        refused(lambda: own(path, normalize="range"), text)
    assert own(save(path, np.full((40, 4, 4), 0.5))).test(0, 1).unique().tolist() == [0.5]
    clips = own(save(path, np.arange(40.0).reshape(40, 1, 1)), normalize="range")        # of one pixel
    assert clips.size == (1, 1) and clips.test(0, 1).shape == (1, 5, 1, 1, 1)


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x01\x00\x76\x00{'descr': 'oops'", b"PK\x03\x04",
                                     b"\x93NUMPY\x09\x00", b"hello" * 100])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_damaged_files_are_refused_by_name(tmp_path, content, suffix):
    (tmp_path / f"mine{suffix}").write_bytes(content)
    refused(lambda: own(tmp_path / f"mine{suffix}"), f"mine{suffix} cannot be read")
    assert os.listdir(tmp_path) == [f"mine{suffix}"]


def test_truncated_and_unlike_files_are_refused(tmp_path):
    path = save(tmp_path / "mine.npy", np.zeros((100, 4, 4), np.uint8))
    with open(path, "r+b") as file:
        file.truncate(path.stat().st_size // 2)
    refused(lambda: own(path), "mine.npy cannot be read")
    packed = io.BytesIO()
    np.savez(packed, train=np.random.default_rng(0).integers(0, 256, (90, 64, 64), dtype=np.uint8))
    broken = bytearray(packed.getvalue())
    (tmp_path / "cut.npz").write_bytes(broken[:len(broken) // 2])
    broken[100_000] ^= 255                                                              # a wrong byte: the CRC tells
    (tmp_path / "bit.npz").write_bytes(broken)
    with zipfile.ZipFile(tmp_path / "nothing.npz", "w"):
        pass
    for name in ("cut.npz", "bit.npz", "nothing.npz"):
        refused(lambda: own(tmp_path / name), name)
    np.savez(tmp_path / "test.npz", test=np.zeros((30, 4, 4)), val=np.zeros((30, 4, 4)))
    refused(lambda: own(tmp_path / "test.npz"), "has test, val, none of them called train")
    refused(lambda: own(tmp_path / "absent.npy"), "no dataset and no file is called")


def test_names_that_are_no_utf8_are_printable(tmp_path):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xe9gion\n.npy"))
    clips = own(save(path, np.zeros((100, 4, 4), np.uint8)))
    for text in (clips.name, clips.test_set, *clips.notes):
        assert text.encode() and "\n" not in text and "r\\udce9gion" in text


LIMITED = """
import re, resource, sys
sys.path.insert(0, {root!r})
import data
held = int(re.search(r"VmData:\\s+(\\d+) kB", open("/proc/self/status").read())[1]) << 10
limit = held + (600 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    bytearray(limit)
except MemoryError:
    pass
else:
    sys.exit("the limit does not hold")
clips = data.open_data({path!r}, frames_in=10, horizon=10)
print(clips.train_count, clips.train(0, 0, 8).shape, clips.test(0, 4).mean().item())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts what it should on Linux only")
def test_an_array_larger_than_memory_is_read_in_pieces(tmp_path):
    array = np.lib.format.open_memmap(tmp_path / "large.npy", "w+", np.uint8, (300_000, 64, 64))    # 1.2 GB, sparse
    array[-30_000:-29_900] = 255
    del array
    script = LIMITED.format(root=str(Path(data.__file__).parent), path=str(tmp_path / "large.npy"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.stdout == "242981 torch.Size([8, 20, 1, 64, 64]) 1.0\n", done.stderr
