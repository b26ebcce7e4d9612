"""A small network that looks at a feature map and decides per sample which units are open."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.gates.binary import binary_gate


class PooledGate(nn.Module):
    """Pool over positions, one hidden layer, a binary gate per sample and unit with the identity as gradient.

    Args:
        channels: of the feature map.
        units: gates per sample.
        hidden: width of the hidden layer.
        bias: of the last layer at the start; positive = open.
        rng: of the first weights, uniform within 1 / sqrt(inputs).
    """

    def __init__(self, channels: int, units: int, hidden: int, bias: float, rng: torch.Generator):
        super().__init__()
        self.first, self.last = nn.Linear(channels, hidden), nn.Linear(hidden, units)
        with torch.no_grad():
            for layer in (self.first, self.last):
                bound = layer.in_features**-0.5
                layer.weight.uniform_(-bound, bound, generator=rng)
            self.first.bias.zero_()
            self.last.bias.fill_(bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[samples, units]`, exactly 0 or 1, from `[samples, channels, height, width]`."""
        pooled = x.flatten(2).mean(2)  # (samples, channels)
        return binary_gate(torch.sigmoid(self.last(F.relu(self.first(pooled)))))
