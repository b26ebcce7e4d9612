"""Group lasso's small-scale check: half of the channels become exactly zero, so that cutting them changes nothing.

The digits ResNet, 300 steps of SGD (0.05, momentum 0.9, cosine), half of its channels cut in one ranking of all layers
and not fine-tuned; the proximal step with a weight of 0.01. Baseline: the same training without the penalty, cut by the
same norm. Random: the shrunk network without random channels, at the same widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

import torch

from secateur.core.budget import Budget
from secateur.core.progress import Progress
from secateur.lab.checks._resnet_full import of_trained
from secateur.lab.checks._trained_cuts import RECIPE, Trained, fresh, random_cuts, trained
from secateur.lab.checks._training import fitting
from secateur.lab.reproduce import Check, Expectation, Sample

BUDGET, WEIGHT = Budget(0.5), 0.01
CLAIMS = {
    "at_once": Expectation("accuracy in percent right after half of the channels went, no tuning", ">= 95", "both"),
    "zero": Expectation("share of channels whose weights are all exactly zero", ">= 0.5", "baseline"),
    "lossless": Expectation("largest difference that the cut makes to a logit", "<= 1e-4", "both"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    ours = trained(fresh(seed), fitting(RECIPE, seed), "group_lasso", BUDGET, progress, weight=WEIGHT)
    plain = trained(fresh(seed), fitting(RECIPE, seed), "group_lasso", BUDGET, progress, weight=0.0)
    others = random_cuts(ours, seed)
    return {
        "at_once": Sample(ours.accuracy, plain.accuracy, mean(one.accuracy for one in others)),
        "zero": Sample(zero(ours), zero(plain), zero(ours)),
        "lossless": Sample(ours.gap(), plain.gap(), mean(one.gap() for one in others)),
    }


def zero(found: Trained) -> float:
    """Share of units with a score of exactly 0."""
    return float((torch.cat(list(found.plan.scores.values())) == 0).double().mean())


check = Check(CLAIMS, run, of_trained("group_lasso"))
