"""Bars: quality, latency, kept and removed per layer. Tracks are SVG that stretches, text is HTML."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

from secateur.report.figures import (
    DASH,
    interval,
    latency_change,
    measured,
    milliseconds,
    percent,
    plural,
    quality_change,
    short,
)
from secateur.report.markup import Html, element, join
from secateur.report.record import Latency, LatencyRow, Layer, Measure, Quality, Timing

FEW_LAYERS = 16  # up to here every layer has a row of its own; above, a column in one picture
CUT = 4.0  # a value this many times the others' largest is cut off, so that the others stay readable

Range = tuple[float, float]


def track(value: float, top: float, style: str, label: str, spread: Range | None = None) -> Html:
    """One horizontal bar from 0 to `value` on a scale that ends at `top`; `spread` draws a whisker.

    A value beyond the scale fills the track and ends in a break.
    """
    width = _share(value, top)
    parts = [
        element("rect", {"class": "ground", "width": 100, "height": 10}),
        element("rect", {"class": style, "width": width, "height": 10}),
    ]
    if value > top:
        parts.append(element("path", {"class": "break", "d": "M94 0h2l-2 5 2 5h-2l-2-5z"}))
    elif spread:
        low, high = (_share(end, top) for end in spread)
        parts.append(element("path", {"class": "whisker", "d": f"M{low:.2f} 2.5v5m0-2.5H{high:.2f}m0-2.5v5"}))
    title = element("title", {}, label)
    attributes: dict[str, str | float] = {
        "class": "track",
        "viewBox": "0 0 100 10",
        "preserveAspectRatio": "none",
        "role": "img",
        "aria-label": label,
    }
    return element("svg", attributes, title, *parts)


def _share(value: float, top: float) -> float:
    return min(max(100 * value / top, 0.0), 100.0) if isfinite(value) and top > 0 else (100.0 if value > 0 else 0.0)


def row(name: str, bar: Html, text: str, notes: Sequence[str] = ()) -> Html:
    """Name, bar, number, and remarks in small type."""
    number = element("span", {"class": "number"}, element("b", {}, text), *(element("small", {}, n) for n in notes))
    return element("div", {"class": "bar"}, element("span", {"class": "name"}, name), bar, number)


# --- quality ------------------------------------------------------------------------------------


def quality_bars(quality: Quality) -> Html:
    """Dense, pruned and recovered quality with 95 % intervals, on one scale that starts at 0."""
    stages = [
        ("dense", quality.before, "before"),
        ("pruned", quality.pruned, "middle" if quality.recovered else "after"),
    ]
    if quality.recovered:
        stages.append(("recovered", quality.recovered, "after"))
    top = 100.0 if quality.unit == "%" else _scale([measure for _, measure, _ in stages])
    return join([_quality_row(quality, name, measure, style, top) for name, measure, style in stages])


def _quality_row(quality: Quality, name: str, measure: Measure, style: str, top: float) -> Html:
    text = measured(quality, measure)
    change = quality_change(quality, measure)
    notes = [f"95 %: {interval(measure)}"] if measure.interval else []
    if measure is not quality.before:
        notes.insert(0, f"{change.figure} {change.word}".strip())
    label = f"{quality.metric} {name}: {text}" + (f" ({', '.join(notes)})" if notes else "")
    return row(name, track(measure.value, top, style, label, measure.interval), text, notes)


def _scale(measures: Sequence[Measure]) -> float:
    """The end of the scale: past all values and intervals, unless one dwarfs the others."""
    ends = sorted(max(m.value, m.interval[1] if m.interval else m.value) for m in measures if isfinite(m.value))
    finite = [end for end in ends if isfinite(end) and end > 0] or [1.0]
    while len(finite) > 1 and finite[-1] > CUT * finite[-2]:
        finite.pop()
    return finite[-1] * 1.02


# --- latency ------------------------------------------------------------------------------------


def latency_bars(latency: Latency) -> Html:
    """A pair of bars for every case, each pair on its own scale; whiskers from p10 to p90."""
    return join([_latency_pair(case) for case in latency.rows])


def _latency_pair(case: LatencyRow) -> Html:
    top = max(case.before.p90, case.after.p90) * 1.02
    change = latency_change(case)
    head = element(
        "div",
        {"class": "case"},
        element("b", {}, case.label),
        element("span", {"class": f"chip {change.verdict}"}, f"{change.sign} {change.word}"),
    )
    bars = [
        _timing_row(case, name, timing, style, top)
        for name, timing, style in (("dense", case.before, "before"), ("pruned", case.after, "after"))
    ]
    return element("div", {"class": "pair"}, head, *bars)


def _timing_row(case: LatencyRow, name: str, timing: Timing, style: str, top: float) -> Html:
    text = milliseconds(timing.median)
    notes = [f"p10{DASH}p90: {milliseconds(timing.p10)} to {milliseconds(timing.p90)}"]
    if timing.throughput:
        notes.append(f"{short(timing.throughput)} {case.unit}")
    label = f"{case.label}, {name}: median {text}, {', '.join(notes)}"
    return row(name, track(timing.median, top, style, label, (timing.p10, timing.p90)), text, notes)


# --- layers -------------------------------------------------------------------------------------


def layer_chart(layers: Sequence[Layer]) -> Html:
    """Kept and removed share of every layer: a row each if there are few, a column each if many."""
    return layer_rows(layers) if len(layers) <= FEW_LAYERS else layer_columns(layers)


def layer_rows(layers: Sequence[Layer]) -> Html:
    """One horizontal bar per layer: kept in colour, removed as the rest of the track."""
    return join([row(item.site, _layer_track(item), _kept(item), [_counts(item)]) for item in layers])


def _layer_track(layer: Layer) -> Html:
    return track(layer.kept, layer.units, "kept", f"{layer.site}: {_kept(layer)} kept, {_counts(layer)}")


def _kept(layer: Layer) -> str:
    return percent(layer.kept / layer.units)


def _counts(layer: Layer) -> str:
    return f"{layer.kept:,} of {layer.units:,} {plural(layer.kind)}"


def layer_columns(layers: Sequence[Layer]) -> Html:
    """One picture with a thin column per layer in model order, kept at the bottom, removed above."""
    gap = 0.16 if len(layers) <= 150 else 0.0
    columns = [_column(index, layer, gap) for index, layer in enumerate(layers)]
    low, high = min(layers, key=_density), max(layers, key=_density)
    label = (
        f"Share of units kept in each of {len(layers)} layers, in model order; "
        f"least in {low.site} ({_kept(low)}), most in {high.site} ({_kept(high)})"
    )
    attributes: dict[str, str | float] = {
        "class": "columns",
        "viewBox": f"0 0 {len(layers)} 100",
        "preserveAspectRatio": "none",
        "role": "img",
        "aria-label": label,
    }
    chart = element("svg", attributes, element("title", {}, label), *columns)
    ticks = element("div", {"class": "ticks"}, *(element("span", {}, text) for text in ("100 %", "50 %", "0 %")))
    ends = element("div", {"class": "ends"}, *(element("span", {}, item.site) for item in (layers[0], layers[-1])))
    return element("div", {"class": "profile"}, ticks, chart, ends)


def _column(index: int, layer: Layer, gap: float) -> Html:
    kept = 100 * _density(layer)
    place: dict[str, str | float] = {"x": index + gap / 2, "width": 1 - gap}
    title = element("title", {}, f"{layer.site}: {_kept(layer)} kept, {_counts(layer)}")
    return element(
        "g",
        {},
        title,
        element("rect", {"class": "ground", **place, "y": 0, "height": 100}),
        element("rect", {"class": "kept", **place, "y": 100 - kept, "height": kept}),
    )


def _density(layer: Layer) -> float:
    return layer.kept / layer.units
