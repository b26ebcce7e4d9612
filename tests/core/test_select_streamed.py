"""One ranking over many scores without joining them is that of a sort, whatever the ties, the order and the sample."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core import select
from secateur.core.select import all_finite, any_nan, count_true, keep_global, keep_top, places


def sorted_out(scores, keep):
    """By a stable sort of everything."""
    flat = torch.cat([score.reshape(-1).double() for score in scores.values()])
    mask = torch.ones(len(flat), dtype=torch.bool)
    mask[flat.sort(stable=True).indices[: len(flat) - keep]] = False
    found = torch.split(mask, [score.numel() for score in scores.values()])
    return {name: part.view(score.shape) for (name, score), part in zip(scores.items(), found, strict=True)}


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_the_streamed_ranking_is_that_of_a_sort(data):
    sizes = data.draw(st.lists(st.integers(1, 90), min_size=1, max_size=4))
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))  # few levels: many ties, also at the ends of the bracket
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    scores = {str(i): torch.randint(levels, (n,), generator=rng).to(dtype) for i, n in enumerate(sizes)}
    if data.draw(st.booleans()):
        scores = {name: score.sort().values for name, score in scores.items()}  # misleads a strided sample
    keep = data.draw(st.integers(0, sum(sizes)))
    before = select.SAMPLE, select.CHUNK, select.FEW
    select.SAMPLE, select.CHUNK, select.FEW = (
        data.draw(st.sampled_from([2, 8])),
        16,
        data.draw(st.sampled_from([0, 999])),
    )
    try:
        found = keep_global(scores, keep)
    finally:
        select.SAMPLE, select.CHUNK, select.FEW = before
    expected = sorted_out(scores, keep)
    assert all(torch.equal(found[name], expected[name]) for name in scores)


def test_more_scores_than_a_sample():
    scores = {str(i): torch.randn(150_000, generator=torch.Generator().manual_seed(i)) for i in range(3)}
    scores["2"][::3] = scores["0"][7]  # a third of a tensor ties
    for keep in (1, 1000, 200_000, 300_000, 449_999):
        expected = sorted_out(scores, keep)
        found = keep_global(scores, keep)
        assert all(torch.equal(found[name], expected[name]) for name in scores)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_one_pass_finds_what_two_would(value):
    tensor = torch.ones(50)
    tensor[[3, 7, 11, 20]] = value  # several large ones overflow a sum
    assert any_nan(tensor) == bool(tensor.isnan().any())
    assert all_finite(tensor) == bool(tensor.isfinite().all())
    tensor[20] = -value  # and infinities of both signs make a NaN that was not there
    assert any_nan(tensor) == bool(tensor.isnan().any())
    assert all_finite(tensor) == bool(tensor.isfinite().all())


@given(st.lists(st.booleans(), max_size=40))
def test_places_and_counts(bits):
    mask = torch.tensor(bits, dtype=torch.bool)
    assert places(mask).tolist() == [i for i, bit in enumerate(bits) if bit]
    assert count_true(mask) == sum(bits)
    assert places(mask.view(1, -1).expand(2, -1)).tolist() == [*places(mask).tolist()] + [
        i + len(bits) for i in places(mask).tolist()
    ]


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_few_of_many_are_those_of_a_sort(data):
    n = data.draw(st.integers(8, 200))
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]))
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    scores = torch.randint(levels, (n,), generator=rng).to(data.draw(st.sampled_from([torch.float32, torch.float64])))
    if data.draw(st.booleans()):
        scores[::16] = -1  # a strided sample misses everything that is large
    keep = data.draw(st.integers(1, max(1, n // 8)))
    assert torch.equal(select._few_highest(scores, keep), sorted_out({"it": scores}, keep)["it"])


def test_long_rows_of_which_few_stay():
    scores = torch.randn(100_000, generator=torch.Generator().manual_seed(0))
    scores[5::9] = scores.sort().values[-200]  # a ninth of all ties near the top
    for keep in (1, 150, 9000, 12_499):
        assert torch.equal(keep_top(scores, keep), sorted_out({"it": scores}, keep)["it"])
