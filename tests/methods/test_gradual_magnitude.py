"""Global magnitude during training: the cubic schedule, one ranking, the minimum at every event."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur import api
from secateur.core.budget import Budget
from secateur.core.errors import BudgetError, SettingsError

STEPS = 80
SIZES = {"0.weight": 240, "2.weight": 200, "4.weight": 60}
UNITS = 500


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 10), nn.ReLU(), nn.Linear(10, 6))


def train(until=STEPS, shrink=None, **settings):
    """The sparsifier after training, not finished, and the densities after each step."""
    model = network()
    if shrink is not None:
        with torch.no_grad():
            model[shrink].weight.mul_(0.01)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9)
    settings = {"sparsity": 0.9, "every": 5} | settings
    if "budget" in settings:
        settings.pop("sparsity")
    run = api.sparsify(model, optimizer, "global_magnitude", steps=STEPS, **settings)
    kept = [dict(run.masks.kept)]
    for step in range(until):
        rng = torch.Generator().manual_seed(step)
        optimizer.zero_grad()
        F.cross_entropy(model(torch.randn(8, 12, generator=rng)), torch.randint(6, (8,), generator=rng)).backward()
        optimizer.step()
        kept.append(dict(run.masks.kept))
    return run, kept


def test_the_density_follows_the_cubic_formula_to_a_weight():
    run, kept = train()
    for step, counts in enumerate(kept):
        u = min(1.0, (step // 5 * 5) / 60)  # 12 intervals up to three quarters of the training
        wanted = 500 * (0.1 + 0.9 * (1 - u) ** 3)
        assert abs(sum(counts.values()) - wanted) <= 1
    assert run.finish().units() == (50, 500)


def test_the_minimum_holds_at_every_event_and_others_pay():
    run, kept = train(shrink=4, minimum=12)
    assert min(counts["4.weight"] for counts in kept) == 12
    assert kept[-1]["4.weight"] == 12
    assert sum(kept[-1].values()) == 50
    assert any("4.weight" in line and "12" in line for line in run.finish().warnings)
    _, plain = train(shrink=4)
    assert plain[-1]["4.weight"] == 1  # one weight stays, so that a signal passes
    assert sum(plain[-1].values()) == 50
    assert kept[-1]["0.weight"] + kept[-1]["2.weight"] == plain[-1]["0.weight"] + plain[-1]["2.weight"] - 11


@pytest.mark.parametrize("settings", [{"minimum_percent": 3.0}, {"budget": Budget(0.9, floor=15)}])
def test_the_minimum_as_a_percentage_of_all_or_as_the_budget_s_floor(settings):
    _, kept = train(shrink=4, **settings)
    assert kept[-1]["4.weight"] == 15


def test_global_and_layer_wise_rankings_differ():
    _, one_list = train(shrink=2)
    _, each = train(shrink=2, spread="uniform")
    assert one_list[-1]["2.weight"] == 1
    assert [each[-1][name] for name in SIZES] == [24, 20, 6]


def test_a_minimum_that_no_layer_reaches_changes_nothing():
    (plain, _), (guarded, _) = train(sparsity=0.5), train(sparsity=0.5, minimum=5)
    assert all(torch.equal(plain.masks.get(name), guarded.masks.get(name)) for name in SIZES)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"minimum": 17}, BudgetError, "highest sparsity with this floor"),
        ({"reference": True}, SettingsError, "no gradual variant"),
        ({"start": 0.8}, SettingsError, "from start=0.8 to stop=0.75"),
    ],
)
def test_impossible_requests_are_refused_before_the_first_step(settings, error, words):
    with pytest.raises(error, match=words):
        train(until=0, **settings)


def test_stopping_early_is_refused():
    run, _ = train(until=50)
    with pytest.raises(BudgetError, match="before the schedule was through"):
        run.finish()
