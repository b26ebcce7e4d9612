"""Batches joined, drawn and balanced by class."""

import pytest
import torch

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.batches import balanced, drawn, joined, taken


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def labelled(labels, start=0):
    """Samples that say which they are: the input is the sample's number."""
    numbers = torch.arange(start, start + len(labels)).float().unsqueeze(1)
    return Batch((numbers,), {"scale": torch.tensor(2.0), "also": numbers + 0.5, "flag": True}, torch.tensor(labels))


def test_joined_keeps_the_order_and_what_is_no_tensor():
    whole = joined([labelled([0, 1]), labelled([1], start=2)])
    assert whole.args[0].flatten().tolist() == [0, 1, 2]
    assert whole.kwargs["also"].flatten().tolist() == [0.5, 1.5, 2.5]
    assert whole.kwargs["flag"] is True
    assert whole.target.tolist() == [0, 1, 1]


def test_one_batch_is_itself():
    batch = labelled([0, 1])
    assert joined([batch]) is batch


def test_batches_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match=r"shapes \[2\] and \[3\] cannot be joined"):
        joined([Batch((torch.zeros(1, 2),)), Batch((torch.zeros(1, 3),))])
    with pytest.raises(DataError, match="only some have labels"):
        joined([Batch((torch.zeros(1, 1),), target=torch.zeros(1)), Batch((torch.zeros(1, 1),))])
    with pytest.raises(DataError, match="not per sample"):
        joined([Batch((torch.zeros(2, 1),), {"scale": torch.tensor(s)}) for s in (1.0, 2.0)])
    with pytest.raises(DataError, match="not per sample"):
        joined([Batch((torch.zeros(2, 1),), {"flag": flag}) for flag in (True, None)])


def test_taken_leaves_what_is_not_per_sample():
    part = taken(labelled([5, 6, 7]), torch.tensor([2, 0]))
    assert part.args[0].flatten().tolist() == [2, 0]
    assert part.target.tolist() == [7, 5]
    assert part.kwargs["scale"] == 2.0


def test_drawn_is_without_repetition_and_depends_on_the_generator_alone():
    batches = [labelled([0] * 10), labelled([1] * 10, start=10)]
    first = drawn(batches, 8, rng(1)).args[0].flatten().tolist()
    assert len(set(first)) == 8
    torch.manual_seed(99)
    assert drawn(batches, 8, rng(1)).args[0].flatten().tolist() == first
    assert drawn(batches, 8, rng(2)).args[0].flatten().tolist() != first
    assert drawn(batches, 20, rng(1)).args[0].flatten().tolist() == list(range(20))


def test_balanced_gives_each_class_its_share_in_ascending_order():
    batches = [labelled([3, 1, 3, 3, 1, 3]), labelled([3, 3, 7], start=6)]
    groups = balanced(batches, 2, rng())
    assert [group.target.tolist() for group in groups] == [[1, 1], [3, 3], [7]]
    assert [group.samples for group in balanced(batches, 25, rng())] == [2, 6, 1]
    picks = {tuple(sorted(balanced(batches, 2, rng(seed))[1].args[0].flatten().tolist())) for seed in range(20)}
    assert len(picks) > 3  # drawn, not the first ones


@pytest.mark.parametrize("target", [None, torch.tensor([0.5]), torch.zeros(1, 3, dtype=torch.int64)])
def test_classes_need_one_index_per_sample(target):
    with pytest.raises(DataError, match="one class index"):
        balanced([Batch((torch.zeros(1, 1),), target=target)], 2, rng())
