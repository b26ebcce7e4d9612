"""From the importance of layers to what each keeps: shares around a mean, multiples, ranks of adapters.

CFSP's coarse step (Wang et al. 2024, arXiv 2409.13199, section 3.2). All functions are pure; names are sites or blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import floor, tanh

from secateur.allocate.counts import largest_remainder, with_floor
from secateur.core.errors import BudgetError

ROOM = 1.05  # the published code keeps the widest layer this much inside its full width


def sigmoid(importance: Mapping[str, float], slope: float = 1.0, divisor: float = 1e4) -> dict[str, float]:
    """1 / (1 + exp(-slope x)), with x the importance less the mean over all names, divided by `divisor`; in (0, 1)."""
    mean = sum(importance.values()) / len(importance)
    return {
        name: 0.5 * (1 + tanh(slope * (value - mean) / divisor / 2))  # the same, without overflow
        for name, value in importance.items()
    }


def proportional(weights: Mapping[str, float], sizes: Mapping[str, int], density: float) -> dict[str, float]:
    """Densities in proportion to weights, with the asked density on the average of all units, none above 1.

    Where the largest would reach 1, all weights are moved towards their mean by one factor, so that it keeps
    density + (1 - density) / 1.05.

    Args:
        weights: one positive number a layer.
        sizes: units of each layer; the mean over layers is weighted with them.
        density: fraction of all units that stays, in (0, 1].
    """
    mean = sum(weights[name] * size for name, size in sizes.items()) / sum(sizes.values())
    highest = max(weights.values())
    if highest <= mean:
        return dict.fromkeys(weights, density)
    pull = 1.0
    if highest / mean * density >= 1:
        pull = mean * (1 / density - 1) / (highest - mean) / ROOM
    return {name: (mean + (weight - mean) * pull) / mean * density for name, weight in weights.items()}


def whole(densities: Mapping[str, float], sizes: Mapping[str, int], total: int, minimum: int = 1) -> dict[str, int]:
    """Kept units with an exact total, each layer at least `min(minimum, its size)`.

    Raises:
        BudgetError: the minimum alone needs more than the total.
    """
    wanted = {name: densities[name] * size for name, size in sizes.items()}
    return with_floor(largest_remainder(wanted, total, sizes), sizes, minimum)


def multiples(densities: Mapping[str, float], sizes: Mapping[str, int], multiple: int) -> dict[str, int]:
    """Kept units rounded to the nearest multiple, at least one multiple, at most the layer's size.

    The total is then only nearly what was asked for.
    """
    return {
        name: min(size, max(1, floor((size * densities[name] + multiple / 2) / multiple)) * multiple)
        for name, size in sizes.items()
    }


def ranks(importance: Mapping[str, float], rank: int = 8) -> dict[str, int]:
    """Ranks of low-rank adapters in proportion to importance, with `rank` as their mean, at least 1 (IG-LoRA).

    Raises:
        BudgetError: the mean rank is below 1.
    """
    if rank < 1:
        raise BudgetError(f"a mean rank of {rank} cannot be spread over layers that need at least 1 each")
    total, everything = rank * len(importance), sum(importance.values())
    wanted = {
        name: total * (value / everything if everything else 1 / len(importance)) for name, value in importance.items()
    }
    return with_floor(largest_remainder(wanted, total, dict.fromkeys(wanted, total)), dict.fromkeys(wanted, total), 1)
