"""Batches made anew: joined, split, or noise of the same shapes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.calibration import normal_like, regrouped


@settings(max_examples=50, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6), size=st.integers(1, 12))
def test_the_same_samples_in_the_same_order(sizes, size):
    batches, start = [], 0
    for count in sizes:
        x = torch.arange(start, start + count)
        batches.append(Batch((x[:, None].float(),), {"ids": x}, target=x))
        start += count
    found = regrouped(batches, size)
    assert torch.cat([batch.args[0] for batch in found]).flatten().tolist() == list(range(start))
    assert torch.cat([batch.kwargs["ids"] for batch in found]).tolist() == list(range(start))
    assert all(batch.samples <= size and batch.target is None for batch in found)
    assert all(a.samples + b.samples > size for a, b in pairwise(found) if set(sizes) == {1})


def test_what_cannot_be_joined_stays_apart():
    wide, narrow = Batch((torch.zeros(2, 3),)), Batch((torch.zeros(2, 2),))
    flagged = Batch((torch.zeros(2, 3),), {"flag": True})
    shared = Batch((torch.zeros(2, 3), torch.zeros(1, 3)))
    double = Batch((torch.zeros(2, 3).double(),))
    for other in (narrow, flagged, shared, double):
        assert [batch.samples for batch in regrouped([wide, other, wide], 9)] == [2, 2, 2]
    assert [batch.samples for batch in regrouped([wide, wide, wide], 4)] == [4, 2]
    assert [batch.samples for batch in regrouped([flagged, flagged], 9)] == [2, 2]


def test_noise_has_the_shapes_and_follows_its_generator():
    batch = Batch((torch.zeros(200, 5),), {"scale": torch.zeros(200, dtype=torch.float64), "flag": True})
    first, again = (normal_like(batch, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.args[0], again.args[0])
    assert first.args[0].shape == (200, 5)
    assert first.kwargs["scale"].dtype is torch.float64
    assert first.kwargs["flag"] is True
    assert abs(float(first.args[0].mean())) < 0.1 < abs(float(first.args[0].std()))
    assert float(first.args[0].std()) == pytest.approx(1, abs=0.1)
    with pytest.raises(DataError, match="integers"):
        normal_like(Batch((torch.zeros(2, 3, dtype=torch.long),)), torch.Generator())
