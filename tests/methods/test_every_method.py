"""The property table: every method of the catalogue on every shipped model it suits.

A new method is tested here by being in the catalogue. What a method promises is read from its own
metadata (`exact`, `patterns`, `changes_weights`, `units`), never from its name.
"""

from __future__ import annotations

import copy
from functools import cache
from math import floor

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import zoo
from secateur.core.budget import Quantity
from secateur.core.errors import BudgetError, ModelError, PlanError
from secateur.core.method import Group, Method, Protocol
from secateur.core.plan import Plan
from secateur.core.tags import Criterion, Schedule
from secateur.core.units import UnitKind
from secateur.data.batches import forward
from secateur.data.dataset import Splits
from secateur.structure.layers import to_matrix

METHODS = {name: method for name, method in sc.methods().items() if method.kind is Protocol.PLAN}
SPARSITY = {UnitKind.BLOCK: 0.25}
ROWS = [  # skills-llama is pydoc-llama once more, deeper and slower
    (method, model) for method in METHODS for model in zoo.names() if model != "skills-llama"
]


def suits(method: Method, model: str) -> bool:
    """Whole blocks can be taken from, and compared in, stacks that keep their shape; heads go from any stack.

    What units send is looked at where one layer of a block reads them.
    """
    if method.units is UnitKind.HEAD and not {Criterion.SIMILARITY, Criterion.ACTIVATION} & method.tags.criterion:
        return model != "digits-mlp"
    if method.units is UnitKind.HEAD:
        return zoo.get(model).pretrained
    if method.units is UnitKind.EXPERT:  # no shipped model has a router
        return False
    if method.units is UnitKind.EMBEDDING:  # a residual stream between norms and linear layers
        return "llama" in model
    return method.units not in (UnitKind.BLOCK, UnitKind.NEURON) or zoo.get(model).pretrained


SUITED = [row for row in ROWS if suits(METHODS[row[0]], row[1])]
LEAN = [row for row in SUITED if row[1] != "pydoc-llama"]  # the one with grouped heads has all that it has
WEIGHTS = [row for row in SUITED if METHODS[row[0]].units is UnitKind.WEIGHT]


@cache
def data(model: str) -> Splits:
    return zoo.load_data(zoo.get(model).data, samples=16)


@cache
def planned(method: str, model: str) -> Plan:
    return plan_on(zoo.load_model(model), method, model)


def plan_on(module: nn.Module, method: str, model: str, **budget: object) -> Plan:
    # one weight per layer at least, so that a global ranking cannot empty a layer
    asked = sc.Budget(SPARSITY.get(METHODS[method].units, 0.6), floor=1)
    budget = budget or {"budget": asked}
    rounds = "multiple" in METHODS[method].settings.model_fields
    settings: dict[str, object] = {"multiple": 1} if rounds else {}  # exact counts
    samples = data(model).calibration
    if "resolution" in METHODS[method].settings.model_fields:
        settings["resolution"], samples = 3, samples.take(torch.arange(4))  # a forward pass for each layer and step
    if "rounds" in METHODS[method].settings.model_fields:
        settings["rounds"] = 8  # of 100
    if "rounding" in METHODS[method].settings.model_fields:
        settings["rounding"] = "none"  # other kinds do not make up for it
    if "amplitude" in METHODS[method].settings.model_fields:
        settings |= {"iterations": 8, "amplitude": 0.05}  # gradients in each
    if METHODS[method].units is UnitKind.RANK:
        settings["amount"] = 1.0  # a sparsity of 0 leaves ranks to a rule
    if "offspring" in METHODS[method].settings.model_fields:
        settings |= {"iterations": 2, "generations": 2, "offspring": 4}  # a forward pass for each candidate
    return sc.plan(module, method, data=samples, keep_scores=True, **budget, **settings)


def outputs(module: nn.Module, model: str) -> torch.Tensor:
    with torch.no_grad():
        return forward(module, next(data(model).evaluation.batches(4)))


@pytest.mark.parametrize("row", [row for row in ROWS if row not in SUITED], ids="-".join)
def test_unsuited_models_are_refused_in_one_sentence(row):
    method, model = row
    with pytest.raises((ModelError, BudgetError), match=r"block|nothing is left to cut"):
        plan_on(zoo.load_model(model), method, model)


@pytest.mark.parametrize("row", LEAN, ids="-".join)
def test_planning_leaves_the_model_as_it_was(row):
    method, model = row
    module = zoo.load_model(model).train()
    before = copy.deepcopy(module.state_dict())
    plan_on(module, method, model)
    assert all(part.training for part in module.modules())
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())
    assert not any("forward" in vars(part) for part in module.modules())


