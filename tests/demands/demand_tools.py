"""What the tests of structured pruning compare a cut model with, made without the library's own cutting."""

import copy

import torch
from torch import Tensor, nn

from secateur.core.plan import Plan

TOLERANCE, MOVED = 1e-5, 0.01


@torch.no_grad()
def zeroed(model: nn.Module, plan: Plan) -> nn.Module:
    """The dense model with every removed unit's weights at zero, wherever they stand.

    It is the masked model as long as nothing counts the units, as a norm over them would.
    """
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, site in plan.sites.items():
        for place in site.occurrences:
            tensors[place.parameter].index_fill_(place.dim, place.removed(plan.masks[name]), 0)
    return model


def gap(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference, relative to the largest expected value where that is above 1."""
    assert [a.shape for a in expected] == [b.shape for b in found]
    pairs = zip(expected, found, strict=True)
    return max(float((a - b).abs().max() / a.abs().max().clamp_min(1)) for a, b in pairs)


def total(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())
