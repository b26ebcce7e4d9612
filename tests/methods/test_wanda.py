"""Wanda: exact rows, what the statistics are taken from, and the traps of its note."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from method_models import (
    Block,
    Experts,
    Stacked,
    inputs,
    linear,
    lowest_per_row,
    stacked,
    tiny_gpt2,
    wanda_scores,
    with_linears,
)
from torch import nn

from secateur import api
from secateur.core.budget import Budget
from secateur.core.errors import BudgetError, DataError, ModelError, NumericsError
from secateur.core.units import Layout


def test_four_weights_by_hand():
    layer = linear(torch.tensor([[4.0, 3.0, 2.0, 1.0], [1.0, 1.0, 1.0, 1.0]]))
    data = torch.tensor([[[1.0, 0.0, 3.0, 0.0]], [[0.0, 2.0, 4.0, 0.0]]])  # norms 1, 2, 5, 0
    plan = api.plan(layer, "wanda", 0.5, data=data, keep_scores=True)
    assert plan.masks["weight"].tolist() == [[False, True, True, False], [False, True, True, False]]
    expected = torch.tensor([[4.0, 6.0, 10.0, 0.0], [1.0, 2.0, 5.0, 0.0]]) / 2**0.5  # mean over 2 sequences
    torch.testing.assert_close(plan.scores["weight"], expected)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(2, 24),
    percent=st.integers(1, 95),
    dead=st.integers(0, 23),
    seed=st.integers(0, 10**6),
)
def test_every_row_loses_exactly_its_share(rows, columns, percent, dead, seed):
    """Few distinct weights and features of equal norm: ties everywhere, at zero too."""
    rng = np.random.RandomState(seed)
    weight = torch.from_numpy(rng.randint(-2, 3, (rows, columns)).astype(np.float32))
    data = torch.from_numpy(rng.choice([1.0, 2.0], (1, 1, columns)).astype(np.float32)).repeat(2, 3, 1)
    data[..., rng.permutation(columns)[: min(dead, columns - 1)]] = 0
    remove = int(Fraction(percent, 100) * columns)
    if not remove:
        return
    plan = api.plan(linear(weight), "wanda", percent / 100, data=data)
    expected = lowest_per_row(wanda_scores(weight, data), remove)
    assert (plan.masks["weight"].numpy() == expected).all()
    assert (~expected).sum(1).tolist() == [remove] * rows


def test_dead_features_go_first_and_nothing_is_nan():
    weight = torch.full((3, 8), 1e-3)
    weight[:, [2, 5]] = 1e6
    data = inputs(4, 5, 8)
    data[..., [2, 5]] = 0
    plan = api.plan(linear(weight), "wanda", 0.25, data=data, keep_scores=True)
    assert (~plan.masks["weight"]).nonzero()[:, 1].tolist() == [2, 5] * 3
    assert torch.isfinite(plan.scores["weight"]).all()
    assert not plan.scores["weight"][:, [2, 5]].any()


def sequential_masks(model, data, sparsity, chained=True, one_pass=False):
    """An oracle in plain PyTorch: block by block, each seeing pruned (or dense) blocks before it."""
    found, x = {}, data
    model = copy.deepcopy(model).eval()
    with torch.no_grad():
        for index, block in enumerate(model.layers):
            dense = copy.deepcopy(block)
            for name in ("up", "down"):
                source = block if one_pass else dense
                entering = x if name == "up" else torch.relu(source.up(x))
                layer = getattr(block, name)
                keep = lowest_per_row(wanda_scores(layer.weight, entering), int(layer.in_features * sparsity))
                found[f"layers.{index}.{name}.weight"] = torch.from_numpy(keep)
                layer.weight.mul_(found[f"layers.{index}.{name}.weight"])
            x = block(x) if chained else dense(x)
    return found


def equal(masks, others):
    return masks.keys() == others.keys() and all(torch.equal(masks[name], others[name]) for name in masks)


@pytest.mark.parametrize("sequencing", ["block", "projection"])
def test_statistics_come_from_pruned_blocks(sequencing):
    model, data = stacked(blocks=3), inputs(6, 5, 12)
    plan = api.plan(model, "wanda", 0.7, data=data, sequencing=sequencing)
    one_pass = sequencing == "projection"
    assert equal(plan.masks, sequential_masks(model, data, 0.7, one_pass=one_pass))
    assert not equal(plan.masks, sequential_masks(model, data, 0.7, chained=False))
    assert not equal(plan.masks, sequential_masks(model, data, 0.7, one_pass=not one_pass))


def test_blocks_can_be_fed_from_dense_ones():
    model, data = stacked(blocks=3), inputs(6, 5, 12)
    plan = api.plan(model, "wanda", 0.7, data=data, dense_chain=True)
    assert equal(plan.masks, sequential_masks(model, data, 0.7, chained=False))


@pytest.mark.parametrize("sequencing", ["block", "projection"])
def test_a_dense_chain_gives_the_dense_statistics_and_restores_the_model(sequencing):
    model, data = stacked(blocks=3), inputs(6, 5, 12)
    before = copy.deepcopy(model.state_dict())
    light, heavy = (
        api.plan(model, "wanda", s, data=data, keep_scores=True, dense_chain=True, sequencing=sequencing)
        for s in (0.1, 0.9)
    )
    torch.testing.assert_close(light.scores["layers.2.up.weight"], heavy.scores["layers.2.up.weight"])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_pruned_block_changes_the_next_statistic():
    model, data = stacked(blocks=2), inputs(6, 5, 12)
    light, heavy = (api.plan(model, "wanda", s, data=data, keep_scores=True) for s in (0.1, 0.9))
    torch.testing.assert_close(light.scores["layers.0.up.weight"], heavy.scores["layers.0.up.weight"])
    torch.testing.assert_close(light.scores["layers.0.down.weight"], heavy.scores["layers.0.down.weight"])
    ratio = light.scores["layers.1.down.weight"] / heavy.scores["layers.1.down.weight"]
    assert (ratio - 1).abs().max() > 0.1


def test_the_model_is_left_as_it_was():
    model, data = stacked(), inputs(6, 5, 12)
    model.train()
    before = copy.deepcopy(model.state_dict())
    api.plan(model, "wanda", 0.5, data=data)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or "forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.3, "compare": "layer"}])
def test_gpt2_is_pruned_as_its_twin_of_linear_layers(budget):
    """`c_proj` is square here: a forgotten transpose would raise nothing."""
    model = tiny_gpt2()
    data = torch.randint(0, 40, (6, 12), generator=torch.Generator().manual_seed(0))
    ours = api.plan(model, "wanda", data=data, **budget)
    twin = api.plan(with_linears(model), "wanda", data=data, **budget)
    assert ours.masks.keys() == twin.masks.keys()
    assert len(ours.masks) == 8
    for name, mask in ours.masks.items():
        assert ours.sites[name].layout is Layout.TRANSPOSED
        assert torch.equal(mask.t(), twin.masks[name]), name
    square = ours.masks["transformer.h.0.attn.c_proj.weight"]
    assert not torch.equal(square, twin.masks["transformer.h.0.attn.c_proj.weight"])


def test_n_of_m_names_what_is_kept():
    weight = torch.tensor([[1.0, 2.0, 3.0, 4.0, 8.0, 7.0, 6.0, 5.0]])
    for pattern, kept in (("1:4", [3, 4]), ("3:4", [1, 2, 3, 4, 5, 6]), ("2:4", [2, 3, 4, 5]), ("4:8", [4, 5, 6, 7])):
        plan = api.plan(linear(weight), "wanda", pattern=pattern, data=torch.ones(2, 1, 8))
        assert plan.masks["weight"][0].nonzero().flatten().tolist() == kept


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "global_magnitude"])
def test_n_of_m_refuses_a_width_that_does_not_divide_and_names_the_layer(method):
    model = stacked(width=12, inner=18)
    with pytest.raises(BudgetError, match=r"layers\.0\.down\.weight.*18 inputs"):
        api.plan(model, method, pattern="2:4", data=inputs(3, 4, 12))
    plan = api.plan(model, method, pattern="2:4", data=inputs(3, 4, 12), exclude=["*.down.weight"])
    assert {name.split(".")[2] for name in plan.masks} == {"up"}


def test_a_layer_too_narrow_for_the_sparsity_is_said_so():
    model = Stacked(Block(3, 10), Block(3, 10))
    plan = api.plan(model, "wanda", 0.3, data=inputs(4, 5, 3))
    for index in range(2):
        assert bool(plan.masks[f"layers.{index}.up.weight"].all())  # floor(3 * 0.3) = 0
        assert (~plan.masks[f"layers.{index}.down.weight"]).sum(1).tolist() == [3] * 3
        assert sum(f"layers.{index}.up.weight" in warning for warning in plan.warnings) == 1
    assert not any("down" in warning for warning in plan.warnings)


def test_nothing_to_prune_anywhere_is_refused():
    with pytest.raises(BudgetError, match="removes nothing"):
        api.plan(linear(torch.ones(4, 3)), "wanda", 0.3, data=inputs(4, 5, 3))


@pytest.mark.parametrize("sparsity", [1.0, 1.5, -0.1, float("nan")])
def test_sparsities_out_of_range_are_refused(sparsity):
    with pytest.raises(BudgetError):
        api.plan(linear(torch.ones(4, 3)), "wanda", sparsity, data=inputs(4, 5, 3))


def test_the_floor_holds_in_every_row():
    model, data = linear(torch.randn(5, 10, generator=torch.Generator().manual_seed(0))), inputs(4, 5, 10)
    plan = api.plan(model, "wanda", budget=Budget(0.9, floor=3), data=data)
    assert plan.masks["weight"].sum(1).tolist() == [3] * 5


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_weight_shared_by_two_layers_is_pruned_once_and_said_so(method):
    model = stacked(blocks=2)
    model.layers[1].up.weight = model.layers[0].up.weight
    plan = api.plan(model, method, 0.5, data=inputs(6, 5, 12))
    assert sorted(plan.masks) == ["layers.0.down.weight", "layers.0.up.weight", "layers.1.down.weight"]
    assert any("layers.1.up.weight" in warning and "layers.0.up" in warning for warning in plan.warnings)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "shortgpt", "global_magnitude"])
def test_embedding_and_tied_head_stay_dense(method):
    model = tiny_gpt2(blocks=4)
    assert model.lm_head.weight is model.transformer.wte.weight
    plan = api.plan(model, method, 0.5, data=torch.randint(0, 40, (4, 8)))
    assert not any("wte" in name or "lm_head" in name for name in plan.masks)
    if method == "global_magnitude":  # its list is the whole model, so the head's absence must be told
        assert any("lm_head.weight" in warning and "wte" in warning for warning in plan.warnings)


def test_an_expert_without_tokens_is_pruned_by_magnitude_with_a_warning():
    torch.manual_seed(0)
    model, data = Stacked(Experts(8), Experts(8)), inputs(4, 10, 8)
    plan = api.plan(model, "wanda", 0.5, data=list(data.split(1)))
    warned = {name for name in plan.masks if any(name in warning for warning in plan.warnings)}
    assert warned == {"layers.0.experts.2.weight", "layers.1.experts.2.weight"}
    positive = data.flatten(0, 1)[data.flatten(0, 1)[:, 0] > 0]
    weights = {name: value.detach() for name, value in model.named_parameters()}
    idle, busy = "layers.0.experts.2.weight", "layers.0.experts.0.weight"
    expected = lowest_per_row(weights[idle].abs().double().numpy(), 4)
    assert (plan.masks[idle].numpy() == expected).all()
    assert (plan.masks[busy].numpy() == lowest_per_row(wanda_scores(weights[busy], positive), 4)).all()


def test_infinite_or_missing_numbers_are_refused_with_the_layer_s_name():
    model, data = stacked(), inputs(4, 5, 12)
    broken = data.clone()
    broken[2, 1, 3] = torch.nan
    for method in ("wanda", "sparsegpt"):
        with pytest.raises(NumericsError, match=r"layers\.0\.up\.weight"):
            api.plan(model, method, 0.5, data=broken)
    with torch.no_grad():
        model.layers[1].down.weight[0, 0] = torch.inf
    for method in ("wanda", "sparsegpt", "global_magnitude"):
        with pytest.raises(NumericsError, match=r"layers\.1\.down\.weight"):
            api.plan(model, method, 0.5, data=data)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "shortgpt", "taylor"])
def test_data_must_be_given(method):
    with pytest.raises(DataError, match="calibration data"):
        api.plan(stacked(), method, 0.5)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_half_precision_model_keeps_its_statistics_in_float32(method):
    """Squares of these inputs overflow float16; both models must choose alike."""
    rng = torch.Generator().manual_seed(0)
    weight = (torch.randint(1, 64, (6, 16), generator=rng) / 64).half()
    data = (torch.randint(-40, 41, (4, 8, 16), generator=rng) * 16.0).half()
    half = api.plan(linear(weight), method, 0.5, data=data)
    full = api.plan(linear(weight.float()), method, 0.5, data=data.float())
    assert torch.equal(half.masks["weight"], full.masks["weight"])
    if method == "sparsegpt":
        assert half.weights["weight"].dtype == torch.float16
        torch.testing.assert_close(half.weights["weight"].float(), full.weights["weight"], rtol=1e-3, atol=1e-4)


def patch_layer(conv):
    """The convolution's matrix as a linear layer."""
    return linear(conv.weight.detach().flatten(1).clone())


