"""Sources of frames: datasets, generators, files of your own.

Every dataset is, in the end, clips: float frames in [0, 1], shape (B, T, C, H, W), on the device that trains.
`open_data` gives an object with the one small interface of `Clips`, and a training batch is a pure function of (seed,
iteration): a resumed or repeated run sees the same data, on any number of processes, on the CPU and on CUDA alike.

    clips = open_data("moving_mnist", data_dir="data", setup="patch4")
    frames = clips.train(seed=0, iteration=0, batch=8)      # (8, 20, 1, 64, 64), float32 in [0, 1]
    frames = clips.test(0, 100)                             # the first hundred test sequences

The first three sections, clips, draws, Moving MNIST and moving digits, stand alone on torch and numpy.
"""

import bz2
import contextlib
import errno
import gzip
import hashlib
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import urllib.request
import warnings
import zipfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from stat import S_ISDIR, S_ISREG

try:
    import fcntl
except ImportError:    # not on Windows, where nobody waits and what a killed process left stays
    fcntl = None

import numpy as np
import torch
from tqdm import tqdm


def printable(text):
    """Text for a terminal or a log: control characters, ends of lines and bytes that are no UTF-8 as escapes."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]",
                  lambda found: found[0].encode("unicode_escape").decode(), str(text))


class DataError(Exception):
    """Data that cannot be used. Its message is one printable line: the file, the fault and the way out."""

    def __init__(self, message):
        super().__init__(printable(message))


# ---------------------------------------------------------------------------------------------------------------- clips

class Clips:
    """What every dataset offers.

    name          such as "moving_mnist"
    test_set      a short text that says which test set this is
    channels      C;  size: (H, W)
    frames_in     frames a model reads;  horizon: frames it forecasts in training;  test_horizon: in the test
    unit          of `to_units`, such as "mm/h", or None where pixels have no unit;  notes: lines for the log
    thresholds    of events, in that unit, for CSI and HSS;  own: a file of the user's
    masked        whether clips hold NaN where there are no data
    train_count   number of different training clips, None if they never end;  valid_count, test_count: of those sets
    checksum      of a sample of the data themselves
    """

    unit, thresholds, notes, checksum = None, (), (), None
    masked = own = False

    def _clips(self, part, which, device):
        """What a dataset gives: clips of "train", "valid" or "test", `which` an array of numbers or a slice."""
        raise NotImplementedError

    def train(self, seed, iteration, batch, share=slice(None), device="cpu"):
        """The training batch of an iteration: float32 (b, frames_in + horizon, C, H, W) in [0, 1].

        A pure function of (seed, iteration, batch); `share` cuts rows out of the whole batch, for one of several
        processes.
        """
        return self._clips("train", fixed_order(seed, iteration, batch, self.train_count)[share], device)

    def valid(self, start, stop, device="cpu"):
        """Clips start … stop - 1 of the fixed validation set, cut from the training side, shaped as in `train`."""
        return self._clips("valid", slice(start, stop), device)

    def test(self, start, stop, device="cpu"):
        """Clips start … stop - 1 of the fixed test set: float32 (b, frames_in + test_horizon, C, H, W) in [0, 1]."""
        return self._clips("test", slice(start, stop), device)

    def test_units(self, start, stop, device="cpu"):
        """The clips of `test` in the data's own units as they are stored, not by way of pixels: floats."""
        return self.to_units(self.test(start, stop, device)).double()

    def to_units(self, frames):
        """Network pixels in [0, 1] as the data's own units (`unit`)."""
        return frames

    def info(self):
        """What a run's configuration and log say about its data; JSON-safe."""
        names = ("name", "test_set", "channels", "size", "frames_in", "horizon", "test_horizon", "unit",
                 "masked", "own", "train_count", "valid_count", "test_count", "checksum")
        return {name: getattr(self, name) for name in names} | {"thresholds": list(self.thresholds),
                                                                "notes": list(self.notes)}


def to_device(array, device):
    """A NumPy array as a tensor on a device; to CUDA by way of pinned memory, so that nobody waits for the copy."""
    tensor = torch.from_numpy(array)
    on_cuda = torch.device(device).type == "cuda"
    return (tensor.pin_memory() if on_cuda else tensor).to(device, non_blocking=on_cuda)


def _over_255(levels):
    """uint8 tensor -> float32 in [0, 1], the same bits on the CPU and on CUDA.

    By a tensor: CUDA multiplies by the reciprocal when it divides by a Python number.
    """
    return levels.float() / torch.full((), 255.0, device=levels.device)


def checksum_of(*arrays):
    """Of evenly spread rows of arrays, so that other data of the same shape are told apart: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str} {array.shape}".encode())
        rows = max(1, min(256, (1 << 28) // max(1, array[:1].nbytes)))
        for row in array[::-(-len(array) // rows) or 1]:
            digest.update(np.ascontiguousarray(row))
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------- draws

TRAIN, VALID, TEST, ORDER, STROKES = range(5)  # independent streams of random numbers
FIXED_SEED = 2015                              # of every fixed set: these never depend on the seed of a run


def draws(stream, seed, step, rows, columns):
    """Raw random numbers, uint32 of shape (rows, columns), that depend on (stream, seed, step) alone.

    Rows are drawn one after the other, so row j is the same however many rows are asked for. Philox's raw output is the
    same in every version of NumPy and on every machine, which its higher-level methods do not promise.
    """
    key = np.array([seed % 2**64, stream << 56 | step], dtype=np.uint64)
    count = rows * columns
    raw = np.random.Philox(key=key).random_raw((count + 1) // 2)
    return raw.astype("<u8").view("<u4")[:count].reshape(rows, columns)


def below(raw, n):
    """Whole numbers 0 … n - 1, uniform, from raw uint32 draws: the high part of raw · n (n up to 2^32)."""
    return (raw.astype(np.uint64) * np.uint64(n) >> np.uint64(32)).astype(np.int64)


@lru_cache(maxsize=4)
def _epoch_order(seed, epoch, count):
    return np.argsort(draws(ORDER, seed, epoch, count, 2).view("<u8")[:, 0], kind="stable")


def fixed_order(seed, iteration, batch, count):
    """Which of `count` fixed training clips make up a batch: int64 (batch,).

    Every epoch is a permutation of its own, and a batch may straddle two of them.
    """
    places = iteration * batch + np.arange(batch)
    return np.array([_epoch_order(seed, int(place) // count, count)[place % count] for place in places], np.int64)


# ------------------------------------------------------------------------------------------ Moving MNIST, moving digits

CANVAS, DIGIT, PLAY = 64, 28, 36    # pixels; a digit's corner has 64 - 28 = 36 pixels of play
ONE = 1 << 24                       # positions and velocities are whole multiples of 2^-24 of a pixel
DRAWS_PER_SEQUENCE = 10             # (which digit, start y, start x, direction, speed) of two digits


def trajectories(raw, setup, frames, digit_count):
    """The motion of two digits, in whole numbers, from raw draws (B, 10).

    Returns which (B, 2), the digits' numbers, and corners (B, frames, 2, 2), the (y, x) pixel of their upper left
    corner, both int64. The set-ups follow the two generators in use:

    patch4 (Srivastava et al. 2015): 3.6 pixels a frame; a step moves first, then a coordinate that has left [0, 36] is
    clamped to the edge and its velocity flips; frame 0 is after the first step; positions truncate to whole pixels.
    fullres (MS-LSTM): a whole speed of 2 to 6 pixels a frame, in any direction; frame 0 is the start; a velocity
    component flips when the next position would pass -2 or 38, then the digit moves; positions truncate toward zero.
    The released generator then shifts the finished frame one pixel to the right, which is not copied.
    """
    raw = raw.reshape(len(raw), 2, 5)
    which = below(raw[..., 0], digit_count)
    position = below(raw[..., 1:3], PLAY * ONE + 1)                                          # (B, 2, 2)
    angle = raw[..., 3] * (2 * np.pi / 2**32)
    speed = 2 + below(raw[..., 4], 5) if setup == "fullres" else 3.6
    velocity = np.stack([np.sin(angle), np.cos(angle)], -1) * np.expand_dims(speed, -1)
    velocity = np.rint(velocity * ONE).astype(np.int64)                                      # (B, 2, 2)
    corners = np.empty((len(raw), frames, 2, 2), np.int64)
    for t in range(frames):
        if setup == "fullres":
            corners[:, t] = position / ONE    # exact; a conversion to whole numbers truncates toward zero
            after = position + velocity
            velocity = np.where((after < -2 * ONE) | (after > (PLAY + 2) * ONE), -velocity, velocity)
            position = position + velocity
        else:
            position = position + velocity
            left = (position < 0) | (position > PLAY * ONE)
            position = position.clip(0, PLAY * ONE)
            velocity = np.where(left, -velocity, velocity)
            corners[:, t] = position >> 24
    return which, corners


def draw_digits(padded, which, corners, overlap):
    """Draw two moving digits per sequence: uint8 (B, T, 1, 64, 64).

    padded (N, 30, 30): digits with one pixel of zeros around them, so that an index clamped to the border reads black:
    no mask, and what leaves the canvas is cut off. which (B, 2); corners (B, T, 2, 2); all on one device. overlap:
    "max" or "add" (which clips at 255).
    """
    pixels = torch.arange(CANVAS, device=padded.device)
    inside = (pixels - corners[..., None] + 1).clamp_(0, DIGIT + 1)                          # (B, T, 2, 2, 64)
    rows, columns = inside[..., 0, :], inside[..., 1, :]                                     # (B, T, 2, 64)
    rows = (which[:, None, :, None] * (DIGIT + 2) + rows) * (DIGIT + 2)
    first, second = torch.take(padded, rows[..., None] + columns[..., None, :]).unbind(2)    # (B, T, 64, 64)
    frames = torch.maximum(first, second) if overlap == "max" else first + torch.minimum(second, 255 - first)
    return frames[:, :, None]


class MovingDigits(Clips):
    """Two digits that bounce in a 64×64 frame: Moving MNIST (Srivastava et al. 2015), from any set of digits.

    train_digits, test_digits: uint8 (N, 28, 28). held_back: so many of the last training digits are kept for validation
    and never trained on: in an endless generator nothing else keeps the two apart. Validation has 500 sequences.
    standard: the standard test file as an array (20, 10000, 64, 64), used instead of the generated test sequences.
    """

    channels, size = 1, (CANVAS, CANVAS)
    valid_count = 500

    def __init__(self, name, train_digits, test_digits, held_back, setup="patch4", frames_in=None, horizon=None,
                 standard=None):
        self.name, self.setup = name, setup
        self.frames_in = frames_in or 10
        self.horizon = self.test_horizon = horizon or 10
        self.overlap = "add" if setup == "fullres" else "max"
        self.train_count = 10_500 if setup == "fullres" else None
        self.test_count = 4_500 if setup == "fullres" else 10_000
        self.test_set = f"{name}, {self.test_count} generated sequences ({setup} rules)"
        self.standard = None
        if standard is not None and setup == "patch4" and self.frames_in + self.horizon <= len(standard):
            self.standard, self.test_count = standard, standard.shape[1]
            self.test_set = f"mnist_test_seq.npy, the standard {self.test_count} sequences"
        self._digits = {"train": _pad(train_digits[:-held_back]), "valid": _pad(train_digits[-held_back:]),
                        "test": _pad(test_digits)}
        self.checksum = checksum_of(train_digits, test_digits, *([] if self.standard is None else [self.standard]))
        self._on_device = {}
        self._tables = {part: draws(stream, FIXED_SEED, 0, count, DRAWS_PER_SEQUENCE) for part, stream, count in
                        (("train", TRAIN, self.train_count or 0), ("valid", VALID, self.valid_count),
                         ("test", TEST, self.test_count))}

    def train(self, seed, iteration, batch, share=slice(None), device="cpu"):
        if self.train_count:
            return super().train(seed, iteration, batch, share, device)
        return self._film("train", draws(TRAIN, seed, iteration, batch, DRAWS_PER_SEQUENCE)[share], device)

    def _clips(self, part, which, device):
        if part == "test" and self.standard is not None:
            frames = self.standard[:self.frames_in + self.horizon, which].swapaxes(0, 1)
            return _over_255(torch.from_numpy(np.ascontiguousarray(frames))[:, :, None].to(device))
        return self._film(part, self._tables[part][which], device)

    def _film(self, part, raw, device):
        key = part, str(device)
        if key not in self._on_device:
            self._on_device[key] = self._digits[part].to(device)
        padded = self._on_device[key]
        which, corners = trajectories(raw, self.setup, self.frames_in + self.horizon, len(padded))
        return _over_255(draw_digits(padded, to_device(which, device), to_device(corners, device), self.overlap))


def _pad(digits):
    return torch.from_numpy(np.pad(digits, ((0, 0), (1, 1), (1, 1))))


# Strokes of the ten digits in a box of 100 by 100, y downwards: smooth curves through these points. A point given twice
# in a row makes a corner.
STROKES_OF = {
    0: ["50,0 20,12 8,50 20,88 50,100 80,88 92,50 80,12 50,0"],
    1: ["30,22 55,0 55,0 55,50 55,100"],
    2: ["12,24 24,6 52,0 80,10 84,32 62,62 12,100 12,100 50,98 90,100"],
    3: ["14,12 46,0 78,12 74,36 44,48 44,48 78,58 86,80 60,99 30,98 10,86"],
    4: ["60,0 36,36 8,68 8,68 50,67 94,66", "70,34 68,66 66,100"],
    5: ["84,0 24,2 24,2 18,44 18,44 50,36 82,48 86,76 60,98 12,92"],
    6: ["70,0 34,24 14,62 26,94 56,100 82,84 76,58 48,50 18,68"],
    7: ["10,4 50,2 90,2 90,2 62,48 40,100"],
    8: ["52,48 22,32 24,8 50,0 76,8 78,30 52,48 18,68 16,90 48,100 82,90 84,68 52,48"],
    9: ["82,30 62,50 30,48 14,28 28,6 58,0 80,12 82,30 78,66 64,100"],
}


def stroke_digits(count, step):
    """Digits that the program draws itself: uint8 (count, 28, 28), the classes 0 … 9 in turn.

    Strokes with random slant, rotation, scale, thickness and jitter of their points, anti-aliased by the distance of
    each pixel's centre to the nearest segment. `step` chooses a set; the same always gives the same digits.
    """
    images = np.zeros((count, DIGIT, DIGIT), np.uint8)
    for label, strokes in STROKES_OF.items():
        rows = range(label, count, 10)
        strokes = [np.array([point.split(",") for point in stroke.split()], float) / 100 - 0.5 for stroke in strokes]
        points = sum(len(stroke) for stroke in strokes)
        uniform = draws(STROKES, FIXED_SEED, step * 10 + label, len(rows), 8 + 2 * points) / 2**31 - 1    # in [-1, 1)
        slant, turn, wide, high, thick, y, x, _ = uniform[:, :8].T
        jitter = uniform[:, 8:].reshape(len(rows), points, 2) * 0.05
        slant, turn = 0.12 + 0.25 * slant, 0.12 * turn
        width, height = 13 + 3 * wide, 19 + 1.5 * high                                       # pixels
        nearest = np.full((len(rows), DIGIT, DIGIT), np.inf)
        for stroke in strokes:
            bent = stroke + jitter[:, :len(stroke)]
            repeats = (np.diff(stroke, axis=0) == 0).all(1)
            bent[:, 1:][:, repeats] = bent[:, :-1][:, repeats]                               # a corner stays one
            jitter = jitter[:, len(stroke):]
            line = _smooth(bent)                                                             # (n, P, 2), (x, y)
            line_x = (line[..., 0] - slant[:, None] * line[..., 1]) * width[:, None]
            line_y = line[..., 1] * height[:, None]
            cos, sin = np.cos(turn)[:, None], np.sin(turn)[:, None]
            line = np.stack([line_x * cos - line_y * sin + 13.5 + x[:, None],
                             line_x * sin + line_y * cos + 13.5 + y[:, None]], -1)
            for a, b in zip(line.swapaxes(0, 1)[:-1], line.swapaxes(0, 1)[1:]):              # (n, 2) each
                np.minimum(nearest, _squared_distance(a, b), out=nearest)
        ink = (1.35 + 0.45 * thick)[:, None, None] + 0.5 - np.sqrt(nearest)
        images[label::10] = np.rint(255 * ink.clip(0, 1))
    return images


def _smooth(points, pieces=3):
    """A Catmull-Rom curve through (n, P, 2) points, as (n, (P - 1)·pieces + 1, 2) points on it."""
    before = np.concatenate([points[:, :1], points[:, :-1]], 1)
    after = np.concatenate([points[:, 1:], points[:, -1:]], 1)
    tangent = (after - before) / 2
    repeats = (points[:, 1:] == points[:, :-1]).all((0, 2))        # corners: no common tangent
    tangent[:, :-1][:, repeats] = tangent[:, 1:][:, repeats] = 0
    p, q, v, w = points[:, :-1], points[:, 1:], tangent[:, :-1], tangent[:, 1:]
    curve = [p + u * v + u * u * (3 * (q - p) - 2 * v - w) + u**3 * (2 * (p - q) + v + w)
             for u in np.arange(pieces) / pieces]
    line = np.stack(curve, 2).reshape(len(points), -1, 2)
    keep = np.repeat(~repeats, pieces)
    return np.concatenate([line[:, keep], points[:, -1:]], 1)


def _squared_distance(a, b):
    """Of each pixel's centre to the segments from a to b, both (n, 2) as (x, y): (n, 28, 28)."""
    pixels = np.arange(DIGIT, dtype=float)
    x, y = pixels[None, None, :] - a[:, 0, None, None], pixels[None, :, None] - a[:, 1, None, None]
    dx, dy = (b - a)[:, 0, None, None], (b - a)[:, 1, None, None]
    squared = dx * dx + dy * dy + 1e-12
    along = (x * (dx / squared) + y * (dy / squared)).clip(0, 1)
    return (x - along * dx)**2 + (y - along * dy)**2


