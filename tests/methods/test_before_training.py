"""Random pruning, SNIP, GraSP and SynFlow on networks before training, and the traps of their note."""

import copy

import pytest
import torch
from torch import nn

import secateur as sc
from secateur import api
from secateur.core.errors import BudgetError, DataError, ModelError, NumericsError, SettingsError, UnknownNameError
from secateur.core.method import Batch
from secateur.lab.checks._at_start import conv_net, layer_densities
from secateur.train.keep import MaskKeeper

LAYERS = ["0.weight", "3.weight", "7.weight", "10.weight", "15.weight"]
RULES = ["uniform", "uniform_plus", "er", "erk", "erk_plus", "global", "snip", "grasp", "synflow"]
TOTAL = 36 + 288 + 1152 + 2304 + 160  # of conv_net(4): 3,940


def images(count=60, seed=0):
    rng = torch.Generator().manual_seed(seed)
    target = torch.arange(count) % 10
    inputs = torch.rand(count, 1, 8, 8, generator=rng) + target.view(-1, 1, 1, 1) / 10
    return [Batch((inputs,), target=target)]


def planned(method="random", sparsity=0.9, net=None, seed=0, **settings):
    net = conv_net(4, 0) if net is None else net
    settings.setdefault("data", images())
    return api.plan(net, method, sparsity, seed=seed, **settings)


def counts(plan):
    return [plan.kept(name) for name in plan.sites]


# --- random -------------------------------------------------------------------------------------


