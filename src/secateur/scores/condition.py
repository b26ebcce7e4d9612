"""How sensitive a layer's output is to single inputs: condition numbers (reconstruction of COMP, Xu et al. 2025).

With Y = sum over j of z_j X_j W_j^T the relative condition number of Y with respect to z_j at z = 1 is

    kappa_j = ||X_j|| ||W_j|| / ||Y||_F                       (`mask`)

the largest relative change of the output per relative change of input j. The classical bound for a perturbed input,
||dY|| / ||Y|| <= kappa_2(W) ||dX|| / ||X||, with dX = input j gives kappa_2(W) ||X_j|| / ||X||_F (`spectral`).
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

SMALLEST = 1e-6  # of the largest singular value


class Condition(StrEnum):
    """Which condition number."""

    MASK = "mask"
    SPECTRAL = "spectral"


def conditions(weight: Tensor, squares: Tensor, energy: Tensor, how: Condition) -> Tensor:
    """One condition number per input, `[I]` float64; 0 where nothing comes in or goes out.

    Args:
        weight: `[O, I]`.
        squares: ||X_j||^2 over all rows, `[I]`.
        energy: ||Y||_F^2, a scalar.
        how: which one.
    """
    W, squares = weight.double(), squares.double()
    if how is Condition.MASK:
        return (squares * W.square().sum(0) / energy.double().clamp_min(1e-300)).sqrt()
    values = torch.linalg.svdvals(W)
    number: Tensor = values[0] / torch.maximum(values[-1], SMALLEST * values[0]).clamp_min(1e-300)
    return number * (squares / squares.sum().clamp_min(1e-300)).sqrt()


def of_units(numbers: Tensor, width: int) -> Tensor:
    """From `[units * width]` to `[units]`: the root of the sum of squares over a unit's inputs."""
    return numbers.view(-1, width).square().sum(1).sqrt()
