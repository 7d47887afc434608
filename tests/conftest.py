"""Shared by the tests: the project on the import path, the `slow` marker, small runs, and the real data beside us."""

import functools
import hashlib
import io
import multiprocessing
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"
sys.path.insert(0, str(ROOT))
SMALL = ("--data moving_digits --device cpu --hidden 4 --layers 2 --kernel 3 --batch 2 --frames-in 3 "
         "--horizon 3").split()                                   # of a run that takes a moment
FILM = ("--data film.npy --device cpu --hidden 4 --layers 2 --kernel 3 --batch 2 --frames-in 3 --horizon 2 "
        "--eval-sequences 3").split()                             # of one that takes a tenth of a second
torch.set_num_threads(1)                                          # tensors so small are a seventh slower on two
FORKS = multiprocessing.get_context("spawn" if sys.platform == "win32" else "forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo"])          # three seconds of the start of any other process


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes long; left out unless --slow is given")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        skip = pytest.mark.skip(reason="slow; run with --slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(autouse=True)
def _same_start():
    torch.manual_seed(0)


@pytest.fixture(autouse=True, scope="session")
def _digits_are_drawn_once():
    """Not anew by every small run: that took longer than the run."""
    import data

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "stroke_digits", functools.cache(data.stroke_digits))
        yield


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The test starts in an empty folder; what a run that was stopped keeps of the signals is given back."""
    monkeypatch.chdir(tmp_path)
    handlers = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    signal.signal(signal.SIGHUP, signal.SIG_DFL)                  # where the tests run under nohup
    yield
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


@pytest.fixture
def film(empty_folder):
    """Frames of one's own, float32 (200, 16, 16) in [0, 1], also as film.npy in the folder, for the options FILM."""
    frames = np.random.default_rng(0).random((200, 16, 16), dtype=np.float32)
    np.save("film.npy", frames)
    return frames


@pytest.fixture
def real_mnist():
    """The folder that holds the four-byte-headed MNIST files, where it lies beside the project."""
    folder = SHARED / "mnist"
    if not (folder / "train-images-idx3-ubyte.gz").exists():
        pytest.skip(f"needs the real MNIST files in {folder}")
    return folder


@pytest.fixture
def real_radolan():
    """The folder of real RADOLAN composites, where it lies beside the project."""
    folder = SHARED / "radolan"
    if not folder.exists():
        pytest.skip(f"needs the real RADOLAN composites in {folder}")
    return folder


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def count_macs(model_class, frames, size=64, channels=1, **options):
    """Multiply-accumulates of one sequence of that many frames, counted by torch without computing anything.

    Two steps are counted, for seconds less: all cost the same (test_costs.py).
    """
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        side = (size, size) if isinstance(size, int) else size
        model_class(channels=channels, size=size, **options)(torch.empty(1, 3, channels, *side))
    return (frames - 1) / 2 * counter.get_total_flops() / 2


def data_refused(opened, folder, *texts):
    """Opening a dataset ends in one line that holds the texts, and leaves nothing behind. Returns the line."""
    import data

    before = sorted(os.listdir(folder))
    with pytest.raises(data.DataError) as error:
        opened()
    assert all(text in str(error.value) for text in texts) and "\n" not in str(error.value), str(error.value)
    assert sorted(os.listdir(folder)) == before
    return str(error.value)


def layers_of(maps, picture):
    """What train.maps has of a picture: {label: tensor} of each layer."""
    layers = sorted({layer for _, layer, _ in maps})
    return [{label: x for (name, k, label), x in maps.items() if (name, k) == (picture, layer)} for layer in layers]


def log_of(folder):
    """The rows of a run's log.csv, as text."""
    return [line.split(",") for line in Path(folder, "log.csv").read_text().splitlines()[1:]]


def rewrite(path, change):
    """Change what a checkpoint says and holds, and save it under a valid checksum."""
    content, file = torch.load(path, weights_only=True), io.BytesIO()
    change(content)
    torch.save(content, file)
    Path(path).write_bytes(file.getvalue() + hashlib.sha256(file.getvalue()).digest())


def run(*arguments):
    """train.py in this process: its exit status."""
    import train

    return train.main([str(a) for a in arguments])


def start(*arguments, output=None, **environment):
    """train.py in a process of its own, in this folder: a multiprocessing.Process. It writes to the file `output`."""
    process = FORKS.Process(target=_run_in, args=(os.getcwd(), arguments, str(output or os.devnull), environment))
    process.start()
    return process


def _run_in(folder, arguments, output, environment):
    os.chdir(folder)
    os.environ.update({name: str(value) for name, value in environment.items()})
    with open(output, "wb") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.stdout, sys.stderr = (open(stream, "w", closefd=False) for stream in (1, 2))
    torch.set_num_threads(1)
    sys.exit(run(*arguments))


def command_refused(capsys, *arguments, status=2):
    """train.py ends with this status and one line on stderr. Returns the line."""
    capsys.readouterr()
    assert run(*arguments) == status
    err = capsys.readouterr().err
    assert err.startswith("train.py: ") and err.count("\n") == 1 and "Traceback" not in err, err
    return err
