"""Layer lottery, the cut: what is scored, which blocks may go, what is left of the network."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from residual_models import After, Before, made, vgg
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur import zoo
from secateur.core.budget import Quantity
from secateur.core.errors import BudgetError, DataError, ModelError, NumericsError, SettingsError
from secateur.core.method import Batch
from secateur.core.seeding import generator
from secateur.data.batches import as_batches
from secateur.data.dataset import DataKind, Dataset
from secateur.measure import flops, parameters
from secateur.scores.pls import importance_in_projection
from secateur.scores.sensitivity import halves
from secateur.shrink.depth import remove_blocks_
from secateur.shrink.filters import count_filters

CLASSES = 4


def images(samples=80, size=8):
    rng = torch.Generator().manual_seed(1)
    targets = torch.arange(samples) % CLASSES
    inputs = torch.rand(samples, 1, size, size, generator=rng)
    inputs[torch.arange(samples), 0, targets] += 1  # the class is a bright row
    return Dataset("rows", DataKind.IMAGE, inputs, targets)


DATA = images()


def planned(model, p=2, data=DATA, **settings):
    return sc.plan(model, "layer_lottery", sparsity=0, p=(p,), data=data, strict=False, keep_scores=True, **settings)


def gone(plan):
    return [f"{name}.{i}" for name, mask in plan.masks.items() for i, stays in enumerate(mask.tolist()) if not stays]


def scores(plan):
    return {
        f"{name}.{i}": float(value)
        for name, values in plan.scores.items()
        for i, value in enumerate(values)
        if value != torch.inf
    }


def train_mode_loss(model, batch, temperature=1.0):
    return F.cross_entropy(model(batch.args[0]) / temperature, batch.target)


def batch_of_all(data=DATA):
    (batch,) = data.batches(len(data))
    return batch


# --- scores against another way to them -------------------------------------------------------------


@pytest.mark.parametrize("block", [After, Before])
@pytest.mark.parametrize("aggregate", ["sum", "mean"])
def test_snip_is_the_sum_over_a_blocks_weights_of_w_times_its_gradient_in_train_mode(block, aggregate):
    model = made(block=block).double()
    data = DATA.to(torch.float64)
    found = scores(planned(model, criterion="snip", aggregate=aggregate, samples=len(data), data=data))
    twin = copy.deepcopy(model).train()
    train_mode_loss(twin, batch_of_all(data)).backward()
    for name, score in found.items():
        own = [m.weight for m in twin.get_submodule(name).modules() if isinstance(m, nn.Conv2d)]
        total = sum((w.grad * w).abs().sum().item() for w in own)
        expected = total / sum(w.numel() for w in own) if aggregate == "mean" else total
        assert score == pytest.approx(expected, rel=1e-5)
    assert len(found) == 7  # 3 stages of 3, two of them begin with a change of shape


def test_grasp_is_signed_and_agrees_with_differences_of_gradients():
    """All samples of all classes; one half's gradients differ from the other's, both are added up."""
    model, data = made(block=Before).double(), DATA.to(torch.float64)
    found = scores(planned(model, criterion="grasp", per_class=20, temperature=3.0, fresh_head=False, data=data))
    twin = copy.deepcopy(model).train()
    weights = [m.weight for m in twin.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    parts = halves(as_batches(data), 20, generator(0, "grasp", "batch"))

    def gradient():
        found = [torch.autograd.grad(train_mode_loss(twin, part, 3.0), weights) for part in parts]
        return [a + b for a, b in zip(*found, strict=True)]

    start, g, step = [w.detach().clone() for w in weights], gradient(), 1e-8  # no ReLU turns within so small a step
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for w, w0, v in zip(weights, start, g, strict=True):
                w.copy_(w0 + sign * step * v)
        ends.append(gradient())
    product = [(a - b) / (2 * step) for a, b in zip(*ends, strict=True)]
    of_weight = {id(w): w0 * hg for w, w0, hg in zip(weights, start, product, strict=True)}
    for name, score in found.items():
        expected = sum(
            float(of_weight[id(m.weight)].sum()) for m in twin.get_submodule(name).modules() if isinstance(m, nn.Conv2d)
        )
        assert score == pytest.approx(expected, rel=2e-2, abs=1e-5)
    assert min(found.values()) < 0 < max(abs(value) for value in found.values())


def test_grasp_draws_the_head_anew_for_scoring_only():
    model = made()
    louder = copy.deepcopy(model)
    with torch.no_grad():
        louder.head.weight.mul_(5)
    assert scores(planned(model)) == scores(planned(louder))
    assert scores(planned(model, fresh_head=False)) != scores(planned(louder, fresh_head=False))
    assert torch.equal(louder.head.weight, model.head.weight * 5)


def test_scoring_changes_nothing_in_the_model_and_depends_on_the_seed_only():
    model = made().train()
    before = copy.deepcopy(model.state_dict())
    torch.manual_seed(1)
    one = planned(model, seed=3)
    torch.manual_seed(2)
    other = planned(model, seed=3)
    assert scores(one) == scores(other)
    assert len(set(scores(one).values())) > 1
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert scores(planned(model, seed=4)) != scores(one)  # another batch, another head


def test_expected_activation_divergence_and_importance_against_their_definitions():
    model, batch = made(), batch_of_all()
    whole, outputs = {}, {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, a, out, name=name: outputs.update({name: out}))
        for name in scores(planned(model, criterion="l1"))
    ]
    with torch.no_grad():
        whole = F.softmax(model(batch.args[0]).double(), 1)
    for hook in hooks:
        hook.remove()
    found = scores(planned(model, criterion="expect_abs", samples=len(DATA)))
    assert found == pytest.approx({name: float(out.abs().mean()) for name, out in outputs.items()}, rel=1e-5)

    found = scores(planned(model, criterion="hrank", samples=len(DATA)))
    ranks = {name: np.linalg.matrix_rank(out.detach().numpy()).mean() for name, out in outputs.items()}
    assert found == pytest.approx(ranks, rel=1e-5)
    assert len(set(found.values())) > 3

    found = scores(planned(model, criterion="kl", samples=len(DATA)))
    for name, score in found.items():
        twin = copy.deepcopy(model)
        twin.get_submodule(name).forward = lambda x: x
        with torch.no_grad():
            less = F.softmax(twin(batch.args[0]).double(), 1)
        assert score == pytest.approx(float((whole * (whole / less).log()).sum(1).mean()), rel=1e-4)

    found = scores(planned(model, criterion="pls", samples=len(DATA)))
    features = {name: out.mean((2, 3)) for name, out in outputs.items()}
    vip = importance_in_projection(torch.cat([features[name] for name in found], 1), batch.target)
    parts = vip.split([features[name].shape[1] for name in found])
    assert list(found.values()) == pytest.approx([float(part.mean()) for part in parts], rel=1e-4)


def test_l1_says_that_it_only_tells_stages_apart():
    plan = planned(made(), criterion="l1", p=2)
    assert all(name.startswith("stages.0") for name in gone(plan))
    assert any("early stages" in warning for warning in plan.warnings)
    assert not planned(made()).warnings


# --- the ranking ------------------------------------------------------------------------------------


def test_the_lowest_of_all_stages_together_go_and_facts_say_from_where():
    plan = planned(made(), p=3, criterion="snip")
    found = scores(plan)
    assert gone(plan) == sorted(sorted(found, key=found.get)[:3])
    victims = {name: sum(g.startswith(f"{name}.") for g in gone(plan)) for name in plan.masks}
    assert {name: facts["victims"] for name, facts in plan.facts.items()} == victims
    assert sum(victims.values()) == 3
    assert {name: facts["candidates"] for name, facts in plan.facts.items()} == {
        "stages.0": 3,
        "stages.1": 2,
        "stages.2": 2,
    }


def test_of_equal_blocks_the_earlier_goes():
    model = made()
    for index in (1, 2):
        model.stages[0][index].load_state_dict(model.stages[0][0].state_dict())
    assert gone(planned(model, p=1, criterion="l1")) == ["stages.0.0"]
    assert gone(planned(model, p=2, criterion="l1")) == ["stages.0.0", "stages.0.1"]


def test_blocks_that_all_score_the_same_are_no_ranking():
    model = made(widths=(4,), blocks=4)
    for index in (1, 2, 3):
        model.stages[0][index].load_state_dict(model.stages[0][0].state_dict())
    with pytest.raises(NumericsError, match="all 4 blocks score"):
        planned(model, p=2, criterion="l1")


def test_scores_that_die_are_refused_and_never_the_first_blocks():
    model = made()
    nn.init.zeros_(model.head.weight)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.zeros_(norm.weight)
    for settings in ({"criterion": "snip"}, {"criterion": "grasp", "fresh_head": False}):
        with pytest.raises(NumericsError, match=r"gradient|ranks nothing"):
            planned(model, **settings)
    constant = Dataset("grey", DataKind.IMAGE, torch.full((40, 1, 8, 8), 0.5), torch.arange(40) % CLASSES)
    with pytest.raises(DataError, match="regression"):
        planned(made(), criterion="pls", data=constant)


def test_strict_spares_the_neighbours_of_a_change_of_resolution():
    for listed in (False, True):
        model = made(blocks=5, listed=listed)
        plan = sc.plan(model, "layer_lottery", sparsity=0, p=(2,), data=DATA, keep_scores=True)
        found = list(scores(plan))
        assert found == [f"stages.0.{i}" for i in (0, 1, 2, 3)] + ["stages.1.2", "stages.1.3"] + [
            f"stages.2.{i}" for i in (2, 3, 4)
        ]
        loose = list(scores(planned(model)))
        assert set(loose) - set(found) == {"stages.0.4", "stages.1.1", "stages.1.4", "stages.2.1"}


def test_no_stage_becomes_empty():
    model = made(blocks=3)
    plan = planned(model, criterion="l1", p=3)  # all three of the first stage are lowest
    found = scores(plan)
    assert max(found[f"stages.0.{i}"] for i in range(3)) < min(found[f"stages.1.{i}"] for i in (1, 2))
    assert len(gone(plan)) == 3
    assert int(plan.masks["stages.0"].sum()) == 1
    best = max(range(3), key=lambda i: found[f"stages.0.{i}"])
    assert bool(plan.masks["stages.0"][best])
    floored = sc.plan(model, "layer_lottery", budget=sc.Budget(0.5, floor=2), strict=False, criterion="l1", data=DATA)
    assert all(int(mask.sum()) >= 2 for mask in floored.masks.values())


def test_a_sparsity_is_a_share_of_the_blocks_that_can_go():
    model = made(blocks=5)
    plan = sc.plan(model, "layer_lottery", sparsity=0.4, data=DATA)  # of 9
    assert len(gone(plan)) == 3
    assert len(gone(sc.plan(model, "layer_lottery", budget=sc.Budget(5, Quantity.UNITS), data=DATA))) == 4
    assert gone(sc.plan(model, "layer_lottery", sparsity=0.0, data=DATA)) == []


# --- the surgery ------------------------------------------------------------------------------------


def branch_off(model, names):
    twin = copy.deepcopy(model)
    for name in names:
        twin.get_submodule(name).gate = 0.0
    return twin


@pytest.mark.parametrize("block", [After, Before])
@pytest.mark.parametrize("listed", [False, True])
def test_a_removed_block_is_its_branch_times_zero_and_the_rest_keeps_its_bits(block, listed):
    model = made(block=block, listed=listed, blocks=4)
    plan = planned(model, p=4)
    cut = sc.apply_(copy.deepcopy(model), plan)
    inputs = batch_of_all().args[0]
    with torch.no_grad():
        expected, found, dense = branch_off(model, gone(plan))(inputs), cut(inputs), model(inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    assert (dense - found).abs().max() > 1e-2  # the removed blocks did something
    assert dense.std(0).min() > 1e-3  # and outputs differ between inputs
    kept = {
        name: [block for i, block in enumerate(model.get_submodule(name)) if mask[i]]
        for name, mask in plan.masks.items()
    }
    for name, blocks in kept.items():
        assert len(cut.get_submodule(name)) == len(blocks)
        for old, new in zip(blocks, cut.get_submodule(name), strict=True):
            assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.state_dict().items())
    assert parameters(cut) == parameters(model) - sum(parameters(model.get_submodule(name)) for name in gone(plan))


def test_zeroed_convolutions_are_another_network_because_the_norm_still_shifts():
    model = made()
    plan = planned(model, p=2)
    cut, zeroed = sc.apply_(copy.deepcopy(model), plan), copy.deepcopy(model)
    for name in gone(plan):
        for module in zeroed.get_submodule(name).modules():
            if isinstance(module, nn.Conv2d):
                nn.init.zeros_(module.weight)
    inputs = batch_of_all().args[0]
    with torch.no_grad():
        assert (cut(inputs) - zeroed(inputs)).abs().max() > 1e-2


@pytest.mark.parametrize(("blocks", "share"), [(5, 6.82), (9, 3.75)])
def test_every_block_of_the_papers_networks_costs_the_share_that_the_paper_prints(blocks, share):
    model = made(blocks=blocks, widths=(16, 32, 64), channels=3, classes=10)
    example = Batch((torch.rand(1, 3, 32, 32),))
    dense = flops(model, example)
    if blocks == 5:
        assert count_filters(model) == 1232
    for stage in range(3):
        cut = copy.deepcopy(model)
        remove_blocks_(cut, f"stages.{stage}", [index != 2 for index in range(blocks)])
        assert 100 * (1 - flops(cut, example) / dense) == pytest.approx(share, abs=0.02)
        assert count_filters(model) - count_filters(cut) == 2 * 16 * 2**stage  # 1232 -> 1200 for the first


# --- what is refused --------------------------------------------------------------------------------


def test_plain_networks_are_asked_for_residual_blocks():
    with pytest.raises(ModelError, match="no residual blocks"):
        planned(vgg())
    with pytest.raises(ModelError, match="no residual blocks"):
        planned(zoo.load_model("digits-mlp"))


def test_numbers_out_of_reach_are_refused_with_the_range():
    model = made(blocks=5)
    for p in (9, 12):
        with pytest.raises(BudgetError, match=r"of the 9 residual blocks that may go: 1 to 8.*strict=false"):
            sc.plan(model, "layer_lottery", sparsity=0, p=(p,), data=DATA)
    with pytest.raises(BudgetError, match="1 to"):
        sc.plan(model, "layer_lottery", sparsity=0.05, data=DATA)  # less than one block
    with pytest.raises(BudgetError, match="either"):
        sc.plan(model, "layer_lottery", sparsity=0.5, p=(2,), data=DATA)
    with pytest.raises(BudgetError, match=r"8 residual blocks may go together, and without these 0\.\d+ of the dense"):
        sc.plan(model, "layer_lottery", budget=sc.Budget(100, Quantity.PARAMETERS), data=DATA)
    with pytest.raises(BudgetError, match="either"):
        sc.plan(model, "layer_lottery", budget=sc.Budget(0.9, Quantity.FLOPS), p=(2,), data=DATA)
    with pytest.raises(SettingsError, match="one number"):
        sc.plan(model, "layer_lottery", sparsity=0, p=(1, 2), data=DATA)
    with pytest.raises(BudgetError, match=r"cannot remove 8 of the 7"):
        planned(made(blocks=3), p=8)


@pytest.mark.parametrize("quantity", [Quantity.FLOPS, Quantity.PARAMETERS])
def test_a_budget_of_cost_is_met_by_the_fewest_blocks(quantity):
    dense, one = made(blocks=5), Batch((DATA.inputs[:1],))

    def amount(model):
        return flops(model, one) if quantity is Quantity.FLOPS else parameters(model)

    for asked in (0.8, 0.5, round(0.8 * amount(dense))):
        plan = sc.plan(dense, "layer_lottery", budget=sc.Budget(asked, quantity), data=DATA, strict=False)
        count = len(gone(plan))
        limit = asked * amount(dense) if asked <= 1 else asked
        left = [amount(sc.apply_(copy.deepcopy(dense), planned(dense, p=p))) for p in (count - 1, count)]
        assert left[1] <= limit < left[0]
        facts = next(iter(plan.facts.values()))
        assert facts[f"{quantity}_kept"] == pytest.approx(left[1] / amount(dense), abs=1e-6)


def test_what_is_missing_is_said():
    model = made()
    with pytest.raises(DataError, match="needs data"):
        sc.plan(model, "layer_lottery", sparsity=0, p=(1,), strict=False, example=DATA)
    unlabelled = Dataset("rows", DataKind.IMAGE, DATA.inputs)
    for criterion in ("grasp", "snip", "pls"):
        with pytest.raises(DataError, match="label"):
            planned(model, criterion=criterion, data=unlabelled)
    assert len(gone(planned(model, criterion="kl", data=unlabelled))) == 2
    assert len(gone(sc.plan(model, "layer_lottery", 0, p=(1,), strict=False, criterion="random", example=DATA))) == 1
    hurt = Dataset("rows", DataKind.IMAGE, DATA.inputs.clone().fill_(torch.nan), DATA.targets)
    for criterion in ("grasp", "snip", "expect_abs"):
        with pytest.raises(NumericsError, match="NaN"):
            planned(model, criterion=criterion, data=hurt)


def test_patterns_of_the_user_hold():
    model = made()
    plan = planned(model, p=2, exclude=("stages.0",))
    assert not any(name.startswith("stages.0") for name in scores(plan))
    assert set(scores(planned(model, p=1, include=("stages.1.*",)))) == {"stages.1.1", "stages.1.2"}


def test_a_block_of_a_transformer_is_attention_and_feed_forward_together():
    data = zoo.load_data("digits", samples=40).calibration
    model = zoo.load_model("digits-vit")
    plan = sc.plan(model, "layer_lottery", sparsity=0.5, criterion="snip", data=data, keep_scores=True)
    assert len(scores(plan)) == 4
    assert len(gone(plan)) == 2
    with pytest.raises(ModelError, match="feature maps"):
        sc.plan(model, "layer_lottery", sparsity=0.5, criterion="hrank", data=data)
    cut = sc.apply_(model, plan)
    assert len(cut.vit.layers) == cut.config.num_hidden_layers == 2


def test_random_blocks_differ_between_seeds_only():
    model = made(blocks=5)
    draws = [tuple(gone(planned(model, p=3, criterion="random", seed=seed))) for seed in (0, 0, 1, 2, 3)]
    assert draws[0] == draws[1]
    assert len(set(draws)) > 2
