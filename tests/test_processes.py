"""Data-parallel training with torchrun, on the CPU: the same run on any number of processes.

Where torchrun itself is not in question, processes get from here what it would tell them: that spares seconds each.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL

import train

OURS = f'File "{ROOT / "train.py"}"'                              # a traceback through us; torchrun prints its own
SETTINGS = ["convlstm", *SMALL, *"--batch 8 --iterations 20 --eval-every 10 --save-every 7".split(),
            *"--eval-sequences 33".split()]                       # 17 and 16 on two: batches of 16 + 1 and 16
pytestmark = pytest.mark.usefixtures("empty_folder")


def free_port():
    """So that tests can run beside each other."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(*arguments):
    """Two processes by torchrun."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}"]
    return subprocess.Popen([*torchrun, str(ROOT / "train.py"), *map(str, arguments)], stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, env=os.environ | dict(OMP_NUM_THREADS="1"))


def finish(process, status=0):
    _, err = process.communicate(timeout=900)
    assert process.returncode == status, err
    return err


def together(count, *arguments, status=0):
    """Without torchrun, to the end: what all of them said."""
    common = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=count)
    first, *others = (conftest.start(*arguments, output=f"said-{rank}", RANK=rank, LOCAL_RANK=rank, **common)
                      for rank in range(count))
    first.join(900)
    for process in others:
        if status:
            process.terminate()                                   # as torchrun does
        process.join(900)
    said = "".join(Path(f"said-{rank}").read_text() for rank in range(count))
    assert first.exitcode == status and "Traceback" not in said, said
    assert status or all(process.exitcode == 0 for process in others), said
    return said


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def compare(a, b):
    a, b = ((torch.load(Path(f) / "last.pt", weights_only=True), json.loads((Path(f) / "results.json").read_text()),
             (Path(f) / "log.csv").read_text()) for f in (a, b))
    assert a[0]["iteration"] == b[0]["iteration"]
    for x, y in zip(a[0]["model"].values(), b[0]["model"].values(), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    for name in ("forecast", "all_predictions", "repeat_last", "black"):
        for metric in ("mse", "mae", "psnr", "ssim"):
            np.testing.assert_allclose(a[1][name][metric]["frames"], b[1][name][metric]["frames"], rtol=1e-3)
    for x, y in zip(*(np.loadtxt(log.splitlines()[1:], delimiter=",") for log in (a[2], b[2])), strict=True):
        np.testing.assert_allclose(x[:4], y[:4], rtol=1e-4)


@pytest.mark.slow
def test_any_number_of_processes():
    """Eight sequences over 1, 2 and 3 processes: the same weights, log and results; checkpoints move between counts."""
    for n in (1, 2, 3):
        made = [*SETTINGS, "--name", f"on{n}"]
        finish(start(*made)) if n == 2 else together(n, *made)
        assert {f.name for f in Path(f"runs/on{n}").iterdir()} == {
            "config.json", "log.csv", "last.pt", "best.pt", "results.json", "forecast.png"}
    compare("runs/on1", "runs/on2")
    compare("runs/on1", "runs/on3")
    for n in (1, 3):
        together(n, "--resume", "runs/on2", "--iterations", 20 + n)
        together(1, "--resume", "runs/on1", "--iterations", 20 + n)
        compare("runs/on1", "runs/on2")


@pytest.mark.slow
def test_a_killed_process_ends_them_all():
    """Within thirty seconds, with the last checkpoint whole and nothing of ours in the way."""
    process = start(*SETTINGS, "--iterations", 100000, "--eval-every", 100000, "--save-every", 5, "--name", "a")
    last = Path("runs/a/last.pt")
    wait = time.monotonic() + 600
    while not (last.exists() and torch.load(last, weights_only=True)["iteration"] >= 5) and time.monotonic() < wait:
        time.sleep(0.2)
    workers = children(process.pid)
    os.kill(workers[-1], signal.SIGKILL)
    begun = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert time.monotonic() - begun < 30 and process.returncode != 0
    assert not any(Path(f"/proc/{w}").exists() for w in workers)
    assert OURS not in err, err                   # torchrun reports in its own way; no traceback of ours
    assert torch.load(last, weights_only=True)["iteration"] % 5 == 0
    further = torch.load(last, weights_only=True)["iteration"] + 1
    together(1, "--resume", "runs/a", "--iterations", further)


@pytest.mark.slow
def test_interrupting_one_stops_all():
    process = start(*SETTINGS, "--iterations", 100000, "--eval-every", 100000, "--name", "a")
    last = Path("runs/a/last.pt")
    wait = time.monotonic() + 600
    while not last.exists() and time.monotonic() < wait:
        time.sleep(0.2)
    os.kill(children(process.pid)[0], signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "--resume runs/a" in err and OURS not in err, err
    assert f"stopped at iteration {torch.load(last, weights_only=True)['iteration']}, saved" in err


def test_what_one_process_alone_finds_wrong_is_said(monkeypatch, capsys):
    """The first of two waits for the other, on whose machine the data are missing."""
    monkeypatch.setattr(train, "processes", train.Processes())
    for name, value in dict(count=2, rank=1, first=False).items():
        monkeypatch.setattr(train.processes, name, value)
    monkeypatch.setattr(train.time, "sleep", lambda seconds: None)
    assert train.main(["convlstm", "--device", "cpu", "--data", "nosuch.npy"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("train.py: process 1: ") and "nosuch.npy" in err and err.count("\n") == 1


@pytest.mark.slow
def test_interrupting_one_stops_the_evaluation_of_all():
    """Ten thousand sequences would take minutes; the run that they were to score is whole."""
    process = start(*SETTINGS, "--iterations", 1, "--eval-sequences", 10000, "--name", "a")
    while "evaluating 10000" not in (line := process.stdout.readline()):
        assert line, process.communicate()[1]
    os.kill(children(process.pid)[1], signal.SIGTERM)
    begun = time.monotonic()
    _, err = process.communicate(timeout=300)
    assert time.monotonic() - begun < 30 and process.returncode != 0
    assert err.count("stopped during the evaluation") == 1 and OURS not in err, err
    assert not Path("runs/a/results.json").exists()
    together(1, "--eval", "runs/a", "--eval-sequences", 5)


def test_what_one_process_finds_wrong_ends_all_in_a_line():
    Path("runs/a").mkdir(parents=True)
    err = finish(start(*SETTINGS, "--name", "a"), status=1)
    assert "runs/a exists" in err and OURS not in err, err


def test_fewer_sequences_than_processes():
    finish(start(*SETTINGS, "--iterations", 1, "--eval-sequences", 1, "--name", "a"))
    assert json.loads(Path("runs/a/results.json").read_text())["forecast"]["mse"]["mean"] > 0
    assert "without torchrun" in together(2, "--eval", "runs/a", status=2)


@pytest.mark.slow
def test_more_processes_than_sequences():
    assert "--batch 1 over 2 processes" in together(2, *SETTINGS, "--batch", 1, status=2)
    assert not Path("runs").exists()
    together(1, *SETTINGS, "--batch", 1, "--iterations", 1, "--name", "a")
    assert "its batch of 1 over 2 processes" in together(2, "--resume", "runs/a", status=2)
