"""`--figures`: the pictures and curves that a run leaves behind, opened and looked into."""

import json
import math
import struct
import xml.etree.ElementTree as ElementTree
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL, run
from conftest import command_refused as refused
from test_contract import CASES, small

import data
import metrics
import train

pytestmark = pytest.mark.usefixtures("empty_folder")
TINY = [*SMALL, *"--setup patch4 --iterations 1 --eval-sequences 4".split()]
ALWAYS = {"films.png", "films_animated.png", "curves.svg", "training.svg", "layers.png"}


def made(model, *arguments, name="a"):
    """A trained run: its folder."""
    assert run(model, *TINY, "--name", name, *arguments) == 0
    return Path("runs") / name


def chunks(content):
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, found = 8, []
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at:at + 8])
        body = content[at + 8:at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length:at + 12 + length])[0] == zlib.crc32(kind + body)
        found.append((kind, body))
        at += 12 + length
    assert found[0][0] == b"IHDR" and found[-1] == (b"IEND", b"")
    return found


def pixels(header, packed):
    """An image in RGB, whether the file is grey or not."""
    width, height, depth, colour, *rest = struct.unpack(">IIBBBBB", header)
    assert depth == 8 and rest == [0, 0, 0]
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, -1)
    assert (rows[:, 0] == 0).all()
    return rows[:, 1:].reshape(height, width, -1) + np.zeros(3, np.uint8)


def decoded(path):
    """The pixels of a PNG file."""
    found = chunks(Path(path).read_bytes())
    return pixels(found[0][1], dict(found)[b"IDAT"])


def places(image, picture):
    """Where in an image a smaller one stands, pixel by pixel: [(y, x), …]."""
    image, picture = (part.astype(int) @ (1, 256, 65536) for part in (image, picture))      # one number a colour
    height, width = picture.shape
    spots = np.argwhere(image[:len(image) - height + 1, :image.shape[1] - width + 1] == picture[0, 0])
    for y, x in np.ndindex(height, width):
        if not len(spots):
            break
        spots = spots[image[spots[:, 0] + y, spots[:, 1] + x] == picture[y, x]]
    return [tuple(spot) for spot in spots.tolist()]


def says(image, text):
    """Where a text stands in an image."""
    return places(image, metrics.words(text)[:, :-1])


def grey(frame):
    """A frame (H, W) in [0, 1] as it is drawn."""
    return metrics.paint(np.asarray(frame))


def curves(path):
    """{(title of a panel, label): (x, y)} of an SVG's curves, which must each be in one piece."""
    found = {}
    for panel in ElementTree.parse(path).getroot().iter("{http://www.w3.org/2000/svg}g"):
        title = panel.find("{http://www.w3.org/2000/svg}text").text
        for line in panel.iter("{http://www.w3.org/2000/svg}polyline"):
            values = [list(map(float, line.get(axis).split())) for axis in ("data-x", "data-values")]
            assert len(line.get("points").split()) == len(values[0])
            assert (title, line.get("data-label")) not in found
            found[title, line.get("data-label")] = values
    return found


# ----------------------------------------------------------------------------------------------------------- primitives

