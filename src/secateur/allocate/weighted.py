"""Common rankings of units that do not weigh the same: how many of each site stay (FLAP, An et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from secateur.allocate.structured import Counts
from secateur.core.select import check_scores, keep_global, keep_top


def _protected(scores: Mapping[str, Tensor], least: Mapping[str, int]) -> dict[str, Tensor]:
    """Scores in float64 with the best units of every site at infinity."""
    found = {}
    for name, score in scores.items():
        best = keep_top(check_scores(score, name), least[name])
        found[name] = score.double().masked_fill(best, torch.inf).cpu()
    return found


def weighted_counts(
    scores: Mapping[str, Tensor], weights: Mapping[str, float], density: float, least: Mapping[str, int]
) -> Counts:
    """Kept units of every site by one common threshold.

    All units are lined up by falling score, and their weights are added up. The score of the unit at which the
    sum comes nearest to `density` times the whole weight is the threshold, and only units above it stay; so the kept
    weight is within one unit of what was asked for. Equal scores are told apart as `core.select` does.

    Args:
        scores: site -> `[units]`, comparable between sites.
        weights: site -> weight of one of its units.
        density: share of the whole weight that stays; at 1 everything does.
        least: site -> units that stay in any case; its best ones.
    """
    names = list(scores)
    if density >= 1 or not names:
        return {name: len(scores[name]) for name in names}
    ranked = _protected(scores, least)
    order = np.argsort(torch.cat(list(ranked.values())).numpy(), kind="stable")[::-1]
    owners = np.repeat(np.arange(len(names)), [len(score) for score in ranked.values()])[order]
    sums = np.cumsum(np.array([weights[name] for name in names], dtype=np.float64)[owners])
    nearest = int(np.abs(sums - density * sums[-1]).argmin())
    counts = np.bincount(owners[: max(nearest, sum(least[name] for name in names))], minlength=len(names))
    return {name: int(count) for name, count in zip(names, counts, strict=True)}


def lowest_gone(scores: Mapping[str, Tensor], remove: int, least: Mapping[str, int]) -> Counts:
    """Kept units of every site when so many of the lowest of all units go; the best ones of every site stay."""
    units = sum(len(score) for score in scores.values())
    if not scores or remove <= 0:
        return {name: len(score) for name, score in scores.items()}
    keep = max(units - remove, sum(least[name] for name in scores))
    return {name: int(mask.sum()) for name, mask in keep_global(_protected(scores, least), keep).items()}


def evenly_gone(scores: Mapping[str, Tensor], remove: int, least: Mapping[str, int]) -> Counts:
    """Kept units when every site loses the same number, in all not more than `remove`."""
    each = max(0, remove) // max(1, len(scores))
    return {name: max(least[name], len(score) - each) for name, score in scores.items()}