def open_moving_digits(folder=None, setup="patch4", frames_in=None, horizon=None):
    """The generator of Moving MNIST over digits drawn by the program: needs no file and no folder. Never called MNIST.

    2,200 training digits, the last 200 of them for validation, and 500 test digits.
    """
    return MovingDigits("moving_digits", stroke_digits(2_200, 0), stroke_digits(500, 1), 200, setup, frames_in, horizon)


# ---------------------------------------------------------------------------------------------------------------- files

def write_whole(path, content):
    """Write a file so that it appears whole or not at all, also when the process is killed or the disk is full.

    content: bytes, or a function that writes to the open binary file. Returns the path, which an OSError names.
    """
    path = Path(path)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp makes files that nobody else can read
        os.replace(temporary, path)
    except BaseException as error:
        remove(Path(temporary))
        if isinstance(error, OSError) and error.errno and error.filename in (None, temporary):    # such as a full disk
            error.filename = str(path)
        raise
    return path


def remove(*paths):
    """Remove files where that can be done: on Windows it cannot while a process, maybe another, has one mapped."""
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink()


def progress(iterable=None, **options):
    """A progress bar on a terminal; elsewhere a plain line now and then, and none for what is soon done."""
    if not sys.stderr.isatty():
        options |= {"delay": 30, "mininterval": 30, "maxinterval": 60}
    return tqdm(iterable, leave=False, **options)


@contextlib.contextmanager
def alone_in(folder, written=".+", wait=True):
    """Let one process at a time fill a folder; the others wait, or are refused. What killed ones left there is removed.

    written: a regular expression of the names that this program writes there: of nothing else is a remnant removed.
    """
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):    # a file system without locks
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                raise DataError(f"{folder}: another process is at work in it; wait for its end") from None
            remove(*(path for path in Path(folder).iterdir()
                     if re.fullmatch(rf"\.({written})\.[a-z0-9_]{{8}}\.tmp", path.name)))    # `write_whole`'s
        yield
    finally:
        os.close(handle)


@contextlib.contextmanager
def reading(path, way_out=""):
    """The door for every file that this process did not write: opens it, binary, for the block of a `with`.

    What is no regular file is refused without being read or waited for, and whatever the block raises becomes a
    DataError of one line that names the file, the reason and the way out. A DataError passes, and so does an OSError
    that is about writing or about another file. Warnings of libraries about the file are silent.
    """
    try:
        with warnings.catch_warnings(), open(path, "rb", opener=_open_regular) as file:
            warnings.simplefilter("ignore")
            yield file
    except DataError:
        raise
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error)
        if isinstance(error, OSError):
            other = error.filename is not None and str(error.filename) != str(path)
            if other or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
                raise
        elif type(error).__module__ == "builtins" and not isinstance(error, (ValueError, EOFError)):
            reason = f"{type(error).__name__} {reason}"    # such as a KeyError, whose text is the key
        reason = " ".join(reason.split())[:200] or type(error).__name__
        raise DataError(f"{path} cannot be read: {reason}{way_out and '; '}{way_out}") from None


def _open_regular(path, flags):
    """For `open`: a FIFO would wait for its writer, a device may never end."""
    handle = os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
    mode = os.fstat(handle).st_mode
    if not S_ISREG(mode):
        os.close(handle)
        raise ValueError("it is a folder" if S_ISDIR(mode) else "it is no regular file")
    return handle


