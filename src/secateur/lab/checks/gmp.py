"""Gradual magnitude pruning's small-scale check: it holds where a fixed sparse network does not train."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.core.progress import Progress
from secateur.lab.checks._sparse_mlp import miscount, points, trained
from secateur.lab.reproduce import Check, Expectation, Sample

SPARSITY = 0.995

CLAIMS = {
    "over_static": Expectation("accuracy points over a static random mask, MLP at 99.5 %", ">= 60", "both"),
    "exact": Expectation("weights kept too many or too few, against the count after the last event but one", "== 0"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """Baseline: RigL at the same density. Random control: random exchanges (SET); for `exact` a shorter schedule."""
    accuracy, plan = trained(seed, SPARSITY, "gmp", progress)
    static, rigl, exchanged = (points(seed, SPARSITY, method, progress) for method in ("static", "rigl", "set"))
    one_short = int(plan.units()[1] * (1 - SPARSITY + SPARSITY / 15**3))
    return {
        "over_static": Sample(accuracy - static, rigl - static, exchanged - static),
        "exact": Sample(miscount(plan, SPARSITY), 0.0, abs(one_short - plan.units()[0])),
    }


check = Check(CLAIMS, run)
