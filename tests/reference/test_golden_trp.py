"""Golden numbers of the official TRP code: ranks, truncated weights, subgradients, and layers split in two."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import trp_recipes
from golden_recipes import digest
from torch import Tensor

import secateur as sc
from secateur.core.units import Scheme
from secateur.measure import parameters
from secateur.scores.spectrum import Rule, Spectrum, ranks

CASES = json.loads((Path(__file__).parent / "golden_trp.json").read_text(encoding="utf-8"))["cases"]
ROWS = [(case, kind) for case in trp_recipes.CASES for kind in trp_recipes.TYPES]
SPLIT = [(case, kind) for case, kind in ROWS if "outputs" in CASES[case][kind]]


def assert_figures(found: Tensor, expected: list[list[float]]) -> None:
    flat = found.flatten()
    for index, value in expected:
        assert float(flat[int(index)]) == pytest.approx(value, rel=1e-4, abs=2e-5)


@pytest.mark.parametrize(("case", "kind"), ROWS)
def test_one_truncation_is_the_official_one(case, kind):
    weight, golden = trp_recipes.weight(case), CASES[case][kind]
    assert digest(weight) == CASES[case]["digest"]
    spectrum = Spectrum.of(weight, Scheme(trp_recipes.TYPES[kind]))
    counts = ranks(spectrum.values, Rule.ENERGY, 0.9)
    assert counts == golden["ranks"]
    near = spectrum.cut(counts)
    assert_figures(near.weight, golden["weight"])
    assert_figures(near.direction, golden["direction"])
    assert float(near.weight.norm()) == pytest.approx(golden["weight_norm"], rel=1e-5)
    assert float(near.direction.norm()) == pytest.approx(golden["direction_norm"], rel=1e-5)


@pytest.mark.parametrize(("case", "kind"), SPLIT)
def test_a_training_step_and_the_split_at_its_end_are_the_official_ones(case, kind):
    """One step of learning rate 0: the truncated weights, split by the official rules, also where that does not pay."""
    net, golden = trp_recipes.network(case), CASES[case][kind]
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    settings = {"scheme": trp_recipes.TYPES[kind], "every": 1, "reference": True}
    sparsifier = sc.sparsify(net, optimizer, "trp", 0.0, steps=1, **settings)
    assert_figures(net[1].weight.detach(), golden["weight"])
    (0 * net(torch.ones(1, 1, 7, 7))).sum().backward()
    optimizer.step()
    assert_figures(net[1].weight.grad / 3e-4, golden["direction"])
    made = sc.apply_(net, sparsifier.finish())
    assert parameters(made[1]) == golden["split_parameters"]
    with torch.no_grad():
        assert_figures(made(torch.arange(49.0).view(1, 1, 7, 7) / 64 - 0.375), golden["outputs"])
