"""Weights seen unit by unit: sizes, sums, factors and gradients against loops over single units."""

import pytest
import torch
from torch import nn

from secateur.core.errors import ModelError
from secateur.core.units import Occurrence, Site, UnitKind
from secateur.train.groups import Groups

SITES = {
    "a": Site("a", UnitKind.CHANNEL, (2,), occurrences=(Occurrence("0.weight", 0), Occurrence("1.weight", 1))),
    # heads of width 2 in the second half of the same dimension
    "b": Site("b", UnitKind.HEAD, (2,), occurrences=(Occurrence("1.weight", 1, offset=2, stride=2, repeat=2),)),
    "c": Site("c", UnitKind.CHANNEL, (3,), occurrences=(Occurrence("1.weight", 0), Occurrence("1.bias", 0))),
}
PLACES = {("0.weight", 0), ("1.weight", 1), ("1.weight", 0), ("1.bias", 0)}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 2), nn.Linear(6, 3))


def units(model):
    """Site -> for each unit the (parameter, index) pairs of its weights, entry by entry."""
    first, second, bias = model[0].weight, model[1].weight, model[1].bias
    return {
        "a": [[(first, (i, j)) for j in range(5)] + [(second, (j, i)) for j in range(3)] for i in range(2)],
        "b": [[(second, (j, 2 + 2 * i + k)) for j in range(3) for k in range(2)] for i in range(2)],
        "c": [[(second, (i, j)) for j in range(6)] + [(bias, (i,))] for i in range(3)],
    }


def test_sizes_and_sums_of_every_unit():
    model = network()
    groups = Groups(model, SITES, PLACES)
    assert groups.sizes == {"a": 8, "b": 6, "c": 7}
    for power in (1, 2):
        for name, found in groups.sums(power).items():
            expected = [sum(p[at].abs().item() ** power for p, at in unit) for unit in units(model)[name]]
            assert found.tolist() == pytest.approx(expected, rel=1e-5)


def test_factors_reach_every_weight_of_a_unit_and_shared_ones_twice():
    model = network()
    groups, before = Groups(model, SITES, PLACES), {n: p.detach().double() for n, p in model.named_parameters()}
    factors = {"a": torch.tensor([0.5, 0.0]), "c": torch.tensor([1.0, 3.0, 0.25])}
    groups.scale_(factors)
    names = {id(p): n for n, p in model.named_parameters()}
    expected = {name: value.clone() for name, value in before.items()}
    for site, values in factors.items():
        for unit, value in zip(units(model)[site], values.tolist(), strict=True):
            for p, at in unit:
                expected[names[id(p)]][at] *= value
    for name, p in model.named_parameters():
        assert torch.allclose(p.detach().double(), expected[name]), name
    assert torch.equal(model[0].bias.detach().double(), before["0.bias"])


def test_pulls_are_the_gradient_of_the_penalty():
    model, groups_of = network(), units
    rates = {"a": torch.tensor([0.5, 0.0]), "b": torch.tensor([2.0, 1.0]), "c": torch.tensor([0.1, 0.2, 0.3])}
    penalty = sum(
        rate * sum(p[at] ** 2 for p, at in unit) / 2
        for site, values in rates.items()
        for rate, unit in zip(values.tolist(), groups_of(model)[site], strict=True)
    )
    penalty.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    model[1].weight.grad, model[1].bias.grad = torch.ones(3, 6), torch.zeros(3)
    Groups(model, SITES, PLACES).pull(rates)
    assert model[0].weight.grad is None  # a parameter that the loss does not reach is not moved
    assert torch.allclose(model[1].weight.grad, expected["1.weight"] + 1)
    assert torch.allclose(model[1].bias.grad, expected["1.bias"])


def test_signs_pull_by_the_same_amount_and_not_at_zero():
    model = network()
    with torch.no_grad():
        model[0].weight[0, 0] = 0
    model[0].weight.grad = torch.zeros(2, 5)
    Groups(model, {"a": SITES["a"]}, {("0.weight", 0)}).pull({"a": torch.tensor([1.0, 2.0])}, torch.sign)
    assert torch.equal(model[0].weight.grad, model[0].weight.sign() * torch.tensor([[1.0], [2.0]]))
    assert model[0].weight.grad[0, 0] == 0


def test_places_that_do_not_count_are_left_alone():
    model = network()
    groups = Groups(model, SITES, {("0.weight", 0)})
    assert list(groups.parameters) == ["0.weight"]
    assert groups.sizes == {"a": 5}
    before = model[1].weight.detach().clone()
    groups.scale_({"a": torch.zeros(2), "c": torch.zeros(3)})
    assert torch.equal(model[1].weight, before)
    assert not model[0].weight.any()


def test_half_precision_keeps_its_type():
    model = network().bfloat16()
    groups = Groups(model, SITES, PLACES)
    groups.scale_({"a": torch.tensor([0.5, 0.5])})
    assert model[0].weight.dtype is torch.bfloat16
    assert groups.sums(2)["a"].dtype is torch.float32


def test_parameters_spread_over_processes_are_refused():
    model = network()
    model[0].weight.full_tensor = lambda: model[0].weight
    with pytest.raises(ModelError, match=r"'0\.weight' is spread over processes"):
        Groups(model, SITES, PLACES)
