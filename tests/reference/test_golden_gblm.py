"""GBLM-Pruner: ours against what the official code gave on the same inputs; see README.md here."""

import json
from pathlib import Path

import golden_recipes as recipes
import pytest
import torch
from safetensors.torch import load_file

from secateur import api
from secateur.core.budget import Budget
from secateur.core.masks import unpack
from secateur.core.method import Batch, Task
from secateur.methods.llm import gblm

HERE = Path(__file__).parent
GOLDEN = load_file(HERE / "golden_gblm.safetensors")
MADE = json.loads((HERE / "golden_gblm.json").read_text())


def test_inputs_are_the_ones_the_official_code_saw():
    assert recipes.digest(*recipes.tables(recipes.Decoder()).values()) == MADE["tables"]
    parameters = [value.detach() for value in recipes.gradient_model().parameters()]
    assert recipes.digest(recipes.gradient_ids(), *parameters) == MADE["gradient_model"]


def official(name):
    model = recipes.Decoder()
    shapes = {layer: tuple(value.shape) for layer, value in model.named_parameters()}
    return {layer: unpack(GOLDEN[f"gblm/{name}/{layer}"], shape, layer) for layer, shape in shapes.items()}


@pytest.mark.parametrize("size", [1, 8])
@pytest.mark.parametrize("name", recipes.GBLM)
def test_masks_from_given_gradients_are_the_official_ones(name, size, monkeypatch):
    pruning, settings = recipes.GBLM[name]
    tables = recipes.tables(recipes.Decoder())
    monkeypatch.setattr(gblm, "gradient_norms", lambda task, settings: tables)
    plan = api.plan(recipes.Decoder(), "gblm", data=list(recipes.sequences().split(size)), **pruning, **settings)
    expected = official(name)
    assert plan.masks.keys() == expected.keys()
    for layer, mask in plan.masks.items():
        assert torch.equal(mask, expected[layer]), layer


def test_both_terms_matter_in_the_recipes():
    """Masks of one term alone are clearly others, so that a lost term or scale would show."""
    masks, alone = official("half"), official("gradient")
    wanda = api.plan(recipes.Decoder(), "wanda", 0.5, data=recipes.sequences()).masks
    for layer in masks:
        assert (masks[layer] != wanda[layer]).float().mean() > 0.005, layer
        assert (masks[layer] != alone[layer]).float().mean() > 0.005, layer


@pytest.mark.parametrize("p", [1, 2])
def test_gradient_tables_are_the_official_ones(p):
    """The official code stores both in float16 and adds the first up in it: agreement to its last digits."""
    task = Task(recipes.gradient_model(), Budget(0.5), batches=[Batch((recipes.gradient_ids(),))])
    found = gblm.gradient_norms(task, gblm.GBLMSettings(p=p))
    names = [key.removeprefix(f"gradients/{p}/") for key in GOLDEN if key.startswith(f"gradients/{p}/")]
    assert len(names) == 14
    for name in names:
        expected = GOLDEN[f"gradients/{p}/{name}"].float()
        rounding = 2.0**-11 * (recipes.GRADIENT_SEQUENCES if p == 1 else 1)
        torch.testing.assert_close(found[name], expected, rtol=rounding + 1e-4, atol=1e-5)
        assert not torch.allclose(found[name], GOLDEN[f"gradients/{3 - p}/{name}"].float(), rtol=0.05)
