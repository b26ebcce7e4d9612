"""The PQ index of whole models: non-zeros only, layers joined without a copy, tied weights once."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from secateur.measure import compare, measure
from secateur.measure.evenness import evenness
from secateur.scores.compressibility import pq_index


def small() -> nn.Sequential:
    rng = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4), nn.Embedding(5, 4))
    for parameter in model.parameters():
        nn.init.normal_(parameter, generator=rng)
    return model


def test_layers_and_total_are_those_of_the_non_zero_weights() -> None:
    model = small()
    model[3].weight.data[:2] = 0
    left = model[3].weight[2:].flatten()
    found = evenness(model)
    assert found is not None
    assert set(found.layers) == {"0.weight", "3.weight"}
    assert found.layers["3.weight"] == pytest.approx(float(pq_index(left)))
    assert found.total == pytest.approx(float(pq_index(torch.cat([model[0].weight.flatten(), left]))))


def test_zeros_are_not_counted_as_kept() -> None:
    model = small()
    dense = measure(model)
    for layer in (model[0], model[3]):
        layer.weight.data[layer.weight.abs() < 0.5] = 0
    pruned = measure(model)
    change = compare(dense, pruned)["pq_index"]
    assert change.after < change.before  # with the zeros in it would have risen
    assert pruned.to_json()["pq_index"] == pruned.evenness.total


def test_a_tied_weight_counts_once() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    found = evenness(model)
    assert found is not None
    assert list(found.layers) == ["0.weight"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_has_no_index_has_none(value: float) -> None:
    model = small()
    model[3].weight.data[0, 0] = value
    assert evenness(model) is None
    assert evenness(nn.BatchNorm2d(3)) is None
    assert "pq_index" not in {change.figure for change in compare(measure(model), measure(model)).changes}


def test_an_empty_network_is_even() -> None:
    model = nn.Linear(3, 2)
    model.weight.data.zero_()
    found = evenness(model)
    assert found is not None
    assert found.total == 0
