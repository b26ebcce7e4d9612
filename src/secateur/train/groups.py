"""The weights of every unit of some sites: how large they are, and what pulls them towards zero.

A group is everything that goes with one unit: index i along a dimension of one or several parameters. Groups of two
sites may share weights (a filter that makes channel i and reads channel j); each then acts on them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.units import Site
from secateur.scores.groups import Combine, group_scores, over_others
from secateur.train.sharding import is_sharded

Along = tuple[str, Tensor]
"""A site, and for each of its units the indices that it owns, `[units, width]`."""


class Groups:
    """Live parameters, seen unit by unit.

    Args:
        model: whose parameters are read and written; they may be moved to a device later.
        sites: name -> structured site.
        places: the (parameter, dimension) pairs that count; others of the sites' occurrences are left alone.

    Attributes:
        parameters: name -> what takes part.
        sizes: site -> weights in the group of one unit.

    Raises:
        ModelError: a parameter is spread over processes.
    """

    def __init__(self, model: nn.Module, sites: Mapping[str, Site], places: Collection[tuple[str, int]]):
        known = dict(model.named_parameters())
        self.sites, self.places = dict(sites), {place for place in places if place[0] in known}
        self.along: dict[tuple[str, int], list[Along]] = defaultdict(list)
        for name, site in self.sites.items():
            for place in site.occurrences:
                if (place.parameter, place.dim) in self.places:
                    self.along[place.parameter, place.dim].append((name, place.indices(site.units)))
        self.parameters = {name: known[name] for name, _ in self.along}
        sharded = next((name for name, parameter in self.parameters.items() if is_sharded(parameter)), None)
        if sharded is not None:
            raise ModelError(
                f"'{sharded}' is spread over processes, and a group needs its weights in one place; train this method "
                "without sharding"
            )
        counts = group_scores(self.sites, self._others, Combine.SUM)
        self.sizes = {name: int(count[0]) for name, count in counts.items()}

    def _others(self, name: str, dim: int) -> Tensor | None:
        if (name, dim) not in self.along:
            return None
        shape = self.parameters[name].shape
        return torch.full((shape[dim],), float(shape.numel() // shape[dim]), dtype=torch.float64)

    def sums(self, power: float = 1.0) -> dict[str, Tensor]:
        """Site -> sum of |w| ** power over the group of every unit, `[units]`, float32."""

        def vector(name: str, dim: int) -> Tensor | None:
            return over_others(self.parameters[name], dim, power) if (name, dim) in self.along else None

        return group_scores(self.sites, vector, Combine.SUM)

    @torch.no_grad()
    def scale_(self, factors: Mapping[str, Tensor]) -> None:
        """Multiply the weights of every unit by its factor, site -> `[units]`; shared ones by each of theirs."""
        for (name, dim), parts in self.along.items():
            parameter = self.parameters[name].detach()
            parameter.mul_(_spread(parameter, dim, parts, factors, 1.0))

    @torch.no_grad()
    def pull(self, rates: Mapping[str, Tensor], direction: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
        """Add rate * direction(weight) to the gradients, site -> `[units]`; parameters without a gradient do not move.

        The identity gives the gradient of rate / 2 * ||w||^2, `torch.sign` a subgradient of rate * |w|.
        """
        for (name, dim), parts in self.along.items():
            parameter = self.parameters[name]
            if parameter.grad is not None:
                rate = _spread(parameter, dim, parts, rates, 0.0)
                parameter.grad.add_(rate * direction(parameter.detach()))


def _spread(parameter: Tensor, dim: int, parts: list[Along], values: Mapping[str, Tensor], rest: float) -> Tensor:
    """Numbers of units as numbers of indices along one dimension, shaped to multiply the parameter."""
    found = torch.full((parameter.shape[dim],), rest, device=parameter.device)
    for name, indices in parts:
        if name in values:
            own = values[name].to(found.device, found.dtype)
            found[indices.to(found.device).flatten()] = own.repeat_interleave(indices.shape[1])
    return found.view([-1 if d == dim else 1 for d in range(parameter.dim())])