def _folder(path, way_out=""):
    """Make a folder; DataError if that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"cannot make the folder {path}: {error.strerror}{way_out}") from None


# -------------------------------------------------------------------------------------------------------- MNIST's files

MNIST_MIRRORS = ("https://ossci-datasets.s3.amazonaws.com/mnist/",
                 "https://storage.googleapis.com/cvdf-datasets/mnist/")
MNIST_FILES = {  # name: (bytes, SHA-256) of the unpacked file, a header of 16 bytes and 60,000 or 10,000 digits
    "train-images-idx3-ubyte": (47_040_016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
    "t10k-images-idx3-ubyte": (7_840_016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
}
SILENCE, DOWNLOAD = 30, 600    # seconds without data, and of one download, after which it is given up


def mnist_digits(folder, name):
    """The digits of one MNIST file, uint8 (N, 28, 28), downloaded into `folder` first if they are not there.

    The file may lie there plain or as .gz. Raises DataError if it is not the MNIST file, whole, or cannot be had.
    """
    path = folder / name if (folder / name).exists() else folder / f"{name}.gz"
    if not path.exists():
        _folder(folder, "; --data moving_digits needs none")
        with alone_in(folder, re.escape(path.name)):
            if not path.exists():
                _download_mnist(path)
    with reading(path, "delete it to have it downloaded again") as file:
        content = _mnist_content(gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file, name)
    return np.frombuffer(content, np.uint8, offset=16).reshape(-1, DIGIT, DIGIT)


def _mnist_content(file, name):
    """The unpacked bytes of an MNIST file, of which no more are read than it has; ValueError if they are others."""
    size, checksum = MNIST_FILES[name]
    content = file.read(size + 1)
    if hashlib.sha256(content).hexdigest() != checksum:
        raise ValueError("it is not the MNIST file of that name (its checksum differs)")
    return content


def _download_mnist(path):
    """Download path.name from a mirror; it appears under its name only once its unpacked content has the checksum."""
    faults = []
    for mirror in MNIST_MIRRORS:
        try:
            content = _fetch(mirror + path.name, MNIST_FILES[path.stem][0])    # packed, it is smaller
            _mnist_content(gzip.GzipFile(fileobj=io.BytesIO(content)), path.stem)
        except Exception as error:    # whatever a server sends, the next one may have the file
            faults.append(f"{mirror.split('/')[2]}: {str(error) or type(error).__name__}")
        else:
            return write_whole(path, content)
    raise DataError(f"cannot download {path.name} ({'; '.join(faults)}): put the file into {path.parent}, or use "
                    f"--data moving_digits, which needs none")


def _fetch(url, most):
    """The bytes behind a URL, with a progress bar; an error after `most` bytes, SILENCE or DOWNLOAD seconds.

    In a thread of its own: a server that drips could otherwise hold back whoever waits, its headers alone for days.
    """
    answer, late = Future(), threading.Event()

    def fetch():
        try:
            content = bytearray()
            with urllib.request.urlopen(url, timeout=SILENCE) as response, progress(
                    total=response.length, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[1]) as bar:
                while not late.is_set() and (part := response.read1(1 << 16)):
                    content += part
                    bar.update(len(part))
                    if len(content) > most:
                        raise ValueError("it sends more than the file has")
            answer.set_result(bytes(content))
        except Exception as error:
            answer.set_exception(error)

    threading.Thread(target=fetch, daemon=True).start()
    if not wait([answer], DOWNLOAD).done:
        late.set()
        raise TimeoutError(f"not done after {DOWNLOAD} seconds")
    return answer.result()


def open_moving_mnist(folder, setup="patch4", frames_in=None, horizon=None):
    """Moving MNIST from the real digits in `folder`; `mnist_test_seq.npy` there is the test set of patch4.

    The last 2,000 of the 60,000 training digits are for validation.
    """
    train, test = (mnist_digits(folder, name) for name in MNIST_FILES)
    standard, path = None, folder / "mnist_test_seq.npy"
    if setup == "patch4" and path.exists():
        with reading(path, "remove it, and generated test sequences are used"):
            standard = np.lib.format.open_memmap(path, mode="r")
            if standard.dtype != np.uint8 or standard.shape != (20, 10_000, CANVAS, CANVAS):
                raise ValueError(f"it has {standard.dtype} {standard.shape}, not uint8 (20, 10000, 64, 64)")
    return MovingDigits("moving_mnist", train, test, 2_000, setup, frames_in, horizon, standard)


# ------------------------------------------------------------------------------- windows cut out of an array of frames

PIECE = 1 << 26    # bytes that are looked at at a time


class Scale:
    """Between a file's values and network pixels: low … high is 0 … 1, and what lies outside is clipped.

    low, high: one number each, or one for each channel; DataError, which says `whose`, if they are no scale. Tensors
    (…, C, H, W), on any device; NaN stays NaN.
    """

    def __init__(self, low, high, whose="--normalize"):
        self.low, self.high, self._on_device = low, high, {}
        ends = zip(np.atleast_1d(low).tolist(), np.atleast_1d(high).tolist())
        if not all(least < most and math.isfinite(most - least) for least, most in ends):
            raise DataError(f"{whose}: {low} … {high} is no scale: two numbers are needed, the lower first, not as far "
                            f"apart as floats go")

    def note(self):
        """What `scale_of` makes a scale of again; JSON-safe. None for the two that a file's dtype tells."""
        return None if self in (LEVELS, PLAIN) else [self.low, self.high]

    def to_network(self, values):
        """Values -> float32 pixels in [0, 1]."""
        low, span = self._low_and_span(values.device)
        return ((values.double() - low) / span).clamp(0, 1).float()

    def to_units(self, pixels):
        """Pixels -> values, float64."""
        low, span = self._low_and_span(pixels.device)
        return pixels.double() * span + low

    def _low_and_span(self, device):
        if device not in self._on_device:    # kept: to copy them for every batch would be to wait for the device
            low, high = (torch.tensor(end, dtype=torch.float64) for end in (self.low, self.high))
            low, high = (end[:, None, None] if end.ndim else end for end in (low, high))
            self._on_device[device] = low.to(device), (high - low).to(device)
        return self._on_device[device]


LEVELS, PLAIN = Scale(0.0, 255.0), Scale(0.0, 1.0)    # of uint8, and of floats that lie in [0, 1] already


class RainScale:
    """Rain R in mm/h and pixels: dBZ = 10·log10(256·R^1.42), pixel = clip((dBZ + 10)/70, 0, 1).

    Rain-free is 0, and 0 is rain-free. Tensors on any device; no data, NaN, stays NaN.
    """

    def note(self):
        return "rain"

    def to_network(self, rain):
        dbz = 10 * torch.log10(256 * rain.double().clamp(min=0)**1.42)
        return ((dbz + 10) / 70).clamp(0, 1).float()

    def to_units(self, pixels):
        rain = (10**((70 * pixels.double() - 10) / 10) / 256)**(1 / 1.42)
        return rain * (pixels > 0)


def scale_of(info):
    """The `Scale` of a run's data from their `Clips.info()`, or None where a file's dtype tells it."""
    note = info.get("scale")
    return None if note is None else RainScale() if note == "rain" else Scale(*note)


class Windows(Clips):
    """Clips cut out of a long array of frames, which stays on the disk: only the windows of a batch are read.

    frames: (N, C, H, W) of numbers, memory-mapped. starts: {"train": …, "valid": …, "test": …}, the numbers of the
    windows' first frames, int64. scale: from the array's values to pixels. order: where the array is not in the order
    of time, the places of its frames in that order, in which starts count. layout: of a user's file, one of LAYOUTS.
    The rest as in `Clips`.
    """

    def __init__(self, name, frames, starts, frames_in, horizon, test_horizon=None, scale=LEVELS, test_set="",
                 order=None, unit=None, thresholds=(), masked=False, own=False, notes=(), layout=None):
        self.name, self.array, self.starts, self.scale, self.order = printable(name), frames, starts, scale, order
        self.unit, self.thresholds, self.masked, self.own = unit, tuple(thresholds), masked, own
        self.notes, self.checksum, self.layout = [printable(note) for note in notes], checksum_of(frames), layout
        self.frames_in, self.horizon, self.test_horizon = frames_in, horizon, test_horizon or horizon
        self.channels, self.size = frames.shape[1], tuple(frames.shape[2:])
        self.train_count, self.valid_count, self.test_count = (len(starts[key]) for key in ("train", "valid", "test"))
        self.test_set = printable(f"{name}, {self.test_count} sequences{test_set and ', '}{test_set}")

    def test_units(self, start, stop, device="cpu"):
        values = self._stored("test", slice(start, stop), device)
        return values if values.is_floating_point() else values.double()    # in its type 0.7 is 0.7

    def to_units(self, frames):
        return self.scale.to_units(frames)

    def info(self):
        return {**super().info(), "scale": self.scale.note()}

    def as_file(self, forecast):
        """A forecast of all test clips, (M, K, C, H, W), clipped to [0, 1], in units, dtype and layout of the file.

        Where each film has a file of its own, an axis M stands in front.
        """
        values, dtype = self.to_units(forecast.detach().cpu().double().clamp(0, 1)).numpy(), self.array.dtype
        values = values if dtype.kind == "f" else np.rint(values)
        if dtype.kind != "b":
            limits = (np.finfo if dtype.kind == "f" else np.iinfo)(dtype)
            values = values.clip(limits.min, limits.max)
        values = np.moveaxis(values, 2, -1) if self.layout[-1] == "C" else values
        values = values if "C" in self.layout else values[:, :, 0]
        return (values if self.layout[0] == "M" or len(values) > 1 else values[0]).astype(dtype)

    def _stored(self, part, which, device):
        """Windows (b, T, C, H, W) on the device, their values as stored; through pinned memory, so nothing waits."""
        starts = self.starts[part][which]
        length = self.frames_in + (self.test_horizon if part == "test" else self.horizon)
        on_cuda = torch.device(device).type == "cuda"
        values = torch.empty((len(starts), length, *self.array.shape[1:]), dtype=torch_dtype(self.array.dtype),
                             pin_memory=on_cuda)
        for window, start in zip(values.numpy(), starts):
            places = slice(start, start + length)
            window[:] = self.array[places if self.order is None else self.order[places]]
        return values.to(device, non_blocking=on_cuda)

    def _clips(self, part, which, device):
        values = self._stored(part, which, device)
        return _over_255(values) if self.scale is LEVELS else self.scale.to_network(values)


def torch_dtype(dtype):
    """The torch type that holds every number of a NumPy type (of the largest integers, the nearest float64)."""
    held = {code: code for code in ("u1", "i1", "i2", "i4", "i8", "f2", "f4")} | {"b1": "u1", "u2": "i4", "u4": "i8"}
    return torch.from_numpy(np.empty(0, held.get(dtype.str[1:], "f8"))).dtype


def windows_in(runs, length, stride=1, first=0, stop=sys.maxsize):
    """Every stride-th window of `length` frames inside first … stop - 1 that stays inside one run [at, end]: int64."""
    return np.concatenate([np.arange(max(first, at), min(stop, end) - length + 1, stride, dtype=np.int64)
                           for at, end in runs])


def hold_out(starts, count, length):
    """Keep the last `count` of the windows at `starts` (ascending) aside: (the rest, those), which share no frame."""
    rest, held = np.split(starts, [len(starts) - count])
    return (rest[rest + length <= held[0]] if len(held) else rest), held


