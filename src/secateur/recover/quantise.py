"""The rounding grid that SparseGPT can prune on: per output channel, asymmetric, min-max."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def minmax_grid(weight: Tensor, bits: int) -> Callable[[Tensor], Tensor]:
    """Round-to-nearest on 2^bits levels per row, fixed from the dense weight.

    Args:
        weight: `[O, I]`.
        bits: 2 to 16.

    Returns:
        A function of a column `[O]`. Zero is always a level, so pruned weights stay exactly zero.
    """
    levels = 2**bits - 1
    low = weight.float().amin(1).clamp(max=0)
    high = weight.float().amax(1).clamp(min=0)
    flat = (low == 0) & (high == 0)
    low, high = torch.where(flat, -torch.ones_like(low), low), torch.where(flat, torch.ones_like(high), high)
    scale = (high - low) / levels
    zero = torch.round(-low / scale)

    def quantise(column: Tensor) -> Tensor:
        level = torch.clamp(torch.round(column / scale) + zero, 0, levels)
        return torch.mul(scale, level - zero)

    return quantise
