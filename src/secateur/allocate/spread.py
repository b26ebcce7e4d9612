"""From scores and a budget to masks, for methods that score all weights before choosing any."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

from torch import Tensor

from secateur.allocate.counts import erk, uniform, with_floor
from secateur.core.budget import Budget
from secateur.core.select import keep_global, keep_pattern, keep_top
from secateur.core.units import Site
from secateur.structure.layers import from_matrix, to_matrix


class Spread(StrEnum):
    """How the sparsity is spread over the layers."""

    GLOBAL = "global"
    UNIFORM = "uniform"
    ERK = "erk"


def choose(
    scores: Mapping[str, Tensor], sites: Mapping[str, Site], budget: Budget, spread: Spread
) -> dict[str, Tensor]:
    """Keep-masks with an exact total, a floor per site if the budget has one, or an N:M pattern.

    Args:
        scores: site -> scores of the site's shape, higher = keep.
        sites: the sites, in the same order.
        budget: total over all sites.
        spread: where the total goes; without effect for a pattern, which fixes every row.

    Raises:
        BudgetError: the budget, the floor or the pattern cannot be met.
    """
    if budget.pattern:
        return {
            name: from_matrix(keep_pattern(to_matrix(score, sites[name].layout), budget.pattern, name), sites[name])
            for name, score in scores.items()
        }
    sizes = {name: site.units for name, site in sites.items()}
    total = budget.keep(sum(sizes.values()))
    if spread is Spread.GLOBAL:
        masks = keep_global(scores, total)
        counts = {name: int(mask.sum()) for name, mask in masks.items()}
        floored = with_floor(counts, sizes, budget.floor)
        if floored == counts:
            return masks
        return keep_counts(scores, floored)
    shapes = {name: site.shape for name, site in sites.items()}
    counts = uniform(sizes, total) if spread is Spread.UNIFORM else erk(shapes, total)
    return keep_counts(scores, with_floor(counts, sizes, budget.floor))


def keep_counts(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """In every site the given number of highest scores stay."""
    return {name: keep_top(score.reshape(-1), counts[name]).view(score.shape) for name, score in scores.items()}
