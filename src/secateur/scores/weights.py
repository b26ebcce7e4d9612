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


def lamp(weight: Tensor) -> Tensor:
    """LAMP: w_u^2 / sum of w_v^2 over the layer's v with w_v^2 >= w_u^2 (Lee et al. 2021, equation 3).

    One ranking of all layers by this score gives every layer its sparsity; inside a layer the order is that
    of the magnitudes. Equal magnitudes score equally, zeros score 0.

    Args:
        weight: one layer's, any shape.

    Returns:
        The weight's shape, float64: scores of large layers are too small and too close for float32.
    """
    squares = weight.double().square().flatten()
    ordered = squares.sort().values
    above = ordered.flip(0).cumsum(0).flip(0)  # sum of the squares from this rank on
    sums = above[torch.searchsorted(ordered, squares)]  # from the first of equal ones on
    return torch.where(squares > 0, squares / sums, 0.0).view(weight.shape)
