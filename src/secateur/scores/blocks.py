"""Scores of whole blocks from the hidden state before and after them."""

from __future__ import annotations

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
