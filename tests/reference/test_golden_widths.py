"""Golden numbers of the official CFSP, AMP and MAW code: scores, budgets and kept neurons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import width_recipes as recipes

import secateur as sc
from secateur.allocate.importance import multiples, proportional, sigmoid
from secateur.core.units import Site, UnitKind
from secateur.methods.llm.amp import Rounding, head_scores, removed
from secateur.methods.llm.maw import Rule, pair_scores

GOLDEN = json.loads((Path(__file__).parent / "widths.json").read_text(encoding="utf-8"))
SIZES = {str(index): recipes.INNER for index in range(recipes.BLOCKS)}


def cfsp_plan(fine, **more):
    recipe = dict(recipes.CFSP[fine])
    data = list(recipes.sequences(recipe.pop("scale")).split(1))
    sparsity = recipe.pop("sparsity")
    return sc.plan(
        recipes.Decoder(), "cfsp", sparsity, data=data, fine=fine, tokens=0, keep_scores=True, **recipe, **more
    )


@pytest.mark.parametrize("fine", recipes.CFSP)
def test_cfsp_scores_and_importance_are_the_official_ones(fine):
    plan, official = cfsp_plan(fine), GOLDEN["cfsp"][fine]
    for index, name in enumerate(plan.sites):
        assert plan.scores[name][:16].tolist() == pytest.approx(official["scores"][index], rel=2e-5)
        assert plan.facts[name]["importance"] == pytest.approx(official["importance"][index], rel=2e-4)


@pytest.mark.parametrize("fine", recipes.CFSP)
def test_cfsp_budgets_are_the_official_ones(fine):
    recipe, official = recipes.CFSP[fine], GOLDEN["cfsp"][fine]
    importance = dict(zip(SIZES, official["importance"], strict=True))
    found = proportional(sigmoid(importance, recipe.get("slope", 1.0)), SIZES, 1 - recipe["sparsity"])
    assert list(found.values()) == pytest.approx(official["density"], rel=1e-6)
    plan = cfsp_plan(fine)
    for name, kept in zip(plan.sites, official["kept"], strict=True):
        assert abs(plan.kept(name) - (kept - 1)) <= 1  # the official threshold keeps one more
    rounded = list(multiples(found, SIZES, 128).values())
    lost = [index for index, share in enumerate(found.values()) if share * recipes.INNER < 64]
    for index, (ours, kept) in enumerate(zip(rounded, official["kept_128"], strict=True)):
        # rounded to 0, the official index of the threshold is -1 and the whole block stays
        assert (ours, kept) == (128, 256) if index in lost else ours == kept
    assert bool(lost) == (fine == "one_wa")


@pytest.mark.parametrize("fine", [name for name in recipes.CFSP if name != "one_wa"])
def test_cfsp_keeps_the_official_neurons(fine):
    plan = cfsp_plan(fine, multiple=128)
    official = GOLDEN["cfsp"][fine]
    for name, kept, digest in zip(plan.sites, official["kept_128"], official["digest_128"], strict=True):
        assert plan.kept(name) == kept
        assert int(plan.masks[name].nonzero().sum()) == digest


def test_amp_scores_are_the_official_ones():
    weight = recipes.projection().t().reshape(recipes.HEADS, recipes.HEAD_DIM, recipes.FEATURES)
    heads, neurons = [], []
    for prompt in recipes.prompts():
        even = torch.full((1, prompt.shape[1]), 1 / prompt.shape[1])
        heads.append(head_scores(prompt.view(1, -1, recipes.HEADS, recipes.HEAD_DIM), weight, even))
        neurons.append(prompt.abs().mean((0, 1)))
    assert torch.stack(heads).mean(0).tolist() == pytest.approx(GOLDEN["amp"]["heads"], rel=1e-5)
    assert torch.stack(neurons).mean(0).tolist() == pytest.approx(GOLDEN["amp"]["neurons"], rel=1e-5)


@pytest.mark.parametrize(("case", "expected"), list(zip(recipes.AMP_COUNTS, GOLDEN["amp"]["removed"], strict=True)))
def test_amp_counts_are_the_official_ones(case, expected):
    heads, neurons, share = case
    sites = [Site("h", UnitKind.HEAD, (heads,)), Site("n", UnitKind.NEURON, (neurons,))]
    gone = removed(sites, dict.fromkeys(UnitKind, share), Rounding.REFERENCE)
    assert [gone["h"], gone["n"]] == expected


@pytest.mark.parametrize("rule", ["maw", "vow", "pon"])
def test_maw_scores_are_the_official_ones(rule):
    assert pair_scores(recipes.gate_and_up(), Rule(rule)).tolist() == pytest.approx(GOLDEN["maw"][rule], rel=1e-6)
