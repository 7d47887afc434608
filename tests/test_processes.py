"""One run on several processes (gloo, CPU): the same run on any number of them, and all end when one does.

Where torchrun itself is not in question, processes get from here what it would tell them: that spares seconds each.
Every process works in a folder of its own, so that it shows who writes.
"""

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
from conftest import FILM, ROOT

import train

SETTINGS = [*FILM, *"--batch 5 --iterations 20 --eval-every 10 --save-every 7 --name".split()]     # 2 + 3, 1 + 2 + 2
pytestmark = pytest.mark.usefixtures("film")


def start(count, *arguments):
    """Processes of a run, without torchrun; all but the first each in a folder of its own with nothing in it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        told = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=s.getsockname()[1], WORLD_SIZE=count)
    here, processes = Path.cwd(), []
    arguments = [here / word if word in ("film.npy", "runs/on2", "runs/a") else word for word in arguments]
    for rank in range(count):
        folder = here / f"process-{rank}" if rank else here
        folder.mkdir(exist_ok=True)
        os.chdir(folder)
        processes.append(conftest.start(*arguments, output=here / f"said-{rank}", RANK=rank, LOCAL_RANK=rank, **told))
    os.chdir(here)
    return processes


def finish(processes, status=0):
    """They all end with this status, the others having written nothing; what the first and the others said."""
    for process in processes:
        process.join(100)
    first, *others = (Path(f"said-{rank}").read_text() for rank in range(len(processes)))
    assert [process.exitcode for process in processes] == [status] * len(processes), (first, others)
    assert not any([*folder.iterdir()] for folder in Path.cwd().glob("process-*")) and "Traceback" not in first
    return first, "".join(others)


def compare(a, b, tolerance=1e-5):
    """Weights, log and scores of two runs."""
    runs = [train.open_run(Path("runs", name)) for name in (a, b)]
    logs = [np.array(run.log)[:, :4] for run in runs]
    assert runs[0].iteration == runs[1].iteration and len(runs[0].validation) == len(runs[1].validation) > 1
    np.testing.assert_allclose(*logs, rtol=1e-4)
    np.testing.assert_allclose(runs[0].validation, runs[1].validation, rtol=1e-4)
    for x, y in zip(*(run.model.state_dict().values() for run in runs), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance)


@pytest.mark.parametrize("model", [["convlstm"], ["predrnn", "--variant", "v2"]])           # v2 has an auxiliary loss
def test_any_number_of_processes_is_one_run(model):
    """1, 2 and 3, of unequal shares: the same weights and log, also where another number continues."""
    assert conftest.run(*model, *SETTINGS, "on1") == 0
    for count in 2, 3:
        said, others = finish(start(count, *model, *SETTINGS, f"on{count}"))
        assert "iteration 20: validation MSE" in said and others == ""
        assert {f.name for f in Path(f"runs/on{count}").iterdir()} == {f.name for f in Path("runs/on1").iterdir()}
        compare(f"on{count}", "on1")
    for count, iterations in ((3, 25), (1, 30)) if model == ["convlstm"] else ():
        finish(start(count, "--resume", "runs/on2", "--iterations", iterations))
        assert conftest.run("--resume", "runs/on1", "--iterations", iterations) == 0
        compare("on2", "on1")


def test_torchrun():
    """As a user starts it, to the end; a fault that all meet is one line of the first."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", ROOT / "train.py"]
    environment = os.environ | dict(OMP_NUM_THREADS="1")
    command = [*torchrun, "convlstm", *SETTINGS, "a"]
    for status, says in (0, ""), (1, "runs/a exists"):
        ended = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert ended.returncode == status and says in ended.stderr, ended.stderr
        assert ended.stderr.count("train.py: ") == status and f'File "{ROOT / "train.py"}"' not in ended.stderr
    assert conftest.run("convlstm", *SETTINGS, "b") == 0
    compare("a", "b")


def running(count):
    """Processes of a run without end, once it has saved."""
    processes = start(count, "convlstm", *SETTINGS, "a", "--iterations", 10**6, "--eval-every", 10**6)
    wait = time.monotonic() + 60
    while not Path("runs/a/last.pt").exists() and time.monotonic() < wait:
        time.sleep(0.1)
    return processes


def test_where_one_is_killed_all_end_in_a_line():
    """And the last checkpoint is whole."""
    first, second, third = running(3)
    third.kill()
    third.join()
    said, others = finish([first, second], status=1)
    line = "train.py: another process of this run ended; continue with --resume"
    assert said.splitlines()[-1].startswith(line) and said.count("train.py: ") == 1
    iteration = train.open_run("runs/a").iteration
    assert iteration % 7 == 0
    finish(start(2, "--resume", "runs/a", "--iterations", iteration + 1))


def test_a_signal_to_one_saves_and_stops_all():
    processes = running(2)
    os.kill(processes[1].pid, signal.SIGTERM)
    said, _ = finish(processes, status=143)
    assert f"stopped at iteration {train.open_run('runs/a').iteration}, saved; continue with: " in said


def test_what_several_processes_cannot_do_is_said(monkeypatch, capsys):
    monkeypatch.setattr(train, "PROCESSES", 2)
    monkeypatch.setattr(train, "maximum", lambda *number: 0)
    monkeypatch.setattr(train.dist, "is_initialized", lambda: True)
    assert "without torchrun" in conftest.command_refused(capsys, "--eval", "runs/a")
    assert "a batch of 1" in conftest.command_refused(capsys, "convlstm", *SETTINGS, "a", "--batch", 1)
    assert not Path("runs").exists()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_cuda_two_devices_are_one_run():
    """Over NCCL, each with a graph of its own."""
    on_cuda = ["convlstm", *SETTINGS, "on1", "--device", "cuda", "--precision", "fp32"]
    for count in 1, 2:
        on_cuda[on_cuda.index("--name") + 1] = f"on{count}"
        assert "the step is not" not in finish(start(count, *on_cuda))[0]
    compare("on2", "on1", tolerance=1e-3)
