"""How sure a figure is: intervals over samples and over seeds, and comparisons that pair them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from math import isfinite, sqrt
from typing import Any, Literal

import numpy as np

from secateur.core.errors import DataError
from secateur.measure.quality import Quality

BootstrapMethod = Literal["percentile", "BCa"]

RESAMPLES = 2000
CELLS_AT_ONCE = 2**22  # of the matrix of resampled values, which is 32 MB in float64


@dataclass(frozen=True)
class Interval:
    """A confidence interval.

    Attributes:
        low, high: its ends.
        level: its nominal coverage, 0.95 unless asked otherwise.
        method: how it was made.
    """

    low: float
    high: float
    level: float
    method: str

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Paired:
    """A difference, second minus first, between things measured on the same seeds or samples.

    Attributes:
        difference: second minus first.
        interval: of the difference; None where it is not defined (one pair, or a value not finite).
        pairs: how many pairs there were.
        wins: pairs in which the second value is the higher one.
    """

    difference: float
    interval: Interval | None
    pairs: int
    wins: int

    def to_json(self) -> dict[str, Any]:
        """Plain data; a difference that JSON lacks is the word nan or inf."""
        shown = self.difference if isfinite(self.difference) else str(self.difference)
        return {**asdict(self), "difference": shown}


def interval(values: Sequence[float], level: float = 0.95) -> Interval | None:
    """Student's t interval of the mean of a few independent values, one a seed.

    None for fewer than two values, or where one is not finite: then there is no such interval.
    """
    x = np.asarray(values, dtype=float)
    if x.size < 2 or not np.isfinite(x).all():
        return None
    from scipy.special import stdtrit

    half = float(stdtrit(x.size - 1, (1 + level) / 2)) * float(x.std(ddof=1)) / sqrt(x.size)
    mean = float(x.mean())
    return Interval(mean - half, mean + half, level, f"t over {x.size} values")


def paired(first: Sequence[float], second: Sequence[float], level: float = 0.95) -> Paired:
    """Two methods over the same seeds: mean difference (second minus first) and its t interval.

    Raises:
        DataError: the two do not have the same number of values, or have none.
    """
    a, b = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    if a.shape != b.shape or a.ndim != 1 or not a.size:
        raise DataError(f"a paired comparison needs two lists of equal length, got {a.size} and {b.size} values")
    difference = b - a
    return Paired(float(difference.mean()), interval(difference.tolist(), level), a.size, int((b > a).sum()))


def bootstrap(
    values: Any,
    *,
    seed: int = 0,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    method: BootstrapMethod = "percentile",
    transform: Callable[[Any], Any] | None = None,
) -> Interval | None:
    """Bootstrap interval of the mean over samples, or of a function of the mean.

    None for fewer than two values, or where one is not finite. BCa is not defined when all values are
    equal; the result is None then, while the percentile interval is a point.

    Args:
        values: one number a sample, `[samples]`.
        seed: of the resampling.
        level: nominal coverage.
        resamples: how many resampled means the interval rests on.
        method: `percentile`, or `BCa` (Efron 1987), which corrects bias and skew.
        transform: increasing function of the mean, e.g. `numpy.exp` for a perplexity.
    """
    x = np.asarray(values, dtype=float)
    if x.size < 2 or not np.isfinite(x).all() or (method == "BCa" and np.ptp(x) == 0):
        return None

    def statistic(sample: Any, axis: int = -1) -> Any:
        mean = sample.mean(axis=axis)
        return mean if transform is None else transform(mean)

    return _resampled((x,), statistic, seed=seed, level=level, resamples=resamples, method=method)


def quality_interval(quality: Quality, *, seed: int = 0, level: float = 0.95) -> Interval | None:
    """Percentile bootstrap interval of an accuracy or a perplexity over its samples; None as `bootstrap`."""
    return bootstrap(quality.values, seed=seed, level=level, transform=quality.metric.from_mean)


def paired_quality(
    before: Quality, after: Quality, *, seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> Paired:
    """Two models on the same samples: difference of the metric, after minus before.

    Both models meet the same resampled samples, so what makes a sample hard for both drops out. The
    wins count samples on which the value of `after` is higher: right against wrong for accuracy, a
    higher loss for perplexity.

    Raises:
        DataError: the two were measured with other metrics or on other numbers of samples.
    """
    if before.metric is not after.metric or before.samples != after.samples:
        raise DataError(
            f"cannot pair {before.metric} on {before.samples} samples with {after.metric} on {after.samples}; "
            f"measure both models on the same data"
        )
    a, b = before.values.numpy(), after.values.numpy()
    found = None
    if a.size > 1 and np.isfinite(a).all() and np.isfinite(b).all():

        def statistic(x: Any, y: Any, axis: int = -1) -> Any:
            return before.metric.from_mean(y.mean(axis=axis)) - before.metric.from_mean(x.mean(axis=axis))

        found = _resampled((a, b), statistic, seed=seed, level=level, resamples=resamples)
    return Paired(after.value - before.value, found, a.size, int((b > a).sum()))


def _resampled(
    data: tuple[Any, ...],
    statistic: Callable[..., Any],
    *,
    seed: int,
    level: float,
    resamples: int,
    method: BootstrapMethod = "percentile",
) -> Interval:
    from scipy.stats import bootstrap as scipy_bootstrap

    ends = scipy_bootstrap(
        data,
        statistic,
        n_resamples=resamples,
        batch=max(1, CELLS_AT_ONCE // data[0].size),
        paired=len(data) > 1,
        vectorized=True,
        confidence_level=level,
        method=method,
        random_state=np.random.default_rng(seed),
    ).confidence_interval
    return Interval(float(ends.low), float(ends.high), level, f"{method} bootstrap, {data[0].size} samples")
