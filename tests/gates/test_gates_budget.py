import math

import pytest
import torch
from torch import nn

from secateur.core.errors import BudgetError, ModelError, NumericsError
from secateur.gates.budget import Lagrangian, hinge_loss, open_share, prunable_target, ratio_loss
from secateur.gates.hard_concrete import HardConcrete
from secateur.gates.noise import NoiseStream


def scalar(value):
    return torch.tensor(value, dtype=torch.float64, requires_grad=True)


def test_open_share_plain_and_by_cost():
    gates = torch.tensor([1.0, 0.0, 1.0], requires_grad=True)
    assert float(open_share(gates.detach())) == pytest.approx(2 / 3)
    share = open_share(gates, torch.tensor([1, 2, 5]))
    assert float(share.detach()) == pytest.approx(6 / 8)
    share.backward()
    assert gates.grad.tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8])
    # one small unit beside costs that float32 cannot add it to
    costs = torch.tensor([2**40, 1], dtype=torch.int64)
    assert float(open_share(torch.tensor([0.0, 1.0], dtype=torch.float64), costs)) == 1 / (2**40 + 1)


def test_open_share_refuses_bad_costs():
    gates = torch.ones(2)
    for costs in ([1.0, -1.0], [0.0, 0.0], [1.0, float("inf")], [1.0, float("nan")]):
        with pytest.raises(BudgetError, match="finite, not negative and not all 0"):
            open_share(gates, torch.tensor(costs))
    with pytest.raises(ModelError, match="one per gate"):
        open_share(gates, torch.ones(3))
    with pytest.raises(NumericsError, match="gates"):
        open_share(torch.tensor([float("nan")]))


def test_lagrangian_by_hand_descends_on_sparsity_and_climbs_on_the_multipliers():
    lagrangian = Lagrangian()
    with torch.no_grad():
        lagrangian.linear.fill_(2.0)
        lagrangian.quadratic.fill_(3.0)
    sparsity = scalar(0.25)
    loss = lagrangian(sparsity, 0.75)
    assert float(loss.detach()) == pytest.approx(2 * -0.5 + 3 * 0.25)
    loss.backward()
    assert float(sparsity.grad) == pytest.approx(2 + 2 * 3 * -0.5)
    # reversed: an optimiser that minimises raises a multiplier by the positive derivative of the loss
    assert float(lagrangian.linear.grad) == pytest.approx(0.5)
    assert float(lagrangian.quadratic.grad) == pytest.approx(-0.25)
    torch.optim.SGD(lagrangian.parameters(), lr=1.0).step()
    assert lagrangian.linear.item() == pytest.approx(1.5)
    assert lagrangian.quadratic.item() == pytest.approx(3.25)


def test_multipliers_start_at_zero_may_turn_negative_and_are_saved():
    lagrangian = Lagrangian()
    assert [p.item() for p in lagrangian.parameters()] == [0, 0]
    optimizer = torch.optim.SGD(lagrangian.parameters(), lr=1.0)
    lagrangian(torch.tensor(0.2), 0.5).backward()  # too dense: the price of density becomes a negative lambda_1
    optimizer.step()
    assert lagrangian.linear.item() == pytest.approx(-0.3)
    assert set(lagrangian.state_dict()) == {"linear", "quadratic"}
    assert float(lagrangian(torch.tensor(0.2), 1.05).detach()) != 0  # targets above 1 are legal


def train_toy_gates(seed, target, climb):
    """30 gates, of which 0..9 help the task; returns the expected sparsity and the frozen mask of ten gates."""
    gate, noise = HardConcrete(), NoiseStream(seed, "toy")
    log_alpha = nn.Parameter(torch.full((30,), 4.0))
    worth = torch.cat([torch.linspace(0.3, 1.0, 10), torch.zeros(20)])
    lagrangian = Lagrangian()
    groups = [{"params": [log_alpha], "lr": 0.1}, {"params": lagrangian.parameters(), "lr": climb}]
    optimizer = torch.optim.Adam(groups)
    for step in range(600):
        optimizer.zero_grad()
        z = gate.sample(log_alpha, noise.uniform((30,), step))
        sparsity = 1 - open_share(gate.open_probability(log_alpha))
        ((worth * (1 - z) ** 2).sum() + lagrangian(sparsity, target * min(1.0, step / 300))).backward()
        optimizer.step()
    return 1 - float(gate.open_probability(log_alpha.detach()).mean()), gate.frozen(log_alpha, keep=10)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("target", [0.5, 2 / 3])
def test_lagrangian_reaches_its_target_and_the_useful_gates_stay(seed, target):
    sparsity, frozen = train_toy_gates(seed, target, climb=0.02)
    assert sparsity == pytest.approx(target, abs=0.02)
    assert frozen.mask[:10].all()
    assert int(frozen.mask.sum()) == 10
    assert frozen.sampled_share == pytest.approx(1 - sparsity)


def test_without_climbing_multipliers_nothing_is_pruned():
    assert train_toy_gates(0, 2 / 3, climb=0.0)[0] < 0.05


@pytest.mark.parametrize(("share", "target"), [(0.8, 0.4), (0.4, 0.8), (0.55, 0.6)])
def test_ratio_loss_against_finite_differences(share, target):
    x = scalar(share)
    loss = ratio_loss(x, target)
    assert float(loss.detach()) == pytest.approx(abs(math.log(share / target)), abs=1e-8)
    loss.backward()
    up, down = (ratio_loss(torch.tensor(share + h, dtype=torch.float64), target) for h in (1e-6, -1e-6))
    assert float(x.grad) == pytest.approx(float(up - down) / 2e-6, rel=1e-5)


def test_ratio_loss_rests_at_its_target_and_survives_zero():
    x = scalar(0.6)
    loss = ratio_loss(x, 0.6)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-9)
    assert float(x.grad) == pytest.approx(0, abs=1e-9)
    zero = scalar(0.0)
    loss = ratio_loss(zero, 0.6)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert float(zero.grad) < 0


def test_hinge_is_one_sided_and_its_gradient_is_never_nan():
    for share, value, slope in [(0.8, math.log(2), 1 / 0.8), (1.2, math.log(3), 1 / 1.2), (0.39, 0, 0), (0.0, 0, 0)]:
        x = scalar(share)
        loss = hinge_loss(x, 0.4)
        loss.backward()
        assert float(loss.detach()) == pytest.approx(value)
        assert float(x.grad) == pytest.approx(slope)


def test_targets_of_the_total_become_targets_of_the_prunable_part():
    # 100 in all, 60 under gates, keep 70: 30 must go, so 30 of the 60 stay
    assert prunable_target(0.7, 100, 60) == pytest.approx(0.5)
    assert prunable_target(1.0, 100, 60) == 1
    with pytest.raises(BudgetError, match=r"only 0\.3 of the total cost: 0\.4000 of it has no gates"):
        prunable_target(0.3, 100, 60)
    for prunable in (0, 101):
        with pytest.raises(BudgetError, match="up to the total"):
            prunable_target(0.5, 100, prunable)


@pytest.mark.parametrize("loss", [ratio_loss, hinge_loss])
def test_budget_losses_refuse_bad_targets_and_nan(loss):
    for target in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(BudgetError, match="share to keep"):
            loss(torch.tensor(0.5), target)
    with pytest.raises(NumericsError, match="kept share"):
        loss(torch.tensor(float("nan")), 0.5)
    with pytest.raises(NumericsError, match="sparsity"):
        Lagrangian()(torch.tensor(float("nan")), 0.5)
