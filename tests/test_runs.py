"""Runs when things go wrong: killed, interrupted, damaged, a full disk, data that changed, nobody who listens."""

import errno
import itertools
import json
import os
import signal
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FILM, log_of, run, start
from conftest import command_refused as refused

import data
import train

pytestmark = pytest.mark.usefixtures("film")
TINY = ["convlstm", *FILM, *"--iterations 13 --eval-every 8 --save-every 3 --name".split()]


def assert_same(a, b):
    """What must not depend on interruptions: weights, optimiser, the log less its seconds, the results."""
    ends = [train.open_run(Path("runs", name)) for name in (a, b)]
    logs = [[row[:4] for row in log_of(run.folder)] for run in ends]
    results = [(run.folder / "results.json").read_text() for run in ends]
    assert ends[0].iteration == ends[1].iteration and logs[0] == logs[1] and len(logs[0]) and results[0] == results[1]
    for x, y in zip(*(run.model.state_dict().values() for run in ends)):
        assert torch.equal(x, y)
    for x, y in zip(*(run.checkpoint["optimizer"].values() for run in ends)):
        assert all(torch.equal(x[name], y[name]) for name in x)


def everything(folder="runs/a"):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.is_file()}


def before_call(monkeypatch, number, action, module=train, name="gradients"):
    """Do something before this call of a function, by default of the forward and backward pass."""
    function, calls = getattr(module, name), itertools.count(1)

    def called(*arguments, **options):
        if next(calls) == number:
            action()
        return function(*arguments, **options)

    monkeypatch.setattr(module, name, called)


@pytest.mark.parametrize("name, status", [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_stopped_by_a_signal_that_comes_twice(name, status, monkeypatch, capsys):
    assert run(*TINY, "whole") == 0

    with monkeypatch.context() as patch:                          # as schedulers and launchers send it
        before_call(patch, 11, lambda: [signal.raise_signal(getattr(signal, name)) for _ in range(2)])
        line = refused(capsys, *TINY, "a", status=status)
    assert "iteration 11" in line and "--resume runs/a" in line
    assert train.open_run("runs/a").iteration == 11 and run("--resume", "a") == 0
    assert_same("a", "whole")


def test_another_ctrl_c_a_second_later_does_not_wait(monkeypatch):
    now = time.monotonic()
    with train.noted_signals() as noted:
        signal.raise_signal(signal.SIGINT)
        assert noted[0][0] == signal.SIGINT
        monkeypatch.setattr(train.time, "monotonic", lambda: now + 2)
        signal.raise_signal(signal.SIGTERM)                       # asks again, no more
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)                  # by nohup
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with train.noted_signals():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN and signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL     # given back where nothing came


@pytest.mark.parametrize("name, number", [("fsync", 4), ("fsync", 6), ("replace", 5), ("replace", 9)])
def test_killed_within_a_save(name, number, monkeypatch):
    """Half-written files are in nobody's way: the checkpoint is the one before, log.csv may end in half a line."""
    def kill():
        with open("runs/a/log.csv", "a") as file:
            file.write("10,1.0,0")
        raise SystemExit                                          # which train.py does not catch

    assert run(*TINY, "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", lambda *_, **__: None)      # nothing is tidied up after SIGKILL
        before_call(patch, number, kill, os, name)                # config.json, log.csv, the first last.pt, …
        with pytest.raises(SystemExit):
            run(*TINY, "a")
    assert list(Path("runs/a").glob(".*.tmp")) and run("--resume", "a") == 0
    assert_same("a", "whole")


def test_killed_at_random_moments():
    arguments = [*TINY, "a", "--save-every", 1, "--iterations", 80]
    assert run(*arguments, "--name", "whole") == 0
    random, last, process = np.random.default_rng(), Path("runs/a/last.pt"), start(*arguments)
    for _ in range(2):
        before = last.stat().st_mtime_ns if last.exists() else 0
        while process.is_alive() and not (last.exists() and last.stat().st_mtime_ns > before):
            time.sleep(0.005)                                     # until it trains
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.join()
        process = start("--resume", "runs/a", output="output")
    process.join()
    assert process.exitcode == 0, Path("output").read_text()
    assert_same("a", "whole")


def test_a_run_continues_from_any_folder_where_chmod_is_refused(monkeypatch):
    assert run(*TINY, "a") == 0
    for name in ("chmod", "fchmod", "lchmod"):                    # as CIFS, FUSE and buckets do
        monkeypatch.delattr(os, name, raising=False)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert run("--resume", "../runs/a", "--iterations", 14) == 0
    assert json.loads(Path("../runs/a/results.json").read_text())["iteration"] == 14 and not list(Path().iterdir())


# ----------------------------------------------------------------------------------------------------- what ends a run

@pytest.mark.parametrize("damage", ["loss", "weights", "moments"])
def test_numbers_that_are_not_finite_end_a_run(damage, monkeypatch, capsys):
    step = train.Step.__call__

    def bad(self, *arguments):
        loss = step(self, *arguments)
        if self.run.iteration == 6:
            moments = self.optimizer.state_dict()["state"][0]["exp_avg_sq"]
            part = dict(loss=loss, weights=next(self.model.parameters()), moments=moments)[damage]
            part.data.view(-1)[-1] = float("inf")
        return loss

    monkeypatch.setattr(train.Step, "__call__", bad)
    line = refused(capsys, *TINY, "a", status=1)
    assert "not finite" in line and "last.pt" in line and "--lr" in line
    assert train.open_run("runs/a").iteration == 6                # the last good one


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), RuntimeError(
    "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes")])
