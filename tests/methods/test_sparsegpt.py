"""SparseGPT: the adaptive mask, the lazy update, damping, and the traps of its note."""

import copy
from fractions import Fraction
from math import floor

import pytest
import torch
from method_models import inputs, linear, stacked, tiny_gpt2, with_linears

from secateur import api
from secateur.core.budget import Pattern
from secateur.core.errors import BudgetError, NumericsError
from secateur.core.select import keep_pattern
from secateur.recover.obs import inverse_factor
from secateur.stats.listeners import Hessian


def layer_and_data(rows=24, columns=256, tokens=600, seed=0):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return linear(weight), inputs(10, tokens // 10, columns, seed=seed)


def output_error(layer, value, data):
    difference = (layer.weight.detach() - value).double()
    return float((data.flatten(0, 1).double() @ difference.t()).square().sum())


def hessian_of(data):
    found = Hessian(data.shape[-1])
    found.update(data.flatten(0, 1), len(data))
    return found.value


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"sparsity": 0.7}, {"pattern": "2:4"}, {"pattern": "1:4"}])
@pytest.mark.parametrize("blocksize", [16, 100, 128])
def test_removed_places_are_exactly_zero_and_the_rest_compensates(budget, blocksize):
    if "pattern" in budget and blocksize == 100:
        blocksize = 64
    layer, data = layer_and_data()
    plan = api.plan(layer, "sparsegpt", data=data, blocksize=blocksize, **budget)
    mask, value = plan.masks["weight"], plan.weights["weight"]
    assert not value[~mask].any()
    assert (value[mask] != layer.weight[mask]).float().mean() > 0.9
    share = budget.get("sparsity") or {"2:4": 0.5, "1:4": 0.75}[budget["pattern"]]
    assert int((~mask).sum()) == floor(24 * 256 * Fraction(str(share)))
    own = layer.weight.detach() * mask
    assert output_error(layer, value, data) < 0.75 * output_error(layer, own, data)  # better than no compensation


def test_the_mask_of_n_of_m_sees_compensated_weights():
    layer, data = layer_and_data()
    plan = api.plan(layer, "sparsegpt", pattern="2:4", data=data)
    upper = inverse_factor(hessian_of(data)).upper
    from_dense = keep_pattern(layer.weight.detach().square() / upper.diagonal().square(), Pattern(2, 4))
    differs = (plan.masks["weight"] != from_dense).view(24, 64, 4).any(-1)
    assert differs.float().mean() >= 0.01
    assert not differs[:, 0].any()  # before the first group nothing has been compensated


