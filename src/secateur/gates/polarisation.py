"""Losses on gates that decide per input sample, until all samples agree (Zhi et al. 2023, arXiv 2302.10798).

    gbar_l = mean over the batch of the binary gates g[b, l]
    activation loss   sum_l w_l gbar_l                     or (sum_l w_l gbar_l - target)^2
    agreement loss    mean_l gbar_l (1 - gbar_l)           0 = all samples of the batch agree, 1/4 = half against half

The agreement loss acts on batch means of binary gates. On per-sample probabilities, p (1 - p), it would make every
sample confident but not unanimous, and the static network would be another one than the trained network.
Gates of several layers, or of channels, are joined along the second dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, DataError, ModelError
from secateur.gates.budget import open_share
from secateur.gates.checks import refuse_nan
from secateur.gates.freeze import Frozen, freeze_above


def agreement_loss(gates: Tensor) -> Tensor:
    """mean_l gbar_l (1 - gbar_l), a scalar in [0, 1/4].

    d/dg[b, l] = (1 - 2 gbar_l) / (B L): an open majority pushes every sample's gate open, a closed one closed.

    Args:
        gates: `[B, L]`, exactly 0 or 1, with straight-through gradients (`binary_gate`).

    Raises:
        DataError: the batch has one sample, for which the loss is always 0.
        ModelError: the gates are not binary or have another number of dimensions.
    """
    means = _batch_means(gates)
    if gates.shape[0] < 2:
        raise DataError("the agreement of gates needs at least 2 samples in a batch, got 1; use batches of 16 or more")
    return (means * (1 - means)).mean()


def activation_loss(gates: Tensor, costs: Tensor | None = None, target: float | None = None) -> Tensor:
    """The open share of the batch, or its squared distance from a target.

    Args:
        gates: `[B, L]`, exactly 0 or 1.
        costs: `[L]`, what each unit costs (FLOPs, parameters); only the proportions matter. Equal when left out.
        target: open share in [0, 1] to reach.

    Raises:
        BudgetError: the target or the costs are out of range.
        ModelError: the gates are not binary or have another number of dimensions.
    """
    share = open_share(_batch_means(gates), costs)
    if target is None:
        return share
    if not 0 <= target <= 1:
        raise BudgetError(f"the target for open gates is {target}; it is a share between 0 and 1")
    return (share - target) ** 2


def agreement(gates: Tensor) -> float:
    """Share of sample-gate pairs that equal the majority of their gate, in [0.5, 1]. Gates as above."""
    means = _batch_means(gates).detach()
    return float(torch.maximum(means, 1 - means).double().mean())


def consensus(open_rate: Tensor, minimum: int = 0) -> Frozen:
    """The static decision: a unit stays when more than half of the samples opened it.

    Args:
        open_rate: `[L]` mean of the binary gates (not of probabilities) over the training set.
        minimum: at least so many units stay, those with the highest rates.
    """
    return freeze_above(open_rate, 0.5, open_rate, minimum)


def polarization_regulariser(factors: Tensor | Sequence[Tensor], t: float = 1.2) -> Tensor:
    """Sum of t |g| - |g - mean(g)| over all factors together (Zhuang et al. 2020, NeurIPS, eq. 2).

    Another method than the agreement loss: it acts on scaling factors (of batch norms), which have no batch
    dimension, and divides them into a group near 0 and a group away from it.
    The released code exists with and without a gradient through the mean; here the formula is differentiated as it
    stands. For t < 1 it falls without end as factors grow: bound them from above.

    Args:
        factors: scaling factors, one tensor or one per layer; the mean is taken over all.
        t: weight of the L1 part; larger = more factors at 0.
    """
    parts = [factors] if isinstance(factors, Tensor) else factors
    g = refuse_nan(torch.cat([part.reshape(-1) for part in parts]), "scaling factors")
    return t * g.abs().sum() - (g - g.mean()).abs().sum()


def _batch_means(gates: Tensor) -> Tensor:
    if gates.ndim != 2:
        raise ModelError(f"gates of a batch have the shape [samples, units], got {list(gates.shape)}")
    wide = refuse_nan(gates, "gates")
    if not bool(((wide == 0) | (wide == 1)).all()):
        raise ModelError("the gates of a batch must be exactly 0 or 1; pass probabilities through binary_gate first")
    return wide.mean(0)
