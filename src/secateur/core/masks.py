"""Keep-masks as data: True = keep, one bit per unit on disk."""

from __future__ import annotations

from math import prod

import numpy as np
import torch
from torch import Tensor

from secateur.core.errors import PlanError


def pack(mask: Tensor) -> Tensor:
    """Eight units per byte, first unit in the lowest bit; the tail of the last byte is zero."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().numpy().reshape(-1), bitorder="little"))


def unpack(packed: Tensor, shape: tuple[int, ...], name: str) -> Tensor:
    """The inverse of `pack`.

    Raises:
        PlanError: the number of bytes does not fit the shape.
    """
    count = prod(shape)
    if packed.dtype != torch.uint8 or packed.numel() != (count + 7) // 8:
        raise PlanError(f"the mask of '{name}' holds {packed.numel()} bytes, shape {shape} needs {(count + 7) // 8}")
    bits = np.unpackbits(packed.numpy(), count=count, bitorder="little")
    return torch.from_numpy(bits.astype(bool)).view(shape)
