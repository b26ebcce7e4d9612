"""Residual and plain convolutional networks for the tests of block removal."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class After(nn.Module):
    """Post-activation block (He et al. 2015); `gate` scales the branch."""

    gate = 1.0

    def __init__(self, inputs: int, width: int, pad: bool = False):
        super().__init__()
        self.stride = 1 if inputs == width else 2
        self.conv1 = nn.Conv2d(inputs, width, 3, self.stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        if self.stride == 2:
            self.shortcut = nn.Conv2d(inputs, width, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        branch = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.gate * branch + (self.shortcut(x) if self.stride == 2 else x))


class Before(nn.Module):
    """Pre-activation block (He et al. 2016); `gate` scales the branch."""

    gate = 1.0

    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.stride = 1 if inputs == width else 2
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, width, 3, self.stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        if self.stride == 2:
            self.shortcut = nn.Conv2d(inputs, width, 1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        inside = F.relu(self.bn1(x))
        branch = self.conv2(F.relu(self.bn2(self.conv1(inside))))
        return self.gate * branch + (self.shortcut(inside) if self.stride == 2 else x)


class ResNet(nn.Module):
    """Stem, stages as Sequential or ModuleList, classifier; one input channel, or three."""

    def __init__(
        self, block: type[nn.Module] = After, blocks: int = 3, widths=(4, 8, 16), channels=1, listed=False, classes=4
    ):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(channels, widths[0], 3, padding=1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU()
        )
        stages, before = [], widths[0]
        for width in widths:
            members = [block(before, width), *(block(width, width) for _ in range(blocks - 1))]
            stages.append(nn.ModuleList(members) if listed else nn.Sequential(*members))
            before = width
        self.stages = nn.ModuleList(stages)
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for stage in self.stages:
            for block in stage:
                x = block(x)
        return self.head(x.mean((2, 3)))


def made(seed: int = 0, **kind) -> ResNet:
    """A network whose batch norms have statistics, scales and shifts that are not trivial."""
    torch.manual_seed(seed)
    model = ResNet(**kind)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model.eval()


def vgg() -> nn.Sequential:
    """Convolutions in a row."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((1, 4), (4, 8), (8, 8)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4))
