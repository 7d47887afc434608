"""train.py as a reader uses it: every command on small networks, the papers' settings, what is said of a mistake."""

import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FILM, SMALL, rewrite, run
from conftest import command_refused as refused
from test_pictures import curves_in, places, says, texts_in

import convlstm
import data
import metrics
import train

pytestmark = pytest.mark.usefixtures("film")
DIGITS = ["convlstm", *SMALL, *"--iterations 23 --eval-every 8 --eval-sequences 5 --name a".split()]
MINE = ["convlstm", *FILM, *"--iterations 2 --name".split()]


def results(folder="runs/a", name="results"):
    return json.loads(Path(folder, f"{name}.json").read_text())


def config_of(*arguments):
    """The settings that a command line comes to."""
    return train.settings(train.parse([*map(str, arguments)])[1])[0]


def forecast_of(run_folder, frames, horizon):
    """By the last weights, in code of one's own."""
    with torch.no_grad():
        return train.open_run(run_folder).model(torch.as_tensor(frames), horizon=horizon)[:, -horizon:].clamp(0, 1)


def test_a_whole_run(capsys):
    assert run(*DIGITS) == 0
    out, folder = capsys.readouterr().out, Path("runs/a")
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "config.json", "log.csv", "last.pt", "best.pt", "results.json", "forecast.png", "curves.svg",
        "training.svg", "layers.png"}
    config = json.loads((folder / "config.json").read_text())
    assert config["seed"] == 0 and config["iterations"] == 23 and config["versions"]["torch"] == torch.__version__
    log = [line.split(",")[0] for line in (folder / "log.csv").read_text().splitlines()]
    found = results()
    assert log == ["iteration", "10", "20", "23"] and [k for k, _ in found["validation"]] == [8, 16, 23]
    assert (found["data"], found["iteration"], found["sequences"]) == ("moving_digits", 23, 5)
    assert len(found["all_predictions"]["mse"]["frames"]) == 5
    # The same figures from scratch: the last weights, the first five test sequences.
    clips = data.open_data("moving_digits", frames_in=3, horizon=3).test(0, 5).double()
    forecasts = {"forecast": forecast_of(folder, clips[:, :3].float(), 3), "black": 0, "repeat_last": clips[:, 2:3]}
    for name, forecast in forecasts.items():
        mse = (forecast - clips[:, 3:]).square().sum((2, 3, 4)).mean().item()
        assert found[name]["mse"]["mean"] == pytest.approx(mse, rel=1e-6) and f"{mse:.2f}" in out
    assert str(folder / "forecast.png") in out
    assert "exists" in refused(capsys, *DIGITS) and results() == found


PICTURES = {"sa_convlstm": ["attention"], "moderrnn": ["weights"], "cms_lstm": ["attention", "ce_input"]}


@pytest.mark.parametrize("name, variant, setup", [
    pytest.param(name, variant, setup, marks=() if (variant, setup) == ("full", "patch4") else pytest.mark.slow)
    for name in train.MODELS for variant in train.model_file(name).VARIANTS for setup in ("patch4", "fullres")])
def test_every_model_trains_and_is_evaluated_again(name, variant, setup):
    assert run(name, *FILM, "--variant", variant, "--setup", setup, "--iterations", 2, "--name", "a") == 0
    found = results()
    assert (found["model"], found["variant"], found["setup"]) == (name, variant, setup)
    pictures = {path.stem for path in Path("runs/a").glob("*.png")}
    assert pictures >= {"forecast", "layers"} and (variant != "full" or pictures == {
        "forecast", "layers", *PICTURES.get(name, [])})
    written = {path.name: path.read_bytes() for path in Path("runs/a").iterdir()}
    for path in (*Path("runs/a").glob("*g"), Path("runs/a/results.json")):      # .png, .svg
        path.unlink()
    assert run("--eval", "runs/a") == 0
    assert {path.name: path.read_bytes() for path in Path("runs/a").iterdir()} == written


