"""Layer densities as real numbers: where a budget goes before it is rounded to whole weights.

Pure functions from the shapes of the layers and the number of weights to keep, `total`, to the number
each layer should keep. The numbers add up to `total`, none passes its layer's size. Sources: uniform
and uniform+ (Gale, Elsen, Hooker 2019), ER (Mocanu et al. 2018), ERK (Evci et al. 2020), ERK+ and all
of them side by side (Liu et al. 2022, arXiv 2202.02643).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from secateur.core.errors import BudgetError, UnknownNameError

Shapes = Mapping[str, tuple[int, ...]]
Shares = dict[str, float]


@dataclass(frozen=True)
class Ends:
    """What the rules leave open: the exponent, and which layers the plus variants treat apart.

    Attributes:
        power: exponent of the Erdos-Renyi factors.
        first: layer that `uniform_plus` leaves dense; None: the first one if it is a convolution.
        classifier: layer that the plus variants treat apart; None: the last one.
        classifier_density: density of the classifier under `erk_plus`.
        classifier_least: lowest density of the classifier under `uniform_plus`.
        dense_stem: whether `uniform_plus` leaves the first layer dense at all.
    """

    power: float = 1.0
    first: str | None = None
    classifier: str | None = None
    classifier_density: float = 1.0
    classifier_least: float = 0.2
    dense_stem: bool = True

    def stem_of(self, shapes: Shapes) -> str | None:
        """The layer that stays dense; a linear first layer is no stem and often the largest of all."""
        if not self.dense_stem:
            return None
        if self.first is not None:
            return _known(self.first, shapes)
        name = next(iter(shapes))
        return name if len(shapes[name]) > 2 else None

    def classifier_of(self, shapes: Shapes) -> str:
        """The layer that makes the logits."""
        return next(reversed(list(shapes))) if self.classifier is None else _known(self.classifier, shapes)


PLAIN = Ends()


def _known(name: str, shapes: Shapes) -> str:
    found = next((known for known in shapes if known in (name, f"{name}.weight")), None)
    if found is None:
        raise UnknownNameError("layer", name, shapes)
    return found


def uniform(shapes: Shapes, total: float) -> Shares:
    """The same density everywhere."""
    sizes = _sizes(shapes)
    everything = sum(sizes.values())
    return {name: size * total / everything for name, size in sizes.items()}


def uniform_plus(shapes: Shapes, total: float, ends: Ends = PLAIN) -> Shares:
    """First convolution dense, classifier at max(density, 0.2), one density for the rest, total exact.

    The official code divides what is left by the number of *all* weights and so ends sparser than asked.

    Raises:
        BudgetError: the two layers alone need more than the total.
    """
    sizes = _sizes(shapes)
    classifier = ends.classifier_of(shapes)
    density = total / sum(sizes.values())
    fixed = {classifier: max(density, ends.classifier_least) * sizes[classifier]}
    if (stem := ends.stem_of(shapes)) is not None:
        fixed[stem] = sizes[stem]
    return _around(fixed, shapes, total, uniform)


def er(shapes: Shapes, total: float, power: float = 1.0) -> Shares:
    """Erdos-Renyi: density proportional to (out + in) / (out * in), whatever the kernel."""
    return _proportional(
        {name: (sum(shape[:2]) / prod(shape[:2])) ** power for name, shape in shapes.items()}, shapes, total
    )


def erk(shapes: Shapes, total: float, power: float = 1.0) -> Shares:
    """Erdos-Renyi-kernel: density proportional to sum(shape) / prod(shape), kernel included."""
    return _proportional({name: (sum(shape) / prod(shape)) ** power for name, shape in shapes.items()}, shapes, total)


def erk_plus(shapes: Shapes, total: float, ends: Ends = PLAIN) -> Shares:
    """The classifier at a fixed density, its cost taken off the budget, ERK on the rest.

    Raises:
        BudgetError: the classifier needs more than the total, or the rest cannot hold what is left.
    """
    classifier = ends.classifier_of(shapes)
    fixed = {classifier: ends.classifier_density * prod(shapes[classifier])}
    return _around(fixed, shapes, total, lambda rest, left: erk(rest, left, ends.power))


def densities(shares: Shares, shapes: Shapes) -> dict[str, float]:
    """Kept weights as fractions of the layers, in [0, 1]."""
    return {name: share / prod(shapes[name]) for name, share in shares.items()}


def _sizes(shapes: Shapes) -> dict[str, int]:
    return {name: prod(shape) for name, shape in shapes.items()}


def _proportional(factors: Mapping[str, float], shapes: Shapes, total: float) -> Shares:
    """Densities eps * factor, at most 1, with eps such that the total is met.

    Every layer that would pass 1 is dense, its weights leave both sides of the equation, and the rest
    is solved again. eps only grows from round to round, so no dense layer has to come back.
    """
    sizes = _sizes(shapes)
    dense: set[str] = set()
    while True:
        free = [name for name in shapes if name not in dense]
        left = total - sum(sizes[name] for name in dense)
        scale = left / sum(factors[name] * sizes[name] for name in free) if free else 0.0
        full = {name for name in free if scale * factors[name] > 1}
        if not full:
            return {
                name: float(sizes[name]) if name in dense else scale * factors[name] * sizes[name] for name in shapes
            }
        dense |= full


def _around(
    fixed: Mapping[str, float], shapes: Shapes, total: float, rule: Callable[[Shapes, float], Shares]
) -> Shares:
    """Some layers' counts given, `rule` on the rest.

    Where no layer is left for the rule, the first fixed one (the classifier) takes what the others leave.
    """
    if len(fixed) == len(shapes):
        fixed = dict(list(fixed.items())[1:])
    rest = {name: shape for name, shape in shapes.items() if name not in fixed}
    left, room = total - sum(fixed.values()), sum(_sizes(rest).values())
    slack = 1e-9 * (total + 1)
    if not -slack <= left <= room + slack:
        apart = " and ".join(f"'{name}' {count:g}" for name, count in fixed.items())
        raise BudgetError(
            f"{total:g} kept weights do not go with the layers that are treated apart: {apart}; the other layers can "
            f"keep 0 to {room}; choose another sparsity or another spread"
        )
    shares = rule(rest, min(max(left, 0.0), room))
    return {name: fixed[name] if name in fixed else shares[name] for name in shapes}
