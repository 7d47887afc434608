"""KTH from small films made by the real ffmpeg, and 00sequences.txt."""

import os
import shutil
import subprocess

import numpy as np
import pytest
from conftest import data_refused
import torch

import data

pytestmark = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="KTH's films are read through ffmpeg")

SEQUENCES = """The video files of the KTH action database; frame ranges are given below.

person01_boxing_d1\t\tframes\t1-25, 26-60
person02_walking_d1\t\tframes\t3-40, 41-60
person02_running_d2\t\tframes\t1-30
person13_handclapping_d3\t*missing*
person16_jogging_d4\t\tframes\t1-30
person16_boxing_d4\t\tframes\t1-20
person17_walking_d2\t\tframes\t1-45, 46-60
person25_running_d1\t\tframes\t1-33
person25_boxing_d3\t\tframes\t1-60
"""


def write_film(path, count, rate=25):
    """A film of 160×120 whose frame k is a grey of 4·k."""
    path.parent.mkdir(exist_ok=True)
    frames = np.broadcast_to((4 * np.arange(count, dtype=np.uint8))[:, None, None], (count, 120, 160))
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-f", "rawvideo", "-pix_fmt", "gray", "-s", "160x120", "-r", str(rate),
                    "-i", "-", "-c:v", "mpeg4", "-q:v", "1", str(path)], input=frames.tobytes(), check=True)
    return path


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films") / "kth"
    folder.mkdir()
    (folder / "00sequences.txt").write_text(SEQUENCES)
    for line in SEQUENCES.splitlines():
        if "frames\t" in line:
            name = line.split()[0]
            count = max(int(number.split("-")[1]) for number in line.split("frames")[1].split(","))
            write_film(folder / name.split("_")[1] / f"{name}_uncomp.avi", count)
    return folder


@pytest.fixture
def folder(films, tmp_path):
    return shutil.copytree(films, tmp_path / "kth")


def numbers(frames):
    """The numbers of the frames in their films, from the greys of `write_film`."""
    grey = frames.mean((2, 3, 4)) * 255
    assert (frames * 255 - grey[:, :, None, None, None]).abs().max() < 2
    return (grey / 4).round().long().tolist()


def firsts(clips, part):
    count = getattr(clips, f"{part}_count")
    rows = numbers(clips.train(0, 0, count) if part == "train" else getattr(clips, part)(0, count))
    assert all(row == list(range(row[0], row[0] + len(row))) for row in rows)
    return sorted(row[0] for row in rows), {len(row) for row in rows}


def test_people_ranges_and_strides(folder):
    clips = data.open_data("kth", folder.parent)
    assert (clips.channels, clips.size) == (1, (128, 128))
    assert (clips.frames_in, clips.horizon, clips.test_horizon) == (10, 10, 20)
    # boxing 1-25: 0; 26-60: 25, 35; walking 3-40: 2, 12; 41-60: 40; running 1-30, every 3: 0, 3, 6, 9
    assert firsts(clips, "train") == (sorted([0, 25, 35, 2, 12, 40, 0, 3, 6, 9]), {20})
    assert firsts(clips, "valid") == ([0, 0, 10], {20})                    # person 16: boxing, jogging
    # 30 frames: walking 1-45: 0, 10; running 1-33: 0, 3; boxing: 0, 10, 20, 30
    assert firsts(clips, "test") == (sorted([0, 10, 0, 3, 0, 10, 20, 30]), {30})
    assert "8 of the dataset's 599 films" in clips.info()["notes"][0]


def test_fullres_takes_three_actions_and_ten_frames(folder):
    clips = data.open_data("kth", folder.parent, "fullres")
    assert clips.test_horizon == 10 and firsts(clips, "train") == (sorted([2, 12, 40, 0, 3, 6, 9]), {20})
    assert firsts(clips, "valid") == ([0, 10], {20})
    assert firsts(clips, "test") == (sorted([0, 10, 20, 0, 3, 6, 9, 12]), {20}) and "boxing" not in clips.test_set
    assert data.open_data("kth", folder.parent, horizon=5).test(0, 1).shape == (1, 15, 1, 128, 128)


