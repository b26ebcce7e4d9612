"""Ours against what the official code gave on the same inputs; see README.md here."""

import json
from pathlib import Path

import golden_recipes as recipes
import pytest
import torch
from safetensors.torch import load_file

from secateur import api
from secateur.core.masks import unpack
from secateur.stats.listeners import Hessian, SecondMoment

HERE = Path(__file__).parent
GOLDEN = load_file(HERE / recipes.GOLDEN)
MADE = json.loads((HERE / recipes.PROVENANCE).read_text())
DEAD = recipes.WIDTH - 5  # from here on the first layer's inputs are zero


def test_inputs_are_the_ones_the_official_code_saw():
    parameters = [value.detach() for value in recipes.Decoder().parameters()]
    assert recipes.digest(recipes.sequences()) == MADE["wanda"]["sequences"]
    assert recipes.digest(*parameters) == MADE["wanda"]["weights"]
    for name, recipe in recipes.SPARSEGPT.items():
        assert recipes.digest(recipe.module().weight.detach(), *recipe.inputs()) == MADE["sparsegpt"][name]
    assert not recipes.sequences()[..., DEAD:].any()
    assert sum((HERE / name).stat().st_size for name in (recipes.GOLDEN, recipes.PROVENANCE)) < 500_000


def wanda_plan(name, size):
    return api.plan(recipes.Decoder(), "wanda", data=list(recipes.sequences().split(size)), **recipes.WANDA[name])


@pytest.mark.parametrize("size", [1, 3, 8])
@pytest.mark.parametrize("name", recipes.WANDA)
def test_wanda_masks_are_the_official_ones(name, size):
    plan = wanda_plan(name, size)
    assert plan.masks.keys() == {key.removeprefix(f"wanda/{name}/") for key in GOLDEN if f"wanda/{name}/" in key}
    for layer, mask in plan.masks.items():
        official = unpack(GOLDEN[f"wanda/{name}/{layer}"], tuple(mask.shape), layer)
        if "pattern" in recipes.WANDA[name] and layer.endswith("0.self_attn.q_proj.weight"):
            # equal scores of dead inputs: as many go in each row, but topk does not say which
            assert torch.equal(mask[:, DEAD:].sum(1), official[:, DEAD:].sum(1))
            mask, official = mask[:, :DEAD], official[:, :DEAD]
        assert torch.equal(mask, official), layer


def test_the_wanda_recipes_tell_wrong_implementations_apart():
    """Two blocks, rows and the batch weighting matter in them: what must differ does."""
    plan = wanda_plan("half", 8)
    first, last = (f"model.layers.{index}.self_attn.q_proj.weight" for index in (0, 1))
    model = recipes.Decoder()
    entering = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_pre_hook(lambda _, args: entering.append(args[0]))
    with torch.no_grad():
        model(recipes.sequences())
    hook.remove()
    mean = recipes.sequences().flatten(0, 1).abs().mean(0)
    dense = entering[0].flatten(0, 1).norm(dim=0)
    for layer, statistic in ((first, mean), (last, dense)):
        score = dict(model.named_parameters())[layer].detach().abs() * statistic
        chosen = score.argsort(dim=1, stable=True).argsort(dim=1) >= recipes.WIDTH // 2
        assert (chosen != plan.masks[layer]).float().mean() > 0.005
    per_layer = api.plan(model, "wanda", 0.5, data=recipes.sequences(), compare="layer")
    assert not torch.equal(per_layer.masks[last], plan.masks[last])


def test_second_moment_is_the_official_scaler_row():
    layer = recipes.Layer(64, 256, 50, {})
    moment, hessian = SecondMoment(256), Hessian(256)
    for batch in layer.inputs():
        moment.update(batch.flatten(0, 1), len(batch))
        hessian.update(batch.flatten(0, 1), len(batch))
    torch.testing.assert_close(moment.value, GOLDEN["wanda/moment"], rtol=1e-5, atol=0)
    exact = torch.cat(layer.inputs()).double().square().sum((0, 1)) / 8
    torch.testing.assert_close(moment.value.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(hessian.value.diagonal().double(), 2 * exact, rtol=1e-5, atol=0)


def sparsegpt_plan(name, **extra):
    recipe = recipes.SPARSEGPT[name]
    return api.plan(recipe.module(), "sparsegpt", data=recipe.inputs(), **recipe.pruning, **recipe.settings, **extra)


@pytest.mark.parametrize("name", recipes.SPARSEGPT)
def test_sparsegpt_weights_are_the_official_ones(name):
    plan = sparsegpt_plan(name, reference=True)
    ours, official = plan.weights["weight"], GOLDEN[f"sparsegpt/{name}"]
    assert torch.equal(ours == 0, official == 0)
    torch.testing.assert_close(ours, official, rtol=0, atol=1e-4)
    assert not (ours[~plan.masks["weight"]]).any()
    if "wbits" not in recipes.SPARSEGPT[name].settings:  # there a kept weight may be rounded to zero
        assert torch.equal(plan.masks["weight"], official != 0)
    assert plan.facts["weight"]["error"] == pytest.approx(MADE["errors"][name], rel=1e-5)


@pytest.mark.parametrize("name", [name for name, recipe in recipes.SPARSEGPT.items() if "sparsity" in recipe.pruning])
def test_without_reference_the_count_is_exact_and_the_official_one_is_not(name):
    recipe = recipes.SPARSEGPT[name]
    total = recipe.rows * recipe.columns
    asked = total * round(100 * recipe.pruning["sparsity"]) // 100
    blocks = -(-recipe.columns // recipe.settings.get("blocksize", 128))
    exact, official = sparsegpt_plan(name).masks["weight"], sparsegpt_plan(name, reference=True).masks["weight"]
    assert int((~exact).sum()) == asked
    assert 0 < int((~official).sum()) - asked <= blocks


@pytest.mark.parametrize("name", ["half", "sixty", "half_narrow_blocks"])
def test_in_the_first_block_one_weight_decides_between_exact_and_official(name):
    width = recipes.SPARSEGPT[name].settings.get("blocksize", 128)
    exact = sparsegpt_plan(name).masks["weight"][:, :width]
    official = sparsegpt_plan(name, reference=True).masks["weight"][:, :width]
    assert int((exact != official).sum()) == 1
    assert not (official & ~exact).any()
