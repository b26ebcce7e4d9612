"""RigL's small-scale check: where connections grow by gradient, a sparse start finds the weights that matter."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.core.progress import Progress
from secateur.lab.checks._sparse_mlp import miscount, points, trained
from secateur.lab.reproduce import Check, Expectation, Sample

SPARSITY = 0.98

CLAIMS = {
    "over_static": Expectation("accuracy points over the static ERK mask, MLP at 98 %", ">= 40", "both"),
    "exact": Expectation("weights kept too many or too few", "== 0", "baseline"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """Random control: the same exchanges at random places (SET). `exact`'s baseline: a mask drawn weight by weight."""
    accuracy, plan = trained(seed, SPARSITY, "rigl", progress)
    static = points(seed, SPARSITY, "static", progress)
    exchanged = points(seed, SPARSITY, "set", progress)
    drawn = (plan.units()[0] * SPARSITY) ** 0.5  # standard deviation of a count drawn weight by weight
    return {
        "over_static": Sample(accuracy - static, 0.0, exchanged - static),
        "exact": Sample(miscount(plan, SPARSITY), drawn, 0.0),
    }


check = Check(CLAIMS, run)
