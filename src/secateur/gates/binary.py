"""Binary gates with straight-through gradients (Bengio et al. 2013, arXiv 1308.3432).

Forward exactly 0 or 1, backward the identity. The usual form `hard - soft.detach() + soft` leaves rounding errors
in the forward value (0.99999994 for 1), so that masked and cut networks differ; here the forward value is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.core.select import keep_global, keep_top
from secateur.gates.checks import refuse_nan


class _Through(torch.autograd.Function):
    """Value of one tensor, gradient to another, times a slope if there is one."""

    @staticmethod
    def forward(ctx: Any, soft: Tensor, hard: Tensor, slope: Tensor | None) -> Tensor:
        ctx.save_for_backward(slope)
        return hard

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (grads[0] if slope is None else grads[0] * slope), None, None


def through(hard: Tensor, soft: Tensor, slope: Tensor | None = None) -> Tensor:
    """Forward `hard`, backward `d/d soft = slope` (1 where none is given).

    Args:
        hard: the forward value, bool or number, the shape of `soft`.
        soft: what receives the gradient.
        slope: same shape; factor of the gradient.

    Returns:
        `hard` in the dtype of `soft`.
    """
    value = hard.detach().to(soft.dtype, copy=True)
    return cast(Tensor, _Through.apply(soft, value, slope))  # type: ignore[no-untyped-call]


def binary_gate(p: Tensor, threshold: float = 0.5) -> Tensor:
    """1[p > threshold] with dg/dp := 1.

    Args:
        p: any shape, usually probabilities.
        threshold: a value equal to it is closed.

    Returns:
        0 and 1 in the shape and dtype of `p`.

    Raises:
        NumericsError: `p` contains NaN.
    """
    return through(refuse_nan(p, "gate") > threshold, p)


def top_gate(scores: Tensor, keep: int) -> Tensor:
    """The `keep` highest of the last dimension open, exactly, with the identity as gradient.

    Every score receives the gradient of its gate, closed ones too, so that a closed unit can come back.

    Args:
        scores: `[..., n]`, every row on its own, higher = keep.
        keep: open gates per row.

    Raises:
        BudgetError: `keep` is not within 0 and n.
        NumericsError: a score is NaN.
    """
    refuse_nan(scores, "scores")
    return through(keep_top(scores, keep), scores)


def top_gates(scores: Mapping[str, Tensor], keep: int) -> dict[str, Tensor]:
    """The same with one ranking over several tensors: `keep` open gates in all of them together."""
    for name, score in scores.items():
        refuse_nan(score, name)
    return {name: through(mask, scores[name]) for name, mask in keep_global(scores, keep).items()}


def scores_from(weight: Tensor) -> nn.Parameter:
    """Trainable scores that start as a copy of a weight, in memory of their own."""
    return nn.Parameter(weight.detach().clone())
