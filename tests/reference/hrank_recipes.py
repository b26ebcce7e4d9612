"""Inputs of HRank's golden numbers: the same bits on every machine, every feature map exact in float32."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn


def integers(seed: int, low: int, high: int, *shape: int) -> Tensor:
    """Integers in [low, high], from NumPy's frozen stream."""
    drawn = np.random.RandomState(seed).randint(low, high + 1, shape)
    return torch.from_numpy(drawn.astype(np.float32))


class Net(nn.Module):
    """Two convolutions with rectifiers after each, and a residual block; 8x8, then 4x4."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(2, 6, 3, padding=1), nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.relu2 = nn.Conv2d(6, 8, 1), nn.ReLU(inplace=True)
        self.conv3, self.relu3 = nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.relu2(self.conv2(self.pool(self.relu1(self.conv1(x)))))
        x = self.relu3(self.conv3(x) + x)
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def network() -> Net:
    """With small integers for weights, in eval mode; biases keep some channels nearly closed."""
    net = Net().eval()
    with torch.no_grad():
        for seed, (name, parameter) in enumerate(net.named_parameters()):
            low, high = (-12, 4) if name.endswith("bias") else (-2, 2)
            parameter.copy_(integers(seed, low, high, *parameter.shape))
    return net


def measured(net: Net) -> dict[str, nn.Module]:
    """Where the ranks are taken."""
    return {name: module for name, module in net.named_children() if name.startswith("relu")}


def images() -> list[Tensor]:
    """Batches of 5, 2 and 4 images `[n, 2, 8, 8]`; some are outer products, of rank 1."""
    found = [integers(40 + size, -3, 3, size, 2, 8, 8) for size in (5, 2, 4)]
    found[1] = integers(50, -2, 2, 2, 2, 8, 1) * integers(51, -2, 2, 2, 2, 1, 8)
    return found