def test_quick(capsys):
    assert run(*"predrnn --quick --device cpu --iterations 2 --hidden 4 --eval-sequences 2".split()) == 0
    assert "validation" in capsys.readouterr().out
    config = json.loads(Path("runs/predrnn-full-moving_digits-1/config.json").read_text())
    assert config["frames_in"] == config["horizon"] == 10 and not config["as_published"]


def test_resume_trains_longer_where_the_schedule_allows(capsys):
    assert run(*MINE, "a", "--iterations", 13) == 0
    assert run("--resume", "runs/a", "--iterations", 20, "--eval-sequences", 2) == 0
    assert (results()["iteration"], results()["sequences"]) == (20, 2)
    rows = [line.split(",") for line in Path("runs/a/log.csv").read_text().splitlines()[1:]]
    assert [row[0] for row in rows] == ["10", "13", "20"] and float(rows[-1][3]) == 0       # ε stays at its end
    assert float(rows[-1][1]) > 0.5 * float(rows[-2][1])          # a mean of seven losses, not of ten
    assert "iteration 20" in refused(capsys, "--resume", "runs/a", "--iterations", 15)
    assert run("moderrnn", *MINE[1:], "b") == 0
    assert "--init" in refused(capsys, "--resume", "runs/b", "--iterations", 3)             # a cosine has an end
    assert "last checkpoint" in refused(capsys, "--resume", "runs/a/best.pt")


def test_init_takes_the_weights_and_their_scale(film, capsys):
    np.save("film.npy", 50 * film)
    assert run(*MINE, "a", "--normalize", 0, 70) == 0
    np.save("film.npy", 60 * film)
    assert run(*MINE, "b", "--init", "runs/a", "--iterations", 1, "--lr", 1e-12) == 0
    a, b = (train.open_run(f"runs/{name}") for name in "ab")
    torch.testing.assert_close(dict(a.model.state_dict()), dict(b.model.state_dict()), rtol=0, atol=1e-10)
    assert b.iteration == 1 and all(moments["step"] == 1 for moments in b.checkpoint["optimizer"].values())
    assert b.config["clips"]["scale"] == [0, 70] and not b.config["as_published"]
    for other, answer in (("--hidden 8", "network"), ("--variant peephole", "variant"), ("--normalize", "scale")):
        assert answer in refused(capsys, *MINE, "c", "--init", "runs/a", *other.split())
    assert len(list(Path("runs").iterdir())) == 2


def test_eval_on_other_files_keeps_them_apart(film, capsys):
    assert run(*MINE, "a") == 0
    assert "--horizon" in refused(capsys, "--eval", "runs/a", "--horizon", 4)   # of other files alone
    whole = Path("runs/a/results.json").read_bytes()
    for folder in "ab":
        Path(folder).mkdir()
        np.save(f"{folder}/storm.npy", film[:9] if folder == "a" else film[9:16])
        assert run("--eval", "runs/a", "--data", f"{folder}/storm.npy", "--horizon", 4) == 0
    found = [json.loads(path.read_text()) for path in Path("runs/a").glob("results-storm*-??????.json")]
    assert [len(other["forecast"]["mse"]["frames"]) for other in found] == [4, 4] and found[0] != found[1]
    assert Path("runs/a/results.json").read_bytes() == whole
    assert run("--eval", "runs/a/best.pt") == 0 and results(name="results-best")["weights"] == "best"


def test_scores_in_the_files_own_unit():
    """A storm of 35.7 that stands still, in float32: back from the network's pixels it would be below 35.7."""
    storm = np.zeros((200, 16, 16), np.float32)
    storm[:, :8], storm[:, 15, 15] = 35.7, np.nan
    np.save("film.npy", storm)
    assert run(*MINE, "a", *"--normalize 0 70 --unit dBZ --thresholds -1e-4 35.7 40".split()) == 0
    still, black = results()["repeat_last"], results()["black"]
    assert results()["unit"] == "dBZ" and still["csi_35.7"]["frames"] == [1, 1] and still["csi_40"]["mean"] is None
    assert still["rmse"]["mean"] == 0 and black["rmse"]["mean"] == pytest.approx(35.7 * (128 / 255) ** 0.5)
    assert black["mae_units"]["mean"] == pytest.approx(35.7 * 128 / 255)
    np.save("other.npy", storm[10:40])
    assert run(*"--eval runs/a --data other.npy --horizon 4 --thresholds 20".split()) == 0
    other, = (json.loads(path.read_text()) for path in Path("runs/a").glob("results-other*.json"))
    assert other["repeat_last"]["csi_20"]["frames"] == [1] * 4 and other["unit"] == "dBZ"


