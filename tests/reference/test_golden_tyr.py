"""Local pruning by groups against what the official code of Tyr-the-Pruner gave; golden_tyr.json says how."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import golden_recipes as recipes
import pytest
import torch

from secateur.recover.group_obs import GroupOBS, Pace, Saliency

GOLDEN = json.loads((Path(__file__).parent / "golden_tyr.json").read_text())["cases"]


def solver(case: dict[str, Any]) -> GroupOBS:
    weight = recipes.weights(case["O"], case["I"], case["seed"])
    batches = recipes.batches(case["I"], case["seed"], length=48, dead=case["dead"])
    assert recipes.digest(weight, *batches) == case["digest"]
    inputs = torch.cat([batch.flatten(0, 1) for batch in batches]).double()
    columns = torch.arange(case["I"]).view(case["groups"], -1)
    return GroupOBS(weight, inputs.t() @ inputs, columns, saliency=Saliency.CODE)


@pytest.mark.parametrize("name", GOLDEN)
def test_kept_groups_weights_and_losses_are_the_official_ones(name: str) -> None:
    case = GOLDEN[name]
    pruned = solver(case).levels([level["keep"] for level in case["levels"]], Pace(rounds=case["rounds"]))
    for mine, official in zip(pruned, case["levels"], strict=True):
        weight = torch.tensor(official["weight"])
        kept = weight.view(case["O"], case["groups"], -1).abs().sum((0, 2)) > 0
        assert torch.equal(mine.weight.view(case["O"], case["groups"], -1).abs().sum((0, 2)) > 0, kept)
        assert int(mine.keep.sum()) == official["keep"]
        torch.testing.assert_close(mine.weight, weight, rtol=1e-3, atol=2e-4)
        if official["loss"]:  # the official code says 0 where dead inputs are enough
            assert mine.loss == pytest.approx(official["loss"], rel=1e-4)


def test_the_recipes_tell_saliencies_and_rounds_apart() -> None:
    differing = {}
    for name, case in GOLDEN.items():
        own, pace = solver(case), Pace(rounds=case["rounds"])
        keeps = [level["keep"] for level in case["levels"]]
        official = [one.keep for one in own.levels(keeps, pace)]
        others = [one.keep for one in own.levels(keeps, Pace(rounds=1 if case["rounds"] > 1 else 3))]
        own.saliency = Saliency.PAPER
        paper = [one.keep for one in own.levels(keeps, pace)]
        for other, kept in (("rounds", others), ("saliency", paper)):
            differing[f"{name}/{other}"] = any(not torch.equal(*pair) for pair in zip(official, kept, strict=True))
    assert any(found for name, found in differing.items() if name.endswith("rounds")), differing
    assert any(found for name, found in differing.items() if name.endswith("saliency")), differing
