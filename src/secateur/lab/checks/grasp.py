"""GraSP's small-scale check: the gradient survives, and training under the mask beats uniform random.

Random positions at ERK densities keep as large a gradient (0.9, 1.1 and 0.8 of the dense one under seeds
0 to 2): what GraSP's gradient shows here, it shows against SNIP, magnitude and uniform densities.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent
from secateur.lab.checks._at_start import conv_net, ends_over_middle, planned, trained_accuracy
from secateur.lab.checks._digits import digits
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.shrink.apply import apply_
from secateur.stats.gradients import weight_gradients

CLAIMS = {
    "accuracy": Expectation(
        "accuracy points over uniform random pruning after training, width 8, 95 %", ">= 10", "both"
    ),
    "gradient": Expectation(
        "squared gradient of the kept weights before training, as a share of the dense network's, width 8, 90 %",
        ">= 0.6",
        "both",
    ),
    "ends": Expectation(
        "density of the sparser one of first and last layer over that of the densest between, width 16, 95 %",
        ">= 1.5",
        "both",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Baselines: magnitude before training; SNIP; magnitude within each layer."""
    small, wide = conv_net(8, seed), conv_net(16, seed)

    def score(method: str, draw: int = seed, **settings: object) -> float:
        plan = planned(small, draw, method, sparsity=0.95, **settings)
        return trained_accuracy(small, plan, seed, progress)

    def left(method: str) -> float:
        return gradient_left(small, planned(small, seed, method, sparsity=0.9))

    def ends(method: str, **settings: object) -> float:
        return ends_over_middle(planned(wide, seed, method, sparsity=0.95, **settings))

    uniform = score("random")
    return {
        "accuracy": Sample(
            score("grasp") - uniform,
            score("global_magnitude", minimum=1) - uniform,
            score("random", seed + 1000) - uniform,
        ),
        "gradient": Sample(left("grasp"), left("snip"), left("random")),
        "ends": Sample(ends("grasp"), ends("global_magnitude", spread="uniform"), ends("random")),
    }


def gradient_left(model: nn.Module, plan: Plan) -> float:
    """Squared norm of the kept weights' gradient under the plan over that of all weights, batch statistics."""
    batch = next(digits().calibration.batches(256))

    def squared(network: nn.Module) -> float:
        found = weight_gradients(network.train(), [batch], list(plan.sites), Silent())
        kept = found if network is dense else {name: value * plan.masks[name] for name, value in found.items()}
        return sum(float(value.double().square().sum()) for value in kept.values())

    dense = copy.deepcopy(model)
    return squared(apply_(copy.deepcopy(model), plan)) / squared(dense)


check = Check(CLAIMS, run)
