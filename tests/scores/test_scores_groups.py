"""Numbers per index added up per unit: every path against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.units import Occurrence, Site, UnitKind
from secateur.scores.groups import Combine, combined, group_scores, over_others, per_unit

QUICK = settings(max_examples=100, deadline=None)


@st.composite
def places(draw: st.DrawFn) -> tuple[Occurrence, int, int]:
    """An occurrence with its number of units and the length of the dimension that it needs."""
    units, inner, outer = (draw(st.integers(1, n)) for n in (5, 3, 3))
    offset, gap = draw(st.integers(0, 4)), draw(st.integers(0, 3))
    period = units * inner + gap
    place = Occurrence("p", 0, offset, inner, inner, outer, period if outer > 1 else 0)
    return place, units, offset + outer * period + draw(st.integers(0, 2))


@QUICK
@given(places())
def test_per_unit_is_a_loop_over_indices(case):
    place, units, length = case
    vector = torch.arange(length).double() ** 2
    by_hand = [
        sum(
            vector[place.offset + t * place.period + unit * place.stride + r].item()
            for t in range(place.times)
            for r in range(place.repeat)
        )
        for unit in range(units)
    ]
    assert per_unit(place, units, vector).tolist() == by_hand


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        (Occurrence("p", 0), [0, 1, 2]),
        (Occurrence("p", 0, offset=4), [4, 5, 6]),
        (Occurrence("p", 0, stride=2, repeat=2), [0 + 1, 2 + 3, 4 + 5]),
        (Occurrence("p", 0, times=2, period=3), [0 + 3, 1 + 4, 2 + 5]),
        (Occurrence("p", 0, stride=2, repeat=1), [0, 2, 4]),
        (Occurrence("p", 0, 1, 2, 2, 2, 6), [1 + 2 + 7 + 8, 3 + 4 + 9 + 10, 5 + 6 + 11 + 12]),
    ],
)
def test_per_unit_by_hand(place, expected):
    assert per_unit(place, 3, torch.arange(13).float()).tolist() == expected


PARTS = [torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, -1.0])]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        (Combine.SUM, [6.0, 3.0, 7.0]),
        (Combine.MEAN, [2.0, 1.0, 7 / 3]),
        (Combine.MAX, [4.0, 2.0, 5.0]),
        (Combine.PRODUCT, [4.0, 0.0, -15.0]),
        (Combine.FIRST, [1.0, 2.0, 3.0]),
    ],
)
def test_combined_by_hand(how, expected):
    assert combined(PARTS, how).tolist() == pytest.approx(expected)
    assert torch.equal(combined(PARTS[:1], how), PARTS[0])


def two_sites() -> dict[str, Site]:
    return {
        "heads": Site(
            "heads",
            UnitKind.HEAD,
            (2,),
            occurrences=(Occurrence("q", 0, 0, 2, 2), Occurrence("o", 1, 0, 2, 2), Occurrence("bias", 0, 0, 2, 2)),
        ),
        "dims": Site("dims", UnitKind.HEAD_DIM, (2,), occurrences=(Occurrence("q", 0, 0, 1, 1, 2, 2),)),
        "silent": Site("silent", UnitKind.NEURON, (3,), occurrences=(Occurrence("other", 0),)),
    }


def test_sites_share_vectors_and_each_is_asked_for_once():
    asked: list[tuple[str, int]] = []
    vectors = {("q", 0): torch.tensor([1.0, 2.0, 4.0, 8.0]), ("o", 1): torch.tensor([10.0, 20.0, 40.0, 80.0])}

    def vector(name: str, dim: int) -> Tensor | None:
        asked.append((name, dim))
        return vectors.get((name, dim))

    found = group_scores(two_sites(), vector)
    assert {name: score.tolist() for name, score in found.items()} == {"heads": [33.0, 132.0], "dims": [5.0, 10.0]}
    assert sorted(asked) == [("bias", 0), ("o", 1), ("other", 0), ("q", 0)]


@pytest.mark.parametrize("how", list(Combine))
def test_combining_is_over_occurrences(how):
    vectors = {("q", 0): torch.tensor([1.0, 2.0, 4.0, 8.0]), ("o", 1): torch.tensor([10.0, 20.0, 40.0, 80.0])}
    found = group_scores(two_sites(), lambda name, dim: vectors.get((name, dim)), how)
    parts = [torch.tensor([3.0, 12.0]), torch.tensor([30.0, 120.0])]
    assert torch.equal(found["heads"], combined(parts, how))


@QUICK
@given(st.integers(1, 4), st.integers(0, 3), st.sampled_from([1.0, 2.0, 3.0, 0.5]), st.integers(0, 9))
def test_over_others_is_a_sum_over_everything_else(dims, which, power, seed):
    rng = torch.Generator().manual_seed(seed)
    tensor = torch.randn([2, 3, 4, 2][:dims], generator=rng)
    which %= dims
    found = over_others(tensor, which, power)
    by_hand = [float((tensor.select(which, i).double().abs() ** power).sum()) for i in range(tensor.shape[which])]
    assert found.tolist() == pytest.approx(by_hand, rel=1e-5)
    assert found.dtype == torch.float32


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_weight_itself_is_not_changed(power, dtype):
    tensor = torch.tensor([[-2.0, 1.0], [3.0, -4.0]], dtype=dtype)
    before = tensor.clone()
    over_others(tensor, 0, power)
    over_others(tensor[0], 0, power)
    assert torch.equal(tensor, before)


def test_weights_that_need_gradients_give_scores_that_do_not():
    weight = torch.nn.Parameter(torch.randn(3, 4))
    assert not over_others(weight, 0).requires_grad