def test_out_of_memory(error, monkeypatch, capsys):
    def full():
        raise error
    before_call(monkeypatch, 2, full)
    line = refused(capsys, *TINY, "a", status=1)
    assert "--batch" in line and "--recompute" in line


def test_two_processes_do_not_train_one_run(capsys):
    assert run(*TINY, "a") == 0
    before = everything()
    with data.alone_in(Path("runs/a")):
        assert "another process" in refused(capsys, "--resume", "runs/a", "--iterations", 14)
    assert everything() == before and run("--resume", "runs/a", "--iterations", 14) == 0


def test_a_full_disk_is_named(monkeypatch, capsys):
    assert run(*TINY, "a") == 0
    before, fsync = everything(), os.fsync

    def full(handle, name="last.pt"):
        if name in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return fsync(handle)

    monkeypatch.setattr(os, "fsync", lambda handle: full(handle, ""))
    assert "No space left" in refused(capsys, "--resume", "runs/a", "--iterations", 14)
    assert everything() == before
    monkeypatch.setattr(os, "fsync", full)
    assert "No space left" in refused(capsys, *TINY, "b")
    assert not list(Path("runs/b").glob("*.tmp")) and not Path("runs/b/last.pt").exists()


@pytest.mark.parametrize("output", ["fifo", "full", "closed"])
def test_who_listens_may_leave(output, monkeypatch):
    """`train.py … | head -1`, a full disk under the output, a standard output that is closed from the start."""
    if output == "closed":
        monkeypatch.setattr(train.sys, "stdout", None)
        assert run(*TINY, "a") == 0
        return
    os.mkfifo("fifo")
    process = start(*TINY, "a", output="fifo" if output == "fifo" else "/dev/full")
    if output == "fifo":
        open("fifo", "rb").close()
    process.join()
    assert process.exitcode == 0 and Path("runs/a/results.json").exists()


# --------------------------------------------------------------------------------------------------- data that changed

@pytest.mark.parametrize("change, says", [
    (lambda film: film[::-1], "checksum"), (lambda film: film[:190], "train_count"), (lambda film: 60 * film, "scale"),
    (lambda film: film[:, :8], "size")])
def test_data_that_changed_are_refused(change, says, film, capsys):
    assert run(*TINY, "a", "--normalize") == 0
    before = everything()
    np.save("film.npy", change(film))
    for command in (["--resume", "a", "--iterations", 14], ["--eval", "a"], ["--figures", "a"]):
        assert says in refused(capsys, *command)
    assert everything() == before


# ------------------------------------------------------------------------------------------------------- damaged files

def test_a_bit_that_flipped_is_found(capsys):
    """In weights, settings, and the zip file's directory, where byte 38 of an entry gave memory nobody had written;
    and so is a byte too few or too many."""
    assert run(*TINY, "a", "--iterations", 2) == 0
    path, random = Path("runs/a/last.pt"), np.random.default_rng(0)
    content = path.read_bytes()
    at = [k for k in range(len(content)) if content[k:k + 4] == b"PK\1\2"]
    assert len(at) == len(zipfile.ZipFile(path).infolist())
    damaged = [content[:-1], content + b"\0", content[:32], b""]
    for place in [k + 38 for k in at] + [*random.integers(0, len(content), 100)]:
        damaged.append(bytearray(content))
        damaged[-1][place] ^= 0x10
    for changed in damaged:
        path.write_bytes(changed)
        with pytest.raises(data.DataError) as error:
            train.open_run("runs/a")
        assert "last.pt" in str(error.value) and "\n" not in str(error.value)
    path.write_bytes(content)
    assert torch.load(path, weights_only=True)["iteration"] == train.open_run("runs/a").iteration == 2
