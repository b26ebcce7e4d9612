"""A row of a shipped comparison beside its baseline and a random control: the full-scale checks of most methods.

The same runs as in the table that `secateur compare` makes, one method at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from secateur.core.errors import ModelError
from secateur.core.progress import Progress
from secateur.lab.compare import Bench, Comparison, Rows, read_comparison
from secateur.lab.reproduce import Expectation, FullCheck, Sample
from secateur.train.study import Ledger

Amount = tuple[str, float | str]
"""What is counted, and how much."""


class Figure(StrEnum):
    """What of a row is looked at."""

    PRUNED = "value"  # right after the cut
    TRAINED = "recovered"  # after the row's recovery; of rows that are trained before the cut only, right after it


@dataclass(frozen=True)
class Ground:
    """A comparison as the ground of checks.

    Attributes:
        comparison: its name or file.
        conditions: model, data and training, in a few sentences.
        figure: what is looked at.
        lower: whether less is better, so that quotients are claimed; else differences in points (hundredths).
    """

    comparison: str
    conditions: str
    figure: Figure
    lower: bool

    def asked(self, seed: int) -> Comparison:
        """The comparison, with nothing timed."""
        found = read_comparison(Path(self.comparison))
        return found.model_copy(update={"speed": False, "recovered_seeds": seed + 1})

    def against(self, value: float, other: float) -> float:
        """How a value stands to another."""
        return value / other if self.lower else 100 * (value - other)


@dataclass(frozen=True)
class Rival:
    """A row of the comparison.

    Attributes:
        method, label: the row's.
        drawn: settings that depend on the seed and the amount, beside the row's; the row may be of another label then.
    """

    method: str
    label: str = ""
    drawn: Callable[[int, float | str], Mapping[str, Any]] | None = None

    @property
    def shown(self) -> str:
        """In a sentence."""
        return f"{self.method} {self.label}".strip() + (" of random settings" if self.drawn else "")

    def rows(self, asked: Comparison, seed: int, amount: Amount) -> Rows:
        """What is run: the row with that amount.

        Raises:
            LookupError: the comparison has no such row.
        """
        own = [rows for rows in asked.rows if self.method in rows.methods and rows.label == self.label]
        found = next(rows for rows in own if amount in rows.budgets())
        if self.drawn is None:
            return found
        settings = {**found.settings, **self.drawn(seed, amount[1])}
        return found.model_copy(update={"settings": settings, "label": f"{self.label} drawn"})


@dataclass(frozen=True)
class Runs:
    """The rows of a ground under one seed; each is run once."""

    ground: Ground
    bench: Bench
    seed: int

    @classmethod
    def of(cls, ground: Ground, seed: int, progress: Progress, ledger: Ledger) -> Runs:
        """Open the model."""
        return cls(ground, Bench(ground.asked(seed), ledger, progress), seed)

    def value(self, rival: Rival, amount: Amount) -> float:
        """A row's figure.

        Raises:
            ModelError: the method refused.
        """
        rows = rival.rows(self.bench.asked, self.seed, amount)
        if self.ground.figure is Figure.PRUNED:
            rows = rows.model_copy(update={"recover": ""})
        found = self.bench.result(rows, rival.method, *amount, self.seed)
        if found.get("error"):
            raise ModelError(f"{rival.method} at {amount[0]} {amount[1]}: {found['error']}")
        return float(found[self.ground.figure if rows.recover else Figure.PRUNED])


def beside(ground: Ground, method: Rival, baseline: Rival, control: Rival, budgets: tuple[Amount, ...]) -> FullCheck:
    """Claims that the method is better than the better of the baseline and the control, at every budget.

    Args:
        ground: where.
        method: a row of the comparison.
        baseline: another.
        control: one of random choices.
        budgets: of all three.
    """
    measure, threshold = ("perplexity relative to", "< 1") if ground.lower else ("accuracy points above", "> 0")
    rivals = f"the better of {baseline.shown} and {control.shown}"
    claims = {
        f"{kind}-{amount}": Expectation(f"{measure} {rivals}, at {kind} {amount}", threshold, "both")
        for kind, amount in budgets
    }

    def run(seed: int, progress: Progress, ledger: Ledger) -> dict[str, Sample]:
        runs, samples = Runs.of(ground, seed, progress, ledger), {}
        for amount in budgets:
            found = [runs.value(rival, amount) for rival in (method, baseline, control)]
            beaten = min(found[1:]) if ground.lower else max(found[1:])
            samples[f"{amount[0]}-{amount[1]}"] = Sample(*(ground.against(value, beaten) for value in found))
        return samples

    return FullCheck(claims, run, ground.conditions)
