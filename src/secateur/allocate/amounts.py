"""How many weights every layer keeps, from response curves: the knapsack, and what its grid leaves over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor, inf

from secateur.allocate.knapsack import Choice, Item, knapsack


@dataclass(frozen=True)
class Amounts:
    """The amounts that one layer can lose.

    Attributes:
        size: its weights.
        most: weights that may stay: all, or those that are not removed yet.
        removed: weights gone at each amount, ascending; the last amount is the whole layer.
        distortions: what each amount does to the network's output.
        price: budget units that one kept weight costs: 1, or FLOPs.
        minimum: weights that stay at every amount, as far as there are so many.
    """

    size: int
    most: int
    removed: Sequence[int]
    distortions: Sequence[float]
    price: Fraction = Fraction(1)
    minimum: int = 0

    def cost(self, kept: int) -> int:
        """Budget units of `kept` weights."""
        return ceil(kept * self.price)

    def kept(self, d: int) -> int:
        """Weights that stay at amount d."""
        return min(max(self.size - self.removed[d], self.minimum), self.most)

    @property
    def first(self) -> int:
        """The amount at which the layer is as it is; smaller ones say the same."""
        same = [d for d in range(self.last + 1) if self.size - self.removed[d] >= self.most]
        return same[-1] if same else 0

    @property
    def last(self) -> int:
        """The largest amount on offer: the second to last, because a whole layer must not go."""
        return len(self.removed) - 2

    @property
    def item(self) -> Item:
        """The knapsack's candidates."""
        offered = range(self.last + 1)
        return Item([self.cost(self.kept(d)) for d in offered], self.distortions[: self.last + 1], self.first)

    def slope(self, d: int) -> float:
        """Distortion that one more budget unit takes away from amount d on."""
        larger = [e for e in range(self.first, d) if self.kept(e) > self.kept(d)]
        if not larger or not self.price:
            return -inf
        spent = self.price * (self.kept(larger[-1]) - self.kept(d))
        return (self.distortions[d] - self.distortions[larger[-1]]) / float(spent)


def present_cost(layers: Mapping[str, Amounts]) -> int:
    """Budget units of everything that may stay."""
    return sum(layer.cost(layer.most) for layer in layers.values())


def allocate(layers: Mapping[str, Amounts], limit: int, quantum: int | None = 1) -> tuple[dict[str, int], Choice]:
    """Weights kept in each layer, at least distortion and a total price of at most `limit`.

    Less than one step of the grid remains after the knapsack; it goes to the layers in the order of their
    slopes, so that a count of weights is met exactly.

    Args:
        layers: name -> amounts.
        limit: budget units for all layers together. Above what is there now nothing is removed.
        quantum: see `knapsack`.

    Returns:
        Counts, and the knapsack's solution; its `picks` are empty where nothing had to go.

    Raises:
        BudgetError: the limit is out of reach; gives the reachable range.
    """
    counts = {name: layer.most for name, layer in layers.items()}
    if present_cost(layers) <= limit:
        return counts, Choice({}, present_cost(layers), 0.0, 1, True)
    choice = knapsack({name: layer.item for name, layer in layers.items()}, limit, quantum)
    counts = {name: layer.kept(choice.picks[name]) for name, layer in layers.items()}
    spare = limit - choice.cost
    for name in sorted(layers, key=lambda name: -layers[name].slope(choice.picks[name])):
        layer, paid = layers[name], layers[name].cost(counts[name])
        if layer.price:
            counts[name] = max(counts[name], min(floor((paid + spare) / layer.price), layer.most))
        spare -= layer.cost(counts[name]) - paid
    return counts, choice
