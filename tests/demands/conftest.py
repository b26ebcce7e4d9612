"""Makes `cli_runs`, the command line's helpers, importable here too, with its short measurements."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

import cli_runs
import pytest


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a small language model, a text and images, made the current folder by `place`."""
    home = tmp_path_factory.mktemp("demands")
    cli_runs.write_language_model(home / "lm")
    cli_runs.write_text(home / "text.txt")
    cli_runs.write_images(home / "images")
    return home


@pytest.fixture
def place(runs, monkeypatch):
    monkeypatch.chdir(runs)
    monkeypatch.setenv("COLUMNS", "400")
    cli_runs.hurry(monkeypatch)
    return runs
