"""Exact integer counts: fractions rounded so that the total is met, and floors per site."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil, floor, prod

from secateur.allocate import ratios
from secateur.core.errors import BudgetError


def largest_remainder(wanted: Mapping[str, float], total: int, limits: Mapping[str, int]) -> dict[str, int]:
    """Round real-valued counts to integers with an exact total (Hamilton's method).

    Args:
        wanted: site -> real count; their sum is within one per site of `total`.
        total: what the integers must sum to.
        limits: site -> most units it can keep.

    Raises:
        BudgetError: total is out of reach.
    """
    most = sum(limits.values())
    if not 0 <= total <= most:
        raise BudgetError(f"cannot keep {total} of {most} units; the reachable range is 0 to {most}")
    counts = {name: min(floor(value), limits[name]) for name, value in wanted.items()}
    # largest remainder first; mapping order breaks ties, so the result is deterministic
    order = sorted(wanted, key=lambda name: counts[name] - wanted[name])
    missing = total - sum(counts.values())
    while missing:
        step = 1 if missing > 0 else -1
        for name in order if step > 0 else reversed(order):
            if missing and 0 <= counts[name] + step <= limits[name]:
                counts[name] += step
                missing -= step
    return counts


def uniform(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """The same density everywhere, with an exact total."""
    return largest_remainder(ratios.uniform({name: (size,) for name, size in sizes.items()}, total), total, sizes)


def erk(shapes: Mapping[str, tuple[int, ...]], total: int) -> dict[str, int]:
    """Erdos-Renyi-kernel densities (Evci et al. 2020) with an exact total.

    Args:
        shapes: site -> `[out, in, *kernel]`.
        total: weights kept over all sites.
    """
    return largest_remainder(ratios.erk(shapes, total), total, {name: prod(shape) for name, shape in shapes.items()})


def with_floor(counts: Mapping[str, int], sizes: Mapping[str, int], minimum: int) -> dict[str, int]:
    """Raise every site to `min(minimum, its size)` and take the difference from the others.

    Water-filling on kept counts: sites above their floor are scaled by one common multiplier
    (found by bisection), so the total stays exactly what it was. Counts that already respect the
    floor come back unchanged.

    Raises:
        BudgetError: the floors alone need more than the total; gives the largest feasible sparsity.
    """
    total = sum(counts.values())
    floors = {name: min(minimum, size) for name, size in sizes.items()}
    if all(counts[name] >= floors[name] for name in sizes):
        return dict(counts)
    needed, everything = sum(floors.values()), sum(sizes.values())
    if needed > total:
        highest = floor((1 - needed / everything) * 1e6) / 1e6
        raise BudgetError(
            f"a floor of {minimum} units in each of {len(sizes)} sites needs {needed} kept units, the budget keeps "
            f"{total}; the highest sparsity with this floor is {highest:g}"
        )

    def filled(multiplier: float) -> dict[str, float]:
        return {name: min(max(floors[name], multiplier * counts[name]), sizes[name]) for name in sizes}

    low, high = 0.0, 1.0  # a multiplier of 1 keeps too many, since only floors were added
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(filled(middle).values()) < total else (low, middle)
    # ceil of the floor is the floor: rounding never undercuts it
    return _round_above(filled(high), total, sizes, floors)


def _round_above(
    wanted: Mapping[str, float], total: int, sizes: Mapping[str, int], floors: Mapping[str, int]
) -> dict[str, int]:
    spare = {name: wanted[name] - floors[name] for name in wanted}
    limits = {name: max(sizes[name] - floors[name], ceil(spare[name])) for name in wanted}
    extra = largest_remainder(spare, total - sum(floors.values()), limits)
    return {name: floors[name] + extra[name] for name in wanted}


def reference_floor(
    sizes: Mapping[str, int], sparsities: Mapping[str, float], target: float, minimum: int
) -> dict[str, float]:
    """The published code's refinement of layer sparsities (GlobalMP, repeated scale-and-clamp).

    Args:
        sizes: weights per layer.
        sparsities: what the global threshold gave each layer.
        target: sparsity over all layers.
        minimum: weights that every layer of at least that size must keep.

    Returns:
        Layer sparsities; layers smaller than `minimum` are dense.

    Raises:
        BudgetError: every layer ends clamped and the target is still not reached (the published
            code would loop for ever).
    """
    everything = sum(sizes.values())
    refined = {name: 0.0 if sizes[name] < minimum else value for name, value in sparsities.items()}

    def total() -> float:
        return sum(sizes[name] * value for name, value in refined.items()) / everything

    def scale_and_clamp() -> None:
        factor = target / total() if total() else 1.0
        for name, value in refined.items():
            refined[name] = value * factor
            if sizes[name] > minimum and (1 - value * factor) * sizes[name] < minimum:
                refined[name] = 1 - minimum / sizes[name]

    for _ in range(1000):
        scale_and_clamp()
        if total() >= target - 1e-12:
            return refined
    raise BudgetError(
        f"sparsity {target:g} with a minimum of {minimum} weights per layer cannot be reached; "
        f"the highest is {total():.6g}"
    )
