"""Compute of a training whose network shrinks: planned before it, counted after it (Jin et al. 2025).

One dense step is the unit: a step at density d costs d of it, since a sparse network's step is worth as many
multiply-adds as it has active weights. A training of T steps with mean density g therefore costs C = g T, and
its average parameter count is N_0 C / T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from secateur.core.errors import SettingsError
from secateur.train.schedules import Constant, Ramp, Schedule, Shape, Window, average_density

FLOPS_PER_WEIGHT = 6  # forward and backward, a multiply-add counting 2, per active weight and token


@dataclass(frozen=True)
class ComputePlan:
    """A training that prunes in its middle.

    Attributes:
        ramp: when, and along which curve.
        steps: T, the optimiser steps of the whole training.
        budget: compute that it was planned for, in dense steps.
    """

    ramp: Ramp
    steps: int
    budget: float

    @property
    def start(self) -> int:
        """t1: steps before the first event."""
        return self.ramp.window.start

    @property
    def stop(self) -> int:
        """t2: steps before the last event."""
        return self.ramp.window.stop

    @property
    def spent(self) -> float:
        """Dense steps that it really costs; differs from the budget by what rounding the window does."""
        return dense_steps(self.ramp, self.steps)

    @property
    def average_density(self) -> float:
        """Mean density over the steps; times the prunable weights it is the average parameter count."""
        return self.spent / self.steps

    @property
    def shares(self) -> tuple[float, float, float]:
        """Which part of the compute goes before the first event, between the events, and after the last one."""
        before, until = dense_steps(self.ramp, self.start), dense_steps(self.ramp, self.stop)
        return before / self.spent, (until - before) / self.spent, (self.spent - until) / self.spent


def mean_density(final: float, shape: Shape = Shape.GEOMETRIC) -> float:
    """Mean of the density from 1 to `final` along a shape, with events as dense as steps.

    The geometric one is (1 - d) / (-ln d), the cubic one d + (1 - d) / 4.
    """
    if final == 1:
        return 1.0
    match shape:
        case Shape.GEOMETRIC:
            return (1 - final) / -math.log(final)
        case Shape.CUBIC:
            return final + (1 - final) / 4
        case Shape.CONSTANT:
            return final
        case _:
            return (1 + final) / 2


def dense_steps(schedule: Schedule, steps: int) -> float:
    """Compute of a training, in dense steps: the sum of the densities of its forward passes.

    Any schedule is summed step by step; a ramp, which only changes at its events, event by event.
    """
    if isinstance(schedule, Constant):
        return schedule.value * steps
    if not isinstance(schedule, Ramp):
        return average_density(schedule, steps) * steps if steps else 0.0
    marks = [0, *(event for event in schedule.window.events if event < steps), steps]
    return math.fsum(schedule.density(first) * (last - first) for first, last in pairwise(marks))


def plan_compute(
    budget_steps: float,
    sparsity: float,
    start: float = 0.25,
    stop: float = 0.75,
    every: int = 100,
    *,
    shape: Shape = Shape.GEOMETRIC,
) -> ComputePlan:
    """The training that spends a compute budget: dense for `start` of it, sparse from `stop` of it on.

    T = C (a + (b - a) / g + (1 - b) / d), with g the mean density of the middle phase. T is above C: a sparse run
    sees more tokens for the same compute.

    Args:
        budget_steps: C, compute as a number of steps of the dense network.
        sparsity: fraction removed in the end.
        start: a, share of the COMPUTE (not of the steps) before the first event.
        stop: b, the same before the last event.
        every: steps between two events.
        shape: curve of the density.

    Raises:
        SettingsError: shares out of order; the pruning phase is too short for the events.
    """
    if not budget_steps >= 1:
        raise SettingsError(f"a compute budget needs at least 1 dense step, got {budget_steps:g}")
    return plan_steps(
        round(budget_steps * _stretch(sparsity, start, stop, shape)), sparsity, start, stop, every, shape=shape
    )


def plan_steps(
    steps: int,
    sparsity: float,
    start: float = 0.25,
    stop: float = 0.75,
    every: int = 100,
    *,
    shape: Shape = Shape.GEOMETRIC,
) -> ComputePlan:
    """The same plan from the other side: given T, when to prune. Arguments and errors as `plan_compute`."""
    budget = steps / _stretch(sparsity, start, stop, shape)
    if shape is Shape.CONSTANT:
        return matched_plan(steps, budget, sparsity, first=1, every=every, shape=shape)
    end = start * budget + (stop - start) * budget / mean_density(1 - sparsity, shape)
    first = max(1, round(start * budget / every)) * every  # nothing can happen before the first step
    last = round(end / every) * every
    _refuse(not first < last <= steps, steps, every, f"pruning would last from step {start * budget:.0f} to {end:.0f}")
    return ComputePlan(Ramp(Window(first, last, every), 1.0, 1 - sparsity, shape, from_first=True), steps, budget)


def matched_plan(
    steps: int, budget: float, sparsity: float, *, first: int, every: int, shape: Shape = Shape.GEOMETRIC
) -> ComputePlan:
    """Pruning in T steps that costs `budget` dense steps: its last event is chosen so, as nearly as `every` allows.

    Args:
        steps: T.
        budget: C; so the average density is C / T whatever the shape.
        sparsity: fraction removed in the end.
        first: step of the first event; one-shot pruning has a single event and chooses it by itself.
        every: steps between two events.
        shape: curve of the density.

    Raises:
        SettingsError: no last event inside the training spends that much.
    """
    final = 1 - sparsity
    if shape is Shape.CONSTANT:
        alone = round((budget - final * steps) / (1 - final)) if final < 1 else steps
        _refuse(not 0 < alone <= steps, steps, every, "the single event would lie outside of the training")
        return ComputePlan(Ramp(Window(alone, alone, every), 1.0, final, shape, from_first=True), steps, budget)

    def plan(intervals: int) -> ComputePlan:
        window = Window(first, first + intervals * every, every)
        return ComputePlan(Ramp(window, 1.0, final, shape, from_first=True), steps, budget)

    low, most = 1, (steps - first) // every
    _refuse(most < 1, steps, every, f"after the first event at step {first} there is no time for a second")
    high = most
    while low < high:  # the later the last event, the more compute
        middle = (low + high) // 2
        low, high = (middle + 1, high) if plan(middle).spent < budget else (low, middle)
    found = min((plan(k) for k in {max(1, low - 1), low}), key=lambda p: abs(p.spent - budget))
    _refuse(abs(found.spent - budget) > every, steps, every, f"it cannot spend {budget:.0f} dense steps")
    return found


def _refuse(wrong: bool, steps: int, every: int, why: str) -> None:
    if wrong:
        raise SettingsError(
            f"pruning every {every} steps does not fit a training of {steps} steps: {why}; train longer or lower every"
        )


def _stretch(sparsity: float, start: float, stop: float, shape: Shape) -> float:
    """T / C."""
    if not 0 <= sparsity < 1:
        raise SettingsError(f"sparsity must be in [0, 1), got {sparsity:g}")
    if not 0 <= start < stop <= 1:
        raise SettingsError(
            f"start and stop are shares of the compute, 0 <= start < stop <= 1; got {start:g}, {stop:g}"
        )
    return start + (stop - start) / mean_density(1 - sparsity, shape) + (1 - stop) / (1 - sparsity)


@dataclass(frozen=True)
class Accounting:
    """What a training cost.

    Attributes:
        total, final: prunable weights, and how many of them were left at the end.
        average: active prunable weights, averaged over the steps: N_avg.
        steps: optimiser steps.
    """

    total: int
    final: int
    average: float
    steps: int

    @property
    def dense_steps(self) -> float:
        """Compute as a number of steps of the dense network."""
        return self.average / self.total * self.steps

    def flops(self, tokens_per_step: int) -> float:
        """6 N_t tokens, summed over the steps (Jin et al. 2025; embeddings, norms and attention not counted)."""
        return FLOPS_PER_WEIGHT * self.average * tokens_per_step * self.steps


def account(log: Sequence[Mapping[str, Any]], total: int, steps: int) -> Accounting:
    """Average over the steps, not over the events, of what was active; from a sparsifier's log.

    Args:
        log: `sparsifier.log`: events with `step` and the `density` that they left.
        total: prunable weights, `sparsifier.units`.
        steps: optimiser steps done.

    Raises:
        SettingsError: there were no steps.
    """
    if steps < 1:
        raise SettingsError("the average parameter count of a training needs at least 1 step")
    events = [(int(entry["step"]), round(entry["density"] * total)) for entry in log if entry["step"] < steps]
    last = round(log[-1]["density"] * total) if log else total
    marks = [(0, total), *events, (steps, last)]
    active = sum(kept * (later[0] - step) for (step, kept), later in pairwise(marks))
    return Accounting(total, last, active / steps, steps)
