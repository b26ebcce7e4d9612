"""Inputs of the golden numbers of meta pruning: networks and a metanetwork filled with exact small numbers."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTHS = (4, 4, 8, 12)
SHAPE = {"node": 8, "edges": (9,), "layers": 2, "width": 7, "node_ratio": 0.01, "edge_ratio": 0.05}


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride > 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return F.relu(y)


class CifarResNet(nn.Module):
    """Three stages of residual blocks, as for CIFAR (He et al. 2016)."""

    def __init__(self, depth: int, widths: tuple[int, ...] = (16, 16, 32, 64)):
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        for stage in (1, 2, 3):
            first = Block(widths[stage - 1], widths[stage], 1 if stage == 1 else 2)
            rest = (Block(widths[stage], widths[stage], 1) for _ in range((depth - 8) // 6))
            setattr(self, f"layer{stage}", nn.Sequential(first, *rest))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def fill(tensors: dict[str, Tensor], seed: int) -> None:
    """Integers over 32, in the order of the names given; variances above 0."""
    random = np.random.RandomState(seed)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            values = random.randint(-24, 25, tuple(tensor.shape)) / 32
            tensor.copy_(torch.from_numpy(np.asarray(np.abs(values) + 0.25 if name.endswith("var") else values)))


def network(depth: int = 56) -> CifarResNet:
    found = CifarResNet(depth, WIDTHS).eval()
    with torch.no_grad():
        fill(found.state_dict(), 32)
    return found


def metanetwork_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Nodes, index and edges of a small graph, float64: 3 inputs, 4 channels, 5 channels, and a shortcut."""
    random = np.random.RandomState(7)
    pairs = [(o, i) for o in range(3, 7) for i in range(3)] + [(o, i) for o in range(7, 12) for i in range(7)]
    numbers = [torch.from_numpy(random.randint(-32, 33, shape) / 16) for shape in ((12, 8), (len(pairs), 9))]
    return numbers[0], torch.tensor(pairs).T, numbers[1]


def digest(*tensors: Tensor) -> str:
    """Of shapes and bytes."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(list(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()[:32]


def checksums(tensor: Tensor) -> list[float]:
    """The sum, and the sum with every entry weighted by its place."""
    flat = tensor.detach().double().flatten()
    return [float(flat.sum()), float(flat @ torch.arange(len(flat), dtype=torch.float64))]
