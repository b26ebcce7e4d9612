"""Budgets by importance: the mean is kept, nothing passes its size, and the paper's numbers come out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.allocate.importance import multiples, proportional, ranks, sigmoid, whole
from secateur.core.errors import BudgetError

MEASURED = {"0": 42.6e3, "1": 22.1e3, "2": 23.7e3, "3": 29.6e3}
SIZES = dict.fromkeys(MEASURED, 256)


def test_sigmoid_of_the_centred_importance():
    found = sigmoid(MEASURED)
    mean = sum(MEASURED.values()) / 4
    assert list(found.values()) == pytest.approx([1 / (1 + math.exp(-(v - mean) / 1e4)) for v in MEASURED.values()])
    assert [round(value, 2) for value in found.values()] == [0.79, 0.32, 0.36, 0.50]


def test_sigmoid_does_not_overflow():
    assert list(sigmoid({"a": 0.0, "b": 1e9}).values()) == pytest.approx([0, 1])


@pytest.mark.parametrize(
    ("sparsity", "expected"),
    [(0.2, [0.99, 0.69, 0.71, 0.81]), (0.4, [0.96, 0.39, 0.44, 0.61]), (0.6, [0.64, 0.26, 0.29, 0.41])],
)
def test_shares_of_four_measured_blocks(sparsity, expected):
    found = proportional(sigmoid(MEASURED), SIZES, 1 - sparsity)
    assert list(found.values()) == pytest.approx(expected, abs=0.006)
    assert sum(found.values()) / 4 == pytest.approx(1 - sparsity, abs=1e-9)


def test_without_the_rescale_the_shares_are_practically_even():
    small = {name: value * 64 * 96 / 131072 for name, value in MEASURED.items()}
    found = proportional(sigmoid(small), SIZES, 0.6)
    assert 0 < max(found.values()) - min(found.values()) < 0.03


def test_the_widest_layer_keeps_what_the_published_cap_leaves_it():
    assert max(proportional(sigmoid(MEASURED), SIZES, 0.8).values()) == pytest.approx(0.8 + 0.2 / 1.05)


weights = st.lists(st.floats(1e-6, 1), min_size=1, max_size=8)


@given(weights=weights, density=st.floats(0.01, 1), data=st.data())
def test_the_mean_is_kept_and_nothing_passes_its_size(weights, density, data):
    names = [str(index) for index in range(len(weights))]
    sizes = {name: data.draw(st.integers(1, 500)) for name in names}
    found = proportional(dict(zip(names, weights, strict=True)), sizes, density)
    everything = sum(sizes.values())
    assert sum(found[name] * size for name, size in sizes.items()) / everything == pytest.approx(density, abs=1e-6)
    assert all(0 <= value <= 1 + 1e-9 for value in found.values())
    total = round(density * everything)
    kept = whole(found, sizes, total, 0)
    assert sum(kept.values()) == total
    assert all(0 <= kept[name] <= sizes[name] for name in names)


@given(shares=st.lists(st.floats(0, 1), min_size=1, max_size=6), size=st.integers(1, 600), multiple=st.integers(1, 200))
def test_multiples_are_the_nearest_inside_the_layer(shares, size, multiple):
    names = [str(index) for index in range(len(shares))]
    found = multiples(dict(zip(names, shares, strict=True)), dict.fromkeys(names, size), multiple)
    for name, share in zip(names, shares, strict=True):
        assert found[name] % multiple == 0 or found[name] == size
        assert 0 < found[name] <= size
        inside = multiple <= share * size <= size - multiple
        assert not inside or abs(found[name] - share * size) <= multiple / 2 + 1e-9


def test_a_layer_that_keeps_little_still_gets_one_multiple():
    """The published code then takes the lowest score as its threshold and keeps the whole layer."""
    assert multiples({"a": 0.1}, {"a": 256}, 128) == {"a": 128}


def test_ranks_follow_importance_with_an_exact_mean():
    assert ranks({"a": 3.0, "b": 1.0}, 8) == {"a": 12, "b": 4}
    assert ranks({"a": 1.0, "b": 0.0, "c": 0.0}, 2) == {"a": 4, "b": 1, "c": 1}
    assert ranks({"a": 0.0, "b": 0.0}, 3) == {"a": 3, "b": 3}
    with pytest.raises(BudgetError, match="mean rank of 0"):
        ranks({"a": 1.0}, 0)
