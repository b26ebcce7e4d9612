"""Layer lottery, the cut: what is scored, which blocks may go, what is left of the network."""

from __future__ import annotations

import copy
from collections import OrderedDict

import numpy as np
import pytest
import torch
from residual_models import After, Before, ResNet, made, vgg
from torch import nn
from torch.nn import functional as F

import secateur as sc
from secateur import zoo
from secateur.core.budget import Quantity
from secateur.core.errors import BudgetError, DataError, ModelError, NumericsError, SettingsError
from secateur.core.method import Batch
from secateur.core.progress import Silent
from secateur.core.seeding import generator
from secateur.data.batches import as_batches
from secateur.data.dataset import DataKind, Dataset
from secateur.measure import flops, parameters
from secateur.methods.depth import layer_lottery
from secateur.scores.blocks import Aggregate
from secateur.scores.pls import importance_in_projection
from secateur.scores.sensitivity import halves
from secateur.shrink.depth import remove_blocks_
from secateur.shrink.filters import InnerFilters, count_filters
from secateur.stats.block_outputs import block_outputs, mean_absolute
from secateur.structure.analysis import analyse

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


class HeadFirst(ResNet):
    """The same network, with the head registered before the blocks."""

    def __init__(self):
        super().__init__()
        self._modules["stages"] = self._modules.pop("stages")


def test_the_head_that_is_drawn_anew_is_the_layer_that_makes_the_output():
    torch.manual_seed(0)
    model = HeadFirst()
    assert list(model._modules)[-1] == "stages"
    base = scores(planned(model))
    louder, other = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        louder.head.weight.mul_(5)
        other.stages[2][2].conv1.weight.mul_(torch.linspace(0.5, 2, 16)[:, None, None, None])
        other.stages[2][2].conv2.weight.mul_(5)
    assert scores(planned(louder)) == base
    assert scores(planned(other)) != base


def text_model(tied):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=32,
        max_position_embeddings=16,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config).eval()


def scaled(model, name, factor):
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.get_parameter(name).mul_(factor)
    return twin


def test_a_tied_head_stays_as_it_is_and_no_block_is_drawn_anew():
    text = torch.randint(0, 32, (40, 8), generator=torch.Generator().manual_seed(0))
    tied, free = text_model(True), text_model(False)
    (warning,) = planned(tied, p=1, data=text).warnings
    assert "'lm_head.weight' is tied to 'model.embed_tokens.weight'" in warning
    assert not planned(tied, p=1, data=text, fresh_head=False).warnings
    assert not planned(tied, p=1, data=text, criterion="snip").warnings
    assert not planned(free, p=1, data=text).warnings
    last = "model.layers.2.mlp.down_proj.weight"
    for model in (tied, free):
        assert scores(planned(scaled(model, last, 7), p=1, data=text)) != scores(planned(model, p=1, data=text))
    louder = scaled(free, "lm_head.weight", 7)
    assert scores(planned(louder, p=1, data=text)) == scores(planned(free, p=1, data=text))


class InPlace(nn.Module):
    """x + f(x), written into what the last layer returns."""

    def __init__(self, width: int):
        super().__init__()
        self.inner, self.outer = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        out = self.outer(torch.tanh(self.inner(x)))
        out += x
        return out


class Bare(nn.Module):
    """Blocks whose end is the model's output, or its logarithmic softmax."""

    def __init__(self, softmax=False):
        super().__init__()
        self.blocks, self.softmax = nn.ModuleList(InPlace(CLASSES) for _ in range(4)), softmax

    def forward(self, x):
        x = x[:, 0, :CLASSES, 0]
        for block in self.blocks:
            x = block(x)
        return x.log_softmax(1) if self.softmax else x


@pytest.mark.parametrize(
    ("softmax", "reason"), [(False, "'blocks.3.outer' lies in the block 'blocks.3'"), (True, "no linear layer makes")]
)
def test_without_a_head_nothing_is_drawn_anew(softmax, reason):
    torch.manual_seed(0)
    model = Bare(softmax)
    plan = planned(model)
    assert [warning for warning in plan.warnings if reason in warning]
    assert scores(plan) == scores(planned(model, fresh_head=False))


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


