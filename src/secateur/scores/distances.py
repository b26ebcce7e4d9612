"""How far every unit is from all others: sums of distances between rows, without the [n, n, d] differences."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor

BLOCK = 2**22  # distances held at a time: 16 MiB


class Distance(StrEnum):
    """Between two rows."""

    L2 = "l2"
    L1 = "l1"
    COS = "cos"


def distance_sums(rows: Tensor, distance: Distance = Distance.L2) -> Tensor:
    """Sum over j of the distance between rows i and j, float64 `[n]`.

    For `l2` it is smallest at the row that is nearest to the geometric median (He et al. 2019, equations 4 to 6).
    `cos` is 1 - cos(x_i, x_j); a row of zeros has no direction and its sum is 0.

    Args:
        rows: `[n, d]`; distances are taken in float32 from differences, never from products, in which equal
            rows would not be at distance 0.
        distance: l2, l1 or cos.
    """
    if distance is Distance.COS:
        return _cosine_sums(rows)
    x, power = rows.detach().float(), 1.0 if distance is Distance.L1 else 2.0
    sums = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    size = max(1, BLOCK // max(1, len(x)))
    for start in range(0, len(x), size):
        end = min(start + size, len(x))
        # only pairs that no earlier block had: the matrix is symmetric
        found = torch.cdist(x[start:end], x[start:], p=power, compute_mode="donot_use_mm_for_euclid_dist").double()
        sums[start:end] += found.sum(1)
        sums[end:] += found[:, end - start :].sum(0)
    return sums


def _cosine_sums(rows: Tensor) -> Tensor:
    """Sum over j of 1 - x_i . x_j = n - x_i . (sum of all x_j) for rows of length 1."""
    x = rows.detach().double()
    length = x.norm(dim=1, keepdim=True)
    unit, directed = x / length.clamp_min(torch.finfo(torch.float64).tiny), (length > 0).squeeze(1)
    sums = (len(x) - unit @ unit.sum(0)).clamp_min(0)
    return torch.where(directed | length.isnan().squeeze(1), sums, 0.0)
