"""Norms of coupled units, and the gradient that drives small ones to zero (Fang et al. 2023, arXiv 2301.12900).

For the units k of a site and its members, the weights of linear, convolution and batch-norm layers that stand in it:

    I_k = mean over members of the sum of squares of the member's slice k
    u_k = sqrt(I_k),  gamma_k = alpha ^ ((max u - u_k) / (max u - min u)),  gradient = strength * gamma_k * w

for every entry w of slice k of every member, the input slices of the layers that read the unit among them; biases are
left out. It is no loss: gamma is a constant, so the smallest units shrink alpha times as fast as the largest.
Sites whose units are all equal have no gamma; they get no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.core.units import Occurrence, Site
from secateur.scores.groups import Combine, group_scores, over_others
from secateur.structure.layers import BATCH_NORMS, layout_of


def member_weights(model: nn.Module) -> frozenset[str]:
    """Names of the parameters whose slices count: weights of linear and convolution layers and of batch norm."""
    named = model.named_modules()
    owners = {name for name, module in named if layout_of(module) is not None or isinstance(module, BATCH_NORMS)}
    return frozenset(
        name for name, _ in model.named_parameters() if name.endswith("weight") and name.rpartition(".")[0] in owners
    )


def group_norms(sites: Mapping[str, Site], tensors: Mapping[str, Tensor], members: frozenset[str]) -> dict[str, Tensor]:
    """Site -> I, one number per unit.

    Args:
        sites: structured sites with their occurrences.
        tensors: at least the members, by name.
        members: names of the parameters that count.
    """

    def squares(name: str, dim: int) -> Tensor | None:
        return over_others(tensors[name], dim, 2) if name in members else None

    return group_scores(sites, squares, Combine.MEAN)


def growing_factors(norms: Tensor, alpha: float) -> Tensor | None:
    """Gamma per unit from I; None where all units are equal or one is NaN."""
    u = norms.sqrt()
    spread = u.max() - u.min()
    if bool(torch.isnan(u).any()) or not float(spread) > 0:
        return None
    return alpha ** ((u.max() - u) / spread)


def growing_gradient(
    sites: Mapping[str, Site],
    tensors: Mapping[str, Tensor],
    members: frozenset[str],
    *,
    strength: float,
    alpha: float = 16.0,
) -> dict[str, Tensor]:
    """Parameter name -> the gradient; parameters without one are left out.

    Args:
        sites: structured sites with their occurrences.
        tensors: the values that the gradient is for.
        members: names of the parameters that count.
        strength: its weight.
        alpha: how much faster the smallest unit of a site shrinks than the largest.
    """
    found: dict[str, Tensor] = {}
    for name, norms in group_norms(sites, tensors, members).items():
        gamma = growing_factors(norms, alpha)
        for place in sites[name].occurrences if gamma is not None else ():
            if place.parameter in members:
                assert gamma is not None  # or there would be no places
                weight = tensors[place.parameter].detach()
                term = strength * _along(place, gamma.to(weight), weight) * weight
                found[place.parameter] = found[place.parameter] + term if place.parameter in found else term
    return found


def _along(place: Occurrence, factors: Tensor, weight: Tensor) -> Tensor:
    """The units' factors at their indices, 0 elsewhere, to be multiplied with the weight."""
    spread = weight.new_zeros(weight.shape[place.dim])
    indices = place.indices(len(factors)).to(weight.device)
    spread[indices] = factors[:, None].expand_as(indices)
    return spread.view([-1 if dim == place.dim else 1 for dim in range(weight.dim())])
