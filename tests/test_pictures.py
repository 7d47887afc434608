"""What metrics.py draws, opened and looked into: curves as SVG, sheets of frames and of a model's maps as PNG."""

import math
import struct
import xml.etree.ElementTree as ElementTree
import zlib

import numpy as np
import pytest
import torch

import metrics

SVG = "{http://www.w3.org/2000/svg}"
FORECAST = ("mse", "mae", "psnr", "ssim")


# ---- Curves ----------------------------------------------------------------------------------------------------------

def ticks_of(panel, turned=False):
    """(value, place in pixels) of the ticks of a panel's x axis, or y axis if turned."""
    anchor, place, offset = ("end", "y", 4) if turned else ("middle", "x", 0)
    ticks = []
    for text in panel.iter(f"{SVG}text"):
        if text.get("text-anchor") == anchor and text.text.replace(".", "").replace("e-", "").isdigit():
            ticks.append((float(text.text), float(text.get(place)) - offset))
    return ticks


def curves_in(svg, log=False):
    """{(name of a panel, colour): [(x, y), …] per unbroken piece} of an SVG text, read off its axes."""
    curves = {}
    for panel in ElementTree.fromstring(svg).iter(f"{SVG}g"):
        axes = []
        for turned in (False, True):
            ticks = ticks_of(panel, turned)
            if ticks:
                scale = np.log10 if turned and log else np.asarray
                (first, start), (last, end) = (scale(ticks[0][0]), ticks[0][1]), (scale(ticks[-1][0]), ticks[-1][1])
                slope = (last - first) / (end - start) if end != start else 0.0
                axes.append((slope, first - slope * start))
        for path in panel.iter(f"{SVG}path"):
            if path.get("class") == "curve":
                pieces = [piece.split("L") for piece in path.get("d").split("M")[1:]]
                read = []
                for piece in pieces:
                    places = [map(float, point.split(",")) for point in piece]
                    read.append([tuple(np.polyval(axis, at) for axis, at in zip(axes, point)) for point in places])
                curves[panel.find(f"{SVG}text").text, path.get("stroke")] = read
    return curves


