"""Which weights of one layer stay: by pattern, per output row, per layer, or by Wanda's variant.

O outputs, I inputs of the matrix.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

from secateur.core.budget import Budget
from secateur.core.select import keep_pattern, keep_top


class Compare(StrEnum):
    """Which weights compete with each other."""

    ROW = "row"
    LAYER = "layer"


def choose_in_layer(
    scores: Tensor, budget: Budget, name: str, *, compare: Compare = Compare.ROW, variant: bool = False
) -> Tensor:
    """Keep-mask `[O, I]` of one layer.

    Args:
        scores: `[O, I]`, higher = keep.
        budget: for weights; its pattern goes before everything else.
        name: the layer's, for errors.
        compare: who competes; per row each loses exactly its share, and keeps the budget's floor.
        variant: rows get their own sparsity, see `cumulative_share`.

    Raises:
        BudgetError: the pattern does not divide the inputs.
    """
    rows, columns = scores.shape
    if budget.pattern:
        return keep_pattern(scores, budget.pattern, name)
    if variant:
        return cumulative_share(scores, 1 - budget.keep(scores.numel()) / scores.numel())
    if compare is Compare.LAYER:
        return keep_top(scores.reshape(-1), budget.keep(scores.numel())).view(rows, columns)
    return keep_top(scores, max(budget.keep(columns), min(budget.floor, columns)))


def cumulative_share(scores: Tensor, sparsity: float) -> Tensor:
    """Wanda's variant: a row loses its lowest scores up to a share alpha of the row's total score.

    alpha starts at 0.4 and is bisected within [0, 0.8] until the layer's sparsity is within 0.001 of
    the target or the interval is shorter than 0.001 (the official code's constants).
    """
    if sparsity == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    ordered = scores.sort(dim=1, stable=True).values
    cumulative = ordered.cumsum(1)
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        reached = (cumulative <= alpha * cumulative[:, -1:]).sum(1, keepdim=True)
        threshold = ordered.gather(1, (reached - 1).clamp(min=0))
        keep = scores > threshold
        found = 1 - keep.float().mean().item()
        if abs(found - sparsity) <= 1e-3 or high - low < 1e-3:
            return keep
        low, high = (alpha, high) if found < sparsity else (low, alpha)
        alpha = (low + high) / 2
