"""Global magnitude: exact totals, the minimum threshold, and the traps of its note."""

import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur import api
from secateur.allocate.counts import reference_floor
from secateur.core.errors import BudgetError


def network(seed=0):
    """Convolutions, one of them depthwise, batch norm, biases, a classifier."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 16, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 100),
    )


SIZES = {"0.weight": 72, "2.weight": 72, "3.weight": 128, "6.weight": 1600}


def smallest(weights, remove):
    """The global ranking as a plain sort over (value, position)."""
    flat = np.concatenate([w.detach().abs().reshape(-1).numpy() for w in weights])
    keep = np.ones(len(flat), dtype=bool)
    keep[sorted(range(len(flat)), key=lambda i: (flat[i], i))[:remove]] = False
    return np.split(keep, np.cumsum([w.numel() for w in weights])[:-1])


@settings(max_examples=40, deadline=None)
@given(permille=st.integers(1, 990), ties=st.booleans(), seed=st.integers(0, 10**6))
def test_one_list_over_all_layers_and_an_exact_total(permille, ties, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5))
    with torch.no_grad():
        if ties:
            for layer in (model[0], model[2]):
                layer.weight.copy_(torch.randint(-2, 3, layer.weight.shape))
    remove = int(Fraction(permille, 1000) * 132)
    expected = smallest([model[0].weight, model[2].weight], remove)
    if not remove or not all(part.any() for part in expected):
        with pytest.raises(BudgetError):
            api.plan(model, "global_magnitude", permille / 1000)
        return
    plan = api.plan(model, "global_magnitude", permille / 1000)
    assert plan.units() == (132 - remove, 132)
    for name, part in zip(("0.weight", "2.weight"), expected, strict=True):
        assert (plan.masks[name].numpy().reshape(-1) == part).all()


def test_the_list_holds_every_convolution_and_the_classifier_and_nothing_else():
    plan = api.plan(network(), "global_magnitude", 0.5)
    assert {name: site.units for name, site in plan.sites.items()} == SIZES
    assert plan.units() == (936, 1872)


def test_layers_are_not_normalised_before_the_sort():
    model = network()
    with torch.no_grad():
        model[3].weight.mul_(10_000)
    plan = api.plan(model, "global_magnitude", 0.5)
    assert plan.kept("3.weight") == 128


@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.95])
@pytest.mark.parametrize("minimum", [5, 20, 40])
def test_the_minimum_is_taken_from_the_other_layers(sparsity, minimum):
    model = network()
    with torch.no_grad():  # the depthwise layer would go first
        model[2].weight.mul_(0.01)
    total = 1872 - int(1872 * Fraction(str(sparsity)))
    if minimum * 4 > total:
        with pytest.raises(BudgetError):
            api.plan(model, "global_magnitude", sparsity, minimum=minimum)
        return
    plain = api.plan(model, "global_magnitude", sparsity, exclude=["2"])  # a plain plan would be refused as empty
    guarded = api.plan(model, "global_magnitude", sparsity, minimum=minimum)
    assert guarded.units() == (total, 1872)
    assert guarded.kept("2.weight") == minimum
    assert all(guarded.kept(name) >= minimum for name in SIZES)
    assert any("2.weight" in warning and "minimum" in warning for warning in guarded.warnings)
    assert not any("6.weight" in warning for warning in guarded.warnings)
    biggest = model[2].weight.detach().abs().flatten().topk(minimum).indices
    assert bool(guarded.masks["2.weight"].flatten()[biggest].all())
    # within each layer the largest stay, and a layer that gave keeps at most what it had
    for name in SIZES.keys() - {"2.weight"}:
        kept = guarded.masks[name]
        weight = dict(model.named_parameters())[name].detach().abs()
        assert weight[kept].min() >= weight[~kept].max()
    assert sum(plain.units()[:1]) > 0


def test_a_minimum_that_no_layer_is_below_changes_nothing():
    model = network()
    plain, guarded = (api.plan(model, "global_magnitude", 0.5, minimum=m) for m in (0, 10))
    assert all(torch.equal(plain.masks[name], guarded.masks[name]) for name in SIZES)
    assert not guarded.warnings


def test_layers_smaller_than_the_minimum_stay_whole():
    plan = api.plan(network(), "global_magnitude", 0.7, minimum=100)
    assert plan.kept("0.weight") == plan.kept("2.weight") == 72
    assert plan.kept("3.weight") >= 100
    assert plan.units()[0] == 1872 - int(1872 * 0.7)


def test_percent_counts_all_weights_and_holds_in_each_layer():
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(0.01)
    plan = api.plan(model, "global_magnitude", 0.9, minimum_percent=1)
    assert plan.kept("2.weight") == 18  # floor(1 % of 1872)


def test_an_infeasible_minimum_is_refused_with_the_largest_sparsity_that_works():
    model = network()
    with pytest.raises(BudgetError, match="highest sparsity with this floor is") as refused:
        api.plan(model, "global_magnitude", 0.95, minimum=60)
    largest = float(re.search(r"floor is ([0-9.]+)", str(refused.value)).group(1))
    plan = api.plan(model, "global_magnitude", largest, minimum=60)
    assert all(plan.kept(name) >= 60 for name in SIZES)
    with pytest.raises(BudgetError):
        api.plan(model, "global_magnitude", largest + 0.002, minimum=60)


def test_an_emptied_layer_is_refused_and_named():
    model = network()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    with pytest.raises(BudgetError, match=r"'2\.weight' would keep 0 of 72"):
        api.plan(model, "global_magnitude", 0.5)


def test_tied_weights_are_counted_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.Linear(8, 3))
    model[2].weight = model[0].weight
    plan = api.plan(model, "global_magnitude", 0.5)
    assert plan.units() == (44, 88)
    assert list(plan.masks) == ["0.weight", "3.weight"]
    assert any("'2.weight'" in warning and "'0'" in warning for warning in plan.warnings)


def test_the_reference_keeps_the_k_th_smallest():
    model = network()
    exact, reference = (api.plan(model, "global_magnitude", 0.5, reference=flag) for flag in (False, True))
    assert exact.units()[0] == 936
    assert reference.units()[0] == 937
    flat = torch.cat([dict(model.named_parameters())[name].detach().abs().flatten() for name in SIZES])
    threshold = flat.sort().values[935]
    for name in SIZES:
        assert torch.equal(reference.masks[name], dict(model.named_parameters())[name].detach().abs() >= threshold)


def test_the_note_s_worked_example_of_the_published_refinement():
    sizes = {"a": 20_000, "b": 60_000, "c": 500}
    refined = reference_floor(sizes, {"a": 0.94, "b": 0.9945, "c": 0.99}, 0.98, 100)
    assert refined == pytest.approx({"a": 0.940240, "b": 0.994753, "c": 0.8}, abs=1e-6)
    assert [round((1 - refined[name]) * size) for name, size in sizes.items()] == [1195, 315, 100]


def test_patterns_hold_in_every_group_of_the_matrix():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.Flatten(), nn.Linear(24, 8))
    plan = api.plan(model, "global_magnitude", pattern="1:4")
    for name in ("0.weight", "2.weight"):
        weight = dict(model.named_parameters())[name].detach().flatten(1)
        groups = weight.abs().view(-1, 4)
        assert (plan.masks[name].flatten(1).view(-1, 4).int().argmax(1) == groups.argmax(1)).all()
        assert (plan.masks[name].flatten(1).view(-1, 4).sum(1) == 1).all()


@pytest.mark.parametrize("spread", ["uniform", "erk"])
def test_other_spreads_keep_the_exact_total(spread):
    plan = api.plan(network(), "global_magnitude", 0.9, spread=spread)
    assert plan.units() == (1872 - 1684, 1872)
    density = {name: plan.kept(name) / units for name, units in SIZES.items()}
    if spread == "uniform":
        assert all(abs(plan.kept(name) - 188 / 1872 * units) < 1 for name, units in SIZES.items())
    else:
        factors = {"0.weight": 15 / 72, "2.weight": 15 / 72, "3.weight": 26 / 128, "6.weight": 116 / 1600}
        scale = 188 / (15 + 15 + 26 + 116)
        assert all(abs(density[name] - scale * factor) * SIZES[name] < 1 for name, factor in factors.items())


def test_random_masks_follow_the_seed_and_the_layer_s_name():
    model = network()
    first, again, other = (api.plan(model, "random", 0.5, seed=seed) for seed in (0, 0, 1))
    fewer = api.plan(model, "random", 0.5, seed=0, exclude=["0"])
    for name in SIZES:
        assert torch.equal(first.masks[name], again.masks[name])
        assert not torch.equal(first.masks[name], other.masks[name])
        if name != "0.weight":
            assert torch.equal(first.masks[name], fewer.masks[name])
    assert not torch.equal(first.masks["0.weight"].flatten(), first.masks["2.weight"].flatten())
    assert first.units() == (936, 1872)


def test_taylor_by_hand():
    """Loss of one linear layer: the gradient is (softmax - one hot) times the input, averaged over samples."""
    torch.manual_seed(0)
    model = nn.Linear(6, 4)
    data, target = torch.randn(30, 6), torch.randint(0, 4, (30,))
    batches = [(data[:7], target[:7]), (data[7:], target[7:])]  # batches of unequal size
    plan = api.plan(model, "taylor", 0.5, data=batches, keep_scores=True)
    probability = torch.softmax(model(data).double(), 1).detach()
    gradient = (probability - nn.functional.one_hot(target, 4)).t() @ data.double() / 30
    expected = (model.weight.detach().double() * gradient).abs()
    torch.testing.assert_close(plan.scores["weight"].double(), expected, rtol=1e-4, atol=1e-7)
    assert int(plan.masks["weight"].sum()) == 12
    assert expected[plan.masks["weight"]].min() > expected[~plan.masks["weight"]].max()
    assert model.weight.grad is None
