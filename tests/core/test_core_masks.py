from math import prod

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur.core.errors import PlanError
from secateur.core.masks import pack, unpack

shapes = st.lists(st.integers(0, 7), min_size=0, max_size=4).map(tuple)


@settings(deadline=None, max_examples=150)
@given(shapes, st.integers(0, 2**32 - 1))
@example((0,), 0)
@example((), 1)
@example((3, 0, 2), 0)
@example((8,), 5)
@example((9,), 5)
def test_round_trip_with_one_bit_a_unit(shape, seed):
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) > 0.5
    packed = pack(mask)
    assert packed.dtype is torch.uint8
    assert packed.shape == ((prod(shape) + 7) // 8,)
    back = unpack(packed, shape, "site")
    assert back.dtype is torch.bool
    assert torch.equal(back, mask)


def test_the_first_unit_is_the_lowest_bit_and_the_tail_is_zero():
    mask = torch.tensor([[True, False, False], [False, True, True], [False, False, True], [True, True, True]])
    bits = "100011001111"
    assert pack(mask).tolist() == [int(bits[:8][::-1], 2), int(bits[8:][::-1], 2)]
    assert pack(torch.ones(9, dtype=torch.bool)).tolist() == [255, 1]


def test_views_are_packed_in_their_own_order():
    mask = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.5
    assert torch.equal(unpack(pack(mask.t()), (7, 5), "t"), mask.t())


@pytest.mark.parametrize(
    "packed",
    [
        torch.zeros(1, dtype=torch.uint8),
        torch.zeros(3, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
        torch.zeros(2, dtype=torch.int64),
    ],
)
def test_other_sizes_and_types_are_refused_with_the_name(packed):
    with pytest.raises(PlanError, match=rf"'fc\.weight' holds {packed.numel()} bytes, shape \(3, 4\) needs 2"):
        unpack(packed, (3, 4), "fc.weight")
