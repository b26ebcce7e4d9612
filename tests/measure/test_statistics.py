import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import DataError
from secateur.measure import Metric, Quality, bootstrap, interval, paired, paired_quality, quality_interval

floats = st.floats(-100, 100, allow_nan=False)


def scored(metric, values):
    x = torch.as_tensor(values, dtype=torch.float64)
    return Quality(metric, float(metric.from_mean(x.mean().item())), x)


def test_t_interval_by_hand():
    found = interval([1.0, 2.0, 3.0])
    half = 4.302652729911275 / math.sqrt(3)  # t(0.975, 2 degrees of freedom) and a deviation of 1
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half))
    assert 2.0 in found
    assert 5.0 not in found


@pytest.mark.parametrize("values", [[], [1.0], [1.0, math.nan], [1.0, math.inf]])
def test_no_interval_where_there_is_none(values):
    assert interval(values) is None
    assert bootstrap(values) is None


def test_paired_by_hand():
    found = paired([1.0, 5.0, 9.0], [2.0, 7.0, 12.0])
    half = 4.302652729911275 / math.sqrt(3)
    assert found.difference == 2
    assert (found.interval.low, found.interval.high) == pytest.approx((2 - half, 2 + half))
    assert (found.pairs, found.wins) == (3, 3)
    single = paired([1.0], [0.5])
    assert (single.difference, single.interval, single.wins) == (-0.5, None, 0)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(floats, floats), min_size=2, max_size=8))
def test_paired_is_antisymmetric(pairs):
    a, b = map(list, zip(*pairs, strict=True))
    there, back = paired(a, b), paired(b, a)
    assert there.difference == pytest.approx(-back.difference)
    assert there.interval.low == pytest.approx(-back.interval.high)


def test_lists_of_unequal_length():
    with pytest.raises(DataError, match="2 and 3"):
        paired([1, 2], [1, 2, 3])
    with pytest.raises(DataError):
        paired([], [])


@pytest.mark.parametrize("method", ["percentile", "BCa"])
def test_bootstrap_coverage_of_a_known_mean(method):
    rng = np.random.default_rng(0)
    runs = 150
    hits = sum(
        1.0 in bootstrap(rng.exponential(1.0, 80), seed=run, resamples=400, method=method) for run in range(runs)
    )
    # nominal 0.95, a little less for 80 skewed values; 0.87 is 4 standard errors below
    assert 0.87 <= hits / runs <= 0.995


def test_bootstrap_agrees_with_the_normal_interval():
    values = np.random.default_rng(1).normal(3.0, 2.0, 2000)
    found = bootstrap(values)
    half = 1.959964 * values.std(ddof=1) / math.sqrt(2000)
    assert found.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert found.high == pytest.approx(values.mean() + half, abs=0.1 * half)


def test_seeded_and_transformed():
    values = np.random.default_rng(2).normal(size=50)
    assert bootstrap(values, seed=1) == bootstrap(values, seed=1)
    assert bootstrap(values, seed=1) != bootstrap(values, seed=2)
    plain, exp = bootstrap(values), bootstrap(values, transform=np.exp)
    # with 2000 resamples scipy interpolates between two neighbours, hence not to the last digit
    assert (exp.low, exp.high) == pytest.approx((math.exp(plain.low), math.exp(plain.high)), rel=1e-3)


def test_equal_values():
    point = bootstrap([1.0] * 10)
    assert (point.low, point.high) == (1.0, 1.0)
    assert bootstrap([1.0] * 10, method="BCa") is None


def test_quality_interval_holds_the_value_on_the_metric_scale():
    losses = np.random.default_rng(3).normal(1.5, 0.2, 100)
    found = quality_interval(scored(Metric.PERPLEXITY, losses))
    assert found.low < math.exp(losses.mean()) < found.high
    assert found.high - found.low < 1
    assert quality_interval(scored(Metric.PERPLEXITY, [1.0, math.nan])) is None


def test_pairing_removes_what_both_models_find_hard():
    rng = np.random.default_rng(4)
    hardness = rng.normal(2.0, 1.0, 200)
    a = scored(Metric.PERPLEXITY, hardness)
    b = scored(Metric.PERPLEXITY, hardness + 0.05 + rng.normal(0, 0.01, 200))
    found = paired_quality(a, b)
    assert found.difference == pytest.approx(b.value - a.value)
    assert found.interval.low > 0
    assert found.difference in found.interval
    alone = quality_interval(a)
    assert b.value in alone  # unpaired, the difference drowns
    same = paired_quality(a, a)
    assert (same.difference, same.interval.low, same.interval.high, same.wins) == (0, 0, 0, 0)


def test_paired_accuracy_by_hand():
    found = paired_quality(scored(Metric.ACCURACY, [1, 1, 0, 0]), scored(Metric.ACCURACY, [1, 0, 1, 1]))
    assert found.difference == 0.25
    assert (found.pairs, found.wins) == (4, 2)
    assert -0.75 <= found.interval.low <= found.interval.high <= 1.0


def test_broken_samples_leave_no_interval():
    found = paired_quality(scored(Metric.PERPLEXITY, [1.0, 1.0]), scored(Metric.PERPLEXITY, [1.0, math.inf]))
    assert found.interval is None
    assert found.difference == math.inf
    assert found.to_json()["difference"] == "inf"


def test_different_measurements_are_not_paired():
    with pytest.raises(DataError, match="same data"):
        paired_quality(scored(Metric.ACCURACY, [1, 0]), scored(Metric.ACCURACY, [1, 0, 1]))
    with pytest.raises(DataError, match="perplexity"):
        paired_quality(scored(Metric.ACCURACY, [1, 0]), scored(Metric.PERPLEXITY, [1, 0]))
