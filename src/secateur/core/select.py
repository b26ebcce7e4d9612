"""Exact selection: which units stay, given one score a unit. Higher score = keep.

Counts are always exact: the k lowest scores go, and among equal scores the ones with the lower
index go first (what a stable ascending sort would do). A threshold alone cannot promise that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import reduce

import numpy as np
import torch
from torch import Tensor

from secateur.core.budget import Pattern
from secateur.core.errors import BudgetError, NumericsError

NUMPY = (torch.float32, torch.float64)  # where NumPy's vectorised kernels beat torch's on CPU


def count_true(mask: Tensor) -> int:
    """How many entries are True."""
    if mask.device.type == "cpu":
        return int(np.count_nonzero(mask.numpy()))  # several times faster than torch's sum of booleans on CPU
    return int(torch.count_nonzero(mask))


def places(mask: Tensor) -> Tensor:
    """Indices of the True entries of the flattened mask, ascending, int64."""
    if mask.device.type == "cpu":
        return torch.from_numpy(mask.numpy().reshape(-1).nonzero()[0])
    return mask.flatten().nonzero().squeeze(1)


def _above(one: Tensor, other: Tensor) -> Tensor:
    """`one > other`."""
    if one.device.type == "cpu" and one.dtype in NUMPY:
        return torch.from_numpy(np.greater(one.numpy(), other.numpy()))
    return one > other


def any_nan(tensor: Tensor) -> bool:
    """Whether there is a NaN; one pass that only adds up, and a second one only where infinities may have made one."""
    return bool(tensor.sum().isnan()) and bool(tensor.isnan().any())


def all_finite(tensor: Tensor) -> bool:
    """Whether nothing is NaN or infinite; a second pass only where the sum may have overflown."""
    wide = torch.float32 if tensor.is_floating_point() and tensor.itemsize < 4 else None
    return bool(tensor.sum(dtype=wide).isfinite()) or bool(tensor.isfinite().all())


LONG, STRIDE = 1 << 15, 16  # from when on a sample pays, and which part of the scores it is


def _kth_smallest(scores: Tensor, k: int) -> Tensor:
    """The k-th smallest value (1-based) of the last dimension, kept as a dimension of size 1."""
    if scores.device.type == "cpu" and scores.dtype in NUMPY:
        # NumPy's vectorised selection is several times faster than torch.kthvalue on CPU
        return torch.from_numpy(np.partition(scores.numpy(), k - 1, axis=-1)[..., k - 1 : k].copy())
    return torch.kthvalue(scores, k, dim=-1, keepdim=True).values


def check_scores(scores: Tensor, where: str = "scores") -> Tensor:
    """Refuse NaN, name the place; -0.0 and infinities order well and may pass."""
    if any_nan(scores):
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
    if scores.dim() == 1 and n > LONG and keep < n // 8:
        return _few_highest(scores, keep)
    remove = n - keep
    threshold = _kth_smallest(scores, remove)
    mask = _above(scores, threshold)
    rows = mask.numel() // n
    # no row keeps more than it may, so the total tells whether each has its number
    if count_true(mask) == rows * keep:
        return mask  # nothing above the cut ties with it
    tied = scores == threshold
    missing = remove - (scores < threshold).sum(-1, keepdim=True)  # ties that must go, lowest index first
    return mask | (tied & (tied.cumsum(-1) > missing))


def _few_highest(scores: Tensor, keep: int) -> Tensor:
    """The same, where few of many stay: only those above what a sample promises are ranked."""
    sample = scores[::STRIDE]
    expected = keep / STRIDE
    rank = min(len(sample), int(expected + 4 * expected**0.5 + 4))
    candidates = places(~_above(_kth_smallest(sample, len(sample) - rank + 1), scores))
    if not keep <= len(candidates) < len(scores):  # an order in which a strided sample misleads, or equal scores
        candidates = torch.arange(len(scores), device=scores.device)
    chosen = scores.index_select(0, candidates)
    threshold = _kth_smallest(chosen, len(chosen) - keep + 1)
    above = candidates.index_select(0, places(_above(chosen, threshold)))
    ties = candidates.index_select(0, places(chosen == threshold))
    mask = torch.zeros_like(scores, dtype=torch.bool)
    mask.index_fill_(0, above, True)
    return mask.index_fill_(0, ties[len(ties) - (keep - len(above)) :], True)


def keep_global(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """One ranking over all sites: the `keep` highest scores of all stay. Ties fall in mapping order.

    The scores are not copied: a sample brackets the threshold, and only what lies inside is sorted out.
    """
    total = sum(score.numel() for score in scores.values())
    if not 0 <= keep <= total:
        raise BudgetError(f"cannot keep {keep} of {total} units; the reachable range is 0 to {total}")
    if total <= FEW and len({score.device for score in scores.values()}) == 1:
        return _keep_joined(scores, keep)
    for name, score in scores.items():
        check_scores(score, name)
    if keep in (0, total):
        return {name: torch.full_like(score, keep > 0, dtype=torch.bool) for name, score in scores.items()}
    dtype = _widest(scores)
    flat = {name: score.detach().reshape(-1) for name, score in scores.items()}
    threshold = _kth_of_all([part for part in flat.values() if part.numel()], total - keep, dtype)
    masks = {name: _above(part.to(dtype), threshold) for name, part in flat.items()}
    missing = keep - sum(map(count_true, masks.values()))
    if missing:
        _add_ties(masks, lambda name: flat[name].to(dtype) == threshold, missing)
    return {name: mask.view(scores[name].shape) for name, mask in masks.items()}


def _widest(scores: Mapping[str, Tensor]) -> torch.dtype:
    """Of several dtypes the widest, so that no two different scores become equal."""
    dtype = reduce(torch.promote_types, (score.dtype for score in scores.values()))
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype  # widens exactly


def _keep_joined(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """The same for few scores: one tensor instead of many."""
    dtype = _widest(scores)
    joined = torch.cat([score.detach().reshape(-1).to(dtype) for score in scores.values()])
    if any_nan(joined):
        for name, score in scores.items():
            check_scores(score, name)
    parts = torch.split(keep_top(joined, keep), [score.numel() for score in scores.values()])
    return {name: part.view(scores[name].shape) for name, part in zip(scores, parts, strict=True)}


def _add_ties(masks: Mapping[str, Tensor], tied: Callable[[str], Tensor], missing: int) -> None:
    """Add the last `missing` of the tied units, so that the ones with the lower index go first."""
    for name in reversed(list(masks)):
        last = places(tied(name))[-missing:]
        masks[name][last] = True
        missing -= len(last)
        if not missing:
            return


SAMPLE, CHUNK = 1 << 16, 1 << 22  # scores that bracket the threshold; that are looked at at once
FEW = 4 * SAMPLE  # up to which everything is joined


def _kth_of_all(parts: Sequence[Tensor], k: int, dtype: torch.dtype) -> Tensor:
    """The k-th smallest value (1-based) over all parts, without joining them."""
    total = sum(part.numel() for part in parts)
    step = max(1, total // SAMPLE)
    sample = _sorted(torch.cat([part[::step].to(dtype) for part in parts]))
    place, spread = k / total * len(sample), 8 * len(sample) ** 0.5
    low = sample[int(max(0, place - spread))]
    high = sample[int(min(len(sample) - 1, place + spread))]

    def chunks() -> Iterator[Tensor]:
        return (piece.to(dtype) for part in parts for piece in torch.split(part, CHUNK))

    up_to_low, inside = 0, []
    for chunk in chunks():
        over = _above(chunk, low)
        up_to_low += chunk.numel() - count_true(over)
        inside.append(chunk[places(over & _above(high, chunk))])
    found = torch.cat(inside)
    rank = k - up_to_low
    if 0 < rank <= len(found):
        return _kth_smallest(found, rank)[0]
    # many scores are equal to an end of the bracket, or their order misled the strided sample
    if rank <= 0 and sum(count_true(_above(low, chunk)) for chunk in chunks()) < k:
        return low
    if 0 < rank - len(found) <= sum(count_true(chunk == high) for chunk in chunks() if bool(low < high)):
        return high
    return _kth_smallest(torch.cat([part.to(dtype) for part in parts]), k)


def _sorted(values: Tensor) -> Tensor:
    """Ascending."""
    if values.device.type == "cpu" and values.dtype in NUMPY:
        return torch.from_numpy(np.sort(values.numpy()))
    return values.sort().values


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
