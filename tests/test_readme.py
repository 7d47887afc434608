"""README: its snippets and commands run as they stand, its figures and links hold, and it stays short."""

import importlib
import os
import pathlib
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, count_macs, count_parameters, run

import train

README = (ROOT / "README.md").read_text()
PAGES = {name: (ROOT / name).read_text() for name in ("README.md", ".github/errata.md", ".github/measurements.md")}
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, re.M | re.S)
COMMANDS = [line.strip() for line in README.splitlines() if line.startswith("    ") and ".py" in line]
COMMANDS = [line for line in COMMANDS if line not in "\n".join(SNIPPETS)]
OWN_DATA = [line for line in COMMANDS if "radar.npy" in line or "runs/storms" in line]


def arguments(command):
    """What a command line gives train.py, without its comment."""
    words = shlex.split(command, comments=True)
    return words[words.index("train.py") + 1:]


def test_says_when_a_step_is_compiled():
    assert f"at least {train.COMPILE_FROM:,} iterations" in README


def test_is_short():
    assert len(README.splitlines()) <= 130 and len(README.split()) <= 1200


def test_the_setup_commands_are_whole_lines():
    """.ci/run takes them from here and runs them on a bare machine."""
    setup = "    python3 -m venv .venv && .venv/bin/pip install -r requirements.txt && .venv/bin/python "
    for ending in ("train.py convlstm --quick", "-m pytest -q"):
        assert README.splitlines().count(setup + ending) == 1


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda snippet: snippet.splitlines()[1])
def test_snippet_runs_and_prints(snippet, tmp_path):
    environment = os.environ | dict(PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    result = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    losses = [float(line.split()[-1]) for line in result.stdout.splitlines()]
    assert len(losses) > 1 and losses[-1] < losses[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_accepted(command):
    train.parse(arguments(command))
    with pytest.raises((SystemExit, train.UserError)):
        train.parse([*arguments(command), "--no-such-option"])


def test_own_data(empty_folder):
    """The commands of "Your own data" one after the other: the first as a small run, the others as they stand."""
    storm = 70 * np.random.default_rng(0).random((60, 16, 16), dtype=np.float32)
    storm[:, 0, 0] = np.nan
    for name in ("radar", "other", "recent"):
        np.save(f"{name}.npy", storm)
    small = "--device cpu --hidden 4 --layers 2 --kernel 3 --batch 2 --iterations 2".split()
    first, *others = map(arguments, OWN_DATA)
    assert run(*first, *small) == 0 and [run(*other) for other in others] == [0, 0]
    storms = train.open_run("runs/storms")
    assert storms.model(torch.rand(1, 10, 1, 16, 16), horizon=10).shape == (1, 19, 1, 16, 16)
    assert storms.config["clips"]["unit"] == "dBZ"
    forecast = np.load(*pathlib.Path("runs/storms").glob("predict-recent*.npy"))
    assert forecast.dtype == np.float32 and forecast.shape == (12, 16, 16) and 0 <= forecast.min() < forecast.max() <= 70


ROWS = re.findall(r"^\| \[`(\w+)\.py`\].*\| ([\d,]+) \| ([\d.]+)G \|$", README, re.M)


def test_table_of_models():
    assert [name for name, *_ in ROWS] == list(train.MODELS)
    for name, parameters, macs in ROWS:
        model_class = importlib.import_module(name).MODEL
        with torch.device("meta"):
            model = model_class()
        assert f"{count_parameters(model):,}" == parameters, name
        assert f"{count_macs(model_class, 20) / 1e9:.1f}" == macs, name


@pytest.mark.parametrize("page", PAGES)
def test_links(page):
    """Files exist, and headings that a link names."""
    for link in re.findall(r"\]\((?!http)([^)]+)\)", PAGES[page]):
        path, _, heading = link.partition("#")
        file = (ROOT / page).parent / path
        assert file.exists(), link
        headings = [re.sub(r"[^\w -]", "", line.lstrip("# ").lower()).replace(" ", "-")
                    for line in file.read_text().splitlines() if line.startswith("#")] if heading else []
        assert heading in headings or not heading, link
