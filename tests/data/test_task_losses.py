"""Several targets in a batch, several losses of an output."""

import numpy
import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, ModelError, SettingsError, UnknownNameError
from secateur.core.method import Batch
from secateur.data.batches import as_batches, joined, loss_of, split_batch, taken
from secateur.data.losses import (
    cross_entropy,
    losses_from,
    mean_losses,
    name_of,
    refuse_heads_without_loss,
    refuse_unusable,
)
from secateur.shrink.verify import copied

IMAGES = torch.arange(10.0).view(5, 2)
TARGETS = {"kind": torch.arange(5), "size": torch.arange(10.0).view(5, 2)}


def both(output, batch):
    return {"kind": batch.targets["kind"].double().mean(), "size": (output - batch.targets["size"] - 1).square().mean()}


def test_a_mapping_of_targets_goes_through_every_change_of_a_batch():
    (batch,) = as_batches([(IMAGES, TARGETS)])
    assert batch.target is None
    assert batch.samples == 5
    assert [tuple(t.shape) for t in batch.tensors] == [(5, 2), (5,), (5, 2)]
    (named,) = as_batches([{"x": IMAGES, "labels": TARGETS}])
    assert list(named.kwargs) == ["x"]
    assert torch.equal(named.targets["size"], TARGETS["size"])
    parts = split_batch(batch, 2)
    assert [part.targets["kind"].tolist() for part in parts] == [[0, 1], [2, 3], [4]]
    whole = joined(parts)
    assert all(torch.equal(whole.targets[name], TARGETS[name]) for name in TARGETS)
    assert taken(batch, torch.tensor([4, 0])).targets["kind"].tolist() == [4, 0]
    clone = copied(batch)
    clone.targets["kind"][0] = 99
    assert TARGETS["kind"][0] == 0
    assert batch.to("meta").targets["size"].is_meta


def test_batches_with_other_targets_are_not_joined():
    with pytest.raises(DataError, match="differ"):
        joined([Batch((IMAGES,), targets=TARGETS), Batch((IMAGES,), targets={"kind": TARGETS["kind"]})])


def test_one_loss_of_several_targets_is_refused_by_name():
    with pytest.raises(DataError, match=r"several tasks \(kind, size\)"):
        loss_of(IMAGES, Batch((IMAGES,), targets=TARGETS))


def test_means_are_weighted_by_samples():
    whole = Batch((IMAGES,), targets=TARGETS)
    found = mean_losses(nn.Identity(), split_batch(whole, 3), both)  # 3 and 2 samples
    assert found == pytest.approx({"kind": 2.0, "size": 1.0})
    assert mean_losses(nn.Identity(), [whole], both) == pytest.approx(found)


def test_the_default_is_cross_entropy():
    batch = Batch((IMAGES,), target=torch.zeros(5, dtype=torch.int64))
    expected = nn.functional.cross_entropy(IMAGES, batch.target)
    assert losses_from("") is cross_entropy
    assert mean_losses(nn.Identity(), [batch], losses_from(""))["loss"] == pytest.approx(float(expected))


def test_a_function_by_name():
    assert losses_from("secateur.data.losses:cross_entropy") is cross_entropy
    assert name_of(cross_entropy) == "secateur.data.losses:cross_entropy"
    assert losses_from(both) is both
    with pytest.raises(UnknownNameError, match="cross_entropy"):
        losses_from("secateur.data.losses:cross_entrop")
    with pytest.raises(ModelError, match=r"module\.path:losses"):
        losses_from("no_colon")


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (lambda out, batch: out.mean(), "mapping"),
        (lambda out, batch: {}, "mapping"),
        (lambda out, batch: {"a": out}, "scalar"),
        (lambda out, batch: {"a": batch.targets["missing"]}, "KeyError"),
        (lambda out, batch: {f"a{len(out)}": out.mean()}, "another"),
    ],
)
def test_wrong_functions_are_refused(function, said):
    with pytest.raises(SettingsError, match=said):
        mean_losses(nn.Identity(), split_batch(Batch((IMAGES,)), 3), function)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ([1.0, 2.0], r"\[1.0, 2.0\]"),
        (None, "None"),
        ("1.0", "'1.0'"),
        (torch.ones(3), r"a torch.float32 tensor of shape \[3\]"),
        (torch.ones((), dtype=torch.complex64), r"a torch.complex64 tensor of shape \[\]"),
    ],
)
def test_values_that_are_no_scalars_are_refused_by_name(value, shown):
    with pytest.raises(SettingsError, match=rf"loss 'a' is {shown}; it must be a scalar tensor or a number"):
        mean_losses(nn.Identity(), [Batch((IMAGES,))], lambda out, batch: {"b": out.mean(), "a": value})


def test_numbers_and_tensors_of_one_element_are_scalars():
    values = {"a": 0.1, "b": 2, "c": numpy.float32(0.5), "d": torch.tensor([[3.0]]), "e": torch.tensor(4)}
    found = mean_losses(nn.Identity(), [Batch((IMAGES,))], lambda out, batch: values)
    assert found == {"a": 0.1, "b": 2.0, "c": 0.5, "d": 3.0, "e": 4.0}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_losses_that_nothing_can_be_relative_to_are_refused(value):
    with pytest.raises(DataError, match="'b'"):
        refuse_unusable({"a": 1.0, "b": value})


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(2, 1), nn.Linear(2, 1)

    def forward(self, x):
        return {"a": self.a(x), "b": self.b(x)}


def test_a_head_without_a_loss_is_refused_and_what_cannot_be_told_is_said():
    model, batch = TwoHeads(), Batch((IMAGES,))
    both_heads = {"a": lambda out: out["a"].square().mean(), "b": lambda out: out["b"].square().mean()}

    def of(**functions):
        return lambda out, batch: {name: function(out) for name, function in functions.items()}

    assert refuse_heads_without_loss(model, batch, of(**both_heads)) == []
    with pytest.raises(SettingsError, match="'b' of TwoHeads is of a task without a loss"):
        refuse_heads_without_loss(model, batch, of(a=both_heads["a"]))
    for blind in (lambda out: 1.5, lambda out: out["b"].detach().square().mean(), lambda out: torch.ones(())):
        (said,) = refuse_heads_without_loss(model, batch, of(a=both_heads["a"], b=blind))
        assert said.startswith("loss 'b' has no gradient, so it was not checked whether every head")
    (said,) = refuse_heads_without_loss(model, batch, of(a=lambda out: torch.from_numpy(out["a"].numpy()).mean()))
    assert "does not run with gradients, so it was not checked" in said
    assert all(parameter.grad is None for parameter in model.parameters())