def texts_in(svg):
    return [text.text for text in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def summary_of(frames, **others):
    return {name: {"mean": 0, "frames": [k * f for f in frames]} for k, name in enumerate(FORECAST, 1)} | others


def test_curves_are_the_scores_and_can_be_read_off_the_axes():
    runs = {"ConvLSTM": summary_of([10.0, 25.5, 31.25]), "a <run> & \"more\"": summary_of([3.0, 3.5, 47.0])}
    svg = metrics.score_curves(runs, "ConvLSTM full, moving_digits, iteration 7")
    curves = curves_in(svg)
    assert list(curves) == [(metrics.NAMES[m], colour) for m in FORECAST for colour in metrics.COLOURS[:2]]
    for (metric, label), (piece,) in zip([(m, label) for m in FORECAST for label in runs], curves.values()):
        frames = runs[label][metric]["frames"]
        assert np.allclose(piece, [*enumerate(frames, 1)], atol=0.005 * max(frames)), (metric, label)
    assert {"MSE (sum over a frame)", "PSNR (dB)", "forecast frame", "ConvLSTM full, moving_digits, iteration 7",
            *runs} <= set(texts_in(svg))
    dashes = {path.get("stroke-dasharray") for path in ElementTree.fromstring(svg).iter(f"{SVG}path")}
    assert len(dashes - {None}) == 2                              # told apart in grey, too
    assert "2" in texts_in(svg) and "1.5" not in texts_in(svg)    # frames are whole numbers


@pytest.mark.parametrize("values, ticks", [([900.0, 45.0, 3.0], [5, 10, 20, 50, 100, 200, 500, 1000]),
                                           ([40.0, 55.0], [40, 45, 50, 55]), ([1e-6, 1e3], None)])
def test_a_logarithmic_axis(values, ticks):
    points = [(100 * k, value) for k, value in enumerate(values)]
    svg = metrics.curves_svg([("loss", "iteration", {"training": points})], log=True)
    (piece,), = curves_in(svg, log=True).values()
    for (x, y), (x_read, y_read) in zip(points, piece, strict=True):
        assert x_read == pytest.approx(x, abs=1) and y_read == pytest.approx(math.log10(y), abs=0.02)
    panel = next(ElementTree.fromstring(svg).iter(f"{SVG}g"))
    drawn = [value for value, _ in ticks_of(panel, turned=True)]
    assert (drawn == ticks) if ticks else (4 <= len(drawn) <= 10)


def test_a_value_that_is_not_positive_makes_the_axis_linear():
    svg = metrics.curves_svg([("loss", "iteration", {"training": [(0, 10.0), (10, 5.0), (20, 0.0)]})], log=True)
    (piece,), = curves_in(svg).values()
    assert np.allclose(piece, [(0, 10), (10, 5), (20, 0)], atol=0.1)


def test_none_is_a_gap_and_an_empty_panel_says_so():
    svg = metrics.curves_svg([("PSNR", "frame", {"a": [*enumerate([None, 20.5, 21.5, None, 23.0], 1)]}),
                              ("SSIM", "frame", {"a": [(1, None)]}), ("MSE", "frame", {"a": [(1, 4.0)]})])
    curves = curves_in(svg)
    assert [len(piece) for piece in curves["PSNR", metrics.COLOURS[0]]] == [2, 1]
    assert "SSIM: no values" in texts_in(svg) and ("SSIM: no values", metrics.COLOURS[0]) not in curves
    assert len([*ElementTree.fromstring(svg).iter(f"{SVG}circle")]) == 4     # a single point is seen, too


def test_curves_show_what_the_unit_adds():
    summary = summary_of([1.0, 2.0], **dict.fromkeys(
        ("rmse", "mae_units", "csi_273.15", "hss_280", "psnr_float"), {"frames": [1.0, 0.5]}))
    runs = {"run": summary | {"csi_9": summary["rmse"]}, "other": summary}    # with one threshold more
    texts = texts_in(metrics.score_curves(runs, "", "K"))
    assert {"RMSE (K)", "MAE (K)", "CSI 273.15 (K)", "HSS 280 (K)"} <= set(texts)
    assert not any(text and ("*" in text or "CSI 9" in text) for text in texts)


def test_names_that_are_not_utf_8_leave_a_valid_file():
    svg = metrics.score_curves({"r\udce9gion <&> é": summary_of([1.0, 2.0])}, "r\udce9gion")
    svg.encode()
    assert {"r?gion <&> é", "r?gion"} <= set(texts_in(svg))


def test_many_curves_stay_apart_and_inside():
    curves = {f"run number {k:02d}": [(1, float(k)), (2, float(k + 1))] for k in range(12)}
    root = ElementTree.fromstring(metrics.curves_svg([("MSE", "frame", curves)]))
    styles = {(path.get("stroke"), path.get("stroke-dasharray")) for path in root.iter(f"{SVG}path")
              if path.get("class") == "curve"}
    assert len(styles) == 12
    for text in root.iter(f"{SVG}text"):
        assert 0 <= float(text.get("x")) <= float(root.get("width"))
        assert 0 <= float(text.get("y")) <= float(root.get("height"))


# ---- Pictures --------------------------------------------------------------------------------------------------------

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


def magnified(frame, scale=None, times=4):
    """A frame (H, W) as it is drawn."""
    return metrics.paint(np.asarray(frame, dtype=float).repeat(times, 0).repeat(times, 1), scale)


def test_a_png_decodes_to_its_pixels():
    image = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    content = metrics.png(image)
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    at, chunks = 8, {}
    while at < len(content):
        length, kind = struct.unpack(">I4s", content[at:at + 8])
        chunks[kind] = content[at + 8:at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length:at + 12 + length])[0] == zlib.crc32(kind + chunks[kind])
        at += 12 + length
    assert list(chunks) == [b"IHDR", b"IDAT", b"IEND"]
    assert struct.unpack(">IIBBBBB", chunks[b"IHDR"]) == (4, 6, 8, 2, 0, 0, 0)
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(6, -1)
    assert (rows[:, 0] == 0).all() and (rows[:, 1:].reshape(6, 4, 3) == image).all()


