"""A quantity that is measured at a few widths and read off between them.

Time over widths is bent: kernels work in blocks, so that 33 channels can cost what 48 cost, and change
where a cache is full. So lines are drawn only where a straight line between two others misses, and an
axis on which the time rises in steps is read at the end of the step.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise, product

GRAIN = 16  # lines stand at multiples of this: the widest block of channels that CPU kernels use
FINEST = 8  # lines are not nearer to each other than this part of the full width
MISS = 0.05  # relative error of a straight line that draws another line
STEPPED_BELOW = 512  # from here on a block of 16 is less than 3 % of the width
FLAT = 1.03  # a rise over a block that is less than this has no steps worth looking for

Widths = tuple[int, ...]


@dataclass
class Grid:
    """Values over a box of integer widths, from `low` to `full` on every axis.

    Ask `needed` for points to measure, put them into `values` and call `refine`, until nothing is needed.

    Attributes:
        low, full: opposite corners.
        values: point -> value, for all points that were measured.
        lines: the widths at which each axis is cut, ascending.
        steps: widths of each axis are rounded up to a multiple of this.
    """

    low: Widths
    full: Widths
    values: dict[Widths, float] = field(default_factory=dict)
    lines: list[list[int]] = field(init=False)
    steps: list[int] = field(init=False)
    _settled: set[tuple[int, int, int]] = field(init=False, default_factory=set)
    _known: dict[Widths, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.lines = [
            sorted({low, full, min(max(low, _middle(full)), full)})
            for low, full in zip(self.low, self.full, strict=True)
        ]
        self.steps = [1] * len(self.full)

    def needed(self) -> list[Widths]:
        """The points without a value that the next `refine` looks at, in a fixed order."""
        wanted = {*product(*self.lines)}
        for axis, (_, middle, _) in self._gaps():
            wanted.add(self._on(axis, middle))
        for axis in range(len(self.full)):
            wanted.update(self._on(axis, width) for width in self._block(axis))
        return sorted(wanted - self.values.keys(), reverse=True)

    def refine(self) -> None:
        """Draw the lines that the values ask for."""
        self._known.clear()
        for axis, (below, middle, above) in list(self._gaps()):
            value = self.values[self._on(axis, middle)]
            ends = [self.values[self._on(axis, width)] for width in (below, above)]
            straight = ends[0] + (ends[1] - ends[0]) * (middle - below) / (above - below)
            if abs(value - straight) > MISS * straight:
                insort(self.lines[axis], middle)
            else:
                self._settled.add((axis, below, above))
        self.steps = [self._step(axis) for axis in range(len(self.full))]

    def at(self, widths: Widths) -> float:
        """The value at any widths: multilinear between lines, steps rounded up, the box's edge outside of it."""
        found = self._known.get(widths)
        if found is None:
            found = self._known[widths] = self._interpolated(widths)
        return found

    def _interpolated(self, widths: Widths) -> float:
        corners: list[tuple[Widths, float]] = [((), 1.0)]
        for width, step, lines in zip(widths, self.steps, self.lines, strict=True):
            ends = list(_ends(width, lines, step))
            corners = [((*point, line), weight * part) for point, weight in corners for line, part in ends]
        return sum(weight * self.values[point] for point, weight in corners)

    def _on(self, axis: int, width: int) -> Widths:
        """The point where all other axes are full."""
        return (*self.full[:axis], width, *self.full[axis + 1 :])

    def _gaps(self) -> Iterator[tuple[int, tuple[int, int, int]]]:
        """(axis, (line, middle, next line)) of every gap that has not been looked into."""
        for axis, lines in enumerate(self.lines):
            for below, above in pairwise(lines):
                middle = round((below + above) / 2 / GRAIN) * GRAIN
                wide = above - below > max(GRAIN, self.full[axis] // FINEST)
                if wide and below < middle < above and (axis, below, above) not in self._settled:
                    yield axis, (below, middle, above)

    def _block(self, axis: int) -> Widths:
        """Start of a block in the middle of the axis, the width after it, and the block's end."""
        low, full = self.low[axis], self.full[axis]
        start = _middle(full)
        end = min(start + _grain(full), full)
        return (start, start + 1, end) if low <= start and end - start > 3 and full < STEPPED_BELOW else ()

    def _step(self, axis: int) -> int:
        block = self._block(axis)
        if not block:
            return 1
        start, after, end = (self.values[self._on(axis, width)] for width in block)
        if end < FLAT * start:
            return 1
        rise, grain = (after - start) / (end - start), _grain(self.full[axis])
        return grain if rise > 0.75 else grain // 2 if rise > 0.3 else 1  # on a slope it is 1 / grain


def _grain(full: int) -> int:
    return GRAIN if full > GRAIN else GRAIN // 2


def _middle(full: int) -> int:
    """The multiple of the grain nearest below the middle, at least one grain."""
    grain = _grain(full)
    return full // 2 // grain * grain or grain


def _ends(width: int, lines: list[int], step: int) -> Iterator[tuple[int, float]]:
    """The lines on both sides of a width with their shares; one line where it stands on it or outside.

    Width and lines are taken to the ends of their steps.
    """
    width, places = -(-width // step) * step, [-(-line // step) * step for line in lines]
    below = bisect_right(places, width) - 1
    if below < 0 or below == len(lines) - 1 or places[below] == width:
        yield lines[max(below, 0)], 1.0
        return
    share = (width - places[below]) / (places[below + 1] - places[below])
    yield lines[below], 1 - share
    yield lines[below + 1], share
