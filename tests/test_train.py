"""train.py end to end: runs, their files, resuming, interruptions and every error it promises."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, SMALL, run, start
from conftest import command_refused as refused

import convlstm
import data
import train

pytestmark = pytest.mark.usefixtures("empty_folder")
TINY = ["convlstm", *SMALL, *"--iterations 23 --eval-every 8 --save-every 3 --eval-sequences 5".split()]


def final(folder):
    """What must not depend on interruptions: weights, optimiser, the log less its seconds, the results."""
    folder = Path(folder)
    last = torch.load(folder / "last.pt", weights_only=True)
    log = [line.rsplit(",", 1)[0] for line in (folder / "log.csv").read_text().splitlines()]
    return last["iteration"], last["model"], last["optimizer"]["state"], log, (folder / "results.json").read_text()


def assert_same(a, b):
    assert a[0] == b[0] and a[3] == b[3] and a[4] == b[4]
    for x, y in zip(a[1].values(), b[1].values()):
        assert torch.equal(x, y)
    for x, y in zip(a[2].values(), b[2].values()):
        assert all(torch.equal(x[k], y[k]) for k in x)


def test_a_whole_run(capsys):
    assert run(*TINY, "--name", "a") == 0
    out = capsys.readouterr().out
    folder = Path("runs/a")
    assert {f.name for f in folder.iterdir()} == {
        "config.json", "log.csv", "last.pt", "best.pt", "results.json", "forecast.png"}
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 0 and config["iterations"] == 23 and config["clips"]["name"] == "moving_digits"
    assert config["versions"]["torch"] == torch.__version__
    lines = (folder / "log.csv").read_text().splitlines()
    assert lines[0] == "iteration,loss,lr,epsilon,seconds"
    assert [line.split(",")[0] for line in lines[1:]] == ["10", "20", "23"]
    results = json.loads((folder / "results.json").read_text())
    assert (results["model"], results["variant"], results["data"]) == ("convlstm", "full", "moving_digits")
    assert results["iteration"] == 23 and results["sequences"] == 5 and "moving_digits" in results["test_set"]
    assert [k for k, _ in results["validation"]] == [8, 16, 23]
    for name, frames in (("forecast", 3), ("all_predictions", 5), ("repeat_last", 3), ("black", 3)):
        assert len(results[name]["mse"]["frames"]) == frames
        np.testing.assert_allclose(results[name]["mse"]["mean"], np.mean(results[name]["mse"]["frames"]))
    # The same figures from scratch: the last weights, the first five test sequences.
    model = train.build(config)
    model.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])
    clips = data.open_data("moving_digits", frames_in=3, horizon=3).test(0, 5)
    with torch.no_grad():
        forecast = model(clips[:, :3], horizon=3)[:, -3:].clamp(0, 1)
    mse = ((forecast.double() - clips[:, 3:]) ** 2).sum((2, 3, 4)).mean()
    np.testing.assert_allclose(results["forecast"]["mse"]["mean"], mse, rtol=1e-6)
    black = (clips[:, 3:] ** 2).sum((2, 3, 4)).double().mean()
    np.testing.assert_allclose(results["black"]["mse"]["mean"], black, rtol=1e-6)
    assert f"{results['forecast']['mse']['mean']:.2f}" in out and str(folder / "forecast.png") in out
    assert (folder / "forecast.png").read_bytes().startswith(b"\x89PNG")
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("name, variant, setup", [
    pytest.param(name, variant, setup, marks=() if (variant, setup) == ("full", "patch4") else pytest.mark.slow)
    for name in train.MODELS for variant in train.model_file(name).VARIANTS for setup in ("patch4", "fullres")])
def test_every_variant_runs_end_to_end(name, variant, setup, capsys):
    assert run(name, *TINY[1:], "--variant", variant, "--setup", setup, "--patch", 8, "--iterations", 2,
               "--name", "a") == 0
    results = json.loads(Path("runs/a/results.json").read_text())
    assert (results["model"], results["variant"], results["setup"]) == (name, variant, setup)
    assert all(np.isfinite(results["forecast"][metric]["mean"]) for metric in ("mse", "mae", "psnr", "ssim"))
    before = final("runs/a")
    assert run("--eval", "runs/a") == 0
    assert_same(final("runs/a"), before)


def test_runs_get_numbers(capsys):
    for n in (1, 2):
        assert run(*TINY, "--iterations", 1, "--eval-sequences", 1) == 0
        assert Path(f"runs/convlstm-full-moving_digits-{n}/results.json").exists()


def test_eval_repeats_the_results(capsys):
    assert run(*TINY, "--name", "a") == 0
    before = final("runs/a")
    Path("runs/a/results.json").unlink()
    assert run("--eval", "runs/a") == 0
    assert_same(final("runs/a"), before)
    assert run("--eval", "runs/a/best.pt") == 0
    assert json.loads(Path("runs/a/results-best.json").read_text())["weights"] == "best"
    assert run("--eval", "runs/a", "--eval-sequences", 2) == 0
    assert json.loads(Path("runs/a/results-2-sequences.json").read_text())["sequences"] == 2
    assert_same(final("runs/a"), before)


def test_same_seed_same_run_other_seed_other_run(capsys):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(*TINY, "--name", name, "--seed", seed) == 0
    assert_same(final("runs/a"), final("runs/b"))
    assert final("runs/a")[3] != final("runs/c")[3]


@pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_and_resumed(signum, status, capsys):
    assert run(*TINY, "--name", "whole") == 0
    train.run_step, calls = train.train_step, []

    def interrupting(*arguments):
        calls.append(1)
        if len(calls) == 21:                                      # in the middle of iteration 10: two steps each
            os.kill(os.getpid(), signum)
        return train.run_step(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", interrupting)
        assert run(*TINY, "--name", "broken") == status
    err = capsys.readouterr().err
    assert "iteration 11" in err and "--resume runs/broken" in err and "Traceback" not in err
    assert torch.load("runs/broken/last.pt", weights_only=True)["iteration"] == 11
    assert run("--resume", "runs/broken") == 0
    assert_same(final("runs/broken"), final("runs/whole"))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_and_resumed(seed):
    """SIGKILL again and again, at random moments, saves included (here every iteration saves)."""
    arguments = [*TINY, "--save-every", "1", "--iterations", "40"]
    assert run(*arguments, "--name", "whole") == 0
    random = np.random.default_rng(seed)
    process, kills = start(*arguments, "--name", "broken"), 0
    while kills < 3:
        wait = time.monotonic() + 600
        while not Path("runs/broken/last.pt").exists() and time.monotonic() < wait:
            time.sleep(0.01)
        before = Path("runs/broken/last.pt").stat().st_mtime_ns
        while Path("runs/broken/last.pt").stat().st_mtime_ns == before and process.is_alive():
            time.sleep(0.005)                                     # it trains
        time.sleep(random.uniform(0, 0.3))
        process.kill()
        process.join()
        kills += 1
        process = start("--resume", "runs/broken", output="resumed")
    process.join()
    assert process.exitcode == 0, Path("resumed").read_text()
    assert_same(final("runs/broken"), final("runs/whole"))


class Killed(BaseException):
    pass


def test_killed_within_a_save(capsys):
    """Half-written files of a killed process are in nobody's way: the checkpoint is the one before."""
    assert run(*TINY, "--name", "whole") == 0
    save, saved = train.save_checkpoint, []

    def dying(path, checkpoint):
        saved.append(path)
        if len(saved) == 4:
            with open(path.with_name(f".{path.name}.x.tmp"), "wb") as file:
                file.write(b"half")
            raise Killed                                          # nothing after this line runs, as after SIGKILL
        save(path, checkpoint)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "save_checkpoint", dying)
        with pytest.raises(Killed):
            run(*TINY, "--name", "broken")
    with open("runs/broken/log.csv", "a") as file:
        file.write("20,1.0,0")                                    # half a line
    assert run("--resume", "runs/broken") == 0
    assert_same(final("runs/broken"), final("runs/whole"))


