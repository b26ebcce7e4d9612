"""Which abilities a width costs: changes of tasks over a sweep, fragile and robust ones, and what goes with what.

The protocol of "Fragile knowledge, robust instruction-following" (Martra 2025, arXiv 2512.22671): every width is
evaluated on all tasks, each task is compared with the unpruned model's, and any two tasks can be correlated over the
widths. Perplexity stands beside in every table: a task that rises while perplexity multiplies does not show a better
model. A sweep has few points, which follow one another; the report says so with every correlation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import isfinite, nan
from typing import Any

from secateur.core.errors import DataError, UnknownNameError
from secateur.measure.ranking import correlation

FEW = 10  # points, below which a correlation is reported with a warning
LOST = 0.1  # of the unpruned model's value, on the average of the widths: a fragile task loses more than this


class Kind(StrEnum):
    """How a task behaves over the widths."""

    FRAGILE = "fragile"
    ROBUST = "robust"


@dataclass(frozen=True)
class TaskColumn:
    """One task over the sweep.

    Attributes:
        name: of the task.
        values: one for every width; the first is the unpruned model's.
        perplexity: whether it is a perplexity: lower is better, and always shown.
        kind: fragile or robust; None: found from the values.
    """

    name: str
    values: tuple[float, ...]
    perplexity: bool = False
    kind: Kind | None = None

    @property
    def changes(self) -> tuple[float, ...]:
        """Relative change against the unpruned model, 0.1 = 10 % more; NaN where that is 0."""
        first = self.values[0]
        return tuple((value - first) / abs(first) if first else nan for value in self.values)

    @property
    def loss(self) -> float:
        """By how much it got worse, on the average of the pruned widths; negative: better. NaN from a 0 on."""
        worse = [change if self.perplexity else -change for change in self.changes[1:]]
        return sum(worse) / len(worse)

    @property
    def group(self) -> Kind:
        """Fragile: it lost more than a tenth, on the average of the pruned widths."""
        return self.kind or (Kind.FRAGILE if self.loss > LOST else Kind.ROBUST)


@dataclass(frozen=True)
class TaskCorrelation:
    """How two tasks go together over the widths.

    Attributes:
        first, second: the tasks.
        pearson: r; NaN where one of them is constant.
        p: two-sided, of r under normality; NaN as well.
        spearman: rank correlation.
        n: widths.
        warnings: why it must not be read as a law.
    """

    first: str
    second: str
    pearson: float
    p: float
    spearman: float
    n: int
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is not defined is None."""
        found = {
            key: None if isinstance(value, float) and not isfinite(value) else value
            for key, value in vars(self).items()
        }
        return {**found, "warnings": list(self.warnings)}

    def __str__(self) -> str:
        said = f"{self.first} and {self.second}: Pearson r = {self.pearson:.4f}, p = {self.p:.4f}, n = {self.n}; "
        return " ".join([f"{said}Spearman {self.spearman:.3f}", *(f"({warning})" for warning in self.warnings)])


@dataclass(frozen=True)
class TaskReport:
    """A sweep over widths.

    Attributes:
        widths: what the rows are called, the unpruned model first.
        tasks: one column each, at least one of them a perplexity.
    """

    widths: tuple[str, ...]
    tasks: tuple[TaskColumn, ...]

    def __post_init__(self) -> None:
        if len(self.widths) < 2:
            raise DataError("a sweep needs the unpruned model and at least one width")
        for task in self.tasks:
            if len(task.values) != len(self.widths):
                raise DataError(f"task '{task.name}' has {len(task.values)} values for {len(self.widths)} widths")
        if not any(task.perplexity for task in self.tasks):
            raise DataError(
                "a task report needs a perplexity beside the tasks: scores near chance can rise while the model breaks"
            )

    def task(self, name: str) -> TaskColumn:
        """One column.

        Raises:
            UnknownNameError: no such task.
        """
        found = {task.name: task for task in self.tasks}
        if name not in found:
            raise UnknownNameError("task", name, found)
        return found[name]

    def group(self, kind: Kind) -> tuple[str, ...]:
        """The tasks of a group."""
        return tuple(task.name for task in self.tasks if task.group is kind)

    def correlate(self, first: str, second: str) -> TaskCorrelation:
        """Two columns over all widths, the unpruned model included.

        Raises:
            UnknownNameError: no such task.
            DataError: a value is NaN.
        """
        x, y = self.task(first).values, self.task(second).values
        found = correlation(x, y)
        return TaskCorrelation(
            first, second, found.pearson, _two_sided(x, y), found.spearman, len(x), _cautions(len(x))
        )

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        columns = [asdict(task) | {"group": task.group.value, "changes": list(task.changes)} for task in self.tasks]
        return {"widths": list(self.widths), "tasks": columns}

    def to_markdown(self, pairs: Sequence[tuple[str, str]] = ()) -> str:
        """Values with their changes, perplexities first, then the groups and the correlations that were asked for."""
        ordered = sorted(self.tasks, key=lambda task: (not task.perplexity, task.group is Kind.ROBUST))
        lines = [
            f"| width | {' | '.join(task.name for task in ordered)} |",
            f"|{'---|' * (len(ordered) + 1)}",
            *(f"| {width} | {' | '.join(_cell(t, row) for t in ordered)} |" for row, width in enumerate(self.widths)),
            "",
            *(f"{kind.value.capitalize()}: {', '.join(self.group(kind)) or 'none'}." for kind in Kind),
        ]
        lines += [f"{self.correlate(*pair)}." for pair in pairs]
        return "\n".join([*lines, "A task that rises while perplexity rises does not make it a better model."]) + "\n"


def task_report(
    widths: Sequence[object],
    values: Mapping[str, Sequence[float]],
    perplexities: Sequence[str],
    kinds: Mapping[str, Kind] | None = None,
) -> TaskReport:
    """The report of a sweep.

    Args:
        widths: what was pruned, the unpruned model first, e.g. 4.0, 3.6, 3.2.
        values: task -> its value at each width.
        perplexities: which of them are perplexities, at least one.
        kinds: groups that are given, e.g. the paper's; others are found from the values.

    Raises:
        DataError: no perplexity, or another number of values than widths.
        UnknownNameError: a perplexity or group for a task that has no values.
    """
    for name in (*perplexities, *(kinds or {})):
        if name not in values:
            raise UnknownNameError("task", name, values)
    columns = [
        TaskColumn(name, tuple(map(float, column)), name in perplexities, (kinds or {}).get(name))
        for name, column in values.items()
    ]
    return TaskReport(tuple(map(str, widths)), tuple(columns))


def _cell(task: TaskColumn, row: int) -> str:
    return f"{task.values[row]:.4g}" if row == 0 else f"{task.values[row]:.4g} ({task.changes[row]:+.1%})"


def _two_sided(x: Sequence[float], y: Sequence[float]) -> float:
    if len(x) < 3 or min(len(set(x)), len(set(y))) < 2 or not all(map(isfinite, (*x, *y))):
        return nan
    from scipy.stats import pearsonr

    return float(pearsonr(x, y).pvalue)


def _cautions(n: int) -> tuple[str, ...]:
    if n >= FEW:
        return ()
    return (f"only {n} points of one sweep, which follow one another: p is too small, this shows no law",)
