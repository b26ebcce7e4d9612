"""Learnable thresholds: soft ones, and binary steps whose gradient is a surrogate.

The step 1[z > 0] has no gradient, so its backward pass uses the slope of something smooth. A narrow slope is dead where
scores lie far from the threshold: nothing is ever pruned and nothing says so. The long-tailed slope of Liu et al.
2020 (dynamic sparse training) stays above zero within its reach.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import ModelError
from secateur.gates.binary import through
from secateur.gates.checks import refuse_nan
from secateur.gates.freeze import Frozen, freeze_above, keep_above

Slope = Callable[[Tensor], Tensor]
"""Of z = score - threshold: what stands for the derivative of the step at z, same shape."""


@dataclass(frozen=True)
class LongTail:
    """2 - 4|z| up to |z| = 0.4, then 0.4 up to `reach`, then 0 (Liu et al. 2020: reach 1)."""

    reach: float = 1.0

    def __call__(self, z: Tensor) -> Tensor:
        """The slope at z, same shape."""
        distance = z.abs()
        return torch.where(distance <= 0.4, 2 - 4 * distance, 0.4 * (distance <= self.reach).to(z.dtype))


@dataclass(frozen=True)
class SigmoidSlope:
    """The derivative of sigmoid(sharpness * z); about 0 beyond |z| = 10 / sharpness."""

    sharpness: float = 1.0

    def __call__(self, z: Tensor) -> Tensor:
        """The slope at z, same shape."""
        s = torch.sigmoid(self.sharpness * z)
        return self.sharpness * s * (1 - s)


def step_gate(scores: Tensor, threshold: Tensor, slope: Slope | None = None, minimum: int = 0) -> Tensor:
    """1[score > threshold] with a surrogate gradient to the scores and, with the other sign, to the threshold.

    Detach the scores where only the threshold may learn: a budget loss would otherwise shrink all of them.

    Args:
        scores: any shape, higher = keep.
        threshold: broadcasts against the scores; usually a scalar per layer.
        slope: the surrogate; the long-tailed one when left out.
        minimum: so many gates are open in any case (the highest), with their surrogate gradient.

    Returns:
        0 and 1 in the shape of `scores`.

    Raises:
        BudgetError: `minimum` is larger than the number of gates.
        NumericsError: scores or threshold are NaN.
    """
    z = scores - threshold
    return through(keep_above(scores, threshold, minimum), z, (slope or LongTail())(z.detach()))


def soft_threshold(weight: Tensor, threshold: Tensor) -> Tensor:
    """sign(w) relu(|w| - threshold) (Kusupati et al. 2020, STR).

    Gradients by ordinary differentiation: a kept weight gets its own, the threshold gets -sign(w) from every kept
    weight. STR learns s with threshold = sigmoid(s), which keeps it positive.

    Args:
        weight: any shape.
        threshold: broadcasts against it, in the weight's units, not negative.

    Raises:
        ModelError: a threshold is negative, which would make weights larger.
        NumericsError: weight or threshold are NaN.
    """
    refuse_nan(weight, "weight")
    if bool((refuse_nan(threshold, "threshold") < 0).any()):
        raise ModelError(f"the soft threshold is {float(threshold.min()):g}; map it to positive numbers, sigmoid(s)")
    return weight.sign() * torch.relu(weight.abs() - threshold)


def frozen(scores: Tensor, threshold: Tensor, minimum: int = 0) -> Frozen:
    """The final mask of a learned threshold (of a soft one: pass |w| as the scores).

    Nothing was sampled: the share before is that of the step without the minimum.
    """
    before = (scores > threshold).detach()
    return freeze_above(scores, threshold, before, minimum)
