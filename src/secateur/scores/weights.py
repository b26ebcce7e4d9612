"""Scores of single weights. O outputs, I inputs of the matrix; any leading shape where not said."""

from __future__ import annotations

import torch
from torch import Tensor


def magnitude(weight: Tensor) -> Tensor:
    """|W|, float32 (float64 stays)."""
    return weight.abs() if weight.dtype is torch.float64 else weight.float().abs()


def uniform_random(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Independent draws from [0, 1): the control that every criterion must beat."""
    return torch.rand(shape, generator=rng)


def wanda(weight: Tensor, second_moment: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2 (Sun et al. 2023, equation 1).

    Args:
        weight: `[O, I]`.
        second_moment: `[I]`, sum of squares of each input feature up to one common factor.

    Returns:
        `[O, I]` float32. No division anywhere, so a dead feature scores exactly 0.
    """
    return magnitude(weight) * second_moment.sqrt().to(weight.device)


def taylor(weight: Tensor, gradient: Tensor) -> Tensor:
    """|w * dL/dw|: the first-order change of the loss when w is removed (Molchanov et al. 2019, eq. 8)."""
    return (weight.float() * gradient.float()).abs()