def assert_share_of_parameters(plan: Plan, dense: nn.Module, whole: bool) -> None:
    """Methods that weigh heads against neurons: 60 % of the parameters of the units, or of the whole model, go.

    They come as near as their units allow: one head, or half a neuron in every block, or one rank below.
    """
    costs = {name: site.parameters / site.units for name, site in plan.sites.items()}
    if all(site.kind is UnitKind.RANK for site in plan.sites.values()):
        total = sum(p.numel() for p in dense.parameters())
        left = sum(p.numel() for p in sc.apply_(dense, plan).parameters())
        assert 0.4 * total - max(costs.values()) < left <= 0.4 * total
        return
    if not whole:
        gone = sum(costs[name] * int((~mask).sum()) for name, mask in plan.masks.items())
        asked = 0.6 * sum(site.parameters for site in plan.sites.values())
        assert abs(gone - asked) <= 1.5 * max(costs.values())
        return
    total = sum(p.numel() for p in dense.parameters())
    left = sum(p.numel() for p in sc.apply_(dense, plan).parameters())
    neurons = [costs[name] for name, site in plan.sites.items() if site.kind is UnitKind.NEURON]
    assert abs(total - left - 0.6 * total) <= 0.5 * sum(neurons) + 1


@pytest.mark.parametrize("row", SUITED, ids="-".join)
def test_budget_is_met_exactly(row):
    method, model = row
    plan, sparsity = planned(method, model), SPARSITY.get(METHODS[method].units, 0.6)
    removed = {name: ~mask for name, mask in plan.masks.items()}

    def due(units: int) -> int:
        return floor(round(sparsity * units, 6))

    match METHODS[method].exact:
        case Group.COST:
            whole = "depth_share" in METHODS[method].settings.model_fields
            assert_share_of_parameters(copy.deepcopy(plan), zoo.load_model(model), whole=whole)  # applying one notes it
        case Group.TOTAL:
            assert sum(int(gone.sum()) for gone in removed.values()) == due(sum(s.units for s in plan.sites.values()))
        case Group.SITE:
            for name, gone in removed.items():
                assert int(gone.sum()) == due(plan.sites[name].units), name
        case Group.ROW:
            for name, gone in removed.items():
                matrix = to_matrix(gone, plan.sites[name].layout)
                assert (matrix.sum(1) == due(matrix.shape[1])).all(), name


@pytest.mark.parametrize("row", LEAN, ids="-".join)
def test_kept_units_score_at_least_as_high_as_cut_ones(row):
    method, model = row
    plan, entry = planned(method, model), METHODS[row[0]]
    if entry.changes_weights:
        assert not plan.scores, "a method that re-scores while it compensates has no one score to show"
        return
    assert plan.scores.keys() == plan.masks.keys()

    def ordered(scores: torch.Tensor, keep: torch.Tensor) -> None:
        low = scores.masked_fill(~keep, torch.inf).amin(-1)
        high = scores.masked_fill(keep, -torch.inf).amax(-1)
        assert (low >= high).all()

    for name, keep in plan.masks.items():
        site, scores = plan.sites[name], plan.scores[name].float()
        if entry.exact is Group.ROW:
            ordered(to_matrix(scores, site.layout), to_matrix(keep, site.layout))
        else:
            ordered(scores.reshape(-1), keep.reshape(-1))


@pytest.mark.parametrize("row", LEAN, ids="-".join)
def test_same_seed_same_bytes(row, tmp_path):
    method, model = row
    planned(method, model).save(tmp_path / "a")
    torch.manual_seed(1234)  # the surroundings' seed must not matter
    plan_on(zoo.load_model(model), method, model).save(tmp_path / "b")
    for name in ("plan.json", "plan.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("row", SUITED, ids="-".join)
def test_masked_equals_applied_and_can_be_undone(row):
    method, model = row
    module, plan = zoo.load_model(model), planned(method, model)
    dense = outputs(module, model)
    with sc.masked(module, plan):
        under = outputs(module, model)
    assert torch.equal(outputs(module, model), dense)
    sc.apply_(module, plan)
    assert torch.equal(outputs(module, model), under)
    if METHODS[method].structured:
        assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in zoo.load_model(model).parameters())
    assert not torch.allclose(under, dense)


@pytest.mark.parametrize("row", SUITED, ids="-".join)
def test_applying_twice_changes_nothing_more(row):
    method, model = row
    module, plan = zoo.load_model(model), planned(method, model)
    sc.apply_(module, plan)
    once = copy.deepcopy(module.state_dict())
    if METHODS[method].units is UnitKind.WEIGHT:
        sc.apply_(module, plan)
    else:
        with pytest.raises(PlanError):
            sc.apply_(module, plan)
    assert all(torch.equal(value, once[name]) for name, value in module.state_dict().items())


