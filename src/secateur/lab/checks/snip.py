"""SNIP's small-scale check: trained from scratch under its mask a network beats uniform random; ends stay dense."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.core.progress import Progress
from secateur.lab.checks._at_start import conv_net, ends_over_middle, planned, trained_accuracy
from secateur.lab.reproduce import Check, Expectation, Sample

CLAIMS = {
    "accuracy": Expectation(
        "accuracy points over uniform random pruning after training, width 8, 95 %", ">= 10", "both"
    ),
    "ends": Expectation(
        "density of the sparser one of first and last layer over that of the densest between, width 16, 95 %",
        ">= 1.5",
        "both",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """Both claims under one seed. Baseline: magnitude before training, one weight per layer at least.

    Magnitude keeps the ends as well, but at the price of the middle; so for `ends` the baseline is
    magnitude within each layer, which knows no layer densities.
    """
    small, wide = conv_net(8, seed), conv_net(16, seed)

    def score(method: str, draw: int = seed, **settings: object) -> float:
        plan = planned(small, draw, method, sparsity=0.95, **settings)
        return trained_accuracy(small, plan, seed, progress)

    def ends(method: str, **settings: object) -> float:
        return ends_over_middle(planned(wide, seed, method, sparsity=0.95, **settings))

    uniform = score("random")
    return {
        "accuracy": Sample(
            score("snip") - uniform,
            score("global_magnitude", minimum=1) - uniform,
            score("random", seed + 1000) - uniform,
        ),
        "ends": Sample(ends("snip"), ends("global_magnitude", spread="uniform"), ends("random")),
    }


check = Check(CLAIMS, run)
