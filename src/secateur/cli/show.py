"""Terminal output: tables of plans, methods, results and measurements."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

LAYERS_SHOWN = 40


def as_json(data: Any) -> None:
    """One JSON document on stdout."""
    sys.stdout.write(json.dumps(data, indent=1, default=str) + "\n")


def table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]], note: str = "") -> None:
    """A table; numbers are right-aligned."""
    rows = [[str(cell) for cell in row] for row in rows]
    drawn = Table(title=Text(title), title_justify="left", caption=Text(note) if note else None, caption_justify="left")
    for index, column in enumerate(columns):
        numeric = bool(rows) and all(row[index][:1].isdigit() or row[index][:1] in "-+.~" for row in rows)
        drawn.add_column(column, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        drawn.add_row(*map(Text, row))  # as text: brackets in names are no markup
    console().print(drawn)


def console() -> Console:
    """Standard output; wide where it is no terminal, so that piped tables keep their lines."""
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=150)
    return out


def say(text: str) -> None:
    """One line."""
    console().print(text, markup=False)


def warn(sentences: Sequence[str], most: int = 8) -> None:
    """Warnings on stderr, the first few."""
    err = Console(stderr=True, highlight=False)
    for sentence in sentences[:most]:
        err.print(f"warning: {sentence}", style="yellow", markup=False)
    if len(sentences) > most:
        err.print(f"warning: and {len(sentences) - most} more of the kind", style="yellow")


def layers(rows: Sequence[dict[str, Any]], title: str) -> None:
    """The sites of a plan."""
    shown = [[r["site"], r["kind"], f"{r['units']:,}", f"{r['kept']:,}", f"{r['sparsity']:.2%}"] for r in rows]
    more = f"and {len(rows) - LAYERS_SHOWN} more; --json shows all" if len(rows) > LAYERS_SHOWN else ""
    table(title, ["site", "unit", "units", "kept", "removed"], shown[:LAYERS_SHOWN], more)


def figure(value: float | None, digits: int = 4) -> str:
    """A number for a table; a dash where there is none."""
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"
