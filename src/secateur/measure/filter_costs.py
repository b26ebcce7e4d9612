"""What a network costs whose layers lose filters of their own while all inputs keep their width.

It is linear in the counts, so exact and differentiable:

    cost(kept) = original + sum_l added_l - sum_l per_filter_l (filters_l - kept_l)

or, with what stands beside a layer merged into the filters that stay, original + sum_l (added_l / filters_l -
per_filter_l) (filters_l - kept_l).

That is so where something keeps a layer's output as wide as it was: a by-pass, a scatter among zeros. Where the next
layer gets fewer inputs, costs are products: see `Structure.flops`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor, nn

from secateur.core.method import Batch
from secateur.structure.dims import size
from secateur.structure.observe import observe


def flops_by_module(model: nn.Module, batch: Batch) -> dict[str, float]:
    """Module -> FLOPs of its own for one sample (multiply-add = 2), in the order of their first call.

    Raises:
        ModelError: the model cannot be run on the batch.
    """
    found: dict[str, float] = defaultdict(float)
    for product in observe(model, batch).products:
        found[product.module] += product.factor * prod(map(size, product.dims)) / batch.samples
    return dict(found)


@dataclass(frozen=True)
class FilterCosts:
    """Costs by layer, in whatever is counted.

    Attributes:
        original: of the whole network as it came.
        filters: layer -> how many it has.
        per_filter: layer -> what goes with one filter.
        added: layer -> what stands beside it from now on: by-passes are not free.
        merged: whether filters that stay need nothing beside them; otherwise `added` is paid whatever is kept.
    """

    original: float
    filters: Mapping[str, int]
    per_filter: Mapping[str, float]
    added: Mapping[str, float]
    merged: bool = False

    def beside(self, layer: str, kept: float) -> float:
        """What stands beside a layer that keeps so many filters."""
        return self.added[layer] * (1 - kept / self.filters[layer] if self.merged else 1)

    def saved(self, layer: str) -> float:
        """What really goes with one filter."""
        return self.per_filter[layer] - (self.added[layer] / self.filters[layer] if self.merged else 0)

    def total(self, kept: Mapping[str, int]) -> float:
        """The cost with so many filters in the layers; in layers that are not named, all of them."""
        gone = sum(self.saved(name) * (self.filters[name] - count) for name, count in kept.items())
        return self.whole - gone

    @property
    def whole(self) -> float:
        """The cost with all filters."""
        return self.original + sum(self.beside(name, count) for name, count in self.filters.items())

    def share(self, gates: Mapping[str, Tensor]) -> Tensor:
        """The same as a share of the original, a scalar, differentiable in gates `[filters]`; above 1 with additions.

        Straight-through gates give the exact share and a gradient to what they were made of.
        """
        found = next(iter(gates.values())).new_tensor(self.whole / self.original)
        for name, gate in gates.items():
            found = found - self.saved(name) / self.original * (self.filters[name] - gate.sum()).to(found.device)
        return found

    def least(self, floor: int) -> float:
        """The cost with `floor` filters in every layer that has so many."""
        return self.total({name: min(floor, count) for name, count in self.filters.items()})
