"""Taking chosen units out of whole layers: which layers, how many units of each, and copies that lack them."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from secateur.core.budget import Budget
from secateur.core.errors import SettingsError
from secateur.core.method import Batch, Task, matches
from secateur.core.plan import Plan
from secateur.core.units import Site
from secateur.data.example import describe_example
from secateur.scores.groups import group_scores, over_others
from secateur.shrink.apply import stamp
from secateur.shrink.cut import tensors_of
from secateur.shrink.structured import Members, StructuredSettings, View, wanted_sites, weight_places
from secateur.shrink.verify import cut_
from secateur.structure.analysis import analyse

Units = Mapping[str, list[int]]
"""Site -> removed units, ascending."""


class Layers:
    """The layers of a model that lose units, each a share of its own.

    Args:
        model: what copies are made of; it is always left as it was.
        example: inputs to find the structure with and to check every cut on.
        budget: what stays of every layer.
        kinds: kinds of unit, comma-separated.
        shares: own removed share for single layers, `pattern=share`, comma-separated; the last match counts.
        include, exclude: shell patterns over the weights that make the units; exclude wins.
        coupled: also units that several layers make together, as on residual streams.

    Attributes:
        sites: the layers that lose at least one unit.
        removals: site -> (its units, how many of them go).

    Raises:
        ModelError: no unit of these kinds can go.
        SettingsError: a pattern of `shares` matches no layer, or no layer loses a unit.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Batch,
        budget: Budget,
        *,
        kinds: str = "channel",
        shares: str = "",
        include: tuple[str, ...] = ("*",),
        exclude: tuple[str, ...] = (),
        coupled: bool = False,
    ):
        self.model, self.example, self.structure = model, example, analyse(model, example)
        task, asked = Task(model, budget), StructuredSettings(kinds=kinds, shares=shares)
        self.places = weight_places(View(model, self.structure, self.structure.sites, task), Members.PRODUCERS)

        def wanted(site: Site) -> bool:
            makers = {place.parameter for place in site.occurrences if (place.parameter, place.dim) in self.places}
            named = any(matches(name, include) for name in makers)
            spared = any(matches(name, exclude) for name in makers)
            return named and not spared and (coupled or len(makers) == 1)

        sites = wanted_sites(self.structure, task, asked, wanted)
        self.removals = _removals(sites, budget, asked.own_shares())
        self.sites = {name: sites[name] for name in self.removals}

    def norms(self) -> dict[str, Tensor]:
        """Site -> L1 norm of every unit, `[units]`, over the weights of the layers that make it."""
        tensors = tensors_of(self.model)

        def vector(name: str, dim: int) -> Tensor | None:
            return over_others(tensors[name], dim) if (name, dim) in self.places else None

        return {name: score.cpu() for name, score in group_scores(self.sites, vector).items()}

    def plan(self, removed: Units) -> Plan:
        """A plan for the model that these units were chosen in."""
        masks = {name: torch.ones(site.units, dtype=torch.bool) for name, site in self.sites.items()}
        for name, units in removed.items():
            masks[name][units] = False
        made = Plan(dict(self.sites), masks, example=describe_example(self.example))
        stamp(self.model, made)
        return made

    def smaller(self, removed: Units) -> nn.Module:
        """A new copy of the model, physically without these units; checked against the masked model."""
        undo = cut_(self.model, self.plan(removed), self.example, structure=self.structure)
        try:
            return copy.deepcopy(self.model)
        finally:
            undo()


def _removals(sites: Mapping[str, Site], budget: Budget, shares: list[tuple[str, float]]) -> dict[str, tuple[int, int]]:
    budgets = dict.fromkeys(sites, budget)
    for pattern, share in shares:
        named = [name for name in sites if any(fnmatchcase(n, pattern) for n in (name, name.partition(":")[0]))]
        if not named:
            raise SettingsError(f"shares: no layer matches '{pattern}'; there are {', '.join(sites)}")
        budgets |= dict.fromkeys(named, Budget(share))
    kept = {name: budgets[name].of(site.kind).keep(site.units) for name, site in sites.items()}
    found = {name: (site.units, site.units - kept[name]) for name, site in sites.items() if kept[name] < site.units}
    if not found:
        raise SettingsError(f"{budget} removes no whole unit from any of {', '.join(sites)}; ask for more")
    return found