@pytest.mark.parametrize("layout, shape", [
    ("NHW", (9, 16, 16)), ("NHWC", (9, 16, 16, 1)), ("MTCHW", (2, 9, 1, 16, 16))])
def test_predict(layout, shape, film):
    np.save("film.npy", np.uint8(255 * film))
    assert run(*MINE, "storms") == 0
    frames = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save("mine.npy", frames)
    assert run("--predict", "storms", "--data", "mine.npy", "--layout", layout, "--horizon", 4) == 0    # of runs/
    path, = Path("runs/storms").glob("predict-mine*.npy")
    forecast, last = np.load(path), frames.reshape(-1, 9, 1, 16, 16)[:, -3:] / np.float32(255)
    assert forecast.dtype == np.uint8 and forecast.shape == tuple(4 if side == 9 else side for side in shape)
    expected = forecast_of("runs/storms", last, 4).numpy()
    np.testing.assert_allclose(forecast.reshape(expected.shape), expected * 255, atol=0.501)
    image = decoded(path.with_suffix(".png"))
    for frame in (*last[0, :, 0], *expected[0, :, 0]):            # without a unit: grey, from 0 to 1
        assert places(image, metrics.paint(frame.astype(float).repeat(4, 0).repeat(4, 1)))


def test_predict_refuses(capsys):
    assert run(*MINE, "a", "--setup", "fullres") == 0
    np.save("small.npy", np.zeros((9, 8, 8), np.float32))
    np.save("short.npy", np.zeros((2, 16, 16), np.float32))
    for name in ("short.npy", "none.npy"):
        assert name in refused(capsys, "--predict", "runs/a", "--data", name)
    assert run("--predict", "runs/a", "--data", "small.npy") == 0               # without LayerNorm any size fits
    assert run(*MINE, "b") == 0                                   # LayerNorm's fit one
    assert "small.npy" in refused(capsys, "--predict", "runs/b", "--data", "small.npy")
    assert not list(Path("runs").glob("*/predict-*o*")) and not list(Path("runs/b").glob("predict*"))


def decoded(path):
    """The pixels (H, W, 3) of a PNG file of ours."""
    content = Path(path).read_bytes()
    width, height = (int.from_bytes(content[k:k + 4], "big") for k in (16, 20))
    pixels = zlib.decompressobj().decompress(content[content.index(b"IDAT") + 4:])
    return np.frombuffer(pixels, np.uint8).reshape(height, -1)[:, 1:].reshape(height, width, 3)


def test_pictures_show_the_best_the_median_and_the_worst_forecast_in_their_unit(film):
    np.save("film.npy", 50 * film)
    assert run("sa_convlstm", *MINE[1:], "a", *"--normalize 0 50 --unit mm".split()) == 0
    clips = data.open_data("film.npy", frames_in=3, horizon=2, normalize=[0, 50])
    image, frames = decoded("runs/a/forecast.png"), clips.test(0, 3)
    forecast = torch.cat([forecast_of("runs/a", frames[k:k + 1, :3], 2) for k in range(3)])
    mse = (forecast.double() - frames[:, 3:]).square().sum((2, 3, 4)).mean(1)
    best, median, worst = mse.argsort().tolist()
    assert says(image, "sa_convlstm full patch4, iteration 2, in mm")
    for name, k in dict(best=best, median=median, worst=worst).items():
        (top, _), = says(image, f"{name} of 3: test sequence {k}, MSE {mse[k]:.4g}")
        part = image[top:top + 500]
        everything = torch.cat([clips.test_units(k, k + 1)[0], clips.to_units(forecast[k])]).float().numpy()
        for t, values in enumerate(everything):                   # on one scale
            colours = metrics.paint(values[0], (everything.min().item(), everything.max().item()))
            assert places(part, colours.repeat(4, 0).repeat(4, 1)), (name, t)
        assert says(part, f"{everything.max():.4g}") and says(part, "|error| ")
    y, x = divmod(int(frames[median, 2, 0].argmax()), 16)         # of the brightest pixel read last
    assert says(decoded("runs/a/attention.png"), f"y={y}, x={x}")


