import itertools
import json
import math

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError
from secateur.data.dataset import DataKind, Dataset
from secateur.measure import Metric, accuracy, perplexity, quality


class Table(nn.Module):
    """Gives the logits row of each sample's (or token's) id."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, x):
        return self.logits[x]


def labelled(inputs, targets, kind=DataKind.TEXT):
    return Dataset("d", kind, torch.tensor(inputs), torch.tensor(targets))


def text(tokens):
    return Dataset("t", DataKind.TEXT, tokens)


def test_accuracy_by_hand():
    model = Table(torch.tensor([[2.0, 1.0], [0.0, 3.0]]))
    found = accuracy(model, labelled([0, 1, 0, 1], [0, 1, 1, 1]), batch_size=3)
    assert found.value == 0.75
    assert found.values.tolist() == [1, 1, 0, 1]
    assert (found.metric, found.samples, found.higher_is_better, found.broken) == (Metric.ACCURACY, 4, True, 0)


def test_nan_logits_are_neither_right_nor_wrong():
    model = Table(torch.tensor([[torch.nan, 1.0], [0.0, 3.0]]))
    found = accuracy(model, labelled([0, 1], [0, 1]))
    assert math.isnan(found.value)
    assert found.broken == 1
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["value"] == "nan"


@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_perplexity_against_a_plain_loop(batch_size):
    rng = torch.Generator().manual_seed(1)
    logits = torch.randn(11, 11, generator=rng) * 3
    tokens = torch.randint(11, (7, 6), generator=rng)
    windows = []
    for window in tokens.tolist():
        losses = []
        for here, after in itertools.pairwise(window):
            row = logits[here].double().tolist()
            losses.append(math.log(sum(math.exp(value) for value in row)) - row[after])
        windows.append(sum(losses) / len(losses))
    found = perplexity(Table(logits), text(tokens), batch_size)
    assert found.value == pytest.approx(math.exp(sum(windows) / len(windows)), rel=1e-6)
    assert found.values.tolist() == pytest.approx(windows, rel=1e-6)
    assert not found.higher_is_better


def test_uniform_model_has_the_vocabulary_as_perplexity():
    assert perplexity(Table(torch.zeros(9, 9)), text(torch.arange(8).view(2, 4))).value == pytest.approx(9)


@pytest.mark.parametrize(("bad", "value"), [(torch.nan, "nan"), (-torch.inf, "inf"), (-2000.0, "inf")])
def test_broken_losses_are_shown(bad, value):
    logits = torch.zeros(3, 3)
    logits[0, 1] = bad
    found = perplexity(Table(logits), text(torch.tensor([[0, 1], [2, 2]])))
    assert str(found.value) == value
    assert found.broken == (0 if bad == -2000.0 else 1)  # a loss of 2000 is finite, its exponential is not
    assert found.to_json()["value"] == value


def test_the_metric_follows_the_data():
    assert quality(Table(torch.eye(2)), labelled([0, 1], [0, 1])).metric is Metric.ACCURACY
    assert quality(Table(torch.eye(2)), text(torch.zeros(2, 3, dtype=torch.int64))).metric is Metric.PERPLEXITY
    with pytest.raises(DataError, match="no labels"):
        quality(Table(torch.eye(2)), Dataset("d", DataKind.IMAGE, torch.zeros(1, 1, 2, 2)))


@pytest.mark.parametrize(
    ("model", "dataset", "message"),
    [
        (Table(torch.eye(3)), labelled([0, 1], [0, 3]), "labels from 0 to 3"),
        (Table(torch.eye(3)), labelled([0, 1], [-1, 1]), "labels from -1"),
        (Table(torch.zeros(2, 3, 3)), labelled([0, 1], [0, 1]), r"\[2, 3, 3\]"),
        (Table(torch.eye(3)), text(torch.zeros(2, 1, dtype=torch.int64)), "length of 2 or more"),
        (Table(torch.eye(3)), text(torch.zeros(2, 4)), "int64"),
        (Table(torch.zeros(3, 2)), text(torch.full((1, 4), 2)), "vocabulary"),
        (Table(torch.zeros(3)), text(torch.zeros(2, 4, dtype=torch.int64)), "causal language model"),
    ],
)
def test_data_that_does_not_fit(model, dataset, message):
    with pytest.raises(DataError, match=message):
        quality(model, dataset)


def test_dropout_is_off_and_mode_restored():
    model = nn.Sequential(Table(torch.eye(4) * 9), nn.Dropout(0.9)).train()
    assert quality(model, labelled([0, 1, 2, 3], [0, 1, 2, 3])).value == 1.0
    assert model.training
    assert model[1].training
