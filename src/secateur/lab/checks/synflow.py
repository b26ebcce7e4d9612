"""SynFlow's small-scale check: flow is conserved, no layer collapses at 99 %, and the rounds are what prevents it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.core.budget import Budget
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.data.example import example_for
from secateur.lab.checks._at_start import conv_net, planned, trained_accuracy
from secateur.lab.checks._digits import digits
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.scores.flow import synaptic_flow

CLAIMS = {
    "collapse": Expectation("weights that the sparsest layer keeps at 99 %, width 16", ">= 50", "both"),
    "rounds": Expectation("weights that the sparsest layer keeps at 99.5 %, width 16", ">= 20", "both"),
    "accuracy": Expectation("accuracy points over SNIP after training, width 16, 99 %", ">= 30", "both"),
    "conserved": Expectation("relative difference between the layers' sums of scores", "<= 1e-9", "both"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed; every budget leaves one weight per layer. Random: uniform densities.

    Baselines: SNIP; one round instead of 100; magnitude before training; SNIP's scores.
    """
    net = conv_net(16, seed)

    def plan(method: str, sparsity: float = 0.99, **settings: object) -> Plan:
        return planned(net, seed, method, budget=Budget(sparsity, floor=1), **settings)

    plans = {name: plan(name) for name in ("synflow", "snip", "global_magnitude", "random")}
    scores = {name: trained_accuracy(net, made, seed, progress) for name, made in plans.items()}
    over_snip = {name: value - scores["snip"] for name, value in scores.items()}
    return {
        "collapse": Sample(*(sparsest(plans[name]) for name in ("synflow", "snip", "random"))),
        "rounds": Sample(
            sparsest(plan("synflow", 0.995)),
            sparsest(plan("synflow", 0.995, rounds=1)),
            sparsest(plan("random", 0.995)),
        ),
        "accuracy": Sample(over_snip["synflow"], over_snip["global_magnitude"], over_snip["random"]),
        "conserved": Sample(
            difference(flow(net, plans["synflow"])),
            difference(planned(net, seed, "snip", sparsity=0.5, keep_scores=True).scores),
            difference(planned(net, seed, "random", sparsity=0.5, keep_scores=True).scores),
        ),
    }


def sparsest(plan: Plan) -> float:
    """Fewest weights kept in a layer."""
    return float(min(plan.kept(name) for name in plan.sites))


def flow(net: nn.Module, plan: Plan) -> dict[str, Tensor]:
    """Synaptic flow of the dense network."""
    score = synaptic_flow(net, example_for(net, digits().calibration), list(plan.sites))
    return score({name: torch.ones_like(mask) for name, mask in plan.masks.items()})


def difference(scores: Mapping[str, Tensor]) -> float:
    """(largest - smallest) / largest sum of scores over the layers."""
    sums = [float(score.double().sum()) for score in scores.values()]
    return (max(sums) - min(sums)) / max(sums)


check = Check(CLAIMS, run)
