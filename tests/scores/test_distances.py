"""Sums of distances: against plain loops in double precision, in blocks, for equal rows and rows of zeros."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.scores import distances
from secateur.scores.distances import Distance, distance_sums


def rows(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def by_loops(x: Tensor, distance: Distance) -> Tensor:
    """One pair after the other."""
    x = x.double()
    found = torch.zeros(len(x), dtype=torch.float64)
    for i in range(len(x)):
        for j in range(len(x)):
            match distance:
                case Distance.L2:
                    found[i] += (x[i] - x[j]).square().sum().sqrt()
                case Distance.L1:
                    found[i] += (x[i] - x[j]).abs().sum()
                case Distance.COS:
                    found[i] += 1 - (x[i] @ x[j]) / (x[i].square().sum() * x[j].square().sum()).sqrt()
    return found


@pytest.mark.parametrize("distance", Distance)
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (7, 5), (40, 3), (30, 60)])
def test_sums_are_those_of_plain_loops(distance, n, d):
    x = rows(n, d)
    assert torch.allclose(distance_sums(x, distance), by_loops(x, distance), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("distance", [Distance.L2, Distance.L1])
@pytest.mark.parametrize("block", [1, 20, 45, 200])
def test_blocks_do_not_matter(distance, block, monkeypatch):
    x = rows(13, 4)
    whole = distance_sums(x, distance)
    monkeypatch.setattr(distances, "BLOCK", block)
    assert torch.allclose(distance_sums(x, distance), whole, rtol=1e-6)


def test_nearly_equal_rows_far_from_the_origin_keep_their_distances():
    """From products of rows these distances would be noise."""
    x = rows(40, 200) / 64 + 100
    exact = by_loops(x, Distance.L2)
    assert torch.allclose(distance_sums(x), exact, rtol=1e-5)
    products = torch.cdist(x, x, compute_mode="use_mm_for_euclid_dist").double().sum(1)
    assert not torch.allclose(products, exact, rtol=1e-1)
    assert not distance_sums(x[:1].repeat(40, 1)).any()


def test_by_hand():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 4.0]])
    assert distance_sums(x).tolist() == pytest.approx([9, 8, 7])
    assert distance_sums(x, Distance.L1).tolist() == pytest.approx([11, 10, 7])
    assert distance_sums(x[1:], Distance.COS).tolist() == pytest.approx([0.2, 0.2])


def test_a_row_of_zeros_has_no_direction_and_is_lowest():
    x = torch.cat([rows(5, 3), torch.zeros(1, 3)])
    found = distance_sums(x, Distance.COS)
    assert found[5] == 0
    assert (found[:5] > 0).all()
    assert torch.isnan(distance_sums(torch.tensor([[float("nan"), 1.0], [1.0, 1.0]]), Distance.COS)).any()


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 12), st.integers(1, 6), st.integers(0, 1000))
def test_invariants(n, d, seed):
    """Moving all rows changes no distance; turning lengths changes no angle; order does not matter."""
    x = rows(n, d, seed)
    for distance in (Distance.L2, Distance.L1):
        assert torch.allclose(distance_sums(x + 3 * x[0], distance), distance_sums(x, distance), rtol=1e-4, atol=1e-4)
    lengths = torch.rand(n, 1, generator=torch.Generator().manual_seed(seed)) + 0.1
    assert torch.allclose(distance_sums(x * lengths, Distance.COS), distance_sums(x, Distance.COS), atol=1e-5)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(distance_sums(x[order]), distance_sums(x)[order], rtol=1e-5, atol=1e-6)