def test_each_block_s_mask_sees_compensation_from_the_blocks_before():
    """Forgetting the lazy update to the right of a block leaves the last columns as they were."""
    layer, data = layer_and_data()
    plan = api.plan(layer, "sparsegpt", 0.5, data=data)
    upper = inverse_factor(hessian_of(data)).upper
    dense = (layer.weight.detach().square() / upper.diagonal().square())[:, 128:]
    rank = dense.flatten().argsort().argsort().view(dense.shape)
    assert (plan.masks["weight"][:, 128:] != (rank >= dense.numel() // 2)).float().mean() > 0.01


def test_compare_row_gives_every_row_its_share():
    layer, data = layer_and_data(columns=200)
    plan = api.plan(layer, "sparsegpt", 0.55, data=data, compare="row", blocksize=64)
    assert (~plan.masks["weight"]).sum(1).tolist() == [110] * 24
    block = api.plan(layer, "sparsegpt", 0.55, data=data, blocksize=64)
    assert len(set((~block.masks["weight"]).sum(1).tolist())) > 1


def test_every_block_of_columns_gets_its_share():
    layer, data = layer_and_data()
    removed = ~api.plan(layer, "sparsegpt", 0.5, data=data, blocksize=64).masks["weight"]
    assert removed.view(24, 4, 64).sum((0, 2)).tolist() == [24 * 32] * 4


def test_fewer_tokens_than_features_work_thanks_to_damping():
    layer, data = layer_and_data(tokens=50)
    plan = api.plan(layer, "sparsegpt", 0.5, data=data)
    assert torch.isfinite(plan.weights["weight"]).all()
    assert plan.facts["weight"]["damping"] == 0.01
    assert not plan.warnings
    fewer = layer.weight.detach() * plan.masks["weight"]
    assert output_error(layer, plan.weights["weight"], data) < 0.5 * output_error(layer, fewer, data)


def test_raised_damping_is_reported():
    layer, data = layer_and_data(columns=64, tokens=50)
    data = data[:1, :2].round()  # two tokens: rank two, and no rounding noise that would help
    plan = api.plan(layer, "sparsegpt", 0.5, data=data, percdamp=1e-30)
    assert plan.facts["weight"]["damping"] > 1e-30
    assert any("'weight'" in warning and "damping raised" in warning for warning in plan.warnings)
    assert torch.isfinite(plan.weights["weight"]).all()


def test_a_hessian_that_no_damping_saves_is_refused():
    with pytest.raises(NumericsError, match="cannot be factorised"):
        inverse_factor(-torch.eye(4))


def test_dead_inputs_are_zeroed_and_disturb_nothing():
    layer, data = layer_and_data(columns=64)
    data[..., 7] = 0
    without = torch.arange(64) != 7
    rest = linear(layer.weight.detach()[:, without].clone())
    ours = api.plan(layer, "sparsegpt", 0.5, data=data)
    assert not ours.weights["weight"][:, 7].any()
    assert torch.isfinite(ours.weights["weight"]).all()
    assert output_error(layer, ours.weights["weight"], data) < 1.05 * output_error(
        rest, api.plan(rest, "sparsegpt", 0.5, data=data[..., without]).weights["weight"], data[..., without]
    )


def test_scale_of_the_inputs_does_not_matter():
    layer, data = layer_and_data(columns=64)
    plain, scaled = (api.plan(layer, "sparsegpt", 0.5, data=x) for x in (data, data * 1024))
    assert torch.equal(plain.masks["weight"], scaled.masks["weight"])
    torch.testing.assert_close(plain.weights["weight"], scaled.weights["weight"])


@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_gpt2_is_solved_as_its_twin_of_linear_layers(budget):
    model = tiny_gpt2()
    data = torch.randint(0, 40, (8, 20), generator=torch.Generator().manual_seed(0))
    ours = api.plan(model, "sparsegpt", data=data, **budget)
    twin = api.plan(with_linears(model), "sparsegpt", data=data, **budget)
    for name, value in ours.weights.items():
        assert torch.equal(ours.masks[name].t(), twin.masks[name])
        torch.testing.assert_close(value.t(), twin.weights[name], rtol=1e-4, atol=1e-5)
    assert len(ours.weights) == 8


@pytest.mark.parametrize("true_sequential", [False, True])
def test_hessians_come_from_the_right_state_of_the_block(true_sequential):
    """An oracle that runs the blocks by hand and prunes every layer as a model of its own."""
    model, data = stacked(blocks=2), inputs(8, 10, 12)
    plan = api.plan(model, "sparsegpt", 0.6, data=data, true_sequential=true_sequential)
    other = api.plan(model, "sparsegpt", 0.6, data=data, true_sequential=not true_sequential)
    x, live = data, copy.deepcopy(model)
    for index, block in enumerate(live.layers):
        dense = copy.deepcopy(block)
        for name in ("up", "down"):
            source = block if true_sequential else dense
            with torch.no_grad():
                entering = x if name == "up" else torch.relu(source.up(x))
            layer = getattr(block, name)
            alone = api.plan(linear(layer.weight.detach().clone()), "sparsegpt", 0.6, data=entering)
            key = f"layers.{index}.{name}.weight"
            assert torch.equal(plan.masks[key], alone.masks["weight"]), key
            torch.testing.assert_close(plan.weights[key], alone.weights["weight"], rtol=1e-4, atol=1e-5)
            layer.weight.data = alone.weights["weight"]
        with torch.no_grad():
            x = block(x)
    assert not torch.equal(plan.weights["layers.0.down.weight"], other.weights["layers.0.down.weight"])


def test_the_user_is_told_that_weights_change():
    assert api.find_method("sparsegpt").changes_weights
    assert not api.find_method("wanda").changes_weights
    layer, data = layer_and_data(columns=64)
    plan = api.plan(layer, "sparsegpt", 0.5, data=data)
    with pytest.raises(Exception, match="other values"):
        plan.check_model({"weight": layer.weight.detach() + 1}, other_weights=True)


@pytest.mark.parametrize("blocksize", [2, 6, 10])
def test_a_blocksize_that_splits_groups_is_refused(blocksize):
    layer, data = layer_and_data(columns=64)
    with pytest.raises(BudgetError, match="blocksize"):
        api.plan(layer, "sparsegpt", pattern="2:4", data=data, blocksize=blocksize)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_joint_rounding_leaves_levels_and_zeros(bits):
    layer, data = layer_and_data(columns=64)
    plan = api.plan(layer, "sparsegpt", 0.5, data=data, wbits=bits)
    value = plan.weights["weight"]
    assert not value[~plan.masks["weight"]].any()
    assert max(row.unique().numel() for row in value) <= 2**bits
    plain = api.plan(layer, "sparsegpt", 0.5, data=data).weights["weight"]
    if bits == 8:
        assert output_error(layer, value, data) < 1.2 * output_error(layer, plain, data)
