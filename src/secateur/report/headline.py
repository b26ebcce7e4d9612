"""The few numbers a reader wants first, for one result and for several side by side."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.report.figures import (
    BYTES,
    COUNTS,
    OPERATIONS,
    Change,
    evenness_change,
    latency_change,
    measured,
    milliseconds,
    quality_change,
    short,
    size_change,
)
from secateur.report.record import Evenness, Pair, Record


@dataclass(frozen=True)
class Card:
    """One headline number before and after."""

    name: str
    before: str
    after: str
    change: Change
    exact: str = ""


def cards(record: Record) -> list[Card]:
    """Quality, parameters, non-zeros, FLOPs, first latency, file size, evenness; unmeasured ones are left out."""
    found = [_quality(record), *_sizes(record), _latency(record)]
    if record.sizes.file_bytes:
        found.append(_size("File on disk", record.sizes.file_bytes, BYTES))
    if record.evenness:
        found.append(_evenness(record.evenness))
    return [card for card in found if card]


def _quality(record: Record) -> Card:
    quality = record.quality
    return Card(
        name=quality.metric.capitalize(),
        before=measured(quality, quality.before),
        after=measured(quality, quality.after),
        change=quality_change(quality, quality.after),
        exact="higher is better" if quality.higher_is_better else "lower is better",
    )


def _sizes(record: Record) -> list[Card]:
    sizes = record.sizes
    found = [_size("Parameters", sizes.parameters, COUNTS), _size("Non-zero parameters", sizes.nonzeros, COUNTS)]
    return [*found, _size("FLOPs", sizes.flops, OPERATIONS)] if sizes.flops else found


def _size(name: str, pair: Pair, units: tuple[str, ...]) -> Card:
    exact = f"{pair.before:,} to {pair.after:,}"
    return Card(name, short(pair.before, units), short(pair.after, units), size_change(pair), exact)


def _latency(record: Record) -> Card | None:
    if record.latency is None:
        return None
    row = record.latency.rows[0]
    return Card(
        name=f"Latency, {row.label}",
        before=milliseconds(row.before.median),
        after=milliseconds(row.after.median),
        change=latency_change(row),
        exact="median",
    )


def _evenness(found: Evenness) -> Card:
    return Card(
        name="PQ index of kept weights",
        before=f"{found.before:.3f}",
        after=f"{found.after:.3f}",
        change=evenness_change(found),
        exact="p = 0.5, q = 1; 0 = all of equal size",
    )


def comparison(records: list[Record]) -> list[dict[str, Card]]:
    """One row per record for the table of several results; columns that a record lacks are absent."""
    rows = []
    for record in records:
        row = {"quality": _quality(record), "nonzeros": _size("Non-zero", record.sizes.nonzeros, COUNTS)}
        optional = {
            "flops": _size("FLOPs", record.sizes.flops, OPERATIONS) if record.sizes.flops else None,
            "latency": _latency(record),
            "file": _size("File", record.sizes.file_bytes, BYTES) if record.sizes.file_bytes else None,
        }
        rows.append(row | {name: card for name, card in optional.items() if card})
    return rows
