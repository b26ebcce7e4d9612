"""Greedy removal: the candidate goes without which the rest does best, or every place as far as a loss budget lets it.

`remove_greedily` takes a number of candidates one by one. `scan_greedily` visits places in a given order and raises
each one's level on top of what was accepted before, until one of several objectives rises too much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from math import inf, isnan

from secateur.core.progress import Progress, Silent, track


@dataclass(frozen=True)
class Removal:
    """What greedy removal took.

    Attributes:
        order: indices in the order in which they went.
        rounds: of each round, index -> fitness without it and without all that went before.
    """

    order: tuple[int, ...]
    rounds: tuple[dict[int, float], ...]


def remove_greedily(
    candidates: Iterable[int],
    count: int,
    fitness: Callable[[tuple[int, ...]], float],
    progress: Progress | None = None,
) -> Removal:
    """Remove `count` of the candidates one by one, each time the one without which the fitness is highest.

    Indices always are the original ones. Of equal candidates the later goes; a fitness of NaN is the worst.

    Args:
        candidates: indices that may go, at least `count`.
        count: how many go.
        fitness: of the rest when these indices, ascending, are gone; higher = better.
        progress: receives one step for each evaluation.
    """
    left, gone, rounds = sorted(set(candidates)), list[int](), list[dict[int, float]]()
    progress = progress or Silent()
    progress.start("greedy removal", sum(len(left) - done for done in range(count)))
    try:
        for _ in range(count):
            values = {}
            for index in left:
                values[index] = fitness(tuple(sorted([*gone, index])))
                progress.advance()
            best = max(left, key=lambda index: (_ranked(values[index]), index))
            gone.append(best)
            left.remove(best)
            rounds.append(values)
    finally:
        progress.finish()
    return Removal(tuple(gone), tuple(rounds))


def _ranked(value: float) -> float:
    return float("-inf") if isnan(value) else value


Objectives = Mapping[str, float]
"""Name -> value, positive; smaller is better."""
Taken = dict[str, int]
"""Place -> its level, in the order in which the places were visited."""


class Watch(StrEnum):
    """Which objective decides at a place."""

    WORST = "worst"  # at every level the one that rises most
    FIRST = "first"  # the one that rises most at the first level, at all levels


@dataclass
class Guard:
    """What several objectives may rise to.

    Attributes:
        reference: what a rise is relative to: the largest value of each so far accepted.
        tolerance: by what fraction an objective may be above it.
        factor: of the tolerance, with every acceptance.
    """

    reference: dict[str, float]
    tolerance: float
    factor: float = 1.0

    def worst(self, values: Objectives) -> str:
        """The objective that rises most, the first of equals; one that is NaN rises without end."""
        return max(self.reference, key=lambda name: self.rise(values, name))

    def rise(self, values: Objectives, name: str) -> float:
        """By what factor an objective is above its reference."""
        return inf if isnan(values[name]) else values[name] / self.reference[name]

    def allows(self, values: Objectives, name: str) -> bool:
        """Whether an objective stays within the tolerance."""
        return self.rise(values, name) <= 1 + self.tolerance

    def accept(self, values: Objectives) -> None:
        """Go on from these values."""
        self.reference = {name: max(value, values[name]) for name, value in self.reference.items()}
        self.tolerance *= self.factor


@dataclass(frozen=True)
class Visit:
    """What came of one place.

    Attributes:
        place: its name.
        levels: those tried, in order.
        values: the objectives at each of them.
        accepted: how many of them were accepted; 0 where the place stays as it was.
        tolerance: in force.
        reference: that the rises were relative to.
        limiting: the objective that forbade the level after the accepted ones; None if none did.
        written: whether later places were tried on top of it.
    """

    place: str
    levels: tuple[int, ...]
    values: tuple[dict[str, float], ...]
    accepted: int
    tolerance: float
    reference: dict[str, float]
    limiting: str | None
    written: bool


def scan_greedily(
    levels: Mapping[str, Sequence[int]],
    objectives: Callable[[Taken], Objectives],
    guard: Guard,
    *,
    watch: Watch = Watch.WORST,
    enough: Callable[[Taken], bool] = lambda taken: False,
    unlimited: bool = True,
    progress: Progress | None = None,
) -> list[Visit]:
    """Visit places in order; raise each one's level until an objective rises by more than the tolerance.

    What is accepted stays for the places after it, becomes part of the reference and multiplies the tolerance. A
    place whose first level is too much stays as it was and uses up nothing.

    Args:
        levels: place -> its levels, ascending.
        objectives: of all the levels taken, those before and the one on trial.
        guard: with the objectives at the start; used up.
        watch: which objective decides.
        enough: ends the scan with the first accepted level after which it says so.
        unlimited: False: a place that no level limits is not written back (`Visit.written` says so).
        progress: receives one step for each place.
    """
    scan = _Scan(objectives, guard, watch, enough, unlimited)
    visits = []
    for place in track(levels, progress or Silent(), "greedy scan"):
        if enough(scan.taken):
            break
        visits.append(scan.visit(place, levels[place]))
    return visits


@dataclass
class _Scan:
    """A scan that is going on: what `scan_greedily` was given, and what is taken so far."""

    objectives: Callable[[Taken], Objectives]
    guard: Guard
    watch: Watch
    enough: Callable[[Taken], bool]
    unlimited: bool
    taken: Taken = field(default_factory=dict)

    def visit(self, place: str, levels: Sequence[int]) -> Visit:
        guard, values, limiting, ends = self.guard, list[dict[str, float]](), None, False
        watched: str | None = None
        for level in levels:
            trial = self.taken | {place: level}
            values.append(dict(self.objectives(trial)))
            if watched is None or self.watch is Watch.WORST:
                watched = guard.worst(values[-1])
            if not guard.allows(values[-1], watched):
                limiting = watched
                break
            if ends := self.enough(trial):
                break
        accepted = len(values) - (limiting is not None)
        written = accepted > 0 and (self.unlimited or ends or limiting is not None)
        tried = tuple(levels[: len(values)])
        found = Visit(place, tried, tuple(values), accepted, guard.tolerance, dict(guard.reference), limiting, written)
        if written:
            self.taken[place] = levels[accepted - 1]
            guard.accept(values[accepted - 1])
        return found
