"""`masked` and `apply_`: reversible to the bit, exact zeros, idempotent, and nothing touched on refusal."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shrink_models import Residual, assert_same_bits, bits, block_plan, gpt2, llama, state, tower, weight_plan
from torch import nn

import secateur as sc
from secateur.core.errors import PlanError
from secateur.core.plan import Plan
from secateur.core.units import Site, UnitKind


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))


def with_odd_bits(model: nn.Module) -> nn.Module:
    """Values that a comparison by == cannot tell apart: negative zeros, denormals, NaN."""
    with torch.no_grad():
        flat = model[0].weight.view(-1)
        flat[:4] = torch.tensor([-0.0, 1e-42, float("nan"), -1e-42])
    return model


def test_masked_restores_every_bit():
    model = with_odd_bits(mlp())
    before, pointers = state(model), [p.data_ptr() for p in model.parameters()]
    with sc.masked(model, weight_plan(model, ["0.weight", "2.weight"])) as inside:
        assert inside is model
        assert bits(model[0].weight) != bits(before["0.weight"])
    assert_same_bits(model, before)
    assert [p.data_ptr() for p in model.parameters()] == pointers


def test_masked_restores_after_an_exception_and_lets_it_through():
    model = mlp()
    before = state(model)
    with pytest.raises(KeyboardInterrupt), sc.masked(model, weight_plan(model, ["0.weight"])):
        raise KeyboardInterrupt
    assert_same_bits(model, before)


def test_masked_values_are_exact_positive_zeros_and_untouched_others():
    model = with_odd_bits(mlp())
    plan = weight_plan(model, ["0.weight"])
    plan.masks["0.weight"].view(-1)[:4] = torch.tensor([False, True, False, True])  # -0.0 and NaN go
    before = state(model)["0.weight"]
    with sc.masked(model, plan):
        inside = model[0].weight.detach().clone()
    mask = plan.masks["0.weight"]
    assert not bits(inside[~mask]).strip(b"\0")  # all-zero bits: no -0.0, no NaN * 0
    assert bits(inside[mask]) == bits(before[mask])


def test_apply_writes_exact_zeros_into_the_same_parameters():
    model = with_odd_bits(mlp())
    plan = weight_plan(model, ["0.weight", "2.weight"])
    plan.masks["0.weight"].view(-1)[2] = False
    parameters, before = dict(model.named_parameters()), state(model)
    pointers = [p.data_ptr() for p in model.parameters()]
    assert sc.apply_(model, plan) is model
    for name, mask in plan.masks.items():
        assert dict(model.named_parameters())[name] is parameters[name]
        assert not bits(parameters[name][~mask]).strip(b"\0")
        assert bits(parameters[name][mask]) == bits(before[name][mask])
    assert bits(model[0].bias) == bits(before["0.bias"])
    assert [p.data_ptr() for p in model.parameters()] == pointers  # views and flattened parameters see it too


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["random", "global_magnitude"]), st.floats(0.05, 0.6))
def test_apply_twice_is_apply_once(seed, method, sparsity):
    model = mlp(seed)
    plan = sc.plan(model, method, sparsity, seed=seed)
    sc.apply_(model, plan)
    once = state(model)
    sc.apply_(model, plan)
    assert_same_bits(model, once)
    with sc.masked(model, plan):
        assert_same_bits(model, once)
    assert_same_bits(model, once)


def test_apply_twice_works_for_methods_that_change_weights():
    model, data = mlp(), torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    plan = sc.plan(model, "sparsegpt", 0.5, data=data)
    dense = state(model)
    sc.apply_(model, plan)
    once = state(model)
    kept = plan.masks["0.weight"]
    assert not torch.equal(once["0.weight"][kept], dense["0.weight"][kept])  # it did compensate
    sc.apply_(model, plan)
    assert_same_bits(model, once)


def test_a_combined_plan_can_be_applied_twice():
    model = mlp()
    plan = sc.plan(model, "random", 0.4, seed=1) & sc.plan(model, "random", 0.4, seed=2)
    sc.apply_(model, plan)
    once = state(model)
    sc.apply_(model, plan)
    assert_same_bits(model, once)
    with sc.masked(model, plan):
        pass
    assert_same_bits(model, once)


@pytest.mark.parametrize("act", [sc.apply_, lambda model, plan: sc.masked(model, plan).__enter__()])
def test_a_plan_of_another_model_is_refused_and_nothing_changes(act):
    plan = sc.plan(mlp(0), "random", 0.5)
    for other in (mlp(1), nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), nn.Linear(6, 8)):
        before = state(other)
        with pytest.raises(PlanError, match=r"another model|which is"):
            act(other, plan)
        assert_same_bits(other, before)


def test_one_changed_weight_makes_another_model():
    model = mlp()
    plan = sc.plan(model, "random", 0.5)
    with torch.no_grad():
        model[2].bias[1] += 1e-6  # not even a pruned parameter
    with pytest.raises(PlanError, match=r"'2\.bias' has other values.*--other-weights"):
        sc.apply_(model, plan)


def test_other_weights_puts_masks_on_a_retrained_model_but_not_on_another_architecture():
    plan, retrained = sc.plan(mlp(0), "random", 0.5), mlp(7)
    before = state(retrained)
    with sc.masked(retrained, plan, other_weights=True):
        assert not retrained[0].weight[~plan.masks["0.weight"]].any()
    assert_same_bits(retrained, before)
    sc.apply_(retrained, plan, other_weights=True)
    mask = plan.masks["0.weight"]
    assert bits(retrained[0].weight[mask]) == bits(before["0.weight"][mask])
    assert not retrained[0].weight[~mask].any()
    with pytest.raises(PlanError):
        sc.apply_(nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 3)), plan, other_weights=True)


def test_other_weights_is_refused_for_plans_that_bring_their_own_weights():
    data = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))
    plan, other = sc.plan(mlp(0), "sparsegpt", 0.5, data=data), mlp(1)
    before = state(other)
    with pytest.raises(PlanError, match="another model"):
        sc.apply_(other, plan, other_weights=True)
    assert_same_bits(other, before)


@pytest.mark.parametrize("second", ["nowhere", "model.layers.0.mlp", "model.layers"])
@pytest.mark.parametrize("reversible", [True, False])
def test_nothing_changes_when_a_later_part_of_a_plan_does_not_fit(second, reversible):
    """Weights and a first list of blocks fit, the second list does not: all or nothing."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left = nn.ModuleList(Residual(4) for _ in range(3))
            self.model = llama().model

    model = Pair()
    plan = block_plan(model, "left", [1])
    weights = weight_plan(model, ["left.0.linear.weight"])
    plan.sites |= weights.sites
    plan.masks |= weights.masks
    plan.sites[second] = Site(second, UnitKind.BLOCK, (9,))
    plan.masks[second] = torch.arange(9) > 2
    before = state(model)
    act = sc.masked(model, plan).__enter__ if reversible else lambda: sc.apply_(model, plan)
    with pytest.raises(PlanError, match=second):
        act()
    assert_same_bits(model, before)


