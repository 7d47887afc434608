"""Files cut, flipped, swapped and edited, settings beyond reason, odd command lines: each works, or is refused in one
line with nothing written."""

import copy
import functools
import gzip
import io
import json
import os
import pickle
import random
import shutil
import signal
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FILM, rewrite, run
from conftest import command_refused as refused

import data
import train

pytestmark = [pytest.mark.usefixtures("film"),
              pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="what hangs is found by SIGALRM")]
TINY = ["convlstm", *FILM, *"--iterations 2 --eval-sequences 2 --name".split()]
RUN = Path("runs/a")


@pytest.fixture(autouse=True)
def alarm(film):
    """A small run, runs/a; and what takes a minute hangs."""
    def hangs(*_):
        raise SystemExit("it hangs")                              # which train.py does not catch

    assert run(*TINY, "a") == 0
    signal.signal(signal.SIGALRM, hangs)
    signal.alarm(60)
    yield
    signal.alarm(0)


def tree(folder="."):
    """Every file, and when it was written; the ranges of an array are kept so that it need not be looked at again."""
    return sorted((str(path), path.lstat().st_size, path.lstat().st_mtime_ns) for path in Path(folder).rglob("*")
                  if not path.is_dir() and not path.name.startswith("ranges-"))


def hold(capsys, *arguments):
    """Whether a command works; if not, it says so in one printable line, and all files are as before."""
    before = tree()
    capsys.readouterr()
    status, err = run(*arguments), capsys.readouterr().err
    if status:
        assert status == 2 and err.startswith("train.py: ") and err.endswith("\n"), err
        assert err[:-1].isprintable() and len(err) < 1000 and tree() == before, err
    return not status


# --------------------------------------------------------------------------------------------------- files of any kind

KINDS = ("cut", "flipped", "flipped", "other digits", "spliced", "packed", "foreign", "foreign", "no file")


