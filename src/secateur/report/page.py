"""The report: one HTML file that needs nothing else, made from one or several records."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from secateur.core.errors import OutputError
from secateur.core.files import MARK, sweep
from secateur.report import bars, figures
from secateur.report.advice import advise, came_back
from secateur.report.headline import cards, comparison
from secateur.report.markup import Html
from secateur.report.record import Layer, Pair, Record, ReportError
from secateur.report.scatter import scatter

if TYPE_CHECKING:
    from jinja2 import Environment

HERE = Path(__file__).parent


def render(records: list[Record]) -> str:
    """The page as text: headline and details of each record; several are compared first.

    Raises:
        ReportError: there is no record.
    """
    if not records:
        raise ReportError("a report needs at least one result; name a folder made by `secateur prune`")
    template = environment().get_template("report.html")
    several = len(records) > 1
    return template.render(
        style=Html((HERE / "report.css").read_text(encoding="utf-8")),
        records=records,
        comparison=comparison(records) if several else [],
        overview=scatter(records) if several else "",
    )


def write(records: list[Record], path: str | Path) -> Path:
    """Write the page; the file appears whole or not at all, and replaces an older one.

    Raises:
        ReportError: there is no record.
        OutputError: the disk is full or the place not writable.
    """
    return put(render(records), path)


def put(text: str, path: str | Path) -> Path:
    """Write a page's text; the file appears whole or not at all, and replaces an older one.

    Raises:
        OutputError: the disk is full or the place not writable.
    """
    path = Path(os.path.abspath(path))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent)
        # a folder, so that `sweep` finds and removes it when this process is killed
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}{MARK}{os.getpid()}-", dir=path.parent))
        try:
            (temporary / path.name).write_text(text, encoding="utf-8")
            os.replace(temporary / path.name, path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        what = "disk full" if full else f"{error.strerror}"
        raise OutputError(f"the report '{path}' could not be written: {what}; choose another place") from error
    return path


def environment() -> Environment:
    """Templates of this folder, with what they call."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    found = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    found.globals |= {
        "cards": cards,
        "bars": bars,
        "figures": figures,
        "size_rows": size_rows,
        "layer_summary": layer_summary,
        "fact_names": fact_names,
        "next_steps": next_steps,
        "came_back": came_back,
    }
    return found


def next_steps(record: Record) -> list[str]:
    """The caller's advice, then the rules' own, each sentence once."""
    return list(dict.fromkeys([*record.advice, *advise(record)]))


def size_rows(record: Record) -> list[tuple[str, str, Pair]]:
    """Name, unit and counts of every size that was measured, peak memory included."""
    sizes = record.sizes
    memory = record.latency.peak_memory if record.latency else None
    rows = [
        ("parameters", "", sizes.parameters),
        ("non-zero parameters", "", sizes.nonzeros),
        (f"FLOPs{', ' + sizes.flops_note if sizes.flops_note else ''}", "", sizes.flops),
        ("weights in memory", "bytes", sizes.weight_bytes),
        ("file on disk", "bytes", sizes.file_bytes),
        ("peak memory", "bytes", memory),
    ]
    return [(name, unit, pair) for name, unit, pair in rows if pair]


def layer_summary(layers: Sequence[Layer]) -> str:
    """One sentence on how the removal is spread over the layers."""
    if len(layers) == 1:
        return f"One site: {layers[0].site}."
    ordered = sorted(layers, key=lambda layer: layer.sparsity)
    low, high = ordered[0], ordered[-1]
    middle = median(layer.sparsity for layer in layers)
    if high.sparsity - low.sparsity < 5e-4:
        return f"{len(layers)} layers, {figures.percent(middle)} removed from each."
    return (
        f"{len(layers)} layers; removed: least {figures.percent(low.sparsity)} ({low.site}), "
        f"median {figures.percent(middle)}, most {figures.percent(high.sparsity)} ({high.site})."
    )


def fact_names(layers: Sequence[Layer]) -> list[str]:
    """The method's extra columns, in the order in which they first appear."""
    return list(dict.fromkeys(name for layer in layers for name in layer.facts))
