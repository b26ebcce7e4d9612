"""Losses that drive learned gates to a budget: Lagrange multipliers, ratio, hinge.

Feed them hard gates (straight-through) or closed-form expectations. With soft gates the budget looks met and the frozen
network is larger.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.core.errors import BudgetError, ModelError
from secateur.gates.checks import refuse_nan


def open_share(gates: Tensor, costs: Tensor | None = None) -> Tensor:
    """sum(costs * gates) / sum(costs), differentiable: the share of the cost that is kept.

    Args:
        gates: values or open probabilities in [0, 1], any shape.
        costs: same shape, not negative (parameters or FLOPs of each unit); equal when left out.

    Raises:
        BudgetError: a cost is negative or not finite, or all are 0.
        ModelError: costs of another shape.
        NumericsError: a gate is NaN.
    """
    gates = refuse_nan(gates, "gates")
    if costs is None:
        return gates.mean()
    if costs.shape != gates.shape:
        raise ModelError(f"the costs have shape {list(costs.shape)}, the gates {list(gates.shape)}; give one per gate")
    if not bool((torch.isfinite(costs) & (costs >= 0)).all()) or not bool(costs.any()):
        raise BudgetError("the costs of gated units must be finite, not negative and not all 0")
    costs = costs.to(gates.device)
    # counts of FLOPs exceed what float32 adds exactly, so the shares are made in float64
    return (gates * (costs.double() / costs.double().sum()).to(gates.dtype)).sum()


class Lagrangian(nn.Module):
    """lambda_1 (s - t) + lambda_2 (s - t)^2 with multipliers that climb (Wang, Wohlwend, Lei 2020; Edge Pruning).

    Both multipliers start at 0 and are not clamped. Their gradient leaves this module reversed, so an ordinary
    optimiser that minimises the total loss raises them: do not set `maximize` as well. Give them no weight decay.
    A target above 1 is legal and only means to push harder.
    """

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Parameter(torch.zeros(()))
        self.quadratic = nn.Parameter(torch.zeros(()))

    def forward(self, sparsity: Tensor, target: float) -> Tensor:
        """The penalty, a scalar.

        Args:
            sparsity: removed share, differentiable, a scalar.
            target: of this step; a schedule raises it.

        Raises:
            NumericsError: the sparsity is NaN.
        """
        gap = refuse_nan(sparsity, "sparsity") - target
        return _ascending(self.linear) * gap + _ascending(self.quadratic) * gap**2


def _ascending(multiplier: Tensor) -> Tensor:
    """The same value with the opposite gradient; 2m - m is exact."""
    return 2 * multiplier.detach() - multiplier


def ratio_loss(share: Tensor, target: float) -> Tensor:
    """log(max(share, target) / min(share, target)): 0 at the target, both sides equally steep in ratio (ATP, APTP).

    Args:
        share: kept share in [0, 1], from `open_share`.
        target: share to reach, in (0, 1].

    Raises:
        BudgetError: the target is out of range.
        NumericsError: the share is NaN.
    """
    share = refuse_nan(share, "kept share")
    goal = share.new_tensor(_checked(target))
    return torch.log(torch.maximum(share, goal) / (torch.minimum(share, goal) + 1e-10))


def hinge_loss(share: Tensor, target: float) -> Tensor:
    """max(0, log(share / target)): one-sided, nothing pulls a network back up that is below its budget (LAPP).

    Args:
        share: kept share, may exceed 1 (a by-pass costs too).
        target: share to reach, in (0, 1].

    Raises:
        BudgetError: the target is out of range.
        NumericsError: the share is NaN.
    """
    target = _checked(target)
    # the logarithm of a share of 0 would have the gradient 0 * inf
    return torch.log(torch.clamp(refuse_nan(share, "kept share"), min=target) / target)


def prunable_target(target: float, total: float, prunable: float) -> float:
    """The share of the prunable cost to keep so that `target` of the total cost is kept (APTP).

    Args:
        target: kept share of the total, in (0, 1].
        total: cost of the whole network.
        prunable: the part of it that gates can remove.

    Raises:
        BudgetError: out of reach even with every gate closed; the message gives the lowest reachable target.
    """
    if not 0 < prunable <= total:
        raise BudgetError(f"the cost under gates is {prunable} of {total}; it lies above 0 and up to the total")
    lowest = 1 - prunable / total
    inside = 1 - (1 - _checked(target)) * total / prunable
    if inside < 0:
        raise BudgetError(f"cannot keep only {target} of the total cost: {lowest:.4f} of it has no gates")
    return inside


def _checked(target: float) -> float:
    if not 0 < target <= 1:
        raise BudgetError(f"the share to keep is {target}; it lies above 0 and up to 1")
    return target