def test_masked_keeps_autograd_deepcopy_and_state_dict_usable_inside():
    model = mlp()
    plan, x = sc.plan(model, "random", 0.5), torch.ones(2, 6)
    with sc.masked(model, plan):
        clone, saved = copy.deepcopy(model), state(model)
        model(x).sum().backward()
    assert model[0].weight.grad is not None
    assert_same_bits(clone, saved)
    assert not clone[0].weight[~plan.masks["0.weight"]].any()


def test_changes_to_masked_weights_inside_are_dropped():
    model = mlp()
    before = state(model)
    with sc.masked(model, weight_plan(model, ["0.weight"])), torch.no_grad():
        model[0].weight.fill_(5)
    assert_same_bits(model, before)


def test_dtype_and_ties_survive():
    model = tower().to(torch.float16)
    plan = weight_plan(model, ["first.weight"])
    sc.apply_(model, plan)
    assert model.second.weight is model.first.weight
    assert model.first.weight.dtype == torch.float16
    assert not model.second.weight[~plan.masks["first.weight"]].any()


def test_transposed_layout_is_masked_in_the_parameter_s_own_shape():
    model = gpt2()
    name = "transformer.h.0.mlp.c_fc.weight"
    plan = weight_plan(model, [name])
    with sc.masked(model, plan):
        found = dict(model.named_parameters())[name]
        assert torch.equal(found != 0, plan.masks[name])


def test_hand_made_plan_only_has_to_fit():
    model = mlp()
    with pytest.raises(PlanError, match="missing"):
        sc.apply_(model, Plan({"9.weight": Site("9.weight", UnitKind.WEIGHT, (2,))}, {"9.weight": torch.ones(2) > 0}))
    for seed in (0, 1):
        sc.apply_(mlp(seed), weight_plan(model, ["0.weight"]))


def test_kinds_that_cannot_be_applied_are_refused_and_not_skipped():
    model = mlp()
    plan = Plan({"0": Site("0", UnitKind.CHANNEL, (8,))}, {"0": torch.arange(8) > 3})
    for act in (sc.apply_, lambda model, plan: sc.masked(model, plan).__enter__()):
        with pytest.raises(PlanError, match="no site of this model"):
            act(model, plan)
