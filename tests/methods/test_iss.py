"""Iterative soft shrinkage: who shrinks, by how much, when it ends, and the traps of its note."""

import copy
from fractions import Fraction
from itertools import pairwise
from math import ceil, floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur import api
from secateur.core.budget import Budget, Pattern, Quantity
from secateur.core.errors import BudgetError, SettingsError
from secateur.core.trees import load_tree, save_tree
from secateur.methods.weights.iss import kept, widened

SIZES = {"0.weight": 108, "2.weight": 192, "4.weight": 16}


def network(seed=0):
    """Convolutions of very different scale and a small tail, as in super-resolution; sizes 108, 192, 16."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(4, 16, (1, 3), padding=(0, 1)),
        nn.ReLU(),
        nn.Conv2d(16, 1, 1),
    )
    with torch.no_grad():
        model[0].weight.mul_(100)
    return model


def adam(model, lr=1e-3):
    return torch.optim.Adam(model.parameters(), lr, betas=(0.9, 0.99))


def one_step(model, optimizer, step):
    rng = torch.Generator().manual_seed(step)
    x = torch.rand(2, 3, 6, 6, generator=rng)
    optimizer.zero_grad()
    F.l1_loss(model(x), x.mean(1, keepdim=True)).backward()
    optimizer.step()


def train(model, optimizer, start, stop):
    for step in range(start, stop):
        one_step(model, optimizer, step)


def weights(model):
    return {name: model.get_parameter(name).detach().clone() for name in SIZES}


def frozen(model, asked=0.9, steps=10, **more):
    """A sparsifier around steps that change nothing: the optimiser has rate 0."""
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    given_budget = {"budget": asked} if isinstance(asked, Budget) else {"sparsity": asked}
    return optimizer, sc.sparsify(model, optimizer, "iss", steps=steps, **given_budget, **more)


def smallest(weight, count):
    flat = weight.flatten().abs().tolist()
    gone = torch.zeros(len(flat), dtype=torch.bool)
    gone[sorted(range(len(flat)), key=lambda i: (flat[i], i))[:count]] = True
    return gone.view(weight.shape)


# --- how many -------------------------------------------------------------------------------------


@given(st.integers(1, 5000), st.integers(0, 1000))
def test_a_layer_loses_the_ceiling_but_never_more_than_its_cap(size, permille):
    p = Fraction(permille, 1000)
    assert size - kept(size, permille / 1000) == min(ceil(p * size), floor(Fraction(995, 1000) * size))


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.77])
def test_exactly_the_smallest_of_every_layer_shrink_and_nothing_else(sparsity):
    model = network()
    optimizer, _ = frozen(model, sparsity, stage=1.0)
    for step in range(4):
        before = weights(model)
        one_step(model, optimizer, step)
        for name, old in before.items():
            now, gone = model.get_parameter(name).detach(), smallest(old, ceil(Fraction(str(sparsity)) * old.numel()))
            assert torch.equal(now[~gone], old[~gone])
            assert torch.equal(now[gone], old[gone] * 0.95)
            assert (now != 0).all()


def test_every_layer_is_ranked_by_itself():
    model = network()  # a global ranking would leave the first layer whole and empty the others
    optimizer, sparsifier = frozen(model, 0.75, steps=3)
    train(model, optimizer, 0, 3)
    plan = sparsifier.finish()
    assert {name: plan.kept(name) for name in SIZES} == {"0.weight": 27, "2.weight": 48, "4.weight": 4}


def test_ratios_of_single_layers_dense_and_capped():
    model = network()
    optimizer, sparsifier = frozen(model, 0.5, steps=3, ratios="0*=0, 2*=1")
    train(model, optimizer, 0, 3)
    plan = sparsifier.finish()
    assert {name: plan.kept(name) for name in SIZES} == {"0.weight": 108, "2.weight": 192 - 191, "4.weight": 8}
    assert any("2.weight" in sentence and "99.5" in sentence for sentence in plan.warnings)
    assert not any("0.weight" in sentence for sentence in plan.warnings)


def test_the_cap_holds_for_the_budget_and_a_floor_can_ask_for_more():
    model = network()
    optimizer, sparsifier = frozen(model, Budget(0.999, floor=3), steps=3)
    train(model, optimizer, 0, 3)
    assert {name: sparsifier.finish().kept(name) for name in SIZES} == {"0.weight": 3, "2.weight": 3, "4.weight": 3}


# --- soft, again and again ------------------------------------------------------------------------


def test_without_gradient_an_unimportant_weight_decays_as_a_power_of_alpha():
    model = network()
    before = weights(model)
    optimizer, _ = frozen(model, 0.9, steps=60, stage=1.0, alpha=0.9)
    train(model, optimizer, 0, 25)
    for name, old in before.items():
        gone = smallest(old, ceil(Fraction(9, 10) * old.numel()))
        torch.testing.assert_close(model.get_parameter(name).detach()[gone], old[gone] * 0.9**25)
        assert torch.equal(model.get_parameter(name).detach()[~gone], old[~gone])


def test_a_weight_that_gets_gradient_comes_back():
    layer = nn.Linear(4, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 0.9, 0.1, 0.05]]))
    optimizer = torch.optim.SGD(layer.parameters(), 0.5)
    sparsifier = sc.sparsify(layer, optimizer, "iss", 0.5, steps=10, stage=0.5)
    for _ in range(10):
        optimizer.zero_grad()
        layer(torch.tensor([[0.0, 0.0, 0.0, -1.0]])).sum().backward()  # pushes the last one up
        optimizer.step()
    assert sparsifier.finish().masks["weight"].tolist() == [[True, False, False, True]]


def test_the_shrinking_comes_after_the_optimisers_step_and_outside_of_autograd():
    model = network()
    twin = network()
    optimizer, other = torch.optim.SGD(model.parameters(), 0.1), torch.optim.SGD(twin.parameters(), 0.1)
    sc.sparsify(model, optimizer, "iss", 0.9, steps=10)
    one_step(model, optimizer, 0)
    one_step(twin, other, 0)
    for name, plain in weights(twin).items():
        gone = smallest(plain, ceil(Fraction(9, 10) * plain.numel()))
        assert torch.equal(model.get_parameter(name).detach(), torch.where(gone, plain * 0.95, plain))
    assert all(p.is_leaf and p.grad_fn is None for p in model.parameters())


def test_alpha_zero_is_hard_thresholding_whose_zeros_can_grow_back():
    model = network()
    optimizer = adam(model, 0.2)
    sparsifier = sc.sparsify(model, optimizer, "iss", 0.9, steps=40, stage=0.5, alpha=0.0)
    supports = []
    for step in range(19):
        one_step(model, optimizer, step)
        now = weights(model)
        assert all(int((now[name] != 0).sum()) <= kept(size, 0.9) for name, size in SIZES.items())
        supports.append(now["2.weight"] != 0)
    assert any(bool((later & ~first).any()) for first, later in pairwise(supports))
    assert sparsifier.density == 1.0  # nothing is masked yet


@pytest.mark.parametrize("mode", ["rand", "max"])
def test_other_choices_of_the_ablation(mode):
    model = network()
    before = weights(model)
    optimizer, _ = frozen(model, 0.25, mode=mode)
    one_step(model, optimizer, 0)
    for name, old in before.items():
        shrunk = model.get_parameter(name).detach() != old
        assert int(shrunk.sum()) == ceil(old.numel() / 4)
        assert torch.equal(shrunk, ~smallest(old, old.numel() - ceil(old.numel() / 4))) is (mode == "max")


# --- the end of the stage -------------------------------------------------------------------------


def test_frozen_zeros_stay_zero_and_the_survivors_keep_adams_moments():
    model = network()
    optimizer = adam(model)
    sparsifier = sc.sparsify(model, optimizer, "iss", 0.9, steps=120, stage=1 / 6)
    train(model, optimizer, 0, 19)
    assert sparsifier.density == 1.0
    twin = network()
    twin.load_state_dict(model.state_dict())
    other = adam(twin)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    one_step(model, optimizer, 19)
    one_step(twin, other, 19)
    for name, size in SIZES.items():
        keep = sparsifier.masks.get(name)
        assert int(keep.sum()) == kept(size, 0.9)
        mine, theirs = model.get_parameter(name), twin.get_parameter(name)
        assert torch.equal(mine.detach()[keep], theirs.detach()[keep])
        moments = optimizer.state[mine]["exp_avg"]
        assert torch.equal(moments[keep], other.state[theirs]["exp_avg"][keep])
        assert moments[keep].any()
        assert not moments[~keep].any()
    masks = sparsifier.masks.all()
    for step in range(20, 120):
        one_step(model, optimizer, step)
        assert all(not model.get_parameter(name).detach()[~keep].any() for name, keep in masks.items())
    plan = sparsifier.finish()
    assert all(torch.equal(plan.masks[name], keep) for name, keep in masks.items())
    assert all((model.get_parameter(name).detach()[keep] != 0).any() for name, keep in masks.items())


def test_a_rate_that_moves_during_the_stage_is_said_and_a_held_one_is_not():
    def warned(hold):
        model = network()
        optimizer = adam(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        sparsifier = sc.sparsify(model, optimizer, "iss", 0.9, steps=12, stage=0.5)
        hold_until = sparsifier.parts[1].hold_until
        assert hold_until == 6
        for step in range(12):
            one_step(model, optimizer, step)
            if not hold or sparsifier.step > hold_until:
                scheduler.step()
        return [sentence for sentence in sparsifier.finish().warnings if "learning rate" in sentence]

    assert warned(hold=False)
    assert not warned(hold=True)


def test_churn_and_gradient_norms_are_logged():
    model = network()
    optimizer = adam(model, 0.05)
    sparsifier = sc.sparsify(model, optimizer, "iss", 0.9, steps=30, stage=0.5, report=5)
    train(model, optimizer, 0, 30)
    log = sparsifier.log
    assert [(entry["step"], entry["what"]) for entry in log] == [
        (1, "shrink"), (5, "shrink"), (10, "shrink"), (15, "freeze")
    ]  # fmt: skip
    assert log[0]["changed"] == 0
    assert any(entry["changed"] > 0 for entry in log)
    assert all(entry["gradient_norm"] > 0 for entry in log)


# --- N:M ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pattern", "sizes", "expected"),
    [("2:4", [8, 16], "2:4"), ("1:20", [84, 168], "1:21"), ("1:3", [16, 32], "1:4"), ("1:5", [12, 18], "1:6")],
)
def test_a_pattern_widens_until_it_divides_everything(pattern, sizes, expected):
    assert widened(Pattern.parse(pattern), sizes) == Pattern.parse(expected)


def test_a_pattern_that_nothing_divides_is_refused():
    with pytest.raises(BudgetError, match="common divisor 4"):
        widened(Pattern.parse("1:5"), [8, 12])


def test_groups_lie_in_the_flattened_tensor_and_hold_exactly():
    model = network()  # rows of 27 inputs: groups of 4 cross rows
    optimizer, sparsifier = frozen(model, Budget.nm("1:4"), steps=4)
    train(model, optimizer, 0, 4)
    plan = sparsifier.finish()
    for name in SIZES:
        assert (plan.masks[name].reshape(-1, 4).sum(1) == 1).all()
        assert ((model.get_parameter(name) != 0).reshape(-1, 4).sum(1) == 1).all()
        biggest = weights(network())[name].reshape(-1, 4).abs().argmax(1)
        assert torch.equal(plan.masks[name].reshape(-1, 4).int().argmax(1), biggest)


def test_groups_along_inputs_follow_the_layout():
    torch.manual_seed(0)
    model = nn.Sequential(nn.ConvTranspose2d(8, 3, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    sparsifier = sc.sparsify(model, optimizer, "iss", budget=Budget.nm("2:4"), steps=2, groups="inputs")
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.rand(1, 8, 2, 2)).sum().backward()
        optimizer.step()
    mask = sparsifier.finish().masks["0.weight"]
    assert (mask.reshape(2, 4, -1).sum(1) == 2).all()


def test_a_pattern_leaves_dense_what_has_ratio_zero_and_what_is_excluded():
    model = network()
    optimizer, sparsifier = frozen(model, Budget.nm("2:4"), steps=3, ratios={"0*": 0}, exclude=["4*"])
    train(model, optimizer, 0, 3)
    plan = sparsifier.finish()
    assert plan.kept("0.weight") == 108
    assert plan.kept("2.weight") == 96
    assert "4.weight" not in plan.masks
    assert (model[4].weight != 0).all()


def test_the_real_pattern_is_reported():
    model = network()
    optimizer, sparsifier = frozen(model, Budget.nm("1:3"), steps=3)
    train(model, optimizer, 0, 3)
    plan = sparsifier.finish()
    assert plan.kept("4.weight") == 4
    assert any("1:4" in sentence and "0.75" in sentence for sentence in plan.warnings)


# --- ISS-R, fast ----------------------------------------------------------------------------------


def test_the_growing_penalty_enters_the_gradient_and_does_not_shrink_directly():
    model = network()
    before = weights(model)
    optimizer = torch.optim.SGD(model.parameters(), 1.0)
    sparsifier = sc.sparsify(model, optimizer, "iss", 0.9, steps=100, stage=0.9, penalty=0.1, penalty_every=2)
    for step in range(1, 6):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        strength = 0.1 * (step // 2)  # grows at steps 2 and 4, before they are made
        for name, old in before.items():
            gone = smallest(old, ceil(Fraction(9, 10) * old.numel()))
            before[name] = torch.where(gone, old - strength * old, old)
            torch.testing.assert_close(model.get_parameter(name).detach(), before[name])
    assert sparsifier.density == 1.0


def test_fast_choice_is_close_while_shrinking_and_exact_when_frozen():
    torch.manual_seed(0)
    layer = nn.Linear(300, 400, bias=False)
    before = layer.weight.detach().clone()
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    sparsifier = sc.sparsify(layer, optimizer, "iss", 0.9, steps=4, stage=0.5, fast=True)
    for step in range(2):
        layer.weight.grad = torch.zeros_like(layer.weight)
        optimizer.step()
        if step == 0:
            shrunk = layer.weight.detach() != before
            assert abs(int(shrunk.sum()) - 108_000) < 1200  # 4 standard deviations of the sample's share are 800
            assert before[shrunk].abs().max() <= before[~shrunk].abs().min()
    assert sparsifier.masks.kept["weight"] == 12_000


# --- resuming, bad input --------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [1, 7, 10, 11, 19])
@pytest.mark.parametrize("more", [{}, {"mode": "rand"}, {"penalty": 0.05, "penalty_every": 3}], ids=str)
def test_resuming_anywhere_equals_the_straight_run(cut, more, tmp_path):
    def fresh():
        model = network()
        optimizer = adam(model, 0.02)
        return model, optimizer, sc.sparsify(model, optimizer, "iss", 0.8, steps=20, stage=0.5, report=4, **more)

    straight, optimizer, sparsifier = fresh()
    train(straight, optimizer, 0, 20)
    plan, log = sparsifier.finish(), sparsifier.log
    first, optimizer, sparsifier = fresh()
    train(first, optimizer, 0, cut)
    save_tree({"m": first.state_dict(), "o": optimizer.state_dict(), "s": sparsifier.state_dict()}, tmp_path / "state")
    state = load_tree(tmp_path / "state")
    again, optimizer, sparsifier = fresh()
    again.load_state_dict(state["m"])
    optimizer.load_state_dict(state["o"])
    sparsifier.load_state_dict(state["s"])
    train(again, optimizer, cut, 20)
    resumed = sparsifier.finish()
    assert all(torch.equal(plan.masks[name], resumed.masks[name]) for name in SIZES)
    assert all(torch.equal(p, q) for p, q in zip(straight.parameters(), again.parameters(), strict=True))
    assert sparsifier.log == log


def test_stopping_before_the_stage_is_through_is_refused():
    model = network()
    optimizer, sparsifier = frozen(model, 0.9, steps=10, stage=0.5)
    train(model, optimizer, 0, 4)
    with pytest.raises(BudgetError, match="after 4 of 10 steps"):
        sparsifier.finish()


@pytest.mark.parametrize(
    ("error", "words", "asked", "more"),
    [
        (SettingsError, "'tail' fits no layer", 0.9, {"ratios": {"tail": 0.5}}),
        (SettingsError, "ratios", 0.9, {"ratios": {"0*": 1.5}}),
        (SettingsError, "only 0", Budget.nm("2:4"), {"ratios": {"0*": 0.5}}),
        (SettingsError, "alpha", 0.9, {"alpha": 1.5}),
        (BudgetError, "27 inputs", Budget.nm("2:4"), {"groups": "inputs"}),
        (BudgetError, "total", Budget(50, Quantity.UNITS), {}),
    ],
)
def test_bad_input_is_refused_in_one_sentence(error, words, asked, more):
    model = network()

    def started():
        optimizer, _ = frozen(model, asked, **more)
        one_step(model, optimizer, 0)

    with pytest.raises(error, match=words):
        started()


def test_the_catalogue_says_that_the_budget_holds_layer_by_layer():
    entry = api.find_method("iss")
    assert (entry.exact.value, entry.patterns, entry.kind.value) == ("site", True, "sparsifier")


@settings(max_examples=15, deadline=None)
@given(st.floats(0.01, 0.99), st.floats(0.1, 1.0), st.integers(1, 12), st.integers(0, 100))
def test_any_budget_and_stage_end_on_the_layers_counts(sparsity, stage, steps, seed):
    model = network(seed)
    optimizer = adam(model)
    sparsifier = sc.sparsify(model, optimizer, "iss", sparsity, steps=steps, stage=stage, seed=seed)
    train(model, optimizer, 0, steps)
    plan = sparsifier.finish()
    for name, size in SIZES.items():
        assert plan.kept(name) == kept(size, sparsity) == int((model.get_parameter(name) != 0).sum())
