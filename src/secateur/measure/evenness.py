"""How compressible the weights that are left still are: the PQ index of every layer and of all together.

Of a model alone only its non-zeros are known, so they are taken as the kept weights: a kept weight that is exactly
zero is left out here, which changes the index by less than it can be read to.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import nn

from secateur.scores.compressibility import P, Q, index_of_sums, power_sums
from secateur.structure.layers import layout_of

Sums = tuple[int, float, float]


@dataclass(frozen=True)
class Evenness:
    """PQ indices (p=0.5, q=1) of the non-zero linear and convolution weights: 0 = all of equal size, 1 = most uneven.

    Attributes:
        total: all layers as one.
        layers: parameter name -> index.
    """

    total: float
    layers: dict[str, float]


def evenness(model: nn.Module) -> Evenness | None:
    """The indices of a model; None where it has no such layer, or NaN or infinity in one."""
    found: dict[int, tuple[str, Sums]] = {}  # tied weights once
    for name, module in model.named_modules():
        if layout_of(module) is not None and id(module.weight) not in found:
            weight = module.weight
            assert isinstance(weight, torch.Tensor)
            found[id(weight)] = (f"{name}.weight" if name else "weight", power_sums(weight))
    layers = dict(found.values())
    if not layers or not all(isfinite(sums[2]) for sums in layers.values()):
        return None
    count, low, high = (sum(column) for column in zip(*layers.values(), strict=True))
    return Evenness(_index((int(count), low, high)), {name: _index(sums) for name, sums in layers.items()})


def _index(sums: Sums) -> float:
    count, low, high = (torch.tensor(value, dtype=torch.float64) for value in sums)
    return float(index_of_sums(count, low, high, P, Q))