def parted(name, side, test, length, why=""):
    """The training side's windows, cut into training and validation, which share no frame, and those of the test."""
    train, valid = hold_out(side, max(1, len(side) // 20), length)
    return some_in_each(name, {"train": train, "valid": valid, "test": test}, length, why)


def some_in_each(name, parts, length, why=""):
    """The parts, if each of them has a window; else DataError."""
    if empty := [part for part in parts if not len(parts[part])]:
        raise DataError(f"{name}: not one window of {length} frames for {' and '.join(empty)}{why}")
    return parts


@np.errstate(invalid="ignore")    # a signalling NaN, where it becomes a float64
def frame_ranges(frames, name):
    """The lowest and the highest value in each channel of each frame, and how many are missing (NaN): (N, C, 3).

    Looked at in pieces. DataError at infinity.
    """
    ranges = np.zeros((*frames.shape[:2], 3))
    step = max(1, PIECE // frames[0].nbytes)
    for at in progress(range(0, len(frames), step), desc=f"checking {printable(name)}", disable=len(frames) <= step):
        piece, found = frames[at:at + step], ranges[at:at + step]
        found[..., 0], found[..., 1] = piece.min((2, 3)), piece.max((2, 3))
        if np.isnan(found).any():
            found[..., 0], found[..., 1] = (end.reduce(piece, axis=(2, 3)) for end in (np.fmin, np.fmax))
            found[..., 2] = np.isnan(piece).sum((2, 3))
        if np.isinf(found).any():
            raise DataError(f"{name} has infinity in frame {at + int(np.isinf(found).any((1, 2)).argmax())}: where it "
                            f"means no data, save numpy.where(numpy.isfinite(a), a, numpy.nan)")
    return ranges


def ends_of(ranges):
    """The lowest and the highest value in ranges of `frame_ranges`; NaN where there is none."""
    return tuple(float(end.reduce(ranges[..., k], None, initial=np.nan)) for k, end in enumerate((np.fmin, np.fmax)))


@np.errstate(invalid="ignore")    # a signalling NaN, where it becomes a float64
def fitted_scale(name, frames, stop, ranges=None, per_channel=False):
    """From the range of frames 0 … stop - 1, the training side, to pixels: (scale, notes). The rest is the test's.

    ranges: of `frame_ranges`. One scale for all channels, or one for each. A few values that leave all others a tenth
    of the scale at most are said: such as -9999 are no measurements.
    """
    ranges = frame_ranges(frames, name) if ranges is None else ranges
    count, scales, notes = frames.shape[1] if per_channel else 1, [], []
    for k in range(count):
        where, channels = (f"{name}, channel {k + 1}", [k]) if count > 1 else (name, slice(None))
        (low, high), (least, most) = (ends_of(part[:, channels]) for part in (ranges[:stop], ranges[stop:]))
        if not low < high:
            what = "has no data" if math.isnan(low) else f"is {low:g} everywhere"
            raise DataError(f"{where}: the training part {what}, so it has no scale: --normalize LOW HIGH gives one")
        scales.append(Scale(low, high, where))
        notes.append(f"{where}: scaled by the training part's minimum and maximum, {low:g} and {high:g}")
        if least < low or most > high:
            notes.append(f"{where}: the test part goes from {least:g} to {most:g} and is clipped")
        t, y, x = (-(-n // some) for n, some in zip((stop, *frames.shape[2:]), (64, 256, 256)))
        sample = frames[:stop:t, channels, ::y, ::x].astype(float)
        notes += _lone_extremes(where, np.r_[sample.ravel(), ranges[:stop, channels, :2].ravel()])
    return scales[0] if count == 1 else Scale([s.low for s in scales], [s.high for s in scales]), notes


def _lone_extremes(name, values):
    """A note if at most three values at the ends leave all the others a tenth of the range or less."""
    seen = np.unique(values[np.isfinite(values)])
    rest, alone = seen, []
    for count, below in ((count, below) for count in (1, 2, 3) for below in range(count + 1)):
        inner = rest[below:len(rest) - count + below]
        if len(alone) + count <= 3 and len(inner) > 1 and (rest[-1] - rest[0]) / 10 >= inner[-1] - inner[0]:
            rest = inner
            alone = [f"{value:g}" for value in seen if not rest[0] <= value <= rest[-1]]
    return [f"{name}: {', '.join(alone)} squeezes all other values, {rest[0]:g} … {rest[-1]:g}, into "
            f"1/{(seen[-1] - seen[0]) / (rest[-1] - rest[0]):.0f} of the scale; if it means no data, save "
            f"numpy.where(a == {alone[0]}, numpy.nan, a)"] if alone else []


# ---------------------------------------------------------------------------------------------------- files of your own

LAYOUTS = ("NHW", "NCHW", "NHWC", "MTHW", "MTCHW", "MTHWC")    # N frames of one film, M films of T frames, C channels
VIDEOS = (".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")
IMAGES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def _header(file, path):
    """(shape, dtype) of an open .npy file; DataError if its numbers cannot be used."""
    versions = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if (version := np.lib.format.read_magic(file)) not in versions:
        raise ValueError(f"version {version} of .npy is unknown")
    shape, fortran, dtype = versions[version](file)
    if dtype.hasobject:
        raise DataError(f"{path} holds pickled objects, which are never loaded: save numpy.stack(a).astype(float)")
    if dtype.kind not in "buif":
        raise DataError(f"{path} holds {dtype}, not real numbers: save a.astype(float)")
    if fortran and sum(n > 1 for n in shape) > 1:
        raise DataError(f"{path} is in Fortran order, where frames lie scattered: save numpy.ascontiguousarray(a)")
    return shape, dtype


def _layout(shape, layout, path):
    """What the axes of an array are, one of LAYOUTS: as given, else by the shape; DataError if they cannot be that."""
    if layout is None and 3 <= len(shape) <= 5:
        colours = len(shape) > 3 and shape[-1] <= 4 < min(shape[-3:-1])    # no frame is so narrow
        four = "NHWC" if colours else "NCHW" if shape[1] <= 16 else "MTHW"
        layout = ("NHW", four, "MTHWC" if colours else "MTCHW")[len(shape) - 3]
        if shape == (20, 10_000, CANVAS, CANVAS):
            raise DataError(f"{path} has the shape of mnist_test_seq.npy, which is (T, M, H, W): save "
                            f"numpy.swapaxes(a, 0, 1)")
    if layout is None or len(layout) != len(shape) or min(shape) < 1:
        raise DataError(f"{path} has shape {shape}, which is not {layout or 'any'} of --layout {'|'.join(LAYOUTS)} (N "
                        f"frames of one film, M films of T frames, C channels): numpy.moveaxis or reshape make it one")
    if "C" in layout and shape[layout.index("C")] > 16:
        raise DataError(f"{path} has shape {shape}, as {layout} more than 16 channels: --layout says what its axes "
                        f"are, one of {', '.join(LAYOUTS)}")
    return layout


def _channels_first(array, layout):
    """A view of an array as (…, C, H, W)."""
    return np.moveaxis(array, -1, -3) if layout[-1] == "C" else array if "C" in layout else array[..., None, :, :]


def own_frames(path, data_dir, layout=None, channels=None, colour=False):
    """A user's frames, (N, C, H, W) of numbers, memory-mapped, and how they were read.

    path: a .npy file; or what is unpacked once into the data folder: a .npz file, a film, a folder of .npy files, of
    films or of images. Returns (frames, index): `films` [[first, stop], …], the `layout` of arrays, the number of the
    first film of the array `test` or None, `how` the frames were read and `notes`, the `folder` for what is kept.
    colour: what ffmpeg reads has 3 channels, unless `channels` says how many.
    """
    if layout not in (None, *LAYOUTS):
        raise DataError(f"--layout {layout} is none of {', '.join(LAYOUTS)}")
    sources, passed = [path], []
    if path.is_dir():
        names = sorted(_listed(path, "(?s).+"), key=lambda name: re.sub("[0-9]+", lambda n: n[0].zfill(20), name))
        for kinds in (".npy", VIDEOS, IMAGES):
            if sources := [path / name for name in names if name.lower().endswith(kinds)]:
                break
        else:
            raise DataError(f"{path} is {'a' if names else 'an empty'} folder: --data takes one of .npy files, of "
                            f"films or of images")
        passed = sorted({*names} - {source.name for source in sources})
    kind = sources[0].suffix.lower()
    arrays = kind in (".npy", ".npz")
    if not arrays and kind not in VIDEOS + IMAGES:
        raise DataError(f"{path} is no array (.npy, .npz), film ({', '.join(VIDEOS)}) or image ({', '.join(IMAGES)})")
    if arrays and channels or layout and not arrays:
        raise DataError(f"--{'channels is for films and images' if arrays else 'layout is for arrays'}, not for {path}")
    channels = channels or (3 if colour else 1)
    folder = Path(data_dir) / "own" / f"{path.stem}-{hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:12]}"
    if kind == ".npy" and sources == [path]:
        with reading(path) as file:
            shape, _ = _header(file, path)
            axes = _layout(shape, layout, path)
            array = _channels_first(np.lib.format.open_memmap(path, mode="r"), axes)
            frames = array.reshape(-1, *array.shape[-3:])
        index = {"films": _films(0, len(frames), axes, shape), "layout": axes, "test": None, "notes": []}
    else:
        frames, index = unpack_once(folder, sources, _own_pieces(path, sources, kind, layout, channels),
                                    f"{layout} {channels}")
    how = f"read as {index['layout']}" if arrays else f"read by ffmpeg as 8-bit {'colour' if channels == 3 else 'grey'}"
    how += "; --layout MTHW takes the first axis for films" * (layout is None and index["layout"] == "NCHW")
    notes = [f"{len(passed)} files passed over, such as {passed[0]}"] if passed else []
    return frames, index | {"how": how, "notes": index["notes"] + notes, "folder": folder}


def _films(first, stop, axes="N", shape=()):
    """The films [first, stop] in frames first … stop - 1: one, or those of an array."""
    length = shape[1] if axes[0] == "M" else stop - first
    return [[at, at + length] for at in range(first, stop, length)]


def _own_pieces(path, sources, kind, layout, channels):
    """The frames of all files of a kind, some (n, C, H, W) at a time. The index: see `own_frames`."""
    index = {"films": [], "layout": "NHW" if channels == 1 else "NHWC", "test": None, "notes": []}
    count, form = 0, None

    def alike(pieces, label, *about):
        nonlocal count, form
        first = count
        for piece in pieces:
            form = form or (piece.shape[1:], piece.dtype)
            if (piece.shape[1:], piece.dtype) != form:
                raise DataError(f"{label} has frames {piece.shape[1:]} of {piece.dtype}, those before it are "
                                f"{form[0]} of {form[1]}: they must be alike")
            yield piece
            count += len(piece)
            bar.update(len(piece))
        index["films"] += _films(first, count, *about)

    def array(file, size, label):
        shape, dtype = _header(file, label)
        index["layout"] = axes = _layout(shape, layout, label)
        yield from alike(_pieces(file, size, label, shape, dtype, axes.lstrip("NMT")), label, axes, shape)

    def arrays(file):
        with zipfile.ZipFile(file) as archive:
            names = [name.removesuffix(".npy") for name in archive.namelist()]
            if not names:
                raise DataError(f"{path} holds no array: numpy.savez(path, train=a, test=b), or an array a film")
            if in_parts := {"train", "test"} <= {*names}:
                index["notes"] += [f"of its {len(names)} arrays only train and test were read"] * (len(names) > 2)
            for name in ("train", "test") if in_parts else names:
                if in_parts and name == "test":
                    index["test"] = len(index["films"])
                with archive.open(f"{name}.npy") as member:
                    yield from array(member, archive.getinfo(f"{name}.npy").file_size, f"{path} ({name})")

    with progress(desc=f"unpacking {printable(path.name)}", unit="frame") as bar:
        if kind in IMAGES:
            yield from alike(_images(sources, channels, index["notes"]), path)
            sources = []
        for source in sources:
            with reading(source) as file:
                if kind == ".npz":
                    yield from arrays(file)
                elif kind == ".npy":
                    yield from array(file, source.stat().st_size, source)
                else:
                    yield from alike(_decoded(source, channels, index["notes"]), source)
    yield index


def _pieces(file, size, label, shape, dtype, axes):
    """The frames of an open .npy file after its header, some (n, C, H, W) at a time. axes: those of one frame."""
    frame = shape[-len(axes):]
    each, left = dtype.itemsize * math.prod(frame), math.prod(shape[:-len(axes)])
    if size - file.tell() < each * left:
        raise DataError(f"{label} ends before its last frame: save it again")
    while left:
        count = min(left, max(1, PIECE // each))
        yield _channels_first(np.frombuffer(file.read(count * each), dtype).reshape(count, *frame), axes)
        left -= count
    file.read(1)    # the end of an array in a .npz, where its checksum is looked at


def _ffmpeg_reads(what):
    """DataError where ffmpeg is not installed."""
    if not shutil.which("ffmpeg"):
        raise DataError(f"{what} read through the program ffmpeg, which is not installed: apt install ffmpeg, or see "
                        f"ffmpeg.org")


def _decoded(path, channels, notes, *options):
    """The frames of a film, or the one of an image, uint8 (1, C, H, W) each, through the program ffmpeg.

    channels: 1, grey, or 3, red, green and blue. What ffmpeg finds wrong in a file that it reads goes to the notes.
    """
    _ffmpeg_reads(f"{path} is")
    codec, pixels, count = *(("pgm", "gray") if channels == 1 else ("ppm", "rgb24")), 0
    command = ["ffmpeg", "-nostdin", "-v", "error", "-protocol_whitelist", "file", "-i", f"file:{path}", *options,
               "-vf", "setpts=N/FRAME_RATE/TB",    # every frame once, whatever the times in the file
               "-f", "image2pipe", "-c:v", codec, "-pix_fmt", pixels, "-"]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=said) as program:
            while program.stdout.readline():    # "P5" or "P6", then the size, then 255, each on a line
                width, height = map(int, program.stdout.readline().split())
                program.stdout.readline()
                content = program.stdout.read(width * height * channels)
                yield np.frombuffer(content, np.uint8).reshape(1, height, width, channels).transpose(0, 3, 1, 2)
                count += 1
        said.seek(0)
        line = said.read(500).decode(errors="replace").split("\n")[0]
    if program.returncode or not count:
        raise DataError(f"{path} cannot be read by ffmpeg: {line or 'it has no frame'}")
    if line:
        notes.append(f"ffmpeg read {count} frames of {path.name} and says: {line}")


def _images(paths, channels, notes):
    """The frames of a film that lies as images, in the order of their names, uint8 (1, C, H, W) each."""
    def one(path):
        with reading(path):
            return [*_decoded(path, channels, notes, "-frames:v", "1")][0]

    first = None
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for at in range(0, len(paths), 64):
            for path, frame in zip(paths[at:], pool.map(one, paths[at:at + 64])):
                first = frame if first is None else first
                if frame.shape != first.shape:
                    raise DataError(f"{path} has {frame.shape[3]} x {frame.shape[2]} pixels, {paths[0].name} "
                                    f"{first.shape[3]} x {first.shape[2]}: the images of a folder must be alike")
                yield frame


def _kept_ranges(frames, name, folder):
    """`frame_ranges` of a mapped file, kept in `folder` until the file's size or time of change is another."""
    stat = os.stat(frames.filename)
    state = [str(frames.filename), stat.st_size, stat.st_mtime_ns, frames.shape, frames.strides]
    kept = folder / f"ranges-{hashlib.sha256(repr(state).encode()).hexdigest()[:12]}"
    with contextlib.suppress(DataError), reading(kept) as file:
        if file.read(32) == hashlib.sha256(content := file.read()).digest():
            return np.frombuffer(content).reshape(*frames.shape[:2], 3)
    ranges = frame_ranges(frames, name)
    _folder(folder)
    remove(*folder.glob("ranges-*"))
    write_whole(kept, hashlib.sha256(ranges.tobytes()).digest() + ranges.tobytes())
    return ranges


def _own_scale(path, frames, stop, ranges, normalize, scale):
    """The scale of a user's frames, of which the first `stop` are the training side's, and notes: see `open_own`."""
    if normalize == "range":
        return fitted_scale(path, frames, stop, ranges, per_channel=True)
    low, high = ends_of(ranges)
    if normalize is None and scale is None:
        if frames.dtype != np.uint8 and (low < 0 or high > 1):
            raise DataError(f"{path} goes from {low:g} to {high:g}; what is not uint8 must lie in [0, 1]: --normalize "
                            f"scales it by the training part's range, --normalize LOW HIGH by two numbers")
        return LEVELS if frames.dtype == np.uint8 else PLAIN, []
    found = Scale(*map(float, normalize)) if scale is None else scale_of({"scale": scale})
    if isinstance(found, RainScale):
        return found, []
    if np.size(found.low) not in (1, frames.shape[1]):
        raise DataError(f"{path} has {frames.shape[1]} channels, the run's scale {np.size(found.low)}")
    notes = [f"{path}: scaled so that {found.low} … {found.high} is 0 … 1"]
    if low < np.min(found.low) or high > np.max(found.high):
        notes.append(f"{path}: its values go from {low:g} to {high:g}; what lies outside the scale is clipped")
    return found, notes


def _cut(films, stop, length):
    """Where the last tenth of frames 0 … stop - 1 begins: one window of `length` or more, whole films from three on."""
    start = min(stop - stop // 10, stop - length)
    begins = [first for first, _ in films if first < stop]
    return max((first for first in begins if first <= start), default=0) if len(begins) > 2 else start


def _no_empty_window(path, frames, ranges, starts, length):
    """DataError if a window has no data at all."""
    empty = np.cumsum(np.r_[0, (ranges[..., 2] == math.prod(frames.shape[2:])).all(1)])
    if (nothing := starts[empty[starts + length] - empty[starts] == length]).size:
        raise DataError(f"{path} has no data at all (NaN) in frames {nothing[0]} to {nothing[0] + length - 1}, so a "
                        f"window has none: leave them out, with what is before and after as two arrays of a .npz")


def _how_read(path, frames, ranges, index, starts, length, what):
    """Lines for the log: what a user's file was taken for, and what of it is passed over or missing."""
    films, (low, high) = [stop - first for first, stop in index["films"]], ends_of(ranges)
    spans = [f"{len(at)} for {part} (frames {at[0]} … {at[-1] + length - 1})" for part, at in
             zip(("training", "validation", "the test"), starts.values()) if len(at)]
    lines = [f"films: {len(films)} of {' to '.join(map(str, sorted({min(films), max(films)})))} frames, channels: "
             f"{frames.shape[1]}, {frames.shape[2]}×{frames.shape[3]}, {frames.dtype} from {low:g} to {high:g}, "
             f"{index['how']}; windows of {what}: {', '.join(spans)}", *index["notes"]]
    if short := sum(film < length for film in films):
        lines.append(f"{short} of {len(films)} films are passed over, shorter than {what} frames")
    if missing := ranges[..., 2].sum():
        lines.append(f"{100 * missing / math.prod(frames.shape):.3g}% of the values are missing (NaN): the network "
                     f"reads 0 there, and they count in no loss and no score")
    return [f"{path}: {line}" for line in lines]


def open_own(path, data_dir="data", frames_in=None, horizon=None, normalize=None, layout=None, channels=None, unit=None,
             thresholds=(), scale=None, use="train", takes=None):
    """Windows of a user's file or folder, as `own_frames` reads it. NaN is no data.

    The last tenth of the frames, at least one window, is the test part, unless a .npz has a `test`; validation is the
    last tenth of what is left; from three films on, whole films. Training windows begin at every frame, those of
    validation and test every `horizon` frames, so that each frame is forecast once.

    normalize: "range", each channel's in the training part, or [low, high], to be 0 … 1; scale: instead, the "scale" in
    another run's `Clips.info()`; without, uint8 is 0 … 255 and all else must lie in [0, 1]. layout: of an array, one of
    LAYOUTS. channels: 3 for colour in what ffmpeg reads. unit, thresholds: as in `Clips`. use: "test", every window is
    the test's; "last", the last `frames_in` frames of every film. takes: the frames' C, or C, H, W, if they are given.
    """
    if normalize is not None and scale is not None:
        raise DataError(f"{path} gets the scale of the run that is gone on from: leave --normalize out")
    frames_in = frames_in or 10
    horizon = 0 if use == "last" else horizon or 10
    length, what = frames_in + horizon, f"{frames_in} + {horizon}" if horizon else f"{frames_in}"
    frames, index = own_frames(path, data_dir, layout, channels, colour=takes is not None and takes[0] == 3)
    if takes and frames.shape[1:len(takes) + 1] != takes:
        has, takes = (" x ".join(map(str, shape)) for shape in (frames.shape[1:], takes))
        raise DataError(f"{path} has frames of {has} (channels, height, width), the model takes {takes}")
    every = index["films"]
    films = [film for film in every if film[1] - film[0] >= length]
    if not films:
        way_out = {"train": ": lower --frames-in or --horizon", "test": ": lower --horizon"}.get(use, "")
        raise DataError(f"{path} has films of {max(stop - first for first, stop in every)} frames, fewer than one "
                        f"window of {what}{way_out}")
    first_valid = first_test = 0
    if use == "train":
        first_test = _cut(films, films[-1][1], length) if index["test"] is None else every[index["test"]][0]
        first_valid = _cut(films, first_test, length)
    elif use == "last":
        films = [[stop - length, stop] for _, stop in films]
    starts = {"train": windows_in(films, length, 1, 0, first_valid),
              "valid": windows_in(films, length, horizon or 1, first_valid, first_test),
              "test": windows_in(films, length, horizon or 1, first_test)}
    if use == "train" and (empty := [part for part in starts if not len(starts[part])]):
        raise DataError(f"{path} has {len(frames)} frames: not one window of {what} each for training, validation and "
                        f"test (none for {' and '.join(empty)}): lower --frames-in or --horizon")
    ranges = _kept_ranges(frames, path, index["folder"])
    _no_empty_window(path, frames, ranges, np.concatenate([*starts.values()]), length)
    scale, notes = _own_scale(path, frames, first_test, ranges, normalize, scale)
    notes = _how_read(path, frames, ranges, index, starts, length, what) + notes
    name = "_".join(filter(None, (path.resolve().stem, path.suffix[1:])))
    return Windows(name, frames, starts, frames_in, horizon, scale=scale, unit=unit, thresholds=thresholds,
                   masked=bool(ranges[..., 2].any()), own=True, notes=notes, layout=index["layout"],
                   test_set=f"frames {starts['test'][0]} to {starts['test'][-1] + length - 1} of {path.name}")


def open_test(path, data_dir, info, options=None, horizon=None, any_size=False, use="test"):
    """A user's file or folder of which every window is the test's, for a run on the data of `info`, in their scale.

    info: the `Clips.info()` of those data: the frames_in, channels and size that the model takes (any_size: whatever
    the size), their scale, unit and thresholds. options: layout, unit and thresholds of `open_own`, where given.
    """
    path, options = Path(path), options or {}
    if not os.path.exists(path):
        raise DataError(f"{path} does not exist")
    layout = options.get("layout") if path.is_dir() or path.suffix.lower() in (".npy", ".npz") else None
    takes = (info["channels"], *(() if any_size else info["size"]))
    return open_own(path, data_dir, info["frames_in"], horizon or info["test_horizon"], layout=layout, use=use,
                    takes=takes, scale=info.get("scale"), unit=options.get("unit", info.get("unit")),
                    thresholds=options.get("thresholds", info.get("thresholds", ())))


def open_films(path, data_dir, info, options=None, any_size=False):
    """The last frames of every film in a user's file or folder, as `test` clips, to be forecast: see `open_test`."""
    return open_test(path, data_dir, info, options, None, any_size, "last")


# --------------------------------------------------------------------------- datasets unpacked once into one long array

FRAMES = r"frames-[0-9a-f]{12}\.(npy|json)"    # the names of what `unpack_once` writes, an array and its index


def unpack_once(folder, sources, pieces, about=""):
    """What is made of files once, and kept in `folder` as one memory-mapped array: (array, index).

    sources: the files that it is made of. pieces: a generator, run only if nothing whole is kept of these files, their
    sizes and times. It yields arrays (n, …) of one type and shape, None to forget what came before, and at last the
    index, a dict, JSON-safe. Where no source is left, what was made before is taken; None where there is nothing at
    all. about: what else the result depends on.
    """
    if not sources:
        before = (_kept(folder / name, about) for name in _listed(folder, FRAMES) if name.endswith(".npy"))
        return next(filter(None, before), None)

    def write(file):
        index = _write_pieces(file, pieces, about)
        write_whole(path.with_suffix(".json"), json.dumps(index).encode())    # first: no array is without its index

    made = [place for place in (folder, *folder.parents) if not place.exists()]
    try:
        _folder(folder)
        stats = [(str(path.relative_to(folder) if path.is_relative_to(folder) else path), path.stat())
                 for path in sources]
        state = [about, *((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)]
        path = folder / f"frames-{hashlib.sha256(repr(state).encode()).hexdigest()[:12]}.npy"
        with alone_in(folder, FRAMES):
            if found := _kept(path, about):
                return found
            try:
                write_whole(path, write)
            except PermissionError:    # Windows, where nobody waits: another process made it and has it mapped
                if not _kept(path, about):
                    raise
            for old in (folder / name for name in _listed(folder, FRAMES)):
                if old.suffix == ".json" and old.stem != path.stem and (_index(old) or {}).get("about") == about:
                    remove(old.with_suffix(".npy"), old)
            return _kept(path, about)
    except OSError as error:
        why = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or error
        raise DataError(f"cannot unpack into {folder}: {why}") from None
    finally:
        with contextlib.suppress(OSError):    # what holds something stays
            for place in made:
                place.rmdir()


def _write_pieces(file, pieces, about):
    """Write what the generator of `unpack_once` yields as an .npy file. Returns the index, with its own check."""
    count = 0
    file.write(bytes(128))
    with contextlib.closing(pieces):
        for piece in pieces:
            if piece is None:
                file.seek(128)
                file.truncate()
                count = 0
            elif isinstance(piece, dict):
                index = piece
            else:
                file.write(np.ascontiguousarray(piece).data)
                count, shape, dtype = count + len(piece), piece.shape[1:], piece.dtype
    file.seek(0)    # the header, now that the length is known, padded to its 128 bytes
    np.lib.format.write_array_header_1_0(file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False,
                                                "shape": (count, *shape)})
    index |= {"about": about, "array": [dtype.str, count, *shape]}
    return index | {"check": _check(index)}


def _kept(path, about):
    """(array, index) of an array that is whole and depends on the same, or None."""
    index = _index(path.with_suffix(".json"))
    if index and index["about"] == about:
        with contextlib.suppress(DataError), reading(path):
            array = np.lib.format.open_memmap(path, mode="r")
            if [array.dtype.str, *array.shape] == index["array"]:
                return array, index


def _index(path):
    """An index that unpacking wrote, or None: nothing else passes its own check."""
    with contextlib.suppress(DataError), reading(path) as file:
        index = json.loads(file.read())
        return index if index.pop("check") == _check(index) else None


def _check(index):
    return hashlib.sha256(json.dumps(index).encode()).hexdigest()[:16]


def _listed(folder, names, others=None):
    """The names in a folder that match, sorted. others: a list that takes those that neither match nor are hidden."""
    try:
        there = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {error.strerror}") from None
    if others is not None:
        others += [name for name in there if not re.fullmatch(f"{names}|{FRAMES}", name)]
    return [name for name in there if re.fullmatch(names, name)]


def _not_read(name, others, where=""):
    return [f"{name}: {len(others)} files{where} were not read, such as {others[0]}"] if others else []


def _nothing_to_read(name, folder):
    raise DataError(f"{folder} has no files of {name}: {WHERE_FROM[name]}")


@contextlib.contextmanager
def _hdf5(path):
    """The door of `reading` for HDF5: a function that gives a dataset of the file by its name.

    Only what lies in the file itself: a link or external storage could have any file on this machine read.
    """
    try:
        import h5py
    except ImportError:
        raise DataError(f"{path} is HDF5, which needs the package h5py: pip install h5py") from None
    with reading(path), h5py.File(path, "r") as file:
        def dataset(name):
            link = file.get(name, getlink=True)
            array = file[name] if isinstance(link, h5py.HardLink) else None
            if not isinstance(array, h5py.Dataset) or array.external or array.is_virtual:
                raise ValueError(f"its {name} is no dataset that lies in the file itself")
            return array

        yield file, dataset


WHERE_FROM = {
    "taxibj": "put BJ13_M32x32_T30_InOut.h5 … BJ16_M32x32_T30_InOut.h5 there (see github.com/TolicWang/DeepST, "
              "data/TaxiBJ), or dataset.npz as OpenSTL publishes it",
    "kth": "put the folders boxing, handclapping, handwaving, jogging, running and walking with their .avi files "
           "there, unzipped, and 00sequences.txt, all from www.csc.kth.se/cvap/actions",
    "germany": "put RYDL.hdf5 there, the paper's (zenodo.org/record/3629951), or 5-minute RADOLAN composites, plain, "
               ".gz, .bz2, .tar or .tar.gz: YW from 2001 on (opendata.dwd.de/climate_environment/CDC/grids_germany/"
               "5_minutes/radolan/reproc), RY of the last days (opendata.dwd.de/weather/radar/radolan/ry)",
    "typhoon": "put gridded Himawari-8 files YYYYMMDDhhmm.tir.01.fld.geoss there, plain or .bz2 (CEReS, "
               "ftp://hmwr829gr.cr.chiba-u.ac.jp/gridded/FD)",
}


# --------------------------------------------------------------------------------------------------------------- TaxiBJ

TAXIBJ_FILES = [f"BJ{year}_M32x32_T30_InOut.h5" for year in (13, 14, 15, 16)]
TAXIBJ_TEST = 1_344    # windows, four weeks
TAXIBJ_ROWS = 1 << 20  # of one file at most; the longest of the dataset has 7,220


def open_taxibj(folder, setup="patch4", frames_in=None, horizon=None):
    """TaxiBJ: crowd flow in Beijing, 32×32, inflow and outflow, every 30 minutes, 4 -> 4.

    From the four HDF5 files: windows of consecutive slots, oldest first, never across a gap or a file; the last 1,344
    are the test set; one minimum and maximum over both channels of the training side. Or from dataset.npz, in [-1, 1],
    whose clips are given. `fullres` takes the inflow alone. The released MS-RNN loader stacks its windows newest first
    and rounds to 8 bits; that is not copied.
    """
    frames_in, horizon = frames_in or 4, horizon or 4
    length, packed = frames_in + horizon, folder / "dataset.npz"
    files = [folder / name for name in TAXIBJ_FILES if (folder / name).exists()]
    clips = [packed] if packed.exists() else []
    if files and len(files) < 4:
        lacking = [name for name in TAXIBJ_FILES if folder / name not in files]
        raise DataError(f"{folder} lacks {', '.join(lacking)}: all four files are needed")
    days = None if clips and not files else unpack_once(folder, files, _taxibj_days(files), "h5")
    frames, index = (days or unpack_once(folder, clips, _taxibj_clips(packed), "npz")
                     or _nothing_to_read("taxibj", folder))
    if days:
        starts = windows_in(index["runs"], length)
        if len(starts) <= TAXIBJ_TEST:
            raise DataError(f"taxibj: {len(starts)} windows of {length} frames, of which the test takes {TAXIBJ_TEST}: "
                            f"none is left for training")
        parts = parted("taxibj", *hold_out(starts, TAXIBJ_TEST, length), length)
        scale, notes = fitted_scale("taxibj", frames, parts["test"][0])
        unit, test_set = "taxis per 30 min", f"the last {TAXIBJ_TEST} windows"
        train, valid, test = map(len, parts.values())
        notes.append(f"TaxiBJ: {train} training, {valid} validation, {test} test windows (the papers: 19,560 training, "
                     f"1,344 test); {len(starts) - train - valid - test} left out, which would share frames with "
                     f"others; {index['dropped']} days without all 48 slots dropped")
    else:
        if length > 8:
            raise DataError(f"taxibj: the clips of dataset.npz have 8 frames, fewer than --frames-in {frames_in} and "
                            f"--horizon {horizon}")
        # Clip k has the slots k … k + 7, of which the last seven of training may share some with the first of the test.
        train, test = np.split(np.arange(index["train"] + index["test"]), [index["train"]])
        parts = {part: 8 * numbers for part, numbers in parted("taxibj", train[:-7], test, 8).items()}
        scale, unit, test_set = Scale(-1.0, 1.0), "flow scaled to [-1, 1]", "X_test and Y_test of dataset.npz"
        notes = [f"TaxiBJ: {len(parts['train'])} training and {len(parts['valid'])} validation clips of "
                 f"{index['train']}, so that none share frames; {len(parts['test'])} test clips"]
    if setup == "fullres":
        frames, test_set = frames[:, :1], f"{test_set}, inflow alone"
    return Windows("taxibj", frames, parts, frames_in, horizon, scale=scale, unit=unit, test_set=test_set, notes=notes)


def _taxibj_days(files):
    """The complete days of the files, negative flows as 0. The index: `runs` of consecutive slots, `dropped` days."""
    runs, dropped, seen, count = [], 0, {}, 0
    for path in progress(files, desc="unpacking TaxiBJ"):
        with _hdf5(path) as (_, dataset):
            flows, dates = dataset("data"), dataset("date")
            if flows.shape != (*dates.shape, 2, 32, 32) or not 0 < len(dates) <= TAXIBJ_ROWS:
                raise ValueError(f"it has data of shape {flows.shape} and dates of shape {dates.shape}, not "
                                 f"(N, 2, 32, 32) and (N,)")
            slots = np.array([_slot(date) for date in dates[:].tolist()])
            days = np.flatnonzero(np.diff(slots // 48)) + 1
            after = None    # the slot that would go on from the last whole day of this file
            for start, stop in zip([0, *days], [*days, len(slots)]):
                first = int(slots[start])
                if first % 48 or not np.array_equal(slots[start:stop], np.arange(first, first + 48)):
                    dropped += 1
                    continue
                if first in seen:    # it could be in training and in the test
                    raise ValueError(f"it has {datetime.fromordinal(first // 48):%Y-%m-%d}, as {seen[first]} has")
                seen[first] = path.name
                flow = flows[start:stop].astype(np.float32)
                if not np.isfinite(flow).all():
                    raise ValueError(f"NaN or infinity in rows {start} to {stop - 1}")
                yield flow.clip(0, None)
                if first != after:
                    runs.append([count, count])
                count, after = count + 48, first + 48
                runs[-1][1] = count
    if not runs:
        raise DataError(f"{files[0].parent}: not one day with all 48 slots")
    yield {"runs": runs, "dropped": dropped}


def _slot(date):
    """b"YYYYMMDDSS", SS = 01 … 48 -> the number of the half hour since a day long ago."""
    text = date.decode() if isinstance(date, bytes) else str(date)
    number = int(text[8:])
    if len(text) != 10 or not 1 <= number <= 48:
        raise ValueError(f"the date {text} is not YYYYMMDDSS with a slot from 01 to 48")
    return datetime.strptime(text[:8], "%Y%m%d").toordinal() * 48 + number - 1


def _taxibj_clips(path):
    """The clips of X_train, Y_train, X_test, Y_test, each clip's 4 + 4 frames in a row. The index: their numbers."""
    counts = {}
    yield np.empty((0, 2, 32, 32), np.float32)    # if there is no clip
    with reading(path) as file, zipfile.ZipFile(file) as archive:
        for part in ("train", "test"):
            with archive.open(f"X_{part}.npy") as before, archive.open(f"Y_{part}.npy") as after:
                (shape, dtype), other = _header(before, f"{path} (X_{part})"), _header(after, f"{path} (Y_{part})")
                if (shape, dtype) != other or shape[1:] != (4, 2, 32, 32) or dtype.kind != "f":
                    raise ValueError(f"X_{part} and Y_{part} have shapes {shape} and {other[0]}, not (N, 4, 2, 32, 32)")
                counts[part] = shape[0]
                size = 4 * 2 * 32 * 32 * dtype.itemsize
                for number in progress(range(shape[0]), desc=f"unpacking TaxiBJ ({part})", unit="clip"):
                    clip = np.concatenate([np.frombuffer(source.read(size), dtype).reshape(4, 2, 32, 32)
                                           for source in (before, after)]).astype(np.float32)
                    if not (np.abs(clip) < 1 + 1e-6).all():    # a rounding error is none
                        raise ValueError(f"clip {number} of the {part} part goes beyond [-1, 1]")
                    yield clip
                if before.read(1) or after.read(1):    # at its end an array is compared with its checksum
                    raise ValueError(f"X_{part} or Y_{part} is longer than it says")
    yield counts


# ------------------------------------------------------------------------------------------------------------------ KTH

KTH_ACTIONS = ("boxing", "handclapping", "handwaving", "jogging", "running", "walking")
KTH_MAX_FRAMES = 10_000    # of one file; the longest of the dataset has 1,492


def open_kth(folder, setup="patch4", frames_in=None, horizon=None):
    """KTH: people in motion, grey, scaled to 128×128. People 1-15 train, 16 validation, 17-25 test.

    Windows inside the frame ranges of 00sequences.txt, every 10 frames, 3 for running. `patch4` (SA-ConvLSTM): all six
    actions, 10 -> 10 in training and 10 -> 20 in the test (another horizon than 10 is also the test's); `fullres`
    (MS-LSTM): walking, jogging, running, 10 -> 10.
    """
    files = [folder / action / name for action in KTH_ACTIONS for name in _listed(folder / action, r".*\.avi")]
    frames, index = unpack_once(folder, files, _kth_films(files)) or _nothing_to_read("kth", folder)
    ranges = _kth_ranges(folder / "00sequences.txt")
    frames_in, horizon = frames_in or 10, horizon or 10
    test_horizon = 20 if setup == "patch4" and horizon == 10 else horizon
    actions = ("walking", "jogging", "running") if setup == "fullres" else KTH_ACTIONS
    parts, skipped, short = {"train": [], "valid": [], "test": []}, list(index["skipped"]), []
    for name, first, count in index["films"]:
        person, action = int(name[6:8]), name.split("_")[1]
        if name not in ranges:
            skipped.append(f"{name} (not in 00sequences.txt)")
        elif action in actions:
            if count < ranges[name][-1][1]:
                short.append(f"{name} ({count} of {ranges[name][-1][1]} frames)")
            part = "test" if person > 16 else "valid" if person == 16 else "train"
            length = frames_in + (test_horizon if part == "test" else horizon)
            runs = [(first + start - 1, first + min(stop, count)) for start, stop in ranges[name]]
            parts[part].extend(windows_in(runs, length, 3 if action == "running" else 10))
    parts = some_in_each("kth", {part: np.array(parts[part], np.int64) for part in parts}, frames_in + test_horizon,
                         f" ({len(index['films'])} files could be read)")
    notes = [f"KTH: {len(index['films'])} of the dataset's 599 files; {len(parts['train'])} training windows (people "
             f"1-15), {len(parts['valid'])} for validation (person 16), {len(parts['test'])} for the test (17-25)"]
    notes += [f"KTH: {len(names)} files {what}: {', '.join(names)}" for names, what in
              ((skipped, "skipped"), (short, "shorter than their ranges")) if names]
    return Windows("kth", frames, parts, frames_in, horizon, test_horizon, notes=notes,
                   test_set=f"people 17-25, {', '.join(actions)}, {frames_in} -> {test_horizon}")


def _kth_ranges(path):
    """{film: [(first, last), …]}, counted from 1, from the dataset's 00sequences.txt."""
    ranges = {}
    with reading(path, "get it from www.csc.kth.se/cvap/actions/00sequences.txt") as file:
        text = file.read(1 << 20).decode(errors="replace")
        for name, line in re.findall(r"(person\d\d_[a-z]+_d\d)\s+frames\s+([-\d, \t]+)", text):
            ranges[name] = [(int(first), int(last)) for first, last in re.findall(r"(\d+)-(\d+)", line)]
            if not ranges[name] or not all(0 < first <= KTH_MAX_FRAMES for first, _ in ranges[name]):
                raise ValueError(f"{name} has no frame ranges such as 1-95, 96-185")
        if not ranges:
            raise ValueError("it has no line such as 'person01_boxing_d1 frames 1-95, 96-185'")
    return ranges


def _kth_films(files):
    """Every frame of the films. The index: `films` [name, first frame, frames], `skipped` those not readable."""
    _ffmpeg_reads("KTH's films are")
    films, skipped, count = {}, [], 0
    for path in progress(files, desc="unpacking KTH", unit="film"):
        name = re.fullmatch(r"(person\d\d_[a-z]+_d\d).*\.avi", path.name)
        frames = _film(path) if name and name[1] not in films else None
        if frames is None:
            skipped.append(path.name)
        else:
            yield frames
            films[name[1]] = [name[1], count, len(frames)]
            count += len(frames)
    if not films:
        raise DataError(f"{files[0].parent.parent}: ffmpeg reads none of the {len(files)} .avi files, such as "
                        f"{files[0].name}")
    yield {"films": [*films.values()], "skipped": skipped}


def _film(path):
    """The frames of a film, uint8 (N, 1, 128, 128), or None if ffmpeg cannot read it."""
    with contextlib.suppress(DataError), reading(path):
        done = subprocess.run(["ffmpeg", "-nostdin", "-v", "error", "-f", "avi", "-i", f"file:{path}", "-frames:v",
                               str(KTH_MAX_FRAMES), "-vf", "scale=128:128:flags=bicubic+accurate_rnd+bitexact", "-f",
                               "rawvideo", "-pix_fmt", "gray", "-"], stdin=subprocess.DEVNULL, capture_output=True)
        if not done.returncode and done.stdout:
            return np.frombuffer(done.stdout, np.uint8).reshape(-1, 1, 128, 128)


# -------------------------------------------------------------------------------------------------------------- Germany

RADOLAN_FILE = r"raa01-.*---bin(\.gz|\.bz2)?"
RADOLAN_ARCHIVE = r".*\.(tar|tar\.gz|tgz|tar\.bz2)"
RADOLAN_BYTES = 2 * 1100 * 900 + 10_000    # of the largest composite, with its header


def open_germany(folder, setup="patch4", frames_in=None, horizon=None):
    """Rain over Germany, 900×900 averaged to 180×180, mm/h, every 30 minutes, 4 -> 4; 2006-2014 train, 2015-2017 test.

    From RYDL.hdf5, which is the paper's, or from RADOLAN's composites RY or YW; YW is adjusted to rain gauges, RY is
    not. Windows every 4 frames in training, every 8 in the test; those that touch a missing composite are left out and
    counted. Frames lie with the north up.
    """
    frames_in, horizon = frames_in or 4, horizon or 4
    length, others = frames_in + horizon, []
    packed = (folder / "RYDL.hdf5").exists()
    names = _listed(folder, r"RYDL\.hdf5" if packed else f"{RADOLAN_FILE}|{RADOLAN_ARCHIVE}", others)
    sources, read = [folder / name for name in names], _rydl if packed else _composites
    frames, index = unpack_once(folder, sources, _half_hours(read, sources)) or _nothing_to_read("germany", folder)
    times = np.array(index["times"], np.int64)
    order = np.argsort(times)
    times = times[order]
    first, middle, stop = np.searchsorted(times, [_minutes(datetime(year, 1, 1)) for year in (2006, 2015, 2018)])
    train, train_lacks = _whole_windows(times[first:middle] // 30, length, 4)
    test, test_lacks = _whole_windows(times[middle:stop] // 30, length, 8)
    parts = parted("germany", first + train, middle + test, length,
                   ": 2006-2014 is for training and validation, 2015-2017 for the test")
    notes = [f"Germany: {len(frames)} frames 30 minutes apart from {index['composites']} composites, of which "
             f"{index['repeated']} repeat a time; windows left out for a missing composite: {train_lacks} in "
             f"training, {test_lacks} in the test",
             *_not_read("Germany", others, f" in {folder}"), *_not_read("Germany", index["unread"], " in archives")]
    return Windows("germany", frames, parts, frames_in, horizon, scale=RainScale(), order=order, unit="mm/h",
                   thresholds=(0.5, 2, 5), masked=True, notes=notes, test_set="2015-2017")


def _minutes(time):
    return int((time - datetime(1970, 1, 1)).total_seconds()) // 60


def _whole_windows(slots, length, stride):
    """Windows every `stride` slots from the first on that lack no slot: (their places in `slots`, number of others).

    slots: ascending numbers of the half hours that exist.
    """
    candidates = np.arange(slots[0], slots[-1] - length + 2, stride) if len(slots) else slots
    whole = np.isin(candidates[:, None] + np.arange(length), slots).all(1)
    return np.searchsorted(slots, candidates[whole]), int((~whole).sum())


def _half_hours(read, sources):
    """The composites that lie a multiple of 30 minutes from the first, as mm/h.

    The index: `times` of the frames, how many `composites` there were, how many `repeated`, and names `unread`.
    """
    phase = None
    while True:
        kept, seen, composites, unread = [], set(), 0, []
        for minute, values in read(sources, unread):
            phase = minute % 30 if phase is None else phase
            composites += 1
            if minute % 30 == phase and minute not in seen:
                yield 12 * _block_means(values(), 180)[None, None]    # from mm per 5 minutes
                kept.append(minute)
            seen.add(minute)
        if not seen:
            raise DataError(f"{sources[0]} holds no composite")
        if phase == min(seen) % 30:
            break
        phase = min(seen) % 30    # they are not in the order of time: once more, with the phase of the first
        yield None
    yield {"times": kept, "composites": composites, "repeated": composites - len(seen), "unread": unread}


def _block_means(values, side):
    """The means of equal blocks, side × side of them, over the pixels that are not NaN: float32; NaN where all are."""
    pool = torch.nn.AdaptiveAvgPool2d(side)
    values = torch.from_numpy(values.astype(np.float64))[None]
    known = values.isfinite()
    return (pool(values.where(known, 0)) / pool(known.double()))[0].float().numpy()    # 0 / 0 is NaN


def _composites(sources, unread):
    """(minutes, function that gives mm per 5 minutes) of every composite in files and archives, one after the other."""
    total = sum(path.stat().st_size for path in sources)
    with progress(total=total, unit="B", unit_scale=True, desc="unpacking RADOLAN") as bar:
        for path in sources:
            before = bar.n
            with reading(path) as file:
                for name, content in _radolan(file, path.name, unread):
                    yield _composite(content, name)
                    bar.update(before + file.tell() - bar.n)


def _radolan(file, name, unread):
    """(name, content) of the composites in an open file: itself, or those of an archive, and of the archives in it.

    No more is unpacked than the largest composite has. unread: takes the names of what is neither.
    """
    if name.endswith(("gz", "bz2")):
        file = gzip.GzipFile(fileobj=file) if name.endswith("gz") else bz2.BZ2File(file)
    if re.fullmatch(RADOLAN_FILE, name):
        yield name, file.read(RADOLAN_BYTES)
        return
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            inner = member.name.rsplit("/", 1)[-1]
            if not member.isfile() or inner.startswith("."):
                continue
            if re.fullmatch(f"{RADOLAN_FILE}|{RADOLAN_ARCHIVE}", inner):
                yield from _radolan(archive.extractfile(member), inner, unread)
            else:
                unread.append(inner)
    while file.read(1 << 20):    # to its end, where gzip tells whether the file is whole
        pass


def _composite(content, name):
    """(minutes, function that gives mm per 5 minutes, float64 (900, 900), north first) of a RADOLAN composite.

    A text header up to the byte 0x03, then little-endian uint16: the low 12 bits the value; 0x1000 a secondary value,
    which counts; 0x2000 no data; 0x4000 negative; 0x8000 clutter. The first row is the south.

    YW's grid of 1100×900 begins 100 km further south and 80 km further east than RY's (wradlib, get_radolan_grid): it
    is cut to RY's, the paper's, whose 80 columns in the west then have no data.

    Clutter is 0 mm, as in the paper's data: RYDL.hdf5 holds plain numbers, of which the code of both its authors
    (RainNet) and the paper takes logarithms without a mask, so whatever RADOLAN flags must be dry there. RY is cleaned
    of clutter before: of those seen here none has a pixel with that flag.
    """
    header, mark, body = content.partition(b"\x03")
    fields = re.match(r"(\w\w)(\d{6})\d{5}(\d{4})BY(?=.*?PR *(E[+-]\d\d))(?=.*?INT *(\d+))(?=.*?GP *(\d+)x *(\d+))",
                      header[:1000].decode("latin-1"), re.DOTALL)
    if not (mark and fields):
        raise ValueError(f"{name} has no RADOLAN header")
    product, day, month, precision, *numbers = fields.groups()
    minutes, *grid = map(int, numbers)
    if product not in ("RY", "YW") or (precision, minutes) != ("E-02", 5) or grid not in ([900, 900], [1100, 900]):
        raise ValueError(f"{name} is not a 5-minute RY or YW composite of 900 x 900 or 1100 x 900 in 0.01 mm, but "
                         f"{product}, {precision}, {minutes} minutes, {grid[0]} x {grid[1]}")
    if len(body) != 2 * grid[0] * grid[1]:
        raise ValueError(f"{name} has {len(body)} bytes of data, not {2 * grid[0] * grid[1]}")
    time = _minutes(datetime.strptime(day + month, "%d%H%M%m%y"))

    def values():
        raw = np.frombuffer(body, "<u2").reshape(grid)
        if grid == [1100, 900]:
            raw = np.pad(raw[100:1000, :820], ((0, 0), (80, 0)), constant_values=0x2000)
        rain = (raw & 0x0FFF) / 100
        rain[raw & 0x4000 != 0] *= -1
        rain[raw & 0x8000 != 0] = 0
        rain[raw & 0x2000 != 0] = np.nan
        return rain[::-1]

    return time, values


def _rydl(sources, unread):
    """(minutes, function that gives mm per 5 minutes) of every array in RYDL.hdf5, in the order of time.

    Decided here: its arrays hold mm per 5 minutes as floats, the south first as in the composites they were made from;
    a NaN or a negative number would be no data, but its code of reference expects none.
    """
    path, = sources
    with _hdf5(path) as (file, dataset):
        keys = sorted(key for key in file if re.fullmatch(r"\d{12}", key))
        unread += [key for key in file if not re.fullmatch(r"\d{12}", key)][:1000]
        if not keys:
            raise ValueError("it has no key such as 201406010000 (YYYYMMDDhhmm)")
        for key in progress(keys, desc="unpacking RYDL"):
            array = dataset(key)
            if array.shape != (900, 900) or array.dtype.kind != "f":
                raise ValueError(f"its {key} is not a 900 x 900 array of floats")

            def values(array=array):
                with reading(path):
                    rain = array[:][::-1].astype(np.float32)
                return np.where(np.isfinite(rain) & (rain >= 0), rain, np.nan)

            yield _minutes(datetime.strptime(key, "%Y%m%d%H%M")), values


# -------------------------------------------------------------------------------------------------------------- Typhoon

HIMAWARI = r"\d{10}00\.tir\.01\.fld\.geoss(\.bz2)?"    # hourly
HIMAWARI_SIDE = 6_000    # pixels of 0.02 degrees: 60°N to 60°S, 85°E to 205°E


def open_typhoon(folder, setup="patch4", frames_in=None, horizon=None, box=None):
    """Typhoon: infrared counts of Himawari-8, hourly, 64×64, 8 -> 4; the last quarter is the test.

    box: (south, west, north, east) in degrees, the region that is averaged to 64×64. The paper gives neither region nor
    period (2,412 windows are a hundred days of hourly ones); counts are scaled by the training side's range.
    """
    frames_in, horizon = frames_in or 8, horizon or 4
    length, others = frames_in + horizon, []
    if box is None:
        raise DataError("typhoon needs --box SOUTH WEST NORTH EAST, the region in degrees, such as --box 5 110 45 150: "
                        "the paper does not give its own")
    region = f"box {' '.join(f'{side:g}' for side in box)}"
    names = _listed(folder, HIMAWARI, others)
    files = {name[:12]: folder / name for name in names}
    others += [name for name in names if files[name[:12]].name != name]
    frames, index = (unpack_once(folder, [*files.values()], _typhoon_hours(files, _box(box)), region)
                     or _nothing_to_read("typhoon", folder))
    hours = np.array(index["hours"])
    gaps = np.flatnonzero(np.diff(hours) != 1) + 1
    starts = windows_in(zip([0, *gaps], [*gaps, len(hours)]), length)
    if len(starts) < 4:
        raise DataError(f"typhoon: {len(starts)} windows of {length} consecutive hours, too few for training and test")
    parts = parted("typhoon", *hold_out(starts, len(starts) // 4, length), length, ", when none may share frames")
    scale, notes = fitted_scale("typhoon", frames, parts["test"][0])
    train, valid, test = map(len, parts.values())
    notes += [f"Typhoon: {len(hours)} hours, {len(gaps)} gaps; {train} training, {valid} validation, {test} test "
              f"windows (the paper: 1,809 training, 603 test)"]
    if index["empty"]:
        notes.append(f"Typhoon: {index['empty']} hours have no data in the region and count as missing")
    notes += _not_read("Typhoon", others, f" in {folder}")
    return Windows("typhoon", frames, parts, frames_in, horizon, scale=scale, masked=index["missing"] > 0, notes=notes,
                   test_set=f"the last quarter, {region}")


def _box(box):
    """(south, west, north, east) in degrees -> the rows and columns of the grid, as slices."""
    south, west, north, east = box
    west, east = (side + 360 if side < 0 else side for side in (west, east))
    if not (-60 <= south < north <= 60 and 85 <= west < east <= 205):
        raise DataError(f"--box {' '.join(f'{side:g}' for side in box)}: south, west, north, east must lie in -60 … 60 "
                        f"and 85 … 205 degrees")
    rows = slice(round((60 - north) * 50), round((60 - south) * 50))
    columns = slice(round((west - 85) * 50), round((east - 85) * 50))
    if rows.stop - rows.start < 64 or columns.stop - columns.start < 64:
        raise DataError(f"--box {' '.join(f'{side:g}' for side in box)}: smaller than 64 pixels of 0.02 degrees")
    return rows, columns


def _typhoon_hours(files, box):
    """The box, as slices, of every file, {YYYYMMDDhhmm: path}, averaged to 64×64 over the pixels that have data.

    Counts have 12 bits; 65534 and 65535 are no measurements, and no calibration table goes beyond 4095. The index:
    `hours` since 1970 of the frames, `empty` the number of those without any data, `missing` of pixels without.
    """
    size, hours, empty, missing = 2 * HIMAWARI_SIDE**2, [], 0, 0
    yield np.empty((0, 1, 64, 64), np.float32)    # if no hour has data
    for hour, path in progress(files.items(), desc="unpacking Typhoon", unit="hour"):
        with reading(path) as file:
            if path.suffix == ".bz2":
                content = bz2.BZ2File(file).read(size + 1)    # what is longer, is wrong, however long
            else:
                content = np.memmap(file, np.uint8, "r")
            if len(content) != size:
                raise ValueError(f"it has {'more' if len(content) > size else 'fewer'} than the {size} bytes of 6000 x "
                                 f"6000 counts")
            grid = np.frombuffer(content, ">u2").reshape(HIMAWARI_SIDE, HIMAWARI_SIDE)[box]
            frame = _block_means(np.where(grid < 4096, grid, np.nan), 64)
            time = _minutes(datetime.strptime(hour, "%Y%m%d%H%M")) // 60
        if np.isnan(frame).all():
            empty += 1
        else:
            missing += int(np.isnan(frame).sum())
            hours.append(time)
            yield frame[None, None]
    yield {"hours": hours, "empty": empty, "missing": missing}


# -------------------------------------------------------------------------------------------------------------- opening

DATASETS = {"moving_mnist": open_moving_mnist, "moving_digits": open_moving_digits, "taxibj": open_taxibj,
            "kth": open_kth, "germany": open_germany, "typhoon": open_typhoon}
OWN_OPTIONS = ("normalize", "layout", "channels", "unit", "thresholds", "scale")


def open_data(name_or_path, data_dir="data", setup="patch4", frames_in=None, horizon=None, **options):
    """Open a dataset by name, or a file or folder of your own by its path: a `Clips`.

    data_dir: the folder where datasets lie or are downloaded to. setup: "patch4" or "fullres", where a dataset differs
    between them. frames_in, horizon: override the dataset's. options, JSON-safe, None for not given: "box", the region
    of typhoon; those of `open_own` for your own. Raises DataError, one line, for whatever cannot be used.
    """
    options = {name: value for name, value in options.items() if value is not None}
    for option, value in (("--frames-in", frames_in), ("--horizon", horizon)):
        if value is not None and value < 1:
            raise DataError(f"{option} {value}: at least 1 frame is needed")
    own = name_or_path not in DATASETS
    takes = OWN_OPTIONS if own else ("box",) if name_or_path == "typhoon" else ()
    if wrong := [name for name in options if name not in takes]:
        raise DataError(f"--{wrong[0]} is for {'typhoon' if wrong[0] == 'box' else 'files of your own'}, not for "
                        f"{name_or_path}")
    if not own:
        folder = Path(data_dir) / ("mnist" if name_or_path == "moving_mnist" else name_or_path)
        return DATASETS[name_or_path](folder, setup, frames_in, horizon, **options)
    if not (path := Path(name_or_path)).exists():
        raise DataError(f"no dataset and no file is called {name_or_path}; datasets: {', '.join(DATASETS)}")
    return open_own(path, data_dir, frames_in, horizon, **options)
