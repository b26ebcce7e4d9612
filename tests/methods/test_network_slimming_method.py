"""Network slimming: the pull on the scales, one ranking of all layers, streams, what has no norm, the ending."""

import copy

import pytest
import torch
from torch import nn
from trained_cuts import (
    BARE,
    INNER,
    SHAPE,
    STREAM,
    Net,
    advance,
    attached,
    batch,
    finished,
    net,
    resumed,
    same_bytes,
    sgd,
)

import secateur as sc
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.core.method import Batch
from secateur.measure.flops import flops
from secateur.zoo.vision import digits_resnet

NORMS = ("norm0", "norm1", "norm2")
EXAMPLE = torch.zeros(2, *SHAPE)


def scales(model):
    return {name: model.get_submodule(name).weight.detach().clone() for name in NORMS}


# --- the penalty ------------------------------------------------------------------------------------


def test_a_step_is_that_of_the_loss_with_the_subgradient_of_the_penalty():
    """Against autograd on loss + weight * sum |gamma|, with momentum and weight decay beside it."""
    model, optimizer, _ = attached("network_slimming", weight=0.03)
    other = copy.deepcopy(model)
    own = sgd(other)
    advance(model, optimizer, 0, 3)
    other.train()
    for step in range(3):
        x, y = batch(step)
        own.zero_grad()
        penalty = sum(other.get_submodule(name).weight.abs().sum() for name in NORMS)
        (nn.functional.cross_entropy(other(x), y) + 0.03 * penalty).backward()
        own.step()
    for name, value in model.state_dict().items():
        assert torch.allclose(value.float(), other.state_dict()[name].float(), atol=1e-5), name
    plain = net()
    advance(plain, sgd(plain), 0, 3)
    assert not torch.allclose(plain.norm1.weight, model.norm1.weight, atol=1e-3)


def test_a_scale_at_zero_is_not_pulled():
    model, _, run = attached("network_slimming", weight=0.5)
    with torch.no_grad():
        model.norm1.weight[3] = 0
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    run.after_backward()
    assert model.norm1.weight.grad[3] == 0
    assert torch.equal(model.norm1.weight.grad, 0.5 * model.norm1.weight.detach().sign())
    assert not model.norm1.bias.grad.any()
    assert not model.conv1.weight.grad.any()


def test_excluded_channels_are_not_pulled_and_stay():
    plan, model, _ = finished("network_slimming", exclude=("norm1",), weight=0.5)
    assert INNER not in plan.sites
    alone = net()
    run = sc.sparsify(alone, sgd(alone), "network_slimming", 0.5, steps=5, exclude=("norm1",), weight=0.5)
    alone.norm1.weight.grad = torch.zeros(12)
    run.after_backward()
    assert not alone.norm1.weight.grad.any()
    assert model.norm1.weight.abs().min() > 0


def test_scales_start_where_the_paper_lets_them_unless_the_run_goes_on():
    model, optimizer, run = attached("network_slimming", start=0.5)
    assert all(bool((scale == 0.5).all()) for scale in scales(model).values())
    advance(model, optimizer, 0, 2)
    saved, after = run.state_dict(), scales(model)
    run.close()
    sc.sparsify(model, optimizer, "network_slimming", 0.5, steps=6, start=0.5, state=saved)
    assert all(torch.equal(after[name], scale) for name, scale in scales(model).items())
    untouched = net()
    before = scales(untouched)
    attached("network_slimming", model=untouched)
    assert all(torch.equal(before[name], scale) for name, scale in scales(untouched).items())


def test_after_its_steps_the_training_is_plain_again():
    model, optimizer, _ = attached("network_slimming", steps=2, weight=0.5)
    advance(model, optimizer, 0, 2)
    other = copy.deepcopy(model)
    own = sgd(other)
    own.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    advance(model, optimizer, 2, 3)
    advance(other, own, 2, 3)
    assert same_bytes(model, other)


# --- scores and the cut -------------------------------------------------------------------------------


def test_scores_are_the_scales_and_the_smallest_of_all_layers_go():
    plan, model, _ = finished("network_slimming", 0.4)
    gammas = {name: scale.abs() for name, scale in scales(model).items()}
    expected = {STREAM: (gammas["norm0"] + gammas["norm2"]) / 2, INNER: gammas["norm1"]}
    for name, score in expected.items():
        assert torch.allclose(plan.scores[name], score, atol=1e-6)
    ranking = sorted((float(s), name, i) for name, score in expected.items() for i, s in enumerate(score))
    gone = {(name, i) for _, name, i in ranking[: int(0.4 * 20)]}
    assert {(n, i) for n in expected for i in (~plan.masks[n]).nonzero().flatten().tolist()} == gone


@pytest.mark.parametrize("combine", ["sum", "max"])
def test_coupled_scales_combine_as_asked(combine):
    plan, model, _ = finished("network_slimming", combine=combine)
    both = torch.stack([model.norm0.weight.detach().abs(), model.norm2.weight.detach().abs()])
    assert torch.allclose(plan.scores[STREAM], both.sum(0) if combine == "sum" else both.amax(0), atol=1e-6)


def test_what_no_norm_scales_stays_whole_and_is_named():
    plan, _, _ = finished("network_slimming", 0.5)
    assert plan.masks[BARE].all()
    assert [w for w in plan.warnings if "no batch norm scales" in w] == [
        f"no batch norm scales the units of '{BARE}': they were left whole"
    ]
    planned = sc.plan(net(), "network_slimming", 0.5, example=EXAMPLE)
    assert planned.masks[BARE].all()
    assert any(f"'{BARE}'" in warning for warning in planned.warnings)


def test_streams_stay_whole_if_asked():
    plan, _, _ = finished("network_slimming", coupled=False)
    assert STREAM not in plan.sites
    assert plan.kept(INNER) == 6


