"""Peak signal-to-noise ratio as super-resolution reports it: on luma, without the border, after rounding to bytes."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.errors import DataError

LUMA = (65.481, 128.553, 24.966)  # BT.601 studio range: Y runs from 16 to 235


def luma(images: Tensor) -> Tensor:
    """Y = 16 + 65.481 R + 128.553 G + 24.966 B.

    Args:
        images: RGB in [0, 1], `[..., 3, height, width]`.

    Returns:
        float64 `[..., height, width]`, 16 to 235.

    Raises:
        DataError: there are not 3 channels.
    """
    if images.dim() < 3 or images.shape[-3] != 3:
        raise DataError(f"luma is made of 3 channels, [..., 3, height, width]; got {list(images.shape)}")
    weights = torch.tensor(LUMA, dtype=torch.float64, device=images.device)
    return 16 + (images.double() * weights.view(3, 1, 1)).sum(-3)


def psnr(outputs: Tensor, targets: Tensor, border: int, rounded: bool = True) -> Tensor:
    """10 log10(255^2 / mean squared error of luma) in dB, image by image; infinite where they are equal.

    Args:
        outputs: `[n, 3, height, width]`; cut off at 0 and 1.
        targets: the same shape, in [0, 1].
        border: pixels left out on every side, the scale by convention.
        rounded: to 8 bits first, as files are compared.

    Returns:
        float64 `[n]`.

    Raises:
        DataError: shapes differ, or the border leaves nothing.
    """
    if outputs.shape != targets.shape:
        raise DataError(f"images of shapes {list(outputs.shape)} and {list(targets.shape)} cannot be compared")
    if border < 0 or 2 * border >= min(outputs.shape[-2:]):
        raise DataError(f"a border of {border} pixels leaves nothing of {list(outputs.shape[-2:])}")

    def seen(images: Tensor) -> Tensor:
        images = images.detach().double().clamp(0, 1)
        y = luma((images * 255).round() / 255 if rounded else images)
        return y[..., border : y.shape[-2] - border, border : y.shape[-1] - border]

    errors = (seen(outputs) - seen(targets)).square().mean((-2, -1))
    return 10 * torch.log10(255**2 / errors)
