"""Scikit-learn's two sample photographs as pairs of small and large images, for super-resolution."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.core.errors import DataError, MissingExtraError
from secateur.data.dataset import DataKind, Dataset, Splits

NAME = "photos"
TRAINED = 0.7  # of the width, from the left


def photographs(scale: int = 2) -> Tensor:
    """Both photographs, float32 RGB in [0, 1], `[2, 3, height, width]`, sides cut to multiples of 2 * scale.

    Raises:
        MissingExtraError: Pillow is not there to read them.
    """
    from sklearn.datasets import load_sample_images

    try:
        images = load_sample_images().images
    except ImportError as error:
        raise MissingExtraError("pillow", "data", "reading photographs") from error
    stacked = torch.stack([torch.from_numpy(image.copy()) for image in images]).permute(0, 3, 1, 2) / 255
    height, width = (side - side % (2 * scale) for side in stacked.shape[-2:])
    return stacked[..., :height, :width].contiguous()


def resized(images: Tensor, factor: float) -> Tensor:
    """Bicubic, antialiased when made smaller, cut off at 0 and 1; `[n, 3, h, w]` with both sides times `factor`."""
    found = F.interpolate(images, scale_factor=factor, mode="bicubic", antialias=factor < 1, align_corners=False)
    return found.clamp(0, 1)


def photos(scale: int = 2, patch: int = 16, stride: int = 8) -> Splits:
    """Patches of the left 70 % to train on; the right 30 % of both photographs, whole, to measure on.

    Args:
        scale: how much larger the targets are.
        patch: side of a small training image in pixels.
        stride: pixels from one small training image to the next.

    Returns:
        inputs `[n, 3, h, w]`, targets `[n, 3, scale * h, scale * w]`.

    Raises:
        DataError: the patches are larger than the photographs.
    """
    large = photographs(scale)
    split = int(TRAINED * large.shape[-1]) // (2 * scale) * 2 * scale
    left, right = large[..., :split], large[..., split:]
    small = resized(left, 1 / scale)
    if patch < 1 or patch > min(small.shape[-2:]):
        raise DataError(f"patches of {patch} pixels do not fit into photographs of {list(small.shape[-2:])}")
    training = Dataset(
        NAME, DataKind.IMAGE, _patches(small, patch, stride), _patches(left, scale * patch, scale * stride)
    )
    return Splits(training, Dataset(NAME, DataKind.IMAGE, resized(right, 1 / scale), right))


def _patches(images: Tensor, size: int, stride: int) -> Tensor:
    """All squares of a grid, `[n, 3, size, size]`."""
    windows = images.unfold(2, size, stride).unfold(3, size, stride)  # (n, 3, rows, columns, size, size)
    return windows.permute(0, 2, 3, 1, 4, 5).reshape(-1, images.shape[1], size, size)