@pytest.mark.parametrize("spread", RULES)
def test_every_spread_has_the_exact_total_and_the_same_bytes_again(spread, tmp_path):
    plans = []
    for place in ("a", "b"):
        torch.manual_seed(hash(place) % 1000)  # the surroundings' seed and data order do not matter
        plans.append(planned(spread=spread))
        plans[-1].save(tmp_path / place)
    assert plans[0].units() == (TOTAL - 9 * TOTAL // 10, TOTAL)
    assert (tmp_path / "a" / "plan.safetensors").read_bytes() == (tmp_path / "b" / "plan.safetensors").read_bytes()
    assert (tmp_path / "a" / "plan.json").read_bytes() == (tmp_path / "b" / "plan.json").read_bytes()
    assert plans[0].provenance[0].seed == 0
    other = planned(spread=spread, seed=1)
    assert any(not torch.equal(plans[0].masks[name], other.masks[name]) for name in LAYERS)


def test_erk_counts_are_the_rounded_densities():
    plan = planned(spread="erk", sparsity=0.95, net=conv_net(16, 0))
    sizes = [144, 4608, 18432, 36864, 640]
    wanted = [1.0, 0.093055, 0.043942, 0.028864, 0.918139]
    total = sum(sizes) - int(sum(sizes) * 0.95)  # 3035, a little above 5 %
    assert sum(counts(plan)) == total
    assert all(
        abs(kept - density * size) < 1.1 for kept, density, size in zip(counts(plan), wanted, sizes, strict=True)
    )


@pytest.mark.parametrize("criterion", ["grasp", "synflow"])
def test_densities_of_a_criterion_without_its_positions(criterion):
    own, random = planned(criterion), planned(spread=criterion)
    assert counts(own) == counts(random)
    both = sum(row["both"] for row in own.diff(random))
    assert both < 0.6 * own.units()[0]


def test_snips_densities_are_read_off_xavier_weights_and_positions_are_thrown_away():
    net = conv_net(4, 0)
    own, random = planned("snip", redraw=True, net=net), planned(spread="snip", net=net)
    assert counts(own) == counts(random)
    assert sum(row["both"] for row in own.diff(random)) < 0.6 * own.units()[0]
    scaled = copy.deepcopy(net)
    with torch.no_grad():
        scaled[7].weight.mul_(50)
        scaled[15].weight.mul_(50)
    assert counts(planned(spread="snip", net=scaled)) == counts(random)
    assert counts(planned("snip", net=scaled)) != counts(planned("snip", net=net))


@pytest.mark.parametrize("spread", ["snip", "grasp"])
def test_criteria_with_labels_say_what_to_give(spread):
    with pytest.raises(DataError, match=f"spread={spread} .* give data="):
        planned(spread=spread, data=None)
    with pytest.raises(DataError, match="label"):
        planned(spread=spread, data=torch.rand(8, 1, 8, 8))


def test_data_are_read_and_recorded_only_where_the_densities_need_them():
    assert planned(spread="erk").provenance[0].data == {}
    assert planned(spread="synflow").provenance[0].data == {}
    assert planned(spread="snip").provenance[0].data["samples"] == 60
    assert (
        planned(spread="snip", data=images(seed=5)).provenance[0].data["digest"]
        != (planned(spread="snip").provenance[0].data["digest"])
    )


def test_bernoulli_draws_every_weight_by_itself():
    net = conv_net(8, 0)
    shares = [planned(spread="erk", sampling="bernoulli", net=net, seed=seed).units()[0] for seed in range(30)]
    exact = planned(spread="erk", net=net).units()[0]
    assert len(set(shares)) > 10
    # the standard deviation of a sum of independent draws at ERK's densities is about 34 here
    assert abs(sum(shares) / 30 - exact) < 30
    thin, dense = (planned(spread="erk", sampling="bernoulli", net=net, sparsity=s) for s in (0.95, 0.9))
    assert all(not (thin.masks[name] & ~dense.masks[name]).any() for name in LAYERS)  # one number per weight
    assert planned(sampling="bernoulli", net=net, sparsity=0.0).sparsity == 0


@pytest.mark.parametrize("sampling", ["exact", "bernoulli"])
def test_a_layer_that_would_get_none_keeps_one_and_says_so(sampling):
    plan = planned(sparsity=0.997, sampling=sampling, seed=3)  # 12 of 3940: 0.11 for the first layer
    assert plan.kept("0.weight") == 1
    assert any("'0.weight' would keep no weight" in warning for warning in plan.warnings)
    assert not any("'10.weight'" in warning for warning in plan.warnings)
    if sampling == "exact":
        assert plan.units()[0] == TOTAL - int(0.997 * TOTAL)
    assert not planned(sparsity=0.9, sampling=sampling).warnings


def test_fewer_weights_than_layers_are_refused():
    with pytest.raises(
        BudgetError, match="a floor of 1 units in each of 5 sites needs 5 kept units, the budget keeps 4"
    ):
        planned(sparsity=0.999)


def test_settings_reach_the_rules():
    dense = planned(spread="uniform_plus", sparsity=0.8)
    assert (dense.kept("0.weight"), dense.kept("15.weight")) == (36, 32)
    named = planned(spread="uniform_plus", sparsity=0.8, first="3", classifier="10.weight")
    assert (named.kept("3.weight"), round(named.kept("10.weight") / 2304, 2)) == (288, 0.2)
    half = planned(spread="erk_plus", classifier_density=0.5)
    assert half.kept("15.weight") == 80
    assert planned(spread="erk_plus").kept("15.weight") == 160
    assert planned(spread="erk", power=2.0).kept("0.weight") > planned(spread="erk", power=0.5).kept("0.weight")
    with pytest.raises(UnknownNameError, match="layer 'stem'"):
        planned(spread="uniform_plus", first="stem")
    with pytest.raises(SettingsError, match="power"):
        planned(power=0)
    with pytest.raises(BudgetError, match="bernoulli cannot keep the pattern 2:4"):
        api.plan(nn.Linear(8, 8), "random", pattern="2:4", sampling="bernoulli")


def test_depthwise_convolutions_count_by_their_own_shape():
    net = nn.Sequential(nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 32, 1))  # (8, 1, 3, 3) and (32, 8, 1, 1)
    plan = planned(spread="erk", net=net, sparsity=0.75, data=None)
    # 82 of 328 kept; shape sums 15 and 42: 82 * 15 / 57 = 21.6
    assert counts(plan) == [22, 60]


def test_the_mask_does_not_change_in_training():
    net = conv_net(4, 0)
    plan = planned(spread="erk", net=net)
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    with MaskKeeper(net, plan, optimizer):
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images()[0].args[0]), images()[0].target).backward()
            optimizer.step()
    for name, mask in plan.masks.items():
        weight = dict(net.named_parameters())[name].detach()
        assert not weight[~mask].any()
        assert (weight[mask] != before[name][mask]).float().mean() > 0.5