def test_curves_are_the_scores_and_the_log():
    assert run(*MINE, "a", "--iterations", 30, "--eval-every", 10, "--horizon", 3) == 0
    log = [line.split(",") for line in Path("runs/a/log.csv").read_text().splitlines()[1:]]
    drawn = {"training": [[(float(row[0]), np.log10(float(row[1]))) for row in log],
                          [(k, np.log10(mse)) for k, mse in results()["validation"]]]}
    drawn["curves"] = [[*enumerate(results()[name][metric]["frames"], 1)] for metric in ("mse", "mae", "psnr", "ssim")
                       for name in ("forecast", "repeat_last")]
    for name, expected in drawn.items():
        curves = curves_in(Path(f"runs/a/{name}.svg").read_text(), log=name == "training")
        for (piece,), points in zip([*curves.values()][:len(expected)], expected, strict=True):
            np.testing.assert_allclose(piece, points, rtol=0.01, atol=0.01)


def test_runs_side_by_side(film, capsys):
    assert run(*MINE, "a") == 0 and run("predrnn", *MINE[1:], "b") == 0
    assert run("--figures", "runs/a", "b") == 0
    image, texts = decoded("runs/a/comparison.png"), texts_in(Path("runs/a/comparison.svg").read_text())
    labels = [f"{name}: {model} full patch4, iteration 2" for name, model in (("a", "convlstm"), ("b", "predrnn"))]
    (first, _), (second, _) = (says(image, label)[0] for label in labels)
    assert first < second and {*labels, "last frame repeated"} <= {*texts}
    assert not Path("runs/b/comparison.svg").exists()
    assert run("--eval", "b", "--eval-sequences", 2) == 0
    assert "different" in refused(capsys, "--figures", "a", "b")
    Path("other").mkdir()
    np.save("other/film.npy", film[::-1])                         # of the same name and shape
    assert run(*MINE, "c", "--data", "other/film.npy") == 0
    assert "different" in refused(capsys, "--figures", "a", "c")


# (optimiser, weight decay, lr, final lr, batch, iterations, loss, part of them sampled, reversed)
ADAM, ADAMW = ("adam", 0.0, 1e-3, None), ("adamw", 0.01, 1e-3, 1e-6)
PATCH4 = dict.fromkeys(train.MODELS, (*ADAM, 8, 80_000, "l2", 0.625, True)) | {
    "cms_lstm": (*ADAMW, 8, 80_000, "l2", 0.5, True), "moderrnn": (*ADAMW, 32, 80_000, "l1+l2", 0.5, True)}
FULLRES = ("adam", 0.0, 3e-4, None, 4, 105_000, "l1+l2", 1.0, False)


@pytest.fixture
def dataset(monkeypatch):
    """Called with a dataset's name and its number of training clips: moving digits stand in for it."""
    def stand_in(name, train_count=None, **options):
        clips = data.open_data("moving_digits", **options)
        clips.name, clips.train_count = name, train_count
        monkeypatch.setattr(data, "open_data", lambda *_, **__: clips)
    return stand_in


@pytest.mark.parametrize("name", train.MODELS)
@pytest.mark.parametrize("setup", ["patch4", "fullres"])
def test_the_paper_settings(name, setup, dataset):
    expected = PATCH4[name] if setup == "patch4" else FULLRES
    dataset("moving_mnist", 10_500 if setup == "fullres" else None)
    config = config_of(name, "--device", "cpu", "--setup", setup)
    *same, sampled, reverse = expected
    keys = ("optimizer", "weight_decay", "lr", "final_lr", "batch", "iterations", "loss")
    assert [config[key] for key in keys] == same and config["reverse"] == reverse and config["as_published"]
    model = train.build(config | dict(network=config["network"] | dict(hidden=2, layers=2)))
    for k, epsilon in ((0, 1), (sampled / 2, 0.5), (0.999 * sampled, 0.001), (sampled, 0)):
        assert model.truth_probability(round(k * 80_000), 80_000, 10, 19)[-1] == pytest.approx(epsilon, abs=1e-4)


