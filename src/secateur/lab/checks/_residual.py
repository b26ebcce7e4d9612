"""Residual networks of basic blocks for the checks: any widths, any number of blocks a stage."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F


class Block(nn.Module):
    """Two convolutions around a shortcut; a strided one where resolution and width change."""

    def __init__(self, inputs: int, width: int):
        super().__init__()
        stride = 1 if inputs == width else 2
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity() if inputs == width else nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[samples, inputs, h, w]` to `[samples, width, h, w]`, or half of h and w."""
        inside = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(inside + self.shortcut(x))


def stages_net(widths: Sequence[int], blocks: int, channels: int = 1) -> nn.Sequential:
    """Stem, a stage of `blocks` blocks for each width, classifier of ten classes; Kaiming-normal convolutions.

    Widths 16, 32, 64 and three channels are the CIFAR ResNets: 5 blocks a stage make ResNet-32, 9 ResNet-56.
    """
    stem = nn.Sequential(nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
    stages, before = [], widths[0]
    for width in widths:
        stages.append(nn.Sequential(Block(before, width), *(Block(width, width) for _ in range(blocks - 1))))
        before = width
    model = nn.Sequential(
        stem, *stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    return model
