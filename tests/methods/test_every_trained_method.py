"""The property table, second half: every method that acts in training, on the digits ResNet.

A new method is tested here by being in the catalogue; what it promises is read from its metadata.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import zoo
from secateur.core.errors import BudgetError, UnknownNameError
from secateur.core.method import Group, Protocol
from secateur.core.plan import Plan
from secateur.core.units import UnitKind
from secateur.train.loop import Fitting, Recipe
from secateur.train.metanetwork import Metanetwork, Shape

STEPS, HALF, MODEL, SPARSITY = 8, 4, "digits-resnet", 0.5
METHODS = {name: method for name, method in sc.methods().items() if method.parts is not None}
SHARED = [name for name in METHODS if METHODS[name].kind is not Protocol.PLAN]
# as short a training asks for
OWN: dict[str, dict[str, Any]] = {
    "lapp": {"phase": 0.5, "rate": 0.3},
    "journey": {"start": 0.1, "stop": 0.6},
}


@dataclass(frozen=True)
class Trained:
    """A network after its training with a method, uncut, and the plan."""

    model: nn.Module
    plan: Plan
    sparsifier: Any


@cache
def fitting() -> Fitting:
    return Fitting(zoo.load_data("digits").calibration.take(torch.arange(128)), Recipe(steps=STEPS, batch=16, lr=0.01))


@cache
def metanetwork(folder: str) -> str:
    torch.manual_seed(0)
    net = Metanetwork(Shape(node=8, edges=(9,), layers=1, width=4, node_ratio=0.01, edge_ratio=0.01))
    net.save(folder, {})
    return folder


def settings_of(name: str, place: Any) -> dict[str, Any]:
    fields = METHODS[name].settings.model_fields
    found = dict(OWN.get(name, {}))
    if "metanetwork" in fields:
        found |= {"metanetwork": metanetwork(str(place / "net")), "parts": 10}
    if "every" in fields and name != "trp":
        found["every"] = 2
    return found | ({"multiple": 1} if "multiple" in fields else {})


def begun(
    name: str, place: Any, model: nn.Module, optimizer: Any, state: Any = None, sparsity: float = SPARSITY
) -> Any:
    return sc.sparsify(
        model,
        optimizer,
        name,
        steps=STEPS,
        budget=sc.Budget(SPARSITY, floor=1),
        state=state,
        example=fitting().data,
        **settings_of(name, place),
    )


def run(name: str, place: Any, stop: int | None = None, state: Any = None) -> tuple[nn.Module, Any, Any]:
    """(model, optimiser, sparsifier) after `stop` steps, from the start or from a checkpoint."""
    model, fit = zoo.load_model(MODEL).train(), fitting()
    optimizer = fit.recipe.make_optimizer(model)
    first = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]
    sparsifier = begun(name, place, model, optimizer, state and state["sparsifier"])
    for step in range(first, stop or STEPS):
        fit.advance(model, optimizer, step, sparsifier.penalty)
    return model, optimizer, sparsifier


@cache
def trained(name: str, place: Any) -> Trained:
    model, _, sparsifier = run(name, place)
    return Trained(model.eval(), sparsifier.finish(), sparsifier)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("trained")


def smaller(model: nn.Module, dense: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in dense.parameters())


def outputs(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(zoo.load_data("digits").evaluation.inputs[:16])


@pytest.mark.parametrize("name", METHODS)
def test_the_budget_is_met(name, place):
    found = trained(name, place)
    kept, total = found.plan.units()
    match METHODS[name].exact:
        case Group.AIM:
            assert 0 < kept <= total
        case Group.TOTAL:
            assert total - kept == total // 2
        case Group.COST:
            dense = sum(p.numel() for p in found.model.parameters())
            left = sum(p.numel() for p in sc.apply_(copy.deepcopy(found.model), found.plan).parameters())
            assert left <= 0.5 * dense
        case _:
            for site, mask in found.plan.masks.items():
                gone, units = int((~mask).sum()), mask.numel()
                assert gone == units // 2, site


@pytest.mark.parametrize("name", METHODS)
def test_nothing_is_left_hanging_on_the_model(name, place):
    model = trained(name, place).model
    assert model.state_dict().keys() == zoo.load_model(MODEL).state_dict().keys()
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_a_killed_training_goes_on_with_the_same_bytes(name, place):
    straight = trained(name, place)
    model, optimizer, sparsifier = run(name, place, HALF)
    parts = {"model": model, "optimizer": optimizer, "sparsifier": sparsifier}
    state = {part: copy.deepcopy(one.state_dict()) for part, one in parts.items()}
    again, _, other = run(name, place, state=state | {"step": HALF})
    plan = other.finish()
    assert plan.masks.keys() == straight.plan.masks.keys()
    assert all(torch.equal(plan.masks[site], mask) for site, mask in straight.plan.masks.items())
    assert all(torch.equal(one, two) for one, two in zip(again.parameters(), straight.model.parameters(), strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_what_is_saved_loads_with_the_same_outputs(name, place, tmp_path):
    found = trained(name, place)
    model = copy.deepcopy(found.model)
    if METHODS[name].units is not UnitKind.WEIGHT:
        model = sc.apply_(model, found.plan, example=fitting().data)
        assert found.plan.sparsity == 0 or smaller(model, found.model)
    entry = zoo.get(MODEL)
    factory = None if entry.pretrained else entry.factory
    folder = sc.save(model, tmp_path / "out", found.plan, source=zoo.folder(MODEL), factory=factory)
    assert torch.allclose(outputs(sc.load(folder)), outputs(model), atol=1e-6)


@pytest.mark.parametrize("name", [name for name in METHODS if METHODS[name].units is not UnitKind.WEIGHT])
def test_the_cut_network_is_the_masked_one(name, place):
    found = trained(name, place)
    cut = sc.apply_(copy.deepcopy(found.model), found.plan, example=fitting().data)
    with sc.masked(copy.deepcopy(found.model), found.plan) as under:
        assert torch.allclose(outputs(cut), outputs(under), atol=1e-5)
    assert not torch.allclose(outputs(cut)[0], outputs(cut)[1])


@pytest.mark.parametrize("name", METHODS)
def test_wrong_settings_and_sparsities_are_refused_before_a_step(name, place):
    model = zoo.load_model(MODEL)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(UnknownNameError, match="wobble"):
        sc.sparsify(model, optimizer, name, 0.5, steps=STEPS, wobble=1)
    for sparsity in (-0.1, 1.0, float("nan")):
        with pytest.raises(BudgetError, match="sparsity"):
            sc.sparsify(model, optimizer, name, sparsity, steps=STEPS, **settings_of(name, place))


# --- procedures that also plan at once ------------------------------------------------------------------

PLANNING = {"pagcp": {"tolerance": 5.0, "total_tolerance": 1e7, "top": 1.0, "multiple": 1}, "metapruning": {}}


def test_every_procedure_that_plans_is_here():
    assert set(PLANNING) == {n for n, m in sc.methods().items() if m.kind is Protocol.PROCEDURE and m.run}


def planned(name: str, place: Any, model: nn.Module) -> Plan:
    more = PLANNING[name] | ({} if name == "pagcp" else settings_of(name, place))
    data = zoo.load_data("digits", samples=64).calibration
    return sc.plan(model, name, budget=sc.Budget(0.7, "flops", floor=1), data=data, **more)


@pytest.mark.parametrize("name", PLANNING)
def test_a_plan_is_the_same_twice_and_its_cut_is_its_masks(name, place):
    model = zoo.load_model(MODEL)
    before = copy.deepcopy(model.state_dict())
    plan, again = planned(name, place, model), planned(name, place, zoo.load_model(MODEL))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(again.masks[site], mask) for site, mask in plan.masks.items())
    with sc.masked(model, plan):
        under = outputs(model)
    cut = sc.apply_(model, plan, example=zoo.load_data("digits").evaluation)
    assert torch.allclose(outputs(cut), under, atol=1e-5)
    facts = next(iter(plan.facts.values()))
    assert facts["flops_kept"] <= 0.7
