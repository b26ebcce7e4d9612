"""Golden numbers of the official FPGM and HRank code: distances, ranks, and which filters go."""

from __future__ import annotations

import json
from pathlib import Path

import golden_recipes
import hrank_recipes
import pytest
import torch
from torch import Tensor, nn

import secateur as sc
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.scores.distances import distance_sums

HERE = Path(__file__).parent
FPGM = json.loads((HERE / "golden_fpgm.json").read_text(encoding="utf-8"))["cases"]


def convolution(case: dict) -> Tensor:
    weight = golden_recipes.weights(case["n"], case["c"] * case["k"] ** 2, case["seed"])
    weight = weight.view(case["n"], case["c"], case["k"], case["k"])
    assert golden_recipes.digest(weight) == case["digest"]
    return weight


def fpgm_plan(case: dict, **settings: object) -> Plan:
    """The case's share of a network of one convolution and what reads it."""
    weight = convolution(case)
    net = nn.Sequential(nn.Conv2d(case["c"], case["n"], case["k"], bias=False), nn.Flatten(), nn.Linear(case["n"], 2))
    net[0].weight = nn.Parameter(weight)
    removed = len(case["gone_by_norm"]) + len(case["gone_by_distance"])
    example = torch.rand(2, case["c"], case["k"], case["k"])
    share = (removed + 0.5) / case["n"]
    return sc.plan(net, "fpgm", share, example=example, multiple=1, reference=True, largest_cut=1, **settings)


@pytest.mark.parametrize("name", FPGM)
def test_fpgm_distances_are_the_official_ones(name):
    case = FPGM[name]
    index = [number for number, _ in case["sums"]]
    assert index == [i for i in range(case["n"]) if i not in case["gone_by_norm"]]
    expected = [value for _, value in case["sums"]]
    assert distance_sums(convolution(case)[index].flatten(1)).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", FPGM)
def test_fpgm_removes_the_official_filters(name):
    case = FPGM[name]
    made = fpgm_plan(case, distance=case["dist_type"], norm_share=round(1 - case["rate_norm"], 6))
    gone = (~made.masks["0:channel"]).nonzero().flatten().tolist()
    assert gone == sorted(case["gone_by_norm"] + case["gone_by_distance"])


def test_hrank_ranks_are_the_official_ones():
    official = json.loads((HERE / "golden_hrank.json").read_text(encoding="utf-8"))["ranks"]
    data = [Batch((images,)) for images in hrank_recipes.images()]
    made = sc.plan(hrank_recipes.network(), "hrank", 0.5, data=data, multiple=1, normalise="none", keep_scores=True)
    assert made.scores["conv1:channel"].tolist() == pytest.approx(official["relu1"], abs=1e-5)
    stream = [(first + second) / 2 for first, second in zip(official["relu2"], official["relu3"], strict=True)]
    assert made.scores["conv2:channel"].tolist() == pytest.approx(stream, abs=1e-5)
