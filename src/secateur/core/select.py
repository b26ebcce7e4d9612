"""Exact selection: which units stay, given one score a unit. Higher score = keep.

Counts are always exact: the k lowest scores go, and among equal scores the ones with the lower
index go first (what a stable ascending sort would do). A threshold alone cannot promise that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from secateur.core.budget import Pattern
from secateur.core.errors import BudgetError, NumericsError


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest value (1-based) of the last dimension, kept as a dimension of size 1."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # NumPy's vectorised selection is several times faster than torch.kthvalue on CPU
        return torch.from_numpy(np.partition(scores.numpy(), k - 1, axis=-1)[..., k - 1 : k].copy())
    return torch.kthvalue(scores, k, dim=-1, keepdim=True).values


def check_scores(scores: Tensor, where: str = "scores") -> Tensor:
    """Refuse NaN, name the place; -0.0 and infinities order well and may pass."""
    if torch.isnan(scores).any():
        raise NumericsError(f"{where}: the importance scores contain NaN; check the weights and calibration data")
    return scores.detach()


def keep_top(scores: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` highest scores along the last dimension.

    Args:
        scores: `[..., n]`; every row is treated on its own.
        keep: how many stay in each row.

    Returns:
        bool `[..., n]`, True = keep, with exactly `keep` True in every row.
    """
    n = scores.shape[-1]
    if not 0 <= keep <= n:
        raise BudgetError(f"cannot keep {keep} of {n} units; the reachable range is 0 to {n}")
    scores = check_scores(scores)
    if keep == n:
        return torch.ones_like(scores, dtype=torch.bool)
    if keep == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    if scores.dtype in (torch.bfloat16, torch.float16):
        scores = scores.float()  # widens exactly
    remove = n - keep
    threshold = _kth_smallest(scores, remove)
    mask = scores > threshold
    if bool((mask.sum(-1) == keep).all()):
        return mask  # nothing above the cut ties with it
    tied = scores == threshold
    missing = remove - (scores < threshold).sum(-1, keepdim=True)  # ties that must go, lowest index first
    return mask | (tied & (tied.cumsum(-1) > missing))


def keep_global(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """One ranking over all sites: the `keep` highest scores of all stay. Ties fall in mapping order.

    The scores are not copied: a sample brackets the threshold, and only what lies inside is sorted out.
    """
    for name, score in scores.items():
        check_scores(score, name)
    total = sum(score.numel() for score in scores.values())
    if not 0 <= keep <= total:
        raise BudgetError(f"cannot keep {keep} of {total} units; the reachable range is 0 to {total}")
    if keep in (0, total):
        return {name: torch.full_like(score, keep > 0, dtype=torch.bool) for name, score in scores.items()}
    # of several dtypes the widest, so that no two different scores become equal
    dtype = reduce(torch.promote_types, (score.dtype for score in scores.values()))
    if dtype in (torch.bfloat16, torch.float16):
        dtype = torch.float32  # widens exactly
    flat = {name: score.detach().reshape(-1) for name, score in scores.items()}
    threshold = _kth_of_all([part for part in flat.values() if part.numel()], total - keep, dtype)
    masks = {name: part.to(dtype) > threshold for name, part in flat.items()}
    missing = keep - sum(int(torch.count_nonzero(mask)) for mask in masks.values())
    if missing:
        _add_ties(masks, lambda name: flat[name].to(dtype) == threshold, missing)
    return {name: mask.view(scores[name].shape) for name, mask in masks.items()}


def _add_ties(masks: Mapping[str, Tensor], tied: Callable[[str], Tensor], missing: int) -> None:
    """Add the last `missing` of the tied units, so that the ones with the lower index go first."""
    for name in reversed(list(masks)):
        places = tied(name).nonzero()[-missing:, 0]
        masks[name][places] = True
        missing -= len(places)
        if not missing:
            return


SAMPLE, CHUNK = 1 << 16, 1 << 22


def _kth_of_all(parts: Sequence[Tensor], k: int, dtype: torch.dtype) -> Tensor:
    """The k-th smallest value (1-based) over all parts, without joining them."""
    total = sum(part.numel() for part in parts)
    if total <= 4 * SAMPLE:
        return _kth_smallest(torch.cat([part.to(dtype) for part in parts]), k)
    step = total // SAMPLE
    sample = torch.cat([part[::step].to(dtype) for part in parts]).sort().values
    place, spread = k / total * len(sample), 8 * len(sample) ** 0.5
    low = sample[int(max(0, place - spread))]
    high = sample[int(min(len(sample) - 1, place + spread))]
    below, inside, at_low, at_high = 0, [], 0, 0
    for chunk in (piece.to(dtype) for part in parts for piece in torch.split(part, CHUNK)):
        below += int(torch.count_nonzero(chunk < low))
        at_low += int(torch.count_nonzero(chunk == low))
        at_high += int(torch.count_nonzero(chunk == high))
        inside.append(chunk[(chunk > low) & (chunk < high)])
    found = torch.cat(inside)
    if not below < k <= below + at_low + len(found) + at_high:  # an order in which a strided sample misleads
        return _kth_smallest(torch.cat([part.to(dtype) for part in parts]), k)
    if k <= below + at_low:
        return low
    rank = k - below - at_low
    return _kth_smallest(found, rank)[0] if rank <= len(found) else high


def keep_pattern(scores: Tensor, pattern: Pattern, where: str = "scores") -> Tensor:
    """N:M: in every group of `pattern.of` consecutive columns the `pattern.keep` highest stay.

    Args:
        scores: `[rows, columns]` in the orientation `[out, in]`.
        pattern: how many stay of how many.
        where: the layer's name, for the error.

    Raises:
        BudgetError: the number of columns is not a multiple of M; the message names `where`.
    """
    rows, columns = scores.shape
    if columns % pattern.of:
        raise BudgetError(
            f"{where}: {columns} inputs do not divide into groups of {pattern.of} for the pattern {pattern}; "
            f"exclude this layer (--exclude '{where}') or choose another pattern"
        )
    grouped = check_scores(scores, where).reshape(rows, columns // pattern.of, pattern.of)
    order = torch.argsort(grouped, dim=-1, stable=True)
    mask = torch.ones_like(grouped, dtype=torch.bool)
    mask.scatter_(-1, order[..., : pattern.of - pattern.keep], False)
    return mask.view(rows, columns)