def test_the_plan_of_a_trained_network_is_the_same_cut():
    plan, model, _ = finished("network_slimming", 0.5)
    planned = sc.plan(model, "network_slimming", 0.5, example=EXAMPLE, keep_scores=True)
    assert planned.masks.keys() == plan.masks.keys()
    assert all(torch.equal(planned.masks[name], mask) for name, mask in plan.masks.items())


def test_only_the_order_of_scales_counts_in_a_plan():
    model = net()
    with torch.no_grad():
        model.norm1.weight.copy_(torch.arange(12) + 10.0)
        model.norm0.weight.copy_(-torch.arange(8) / 100)
        model.norm2.weight.copy_(torch.arange(8) / 100)
    plan = sc.plan(model, "network_slimming", 0.25, example=EXAMPLE)
    assert plan.masks[STREAM].tolist() == [False] * 5 + [True] * 3
    assert plan.masks[INNER].all()
    local = sc.plan(model, "network_slimming", 0.25, example=EXAMPLE, scope="local")
    assert local.kept(STREAM) == 6
    assert local.kept(INNER) == 9


def test_a_layer_is_never_emptied_and_the_total_is_met_all_the_same():
    model = net()
    with torch.no_grad():
        model.norm1.weight.fill_(1e-3)
    plan = sc.plan(model, "network_slimming", 0.7, example=EXAMPLE)  # 14 of 20; 12 of them would be the inner ones
    assert plan.kept(INNER) == 2  # a tenth, rounded up
    assert plan.kept(STREAM) == 4


@pytest.mark.parametrize("quantity", [Quantity.FLOPS, Quantity.PARAMETERS])
def test_budgets_of_the_whole_model_are_met_by_the_cut_one(quantity):
    torch.manual_seed(0)
    model, before = digits_resnet(), digits_resnet()
    plan, model, _ = finished("network_slimming", None, steps=2, model=model, budget=Budget(0.6, quantity))
    cut = sc.apply_(model, plan, example=EXAMPLE)
    if quantity is Quantity.FLOPS:
        share = flops(cut, Batch((EXAMPLE,))) / flops(before, Batch((EXAMPLE,)))
    else:
        share = sum(p.numel() for p in cut.parameters()) / sum(p.numel() for p in before.parameters())
    assert 0.59 <= share <= 0.6


# --- resuming and refusing ----------------------------------------------------------------------------


def test_a_resumed_run_is_the_straight_one_bit_for_bit():
    straight, model, _ = finished("network_slimming", weight=0.03, start=0.5)
    again, other = resumed("network_slimming", 3, weight=0.03, start=0.5)
    assert same_bytes(model, other)
    assert all(torch.equal(again.masks[name], mask) for name, mask in straight.masks.items())
    assert again.document() == straight.document()


def test_the_log_says_how_many_scales_are_near_zero():
    _, _, run = finished("network_slimming", weight=0.0)
    last = run.log[-1]
    assert (last["what"], last["step"], last["density"]) == ("cut", 6, 16 / 26)
    model = net()
    with torch.no_grad():
        model.norm1.weight.fill_(1e-5)
    _, _, run = finished("network_slimming", steps=1, weight=0.0, model=model, optimizer=sgd(model, lr=0.0))
    assert run.log[-1]["near_zero"] >= 12 / 20


def test_a_dead_layer_is_said():
    model = net()
    with torch.no_grad():
        model.norm1.weight.zero_()
    plan, _, _ = finished("network_slimming", steps=1, weight=0.0, model=model, optimizer=sgd(model, lr=0.0))
    assert any("every unit of 'conv1:channel' was driven to zero" in warning for warning in plan.warnings)


def test_a_network_without_norms_is_refused():
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 3))
    with pytest.raises(ModelError, match="scales of batch norms"):
        sc.sparsify(model, sgd(model), "network_slimming", 0.5, steps=5, example=torch.rand(2, *SHAPE))
    with pytest.raises(ModelError, match="scales of batch norms"):
        sc.plan(model, "network_slimming", 0.5, example=EXAMPLE)


def test_frozen_scales_are_refused():
    model = net()
    model.norm1.weight.requires_grad_(False)
    with pytest.raises(ModelError, match=r"'norm1\.weight' is frozen"):
        attached("network_slimming", model=model)


def test_a_budget_out_of_reach_is_refused_before_the_training():
    with pytest.raises(BudgetError, match="out of reach"):
        attached("network_slimming", None, budget=Budget(0.02, Quantity.FLOPS))


def test_an_early_end_is_refused():
    model, optimizer, run = attached("network_slimming")
    advance(model, optimizer, 0, 4)
    with pytest.raises(BudgetError, match="4 of 6 steps"):
        run.finish()


def test_attaching_leaves_the_model_as_it_was():
    model = net().train()
    before = copy.deepcopy(model.state_dict())
    attached("network_slimming", model=model)
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_net_of_this_shape_needs_it_where_it_cannot_be_guessed():
    plan, model, _ = finished("network_slimming", example=torch.rand(2, *SHAPE))
    assert isinstance(model, Net)
    assert plan.facts[next(iter(plan.facts))]["flops_kept"] < 1


def test_unknown_words_are_refused():
    with pytest.raises(SettingsError, match="weight"):
        attached("network_slimming", weight=-1)


def test_a_depthwise_convolution_passes_channels_on_and_does_not_make_them():
    torch.manual_seed(0)
    layers = [nn.Conv2d(1, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.BatchNorm2d(8)]
    model = nn.Sequential(*layers, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))
    plan, _, _ = finished("network_slimming", model=model, coupled=False, example=torch.rand(2, *SHAPE))
    assert plan.kept("0:channel") == 4
