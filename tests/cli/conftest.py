"""Makes `cli_runs` importable whichever way pytest collects this folder; what the command line's tests share."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import cli_runs
import pytest


@pytest.fixture(scope="session")
def material(tmp_path_factory):
    """A language model's folder, a text and a folder of images; only to be read."""
    home = tmp_path_factory.mktemp("material")
    cli_runs.write_language_model(home / "lm")
    cli_runs.write_text(home / "text.txt")
    cli_runs.write_images(home / "images")
    return home


@pytest.fixture
def work(tmp_path, monkeypatch):
    """An empty current folder, measurements that hurry, and a terminal wide enough for one line."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", "400")
    cli_runs.hurry(monkeypatch)
    return folder