def test_resume_trains_longer_where_the_schedule_allows(capsys):
    assert run(*TINY, "--name", "a") == 0
    assert run("--resume", "runs/a", "--iterations", 30) == 0
    assert json.loads(Path("runs/a/results.json").read_text())["iteration"] == 30
    rows = [line.split(",") for line in Path("runs/a/log.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["10", "20", "23", "30"]
    assert float(rows[-1][3]) == 0                                # ε stays where the schedule ended
    assert float(rows[-1][1]) > 0.8 * float(rows[-2][1])          # a mean of seven losses, not of ten slots
    assert "already stands at iteration 30" in refused(capsys, "--resume", "runs/a", "--iterations", 20)
    checkpoint = torch.load("runs/a/last.pt", weights_only=True)
    checkpoint["config"]["final_lr"] = 1e-6                       # as cms_lstm and moderrnn have it
    torch.save(checkpoint, "runs/a/last.pt")
    assert "--init runs/a" in refused(capsys, "--resume", "runs/a", "--iterations", 40)


def test_resume_refuses_other_settings(capsys):
    assert run(*TINY, "--name", "a", "--iterations", 1) == 0
    for option in (["--lr", "0.1"], ["--batch", "3"], ["--variant", "full"], ["--seed", "1"], ["--precision", "bf16"]):
        assert option[0] in refused(capsys, "--resume", "runs/a", *option)
    assert "last checkpoint" in refused(capsys, "--resume", "runs/a/best.pt")
    assert "no such run" in refused(capsys, "--resume", "runs/other")


def test_init_takes_the_weights_only(capsys):
    assert run(*TINY, "--name", "a") == 0
    assert run(*TINY, "--name", "b", "--init", "runs/a", "--iterations", 1, "--lr", 1e-12, "--save-every", 1) == 0
    a, b = final("runs/a"), final("runs/b")
    for x, y in zip(a[1].values(), b[1].values()):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    assert b[0] == 1 and all(s["step"] == 2 for s in b[2].values())             # one iteration, forwards and reversed
    for other in (["--hidden", 8], ["--variant", "peephole"]):
        assert "another network" in refused(capsys, *TINY, "--init", "runs/a", *other)
    assert len(list(Path("runs").iterdir())) == 2


def test_a_loss_that_is_not_finite(capsys):
    count = []
    step = train.train_step

    def bad(*arguments):
        count.append(1)
        loss = step(*arguments)
        return loss * float("nan") if len(count) == 2 * 14 else loss            # the second step of iteration 14

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", bad)
        err = refused(capsys, *TINY, "--name", "a", status=1)
    assert "iteration 14" in err and "last.pt" in err and "--lr" in err
    assert torch.load("runs/a/last.pt", weights_only=True)["iteration"] == 12   # saved every 3: the last good one


def test_weights_that_are_not_finite(capsys):
    """A finite loss does not say that the step after it was: what is saved is looked at too."""
    count, step = [], train.train_step

    def bad(model, *arguments):
        loss = step(model, *arguments)
        count.append(1)
        if len(count) == 2 * 6:
            next(model.parameters()).data[0] = float("inf")
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", bad)
        err = refused(capsys, *TINY, "--name", "a", status=1)
    assert "iteration 6" in err and torch.load("runs/a/last.pt", weights_only=True)["iteration"] == 3


def test_devices_of_several_processes(monkeypatch):
    """Each process takes its own, when a run is gone on with too."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(train.processes, "count", 4)
    monkeypatch.setattr(train.processes, "local", 3)
    assert str(train.device_of("cuda")) == str(train.device_of(None)) == "cuda:3"
    with pytest.raises(train.UserError, match="cuda:1"):
        train.device_of("cuda:1")
    monkeypatch.setattr(train.processes, "count", 1)
    assert str(train.device_of("cuda:1")) == "cuda:1"
    with pytest.raises(train.UserError, match="has 4"):
        train.device_of("cuda:4")


@pytest.mark.parametrize("total, count", [(8, 3), (1, 2), (5, 5), (2, 4)])
def test_shares(total, count, monkeypatch):
    shares = []
    for rank in range(count):
        monkeypatch.setattr(train.processes, "count", count)
        monkeypatch.setattr(train.processes, "rank", rank)
        shares.append(len(range(total)[train.processes.share(total)]))
    assert sum(shares) == total and shares[0] == max(shares) and max(shares) - min(shares) <= 1


def test_data_that_changed(capsys):
    film = np.random.default_rng(0).random((40, 16, 16), dtype=np.float32)
    np.save("mine.npy", film)
    assert run(*TINY, "--data", "mine.npy", "--normalize", "--horizon", 2, "--iterations", 2, "--name", "a") == 0
    np.save("mine.npy", film * 1000)
    for command in ("--eval", "--resume"):
        assert "scale" in refused(capsys, command, "runs/a")
    np.save("mine.npy", np.concatenate([film, film]))
    assert run("--eval", "runs/a") == 0                           # the same scale: the same meaning
    capsys.readouterr()
    assert "train_count" in refused(capsys, "--resume", "runs/a", "--iterations", 3)


def test_a_run_is_gone_on_with_from_any_folder(tmp_path, monkeypatch, capsys):
    np.save("mine.npy", np.random.default_rng(0).random((40, 16, 16), dtype=np.float32))
    own = "convlstm --data mine.npy --device cpu --hidden 4 --layers 2 --kernel 3 --batch 2 --frames-in 3 --horizon 2"
    assert run(*own.split(), "--iterations", 2, "--name", "a") == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert run("--resume", "../runs/a", "--iterations", 3) == 0


def test_a_bf16_run_on_a_cpu_without_bf16(monkeypatch, capsys):
    """Cannot be started there, but goes on and is evaluated in fp32."""
    monkeypatch.setattr(train, "cpu_has_bf16", lambda: False)
    refused(capsys, *TINY, "--precision", "bf16")
    monkeypatch.setattr(train, "cpu_has_bf16", lambda: True)     # without it autocast computes all the same, slowly
    assert run(*TINY, "--precision", "bf16", "--iterations", 2, "--name", "a") == 0
    monkeypatch.setattr(train, "cpu_has_bf16", lambda: False)
    assert run("--eval", "runs/a", "--eval-sequences", 2) == 0
    assert json.loads(Path("runs/a/config.json").read_text())["precision"] == "bf16"
    assert run("--resume", "runs/a", "--iterations", 3) == 0
    assert "going on in fp32" in capsys.readouterr().out
    assert json.loads(Path("runs/a/config.json").read_text())["precision"] == "fp32"


def test_no_terminal_is_too_plain(capsys):
    """A terminal or a pipe that knows ASCII only, and one that closes early."""
    listing = [sys.executable, str(ROOT / "train.py"), "--list", "--setup", "fullres", "--data", "taxibj"]
    ascii_only, closing = (
        subprocess.Popen(listing, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | other)
        for other in (dict(PYTHONIOENCODING="ascii"), {}))
    closing.stdout.close()
    assert closing.stderr.read() == b"" and closing.wait() == 0
    out, err = ascii_only.communicate()
    assert ascii_only.returncode == 0 and b"convlstm" in out and not err


def test_out_of_memory(capsys):
    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", full)
        err = refused(capsys, *TINY, status=1)
    assert "--batch 2" in err and "64×64" in err and "--recompute" in err


@pytest.mark.parametrize("arguments, says", [
    ("", "give a MODEL"),
    ("nosuch --device cpu", "convlstm"),
    ("convlstm --list", "give a MODEL"),
    ("convlstm --variant nosuch --device cpu", "full, peephole"),
    ("convlstm --setup nosuch", "patch4"),
    ("convlstm --nosuch", "--nosuch"),
    ("convlstm --quik", "--quik"),
    ("convlstm --batch 0", "--batch"),
    ("convlstm --iterations x", "--iterations"),
    ("convlstm --lr nan", "--lr"),
    ("convlstm --seed -1", "--seed"),
    ("convlstm --seed 99999999999999999999999", "--seed"),
    ("convlstm --kernel 4 --device cpu --data moving_digits", "odd"),
    ("convlstm --quick --kernel 4", "odd"),
    ("convlstm --patch 7 --device cpu --data moving_digits", "63×63"),
    ("convlstm --device nosuch", "cuda"),
    ("convlstm --device cpu --precision tf32", "tf32"),
    ("convlstm --device cpu --data nosuch", "nosuch"),
    ("convlstm --device cpu --data moving_digits --name ../x", "--out"),
    ("convlstm --device cpu --data moving_digits --out /proc/x", "/proc/x"),
    ("convlstm --device cpu --data moving_digits --init nosuch", "nosuch"),
    ("--eval nosuch", "no such run"),
    ("--eval nosuch --lr 1", "--lr"),
    ("--list --batch 3", "--batch"),
])
def test_refusals(arguments, says, capsys):
    assert says in refused(capsys, *arguments.split())
    assert not Path("runs").exists()


def test_without_a_cuda_device(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for extra in ([], ["--data", "moving_digits"], ["--device", "cuda:1"]):
        err = refused(capsys, "convlstm", *extra)
        assert "--device cpu" in err and "--quick" in err
    assert not Path("runs").exists() and not Path("data").exists()


def test_a_name_that_exists(capsys):
    Path("runs/a").mkdir(parents=True)
    Path("runs/a/kept").write_text("kept")
    assert "exists" in refused(capsys, *TINY, "--name", "a")
    assert [f.name for f in Path("runs/a").iterdir()] == ["kept"]


def test_damaged_checkpoints(capsys):
    folder = Path("runs/a")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert "before its first checkpoint" in refused(capsys, "--resume", "runs/a")
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 half a zip"):
        (folder / "last.pt").write_bytes(content)
        assert "damaged" in refused(capsys, "--eval", "runs/a")
    torch.save({"model": 1}, folder / "last.pt")
    assert "no checkpoint" in refused(capsys, "--eval", "runs/a")


# models.md, "Two set-ups": (optimiser, weight decay, lr, final lr, batch, iterations, loss, part of them sampled,
# reversed)
ADAM, ADAMW = ("adam", 0.0, 1e-3, None), ("adamw", 0.01, 1e-3, 1e-6)
PATCH4 = {"convlstm": (*ADAM, 8, 80_000, "l2", 0.625, True), "predrnn": (*ADAM, 8, 80_000, "l2", 0.625, True),
          "sa_convlstm": (*ADAM, 8, 80_000, "l2", 0.625, True), "cms_lstm": (*ADAMW, 8, 80_000, "l2", 0.5, True),
          "moderrnn": (*ADAMW, 32, 80_000, "l1+l2", 0.5, True), "ms_lstm": (*ADAM, 8, 80_000, "l2", 0.625, True)}
FULLRES = ("adam", 0.0, 3e-4, None, 4, 105_000, "l1+l2", 1.0, False)


def paper_settings(monkeypatch, name, dataset, *arguments, train_count=None):
    """What a plain `python train.py NAME --data DATASET` would train with."""
    clips = data.open_data("moving_digits")
    clips.name, clips.train_count = dataset, train_count
    monkeypatch.setattr(data, "open_data", lambda *_, **__: clips)
    monkeypatch.setattr(train, "precision_of", lambda name, device: "fp32")
    _, args = train.parse([name, "--device", "cpu", *arguments])
    return train.settings(args)[0]


@pytest.mark.parametrize("name", train.MODELS)
@pytest.mark.parametrize("setup", ["patch4", "fullres"])
def test_the_paper_settings(name, setup, monkeypatch):
    expected = PATCH4[name] if setup == "patch4" else FULLRES
    config = paper_settings(monkeypatch, name, "moving_mnist", "--setup", setup,
                            train_count=10_500 if setup == "fullres" else None)
    found = tuple(config[k] for k in ("optimizer", "weight_decay", "lr", "final_lr", "batch", "iterations", "loss"))
    sampled = expected[-2]
    assert (*found, sampled, config["reverse"]) == expected and config["as_published"]
    model = train.build(config | dict(network=config["network"] | dict(hidden=2, layers=2)))
    for k, epsilon in ((0, 1), (sampled / 2, 0.5), (0.999 * sampled, 0.001), (sampled, 0)):
        assert model.truth_probability(round(k * 80_000), 80_000, 10, 19)[-1] == pytest.approx(epsilon, abs=1e-4)


@pytest.mark.parametrize("name, dataset, key, value", [
    *[(name, "kth", "loss", "l1+l2") for name in train.MODELS],
    *[(name, "taxibj", "patch", 2) for name in train.MODELS],
    *[(name, "typhoon", "iterations", 100_000) for name in train.MODELS],
    *[(name, "taxibj", "loss", "l1+l2" if name in ("cms_lstm", "moderrnn") else "l2") for name in train.MODELS]])
def test_a_datasets_own_settings(name, dataset, key, value, monkeypatch):
    config = paper_settings(monkeypatch, name, dataset, "--setup", "patch4")
    assert (config["network"] if key == "patch" else config)[key] == value


@pytest.mark.parametrize("name", train.MODELS)
@pytest.mark.parametrize("dataset, epochs", [("taxibj", 15), ("kth", 20), ("germany", 20)])
def test_epochs_of_fullres(name, dataset, epochs, monkeypatch):
    config = paper_settings(monkeypatch, name, dataset, "--setup", "fullres", train_count=1001)
    assert config["iterations"] == epochs * 1001 // 4


@pytest.mark.parametrize("other", [
    "--iterations 79999", "--hidden 32", "--batch 4", "--lr 1e-4", "--quick", "--horizon 5"])
def test_other_settings_are_not_the_papers(other, monkeypatch):
    assert not paper_settings(monkeypatch, "convlstm", "moving_mnist", *other.split())["as_published"]


def test_the_paper_stands_beside_a_run_of_its_own_only(capsys, monkeypatch):
    clips = data.open_data("moving_digits", frames_in=3, horizon=3)
    clips.name = "moving_mnist"
    monkeypatch.setattr(data, "open_data", lambda *_, **__: clips)
    assert run(*TINY, "--name", "a", "--iterations", 1) == 0
    assert "CMS-LSTM, Table 3" not in capsys.readouterr().out
    checkpoint = torch.load("runs/a/last.pt", weights_only=True)
    checkpoint["config"] |= dict(as_published=True, whole=1)
    torch.save(checkpoint, "runs/a/last.pt")
    assert run("--eval", "runs/a") == 0
    assert re.search(r"CMS-LSTM, Table 3 +70.4 +115.9", capsys.readouterr().out)


def test_learning_rates():
    assert train.learning_rate(dict(lr=1e-3, final_lr=None, schedule=100), 99) == 1e-3
    cosine = [train.learning_rate(dict(lr=1e-3, final_lr=1e-6, schedule=100), k) for k in (0, 50, 100)]
    np.testing.assert_allclose(cosine, [1e-3, (1e-3 + 1e-6) / 2, 1e-6])


def test_losses_by_hand():
    truth, prediction = torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2)
    prediction[0, 0] = 2.0                                        # one of six frames, four pixels off by 2
    assert train.frame_loss(prediction, truth, "l2").item() == pytest.approx(16 / 6)
    assert train.frame_loss(prediction, truth, "l1+l2").item() == pytest.approx((16 + 8) / 6)
    assert train.frame_loss(prediction, truth, "l2+0.2l1").item() == pytest.approx((16 + 0.2 * 8) / 6)


def test_masks_follow_the_probabilities():
    model = convlstm.ConvLSTM(hidden=4, layers=1)
    config = dict(frames_in=10, horizon=10, schedule=1000, seed=0, batch=2000)
    for iteration, epsilon in ((0, 1), (125, 0.8), (500, 0.2), (625, 0), (999, 0)):
        mask, shown = train.sampling_mask(model, config, iteration, torch.device("cpu"))
        assert mask.shape == (19, 2000) and mask.dtype == torch.bool and shown == pytest.approx(epsilon)
        assert mask[:10].all()
        assert mask[10:].float().mean().item() == pytest.approx(epsilon, abs=0.015)
    again, _ = train.sampling_mask(model, config | dict(batch=7), 125, torch.device("cpu"))
    assert torch.equal(again, train.sampling_mask(model, config, 125, torch.device("cpu"))[0][:, :7])


def test_reversed_clips_are_trained_as_a_second_step(capsys):
    seen, step = [], train.train_step

    def watch(model, optimizer, frames, mask, config):
        seen.append((frames, mask))
        return step(model, optimizer, frames, mask, config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train_step", watch)
        assert run(*TINY, "--iterations", 2) == 0
        forwards, backwards = seen[:2]
        assert len(seen) == 4 and torch.equal(forwards[0].flip(1), backwards[0]) and forwards[1] is backwards[1]
        seen.clear()
        assert run(*TINY, "--iterations", 2, "--no-reverse") == 0
        assert len(seen) == 2


def test_list(capsys):
    assert run("--list") == 0
    out = capsys.readouterr().out
    assert re.search(r"convlstm +full +patch4 +4,458,576 +15.9G", out)
    assert run("--list", "--setup", "fullres") == 0
    assert re.search(r"convlstm +full +fullres +444,001 +34.4G", capsys.readouterr().out)


def test_list_beside_the_papers(capsys):
    assert run("--list", "--data", "taxibj", "--setup", "fullres") == 0
    assert re.search(r"convlstm +full +fullres +444,001 +0.4M +3.2G +3.2G", capsys.readouterr().out)
    assert "moving_mnist, taxibj, kth, germany" in refused(capsys, "--list", "--data", "typhoon")


def test_an_array_of_ones_own(capsys):
    """Trained, evaluated and forecast from, in the array's own units."""
    waves = np.sin(np.arange(60)[:, None, None] / 5 + np.linspace(0, 3, 16)[:, None] + np.zeros(24))
    film = (250 + 50 * waves).astype(np.float32)
    np.save("sea.npy", film)
    own = ["convlstm", *SMALL, *"--data sea.npy --horizon 2 --iterations 3".split()]
    assert "--normalize" in refused(capsys, *own)
    assert not Path("runs").exists()
    assert run(*own, "--normalize") == 0
    folder = Path("runs/convlstm-full-sea_npy-1")
    results = json.loads((folder / "results.json").read_text())
    assert results["data"] == "sea_npy" and len(results["forecast"]["mse"]["frames"]) == 2
    before = (folder / "results.json").read_text()
    assert run("--eval", folder) == 0
    assert (folder / "results.json").read_text() == before
    assert run("--predict", folder, "--data", "sea.npy") == 0
    forecast = np.load(folder / "predict-sea-1.npy")
    assert forecast.shape == (2, 16, 24) and forecast.dtype == np.float32
    assert film.min() - 1 < forecast.min() and forecast.max() < film.max() + 1


@pytest.mark.parametrize("shape", [(9, 64, 64), (9, 1, 64, 64), (2, 9, 1, 64, 64)])
def test_predict(shape, capsys):
    assert run(*TINY, "--name", "a", "--iterations", 1) == 0
    films = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save("mine.npy", films)
    assert run("--predict", "runs/a", "--data", "mine.npy", "--horizon", 4) == 0
    assert run("--predict", "runs/a", "--data", "mine.npy") == 0                # nothing is overwritten
    four, three = np.load("runs/a/predict-mine-1.npy"), np.load("runs/a/predict-mine-2.npy")
    shapes = {3: (4, 64, 64), 4: (4, 1, 64, 64), 5: (2, 4, 1, 64, 64)}
    assert four.dtype == np.uint8 and four.shape == shapes[len(shape)]
    assert Path("runs/a/predict-mine-1.png").read_bytes().startswith(b"\x89PNG")
    model = convlstm.ConvLSTM(hidden=4, layers=2, kernel=3)
    model.load_state_dict(torch.load("runs/a/last.pt", weights_only=True)["model"])
    last = torch.from_numpy(films.reshape(-1, 9, 1, 64, 64)[:, -3:] / np.float32(255))
    with torch.no_grad():
        expected = model(last, horizon=4)[:, -4:].clamp(0, 1).numpy()
    np.testing.assert_allclose(four.reshape(expected.shape), expected * 255, atol=0.501)
    np.testing.assert_array_equal(three.reshape(-1, 3, 64, 64), four.reshape(-1, 4, 64, 64)[:, :3])


def test_predict_refuses(capsys):
    assert run(*TINY, "--name", "a", "--iterations", 1) == 0
    np.save("small.npy", np.zeros((9, 32, 32), np.uint8))
    np.save("short.npy", np.zeros((2, 64, 64), np.uint8))
    assert "--data X" in refused(capsys, "--predict", "runs/a")
    for file in ("small.npy", "short.npy", "none.npy"):
        assert file in refused(capsys, "--predict", "runs/a", "--data", file)
    assert not list(Path("runs/a").glob("predict*"))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_run_on_cuda(capsys):
    arguments = [a if a != "cpu" else "cuda" for a in TINY]
    assert run(*arguments, "--name", "a") == 0
    assert run(*arguments, "--name", "b", "--precision", "fp32") == 0
    a, b = (json.loads(Path(f"runs/{n}/results.json").read_text())["forecast"]["mse"]["mean"] for n in "ab")
    assert abs(a - b) / b < 0.05