def test_a_list_shorter_than_the_floor_stays_whole_and_takes_nothing_from_the_others():
    model = made(blocks=4)
    model.stages[1] = model.stages[1][:2]
    budget = sc.Budget(0.0, floor=3)
    plan = sc.plan(model, "layer_lottery", budget=budget, p=(2,), strict=False, criterion="l1", data=DATA)
    assert [int(mask.sum()) for mask in plan.masks.values()] == [3, 2, 3]


def test_a_sparsity_is_a_share_of_the_blocks_that_can_go():
    model = made(blocks=5)
    plan = sc.plan(model, "layer_lottery", sparsity=0.4, data=DATA)  # of 9
    assert len(gone(plan)) == 3
    assert len(gone(sc.plan(model, "layer_lottery", budget=sc.Budget(5, Quantity.UNITS), data=DATA))) == 4
    assert gone(sc.plan(model, "layer_lottery", sparsity=0.0, data=DATA)) == []


class NamedStages(ResNet):
    """Blocks with names instead of numbers."""

    def __init__(self):
        super().__init__(blocks=4)
        for index, stage in enumerate(self.stages):
            self.stages[index] = nn.Sequential(OrderedDict((f"block_{i}", block) for i, block in enumerate(stage)))


@pytest.mark.parametrize("strict", [True, False])
def test_blocks_with_names_go_like_numbered_ones_and_come_back_from_disk(strict, tmp_path):
    model = made(blocks=4)
    named = NamedStages().eval()
    named.load_state_dict(dict(zip(named.state_dict(), model.state_dict().values(), strict=True)))
    plans = [
        sc.plan(one, "layer_lottery", 0, p=(3,), data=DATA, strict=strict, keep_scores=True) for one in (model, named)
    ]
    assert gone(plans[0]) == gone(plans[1])
    assert scores(plans[0]) == scores(plans[1])
    whole = [f"stages.{s}.block_{i}" for s in range(3) for i in range(4)]
    kept = [name for name in whole if name.replace("block_", "") not in gone(plans[1])]
    cut = sc.apply_(named, plans[1])
    assert [f"stages.{s}.{leaf}" for s in range(3) for leaf in cut.stages[s]._modules] == kept
    sc.save(cut, tmp_path / "out", plans[1], factory="test_layer_lottery:NamedStages")
    again = sc.load(tmp_path / "out", trust_factory=True)
    with torch.no_grad():
        expected = sc.apply_(model, plans[0])(DATA.inputs)
        assert torch.equal(again(DATA.inputs), expected)


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


@pytest.mark.parametrize("aggregate", list(Aggregate))
def test_the_control_of_filters_takes_exactly_the_lowest_inner_ones(aggregate):
    model, example = made(), Batch((DATA.inputs[:2],))
    blocks = [f"stages.{s}.{i}" for s in range(3) for i in range(3)]
    inner = InnerFilters(model, example, analyse(model, example), blocks)
    rng = torch.Generator().manual_seed(0)
    values = {n: torch.randn(p.shape, generator=rng) for n, p in model.named_parameters() if p.dim() > 1}
    by_hand = {
        (block, index): float(one.sum() if aggregate is Aggregate.SUM else one.mean())
        for block in blocks
        for index, one in enumerate(values[f"{block}.conv1.weight"])
    }
    plan = inner.lowest(values, 20, aggregate)
    found = set()
    for name, mask in plan.masks.items():
        places = [place.parameter for place in plan.sites[name].occurrences]
        (block,) = [name.removesuffix(".conv1.weight") for name in places if name.endswith("conv1.weight")]
        found |= {(block, index) for index, stays in enumerate(mask.tolist()) if not stays}
    assert found == set(sorted(by_hand, key=by_hand.get)[:20])


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