def dots(text):
    return ["".join("#."[level // 255] for level in row[:-1, 0]) for row in metrics.words(text)]


def test_text_is_drawn_in_a_font_of_its_own():
    assert dots("T1") == ["#####...#..", "..#....##..", "..#.....#..", "..#.....#..", "..#.....#..", "..#.....#..",
                          "..#....###.", "..........."]
    glyphs = {chr(code): metrics.words(chr(code))[..., 0] == 0 for code in range(32, 127)}
    assert min((a ^ b).sum() for x, a in glyphs.items() for y, b in glyphs.items() if x < y) >= 2
    for like, other in ("|l", "|I", "|1", "g9", "q9", "mn", "l1"):
        assert (glyphs[like] ^ glyphs[other]).sum() >= 4, (like, other)
    bar = np.zeros((8, 6), bool)
    bar[:, 2] = True
    assert (glyphs["|"] == bar).all()                             # taller than any letter: |error| is not lerrorl
    assert all(glyphs[letter][7].any() for letter in "gjpqy_")    # below the line, as no digit is
    assert not any(glyphs[character][7].any() for character in "0123456789abcdefhiklmnorstuvwxzT")
    assert (metrics.words("台风 é\n") == metrics.words("?? ??")).all()


@pytest.mark.parametrize("unit", [None, "K"])
def test_a_film_sheet_has_its_films_under_their_times(unit):
    film, forecast = torch.rand(5, 2, 16, 20), torch.rand(3, 2, 16, 20)
    film[1, 0, 2:5, 3:9] = film[3, 1, 7:, :4] = math.nan
    image = metrics.film_sheet([metrics.Film("the caption", 2, film, forecast)], "title", unit)
    everything = torch.cat([film.nan_to_num(0.5), forecast])
    scale = (everything.min().item(), everything.max().item()) if unit else None
    assert len(says(image, f"title, in {unit}" if unit else "title")) == len(says(image, "the caption")) == 1
    assert len(says(image, "no data")) == 1
    for t, c in np.ndindex(5, 2):
        (y, x), = places(image, magnified(film[t, c], scale))
        (above, left), = says(image, f"t={t + 1}")
        assert above < y and left == x
    error = (forecast - film[2:]).abs()
    scale_of_error = (0.0, error[~error.isnan()].max().item()) if unit else None
    for t, c in np.ndindex(3, 2):
        known = forecast[t, c].where(~film[2 + t, c].isnan(), math.nan)
        (y, x), = places(image, magnified(known, scale))
        (below, same), = places(image, magnified(error[t, c], scale_of_error))
        assert below > y and same == x
    for label in ("input", "truth", "forecast", "|error|"):
        assert len(says(image, f"{label} 1/2")) == len(says(image, f"{label} 2/2")) == 1
    for value, count in zip((*scale, scale_of_error[1]) if unit else (), (6, 6, 2)):
        assert len(says(image, f"{value:.4g}")) == count


def test_a_forecast_beyond_the_truth_has_unit_and_scale_and_no_error():
    read, forecast = torch.rand(2, 1, 16, 16) * 60 - 10, torch.rand(3, 1, 16, 16) * 60 - 10
    image = metrics.film_sheet([metrics.Film("", 2, read, forecast)], "storms", "dBZ")
    assert says(image, "storms, in dBZ") and not says(image, "|error|") and not says(image, "truth")
    both = torch.cat([read, forecast])
    scale = (both.min().item(), both.max().item())
    for t in range(5):
        (y, x), = places(image, magnified(both[t, 0], scale))
        assert says(image, f"t={t + 1}")[0][1] == x
    for value in scale:
        assert len(says(image, f"{value:.4g}")) == 2
    bar = metrics.PALETTE[np.linspace(255, 0, 64).astype(int)][:, None].repeat(8, 1)
    assert len(places(image, bar)) == 2


def test_colour_films_are_drawn_in_colour_in_one_row():
    film, forecast = torch.rand(3, 3, 16, 16), torch.rand(1, 3, 16, 16)
    film[0, 1, 2, 5] = math.nan
    image = metrics.film_sheet([metrics.Film("", 2, film, forecast)], "")

    def colours(frame):
        pixels = np.rint(255 * frame.nan_to_num(0.0).permute(1, 2, 0).numpy()).astype(np.uint8)
        pixels[frame.isnan().any(0).numpy()] = metrics.NO_DATA
        return pixels.repeat(4, 0).repeat(4, 1)

    for frame in (*film, forecast[0], (forecast[0] - film[2]).abs()):
        assert len(places(image, colours(frame))) == 1
    assert says(image, "input") and not says(image, "1/3")
    assert says(metrics.film_sheet([metrics.Film("", 2, film, forecast)], "", "K"), "input 3/3")  # no colours: values


def test_large_frames_are_thinned_out():
    known = torch.rand(2, 1, 900, 900)
    image = metrics.film_sheet([metrics.Film("", 2, known, known[:1])])
    assert image.shape[0] < 560 and len(places(image, magnified(known[1, 0, ::4, ::4], times=1))) == 1


@pytest.mark.parametrize("shape, size", [((2, 200), (2, 200)), ((100, 5), (200, 10)), ((16, 20), (64, 80)),
                                         ((1, 1), (64, 64)), ((1, 900), (1, 225))])
def test_no_panel_is_magnified_beyond_256_pixels(shape, size):
    (label, image), = metrics.panel_rows("x", torch.rand(1, 1, *shape))
    assert label == "x " and image.shape == (*size, 3)
    film = torch.rand(2, 1, *shape)
    assert metrics.film_sheet([metrics.Film("", 1, film, film[1:])], "", "K").shape[1] > size[1]


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
    painted = metrics.paint(np.array([[0.0, 1.0, 2.0, 3.0, -9.0, 9.0, math.nan]]), (0, 3))
    assert (painted[0, :6] == metrics.PALETTE[[0, 85, 170, 255, 0, 255]]).all()
    assert (painted[0, 6] == metrics.NO_DATA).all() and not (metrics.PALETTE == metrics.NO_DATA).all(1).any()
    assert (metrics.paint(np.full((2, 2), 5.0), (5, 5)) == metrics.PALETTE[0]).all()
    assert metrics.paint(np.array([0.0, 0.5, 1.0, 2.0, -1.0]))[:, 1].tolist() == [0, 128, 255, 255, 0]


def test_a_plus_marks_a_pixel_and_leaves_it_open():
    values = np.random.default_rng(0).random((2, 1, 10, 10)) / 2 + 0.2       # neither black nor white
    (_, *plain), = metrics.panel_rows("", values, size=(20, 20))
    (_, *marked), = metrics.panel_rows("", values, size=(20, 20), plus=(0.05, 0.55))       # row 1, column 11
    for before, after in zip(plain, marked, strict=True):
        assert (after[0:3, 10:13] == before[0:3, 10:13]).all() and (after[8:] == before[8:]).all()
        assert (after[1, [7, 8, 14, 15]] == 255).all() and (after[[4, 5], 11] == 255).all()
        assert (after[1, [5, 9, 13, 17]] == 0).all() and (after[4, [10, 12]] == 0).all()


def scored(mse, pixels=None):
    mse = torch.tensor(mse, dtype=torch.float64)
    return {"mse": mse, "pixels": torch.ones_like(mse) if pixels is None else torch.tensor(pixels)}


def test_the_best_the_median_and_the_worst_sequence_are_different_ones_or_fewer():
    five = scored([[5.0, 7], [1, 1], [9, 9], [2, 2], [3, 3]])
    assert metrics.ranked(five) == {"best": (1, 1.0), "median": (4, 3.0), "worst": (2, 9.0)}
    assert metrics.ranked(scored([[5.0], [1]])) == {"best": (1, 1.0), "median": (0, 5.0)}
    assert metrics.ranked(scored([[5.0]])) == {"median": (0, 5.0)}
    assert [*metrics.ranked(scored([[4.0], [4], [4]]))] == ["best", "median", "worst"]
    no = math.nan
    some = scored([[no, no], [8, no], [2, 4], [no, no]], [[0, 0], [9, 0], [9, 9], [0, 0]])
    assert metrics.ranked(some) == {"best": (2, 3.0), "median": (1, 8.0)}           # means over what has data
    with pytest.raises(ValueError, match="no test sequence has data"):
        metrics.ranked(scored([[no, no]], [[0, 0]]))


@pytest.mark.parametrize("steps, drawn", [(5, [0, 1, 2, 3, 4]), (19, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18])])
def test_model_sheets_draw_maps_step_by_step(steps, drawn):
    reads, point = torch.rand(steps, 1, 32, 32), (20, 9)
    layers = [{"H": torch.randint(-9, 10, (2, steps, 4, 16, 8)).float()} for _ in range(3)]
    attention = [{"Z_h": torch.rand(2, steps, 8, 8).bfloat16(), "Z_m": torch.rand(2, steps, 8, 8)} for _ in range(3)]
    maps = {(picture, k, label): x for picture, rows in (("layers", layers), ("attention", attention))
            for k, row in enumerate(rows) for label, x in row.items()}
    sheets = metrics.model_sheets(reads, maps, point, "about", "title")
    assert list(sheets) == ["layers", "attention"]
    for picture, maps, numbers in (("layers", layers, (0, 1, 2)), ("attention", attention, (0, 2))):
        image = sheets[picture]
        assert len(says(image, "title")) == len(says(image, "about")) == 1
        assert [t for t in range(steps) if says(image, f"t={t + 1} ")] == drawn
        for k, layer in enumerate(maps):
            for label, x in layer.items():
                values = x[0].double() if picture == "attention" else x[0].double().abs().mean(1)
                values = values[drawn].repeat_interleave(64 // x.shape[-2], 1).repeat_interleave(64 // x.shape[-1], 2)
                assert len(says(image, f"layer {k + 1}: {label}")) == (k in numbers)
                for t, frame in zip(drawn, values.numpy() if k in numbers else ()):
                    panel = metrics.paint(frame, (values.min().item(), values.max().item()))
                    (_, x_of_time), = says(image, f"t={t + 1} ")
                    corner = panel[:30]                           # the plus is further below
                    assert [x for _, x in places(image, corner)] == [x_of_time], (picture, label, t)
                    assert len(places(image, panel)) == (picture == "layers")
    (y, _), = says(sheets["attention"], "layer 1: Z_h")
    (_, x), = says(sheets["attention"], "t=1 ")
    middle = sheets["attention"][y - 28 + 41, x + 19]             # of the pixel in a panel twice as large
    assert not (middle == 255).all() and (sheets["attention"][y - 28 + 41 + 4, x + 19] == 255).all()
    assert says(sheets["attention"], "attention of the pixel at +, y=20, x=9")
