"""The residual networks for CIFAR-10, with trained weights from the folder that SECATEUR_MODELS names.

As models of a comparison or a job: `secateur.lab.cifar:resnet56`.
"""

from __future__ import annotations

from itertools import pairwise

from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.seeding import seeded
from secateur.lab.reproduce import folder_of


class Block(nn.Module):
    """Two convolutions and a shortcut that subsamples and pads with zeros."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: Tensor) -> Tensor:
        """[n, inputs, h, w] -> [n, outputs, h / stride, w / stride]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(out + x)


class CifarResNet(nn.Module):
    """For 32x32 images (He et al. 2016, section 4.2), shortcuts without weights.

    Args:
        blocks: in each of the three stages; the depth is 6 * blocks + 2.
        width: channels of the first stage; the others have two and four times as many.
    """

    def __init__(self, blocks: int = 3, width: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        stages = [self._stage(blocks, a, b) for a, b in pairwise((width, width, 2 * width, 4 * width))]
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(4 * width, 10)

    @staticmethod
    def _stage(blocks: int, inputs: int, outputs: int) -> nn.Sequential:
        first = Block(inputs, outputs, 1 if inputs == outputs else 2)
        return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        """[n, 3, 32, 32] -> logits [n, 10]."""
        out = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        found: Tensor = self.linear(out.mean((2, 3)))
        return found


def resnet20() -> nn.Module:
    """ResNet-20 with trained weights.

    Raises:
        DataError: SECATEUR_MODELS names no folder with `resnet20-cifar10`.
    """
    return _trained(20)


def resnet32() -> nn.Module:
    """ResNet-32 with trained weights.

    Raises:
        DataError: SECATEUR_MODELS names no folder with `resnet32-cifar10`.
    """
    return _trained(32)


def resnet56() -> nn.Module:
    """ResNet-56 with trained weights.

    Raises:
        DataError: SECATEUR_MODELS names no folder with `resnet56-cifar10`.
    """
    return _trained(56)


def initial20() -> nn.Module:
    """ResNet-20 before its training, always the same."""
    with seeded(0):
        return CifarResNet(3)


def _trained(depth: int) -> nn.Module:
    model = CifarResNet((depth - 2) // 6)
    name = f"resnet{depth}-cifar10"
    model.load_state_dict(load_file(folder_of("SECATEUR_MODELS", name) / "model.safetensors"))
    return model
