"""Shares that are moved in small steps: more from layers that matter little now (Pan et al. 2025)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil, floor

from secateur.allocate.structured import Counts

ROUNDING = 1e-9  # a share that was added up from many steps still counts as the decimal it stands for


def centred(importance: Mapping[str, float]) -> dict[str, float]:
    """Importance with mean 0 and largest magnitude 1; 0 throughout where all are equal (Pan et al. 2025, section 3)."""
    mean = sum(importance.values()) / len(importance)
    moved = {name: value - mean for name, value in importance.items()}
    largest = max(abs(value) for value in moved.values())
    if largest <= 1e-12 * max(abs(value) for value in importance.values()):  # equal up to rounding
        return dict.fromkeys(importance, 0.0)
    return {name: value / largest for name, value in moved.items()}


def moved_shares(
    shares: Mapping[str, float], step: float, amplitude: float, importance: Mapping[str, float], largest: float
) -> dict[str, float]:
    """`s <- clip(s + b - A v, 0, largest)` for every site.

    Args:
        shares: removed share of every site's ORIGINAL units so far.
        step: b, what all would lose alike.
        amplitude: A.
        importance: v, from `centred`.
        largest: above which no site goes.
    """
    return {name: min(max(share + step - amplitude * importance[name], 0.0), largest) for name, share in shares.items()}


def kept_at(units: int, share: float, width: int = 1) -> int:
    """Units left of a site whose `units * width` features lose a share: `n // width` whole units go for n features."""
    features = floor(units * width * (1 - share) + ROUNDING)
    return -(-features // width)


@dataclass(frozen=True)
class Goal:
    """What ends the steps: a cost that must not be passed.

    Attributes:
        sites: whose units it is about.
        cost: kept units -> cost; never less for more units.
        target: the largest cost.
    """

    sites: tuple[str, ...]
    cost: Callable[[Counts], float]
    target: float

    def spent(self, counts: Counts) -> float:
        """What these sites cost; others may be among the counts."""
        return self.cost({name: counts[name] for name in self.sites})

    def met(self, counts: Counts) -> bool:
        """Whether that is no more than the target."""
        return self.spent(counts) <= self.target


def last_step(before: Counts, after: Counts, goal: Goal, multiples: Mapping[str, int]) -> Counts:
    """Counts between two steps that meet a goal and give nothing away that it would allow.

    Every site goes the same part of its way; what still fits is then given back, to every site in turn.

    Args:
        before: kept units that do not meet the goal.
        after: kept units that do; no site keeps more than before.
        goal: what is to be met.
        multiples: site -> what its kept units must be a multiple of.
    """

    def at(part: float) -> Counts:
        wanted = {name: count - part * (count - after[name]) for name, count in before.items()}
        return {name: min(_up(wanted[name], multiples[name]), count) for name, count in before.items()}

    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if goal.met(at(middle)) else (middle, high)
    return _given_back(at(high), before, goal, multiples)


def _given_back(counts: Counts, most: Counts, goal: Goal, multiples: Mapping[str, int]) -> Counts:
    """One multiple more for every site in turn, until none fits."""
    waiting = list(counts)
    while waiting:
        for name in list(waiting):
            more = counts | {name: min(counts[name] + multiples[name], most[name])}
            if more[name] > counts[name] and goal.met(more):
                counts = more
            else:
                waiting.remove(name)
    return counts


def _up(count: float, multiple: int) -> int:
    return ceil(count / multiple - ROUNDING) * multiple
