"""Runs when things go wrong: damaged files, full disks, two processes at once, nobody who listens; and runs in code of
one's own."""

import errno
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import conftest
import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run
from conftest import command_refused as refused

import convlstm
import data
import train

pytestmark = pytest.mark.usefixtures("empty_folder")
TINY = ["convlstm", *SMALL, *"--iterations 4 --eval-every 2 --save-every 1 --eval-sequences 3".split()]


def start(*arguments, before=(), **options):
    return subprocess.Popen([*before, sys.executable, str(ROOT / "train.py"), *map(str, arguments)], text=True,
                            env=os.environ | dict(OMP_NUM_THREADS="1"), **options)


@pytest.fixture(scope="module")
def trained_once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert run(*TINY, "--name", "a") == 0
    return folder / "runs/a"


@pytest.fixture
def made(trained_once, tmp_path):
    """The folder of a small run, a copy of one's own."""
    shutil.copytree(trained_once, tmp_path / "runs/a")
    rewrite(tmp_path / "runs/a", lambda c: c["config"].update(
        folder=str(tmp_path / "runs/a"), data_dir=str(tmp_path / "data")))
    return Path("runs/a")


def everything(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def rewrite(folder, change):
    """Change a checkpoint's content and save it whole."""
    checkpoint = torch.load(folder / "last.pt", weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, folder / "last.pt")


@pytest.mark.parametrize("at", [3, 10, 13])
def test_a_checkpoint_of_an_earlier_version_goes_on(at, monkeypatch):
    """It held the losses since the log's last line, of every tenth iteration here, by their iteration modulo ten."""
    def save(path, checkpoint, save=train.save_checkpoint):
        losses = torch.full((10,), 5.0)                           # of those before the line, which nobody reads
        for k, loss in enumerate(checkpoint["losses"], checkpoint["logged"]):
            losses[k % 10] = loss
        save(path, checkpoint | dict(losses=losses, config=checkpoint["config"] | dict(quick=False)))
        if checkpoint["iteration"] == at:
            raise KeyboardInterrupt

    longer = [*TINY, "--iterations", 15]
    assert run(*longer, "--name", "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(train, "save_checkpoint", save)
        assert run(*longer, "--name", "a") == 130
    assert run("--resume", "runs/a") == 0
    logs = [[row.split(",")[:4] for row in Path("runs", name, "log.csv").read_text().splitlines()]
            for name in ("a", "whole")]
    assert logs[0] == logs[1] and len(logs[0]) == 3


def test_a_flipped_bit_is_found(made, capsys):
    """Anywhere in the stored weights and states: torch.load looks at no checksum."""
    content, random = (made / "last.pt").read_bytes(), np.random.default_rng(0)
    for at in random.integers(64, len(content) - 2000, 40):       # the end is the archive's directory
        changed = bytearray(content)
        changed[at] ^= 1 << random.integers(8)
        (made / "last.pt").write_bytes(changed)
        try:
            train.open_run(made)
        except data.DataError as error:
            assert "last.pt cannot be read" in str(error)
        else:                       # between two members; nothing that is read
            assert train.open_run(made).checkpoint["iteration"] == 4
            same = torch.load(made / "last.pt", weights_only=True)["model"]
            (made / "last.pt").write_bytes(content)
            for name, value in torch.load(made / "last.pt", weights_only=True)["model"].items():
                assert torch.equal(same[name], value)


@pytest.mark.parametrize("change", [
    lambda c: c.update(iteration=None), lambda c: c.update(validation=None), lambda c: c.update(validation=[[1]]),
    lambda c: c.update(logged=9), lambda c: c.update(losses=torch.zeros(3)), lambda c: c.pop("seconds"),
    lambda c: c["config"].update(batch="two"), lambda c: c["config"].update(lr=None),
    lambda c: c["config"].pop("clips"),
    lambda c: c["config"].update(model="nosuch"), lambda c: c["config"]["network"].update(hidden=5),
    lambda c: c["config"]["network"].update(kernel="x"), lambda c: c["model"].popitem(),
    lambda c: c["model"]["output.bias"].fill_(float("nan")),
    lambda c: c["optimizer"]["state"][0].update(exp_avg=torch.zeros(1)), lambda c: c["optimizer"].pop("state"),
    lambda c: c["optimizer"]["state"][0]["exp_avg_sq"].fill_(float("inf"))])
def test_a_checkpoint_of_wrong_content_is_refused_whole(change, made, capsys):
    rewrite(made, change)
    before = everything(made)
    for command in (["--resume", made, "--iterations", 6], ["--eval", made], ["--figures", made]):
        assert "last.pt cannot be read" in refused(capsys, *command)
    assert "last.pt cannot be read" in refused(capsys, *TINY, "--init", made)
    assert everything(made) == before and [p.name for p in Path("runs").iterdir()] == ["a"]


@pytest.mark.parametrize("place", ["fifo", "zero", "folder"])
def test_what_is_no_file_is_not_waited_for(place, made, capsys):
    (made / "last.pt").unlink()
    if place == "fifo":
        os.mkfifo(made / "last.pt")
    elif place == "zero":
        (made / "last.pt").symlink_to("/dev/zero")
    else:
        (made / "last.pt").mkdir()
    for command in ("--resume", "--eval", "--figures"):
        assert "last.pt" in refused(capsys, command, made)


def test_two_processes_do_not_train_one_run(made, capsys):
    with data.alone_in(made):
        assert "another process" in refused(capsys, "--resume", made, "--iterations", 6)
    assert run("--resume", made, "--iterations", 6) == 0


def test_forecasts_written_at_once_all_stay(made, capsys):
    np.save("mine.npy", np.zeros((9, 64, 64), np.uint8))
    processes = [conftest.start("--predict", made, "--data", "mine.npy") for _ in range(3)]
    assert [process.join() or process.exitcode for process in processes] == [0, 0, 0]
    assert {path.name for path in made.glob("*predict*.npy")} == {f"predict-mine-{n}.npy" for n in (1, 2, 3)}
    assert not list(made.glob(".*"))


def test_a_full_disk_is_named(made, capsys, monkeypatch):
    before, fsync = everything(made), os.fsync

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    assert "config.json: No space left" in refused(capsys, "--resume", made, "--iterations", 6)
    assert "runs: No space left" in refused(capsys, *TINY, "--name", "b")
    assert everything(made) == before and not Path("runs/b").exists()
    monkeypatch.setattr(os, "fsync", lambda handle: (
        full if os.readlink(f"/proc/self/fd/{handle}").count("last.pt") else fsync)(handle))
    assert "last.pt: No space left" in refused(capsys, *TINY, "--name", "b")
    assert not list(Path("runs/b").glob(".*"))


def test_who_listens_may_leave():
    """`train.py … | head -1`, and a run whose standard output is closed from the start: they train on."""
    listening = start(*TINY, "--name", "a", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    listening.stdout.close()
    closed = start(*TINY, "--name", "b", before=["sh", "-c", '"$@" >&-', "sh"], stderr=subprocess.PIPE)
    for process, name in ((listening, "a"), (closed, "b")):
        assert process.stderr.read() == "" and process.wait() == 0 and Path(f"runs/{name}/results.json").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_under_the_output_is_said():
    with open("/dev/full", "w") as nowhere:
        process = start("--list", "--data", "taxibj", stdout=nowhere, stderr=subprocess.PIPE)
        assert process.stderr.read() == "train.py: standard output: No space left on device\n" and process.wait() == 2


@pytest.mark.parametrize("delay", [0.5, 1.5])
def test_ctrl_c_while_starting(delay):
    process = start("--list", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while b"SigCgt:\t0000000000000000" in Path(f"/proc/{process.pid}/status").read_bytes():
        time.sleep(0.001)           # Python itself has not started
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    err = process.stderr.read()
    assert process.wait() == 130 and err == "train.py: interrupted\n", err


def test_ctrl_c_when_all_is_done():
    """Python's own end takes a moment; what it comes into is no longer the run."""
    ends = ("import atexit, runpy, signal, sys; sys.argv[0] = sys.argv.pop(1); "
            "atexit.register(signal.raise_signal, signal.SIGINT); runpy.run_path(sys.argv[0], run_name='__main__')")
    done = subprocess.run([sys.executable, "-c", ends, "train.py", "--list", "--data", "taxibj"], cwd=ROOT, text=True,
                          capture_output=True)
    assert (done.returncode, done.stderr) == (0, "") and "convlstm" in done.stdout


def test_other_values_of_the_same_shape_are_other_data(capsys):
    film = np.random.default_rng(0).random((60, 16, 16), dtype=np.float32)
    np.save("mine.npy", film)
    assert run(*TINY, "--data", "mine.npy", "--horizon", 2, "--iterations", 2, "--name", "a") == 0
    np.save("mine.npy", film[::-1])
    assert "checksum" in refused(capsys, "--resume", "runs/a", "--iterations", 3)
    assert run("--eval", "runs/a") == 0


def test_states_that_are_not_finite_are_not_saved(capsys, monkeypatch):
    step = train.train_step

    def bad(model, optimizer, *arguments):
        loss = step(model, optimizer, *arguments)
        next(iter(optimizer.state.values()))["exp_avg_sq"][0] = float("inf")
        return loss

    monkeypatch.setattr(train, "train_step", bad)
    assert "not finite at iteration 1" in refused(capsys, *TINY, "--name", "a", status=1)
    assert torch.load("runs/a/last.pt", weights_only=True)["iteration"] == 0


def test_one_number_that_is_not_finite_is_seen():
    """Such as the output's bias of a network on full frames, which is one number."""
    for one in (torch.ones(1), torch.ones(())):
        assert train.all_finite([torch.ones(3), dict(step=one)])
        for bad in (math.nan, math.inf, -math.inf):
            assert not train.all_finite([torch.ones(3), one * bad]) and not train.all_finite([dict(step=one * bad)])


def test_a_validation_that_is_not_finite_ends_the_run(capsys, monkeypatch):
    monkeypatch.setattr(train, "validate", lambda *_: float("nan"))
    assert "validation" in refused(capsys, *TINY, "--name", "a", status=1)


@pytest.mark.parametrize("arguments, says", [
    ("convlstm --iterations=--", "--iterations"), ("convlstm --lr=--", "--lr"), ("convlstm --lr 9e37", "--lr"),
    (f"convlstm --iterations {10**30}", "--iterations"), ("--list --data=", "--data"), ("convlstm --init=", "--init"),
    ("convlstm --normalize 1 --data x.npy", "LOW and HIGH")])
def test_odd_command_lines(arguments, says, capsys):
    assert says in refused(capsys, *arguments.split())


def test_an_odd_environment(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    monkeypatch.setattr(train, "processes", train.Processes())
    assert "WORLD_SIZE" in refused(capsys, "--list")


def test_a_run_from_elsewhere_does_not_say_where_to_write(made, capsys):
    """Data are unpacked into the data folder: of a run that was moved here it is not the one it names."""
    made.rename("moved")
    moved = train.open_run("moved")
    assert train.data_dir_of(moved, train.parse(["--eval", "moved"])[1]) == "data"
    Path("moved").rename("runs/a")
    assert train.data_dir_of(train.open_run(made), train.parse(["--eval", "a"])[1]) == str(Path("data").absolute())


def test_what_killed_saves_left_goes_with_the_next(made, capsys):
    (made / ".last.pt.abcdefgh.tmp").write_bytes(b"half")
    assert run("--resume", made, "--iterations", 6) == 0
    assert not list(made.glob(".*"))


def test_evaluation_takes_what_memory_there_is(made, capsys, monkeypatch):
    """Smaller pieces, the same scores to rounding; the size is kept, so that --eval repeats them to the bit."""
    whole = json.loads((made / "results.json").read_text())
    forward, sizes = convlstm.ConvLSTM.forward, []

    def limited(model, frames, *arguments, **options):
        sizes.append(len(frames))
        if len(frames) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(model, frames, *arguments, **options)

    monkeypatch.setattr(convlstm.ConvLSTM, "forward", limited)
    monkeypatch.setattr(train, "EVAL_BATCH", 3)
    assert run("--eval", made) == 0
    small = json.loads((made / "results.json").read_text())
    assert 3 in sizes and sizes.count(2) and small["eval_batch"] == 2
    for name in ("mse", "mae", "psnr_float", "ssim_gaussian"):  # others truncate to 8 bits, where rounding can flip one
        np.testing.assert_allclose(small["forecast"][name]["frames"], whole["forecast"][name]["frames"], 1e-5, 1e-6)
    monkeypatch.setattr(convlstm.ConvLSTM, "forward", forward)
    assert run("--eval", made) == 0
    assert json.loads((made / "results.json").read_text()) == small


def test_a_run_in_ones_own_code(made):
    model, config = train.load(made)
    assert not model.training and config["clips"]["frames_in"] == 3
    frames = torch.rand(2, 3, 1, 64, 64)
    again, _ = train.load(made / "best.pt")
    with torch.no_grad():
        forecast = model(frames, horizon=3)[:, -3:]
        assert forecast.shape == (2, 3, 1, 64, 64) and again(frames, horizon=3).isfinite().all()
    weights = torch.load(made / "last.pt", weights_only=True)["model"]
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())


def test_a_threshold_is_taken_on_the_data_as_stored(capsys):
    """A storm of 35.7 that stands still, in float32: back from the network's pixels it would be below 35.7."""
    film = np.zeros((60, 16, 16), np.float32)
    film[:, :8], film[:, 15, 15] = 35.7, np.nan
    np.save("still.npy", film)
    own = "--data still.npy --normalize 0 70 --horizon 2 --iterations 1 --name a --unit dBZ --thresholds 35.7 40"
    assert run("convlstm", *SMALL, *own.split()) == 0
    results = json.loads(Path("runs/a/results.json").read_text())
    still = results["repeat_last"]
    assert results["unit"] == "dBZ" and still["csi_35.7"]["frames"] == [1, 1] and still["csi_40"]["mean"] is None
    assert still["rmse"]["mean"] == 0 and results["black"]["rmse"]["mean"] == pytest.approx(35.7 * (128 / 255) ** 0.5)
    assert results["black"]["mae_units"]["mean"] == pytest.approx(35.7 * 128 / 255)
    np.save("other.npy", film[10:40])
    assert run("--eval", "runs/a", "--data", "other.npy", "--horizon", 4, "--thresholds", 20) == 0
    other = json.loads(Path("runs/a/results-other_npy.json").read_text())
    assert len(other["repeat_last"]["csi_20"]["frames"]) == 4 and other["repeat_last"]["csi_20"]["mean"] == 1
    assert json.loads(Path("runs/a/results.json").read_text()) == results
    assert run("--eval", "runs/a", "--data", "other.npy", "--horizon", 4, "--eval-sequences", 1) == 0
    assert json.loads(Path("runs/a/results-other_npy-1-sequences.json").read_text())["sequences"] == 1
    assert json.loads(Path("runs/a/results-other_npy.json").read_text()) == other


def test_a_model_for_any_size_forecasts_any_size(capsys):
    np.save("small.npy", np.random.default_rng(0).random((40, 12, 16), np.float32))
    np.save("large.npy", np.random.default_rng(0).random((2, 9, 20, 28), np.float32))
    own = ["convlstm", *SMALL, *"--data small.npy --horizon 2 --iterations 1".split()]
    assert run(*own, "--setup", "fullres", "--name", "a") == 0
    assert run("--predict", "runs/a", "--data", "large.npy", "--layout", "MTHW") == 0
    assert np.load("runs/a/predict-large-1.npy").shape == (2, 2, 20, 28)
    assert run(*own, "--name", "b") == 0
    line = refused(capsys, "--predict", "runs/b", "--data", "large.npy", "--layout", "MTHW")
    assert "the model takes 1 x 12 x 16" in line


def test_a_schedule_for_data_of_ones_own(capsys):
    np.save("mine.npy", np.random.default_rng(0).random((60, 16, 16), np.float32))
    own = ["convlstm", *SMALL, *"--data mine.npy --layers 1 --horizon 2 --batch 8 --name".split()]
    _, args = train.parse([*own, "a"])
    config, clips, _ = train.settings(args)
    assert config["iterations"] == 100 * clips.train_count // 8 and not config["reverse"] and not config["as_published"]


def test_init_takes_over_the_scale(capsys):
    film = np.random.default_rng(0).random((60, 16, 16), np.float32)
    np.save("mine.npy", 50 * film)
    own = ["convlstm", *SMALL, *"--data mine.npy --layers 1 --horizon 2 --iterations 1".split()]
    assert run(*own, "--normalize", 0, 70, "--name", "a") == 0
    np.save("mine.npy", 60 * film)
    assert run(*own, "--init", "runs/a", "--name", "b") == 0
    assert json.loads(Path("runs/b/config.json").read_text())["clips"]["scale"] == [0, 70]
    assert "scale" in refused(capsys, *own, "--normalize", "--init", "runs/a")


def test_init_says_what_differs(made, capsys):
    line = refused(capsys, *TINY, "--init", made, "--hidden", 8)
    assert "hidden 4, here 8" in line
