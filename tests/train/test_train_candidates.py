"""Candidate subsets: all ways or a fair sample of them, distinct, sorted, the same for the same seed."""

from itertools import combinations, product
from math import comb

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.core.errors import BudgetError
from secateur.core.trees import load_tree, save_tree
from secateur.train.candidates import Candidates, candidates

LENET = [45, 120, 210, 252, 210, 120, 45]  # ways to remove 2 to 8 of 10 filters, as the paper lists them


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(("gone", "ways"), list(enumerate(LENET, start=2)))
def test_all_ways_of_one_layer(gone, ways):
    found = candidates({"conv1": (10, gone)}, 1000, rng())
    assert len(found) == found.ways == ways
    assert found.exhaustive
    assert [one[0] for one in found.removed] == list(combinations(range(10), gone))


def test_all_ways_of_two_layers_are_every_pair():
    found = candidates({"a": (4, 2), "b": (3, 1)}, 18, rng())
    expected = set(product(combinations(range(4), 2), combinations(range(3), 1)))
    assert set(found.removed) == expected
    assert len(found) == 18
    assert found.named(found.removed[1]) == {"a": [0, 1], "b": [1]}


@given(
    st.lists(st.tuples(st.integers(2, 7), st.integers(0, 6)).filter(lambda s: s[1] < s[0]), min_size=1, max_size=3),
    st.integers(1, 60),
    st.integers(0, 3),
)
def test_a_sample_is_distinct_sorted_legal_and_repeatable(shape, limit, seed):
    removals = {str(i): one for i, one in enumerate(shape)}
    found = candidates(removals, limit, rng(seed))
    ways = 1
    for units, gone in shape:
        ways *= comb(units, gone)
    assert len(found) == min(limit, ways)
    assert found.exhaustive == (limit >= ways)
    assert len(set(found.removed)) == len(found)
    assert list(found.removed) == sorted(found.removed)
    for removed in found.removed:
        for (units, gone), chosen in zip(shape, removed, strict=True):
            assert len(set(chosen)) == gone
            assert list(chosen) == sorted(chosen)
            assert all(0 <= unit < units for unit in chosen)
    assert candidates(removals, limit, rng(seed)) == found


@pytest.mark.parametrize("limit", [5, 12])  # by drawing again, by drawing from the list
def test_a_sample_is_fair(limit):
    counts = dict.fromkeys(combinations(range(6), 3), 0)
    for seed in range(400):
        for (removed,) in candidates({"a": (6, 3)}, limit, rng(seed)).removed:
            counts[removed] += 1
    expected = 400 * limit / 20
    assert sum((count - expected) ** 2 for count in counts.values()) / expected < 43.8  # chi-square, 19 df, 0.1 %


def test_more_than_there_are_stops():
    assert len(candidates({"a": (3, 1), "b": (2, 1)}, 10**9, rng())) == 6


def test_many_ways_are_not_listed():
    found = candidates({str(i): (64, 32) for i in range(8)}, 5, rng())
    assert len(found) == 5
    assert found.ways == comb(64, 32) ** 8


@pytest.mark.parametrize("removal", [(3, 3), (3, 4), (3, -1)])
def test_what_cannot_go_is_refused(removal):
    with pytest.raises(BudgetError, match="'conv' has 3 units and cannot lose"):
        candidates({"fine": (3, 1), "conv": removal}, 5, rng())


def test_stored_and_read_again(tmp_path):
    found = candidates({"a": (6, 3), "b": (5, 2)}, 7, rng())
    save_tree(found.to_data(), tmp_path / "stored")
    assert Candidates.from_data(load_tree(tmp_path / "stored")) == found
