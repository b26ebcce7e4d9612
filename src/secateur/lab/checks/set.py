"""SET's small-scale check: random exchanges beat the same random mask left as it is."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.core.progress import Progress
from secateur.lab.checks._sparse_mlp import points
from secateur.lab.reproduce import Check, Expectation, Sample

SPARSITY = 0.95

CLAIMS = {
    "over_static": Expectation("accuracy points over the static ERK mask, MLP at 95 %", ">= 1", "both"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """Baseline: static with uniform densities. Random control: a static mask and network of another seed."""
    static = points(seed, SPARSITY, "static", progress)
    uniform = points(seed, SPARSITY, "static", progress, spread="uniform")
    other = points(seed + 1000, SPARSITY, "static", progress)
    value = points(seed, SPARSITY, "set", progress) - static
    return {"over_static": Sample(value, uniform - static, other - static)}


check = Check(CLAIMS, run)
