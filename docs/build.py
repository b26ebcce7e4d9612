"""Write docs/methods.md from the catalogue: the table, and each method's formula, settings and tags.

python docs/build.py          write it
python docs/build.py --check  exit 1 if it is out of date
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import secateur as sc
from secateur.core.tags import axes
from secateur.recover import RECOVERIES

PAGE = Path(__file__).parent / "methods.md"


def cell(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text.replace("|", "\\|") or "-"


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    head = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    return [*head, *("| " + " | ".join(map(cell, row)) + " |" for row in rows), ""]


def method(entry: dict[str, Any]) -> list[str]:
    lines = [f"## {entry['name']}", "", f"*{entry['title']}*. {entry['citation']} (paper {entry['paper']}).", ""]
    lines += [f"`{entry['formula']}`", ""]
    if entry["settings"]:
        rows = [[f"`{s['name']}`", s["type"], s["default"], s["help"]] for s in entry["settings"]]
        lines += table(["setting", "type", "default", "meaning"], rows)
    tags = [f"{axis}: {cell(entry['tags'][axis])}" for axis in axes() if entry["tags"][axis] not in ([], False)]
    return [*lines, "Tags: " + "; ".join(tags) + ".", ""]


def page() -> str:
    entries = [found.to_json() for found in sc.methods().values()]
    columns = ("paper", "units", "kind", "needs_data", "patterns", "formula")
    rows = [[f"[{e['name']}](#{e['name']})", *(e[column] for column in columns)] for e in entries]
    lines = ["# Methods", "", "Written by `make docs` from the methods' own metadata; do not edit.", ""]
    lines += table(["name", "paper", "unit", "kind", "needs data", "N:M", "rule"], rows)
    for entry in entries:
        lines += method(entry)
    lines += ["# Recoveries", ""]
    for recovery in RECOVERIES.values():
        lines += [f"## {recovery.name}", "", recovery.title + ".", ""]
        lines += table(
            ["setting", "default", "meaning"],
            [[f"`{n}`", info.default, info.description] for n, info in recovery.settings.model_fields.items()],
        )
    return "\n".join(lines)


def main() -> None:
    text = page()
    if "--check" in sys.argv:
        current = PAGE.exists() and PAGE.read_text(encoding="utf-8") == text
        sys.exit(0 if current else f"{PAGE} is out of date: make docs")
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