# --- SNIP, GraSP, SynFlow -----------------------------------------------------------------------


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_batching_does_not_matter(method):
    (batch,) = images()
    pieces = [Batch((x,), target=y) for x, y in zip(batch.args[0].split(7), batch.target.split(7), strict=True)]
    one, many = planned(method), planned(method, data=pieces)
    assert all(torch.equal(one.masks[name], many.masks[name]) for name in LAYERS)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_ends_are_denser_than_the_middle(method):
    first, *middle, last = layer_densities(planned(method, 0.95, net=conv_net(16, 0)))
    assert 0 < max(middle) < min(first, last) <= 1


@pytest.mark.parametrize(("method", "setting"), [("snip", {"samples": 20}), ("grasp", {"per_class": 2})])
def test_the_samples_are_drawn_with_the_seed(method, setting):
    one, again, other = (planned(method, seed=seed, **setting) for seed in (0, 0, 1))
    assert all(torch.equal(one.masks[name], again.masks[name]) for name in LAYERS)
    assert any(not torch.equal(one.masks[name], other.masks[name]) for name in LAYERS)


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_labels_are_asked_for(method):
    with pytest.raises(DataError, match="needs"):
        planned(method, data=None)
    with pytest.raises(DataError, match="label"):
        planned(method, data=torch.rand(8, 1, 8, 8))


def test_grasps_reference_differs_by_its_halves():
    ours, theirs = planned("grasp"), planned("grasp", reference=True)
    assert ours.units() == theirs.units()
    assert any(not torch.equal(ours.masks[name], theirs.masks[name]) for name in LAYERS)


class Idle(nn.Module):
    """Two layers, one without use."""

    def __init__(self, gain=1.0):
        super().__init__()
        self.used, self.idle, self.gain = nn.Linear(4, 3), nn.Linear(4, 3), gain

    def forward(self, x):
        return self.gain * self.used(x)


VECTORS = [Batch((torch.arange(36.0).view(9, 4) % 7,), target=torch.arange(9) % 3)]


@pytest.mark.parametrize("method", ["snip", "grasp"])
def test_layers_without_gradient_are_named(method):
    plan = planned(method, net=Idle(), data=VECTORS, sparsity=None, budget=sc.Budget(0.5, floor=1))
    assert any("'idle.weight' has no gradient" in warning for warning in plan.warnings)
    assert not any("'used.weight'" in warning for warning in plan.warnings)


@pytest.mark.parametrize("method", ["snip", "grasp", "synflow"])
def test_a_model_that_no_signal_passes_is_refused(method):
    with pytest.raises(NumericsError, match="any layer"):
        planned(method, net=Idle(gain=0.0), data=VECTORS)
    patched = Idle()
    patched.forward = Idle(gain=2.0).forward  # a forward of another object: the copy's weights have no part in it
    with pytest.raises((NumericsError, ModelError), match=r"any layer|cannot be run"):
        planned(method, net=patched, data=VECTORS)


def test_an_emptied_layer_is_refused_unless_the_budget_has_a_floor():
    with pytest.raises(BudgetError, match="would keep 0 of"):
        planned("snip", 0.995)
    plan = planned("snip", None, budget=sc.Budget(0.995, floor=1))
    assert min(counts(plan)) == 1


def test_synflow_needs_shapes_and_no_data():
    fed = planned("synflow", data=images(seed=7))
    free = planned("synflow", data=None, example=torch.zeros(1, 1, 8, 8))
    assert counts(fed) == counts(free)
    assert all(torch.equal(fed.masks[name], free.masks[name]) for name in LAYERS)
    assert fed.provenance[0].data == {}


def test_synflow_in_rounds_spares_every_layer_and_in_one_does_not():
    net = conv_net(8, 0)
    budget = sc.Budget(0.99, floor=1)
    assert min(counts(planned("synflow", None, net=net, budget=budget))) >= 10
    assert min(counts(planned("synflow", None, net=net, budget=budget, rounds=1))) == 1
    assert min(counts(planned("snip", None, net=net, budget=budget))) <= 2


def test_synflow_names_layers_that_nothing_reaches():
    plan = planned("synflow", None, net=Idle(), data=None, budget=sc.Budget(0.5, floor=1))  # its inputs are guessed
    assert [warning for warning in plan.warnings if "flow" in warning] == [
        "no synaptic flow reaches layer 'idle.weight': its weights went first"
    ]


def test_the_classifier_alone_can_be_left_out():
    plan = planned("synflow", exclude=["15"])
    assert list(plan.sites) == LAYERS[:-1]
    assert planned("snip", exclude=["15"]).units()[1] == TOTAL - 160
