"""Whether one figure ranks things as another does: rank correlations, and how often the favourite is beaten.

What the oracle study asks of a pruning criterion (Feng, Tao, Wang 2024, section 3): Kendall's tau between the
criterion and the result, and the anomaly ratio, the share of candidates that end better than the one it chose.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite, nan
from typing import Any

import numpy as np

from secateur.core.errors import DataError

CLEAR, SURE = 0.2, 0.05  # a valid criterion: |tau| above the one, p at most the other


@dataclass(frozen=True)
class Correlation:
    """Rank correlations of two figures of the same things.

    Attributes:
        tau, p: Kendall's tau-b, which corrects for ties, and its two-sided p-value; NaN where one figure is constant.
        spearman, pearson: other coefficients; NaN where they are not defined.
        pairs: how many things there were.
        distinct: different values among them, of either figure.
    """

    tau: float
    p: float
    spearman: float
    pearson: float
    pairs: int
    distinct: tuple[int, int]

    def valid(self, higher_is_better: bool = False) -> bool:
        """Whether a small first figure clearly goes with a good second one."""
        return (-self.tau if higher_is_better else self.tau) > CLEAR and self.p <= SURE

    def to_json(self) -> dict[str, Any]:
        """Plain data; what is not defined is None."""
        return {
            name: value if not isinstance(value, float) or isfinite(value) else None
            for name, value in asdict(self).items()
        }


def correlation(first: Sequence[float], second: Sequence[float]) -> Correlation:
    """How alike two figures rank the same things. The sign is the plain one: positive where both rise together.

    Args:
        first: one number a thing; infinite ones rank at the ends. What was measured several times has to be
            averaged before: repetitions are no further things and make p too small.
        second: the other figure of the same things.

    Raises:
        DataError: other lengths, fewer than two values, or NaN.
    """
    x, y = _paired(first, second)
    from scipy.stats import kendalltau, pearsonr, spearmanr

    distinct = (len(np.unique(x)), len(np.unique(y)))
    if min(distinct) < 2:
        return Correlation(nan, nan, nan, nan, x.size, distinct)
    tau = kendalltau(x, y)
    finite = bool(np.isfinite(x).all() and np.isfinite(y).all())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nearly constant values: said by `distinct`
        linear = float(pearsonr(x, y).statistic) if finite else nan
    return Correlation(
        float(tau.statistic), float(tau.pvalue), float(spearmanr(x, y).statistic), linear, x.size, distinct
    )


def anomaly_ratio(criterion: Sequence[float], result: Sequence[float], higher_is_better: bool = False) -> float:
    """Share of all things that end strictly better than the one whose criterion is the smallest (the first of equals).

    0: the choice was the best one; 0.5: as good as a random pick.

    Raises:
        DataError: as for `correlation`.
    """
    x, y = _paired(criterion, result)
    chosen = y[x.argmin()]
    return float(((y > chosen) if higher_is_better else (y < chosen)).mean())


def verdict(
    criterion: Sequence[float | None], result: Sequence[float | None], higher_is_better: bool = False
) -> dict[str, Any]:
    """Everything about a criterion that should be small where the result is good, as plain data.

    Args:
        criterion: one number a thing; None, NaN and infinity count as the largest.
        result: figure of the same things; None, NaN and infinity count as the worst.
        higher_is_better: of the result.
    """
    numbers, results = worst_for_missing(criterion), worst_for_missing(result, higher_is_better)
    found = correlation(numbers, results)
    return {
        **found.to_json(),
        "anomaly": anomaly_ratio(numbers, results, higher_is_better),
        "valid": found.valid(higher_is_better),
    }


def worst_for_missing(values: Sequence[float | None], higher_is_better: bool = False) -> list[float]:
    """The values, with an infinitely bad one where there is none or none that is finite."""
    worst = -inf if higher_is_better else inf
    return [worst if value is None or not isfinite(value) else value for value in values]


def _paired(first: Sequence[float], second: Sequence[float]) -> tuple[Any, Any]:
    x, y = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if x.shape != y.shape or x.ndim != 1 or x.size < 2:
        raise DataError(
            f"a comparison of ranks needs two lists of the same two or more things, got {x.size} and {y.size}"
        )
    if np.isnan(x).any() or np.isnan(y).any():
        raise DataError("a comparison of ranks has no place for NaN; give it as inf or -inf, whichever is worst")
    return x, y
