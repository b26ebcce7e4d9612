"""Growing regularisation's small-scale check: what fades before it goes is missed least.

The digits ResNet, 300 steps of SGD (0.05, momentum 0.9, cosine), then 200 steps at a peak of 0.02 while the penalty
grows to 10 in their first half, then the cut to 30 % of the FLOPs, every layer alike, not fine-tuned. `filters` is the
paper's penalty, on the filters alone; batch norms keep what those make large until its variance sinks below their eps,
so `settled` re-estimates statistics, for all alike. `whole` and `second` let everything fade that goes with a channel.
Baseline: the same steps without the penalty, cut by the filters' L1 norm. Random: the network that was penalised
without random channels, at the same widths.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from statistics import mean
from typing import Any

from secateur import api
from secateur.core.budget import Budget, Quantity
from secateur.core.progress import Progress
from secateur.lab.checks._resnet_full import of_trained
from secateur.lab.checks._structured import cut_copy, example, points, recovered
from secateur.lab.checks._trained_cuts import RECIPE, Trained, chance, fresh, random_cuts, trained
from secateur.lab.checks._training import fitting
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.train.loop import Recipe

BUDGET = Budget(0.3, Quantity.FLOPS)
GROWING = Recipe(steps=200, batch=64, lr=0.02, weight_decay=1e-4)
PACE: dict[str, Any] = {"ceiling": 10.0, "until": 0.5}
AT_ONCE = "accuracy in percent right after the cut to 30 % of the FLOPs, no tuning"
CLAIMS = {
    "filters": Expectation(f"{AT_ONCE}, of filters that faded alone", ">= 40", "both"),
    "settled": Expectation("the same with batch-norm statistics re-estimated", ">= 85", "both"),
    "whole": Expectation(f"{AT_ONCE}, where everything faded that goes with a channel", ">= 90", "both"),
    "second": Expectation("the same, chosen under a penalty on all (GReg-2)", ">= 90", "both"),
    "separated": Expectation(
        "share of channels whose mean weight is below a hundredth of the largest", ">= 0.3", "baseline"
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    dense = fresh(seed)
    fitting(RECIPE, seed, progress=progress)(dense)

    def grown(**settings: str) -> Trained:
        return trained(copy.deepcopy(dense), fitting(GROWING, seed), "greg", BUDGET, progress, **PACE, **settings)

    filters, whole, second = grown(), grown(members="all"), grown(members="all", variant="greg-2")
    fitting(GROWING, seed, progress=progress)(dense)
    norm: dict[str, Any] = {"norm": "l1", "members": "producers", "multiple": 1, "keep_scores": True}
    plain = Trained(dense, api.plan(dense, "channel_norm", budget=BUDGET, example=example(), **norm))
    others = mean(settled(one, seed, progress) for one in random_cuts(filters, seed))
    return {
        "filters": Sample(filters.accuracy, plain.accuracy, chance(filters, seed)),
        "settled": Sample(settled(filters, seed, progress), settled(plain, seed, progress), others),
        "whole": Sample(whole.accuracy, plain.accuracy, chance(whole, seed)),
        "second": Sample(second.accuracy, plain.accuracy, chance(second, seed)),
        "separated": Sample(whole.near_zero, plain.near_zero, whole.near_zero),
    }


def settled(found: Trained, seed: int, progress: Progress) -> float:
    """Accuracy in percent after the cut and new batch-norm statistics."""
    return points(recovered(cut_copy(found.model, found.plan), seed, progress, "batchnorm"))


check = Check(CLAIMS, run, of_trained("greg"))
