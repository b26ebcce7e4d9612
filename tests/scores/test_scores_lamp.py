"""LAMP against its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.select import keep_global
from secateur.scores.weights import lamp


@settings(max_examples=60, deadline=None)
@given(rows=st.integers(1, 5), columns=st.integers(1, 6), seed=st.integers(0, 10**6), ties=st.booleans())
def test_the_definition_weight_by_weight(rows, columns, seed, ties):
    rng = torch.Generator().manual_seed(seed)
    W = (
        torch.randint(-3, 4, (rows, columns), generator=rng).float()
        if ties
        else torch.randn(rows, columns, generator=rng)
    )
    squares = [w**2 for w in W.double().flatten().tolist()]
    expected = [s / sum(v for v in squares if v >= s) if s else 0.0 for s in squares]
    found = lamp(W)
    assert found.shape == W.shape
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-12)


def test_order_inside_a_layer_is_that_of_magnitudes_and_the_largest_scores_one():
    W = torch.randn(7, 9, generator=torch.Generator().manual_seed(0))
    assert torch.equal(lamp(W).flatten().argsort(), W.abs().flatten().argsort())
    assert lamp(W).max() == 1


def test_small_half_precision_weights_stay_apart():
    W = torch.tensor([1e-4, 2e-4, 3e-4], dtype=torch.float16)  # squares underflow in float16
    assert (lamp(W).diff() > 0).all()


def test_a_common_factor_of_a_layer_does_not_matter_and_no_layer_is_emptied():
    rng = torch.Generator().manual_seed(1)
    first, second = torch.randn(200, generator=rng), torch.randn(50, generator=rng)
    plain = keep_global({"a": lamp(first), "b": lamp(second)}, 5)
    scaled = keep_global({"a": lamp(first), "b": lamp(second / 1024)}, 5)
    assert all(torch.equal(plain[name], scaled[name]) and plain[name].any() for name in plain)


def test_zeros_score_nothing():
    assert lamp(torch.zeros(4)).eq(0).all()
    assert lamp(torch.tensor([0.0, 2.0])).tolist() == [0.0, 1.0]
