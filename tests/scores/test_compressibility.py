"""PQ and Gini index: hand-computed cases, the six properties of a sparsity measure, the bound, and the traps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from secateur.core.errors import NumericsError, SettingsError
from secateur.core.seeding import seeded
from secateur.scores.compressibility import gini, index_of_sums, power_sums, pq_index, retained

POWERS = [(0.5, 1.0), (1.0, 2.0), (0.2, 1.7)]
VECTORS = st.lists(st.floats(0.01, 100), min_size=2, max_size=12)
PAIRS = st.sampled_from(POWERS)


def by_hand(values: list[float], p: float, q: float) -> float:
    """The definition with norms, not with means."""
    low = sum(abs(v) ** p for v in values) ** (1 / p)
    high = sum(abs(v) ** q for v in values) ** (1 / q)
    return 1 - len(values) ** (1 / q - 1 / p) * low / high


def index(values: list[float], p: float = 0.5, q: float = 1.0) -> float:
    return float(pq_index(torch.tensor(values, dtype=torch.float64), p=p, q=q))


@given(VECTORS, PAIRS)
def test_equals_the_definition(values: list[float], powers: tuple[float, float]) -> None:
    assert index(values, *powers) == pytest.approx(max(0.0, by_hand(values, *powers)), abs=1e-9)


@pytest.mark.parametrize(("p", "q"), POWERS)
def test_both_ends(p: float, q: float) -> None:
    assert index([3.0] * 100, p, q) == 0
    assert index([0.0] * 99 + [-7.0], p, q) == pytest.approx(1 - 100 ** (1 / q - 1 / p))
    assert index([0.0] * 99 + [1.0]) == pytest.approx(0.99)


# the six properties of Hurley and Rickard (2009), as the paper proves them for the PQ index


@given(VECTORS, PAIRS, st.data())
def test_d1_robin_hood_lowers(values: list[float], powers: tuple[float, float], data: st.DataObject) -> None:
    low, high = int(np.argmin(values)), int(np.argmax(values))
    gap = values[high] - values[low]
    given_ = gap / 2 * data.draw(st.floats(0, 1))
    moved = list(values)
    moved[low], moved[high] = values[low] + given_, values[high] - given_
    assert index(moved, *powers) <= index(values, *powers) + 1e-9


@given(VECTORS, PAIRS, st.floats(1e-3, 1e3))
def test_d2_scale_does_not_matter(values: list[float], powers: tuple[float, float], scale: float) -> None:
    assert index([scale * v for v in values], *powers) == pytest.approx(index(values, *powers), abs=1e-9)


@given(VECTORS, PAIRS, st.floats(0, 100))
def test_d3_a_constant_added_to_all_lowers(values: list[float], powers: tuple[float, float], added: float) -> None:
    assert index([v + added for v in values], *powers) <= index(values, *powers) + 1e-9


@given(VECTORS, PAIRS, st.integers(2, 5))
def test_d4_cloning_does_not_matter(values: list[float], powers: tuple[float, float], times: int) -> None:
    assert index(values * times, *powers) == pytest.approx(index(values, *powers), abs=1e-9)


@given(VECTORS, PAIRS)
def test_p1_one_entry_that_grows_without_end_raises(values: list[float], powers: tuple[float, float]) -> None:
    big = 1e9 * sum(values)
    first = index([values[0] + big, *values[1:]], *powers)
    assert index([values[0] + 1000 * big, *values[1:]], *powers) >= first - 1e-9
    assert first >= index(values, *powers) - 1e-9


@given(VECTORS, PAIRS)
def test_p2_a_zero_more_raises(values: list[float], powers: tuple[float, float]) -> None:
    assert index([*values, 0.0], *powers) > index(values, *powers)


@given(VECTORS, PAIRS)
def test_range(values: list[float], powers: tuple[float, float]) -> None:
    p, q = powers
    assert 0 <= index(values, p, q) <= 1 - len(values) ** (1 / q - 1 / p) + 1e-12


# --- the mask counts ----------------------------------------------------------------------------


def test_removed_entries_do_not_exist_and_kept_zeros_do() -> None:
    values = torch.tensor([[1.0, 2.0, 0.0, 5.0, 9.0], [4.0, 1.0, 1.0, 0.0, 0.0]])
    mask = torch.tensor([[True, True, True, False, True], [True, True, False, False, False]])
    expected = [by_hand([1, 2, 0, 9], 0.5, 1), by_hand([4, 1], 0.5, 1)]
    assert pq_index(values, mask).tolist() == pytest.approx(expected)
    assert float(pq_index(values[1])) > float(pq_index(values[1], mask[1]))  # zeros in: rises with every round


def test_nothing_left_all_zero_or_one_entry_give_zero() -> None:
    values = torch.tensor([[1.0, 2.0], [0.0, 0.0], [3.0, 4.0]])
    mask = torch.tensor([[False, False], [True, True], [True, False]])
    assert pq_index(values, mask).tolist() == [0, 0, 0]
    assert gini(values, mask).tolist() == pytest.approx([0, 0, 0])
    assert pq_index(torch.zeros(3, 0)).tolist() == [0, 0, 0]


def test_extreme_sizes_neither_overflow_nor_vanish() -> None:
    for scale in (1e-300, 1e-160, 1e200):
        assert index([scale, 2 * scale, 3 * scale], 1, 2) == pytest.approx(index([1, 2, 3], 1, 2))


@pytest.mark.parametrize(("p", "q"), [(1.0, 1.0), (2.0, 1.0), (0.0, 1.0), (-1.0, 1.0)])
def test_powers_that_are_none_are_refused(p: float, q: float) -> None:
    with pytest.raises(SettingsError, match="0 < p < q"):
        index([1.0, 2.0], p, q)
    with pytest.raises(SettingsError, match="0 < p < q"):
        retained(torch.tensor(2), torch.tensor(0.1), p, q)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_is_refused_unless_it_was_removed(value: float) -> None:
    values = torch.tensor([1.0, value, 2.0])
    for measure in (pq_index, gini):
        with pytest.raises(NumericsError, match=r"fc\.weight"):
            measure(values, where="fc.weight")
    assert float(pq_index(values, torch.tensor([True, False, True]))) == pytest.approx(by_hand([1, 2], 0.5, 1))


def test_sums_of_parts_give_the_index_of_the_whole() -> None:
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    parts = [power_sums(part) for part in values.split(300)]
    count, low, high = (torch.tensor(sum(column), dtype=torch.float64) for column in zip(*parts, strict=True))
    assert float(index_of_sums(count, low, high, 0.5, 1.0)) == pytest.approx(float(pq_index(values)))


# --- the bound ----------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 10), min_size=2, max_size=10), PAIRS)
def test_theorem_holds_for_every_number_of_entries(values: list[float], powers: tuple[float, float]) -> None:
    """For any r the eta that r really has gives a bound of at most r (brute force over r)."""
    p, q = powers
    ordered = sorted(values, reverse=True)
    if ordered[0] < 1e-3:
        return
    for r in range(1, len(values) + 1):
        kept, gone = sum(v**p for v in ordered[:r]), sum(v**p for v in ordered[r:])
        bound = len(values) * (1 + gone / kept) ** (-q / (q - p)) * (1 - index(values, p, q)) ** (p * q / (q - p))
        assert bound <= r + 1e-6


def test_bound_by_hand() -> None:
    d, i = torch.tensor([100, 100, 10]), torch.tensor([0.19, 0.0, 0.5], dtype=torch.float64)
    assert retained(d, i, 0.5, 1.0).tolist() == [81, 100, 5]  # d (1 - I), pq/(q-p) = 1
    assert retained(d, i, 1.0, 2.0).tolist() == [66, 100, 3]  # d (1 - I)^2
    assert retained(d, i, 1.0, 2.0, eta=1.0).tolist() == [17, 25, 1]  # a quarter of it: 16.4, 25, 0.6


def test_official_value_of_a_linear_network() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    weights = torch.cat([p.detach().flatten() for p in model.parameters() if p.dim() > 1])
    assert float(pq_index(weights)) == pytest.approx(0.116089, abs=1e-6)


# --- Gini ---------------------------------------------------------------------------------------


@given(VECTORS)
def test_gini_is_the_mean_difference(values: list[float]) -> None:
    """Half the relative mean absolute difference over all pairs."""
    grown = [v + 1e-7 for v in values]
    brute = sum(abs(a - b) for a in grown for b in grown) / (2 * len(grown) * sum(grown))
    assert float(gini(torch.tensor(values, dtype=torch.float64))) == pytest.approx(brute, abs=1e-9)


def test_gini_of_masked_rows() -> None:
    values = torch.tensor([[3.0, -1.0, 8.0], [2.0, 2.0, 2.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    assert gini(values, mask).tolist() == pytest.approx([0.25, 0.0], abs=1e-6)
