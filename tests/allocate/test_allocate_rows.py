"""Which weights of one layer stay: who competes with whom."""

from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.allocate.rows import Compare, choose_in_layer, cumulative_share
from secateur.core.budget import Budget
from secateur.core.errors import BudgetError


def scores(rows, columns, seed=0):
    return torch.randint(0, 50, (rows, columns), generator=torch.Generator().manual_seed(seed)).float()


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 8), columns=st.integers(1, 30), percent=st.integers(0, 99), seed=st.integers(0, 999))
def test_counts_are_exact_whatever_ties(rows, columns, percent, seed):
    values, budget = scores(rows, columns, seed), Budget(percent / 100)
    by_row = choose_in_layer(values, budget, "layer")
    assert ((~by_row).sum(1) == floor(round(percent / 100 * columns, 6))).all()
    by_layer = choose_in_layer(values, budget, "layer", compare=Compare.LAYER)
    assert int((~by_layer).sum()) == floor(round(percent / 100 * rows * columns, 6))
    for one, keep in ((values, by_row), (values.view(1, -1), by_layer.view(1, -1))):
        low = one.masked_fill(~keep, torch.inf).amin(1)
        high = one.masked_fill(keep, -torch.inf).amax(1)
        assert (low >= high).all()


def test_rows_and_the_layer_choose_differently():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]])
    assert choose_in_layer(values, Budget(0.5), "x").tolist() == [[False, False, True, True]] * 2
    assert choose_in_layer(values, Budget(0.5), "x", compare=Compare.LAYER).tolist() == [[False] * 4, [True] * 4]


def test_the_floor_holds_in_every_row():
    assert choose_in_layer(scores(5, 8), Budget(0.9, floor=3), "x").sum(1).tolist() == [3] * 5


def test_a_pattern_goes_before_everything_else():
    values = torch.tensor([[1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0]])
    for more in ({}, {"variant": True}, {"compare": Compare.LAYER}):
        assert choose_in_layer(values, Budget.nm("1:4"), "x", **more)[0].nonzero().flatten().tolist() == [3, 4]
    with pytest.raises(BudgetError, match="my layer"):
        choose_in_layer(scores(2, 6), Budget.nm("2:4"), "my layer")


def test_the_variant_by_hand():
    """At share alpha a row loses the longest prefix of its sorted scores that sums to at most alpha of the whole."""
    values = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0], [1.0, 2, 3, 4, 5, 6, 7, 8, 9, 55]])
    # alpha 0.4: the first row loses its first 4, with all that tie; the second, 40 of 100, its first 8 (36)
    keep = cumulative_share(values, 0.9)
    assert keep[1].tolist() == [False] * 8 + [True] * 2
    assert not keep[0].any()
    assert cumulative_share(values, 0.0).all()
    # out of reach: alpha ends at 0.8, and 80 of 100 are the first 9 (45), not the last
    assert cumulative_share(values[1:], 0.99).tolist() == [[False] * 9 + [True]]


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.65])
def test_the_variant_meets_the_layer_s_sparsity_with_uneven_rows(sparsity):
    values = torch.rand(60, 100, generator=torch.Generator().manual_seed(0)) ** torch.linspace(1, 4, 60)[:, None]
    keep = cumulative_share(values, sparsity)
    assert abs((~keep).float().mean().item() - sparsity) <= 2e-3
    assert (~keep).sum(1).min() < (~keep).sum(1).max()
