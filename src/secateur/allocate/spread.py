"""From scores and a budget to masks, for methods that score all weights before choosing any."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from enum import StrEnum

import torch
from torch import Tensor

from secateur.allocate import ratios
from secateur.allocate.counts import largest_remainder, with_floor
from secateur.core.budget import Budget, Quantity
from secateur.core.progress import Progress, track
from secateur.core.select import count_true, keep_global, keep_pattern, keep_top
from secateur.core.units import Site
from secateur.structure.layers import from_matrix, to_matrix


class Spread(StrEnum):
    """How the sparsity is spread over the layers."""

    GLOBAL = "global"
    UNIFORM = "uniform"
    ERK = "erk"
    ER = "er"
    UNIFORM_PLUS = "uniform_plus"
    ERK_PLUS = "erk_plus"


def shares(spread: Spread, shapes: ratios.Shapes, total: float, ends: ratios.Ends = ratios.PLAIN) -> ratios.Shares:
    """How many weights each layer keeps, as real numbers that add up to `total`.

    `GLOBAL` has no shares of its own; before scores are known each layer can expect the same density.

    Raises:
        BudgetError: a plus variant's fixed layers do not go with the total.
    """
    match spread:
        case Spread.ER:
            return ratios.er(shapes, total, ends.power)
        case Spread.ERK:
            return ratios.erk(shapes, total, ends.power)
        case Spread.UNIFORM_PLUS:
            return ratios.uniform_plus(shapes, total, ends)
        case Spread.ERK_PLUS:
            return ratios.erk_plus(shapes, total, ends)
        case _:
            return ratios.uniform(shapes, total)


def choose(
    scores: Mapping[str, Tensor],
    sites: Mapping[str, Site],
    budget: Budget,
    spread: Spread,
    ends: ratios.Ends = ratios.PLAIN,
) -> dict[str, Tensor]:
    """Keep-masks with an exact total, a floor per site if the budget has one, or an N:M pattern.

    Args:
        scores: site -> scores of the site's shape, higher = keep.
        sites: the sites, in the same order.
        budget: total over all sites.
        spread: where the total goes; without effect for a pattern, which fixes every row.
        ends: exponent, and the layers that the plus variants treat apart.

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
        return keep_floored(scores, total, budget.floor)
    shapes = {name: site.shape for name, site in sites.items()}
    counts = largest_remainder(shares(spread, shapes, total, ends), total, sizes)
    return keep_counts(scores, with_floor(counts, sizes, budget.floor))


def keep_floored(scores: Mapping[str, Tensor], keep: int, floor: int) -> dict[str, Tensor]:
    """One ranking over all sites, in which each keeps at least `floor`, or all that it has.

    Raises:
        BudgetError: the floors keep more than `keep`.
    """
    masks = keep_global(scores, keep)
    counts = {name: count_true(mask) for name, mask in masks.items()}
    floored = with_floor(counts, {name: score.numel() for name, score in scores.items()}, floor)
    return masks if floored == counts else keep_counts(scores, floored)


def choose_in_rounds(
    score: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]],
    sites: Mapping[str, Site],
    budget: Budget,
    rounds: int,
    progress: Progress,
) -> tuple[dict[str, Tensor], Mapping[str, Tensor]]:
    """One global ranking after another: round k of n keeps the share density ** (k / n), scores are made anew.

    The last round's total is the budget's, exactly; what went in one round does not come back.

    Args:
        score: keep-masks -> scores of the network under these masks, higher = keep.
        sites: the sites, in the order in which ties fall.
        budget: total over all sites; its floor holds in every round.
        rounds: n; 1 is one-shot.
        progress: receives progress.

    Returns:
        The masks, and the scores that the last round chose by.
    """
    everything = sum(site.units for site in sites.values())
    total = budget.keep(everything)
    masks = {name: torch.ones(site.shape, dtype=torch.bool) for name, site in sites.items()}
    scores: Mapping[str, Tensor] = {}
    for number in track(range(1, rounds + 1), progress, "pruning rounds"):
        keep = total if number == rounds else max(total, int(everything * (total / everything) ** (number / rounds)))
        scores = score(masks)
        alive = {name: value.masked_fill(~masks[name].to(value.device), -torch.inf) for name, value in scores.items()}
        masks = choose(alive, sites, replace(budget, amount=keep, quantity=Quantity.UNITS), Spread.GLOBAL)
    return masks, scores


def keep_counts(scores: Mapping[str, Tensor], counts: Mapping[str, int]) -> dict[str, Tensor]:
    """In every site the given number of highest scores stay."""
    return {name: keep_top(score.reshape(-1), counts[name]).view(score.shape) for name, score in scores.items()}
