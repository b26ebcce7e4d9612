"""Accuracy on damaged images: noise, blur and lost contrast in five severities each.

An offline stand-in for CIFAR-C (Hendrycks and Dietterich 2019), with the strengths of its small-image version.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from math import ceil

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import DataError
from secateur.core.seeding import generator
from secateur.data.dataset import DataKind, Dataset
from secateur.measure.quality import accuracy

SEVERITIES = 5


class Corruption(StrEnum):
    """What is done to the images."""

    NOISE = "noise"
    BLUR = "blur"
    CONTRAST = "contrast"


STRENGTHS = {
    Corruption.NOISE: (0.04, 0.06, 0.08, 0.09, 0.10),  # standard deviation, as a share of the range of values
    Corruption.BLUR: (0.4, 0.6, 0.7, 0.8, 1.0),  # standard deviation of the kernel in pixels
    Corruption.CONTRAST: (0.75, 0.5, 0.4, 0.3, 0.15),  # what is left of the distance to each image's mean
}


def corrupted(data: Dataset, corruption: Corruption, severity: int, seed: int = 0) -> Dataset:
    """The data set with damaged images; values stay within the range that the images had.

    Args:
        data: images `[samples, channels, height, width]`.
        corruption: noise, blur or contrast.
        severity: 1 to 5.
        seed: of the noise.

    Raises:
        DataError: no images, or no such severity.
    """
    if not 1 <= severity <= SEVERITIES:
        raise DataError(f"severities are 1 to {SEVERITIES}, got {severity}")
    if data.kind is not DataKind.IMAGE or data.inputs.dim() != 4:
        raise DataError(f"'{data.name}' holds no images [samples, channels, height, width] that could be damaged")
    strength, images = STRENGTHS[corruption][severity - 1], data.inputs
    low, high = images.amin(), images.amax()
    match corruption:
        case Corruption.NOISE:
            rng = generator(seed, "corrupted", corruption, str(severity))
            changed = images + strength * (high - low) * torch.randn(images.shape, generator=rng).to(images)
        case Corruption.BLUR:
            changed = _blurred(images, strength)
        case _:
            mean = images.mean((2, 3), keepdim=True)
            changed = mean + strength * (images - mean)
    return replace(data, inputs=changed.clamp(low, high))


def robustness(model: nn.Module, data: Dataset, seed: int = 0) -> dict[str, list[float]]:
    """Accuracy in percent under each corruption, from severity 1 to 5.

    Raises:
        DataError: no labelled images.
    """
    return {
        corruption.value: [
            100 * accuracy(model, corrupted(data, corruption, severity, seed)).value
            for severity in range(1, SEVERITIES + 1)
        ]
        for corruption in Corruption
    }


def _blurred(images: Tensor, deviation: float) -> Tensor:
    """A Gaussian kernel along both directions; the border is repeated outwards."""
    reach = ceil(3 * deviation)
    kernel = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float64) / deviation) ** 2)
    kernel = (kernel / kernel.sum()).to(images)
    channels = images.shape[1]
    padded = F.pad(images, (reach, reach, reach, reach), mode="replicate")
    rows = F.conv2d(padded, kernel.view(1, 1, -1, 1).expand(channels, -1, -1, -1), groups=channels)
    return F.conv2d(rows, kernel.view(1, 1, 1, -1).expand(channels, -1, -1, -1), groups=channels)