@pytest.mark.parametrize("name", train.MODELS)
def test_a_datasets_own_settings(name, dataset):
    own = config_of(name, *FILM)                                  # one's own: no paper has a schedule for them
    assert own["iterations"] == 100 * own["clips"]["train_count"] // 2 and not own["reverse"]
    flow_loss = "l1+l2" if name in ("cms_lstm", "moderrnn") else "l2"
    for setup, where, key, value in (
            ("patch4", "kth", "loss", "l1+l2"), ("patch4", "taxibj", "patch", 2),
            ("patch4", "taxibj", "loss", flow_loss), ("fullres", "taxibj", "epochs", 15),
            ("fullres", "kth", "epochs", 20), ("fullres", "germany", "epochs", 20)):
        dataset(where, 1001)
        config = config_of(name, "--device", "cpu", "--setup", setup)
        epochs = config["iterations"] * config["batch"] / 1001
        assert (config | config["network"] | dict(epochs=math.ceil(epochs)))[key] == value


@pytest.mark.parametrize("other", [
    "--iterations 79999", "--hidden 32", "--batch 4", "--lr 1e-4", "--quick", "--horizon 5", "--no-reverse"])
def test_other_settings_are_not_the_papers(other, dataset):
    dataset("moving_mnist")
    assert not config_of("convlstm", "--device", "cpu", *other.split())["as_published"]


def test_the_paper_is_beside_a_run_of_its_own_settings_only(capsys, dataset):
    dataset("moving_mnist", frames_in=3, horizon=3)
    assert run(*DIGITS, "--data", "moving_mnist", "--iterations", 1) == 0
    assert "CMS-LSTM, Table 3" not in capsys.readouterr().out
    rewrite("runs/a/last.pt", lambda content: content["config"].update(as_published=True, whole=1))
    assert run("--eval", "runs/a") == 0
    assert re.search(r"CMS-LSTM, Table 3 +70.4 +115.9", capsys.readouterr().out)


def test_learning_rates():
    assert train.learning_rate(dict(lr=1e-3, final_lr=None, schedule=100), 99) == 1e-3
    cosine = [train.learning_rate(dict(lr=1e-3, final_lr=1e-6, schedule=100), k) for k in (0, 50, 100, 130)]
    np.testing.assert_allclose(cosine, [1e-3, (1e-3 + 1e-6) / 2, 1e-6, 1e-6])


@pytest.mark.parametrize("kind, expected", [("l2", 16 / 6), ("l1+l2", (16 + 8) / 6), ("l2+0.2l1", (16 + 0.2 * 8) / 6)])
def test_losses_by_hand(kind, expected):
    truth, prediction = torch.zeros(2, 3, 1, 2, 2), torch.zeros(2, 3, 1, 2, 2)
    prediction[0, 0] = 2.0                                        # one of six frames, four pixels off by 2
    truth[1, 1, 0, 0, 0], prediction[1, 1, 0, 0, 0] = torch.nan, 9.0            # no data, nothing to be off from
    assert train.frame_loss(prediction, truth, kind).item() == pytest.approx(expected)


def test_masks_follow_the_probabilities():
    model, whole = convlstm.ConvLSTM(hidden=4, layers=1), slice(None)
    config = dict(frames_in=10, horizon=10, schedule=1000, seed=0, batch=2000)
    for iteration, epsilon in ((0, 1), (125, 0.8), (500, 0.2), (625, 0), (999, 0)):
        mask, at_the_end = train.sampling_mask(model, config, iteration, whole, "cpu")
        assert mask.shape == (19, 2000) and mask[:10].all() and at_the_end == pytest.approx(epsilon)
        assert mask[10:].float().mean().item() == pytest.approx(epsilon, abs=0.015)
    share, whole = (train.sampling_mask(model, config, 125, rows, "cpu")[0] for rows in (slice(3, 9), whole))
    assert torch.equal(share, whole[:, 3:9])


