"""RD pruning: the optimum by brute force, rounds, budgets, and the traps of its note."""

import copy
from itertools import product
from math import floor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur import api
from secateur.core.budget import Quantity
from secateur.core.errors import BudgetError, DataError, SettingsError
from secateur.core.fingerprint import digests
from secateur.core.method import Batch
from secateur.core.progress import Silent
from secateur.measure.flops import count
from secateur.measure.shares import weight_flops
from secateur.structure.sites import weight_layers
from secateur.train.keep import MaskKeeper


def network(seed=0):
    """A convolution over 8x8 images, batch norm that has seen data, two linear layers: 36, 512, 40 weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
        nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5),
    )  # fmt: skip
    with torch.no_grad():
        model(images(50, 3) * 2 + 1)
    return model


def images(samples=12, seed=1):
    return torch.randn(samples, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


NAMES = ("0.weight", "5.weight", "7.weight")


def zeroed(model, removed):
    """A copy without the given numbers of smallest weights; a plain sort."""
    model = copy.deepcopy(model).eval()
    for name, gone in removed.items():
        flat = dict(model.named_parameters())[name].data.view(-1)
        flat[sorted(range(flat.numel()), key=lambda i: (abs(float(flat[i])), i))[:gone]] = 0
    return model


@torch.no_grad()
def error(model, other, inputs, worst_case=True):
    change = (other(inputs) - copy.deepcopy(model).eval()(inputs)).double().square().mean(1)
    return float(change.max() if worst_case else change.mean())


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), sparsity=st.sampled_from([0.3, 0.5, 0.7, 0.8]), worst_case=st.booleans())
def test_the_best_amounts_of_all_combinations(seed, sparsity, worst_case):
    torch.manual_seed(seed)
    model, inputs = nn.Sequential(nn.Linear(6, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 4)), images()
    inputs = inputs.flatten(1)[:, :6]
    sizes = {"0.weight": 54, "2.weight": 63, "4.weight": 28}
    curves = {
        name: [error(model, zeroed(model, {name: d * size // 6}), inputs, worst_case) for d in range(6)]
        for name, size in sizes.items()
    }
    keep = 145 - floor(round(sparsity * 145, 6))

    def kept(picks):
        return {name: size - d * size // 6 for (name, size), d in zip(sizes.items(), picks, strict=True)}

    fitting = [picks for picks in product(range(6), repeat=3) if sum(kept(picks).values()) <= keep]
    best = min(fitting, key=lambda picks: sum(curves[name][d] for name, d in zip(sizes, picks, strict=True)))
    plan = api.plan(model, "rd", sparsity, data=inputs, resolution=6, worst_case=worst_case)
    assert plan.units() == (keep, 145)
    found = sum(plan.facts[name]["distortion"] for name in sizes)
    assert found == pytest.approx(sum(curves[name][d] for name, d in zip(sizes, best, strict=True)), rel=1e-4)
    assert all(plan.kept(name) >= least for name, least in kept(best).items())  # the rest of the budget on top
    for name, mask in plan.masks.items():
        weight = dict(model.named_parameters())[name].detach().abs()
        assert mask.all() or weight[mask].min() > weight[~mask].max()


def test_it_is_the_network_s_output_that_counts_not_the_layer_s():
    """A layer times 128 and the next divided by it: another error inside, the same network."""
    model, inputs = network(), images()
    plain = api.plan(model, "rd", 0.8, data=inputs)
    with torch.no_grad():
        for parameter in model[5].parameters():
            parameter.mul_(128)
        model[7].weight.div_(128)
    scaled = api.plan(model, "rd", 0.8, data=inputs)
    assert all(torch.equal(plain.masks[name], scaled.masks[name]) for name in NAMES)
    rival = api.plan(model, "global_magnitude", 0.8, minimum=1)
    assert rival.kept("0.weight") == 1 < plain.kept("0.weight")


def test_three_rounds_with_training_keep_the_sparsity_exact_and_bring_nothing_back():
    model, inputs = network(), images(40)
    target = torch.randint(0, 5, (40,), generator=torch.Generator().manual_seed(2))
    before = None
    for number in (1, 2, 3):
        asked = 1 - (1 - 0.2) ** number
        plan = api.plan(model, "rd", asked, data=[(inputs, target)], resolution=50)
        assert plan.units() == (588 - floor(round(asked * 588, 6)), 588)
        if before is not None:
            assert all(bool((mask <= before[name]).all()) for name, mask in plan.masks.items())
        before = plan.masks
        sc.apply_(model, plan)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        with MaskKeeper(model, plan, optimizer):
            for _ in range(5):
                optimizer.zero_grad()
                F.cross_entropy(model(inputs), target).backward()
                optimizer.step()
        parameters = dict(model.named_parameters())
        assert all(not parameters[name][~mask].any() for name, mask in plan.masks.items())
        assert sum(int(parameters[name].count_nonzero()) for name in NAMES) == plan.units()[0]


def test_a_target_that_is_reached_already_changes_nothing_and_says_so():
    model = sc.apply_(network(), api.plan(network(), "rd", 0.7, data=images()))
    kept = {name: dict(model.named_parameters())[name] != 0 for name in NAMES}
    plan = api.plan(model, "rd", 0.5, data=images())
    assert all(torch.equal(plan.masks[name], kept[name]) for name in NAMES)
    assert any("411 weights that are zero already meet the budget" in warning for warning in plan.warnings)
    again = api.plan(model, "rd", 0.5, data=images(), monotone=False)
    assert again.units() == (294, 588)  # zeros may come back
    assert all(bool((kept[name] <= again.masks[name]).all()) for name in NAMES)


def test_a_layer_is_not_pruned_below_what_it_lost_before():
    model = network()
    with torch.no_grad():
        model[5].weight.view(-1)[: 512 - 100] = 0
    plan = api.plan(model, "rd", 0.75, data=images())
    assert plan.units() == (147, 588)
    assert plan.kept("5.weight") <= 100
    assert bool((plan.masks["5.weight"] <= (model[5].weight != 0)).all())


def test_a_layer_that_does_not_matter_keeps_its_last_step_and_is_named():
    model = network()
    with torch.no_grad():
        model[5].bias.fill_(-1e6)
    plan = api.plan(model, "rd", 0.84, data=images(), resolution=10)
    assert plan.kept("5.weight") >= 512 - 9 * 512 // 10
    assert any("'5.weight' was held at the largest amount on offer, 0.89" in warning for warning in plan.warnings)
    with pytest.raises(BudgetError, match="reachable range is 60 to 588"):
        api.plan(model, "rd", 0.95, data=images(), resolution=10)
    assert api.plan(model, "rd", 0.95, data=images(), resolution=100).units()[0] == 588 - 558


def test_floors_hold():
    plan = api.plan(network(), "rd", budget=sc.Budget(0.89, floor=20), data=images())
    assert plan.units()[0] == 588 - 523
    assert all(plan.kept(name) >= 20 for name in NAMES)
    assert min(map(api.plan(network(), "rd", 0.89, data=images()).kept, NAMES)) < 20
    with pytest.raises(BudgetError, match="reachable range"):
        api.plan(network(), "rd", budget=sc.Budget(0.9, floor=20), data=images())


@pytest.mark.parametrize("quantum", [1, 7, 40])
def test_a_quantum_is_reported_and_never_exceeds_the_budget(quantum):
    model, inputs = network(), images()
    plan = api.plan(model, "rd", 0.6, data=inputs, quantum=quantum)
    assert plan.units() == (588 - 352, 588)
    assert any(f"in units of {quantum}" in warning for warning in plan.warnings) == (quantum > 1)
    exact = api.plan(model, "rd", 0.6, data=inputs)
    predicted = [sum(fact["distortion"] for fact in p.facts.values()) for p in (exact, plan)]
    assert predicted[0] <= predicted[1]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_budget_in_flops_is_of_the_whole_model_and_is_held(share):
    model = network().eval()
    plan = api.plan(model, "rd", budget=sc.Budget(share, Quantity.FLOPS), data=images())
    dense = count(model, Batch((images(1),))).total
    assert dense == 2 * (36 * 36 + 512 + 40)  # 6x6 positions of the convolution
    found = count(sc.apply_(copy.deepcopy(model), plan), Batch((images(1),))).effective
    assert share * dense - 72 < found <= share * dense
    absolute = api.plan(model, "rd", budget=sc.Budget(int(share * dense), Quantity.FLOPS), data=images())
    assert all(torch.equal(absolute.masks[name], plan.masks[name]) for name in NAMES)
    weights = api.plan(model, "rd", budget=sc.Budget(plan.units()[0], Quantity.UNITS), data=images())
    assert weights.kept("0.weight") >= plan.kept("0.weight")  # its weights are the dear ones


def test_a_weight_s_flops_do_not_depend_on_zeros_that_are_there_already():
    dense = network().eval()
    sparse = zeroed(dense, {"0.weight": 30, "5.weight": 512})
    with torch.no_grad():
        found = [weight_flops(m, weight_layers(m).layers, Batch((images(1),)), Silent()) for m in (dense, sparse)]
    assert found[0] == found[1] == ({"0.weight": 72, "5.weight": 2, "7.weight": 2}, 0)


def test_flops_that_no_pruned_layer_does_are_spent():
    model = network().eval()
    with pytest.raises(BudgetError, match="2592 of the model's 3696 FLOPs a sample are not in the pruned layers"):
        api.plan(model, "rd", budget=sc.Budget(0.5, Quantity.FLOPS), data=images(), exclude=["0"])
    plan = api.plan(model, "rd", budget=sc.Budget(0.8, Quantity.FLOPS), data=images(), exclude=["0"])
    found = count(sc.apply_(model, plan), Batch((images(1),))).effective
    assert 0.8 * 3696 - 2 < found <= 0.8 * 3696


def test_noise_in_place_of_data():
    model = network()
    plans = [api.plan(model, "rd", 0.6, data=inputs, zero_data=True) for inputs in (images(), images(seed=5) * 100)]
    assert plans[0].facts == plans[1].facts  # only shapes count
    assert api.plan(model, "rd", 0.6, data=images(), zero_data=True, seed=1).facts != plans[0].facts
    assert plans[0].units() == (236, 588)


def test_noise_is_drawn_anew_at_every_target():
    first, other = (
        api.plan(network(), "rd", sparsity, data=images(), zero_data=True, resolution=2, exclude=["0", "7"])
        for sparsity in (0.45, 0.46)
    )
    distortions = [plan.facts["5.weight"]["distortion"] for plan in (first, other)]
    assert min(distortions) > 0  # both remove the smaller half first
    assert distortions[0] != distortions[1]


def test_text_has_no_noise():
    class Words(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)

        def forward(self, ids):
            return self.head(self.embedding(ids))

    ids = torch.randint(0, 9, (4, 6), generator=torch.Generator().manual_seed(0))
    assert api.plan(Words(), "rd", 0.5, data=ids).units() == (18, 36)
    with pytest.raises(DataError, match="integers"):
        api.plan(Words(), "rd", 0.5, data=ids, zero_data=True)


def test_one_sample_is_refused():
    with pytest.raises(DataError, match="at least 2 calibration samples"):
        api.plan(network(), "rd", 0.5, data=images(1))


def test_tied_weights_count_once_and_unused_layers_not_at_all():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.again, self.idle, self.head = (nn.Linear(8, 8) for _ in range(4))
            self.again.weight = self.first.weight

        def forward(self, x):
            return self.head(self.again(self.first(x).relu()))

    torch.manual_seed(0)
    plan = api.plan(Odd(), "rd", 0.5, data=torch.randn(6, 8))
    assert list(plan.masks) == ["first.weight", "head.weight"]
    assert plan.units() == (64, 128)
    assert any("'idle.weight' was not pruned: it is not used in the forward pass" in w for w in plan.warnings)
    assert any("'again.weight'" in warning and "'first'" in warning for warning in plan.warnings)


def test_the_model_is_left_bit_for_bit_and_batches_do_not_matter():
    model = network().train()
    before = digests(model.state_dict())
    plans = [api.plan(model, "rd", 0.6, data=images(), batch=size, keep_scores=True) for size in (64, 5)]
    assert digests(model.state_dict()) == before
    assert all(torch.equal(plans[0].masks[name], plans[1].masks[name]) for name in NAMES)
    assert torch.equal(plans[0].scores["5.weight"], model[5].weight.detach().abs())


def test_settings_are_checked():
    with pytest.raises(SettingsError, match="resolution"):
        api.plan(network(), "rd", 0.5, data=images(), resolution=1)