def test_films_that_cannot_be_read_are_skipped_named_and_counted(folder):
    whole = (folder / "boxing" / "person01_boxing_d1_uncomp.avi").read_bytes()
    for name, content in (("person03_boxing_d1_uncomp.avi", b""), ("person04_boxing_d1_uncomp.avi", b"RIFF...."),
                          ("person05_boxing_d1_uncomp.avi", whole[:2000]), ("unnamed.avi", whole),
                          ("._person01_boxing_d1_uncomp.avi", b"of a Mac"),
                          ("person06_boxing_d1_uncomp.avi", whole)):
        (folder / "boxing" / name).write_bytes(content)
    write_film(folder / "walking" / "person02_walking_d1_uncomp.avi", 45)
    (folder / "boxing" / "person08_boxing_d1_uncomp.avi").write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
    os.mkfifo(folder / "boxing" / "person07_boxing_d1_uncomp.avi")
    note, = data.open_data("kth", folder.parent).info()["notes"]
    assert note.endswith("without all frames of 00sequences.txt: person03_boxing_d1_uncomp.avi, person04_boxing_d1_"
                         "uncomp.avi, person05_boxing_d1_uncomp.avi, person08_boxing_d1_uncomp.avi, "
                         "person06_boxing_d1 (60 frames), person02_walking_d1 (45 frames)")


def refused(folder, *texts):
    return data_refused(lambda: data.open_data("kth", folder.parent), folder, *texts)


def test_what_is_missing_is_named(folder, monkeypatch):
    (folder / "00sequences.txt").write_text("nothing")
    with pytest.raises(data.DataError, match="kth: too few frames, not one window of 30 for train"):
        data.open_data("kth", folder.parent)
    (folder / "00sequences.txt").unlink()
    with pytest.raises(data.DataError, match="00sequences.txt cannot be read: it does not exist; get it from"):
        data.open_data("kth", folder.parent)
    for old in folder.glob("frames-*"):
        old.unlink()
    monkeypatch.setenv("PATH", "")
    refused(folder, "ffmpeg, which is not installed")


@pytest.mark.parametrize("line", ["0-95", "1 95", f"{'9' * 5000}-{'9' * 5000}"])
def test_ranges_that_are_none_are_refused(folder, line):
    path = folder / "00sequences.txt"
    path.write_text(path.read_text().replace("1-25, 26-60", line))
    with pytest.raises(data.DataError, match="00sequences.txt cannot be read: .*; get it from www.csc.kth.se"):
        data.open_data("kth", folder.parent)


@pytest.mark.parametrize("rate", [10, 60])
def test_every_frame_of_a_film_comes_once_at_any_rate(folder, rate):
    """From ffmpeg 4.2 to 9: whichever is installed."""
    write_film(folder / "boxing" / "person01_boxing_d1_uncomp.avi", 24, rate)
    *_, index = data._kth_films([folder / "boxing" / "person01_boxing_d1_uncomp.avi"])
    assert index == {"films": [["person01_boxing_d1", 0, 24]], "skipped": []}
    frames, _ = data._kth_films([folder / "boxing" / "person01_boxing_d1_uncomp.avi"])
    assert numbers(torch.tensor(frames)[None] / 255) == [[*range(24)]]


@pytest.mark.parametrize("version, option", [("4.2", "-vsync"), ("9.0", "-fps_mode")])
def test_an_ffmpeg_that_knows_one_of_the_two_options_is_asked_with_that_one(folder, monkeypatch, version, option):
    """A program that ends with an error at the other option, as ffmpeg 4.2 and 9 do, and else is the real ffmpeg."""
    other = {"-vsync": "-fps_mode", "-fps_mode": "-vsync"}[option]
    program = folder / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\ncase " $* " in *" {other} "*) exit 1;; esac\n'
                       f'[ "$*" = "-fps_mode passthrough -version" ] && exit 0\n'
                       f"exec {shutil.which('ffmpeg')} $(echo \"$*\" | sed s/{option}/{known_option()}/)\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent), prepend=os.pathsep)
    *_, index = data._kth_films([folder / "boxing" / "person01_boxing_d1_uncomp.avi"])
    assert index == {"films": [["person01_boxing_d1", 0, 60]], "skipped": []}


def known_option():
    done = subprocess.run(["ffmpeg", "-fps_mode", "passthrough", "-version"], capture_output=True)
    return "-vsync" if done.returncode else "-fps_mode"
