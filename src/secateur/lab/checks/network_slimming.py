"""Network slimming's small-scale check: scales separate, so the small ones can go at once.

The digits ResNet, 300 steps of SGD (0.05, momentum 0.9, cosine), cut to 30 % of the FLOPs in one ranking of all layers
and not fine-tuned. A weight of 0.03 pulls a scale, which starts at 1, by up to 2.3 in these steps; the paper's 1e-4 in
its 160 epochs by 6.6 from 0.5. Baseline: the same training without the penalty, cut by the same scales. Random: the
slimmed network without random channels, at the same widths.
"""

from __future__ import annotations

from collections.abc import Mapping

from secateur import api
from secateur.core.budget import Budget, Quantity
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.lab.checks._resnet_full import of_trained
from secateur.lab.checks._structured import cut_copy, example
from secateur.lab.checks._trained_cuts import RECIPE, Trained, chance, fresh, trained
from secateur.lab.checks._training import fitting
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import flops

BUDGET, WEIGHT = Budget(0.3, Quantity.FLOPS), 0.03
CLAIMS = {
    "at_once": Expectation("accuracy in percent right after the cut to 30 % of the FLOPs, no tuning", ">= 50", "both"),
    "separated": Expectation("share of scales below a hundredth of the largest", ">= 0.4", "baseline"),
    "budget": Expectation(
        "miss of the 30 % by the cut network, as a fraction of the dense one's FLOPs (baseline: 30 % of the channels)",
        "<= 0.01",
        "baseline",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    ours = trained(fresh(seed), fitting(RECIPE, seed), "network_slimming", BUDGET, progress, weight=WEIGHT)
    plain = trained(fresh(seed), fitting(RECIPE, seed), "network_slimming", BUDGET, progress, weight=0.0)
    units = Trained(ours.model, units_plan(ours))
    return {
        "at_once": Sample(ours.accuracy, plain.accuracy, chance(ours, seed)),
        "separated": Sample(ours.near_zero, plain.near_zero, ours.near_zero),
        "budget": Sample(miss(ours), miss(units), miss(ours)),
    }


def miss(found: Trained) -> float:
    """How far the FLOPs of the cut network are from the budget, measured on both networks."""
    return abs(flops(cut_copy(found.model, found.plan), example()) / flops(found.model, example()) - BUDGET.amount)


def units_plan(found: Trained) -> Plan:
    """The same budget read as a share of channels."""
    return api.plan(found.model, "network_slimming", 1 - BUDGET.amount, example=example())


check = Check(CLAIMS, run, of_trained("network_slimming"))