def mutated(kind, content, numbers):
    content, at = bytearray(content), numbers.randrange(len(content))
    if kind == "cut":
        return content[:numbers.choice((0, 1, at, len(content) - 1))]
    if kind == "flipped":
        for place in numbers.choice(([at], [at % 200], [at, at // 2, at // 3])):
            content[place] ^= 1 << numbers.randrange(8)
    if kind == "other digits":                                    # where text has some: sizes, types, versions
        places = [place for place, byte in enumerate(content[:2000]) if 48 <= byte < 58]
        for place in numbers.sample(places, min(len(places), 2)):
            content[place] = 48 + numbers.randrange(10)
    if kind == "spliced":
        return content[:at] + numbers.choice((b"", b"\n", numbers.randbytes(50), content * 2)) + content[at + 50:]
    if kind == "packed":
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", numbers.choice((zipfile.ZIP_LZMA, zipfile.ZIP_STORED))) as file:
            file.writestr("train.npy", content)
        return numbers.choice((gzip.compress(content), archive.getvalue()))
    return numbers.choice(foreign()) if kind == "foreign" else content


@functools.cache
def foreign():
    """Small files of other kinds, types and shapes."""
    files = [pickle.dumps(print), b"{}", b"[]", b"null", b"[" * 100_000, b"9" * 10_000, b"\xff\xfe", b"a\n" * 99,
             b"PK\x05\x06" + bytes(18), b"\x93NUMPY\x01\x00\xff\xff{", b"\x93NUMPY\x09\x00", bytes(3000)]
    arrays = [np.array([{}] * 30, object), np.array(["a"] * 30), np.zeros(30, complex), np.zeros((0, 8, 8)),
              np.zeros(30, [("a", "f4")]), np.zeros((30, 8, 8), "M8[s]"), np.zeros((1, 1, 1, 30, 8, 8)), np.array(1),
              np.full((30, 16, 16), 1e308), np.full((30, 16, 16), np.nan), np.zeros((30, 20, 8, 8), np.uint8)]
    others = [{"model": 1}, [], torch.zeros(3), torch.nn.Linear(1, 1)]
    for content in arrays + others:
        file = io.BytesIO()
        np.save(file, content, True) if isinstance(content, np.ndarray) else torch.save(content, file)
        files.append(file.getvalue())
    return files


@pytest.mark.parametrize("name, command", [
    ("runs/a/last.pt", "--eval runs/a"), ("runs/a/last.pt", "--resume runs/a --iterations 3"),
    ("runs/a/last.pt", "convlstm --init runs/a"), ("runs/a/results.json", "--figures runs/a"),
    ("own.npy", "convlstm --data own.npy"),
    ("own.npy", "--predict runs/a --data own.npy"), ("own.npz", "--eval runs/a --data own.npz"),
    ("own.npz", "convlstm --data own.npz")])
def test_a_mutated_file_works_or_is_refused(name, command, film, capsys):
    np.save("own.npy", film)
    np.savez_compressed("own.npz", train=film[:60], test=film[60:90])
    command = command.replace("convlstm", " ".join(TINY) + " b").split()
    numbers, works, count = random.Random(f"{name} {command}"), 0, 2 * len(KINDS)
    valid = shutil.copytree(".", f"{Path.cwd()}-valid")
    for number in range(count):
        path, kind = Path(name), KINDS[number % len(KINDS)]
        path.write_bytes(mutated(kind, path.read_bytes(), numbers))
        if kind == "no file":
            path.unlink()
            numbers.choice((os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), str))(path)
        try:
            works += hold(capsys, *command)
        except BaseException as error:
            raise AssertionError(f"mutation {number} of {name}, {kind}") from error
        for path in Path().iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        shutil.copytree(valid, ".", dirs_exist_ok=True)
    assert hold(capsys, *command) and works < count               # unmutated, and mutated


def test_results_that_were_edited(capsys):
    """Only --figures reads them."""
    path, numbers, works = RUN / "results.json", random.Random(0), 0
    content = json.loads(path.read_text())
    values = [None, [], {}, "<\ud800", -1, 1e308, float("nan"), 10**400, [None], ["x"], {"frames": [1, "x"]}]
    for _ in range(40):
        edited = copy.deepcopy(content)
        part, name = {"": edited}, ""
        while isinstance(part[name], dict) and part[name] and numbers.random() < 0.9:
            part = part[name]
            name = numbers.choice([*part])
        part[name] = numbers.choice(values)
        path.write_text(json.dumps(edited if name else part[name]))
        works += hold(capsys, "--figures", RUN)
        (RUN / "comparison.svg").unlink(missing_ok=True)
    assert 0 < works < 40


# ------------------------------------------------------------------------------------------------------- beyond reason

BEYOND = dict(layers=[10**5, 0, 2.5, "x"], hidden=[10**6], kernel=[2**31 - 1], patch=[2**31], channels=[10**7],
              size=[[10**6, 10**6], [16], [0, 0]], batch=[0, 2**31 - 1], frames_in=[10**9], horizon=[-1],
              model=["os", "../x"], setup=["x"], variant=["x"], clips=[{}], data=["none.npy"])


@pytest.mark.parametrize("name", BEYOND)
def test_a_checkpoint_beyond_reason_with_a_valid_checksum(name, capsys):
    for value in BEYOND[name]:
        rewrite(RUN / "last.pt", lambda content: (content["config"]["network"] if name in content["config"]["network"]
                                 else content["config"]).update({name: value}))
        signal.alarm(10)
        for command in ("--eval", "--resume", "--figures"):
            assert not hold(capsys, command, RUN), value


def test_huge_weights_forecast_nothing(capsys):
    """Finite, so that no check of the weights finds them; their scores would be those of nothing."""
    rewrite(RUN / "last.pt", lambda content: [tensor.fill_(1e30) for tensor in content["model"].values()])
    before = tree()
    for command in (["--eval", RUN], ["--predict", RUN, "--data", "film.npy"], ["--figures", RUN],
                    ["--eval", RUN, "--data", "film.npy"]):
        assert "not finite" in refused(capsys, *command, status=1)
    assert tree() == before


@pytest.mark.parametrize("first, last", [(0, 200), (160, 181), (180, 200)])   # everything, validation, test
def test_nothing_to_learn_or_to_score(first, last, film, capsys):
    """Neither is met after the training."""
    film[first:last] = np.nan
    np.save("none.npy", film)
    assert not hold(capsys, *TINY, "b", "--data", "none.npy")


def test_a_validation_without_data_is_left_out(film, capsys):
    film[165:167] = np.nan                                        # what follows the frames that its one window reads
    np.save("film.npy", film)
    assert hold(capsys, *TINY, "b")
    assert json.loads(Path("runs/b/results.json").read_text())["validation"] == []


# ------------------------------------------------------------------------------------------------------- command lines

def test_odd_command_lines_are_understood_or_refused():
    """Options and values of every kind, in any number and order; nothing is started."""
    words = [f"--{name.replace('_', '-')}" for name in vars(train.parse(["convlstm"])[1])]
    words += [*train.MODELS, *data.DATASETS, "", "1" * 5000, "\udcff", "\x1b[31m", "a\nb",
              *"- -- --- -x --= = --nosuch -1 -1e-4 -.5 -inf nan 1e999 7 2147483648 1_0 0x10 ½ ١ %s {0}".split(),
              *"cuda:99 /dev/zero --lr=-- --data= --normalize= --quick=1 --seed=-1".split()]
    numbers, understood = random.Random(0), 0
    for _ in range(800):
        line = numbers.choices(words, k=numbers.randrange(1, 6)) + numbers.choice(([], ["convlstm"], ["--quick"]))
        try:
            understood += train.parse(line)[0] in ("model", *train.COMMANDS)
        except train.UserError as error:
            assert str(error).isprintable() and str(error), line
    assert 20 < understood < 500


def test_temporary_files_of_others_stay(capsys):
    """Of the user, and of an --eval that is writing at this moment."""
    names = (".mine.abcdefgh.tmp", ".last.pt.tmp", ".last.pt.1a.tmp", "last.pt.1.tmp", ".results.json.1.tmp")
    others = [RUN / name for name in names]
    for path in others:
        path.write_bytes(b"somebody's")
        os.utime(path, (0, 0)) if "results" not in path.name else None
    assert run("--resume", RUN, "--iterations", 3) == 0 and run("--eval", RUN) == 0
    assert all(path.read_bytes() == b"somebody's" for path in others)