def test_clips_are_trained_on_backwards_too(monkeypatch):
    seen = []
    monkeypatch.setattr(train, "gradients", lambda model, *batch: (seen.append(batch), torch.zeros(()))[1])
    assert run(*DIGITS, "--iterations", 2) == 0
    (forwards, mask, _), (backwards, same, _) = seen[:2]
    assert len(seen) == 4 and torch.equal(forwards.flip(1), backwards) and same is mask
    assert run(*DIGITS, "--iterations", 2, "--no-reverse", "--name", "b") == 0 and len(seen) == 6


def test_the_first_line_comes_within_ten_seconds(capsys, monkeypatch):
    """Where no terminal shows a bar; then one every fifteen. Here every iteration takes four."""
    clock = [0.0]
    monkeypatch.setattr(train.time, "monotonic", lambda: clock[-1])
    monkeypatch.setattr(train, "gradients", lambda *_: clock.append(clock[-1] + 4) or torch.zeros(()))
    assert run(*MINE, "a", "--iterations", 12) == 0
    line = r"iteration (\d+) of 12: loss .* (\d+\.\d) sequences/s, (\d+\.\d) min left"
    said = re.findall(line, capsys.readouterr().out)
    assert said == [("3", "0.5", "0.6"), ("7", "0.5", "0.3"), ("11", "0.5", "0.1")]


@pytest.mark.parametrize("arguments, answer", [
    ("", "give a MODEL"), ("--eval a --resume b", "one of --eval"),
    ("ConvLSTM", "did you mean convlstm?"), ("convlstm.py", "did you mean convlstm?"),
    ("predrnn_v2", "predrnn --variant v2"), ("convlstm --variant peepole", "did you mean peephole?"),
    ("convlstm --data KTH", "did you mean kth?"), ("convlstm --data none.npy", "--data none.npy"),
    ("convlstm --epochs 3", "--iterations"), ("convlstm --batch-size=4", "--batch"), ("convlstm --quik", "--quick?"),
    ("convlstm --gpu 1", "--device?"), ("convlstm --dataset kth", "--data?"), ("convlstm --setup x", "patch4"),
    ("convlstm --quick --batch 2147483647", "1024"), ("convlstm --quick --layers 100000", "1024"),
    ("convlstm --quick --kernel 2147483647", "1024"), ("convlstm --lr nan", "--lr"), ("convlstm --lr -1e-4", "--lr"),
    ("convlstm --seed -1", "--seed"), ("convlstm --lr=--", "--lr needs"), ("convlstm --unit=", "--unit needs"),
    ("convlstm --thresholds nan", "--thresholds"), ("convlstm --data typhoon --box inf 1 2 3", "--box"),
    ("convlstm --learning-rate 1", "--lr?"), ("convlstm --normalize -1e-4", "LOW and HIGH"),
    ("convlstm --quick --kernel 4", "odd"), ("convlstm --quick --patch 7", "64×64"),
    ("convlstm --device tpu --data film.npy", "cuda"), ("convlstm --precision fp16", "bf16"),
    ("convlstm --quick --device cpu --name ../x", "../x"), ("convlstm --quick --device cpu --out /proc/x", "/proc/x"),
    ("convlstm --init none", "folder of a run"),
    ("--eval none --lr 1", "--lr does not go with --eval, which takes --data"),
    ("--resume none --batch 3", "--batch does not go"), ("--figures none --quick", "--quick does not go"),
    ("convlstm --eval a", "no MODEL: remove convlstm"), ("--predict a film.npy", "--data FILE"),
    ("--predict a", "--data X"), ("convlstm", "--device cpu"), ("convlstm --device cuda:1", "--quick")])
def test_what_is_mistaken_is_said_in_one_line(arguments, answer, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert answer in refused(capsys, *arguments.split())
    assert [path.name for path in Path().iterdir()] == ["film.npy"]
