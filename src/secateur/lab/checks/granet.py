"""GraNet's small-scale check: one dense-to-sparse run as good as gradual pruning, far above fixed-density training."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.core.progress import Progress
from secateur.lab.checks._cifar import comparison
from secateur.lab.checks._sparse_mlp import EVERY, STEPS, miscount, points, trained
from secateur.lab.reproduce import Check, Expectation, Sample

SPARSITY = 0.995

CLAIMS = {
    "dense_start": Expectation("accuracy points over GMP, from a dense start, MLP at 99.5 %", ">= -0.5"),
    "over_rigl": Expectation("accuracy points over RigL, from density 0.5, same network", ">= 30", "both"),
    "over_static": Expectation("accuracy points over a static random mask, from density 0.5", ">= 60", "both"),
    "exact": Expectation("weights kept too many or too few over both starts", "== 0", "baseline"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Random controls: random growth instead of gradients, random exchanges (SET)."""
    dense, plan = trained(seed, SPARSITY, "granet", progress)
    half, other = trained(seed, SPARSITY, "granet", progress, initial_density=0.5)
    random = points(seed, SPARSITY, "granet", progress, growth="random")
    gmp, rigl, static, exchanged = (
        points(seed, SPARSITY, method, progress) for method in ("gmp", "rigl", "static", "set")
    )
    released = abs(stopped_early(plan.units()[1]) - plan.units()[0])
    return {
        "dense_start": Sample(dense - gmp, static - gmp, random - gmp),
        "over_rigl": Sample(half - rigl, 0.0, exchanged - rigl),
        "over_static": Sample(half - static, rigl - static, exchanged - static),
        "exact": Sample(miscount(plan, SPARSITY) + miscount(other, SPARSITY), released, 0.0),
    }


def stopped_early(total: int) -> int:
    """What the released code keeps: its last event is one short of the end, and it keeps one weight fewer."""
    events = STEPS // 2 // EVERY
    density = 1 - SPARSITY + SPARSITY * events**-3.0
    return int(total * density) - 1


check = Check(CLAIMS, run, comparison("granet"))
