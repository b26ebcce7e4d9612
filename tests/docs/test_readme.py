"""The Python of the README and of the pages for users runs as it stands, and their commands exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from secateur.cli.app import app

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/sparse-training.md")
README = "\n".join((ROOT / page).read_text(encoding="utf-8") for page in PAGES)
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL) for line in block.splitlines()]


def test_there_are_blocks_to_test():
    assert len(BLOCKS) >= 7
    assert sum(line.startswith("secateur ") for line in COMMANDS) >= 10


@pytest.mark.parametrize("code", BLOCKS, ids=range(len(BLOCKS)))
def test_python_block_runs(code, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {"__name__": "readme"})
    assert "print" not in code or capsys.readouterr().out.strip()


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("secateur ")])
def test_command_parses(line):
    words = shlex.split(line, comments=True)[1:]
    command = get_command(app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    context = command.make_context("secateur", words, resilient_parsing=False)
    assert context.params


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", "\n".join(COMMANDS), flags=re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE), target


def test_the_product_names_no_cuda_call_and_no_pickle():
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for word in (".cuda()", "torch.save(", "weights_only=False", "trust_remote_code=True", "pickle.load"):
            assert word not in text, f"{path}: {word}"
