"""Static sparse training's small-scale check: layer densities decide, positions hardly matter."""

from __future__ import annotations

from collections.abc import Mapping

from secateur.core.progress import Progress
from secateur.lab.checks._sparse_mlp import points
from secateur.lab.reproduce import Check, Expectation, Sample

SPARSITY = 0.95

CLAIMS = {
    "densities": Expectation("accuracy points of ERK over uniform densities, MLP at 95 %", ">= 6", "both"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """Baseline: uniform itself. Random control: uniform densities with other positions and another start."""
    uniform = points(seed, SPARSITY, "static", progress, spread="uniform")
    other = points(seed + 1000, SPARSITY, "static", progress, spread="uniform")
    return {"densities": Sample(points(seed, SPARSITY, "static", progress) - uniform, 0.0, other - uniform)}


check = Check(CLAIMS, run)
