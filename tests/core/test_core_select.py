import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from secateur.core.budget import Pattern
from secateur.core.errors import BudgetError, NumericsError
from secateur.core.select import keep_global, keep_pattern, keep_top

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64]
# few values, so that almost every draw has ties at the threshold
values = st.sampled_from([-3.0, -0.0, 0.0, 0.5, 1.0, 1.0, 2.0])
infinite = st.sampled_from([float("-inf"), -1.0, -0.0, 0.0, 3.0, float("inf")])


def oracle(row, keep):
    """The `len - keep` first of a stable ascending sort go; Python's sort on Python numbers."""
    order = sorted(range(len(row)), key=lambda index: row[index])
    gone = set(order[: len(row) - keep])
    return [index not in gone for index in range(len(row))]


@st.composite
def scored(draw):
    rows, columns = draw(st.integers(0, 4)), draw(st.integers(0, 40))
    dtype = draw(st.sampled_from(DTYPES))
    element = draw(st.sampled_from([values, infinite])) if dtype.is_floating_point else values
    data = [draw(st.lists(element, min_size=columns, max_size=columns)) for _ in range(rows)]
    return torch.tensor(data, dtype=torch.float64).view(rows, columns).to(dtype), draw(st.integers(0, columns))


@settings(deadline=None, max_examples=200)
@given(scored())
@example((torch.zeros(3, 7), 4))
@example((torch.tensor([[0.0, -0.0, 0.0, -0.0]]), 2))
@example((torch.full((2, 5), float("inf")), 3))
@example((torch.full((2, 5), float("-inf"), dtype=torch.bfloat16), 3))
def test_every_row_is_a_stable_sort_with_an_exact_count(case):
    scores, keep = case
    mask = keep_top(scores, keep)
    assert mask.dtype is torch.bool
    assert mask.shape == scores.shape
    assert mask.tolist() == [oracle(row, keep) for row in scores.tolist()]
    # one row alone, without the leading dimension, decides the same
    for row, of_all in zip(scores, mask, strict=True):
        assert torch.equal(keep_top(row, keep), of_all)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_equal_scores_in_a_long_row(dtype):
    scores = torch.randint(0, 3, (3, 5000), generator=torch.Generator().manual_seed(1)).to(dtype)
    for keep in (1, 17, 2500, 4999):
        assert keep_top(scores, keep).tolist() == [oracle(row, keep) for row in scores.tolist()]


def test_leading_dimensions_and_views():
    scores = torch.randn(2, 3, 4, 10, generator=torch.Generator().manual_seed(2)).permute(1, 0, 3, 2)
    mask = keep_top(scores, 1)
    assert torch.equal(mask.nonzero()[:, -1], scores.argmax(-1).flatten())


def test_neighbours_beyond_single_precision_are_told_apart():
    floats = torch.tensor([1 + 1e-12, 1.0, 1 + 2e-12], dtype=torch.float64)
    integers = torch.tensor([2**40 + 1, 2**40, 2**40 + 2])
    assert keep_top(floats, 2).tolist() == keep_top(integers, 2).tolist() == [True, False, True]
    assert keep_global({"a": floats[:1], "b": floats[1:]}, 2)["b"].tolist() == [False, True]
    assert keep_global({"a": integers[:1], "b": integers[1:]}, 2)["b"].tolist() == [False, True]
    # the widest dtype of all decides: as float32 the first two would tie and "a" would go
    mixed = keep_global({"a": floats[:1], "b": torch.ones(1)}, 1)
    assert mixed["a"].item()
    assert not mixed["b"].item()


def test_scores_are_not_changed_and_may_need_gradients():
    scores = torch.tensor([3.0, 1.0, 2.0], requires_grad=True)
    assert keep_top(scores, 1).tolist() == [True, False, False]
    assert scores.tolist() == [3.0, 1.0, 2.0]


@pytest.mark.parametrize("keep", [-1, 4])
def test_unreachable_counts_give_the_range(keep):
    with pytest.raises(BudgetError, match=rf"cannot keep {keep} of 3 units; the reachable range is 0 to 3"):
        keep_top(torch.zeros(3), keep)


def test_nan_is_refused_and_named():
    bad = torch.tensor([[1.0, float("nan"), 2.0, 3.0]])
    with pytest.raises(NumericsError, match="NaN"):
        keep_top(bad, 2)
    for keep in (0, 2, 4, 5):
        with pytest.raises(NumericsError, match=r"^second: "):
            keep_global({"first": torch.zeros(1, 1), "second": bad}, keep)
    with pytest.raises(NumericsError, match=r"^fc1\.weight: "):
        keep_pattern(bad, Pattern(2, 4), "fc1.weight")


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_global_ranking_with_ties_in_mapping_order(data):
    shapes = data.draw(st.lists(st.sampled_from([(2, 3), (4,), (1, 2, 2), (0, 3)]), min_size=1, max_size=4))
    sizes = [torch.Size(shape).numel() for shape in shapes]
    flat = data.draw(st.lists(values, min_size=sum(sizes), max_size=sum(sizes)))
    keep = data.draw(st.integers(0, len(flat)))
    parts = torch.split(torch.tensor(flat, dtype=torch.float32), sizes)
    # names in anything but alphabetical order
    scores = {f"site{9 - i}": part.view(shape) for i, (part, shape) in enumerate(zip(parts, shapes, strict=True))}
    masks = keep_global(scores, keep)
    assert list(masks) == list(scores)
    assert [masks[name].shape for name in scores] == [torch.Size(shape) for shape in shapes]
    assert torch.cat([mask.flatten() for mask in masks.values()]).tolist() == oracle(flat, keep)


def test_global_ranking_over_different_dtypes():
    scores = {"half": torch.tensor([1.0, 3.0], dtype=torch.bfloat16), "full": torch.tensor([2.0, 0.5])}
    masks = keep_global(scores, 2)
    assert masks["half"].tolist() == [False, True]
    assert masks["full"].tolist() == [True, False]


@settings(deadline=None, max_examples=100)
@given(st.data(), st.sampled_from([(2, 4), (4, 8), (1, 4), (3, 4), (1, 2)]), st.sampled_from(DTYPES))
def test_patterns_keep_the_first_number_of_the_second(data, numbers, dtype):
    pattern = Pattern(*numbers)
    rows, groups = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 4))
    columns = groups * pattern.of
    flat = data.draw(st.lists(values, min_size=rows * columns, max_size=rows * columns))
    scores = torch.tensor(flat).view(rows, columns).to(dtype)
    mask = keep_pattern(scores, pattern)
    assert mask.shape == scores.shape
    for row, kept in zip(scores.tolist(), mask.tolist(), strict=True):
        for start in range(0, columns, pattern.of):
            part = slice(start, start + pattern.of)
            assert kept[part] == oracle(row[part], pattern.keep)


def test_one_of_four_keeps_one_and_three_of_four_keeps_three():
    scores = torch.tensor([[4.0, 1.0, 3.0, 2.0]])
    assert keep_pattern(scores, Pattern.parse("1:4")).tolist() == [[True, False, False, False]]
    assert keep_pattern(scores, Pattern.parse("3:4")).tolist() == [[True, False, True, True]]


def test_a_width_that_does_not_divide_names_the_layer_and_both_numbers():
    with pytest.raises(BudgetError, match=r"layers\.0\.fc: 6 inputs .* groups of 4 .*2:4.*--exclude 'layers\.0\.fc'"):
        keep_pattern(torch.zeros(8, 6), Pattern(2, 4), "layers.0.fc")
