"""How much each of several places may worsen: a geometric sequence whose product is fixed (Ye et al. 2023)."""

from __future__ import annotations

from math import exp, inf, log, log1p

from secateur.core.errors import SettingsError

PRECISION = 1e-12


def tolerance_factor(first: float, places: int, product: float) -> float:
    """Lambda > 0 with prod over i < places of (1 + first * lambda**i) = product, by bisection.

    The left side grows with lambda, so there is one. With a single place the product is `1 + first`, whatever lambda:
    1 is returned.

    Args:
        first: r, the first tolerance, as a fraction of a loss.
        places: n.
        product: T, by what factor everything together may worsen.

    Raises:
        SettingsError: r is not positive, or T is not above 1 + r, so that nothing is left after the first place.
    """
    if not first > 0:
        raise SettingsError(f"the first tolerance must be above 0, got {first:g}")
    if not 1 + first < product < inf:
        raise SettingsError(
            f"the product of all tolerances must be above 1 + {first:g} = {1 + first:g}, which the first alone takes; "
            f"got {product:g}"
        )
    if places < 2:
        return 1.0
    wanted = log(product)

    def enough(factor: float) -> bool:
        step = log(factor)
        return sum(_log1p_exp(log(first) + place * step) for place in range(places)) >= wanted

    low, high = 0.0, 1.0
    while not enough(high):
        low, high = high, 2 * high
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        if middle in (low, high):
            break
        low, high = (low, middle) if enough(middle) else (middle, high)
    return (low + high) / 2


def _log1p_exp(x: float) -> float:
    """log(1 + e^x) without overflow."""
    return x + log1p(exp(-x)) if x > 0 else log1p(exp(x))
