"""Weights for the golden numbers of the official TRP code: integers over powers of two, falling singular values."""

from __future__ import annotations

import torch
from golden_recipes import weights
from torch import Tensor, nn

CASES = {  # outputs, inputs, kernel, seed
    "square": (16, 12, 3, 1),
    "wide": (8, 24, 3, 2),
    "tall": (40, 3, 3, 3),
    "large_kernel": (10, 6, 5, 4),
}
TYPES = {"NC": "channel", "VH": "spatial", "ND": "decoupled"}


def weight(case: str) -> Tensor:
    """`[N, C, k, k]`: later filters and inputs are smaller, exactly, so that the spectrum falls."""
    outputs, inputs, kernel, seed = CASES[case]
    drawn = weights(outputs, inputs * kernel**2, seed).view(outputs, inputs, kernel, kernel)
    rows = torch.tensor([2.0 ** -(i // 4) for i in range(outputs)])
    columns = torch.tensor([2.0 ** -(i % 3) for i in range(inputs)])
    return drawn * rows.view(-1, 1, 1, 1) * columns.view(1, -1, 1, 1) / 8


def network(case: str) -> nn.Sequential:
    """A first convolution, which is left alone, and the case's."""
    outputs, inputs, kernel, _ = CASES[case]
    first = nn.Conv2d(1, inputs, 3, padding=1, bias=False)
    net = nn.Sequential(first, nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False))
    with torch.no_grad():
        first.weight.fill_(0.25)
        net[1].weight.copy_(weight(case))
    return net
