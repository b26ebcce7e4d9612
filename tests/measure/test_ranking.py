"""Rank correlations against brute force over pairs and permutations; anomalies by hand."""

from itertools import combinations, permutations
from math import inf, isnan, nan, sqrt

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import DataError
from secateur.measure.ranking import anomaly_ratio, correlation, verdict

FEW = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=12)


def tau_b(x, y):
    """Concordant minus discordant pairs over the geometric mean of the pairs untied in either."""
    pairs = list(combinations(range(len(x)), 2))
    sign = lambda v: (v > 0) - (v < 0)  # noqa: E731
    score = sum(sign(x[i] - x[j]) * sign(y[i] - y[j]) for i, j in pairs)
    return score / sqrt(sum(x[i] != x[j] for i, j in pairs) * sum(y[i] != y[j] for i, j in pairs))


@settings(deadline=None)  # the first call imports scipy
@given(FEW)
def test_tau_is_the_count_over_all_pairs_corrected_for_ties(points):
    x, y = zip(*points, strict=True)
    found = correlation(x, y)
    assert found.pairs == len(points)
    assert found.distinct == (len(set(x)), len(set(y)))
    if min(found.distinct) < 2:
        assert isnan(found.tau)
        assert isnan(found.p)
        assert found.to_json()["tau"] is None
        assert not found.valid()
    else:
        assert found.tau == pytest.approx(tau_b(x, y))


def test_p_is_the_share_of_permutations_that_are_at_least_as_ordered():
    x, y = [1, 2, 3, 4, 5, 6], [1, 3, 2, 4, 6, 5]
    found = correlation(x, y)
    shuffled = [abs(tau_b(x, other)) for other in permutations(y)]
    assert found.p == pytest.approx(sum(t >= abs(found.tau) - 1e-12 for t in shuffled) / len(shuffled))


def test_a_figure_ranks_itself_perfectly_and_its_negative_backwards():
    x = [0.3, 0.1, 0.7, 0.2, 0.9]
    same, opposite = correlation(x, x), correlation(x, [-v for v in x])
    for found, sign in ((same, 1), (opposite, -1)):
        assert (found.tau, found.spearman, found.pearson) == pytest.approx((sign, sign, sign))


def test_repeating_the_same_things_makes_p_too_small():
    x, y = [1, 2, 3, 4, 5, 6], [2, 1, 4, 3, 6, 5]
    assert correlation(x * 3, y * 3).p < correlation(x, y).p  # which is why repetitions are averaged first


def test_infinite_values_rank_at_the_ends_and_nan_has_no_place():
    found = correlation([1, 2, 3], [1, 2, inf])
    assert found.tau == pytest.approx(1)
    assert found.to_json()["pearson"] is None
    with pytest.raises(DataError, match="NaN"):
        correlation([1, nan], [1, 2])


@pytest.mark.parametrize(("x", "y"), [([1], [1]), ([1, 2], [1, 2, 3]), ([], [])])
def test_what_cannot_be_compared_is_refused(x, y):
    with pytest.raises(DataError, match="two lists of the same"):
        correlation(x, y)
    with pytest.raises(DataError, match="two lists of the same"):
        anomaly_ratio(x, y)


def test_anomalies_are_those_strictly_better_than_the_choice():
    criterion = [3, 1, 2, 4]
    assert anomaly_ratio(criterion, [0.5, 0.5, 0.2, 0.9]) == 0.25
    assert anomaly_ratio(criterion, [0.5, 0.5, 0.2, 0.9], higher_is_better=True) == 0.25
    assert anomaly_ratio(criterion, [0.5, 0.1, 0.2, 0.9]) == 0
    assert anomaly_ratio(criterion, [0.5, 0.1, 0.2, 0.9], higher_is_better=True) == 0.75
    assert anomaly_ratio([1, 1, 2], [5, 4, 3]) == pytest.approx(2 / 3)  # of equal ones the first is the choice


@given(FEW)
def test_a_criterion_that_is_the_result_has_no_anomaly(points):
    result = [y for _, y in points]
    assert anomaly_ratio(result, result) == 0
    assert anomaly_ratio([-y for y in result], result, higher_is_better=True) == 0


@pytest.mark.parametrize(
    ("result", "up", "valid"),
    [
        (range(10), False, True),
        (range(10), True, False),  # an accuracy that rises with the loss
        (range(10, 0, -1), True, True),
        (range(10, 0, -1), False, False),
        ([3, 1, 4, 1, 5, 9, 2, 6, 5, 3], False, False),  # tau 0.28, p 0.28
    ],
)
def test_valid_needs_the_right_sign_and_a_small_p(result, up, valid):
    assert verdict(list(range(10)), list(result), up)["valid"] is valid


def test_what_is_missing_is_the_worst():
    found = verdict([1, 2, 3, None], [0.1, 0.2, 0.3, None])
    assert (found["tau"], found["anomaly"]) == (pytest.approx(1), 0)
    assert verdict([1, 2, 3, 4], [0.1, 0.2, None, nan], True)["anomaly"] == 0.25
    assert verdict([1, 2, 3, 4], [None, 0.2, 0.3, 0.4], False)["anomaly"] == 0.75