@pytest.mark.parametrize(
    "arguments", [{}, {"stride": 2, "padding": 1}, {"dilation": 2, "padding": (2, 0)}, {"padding": "same"}]
)
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_convolution_is_a_linear_layer_on_patches(method, arguments):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 5, (3, 2), bias=False, **arguments)
    images = inputs(6, 3, 8, 9)
    pad = arguments == {"padding": "same"}
    unfolding = {**arguments, "padding": 0} if pad else arguments
    source = nn.functional.pad(images, (0, 1, 1, 1)) if pad else images
    columns = nn.functional.unfold(source, (3, 2), **unfolding).transpose(1, 2).contiguous()
    with torch.no_grad():  # the oracle's patches really are the convolution's
        product = (columns @ conv.weight.flatten(1).t()).transpose(1, 2)
        torch.testing.assert_close(product, conv(images).flatten(2), rtol=1e-4, atol=1e-4)
    ours = api.plan(conv, method, 0.5, data=images)
    flat = api.plan(patch_layer(conv), method, 0.5, data=columns)
    assert torch.equal(ours.masks["weight"].flatten(1), flat.masks["weight"])
    if method == "sparsegpt":
        torch.testing.assert_close(ours.weights["weight"].flatten(1), flat.weights["weight"])


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_a_grouped_convolution_is_refused_by_name(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, groups=2))
    with pytest.raises(ModelError, match=r"'1\.weight'.*grouped"):
        api.plan(model, method, 0.5, data=inputs(2, 4, 8, 8))
    plan = api.plan(model, method, 0.5, data=inputs(2, 4, 8, 8), exclude=["1"])
    assert list(plan.masks) == ["0.weight"]


def test_variant_meets_the_layer_s_sparsity_with_uneven_rows():
    torch.manual_seed(0)
    weight = torch.randn(40, 100) ** 3
    plan = api.plan(linear(weight), "wanda", 0.5, data=inputs(4, 16, 100), variant=True)
    removed = (~plan.masks["weight"]).sum(1)
    assert abs(1 - plan.masks["weight"].float().mean().item() - 0.5) <= 1e-3 + 1e-9
    assert removed.min() < removed.max()