@pytest.mark.parametrize("colours", [1, 3])
def test_a_png_decodes_to_its_pixels(colours):
    image = np.random.default_rng(0).integers(0, 256, (6, 4, colours), dtype=np.uint8).repeat(3 // colours, 2)
    found = dict(chunks(metrics.png(image)))
    assert found[b"IHDR"][9] == (2 if colours == 3 else 0)         # grey where all of it is
    assert (pixels(found[b"IHDR"], found[b"IDAT"]) == image).all()
    assert metrics.png(image[:, ::-1]) != metrics.png(image)


@pytest.mark.parametrize("colours", [1, 3])
def test_an_animated_png_decodes_to_its_frames(colours):
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, colours), dtype=np.uint8).repeat(3 // colours, 3)
    found = chunks(metrics.png(images, 150))
    assert struct.unpack(">II", dict(found)[b"acTL"]) == (len(images), 0)
    packed = [body if kind == b"IDAT" else body[4:] for kind, body in found if kind in (b"IDAT", b"fdAT")]
    for image, body in zip(images, packed, strict=True):
        assert (pixels(found[0][1], body) == image).all()
    numbers = [struct.unpack(">I", body[:4])[0] for kind, body in found if kind in (b"fcTL", b"fdAT")]
    assert numbers == list(range(len(numbers)))
    assert {struct.unpack(">IIIIIHHBB", body)[5:7] for kind, body in found if kind == b"fcTL"} == {(150, 1000)}


def dots(text):
    return ["".join("#."[level // 255] for level in row[:-1, 0]) for row in metrics.words(text)]


def test_text_is_drawn_in_a_font_of_its_own():
    assert dots("T1") == ["#####...#..", "..#....##..", "..#.....#..", "..#.....#..", "..#.....#..", "..#.....#..",
                          "..#....###."]
    printable = [chr(code) for code in range(32, 127)]
    assert len({tuple(dots(character)) for character in printable}) == 95


def test_names_are_drawn_in_a_form_that_the_font_has():
    for name, drawn in (("Ré\u0301gion ﬁ", "Region fi"), ("a×b", "a\\xd7b"), ("r\udce9gion\n", "r\\udce9gion\\n"),
                        ("台风", "\\u53f0\\u98ce"), ("", "")):
        assert (metrics.words(name) == metrics.words(drawn)).all()


@pytest.mark.parametrize("unit", [None, "K", "mm/h"])
def test_a_film_sheet_shows_its_films_under_their_times(unit):
    film, forecast = torch.rand(5, 2, 16, 20), torch.rand(3, 2, 16, 20)
    film[1, 0, 2:5, 3:9] = film[3, 1, 7:, :4] = math.nan
    forecasts = {"one": forecast, "two": forecast / 2}
    image = metrics.film_sheet([metrics.Film("the caption", 2, film, forecasts)], "title", unit)
    everything = torch.cat([film.nan_to_num(0.5), *forecasts.values()])
    low, high = everything.min().item(), everything.max().item()

    def drawn(frame, scale=(low, high)):
        big = frame.numpy().repeat(4, 0).repeat(4, 1)
        if unit == "mm/h":
            picture = metrics.RAIN_COLOURS[(big[..., None] >= np.float32(metrics.RAIN_CLASSES)).sum(-1)]
            picture[np.isnan(big)] = metrics.NO_DATA
            return picture
        return metrics.paint(big, unit, scale)

    assert len(says(image, f"title, in {unit}" if unit else "title")) == len(says(image, "the caption")) == 1
    assert len(says(image, "no data")) == 1
    columns = [says(image, f"t={t + 1}") for t in range(5)]
    assert all(len(column) == 1 for column in columns) and columns[0][0][0] < columns[2][0][0]
    for t, c in np.ndindex(5, 2):
        (y, x), = places(image, drawn(film[t, c]))
        (above, middle), = columns[t]
        assert above < y and abs(middle + 11 - (x + 40)) <= 2
    assert len(says(image, "input 1/2")) == len(says(image, "truth 2/2")) == 1
    for label, made in forecasts.items():
        (start, _), = says(image, label)
        below = image[start:]
        error = (made - film[2:]).abs()
        scale = (0.0, error[~error.isnan()].max().item())
        for t, c in np.ndindex(3, 2):
            y = [places(below, drawn(frame, *s))[0][0] for frame, *s in (
                (made[t, c].where(~film[2 + t, c].isnan(), math.nan),), (error[t, c], scale))]
            assert y[0] < y[1]
        assert len(says(below, "|error| 1/2")) == len(says(below, "forecast 2/2")) == (2 if label == "one" else 1)


def test_a_film_beyond_its_truth_has_no_error_and_large_frames_are_thinned_out():
    known = torch.rand(2, 1, 900, 900)
    image = metrics.film_sheet([metrics.Film("", 2, known, {"": known[:1]})])
    assert not says(image, "|error|") and not says(image, "truth") and len(says(image, "t=3")) == 1
    assert image.shape[0] < 560 and len(says(image, "forecast")) == 1
    assert len(places(image, grey(known[1, 0, ::4, ::4]))) == 1


@pytest.mark.parametrize("shape, size", [((2, 200), (2, 200)), ((100, 5), (200, 10)), ((16, 20), (64, 80)),
                                         ((1, 1), (64, 64)), ((1, 900), (1, 225))])
def test_no_panel_is_magnified_beyond_256_pixels(shape, size):
    row, = metrics.panel_rows("x", torch.rand(1, 1, *shape))
    assert row.images.shape == (1, *size, 3)


def test_the_palette_rises_evenly_in_lightness_and_stays_readable_to_the_colour_blind():
    srgb = metrics.PALETTE / 255
    linear = np.where(metrics.PALETTE <= 10, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    # Viénot et al. 1999: what remains of the colours without the cones for green, then for red
    blind = [np.array(m) for m in ([[0.2928, 0.7072, 0], [0.2928, 0.7072, 0], [-0.0223, 0.0223, 1]],
                                   [[0.1124, 0.8876, 0], [0.1124, 0.8876, 0], [0.0040, -0.0040, 1]])]
    for seen in (linear, *(linear @ m.T for m in blind)):
        luminance = seen @ [0.2126, 0.7152, 0.0722]
        lightness = np.where(luminance > 0.008856, 116 * np.cbrt(luminance) - 16, 903.3 * luminance)      # CIE L*
        coarse = np.diff(lightness[15::16])                       # 8-bit levels hide single steps
        assert (coarse > 2).all() and coarse.max() < 3 * coarse.min()
    assert len(np.unique(metrics.PALETTE, axis=0)) == 256


def test_values_are_painted_in_colours():
    shown = metrics.paint(np.array([[0.0, 1.0, 2.0, 3.0, -9.0, 9.0, math.nan]]), "K", (0, 3))
    assert (shown[0, :6] == metrics.PALETTE[[0, 85, 170, 255, 0, 255]]).all() and (shown[0, 6] == metrics.NO_DATA).all()
    assert (metrics.paint(np.full((2, 2), 5.0), "K", (5, 5)) == metrics.PALETTE[0]).all()
    assert not (metrics.PALETTE == metrics.NO_DATA).all(1).any() and not (metrics.GREY == metrics.NO_DATA).all(1).any()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="layer 1: NaN or infinity"):
            metrics.model_sheets(torch.rand(1, 1, 8, 8), {"layers": [torch.full((1, 1, 2, 4, 4), bad)]}, {})


def test_a_heat_row_has_one_scale_and_says_which_panels_are_constant():
    values = torch.rand(3, 1, 4, 4)
    values[1] = 0.1 + 1e-9
    row, = metrics.panel_rows("x", values, "", size=(32, 96))
    assert row.label == "x" and row.images.shape == (3, 32, 96, 3)
    assert row.scale == (values.min().item(), values.max().item())
    low, constant, high = row.images
    for image, value in ((low, values[0, 0]), (high, values[2, 0])):         # magnified, not smoothed
        assert (image == metrics.paint(value.numpy(), "", row.scale).repeat(8, 0).repeat(24, 1)).all()
    assert len(says(constant, "constant")) == 1
    assert (constant[0, 0] == metrics.paint(values[1, 0, 0, :1].numpy(), "", row.scale)).all()


def test_rain_is_drawn_in_classes():
    rain = torch.tensor([0, 0.0999, 0.1, 0.4999, 0.5, 1, 2, 4.999, 5, 10, 99]).float().view(1, 1, 1, -1)
    rain = rain.repeat(1, 1, 11, 1)
    rain[..., 0, 0] = math.nan
    row, = metrics.panel_rows("rain", rain, "mm/h")
    assert row.scale is None and row.images.shape == (1, 55, 55, 3)
    assert (row.images[0, 7, 2::5] == metrics.RAIN_COLOURS[[0, 0, 1, 1, 2, 3, 4, 4, 5, 6, 6]]).all()
    assert (row.images[0, :5, :5] == metrics.NO_DATA).all()
    assert [text for _, text in metrics.RAIN_LEGEND] == [
        "< 0.1 mm/h", "0.1 - 0.5", "0.5 - 1", "1 - 2", "2 - 5", "5 - 10", ">= 10 mm/h"]
    image = metrics.sheet([row], "a title", "mm/h")
    for colour, text in [(metrics.NO_DATA, "no data"), *metrics.RAIN_LEGEND]:
        (y, x), = says(image, text)
        assert (image[y, x - 6] == colour).all()


def test_a_sheet_puts_its_rows_below_each_other():
    frames = torch.rand(2, 1, 64, 80)
    frames[1] = 0.5
    maps = torch.arange(128).view(2, 1, 8, 8)
    rows = metrics.panel_rows("film", frames) + metrics.panel_rows("map", maps, "", size=(64, 80))
    image = metrics.sheet(["a line", ["first", "second", "third"], *rows], "title")
    film, second = places(image, grey(frames[0, 0])), says(image, "second")
    assert len(film) == len(second) == len(says(image, "a line")) == len(says(image, "title")) == 1
    y, x = film[0]
    assert (image[y, x + 82] == 128).all() and len(says(image[y:y + 64, x + 82:x + 162], "constant")) == 1
    assert places(image, rows[1].images[0]) == [(y + 66, x)] and abs(second[0][1] + 17 - (x + 82 + 40)) <= 1
    (top, _), (bottom, right), = *says(image, "127"), *says(image, "0")
    assert y + 66 <= top < bottom < y + 130 and (image[y + 66, right - 6] == metrics.PALETTE[255]).all()
    assert (image[y + 129, right - 6] == metrics.PALETTE[0]).all()


def test_a_cross_marks_a_pixel_and_leaves_it_open():
    values = np.random.default_rng(0).random((2, 1, 10, 10)) / 2 + 0.2       # neither black nor white
    (plain,), (marked,) = (metrics.panel_rows("", values, size=(20, 20), cross=at) for at in (None, (0.05, 0.55)))
    images, rest = marked.images[:, 1:, 1:], plain.images[:, 1:, 1:]         # a pixel is two by two here
    assert (images[:, 0, 10] == rest[:, 0, 10]).all() and (images[:, 12:] == rest[:, 12:]).all()
    assert (images[:, 0, [8, 12]] == 255).all() and (images[:, 3, 10] == 255).all() and (images[:, 1, 9] == 0).all()


def scored(mse, pixels=None):
    mse = torch.tensor(mse, dtype=torch.float64)
    return {"mse": mse, "pixels": torch.ones_like(mse) if pixels is None else torch.tensor(pixels)}


def test_the_sequences_shown_are_different_ones_or_fewer():
    five = scored([[5.0, 7], [1, 1], [9, 9], [2, 2], [3, 3]])
    assert metrics.ranked(five) == {"best": (1, 1.0), "median": (4, 3.0), "worst": (2, 9.0)}
    assert metrics.ranked(scored([[5.0], [1]])) == {"best": (1, 1.0), "median": (0, 5.0)}
    assert metrics.ranked(scored([[5.0]])) == {"median": (0, 5.0)}
    assert [*metrics.ranked(scored([[4.0], [4], [4]]))] == ["best", "median", "worst"]
    no = math.nan
    some = scored([[no, no], [8, no], [2, 4], [no, no]], [[0, 0], [9, 0], [9, 9], [0, 0]])
    assert metrics.ranked(some) == {"best": (2, 3.0), "median": (1, 8.0)}           # means over what has data
    for mse, pixels, text in (([[1.0, 2], [no, 1]], [[9, 9], [9, 9]], "test sequence 1: NaN in the forecast"),
                              ([[no, no]], [[0, 0]], "no test sequence has data")):
        with pytest.raises(ValueError, match=text):
            metrics.ranked(scored(mse, pixels))


# -------------------------------------------------------------------------------------------------------------- figures

@pytest.mark.parametrize("model, variant, own", [
    ("convlstm", "full", set()), ("predrnn", "full", set()), ("ms_lstm", "full", set()),
    ("sa_convlstm", "full", {"attention_1.png", "attention_2.png"}), ("sa_convlstm", "memory", set()),
    ("moderrnn", "full", {"weights.png"}),
    ("cms_lstm", "full", {"attention_1.png", "attention_2.png", "ce_input.png"}),
    ("cms_lstm", "no_se", {"ce_input.png"}),
])
def test_every_model_gets_its_figures(capsys, model, variant, own):
    folder = made(model, "--variant", variant, *(["--layers", 4] if model == "ms_lstm" else []))
    capsys.readouterr()
    assert run("--figures", folder, "--device", "cpu") == 0
    written = {path.name for path in (folder / "figures").iterdir()}
    assert written == ALWAYS | own
    assert set(capsys.readouterr().out.split()) == {str(folder / "figures" / name) for name in written}
    label = f"{model} {variant} patch4, moving_digits, iteration 1"
    for name in written:
        if name.endswith(".png"):
            assert len(says(decoded(folder / "figures" / name), label)) == 1
        else:
            assert label in (folder / "figures" / name).read_text()


@pytest.mark.parametrize("name, setup, variant", CASES)
def test_every_map_of_extras_has_a_name(name, setup, variant):
    model = small(name, setup, variant)
    _, found = model(torch.rand(1, 3, 1, 16, 16), extras=[(0, 0), (5, 9)])
    for entry, layers in found.items():
        for layer in layers if isinstance(layers, list) else [layers]:
            if entry == "attention":
                assert layer.shape[:3] == (1, 2, 2) and layer.shape[3] == len(model.map_names[entry])
            elif layer.ndim == 6:
                assert layer.shape[:3] == (1, 2, len(model.map_names[entry]))
            elif entry != "loss":
                assert layer.ndim == 5


@torch.no_grad()
def looked_at(folder, number=None, extras="loss", clips=None):
    """(frames, predictions, extras) of one test sequence, or of the first four."""
    config = json.loads((folder / "config.json").read_text())
    model = train.build(config)
    model.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["model"])
    clips = clips or data.open_data("moving_digits", frames_in=3, horizon=3)
    frames = clips.test(0, 4) if number is None else clips.test(number, number + 1)
    return (frames, *model(frames[:, :3], horizon=3, extras=extras))


def test_the_films_are_those_of_the_best_the_median_and_the_worst_sequence():
    folder = made("convlstm")
    assert run("--figures", folder) == 0
    frames, predictions, _ = looked_at(folder)
    forecast = predictions[:, -3:].clamp(0, 1)
    mse = (forecast.double() - frames[:, 3:]).square().sum((2, 3, 4)).mean(1)
    order = mse.argsort().tolist()
    image = decoded(folder / "figures" / "films.png")
    shown = dict(best=order[0], median=order[2], worst=order[3])
    for name, k in shown.items():
        caption = f"{name} of 4: test sequence {k}, MSE {mse[k]:.4g}"
        (y, _), = says(image, caption)
        films = (("input", frames[k, :3], 24), ("truth", frames[k, 3:], 103), ("forecast", forecast[k], 169),
                 ("|error|", (forecast[k] - frames[k, 3:]).abs(), 235))
        for label, film, below in films:
            x, top = 2 + 8 * 6 + 4 + 2, y + below                # behind the longest label
            assert len(says(image[top:top + 64], label)) == 1
            for t in range(3):
                panel = image[top:top + 64, x + 66 * t:x + 66 * t + 64]
                difference = np.abs(panel.astype(int) - grey(film[t, 0]))
                assert difference.max() <= 1, (name, label, t)    # forecasts of a batch of one round otherwise

    found = chunks((folder / "figures" / "films_animated.png").read_bytes())
    assert struct.unpack(">II", dict(found)[b"acTL"]) == (6, 0)
    packed = [body if kind == b"IDAT" else body[4:] for kind, body in found if kind in (b"IDAT", b"fdAT")]
    for t, body in enumerate(packed):
        picture = pixels(found[0][1], body)
        assert says(picture, f"frame {t + 1} of 6, {'reading' if t < 3 else 'forecast'}") and says(picture, "|error|")
        for name, k in shown.items():
            (y, x), = places(picture, grey(frames[k, t, 0]))
            assert says(picture[y - 12:y], f"{name} of 4: test sequence {k}, MSE {mse[k]:.4g}")
            if t < 3:
                assert (picture[y:y + 64, x + 66:x + 130] == 230).all()
            else:
                panel = picture[y:y + 64, x + 66:x + 130].astype(int)
                assert np.abs(panel - grey(forecast[k, t - 3, 0])).max() <= 1


def test_the_curves_are_the_results_and_the_log():
    folder = made("convlstm", "--iterations", 23, "--eval-every", 8)
    assert run("--figures", folder) == 0
    results = json.loads((folder / "results.json").read_text())
    label = "convlstm full patch4, moving_digits, iteration 23"
    expected = {}
    for metric in ("mse", "mae", "psnr", "ssim"):
        for curve, name in ((label, "forecast"), ("last frame repeated", "repeat_last")):
            expected[metrics.NAMES[metric], curve] = [[1, 2, 3], results[name][metric]["frames"]]
    assert curves(folder / "figures" / "curves.svg") == expected
    log = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()[1:]]
    assert len(log) == 3 and [k for k, _ in results["validation"]] == [8, 16, 23]
    assert curves(folder / "figures" / "training.svg") == {
        ("l2 loss (sum over a frame)", "training"): [[float(row[0]) for row in log], [float(row[1]) for row in log]],
        ("MSE of the forecast (sum over a frame)", "validation"): [
            list(map(float, column)) for column in zip(*results["validation"])]}


def test_attention_is_drawn_where_the_model_looks():
    folder = made("sa_convlstm")
    assert run("--figures", folder, "--eval-sequences", 3) == 0
    image = decoded(folder / "figures" / "attention_1.png")
    frames, predictions, _ = looked_at(folder)
    mse = (predictions[:3, -3:].clamp(0, 1).double() - frames[:3, 3:]).square().sum((2, 3, 4)).mean(1)
    number = mse.argsort().tolist()[1]
    point = metrics.query_points(frames[number, 2])[0]
    near = frames[number, 2, 0, point[0] - 2:point[0] + 3, point[1] - 2:point[1] + 3]
    assert near.mean() == pytest.approx(torch.nn.functional.avg_pool2d(frames[number, 2], 5, 1).max().item())
    assert says(image, f"attention of + (y={point[0]}, x={point[1]})")
    _, _, found = looked_at(folder, number, [point])
    for layer in (0, 1):
        for n, name in enumerate(("Z_h", "Z_m")):
            maps = found["attention"][layer][0, :, 0, n]          # (5, 16, 16)
            (y, x), = says(image, f"layer {layer + 1}: {name}")
            x, y, ends = 2 + 12 * 6 + 4 + 2, y - 28, (maps.min().item(), maps.max().item())
            for t in range(5):
                panel = image[y:y + 64, x + 66 * t:x + 66 * t + 64]
                if name == "Z_m" and t == 0:                      # the memory is empty at first
                    assert says(panel, "constant")
                    assert (panel[0, 0] == metrics.paint(maps[0, 0, 0].numpy(), "", ends)).all()
                    continue
                assert not says(panel, "constant")
                right = np.ones((64, 64), bool)
                right[max(point[0] - 6, 0):point[0] + 7, max(point[1] - 6, 0):point[1] + 7] = False      # the mark
                expected = metrics.paint(maps[t].numpy().repeat(4, 0).repeat(4, 1), "", ends)
                assert (panel == expected)[right].mean() > 0.99
                assert (panel[point[0] + 2, point[1]] == 255).all() and not (panel[point] == 255).all()


def test_layers_are_drawn_at_their_own_resolution_and_the_steps_are_spread():
    folder = made("ms_lstm", "--layers", 4, "--frames-in", 9, "--horizon", 9, "--patch", 2)
    assert run("--figures", folder) == 0
    image = decoded(folder / "figures" / "layers.png")
    shown = [t for t in range(1, 18) if says(image, f"t={t}")]
    assert shown == [1, 3, 5, 7, 9, 11, 13, 15, 17]
    for layer, side in ((1, 32), (2, 16), (3, 16), (4, 32)):
        (y, _), = says(image, f"layer {layer}")
        panel, block = image[y - 28:y + 36, 2 + 7 * 6 + 4 + 2:][:, :64], 64 // side
        small_map = panel[::block, ::block]
        assert (small_map.repeat(block, 0).repeat(block, 1) == panel).all()
        assert not (small_map[::2] == small_map[1::2]).all()      # and not smaller still


def test_several_runs_side_by_side(capsys):
    one, two = made("convlstm"), made("moderrnn", "--horizon", 3, name="b")
    assert run("--figures", one, two) == 0
    assert {path.name for path in (one / "figures").iterdir()} - ALWAYS == {
        "comparison.svg", "comparison.png", "comparison_layers.png"}
    assert {path.name for path in (two / "figures").iterdir()} - ALWAYS == {"weights.png"}
    labels = [f"{model} full patch4, moving_digits, iteration 1" for model in ("convlstm", "moderrnn")]
    found = curves(one / "figures" / "comparison.svg")
    assert set(found) == {(metrics.NAMES[metric], label) for metric in ("mse", "mae", "psnr", "ssim")
                          for label in (*labels, "last frame repeated")}
    for folder, label in zip((one, two), labels):
        results = json.loads((folder / "results.json").read_text())
        assert found["MSE (sum over a frame)", label][1] == results["forecast"]["mse"]["frames"]
    for name in ("comparison.png", "comparison_layers.png"):
        image = decoded(one / "figures" / name)
        (y, _), (z, _), = *says(image, labels[0]), *says(image, labels[1])
        assert y < z
    three = made("convlstm", name="c")
    assert run("--figures", one, three) == 0                      # alike but for their folders' names
    assert {label for _, label in curves(one / "figures" / "comparison.svg")} == {
        f"a: {labels[0]}", f"c: {labels[0]}", "last frame repeated"}


class Units(data.Windows):
    """Two-channel flows or rain, with a corner of no data where it rains."""

    def to_units(self, frames):
        return frames * 20

    def test_units(self, start, stop, device="cpu"):
        return self.test(start, stop, device).double() * 20


@pytest.mark.parametrize("unit, channels", [("mm/h", 1), ("vehicles", 2)])
def test_units_get_rain_classes_or_a_scale(monkeypatch, unit, channels):
    frames = np.random.default_rng(0).random((90, channels, 32, 32)).astype(np.float32)
    starts = {part: np.arange(start, start + 30, 6) for part, start in (("train", 0), ("valid", 30), ("test", 60))}
    if unit == "mm/h":
        frames[..., :4, :4] = frames[33] = np.nan                 # and a frame of the validation without any
    clips = Units("flows", frames, starts, 3, 3, scale=data.PLAIN, unit=unit, masked=unit == "mm/h",
                  thresholds=(0.5, 2, 5) if unit == "mm/h" else ())
    monkeypatch.setattr(data, "open_data", lambda *_, **__: clips)
    folder = made("convlstm", "--patch", 2, "--eval-sequences", 1)
    assert run("--figures", folder, "--eval-sequences", 3) == 0
    image = decoded(folder / "figures" / "films.png")
    assert says(image, f"convlstm full patch4, flows, iteration 1, in {unit}")
    clip, predictions, _ = looked_at(folder, clips=clips)
    for k in range(3):
        film = clip[k] * 20
        if unit == "mm/h":
            colours = metrics.RAIN_COLOURS[(film[..., None] >= torch.tensor(metrics.RAIN_CLASSES)).sum(-1).numpy()]
            colours[..., :4, :4, :] = metrics.NO_DATA
        else:
            everything = torch.cat([film, predictions[k, -3:].clamp(0, 1) * 20])
            colours = metrics.paint(film.numpy(), unit, (everything.min().item(), everything.max().item()))
        for t in range(6):
            for c in range(channels):
                (_, x), = places(image, colours[t, c].repeat(2, 0).repeat(2, 1))
                assert x == 2 + (8 if channels == 1 else 12) * 6 + 4 + 2 + 66 * (t % 3)
    found = curves(folder / "figures" / "curves.svg")
    assert ({panel for panel, _ in found} > {"CSI 0.5 (mm/h)", "HSS 5 (mm/h)"}) == (unit == "mm/h")
    if unit == "mm/h":
        results = json.loads((folder / "results-3-sequences.json").read_text())
        assert all(math.isfinite(mse) for _, mse in results["validation"])
        label = "convlstm full patch4, flows, iteration 1"
        assert found["CSI 2 (mm/h)", label][1] == results["forecast"]["csi_2"]["frames"]
        assert len(says(image, "no data")) == len(says(image, "< 0.1 mm/h")) == 1
    else:
        assert len(says(image, "truth 1/2")) == len(says(image, "truth 2/2")) == 3
        assert all(says(image[y - 40:y + 40], "0") for y, _ in says(image, "truth 1/2"))


def test_a_checkpoint_and_a_run_that_was_never_evaluated(capsys):
    folder = made("convlstm")
    (folder / "results.json").unlink()
    assert run("--figures", folder) == 0
    assert json.loads((folder / "results.json").read_text())["iteration"] == 1
    assert run("--figures", folder / "best.pt") == 0
    assert (folder / "figures-best" / "films.png").exists() and (folder / "results-best.json").exists()


def test_what_cannot_be_drawn_is_said_in_one_line(capsys):
    one = made("convlstm")
    assert "no such run" in refused(capsys, "--figures", "runs/none")
    assert "named twice" in refused(capsys, "--figures", one, f"{one}/last.pt")
    assert "does not go with --figures" in refused(capsys, "--figures", one, "--batch", 3)
    assert "--device" in refused(capsys, "--figures", one, "--device", "tpu")
    assert "give a MODEL, or one of" in refused(capsys, "convlstm", "--figures", one)
    longer = made("convlstm", "--horizon", 4, name="b")
    line = refused(capsys, "--figures", one, longer)
    assert "cannot be compared" in line and str(one) in line and str(longer) in line
    fewer = made("convlstm", "--eval-sequences", 2, name="c")
    assert "add --eval-sequences 2" in refused(capsys, "--figures", one, fewer)
    assert run("--figures", one, fewer, "--eval-sequences", 2) == 0
    assert json.loads((one / "results-2-sequences.json").read_text())["sequences"] == 2
    for path in (one / "figures").iterdir():
        path.unlink()
    checkpoint = torch.load(one / "last.pt", weights_only=True)
    checkpoint["model"]["output.bias"][0] = float("nan")
    torch.save(checkpoint, one / "last.pt")
    line = refused(capsys, "--figures", one)
    assert "not finite" in line and str(one) in line
    assert not list((one / "figures").iterdir())
    (fewer / "log.csv").write_text("iteration,loss\n1\n")
    assert "log.csv cannot be read" in refused(capsys, "--figures", fewer)
    (fewer / "results.json").write_text('{"iteration": 1')
    assert "results.json cannot be read" in refused(capsys, "--figures", fewer)
    (longer / "figures").write_text("in the way")
    assert "figures" in refused(capsys, "--figures", longer)