def repeats(method: Method) -> bool:
    """Whether zeros alone score lowest on the pruned model: not by chance, after compensation or by gradients.

    Pruning can cut a kept weight off from the loss; its gradient is then zero as well. So is the score of
    one that has been cut off by the rounds after which it was kept.
    """
    anew = method.needs_labels or method.tags.schedule is Schedule.ITERATIVE
    return not (method.changes_weights or anew or Criterion.RANDOM in method.tags.criterion)


@pytest.mark.parametrize("row", [row for row in WEIGHTS if repeats(METHODS[row[0]])], ids="-".join)
def test_planning_again_at_the_same_sparsity_removes_the_same(row):
    method, model = row
    module, plan = sc.apply_(zoo.load_model(model), planned(method, model)), planned(method, model)
    again = plan_on(module, method, model)
    assert all(torch.equal(again.masks[name], mask) for name, mask in plan.masks.items())


@pytest.mark.parametrize("row", SUITED, ids="-".join)
def test_saved_and_loaded_is_equal(row, tmp_path):
    method, model = row
    entry, plan = zoo.get(model), planned(method, model)
    module = sc.apply_(zoo.load_model(model), plan)
    folder = sc.save(
        module, tmp_path / "out", plan, source=zoo.folder(model), factory=None if entry.pretrained else entry.factory
    )
    again = sc.load(folder)
    assert again.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in module.state_dict().items())
    assert torch.equal(outputs(again, model), outputs(module, model))
    stored = Plan.load(folder / "secateur")
    assert all(torch.equal(stored.masks[name], mask) for name, mask in plan.masks.items())


@pytest.mark.parametrize("row", WEIGHTS, ids="-".join)
def test_zeros_survive_deepcopy_state_dict_and_compile(row):
    method, model = row
    plan = planned(method, model)
    dense = zoo.load_model(model)
    module = sc.apply_(zoo.load_model(model), plan)
    fresh = zoo.load_model(model)
    fresh.load_state_dict(module.state_dict())
    assert module.state_dict().keys() == dense.state_dict().keys()
    for other in (copy.deepcopy(module), fresh):
        parameters = dict(other.named_parameters())
        assert all(not parameters[name].detach()[~mask].any() for name, mask in plan.masks.items())
    compiled = torch.compile(module, backend="eager")
    assert torch.allclose(outputs(compiled, model), outputs(module, model), atol=1e-5)


@pytest.mark.parametrize("row", WEIGHTS, ids="-".join)
def test_patterns_hold_in_every_group_or_are_refused(row):
    method, model = row
    module = zoo.load_model(model)
    narrow = [f"{name}*" for name, part in module.named_modules() if _inputs(part) % 4 and isinstance(part, nn.Conv2d)]
    if not METHODS[method].patterns:
        with pytest.raises(BudgetError, match="pattern"):
            plan_on(module, method, model, pattern="2:4")
        return
    plan = sc.plan(module, method, pattern="2:4", data=data(model).calibration, exclude=narrow)
    for name, mask in plan.masks.items():
        matrix = to_matrix(mask, plan.sites[name].layout)
        assert (matrix.reshape(matrix.shape[0], -1, 4).sum(-1) == 2).all(), name


def _inputs(part: nn.Module) -> int:
    return part.weight[0].numel() if isinstance(part, nn.Conv2d) else 4


@pytest.mark.parametrize("method", [name for name in METHODS if METHODS[name].units is not UnitKind.EXPERT])
def test_nothing_asked_nothing_removed(method):
    model = "pydoc-llama"
    plan = plan_on(zoo.load_model(model), method, model, sparsity=0.0)
    assert plan.sparsity == 0
    module = zoo.load_model(model)
    before = outputs(module, model)
    with sc.masked(module, plan):
        assert torch.allclose(outputs(module, model), before, atol=1e-5)


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, float("nan")])
@pytest.mark.parametrize("method", METHODS)
def test_impossible_sparsity_is_refused(method, sparsity):
    with pytest.raises(BudgetError, match="sparsity"):
        sc.plan(nn.Linear(4, 4), method, sparsity=sparsity, data=torch.zeros(2, 4))


@pytest.mark.parametrize("quantity", [Quantity.UNITS, Quantity.PARAMETERS])
@pytest.mark.parametrize("name", [name for name, m in METHODS.items() if m.units is UnitKind.WEIGHT])
def test_a_total_is_met_or_refused_never_read_as_a_share(name, quantity):
    model, budget = "pydoc-llama", sc.Budget(40, quantity)
    if METHODS[name].exact is Group.TOTAL:
        budget = sc.Budget(200_000, quantity, floor=1)
        assert plan_on(zoo.load_model(model), name, model, budget=budget).units()[0] == 200_000
    else:
        with pytest.raises(BudgetError, match="total"):
            plan_on(zoo.load_model(model), name, model, budget=budget)
