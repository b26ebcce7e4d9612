"""The random control's own check: independent masks, exact counts, and clearly worse than magnitude."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from secateur.core.progress import Progress
from secateur.data.dataset import Splits
from secateur.lab.checks._language import blocks_plan, llama, magnitude, pruned_perplexity
from secateur.lab.reproduce import Check, Expectation, Sample

CLAIMS = {
    "independent": Expectation(
        "share of kept weights that another seed keeps too, minus the density 0.5", "<= 0.005", control="baseline"
    ),
    "worse": Expectation(
        "perplexity at 50 %, as a multiple of layer-wise magnitude's (a control that a criterion can beat)",
        ">= 2",
        control="baseline",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """Both claims under one seed. Baseline: magnitude, whose masks do not depend on the seed."""
    model, data = llama(seed)
    reference = magnitude(model, data, seed, sparsity=0.5)
    found = pruned_perplexity(model, data, seed, "random", sparsity=0.5) / reference
    again = pruned_perplexity(model, data, seed + 1000, "random", sparsity=0.5) / reference
    shared = overlap(model, data, seed, "random")
    return {
        "independent": Sample(
            abs(shared - 0.5), abs(overlap(model, data, seed, "global_magnitude") - 0.5), abs(shared - 0.5)
        ),
        "worse": Sample(found, 1.0, again),
    }


def overlap(model: nn.Module, data: Splits, seed: int, method: str) -> float:
    """Share of the weights kept under one seed that another seed keeps as well."""
    first = blocks_plan(model, data, seed, method, sparsity=0.5)
    second = blocks_plan(model, data, seed + 1000, method, sparsity=0.5)
    both: int = sum(row["both"] for row in first.diff(second))
    return both / first.units()[0]


check = Check(CLAIMS, run)
