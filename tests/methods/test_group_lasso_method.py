"""Group lasso: the proximal step and the subgradient by hand and by autograd, exact zeros, groups, the ending."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from trained_cuts import BARE, INNER, SHAPE, STREAM, advance, attached, batch, finished, net, resumed, same_bytes, sgd

import secateur as sc
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.methods.channels.group_lasso import shrunk

EXAMPLE = torch.zeros(2, *SHAPE)
MEMBERS = {  # site -> (parameter, dimension)
    STREAM: [
        *(("stem.weight", 0), ("norm0.weight", 0), ("norm0.bias", 0), ("conv1.weight", 1), ("conv2.weight", 0)),
        *(("norm2.weight", 0), ("norm2.bias", 0), ("bare.weight", 1)),
    ],
    INNER: [("conv1.weight", 0), ("norm1.weight", 0), ("norm1.bias", 0), ("conv2.weight", 1)],
    BARE: [("bare.weight", 0), ("bare.bias", 0), ("head.weight", 1)],
}
PRODUCERS = {
    STREAM: [("stem.weight", 0), ("conv2.weight", 0)],
    INNER: [("conv1.weight", 0)],
    BARE: [("bare.weight", 0)],
}


def gathered(model, places, unit):
    """All weights of one unit in a row."""
    parameters = dict(model.named_parameters())
    return torch.cat([parameters[name].select(dim, unit).reshape(-1) for name, dim in places])


def units():
    return {STREAM: 8, INNER: 12, BARE: 6}


def lasso(model, members):
    """sum_g sqrt(|g|) ||W_g||."""
    groups = [gathered(model, places, i) for name, places in members.items() for i in range(units()[name])]
    return sum(len(group) ** 0.5 * group.norm() for group in groups)


# --- the penalty ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("setting", "members"), [("all", MEMBERS), ("producers", PRODUCERS)])
def test_the_subgradient_is_that_of_the_penalty(setting, members):
    model, optimizer, _ = attached("group_lasso", weight=0.02, step="subgradient", members=setting)
    other = copy.deepcopy(model).train()
    own = sgd(other)
    advance(model, optimizer, 0, 2)
    for step in range(2):
        x, y = batch(step)
        own.zero_grad()
        (F.cross_entropy(other(x), y) + 0.02 * lasso(other, members)).backward()
        own.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value.float(), other.state_dict()[name].float(), atol=1e-5), name


def test_disjoint_groups_take_the_exact_proximal_step():
    """argmin 1/2 ||V - W||^2 + lr a sqrt(|g|) ||V||: checked by its optimality condition, group by group."""
    model, optimizer, _ = attached("group_lasso", weight=1.3, members="producers")
    before = copy.deepcopy(model)
    advance(before, sgd(before), 0, 1)  # the plain step
    advance(model, optimizer, 0, 1)
    zeros = 0
    for name, places in PRODUCERS.items():
        for i in range(units()[name]):
            w, v = gathered(before, places, i).double(), gathered(model, places, i).double()
            bound = 0.05 * 1.3 * len(w) ** 0.5
            if v.any():
                assert torch.allclose(v + bound * v / v.norm(), w, atol=1e-6)
            else:
                zeros += 1
                assert w.norm() <= bound
    assert 0 < zeros < 26
    assert torch.equal(model.norm1.weight, before.norm1.weight)


def test_shared_weights_get_both_factors():
    model, optimizer, _ = attached("group_lasso", weight=0.2)
    plain = copy.deepcopy(model)
    advance(plain, sgd(plain), 0, 1)
    advance(model, optimizer, 0, 1)

    def factor(site, i):
        group = gathered(plain, MEMBERS[site], i)
        return max(0.0, 1 - 0.05 * 0.2 * len(group) ** 0.5 / group.norm().item())

    rows = torch.tensor([factor(INNER, i) for i in range(12)])
    columns = torch.tensor([factor(STREAM, j) for j in range(8)])
    expected = plain.conv1.weight * rows.view(-1, 1, 1, 1) * columns.view(1, -1, 1, 1)
    assert torch.allclose(model.conv1.weight, expected, atol=1e-6)
    assert torch.allclose(model.norm1.bias, plain.norm1.bias * rows, atol=1e-6)
    assert torch.equal(model.head.bias, plain.head.bias)


def test_a_root_mean_square_falls_by_the_amount_and_stops_at_zero():
    size = torch.tensor([2.0, 0.5, 0.1, 0.0])
    assert torch.allclose(size * shrunk(size, 0.2), torch.tensor([1.8, 0.3, 0.0, 0.0]))
    assert torch.equal(shrunk(size, 0.0)[:3], torch.ones(3))
    assert torch.isfinite(shrunk(size, 0.0)).all()


@pytest.mark.parametrize("step", ["proximal", "subgradient"])
def test_groups_at_zero_make_no_nan(step):
    model = net()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    _, model, _ = finished("group_lasso", steps=2, model=model, step=step, weight=0.1)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_the_step_follows_the_learning_rate():
    model, optimizer, _ = attached("group_lasso", weight=0.2)
    optimizer.param_groups[0]["lr"] = 0.0
    before = copy.deepcopy(model.state_dict())
    advance(model, optimizer, 0, 1)
    assert torch.equal(model.conv1.weight, before["conv1.weight"])


def test_several_learning_rates_are_refused_by_the_proximal_step_only():
    def two_rates(model):
        head = list(model.head.parameters())
        rest = [p for name, p in model.named_parameters() if not name.startswith("head")]
        return torch.optim.SGD([{"params": rest}, {"params": head, "lr": 0.01}], 0.05)

    model = net()
    optimizer = two_rates(model)
    attached("group_lasso", model=model, optimizer=optimizer)
    with pytest.raises(SettingsError, match="one learning rate"):
        advance(model, optimizer, 0, 1)
    other = net()
    finished("group_lasso", model=other, optimizer=two_rates(other), step="subgradient")


# --- the cut ----------------------------------------------------------------------------------------


def test_scores_are_root_mean_squares_and_the_smallest_of_all_go():
    plan, model, _ = finished("group_lasso", 0.4)
    expected = {
        name: torch.stack([gathered(model, places, i).square().mean().sqrt() for i in range(units()[name])]).detach()
        for name, places in MEMBERS.items()
    }
    for name, score in expected.items():
        assert torch.allclose(plan.scores[name], score, atol=1e-6), name
    ranking = sorted((float(s), name, i) for name, score in expected.items() for i, s in enumerate(score))
    gone = {(name, i) for _, name, i in ranking[: int(0.4 * 26)]}
    assert {(n, i) for n in expected for i in (~plan.masks[n]).nonzero().flatten().tolist()} == gone


def test_cutting_groups_that_are_zero_changes_nothing():
    """The proximal step takes whole channels out, norms and readers included: the cut network is the trained one."""
    model = net()
    with torch.no_grad():
        for place, dim in MEMBERS[INNER]:
            model.get_parameter(place).narrow(dim, 3, 6).mul_(1e-3)
    plan, model, _ = finished("group_lasso", 0.25, steps=3, weight=0.1, model=model)
    assert plan.masks[INNER].tolist() == [True] * 3 + [False] * 6 + [True] * 3
    gone = [gathered(model, MEMBERS[n], i) for n, m in plan.masks.items() for i in (~m).nonzero().flatten().tolist()]
    assert not torch.cat(gone).any()
    x = batch(99)[0]
    with torch.no_grad():
        before = model(x)
        after = sc.apply_(model, plan, example=EXAMPLE)(x)
    assert torch.allclose(before, after, atol=1e-6)
    assert not torch.allclose(before[0], before[1])


def test_subgradients_end_near_zero_and_not_at_it():
    _, model, run = finished("group_lasso", 0.25, steps=20, weight=0.1, step="subgradient")
    assert all(bool(p.abs().min() > 0) for p in (model.conv1.weight, model.conv2.weight))
    assert run.log[-1]["what"] == "cut"


def test_a_network_that_was_shrunk_away_is_said():
    plan, _, run = finished("group_lasso", steps=8, weight=50.0)
    assert any("was driven to zero" in warning for warning in plan.warnings)
    assert run.log[-1]["near_zero"] == 1


def test_units_of_a_site_alone_compete_if_asked():
    plan, _, _ = finished("group_lasso", 0.5, scope="local")
    assert [plan.kept(name) for name in (STREAM, INNER, BARE)] == [4, 6, 3]


# --- resuming and refusing ----------------------------------------------------------------------------


@pytest.mark.parametrize("step", ["proximal", "subgradient"])
def test_a_resumed_run_is_the_straight_one_bit_for_bit(step):
    straight, model, _ = finished("group_lasso", weight=0.1, step=step)
    again, other = resumed("group_lasso", 3, weight=0.1, step=step)
    assert same_bytes(model, other)
    assert again.document() == straight.document()
    assert all(torch.equal(again.masks[name], mask) for name, mask in straight.masks.items())


def test_a_frozen_member_is_refused():
    model = net()
    model.norm1.bias.requires_grad_(False)
    with pytest.raises(ModelError, match=r"'norm1\.bias' is frozen"):
        attached("group_lasso", model=model)
    attached("group_lasso", model=model, members="producers")


def test_a_budget_out_of_reach_is_refused_before_the_training():
    with pytest.raises(BudgetError, match="out of reach"):
        attached("group_lasso", None, budget=Budget(0.01, Quantity.PARAMETERS))


def test_nothing_to_cut_is_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    with pytest.raises(ModelError, match="nothing is left to cut"):
        attached("group_lasso", model=model, example=torch.rand(2, *SHAPE))


def test_neurons_of_plain_layers_are_groups_too():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 20), nn.ReLU(), nn.Linear(20, 3))
    plan, _, _ = finished("group_lasso", 0.5, model=model, example=torch.rand(2, *SHAPE))
    assert plan.kept("1:neuron") == 10
    assert plan.scores["1:neuron"][0] == pytest.approx(
        float(torch.cat([model[1].weight[0], model[1].bias[:1], model[3].weight[:, 0]]).square().mean().sqrt()), 1e-5
    )


def test_after_a_training_the_nearest_widths_are_better_than_none():
    """A plan is refused where no widths come within 1 %; a trained network is cut below and says so."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    budget, given = sc.Budget(0.5, "parameters"), {"example": torch.randn(2, 4), "multiple": 1}
    with pytest.raises(BudgetError, match="cannot be met within 1%"):
        sc.plan(model, "channel_norm", budget=budget, largest_cut=1.0, **given)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    run = sc.sparsify(model, optimizer, "group_lasso", budget=budget, steps=3, **given)
    for _ in range(3):
        optimizer.zero_grad()
        (model(torch.randn(8, 4)).square().mean() + run.penalty()).backward()
        optimizer.step()
    plan = run.finish()
    kept = next(iter(plan.facts.values()))["parameters_kept"]
    assert kept < 0.49
    assert any(f"more goes than parameters 0.5 asks, {kept:.4g} of the dense" in line for line in plan.warnings)
