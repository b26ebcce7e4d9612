"""What a training came to: at its end, on average over its last evaluations, and at its best."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from math import sqrt
from statistics import fmean

from secateur.train.tickets import early_stop


class Ending(StrEnum):
    """Which value of a figure counts."""

    LAST = "last"  # after the last step
    MEAN = "mean"  # over the last evaluations
    BEST = "best"  # where the metric is best: optimistic if that is measured on the test data


Figures = dict[str, float]


def endings(metrics: Mapping[str, float], metric: str, steps: int, tail: int = 5) -> dict[str, Figures]:
    """Every figure in all three ways, and `std`, its population deviation over the last evaluations.

    Args:
        metrics: what `fit` gave: `loss` at the end and `loss@100`, ... in between, where it looked.
        metric: what "best" goes by, higher = better unless its name ends in `loss`; the first of equals.
        steps: the last step.
        tail: how many evaluations the mean is over, the end included.
    """
    names = [name for name in metrics if "@" not in name]
    best = early_stop(metrics, metric, steps)
    tails = {name: _last(metrics, name, steps, tail) for name in names}
    return {
        Ending.LAST.value: {name: metrics[name] for name in names},
        Ending.MEAN.value: {name: fmean(values) for name, values in tails.items()},
        Ending.BEST.value: {name: metrics.get(f"{name}@{best}", metrics[name]) for name in names},
        "std": {name: _deviation(values) for name, values in tails.items()},
    }


def _last(metrics: Mapping[str, float], name: str, steps: int, tail: int) -> list[float]:
    places = {int(key.rpartition("@")[2]): value for key, value in metrics.items() if key.startswith(f"{name}@")}
    places[steps] = metrics[name]
    return [places[step] for step in sorted(places)][-tail:]


def _deviation(values: list[float]) -> float:
    mean = fmean(values)  # infinite values, those of a dead network, give NaN
    return sqrt(fmean((value - mean) ** 2 for value in values))
