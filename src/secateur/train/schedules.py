"""How dense a network is at each step of its training, as objects that can be planned with and integrated.

A step counts optimiser steps that are done: `density(0)` is what the first forward pass sees, and an event
at step t acts after the t-th optimiser step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from secateur.core.errors import SettingsError


class Schedule(Protocol):
    """Anything that knows the density in force at a step."""

    def density(self, step: int) -> float:
        """Fraction kept after `step` optimiser steps."""


class Shape(StrEnum):
    """How the density gets from its first to its last value; u runs from 0 to 1."""

    CONSTANT = "constant"  # the last value from the first event on
    LINEAR = "linear"
    CUBIC = "cubic"  # steep first: d_f + (d_i - d_f) (1 - u)^3 (Zhu and Gupta 2017)
    GEOMETRIC = "geometric"  # the same share of what is left at every event: d_i (d_f / d_i)^u
    COSINE = "cosine"


def between(first: float, last: float, u: float, shape: Shape) -> float:
    """The value at progress u in [0, 1]; exactly `last` at 1."""
    if u >= 1 or shape is Shape.CONSTANT:
        return last
    match shape:
        case Shape.LINEAR:
            return first + (last - first) * u
        case Shape.CUBIC:
            return last + (first - last) * (1 - u) ** 3
        case Shape.GEOMETRIC:
            return float(first * (last / first) ** u)
        case _:
            return last + (first - last) * (1 + math.cos(math.pi * u)) / 2


@dataclass(frozen=True)
class Window:
    """Events at `start`, `start + every`, ... and in any case at `stop`.

    Raises:
        SettingsError: stop before start, or no step between events.
    """

    start: int
    stop: int
    every: int = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise SettingsError(f"events need at least 1 step between them, got every={self.every}")
        if self.start < 0 or self.stop < self.start:
            raise SettingsError(
                f"a window from step {self.start} to step {self.stop} holds no events; give start <= stop"
            )

    @classmethod
    def share(cls, start: float, stop: float, steps: int, every: int = 1) -> Window:
        """A window in shares of the training, e.g. 0.25 to 0.75; its ends are whole multiples of `every`."""
        first, last = (round(part * steps / every) * every for part in (start, stop))
        return cls(first, max(first, last), every)

    @property
    def events(self) -> list[int]:
        """The steps of all events."""
        found = list(range(self.start, self.stop + 1, self.every))
        return found if found[-1] == self.stop else [*found, self.stop]

    @property
    def count(self) -> int:
        """How many events there are."""
        return 1 + -(-(self.stop - self.start) // self.every)

    def fires(self, step: int) -> bool:
        """Whether an event happens after this many steps."""
        return self.start <= step <= self.stop and ((step - self.start) % self.every == 0 or step == self.stop)

    def passed(self, step: int) -> int:
        """How many events have happened after `step` steps."""
        if step < self.start:
            return 0
        return self.count if step >= self.stop else 1 + (step - self.start) // self.every


@dataclass(frozen=True)
class Ramp:
    """Density along a shape, changed by the events of a window; the last event is exactly on target.

    Attributes:
        window: when.
        initial, final: densities before the first and after the last event.
        shape: along which curve.
        from_first: whether the first event already removes something: event j of K is at u = (j + 1) / K.
            Otherwise the first event is at u = 0 and removes nothing.
    """

    window: Window
    initial: float
    final: float
    shape: Shape = Shape.CUBIC
    from_first: bool = False

    def __post_init__(self) -> None:
        for name, value in (("initial", self.initial), ("final", self.final)):
            if not 0 < value <= 1:
                raise SettingsError(f"the {name} density must be in (0, 1], got {value:g}")

    def density(self, step: int) -> float:
        """Fraction kept after `step` optimiser steps."""
        passed, count = self.window.passed(step), self.window.count
        if not passed:
            return self.initial
        lead = 1 if self.from_first or count == 1 else 0
        return between(self.initial, self.final, (passed - 1 + lead) / (count - 1 + lead), self.shape)


@dataclass(frozen=True)
class Constant:
    """The same density throughout."""

    value: float

    def density(self, step: int) -> float:
        """`value`."""
        return self.value


@dataclass(frozen=True)
class Rounds:
    """Rounds of equal length; after each a share of what is left goes: (1 - rate)^rounds (Frankle and Carbin 2019)."""

    rate: float
    length: int
    count: int

    def density(self, step: int) -> float:
        """Fraction kept in the round that `step` belongs to."""
        return float((1 - self.rate) ** min(step // self.length, self.count))


@dataclass(frozen=True)
class CosineRate:
    """A rate that falls along half a cosine over the whole training, e.g. the share that is regrown."""

    first: float
    last: float
    steps: int

    def at(self, step: int) -> float:
        """The rate after `step` steps."""
        return between(self.first, self.last, step / self.steps, Shape.COSINE)


def warm_stable_decay(step: int, steps: int, warmup: float, cooldown: float, last: float) -> float:
    """Share of the peak learning rate in the step after `step` steps: up, constant, down, each a straight line.

    Args:
        step: 0 is the first.
        steps: of the whole training, however many pieces it comes in.
        warmup: share of the steps that rise.
        cooldown: share of the steps that fall, at the end.
        last: share of the peak that the fall leads to.
    """
    risen, falling = round(warmup * steps), round(cooldown * steps)
    if step < risen:
        return (step + 1) / risen
    down = step - (steps - falling)
    return 1.0 if down <= 0 else between(1.0, last, down / falling, Shape.LINEAR)


def average_density(schedule: Schedule, steps: int) -> float:
    """Mean density over the forward passes of a training: (1/T) sum_{t<T} density(t) (Jin et al. 2025)."""
    return math.fsum(schedule.density(step) for step in range(steps)) / steps


def rounds_to(density: float, rate: float) -> int:
    """The least number of rounds that leave at most `density`."""
    return max(0, math.ceil(math.log(density) / math.log(1 - rate) - 1e-9))


def checked_window(window: Window, steps: int, what: str = "the schedule") -> Window:
    """The window, if the training is long enough for it.

    Raises:
        SettingsError: the schedule is longer than the training, or over before its first step.
    """
    if window.stop < 1:
        raise SettingsError(
            f"{what} is over before the first optimiser step; give more steps or events closer together"
        )
    if window.stop > steps:
        raise SettingsError(
            f"{what} ends at step {window.stop}, but training has {steps} steps; shorten it or train longer"
        )
    return window


def geometric_counts(total: int, rate: float, rounds: int) -> Sequence[int]:
    """Kept weights after 0, 1, ... rounds, each removing floor(rate * survivors): exact integers."""
    counts = [total]
    for _ in range(rounds):
        counts.append(counts[-1] - math.floor(rate * counts[-1] + 1e-9))
    return counts