@pytest.mark.parametrize("criterion", ["l1", "expect_abs", "hrank", "kl", "pls", "grasp"])
@pytest.mark.parametrize("quantity", [Quantity.FLOPS, Quantity.PARAMETERS])
def test_where_nothing_may_go_a_budget_of_cost_is_refused_before_scoring(criterion, quantity, monkeypatch):
    monkeypatch.setattr(layer_lottery, "block_scores", None)
    with pytest.raises(BudgetError, match="no residual block can be removed: all are left out by include and exclude"):
        sc.plan(
            made(), "layer_lottery", budget=sc.Budget(0.9, quantity), data=DATA, exclude=("*",), criterion=criterion
        )


@pytest.mark.parametrize("criterion", ["l1", "expect_abs", "pls"])
def test_where_nothing_may_go_and_nothing_has_to_the_plan_is_empty(criterion):
    assert gone(sc.plan(made(), "layer_lottery", 0.0, data=DATA, exclude=("*",), criterion=criterion)) == []


def test_where_no_block_is_in_reach_the_reason_is_given():
    model, one = made(blocks=3), "stages.0.1"
    others = tuple(f"stages.{s}.{i}" for s in range(3) for i in range(3) if f"stages.{s}.{i}" != one)
    for settings, reason in (
        ({"exclude": ("*",)}, "include and exclude, or by strict=true"),
        ({"exclude": ("*",), "strict": False}, "include and exclude$"),
        ({"exclude": others, "strict": False}, "1 may go, but one of these, and 1 of every list, must stay$"),
        ({"budget": sc.Budget(0.0, floor=3), "strict": False}, "7 may go, but one of these, and 3 of every list"),
    ):
        budget = settings.pop("budget", sc.Budget(0.0))
        with pytest.raises(BudgetError, match=f"^no residual block can be removed: .*{reason}"):
            sc.plan(model, "layer_lottery", budget=budget, p=(2,), data=DATA, criterion="l1", **settings)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("criterion", ["hrank", "expect_abs", "pls", "kl", "grasp", "snip", "l1"])
def test_data_that_the_model_does_not_take_is_refused_before_scoring(criterion, strict, monkeypatch):
    monkeypatch.setattr(layer_lottery, "block_scores", None)
    with pytest.raises(ModelError, match=r"ResNet cannot be run on inputs of shape \[2, 1, 8, 8\]"):
        sc.plan(made().to(torch.bfloat16), "layer_lottery", 0, p=(1,), criterion=criterion, data=DATA, strict=strict)


def test_outputs_of_blocks_on_data_that_does_not_fit_are_refused_in_a_sentence():
    with pytest.raises(ModelError, match="cannot be run on inputs of shape"):
        block_outputs(made(), [Batch((torch.rand(2, 5, 8, 8),))], ["stages.0.0"], mean_absolute, Silent())


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


def test_what_whole_blocks_cannot_meet_is_said():
    given = {"data": DATA, "strict": False}
    model = made(blocks=4)
    free = sc.plan(model, "layer_lottery", sparsity=0, p=(1,), **given)
    one = next(iter(free.facts.values()))["flops_kept"]
    assert not [line for line in free.warnings if "asks" in line]
    near = sc.plan(model, "layer_lottery", budget=sc.Budget(one + 1e-4, "flops"), **given)
    assert not [line for line in near.warnings if "asks" in line]
    far = sc.plan(model, "layer_lottery", budget=sc.Budget((1 + one) / 2, "flops"), **given)
    kept = next(iter(far.facts.values()))["flops_kept"]
    assert any(
        f"more goes than flops {(1 + one) / 2:g} asks, {kept:.4g} of the dense flops is left" in line
        for line in far.warnings
    )
    strict = sc.plan(model, "layer_lottery", sparsity=0.5, data=DATA)
    blocks = sum(len(mask) for mask in strict.masks.values())
    assert any(line.endswith(f"of {blocks} blocks that may go") for line in strict.warnings)
