"""Scores of whole blocks from the hidden state before and after them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn import functional as F


def cosine(before: Tensor, after: Tensor) -> Tensor:
    """Cosine of every token's hidden state before and after, `[tokens]`.

    A zero vector has no direction; its cosine counts 0.5 as in ShortGPT.
    """
    a, b = before.flatten(0, -2).double(), after.flatten(0, -2).double()
    value = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))
    return torch.where(value.isnan(), torch.full_like(value, 0.5), value)


def angular(before: Tensor, after: Tensor) -> Tensor:
    """arccos(cosine) / pi for every row, `[rows]`, in [0, 1] (Gromov et al. 2024)."""
    value = F.cosine_similarity(before.double(), after.double(), dim=-1, eps=0.0)
    return torch.arccos(torch.nan_to_num(value, nan=0.5).clamp(-1, 1)) / torch.pi


class Influence(StrEnum):
    """How far a block moves a hidden state."""

    ANGULAR = "angular"
    COSINE = "cosine"
    MSE = "mse"
    MAE = "mae"
    UNIFORM = "uniform"  # the same for every block


def influence(before: Tensor, after: Tensor, how: Influence) -> Tensor:
    """What a block does to every token, `[tokens]` float64: 0 where it does nothing, larger = it does more.

    Args:
        before: `[..., features]`, the hidden state that enters the block.
        after: the same shape, the one that leaves it.
        how: angle / pi, 1 - cosine, mean squared or mean absolute difference over the features, or 1.
    """
    match how:
        case Influence.ANGULAR:
            return angular(before, after).flatten()
        case Influence.COSINE:
            return 1 - cosine(before, after)
        case Influence.UNIFORM:
            return torch.ones(before.shape[:-1], dtype=torch.float64, device=before.device).flatten()
        case _:
            change = (after.double() - before.double()).flatten(0, -2)
            return change.square().mean(-1) if how is Influence.MSE else change.abs().mean(-1)


class Aggregate(StrEnum):
    """How the scores of a block's weights become one."""

    SUM = "sum"
    MEAN = "mean"


def of_blocks(scores: Mapping[str, Tensor], blocks: Sequence[str], how: Aggregate) -> Tensor:
    """One score for every block from those of its weights, `[blocks]` float64, signs kept.

    Args:
        scores: parameter name -> a score for each of its weights.
        blocks: qualified names; a block without a scored weight gets 0.
        how: the sum over its weights, or their mean.
    """
    found = torch.zeros(len(blocks), dtype=torch.float64)
    for index, block in enumerate(blocks):
        own = [score for name, score in scores.items() if name.startswith(f"{block}.")]
        weights = sum(score.numel() for score in own) if how is Aggregate.MEAN else 1
        found[index] = sum(float(score.double().sum()) for score in own) / max(1, weights)
    return found
