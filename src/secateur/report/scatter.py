"""Several results in one picture: quality kept against non-zero weights kept."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor

from secateur.report.figures import percent
from secateur.report.markup import Html, element
from secateur.report.record import Record

WIDTH, HEIGHT = 760.0, 380.0
LEFT, RIGHT, TOP, BOTTOM = 56.0, 24.0, 24.0, 52.0
LETTER, LINE = 7.0, 16.0  # room that a label's letter and line take, in the picture's units


@dataclass(frozen=True)
class Axes:
    """The lower end of the y axis; x runs from 0 to 1, y up to `top`."""

    bottom: float
    top: float

    def x(self, share: float) -> float:
        """Place of a share of non-zero weights."""
        return LEFT + (WIDTH - LEFT - RIGHT) * min(share, 1.0)

    def y(self, share: float) -> float:
        """Place of a share of quality."""
        return TOP + (HEIGHT - TOP - BOTTOM) * (self.top - share) / (self.top - self.bottom)


def axes(records: list[Record]) -> Axes:
    """From a tenth below the worst quality to just above the best, the dense model always inside."""
    shares = [record.quality.kept(m) for record in records for m in (record.quality.pruned, record.quality.after)]
    step = 0.1 if min(shares) < 0.85 else 0.05
    return Axes(max(floor(min(shares) / step - 0.2) * step, 0.0), max(1.0, *shares) + 0.15 * step)


def scatter(records: list[Record]) -> Html:
    """Filled mark: the saved result. Hollow mark: before recovery. Numbers are those of the table."""
    scale = axes(records)
    label = "Quality kept against non-zero weights kept. " + " ".join(
        f"{index}: {_describe(record)}." for index, record in enumerate(records, 1)
    )
    attributes: dict[str, str | float] = {
        "class": "scatter",
        "viewBox": f"0 0 {WIDTH:g} {HEIGHT:g}",
        "role": "img",
        "aria-label": label,
    }
    marks = [_mark(record, scale) for record in records]
    grid, names = _grid(scale), _labels(records, scale)
    return element("svg", attributes, element("title", {}, label), *grid, _dense(scale), *marks, *names)


def _describe(record: Record) -> str:
    quality = percent(record.quality.kept(record.quality.after))
    return f"{record.title}, {percent(record.sizes.nonzeros.kept)} of the weights, {quality} of the quality"


def _grid(scale: Axes) -> list[Html]:
    parts = []
    step = 0.1 if scale.top - scale.bottom > 0.25 else 0.05
    if scale.top - scale.bottom > 0.6:
        step = 0.2
    tick = floor(scale.top / step) * step
    while tick >= scale.bottom - 1e-9:
        y = scale.y(tick)
        parts.append(element("path", {"class": "grid", "d": f"M{LEFT:g} {y:.1f}H{WIDTH - RIGHT:g}"}))
        parts.append(_text(LEFT - 8, y + 4, f"{100 * tick:.0f} %", "end"))
        tick -= step
    below = HEIGHT - BOTTOM + 18
    parts += [_text(scale.x(share), below, f"{100 * share:.0f} %", "middle") for share in (0.0, 0.25, 0.5, 0.75, 1.0)]
    parts.append(_text(LEFT - 48, TOP - 10, "quality kept", "start", "axis"))
    parts.append(_text(WIDTH - RIGHT, HEIGHT - 10, "non-zero weights kept", "end", "axis"))
    return parts


def _dense(scale: Axes) -> Html:
    return element(
        "g", {}, element("circle", {"class": "before", "cx": scale.x(1), "cy": scale.y(1), "r": 6}),
        _text(scale.x(1) - 12, scale.y(1) + 18, "dense model", "end"),
    )  # fmt: skip


def _mark(record: Record, scale: Axes) -> Html:
    quality = record.quality
    x = scale.x(record.sizes.nonzeros.kept)
    after, pruned = scale.y(quality.kept(quality.after)), scale.y(quality.kept(quality.pruned))
    parts = [element("title", {}, _describe(record))]
    if quality.recovered:
        parts.append(element("path", {"class": "rise", "d": f"M{x:.1f} {pruned:.1f}V{after:.1f}"}))
        parts.append(element("circle", {"class": "hollow", "cx": x, "cy": pruned, "r": 5}))
    parts.append(element("circle", {"class": "after", "cx": x, "cy": after, "r": 7}))
    return element("g", {}, *parts)


def _labels(records: list[Record], scale: Axes) -> list[Html]:
    """Number and method beside each mark, moved down where two would overlap."""
    placed: list[tuple[float, float, float]] = []
    parts = []
    for index, record in enumerate(records, 1):
        text = f"{index}  {record.method.name}"
        width = LETTER * len(text)
        x = scale.x(record.sizes.nonzeros.kept)
        start = x + 13 if x + 13 + width < WIDTH - RIGHT else x - 13 - width
        y = free_line(scale.y(record.quality.kept(record.quality.after)) + 4, start, width, placed)
        placed.append((start, y, width))
        parts.append(_text(start, y, text, "start", "label"))
    return parts


def free_line(y: float, start: float, width: float, placed: list[tuple[float, float, float]]) -> float:
    """The first y at or below `y` where a text from `start` of `width` touches none of the placed ones.

    Args:
        y: baseline of the text.
        start: its left end.
        width: how long it is.
        placed: (start, y, width) of the texts that are there already.
    """
    beside = sorted(other for left, other, wide in placed if start < left + wide and left < start + width)
    for other in beside:
        if abs(other - y) < LINE:
            y = other + LINE
    return y


def _text(x: float, y: float, text: str, anchor: str, style: str = "tick") -> Html:
    return element("text", {"class": style, "x": x, "y": y, "text-anchor": anchor}, text)
