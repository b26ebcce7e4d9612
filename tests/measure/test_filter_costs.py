"""Linear costs of filters: exact against the FLOP counter, differentiable against finite differences."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from secateur.core.method import Batch
from secateur.measure.filter_costs import FilterCosts, flops_by_module
from secateur.measure.flops import flops

COSTS = FilterCosts(1000.0, {"a": 4, "b": 8}, {"a": 50.0, "b": 20.0}, {"a": 10.0, "b": 30.0})


def test_flops_by_module_add_up_to_those_of_the_counter():
    model = nn.Sequential(nn.Conv2d(2, 6, 3, stride=2), nn.ReLU(), nn.Conv2d(6, 6, 3, groups=3), nn.Flatten())
    model.append(nn.Linear(6, 5))
    batch = Batch((torch.zeros(3, 2, 7, 7),))
    found = flops_by_module(model, batch)
    assert list(found) == ["0", "2", "4"]
    assert found["0"] == 2 * 9 * 2 * 6 * 9
    assert 3 * sum(found.values()) == flops(model, batch)


def test_totals_by_hand():
    assert COSTS.total({}) == 1040
    assert COSTS.total({"a": 1}) == 1040 - 150
    assert COSTS.total({"a": 4, "b": 5}) == 1040 - 60
    assert COSTS.least(1) == 1040 - 150 - 140
    assert COSTS.least(6) == 1040 - 40  # "a" has only four


def test_the_share_is_exact_and_its_gradient_is_the_cost():
    gates = {"a": torch.tensor([1.0, 0, 0, 1], requires_grad=True), "b": torch.ones(8, requires_grad=True)}
    share = COSTS.share(gates)
    assert share.item() == pytest.approx(COSTS.total({"a": 2, "b": 8}) / 1000)
    share.backward()
    assert gates["a"].grad.tolist() == pytest.approx([0.05] * 4)
    assert gates["b"].grad.tolist() == pytest.approx([0.02] * 8)


def test_what_is_merged_is_paid_where_filters_are_gone():
    merged = replace(COSTS, merged=True)
    assert merged.total({"a": 4, "b": 8}) == merged.total({}) == 1000
    assert merged.total({"a": 1, "b": 8}) == 1000 - 150 + 7.5
    assert merged.total({"a": 4, "b": 2}) == 1000 - 120 + 22.5
    assert merged.least(1) == 1000 - 150 - 140 + 7.5 + 26.25
    gates = {"a": torch.tensor([1.0, 0, 0, 0], requires_grad=True), "b": torch.tensor([1.0, 1] + [0] * 6)}
    share = merged.share(gates)
    assert share.item() == pytest.approx(merged.total({"a": 1, "b": 2}) / 1000)
    share.backward()
    assert gates["a"].grad.tolist() == pytest.approx([(50 - 2.5) / 1000] * 4)
    assert merged.beside("a", 1) == 7.5
    assert COSTS.beside("a", 1) == 10
