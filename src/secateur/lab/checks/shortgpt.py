"""ShortGPT's small-scale check: blocks of low influence are cheap to lose, the one of highest is the dearest.

On the shipped Llama blocks 1 to 3 are nearly tied (influence 0.14, 0.15, 0.25; perplexity 7.4, 6.8,
7.5 without them), so "the lowest is the very cheapest" is decided by chance there: the chosen block is
8.6 % above the cheapest. What the criterion can show is that it avoids the dear ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import torch
from torch import Tensor, nn

from secateur import api
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.units import Site, UnitKind
from secateur.data.dataset import Splits
from secateur.lab.checks._language import llama
from secateur.lab.checks._llama_full import of_blocks
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import perplexity
from secateur.shrink.apply import masked

STACK = "model.layers"
Losses = dict[tuple[int, ...], float]
CLAIMS = {
    "one": Expectation("perplexity lost with the chosen block, as a share of the average block's", "<= 0.25", "both"),
    "two": Expectation("perplexity lost with two chosen blocks, as a share of the average pair's", "<= 0.25", "both"),
    "dearest": Expectation(
        "perplexity lost with the block of highest influence, as a fraction of the dearest block's", ">= 1", "both"
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Baseline: the first blocks; random: the mean over all choices."""
    model, data = llama(seed)
    dense = perplexity(model, data.evaluation).value
    plans = [
        api.plan(model, "shortgpt", sparsity=share, data=data.calibration, keep_scores=True) for share in (0.25, 0.5)
    ]
    influence = plans[0].scores[STACK]
    blocks = len(influence)

    def lost(gone: tuple[int, ...]) -> float:
        return _without(model, data, gone, blocks) - dense

    singles: Losses = {gone: lost(gone) for gone in combinations(range(blocks), 1)}
    pairs: Losses = {gone: lost(gone) for gone in combinations(range(blocks), 2)}
    dearest = max(singles.values())
    mean = sum(singles.values()) / blocks
    return {
        "one": _relative(singles, _gone(plans[0].masks[STACK])),
        "two": _relative(pairs, _gone(plans[1].masks[STACK])),
        "dearest": Sample(singles[int(influence.argmax()),] / dearest, singles[blocks - 1,] / dearest, mean / dearest),
    }


def _relative(losses: Losses, chosen: tuple[int, ...]) -> Sample:
    mean = sum(losses.values()) / len(losses)
    first = losses[min(losses)]
    return Sample(losses[chosen] / mean, first / mean, 1.0)


def _gone(keep: Tensor) -> tuple[int, ...]:
    return tuple(index for index, stays in enumerate(keep.tolist()) if not stays)


def _without(model: nn.Module, data: Splits, gone: tuple[int, ...], blocks: int) -> float:
    keep = torch.ones(blocks, dtype=torch.bool)
    keep[list(gone)] = False
    with masked(model, Plan({STACK: Site(STACK, UnitKind.BLOCK, (blocks,))}, {STACK: keep})):
        return perplexity(model, data.evaluation).value


check = Check(CLAIMS, run, of_blocks("shortgpt"))
