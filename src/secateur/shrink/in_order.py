"""Units taken from one site after the other, each time those with the smallest weights in what is left."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.core.errors import ModelError
from secateur.core.plan import Plan
from secateur.core.select import check_scores, keep_top
from secateur.scores.groups import group_scores, over_others
from secateur.shrink.cut import removed_indices, smaller, tensors_of
from secateur.shrink.structured import Members, View, Work, weight_places
from secateur.train.study import Masks

Removed = Mapping[str, int]
"""Site -> how many of its units go, in the order in which the sites are cut."""
Steps = tuple[tuple[str, int], ...]


class InOrder:
    """Keep-masks for counts that are cut one site after the other.

    A unit's score is the sum over the layers that make it of the mean |w| of its weights (power 1; 2: the root of
    the mean square), weights that read units already gone left out. Of a single layer that ranks as the norm does.

    Args:
        work: the model and its sites.
        start: what is there when nothing is cut yet; default: everything.
        power: of the weights.

    Attributes:
        sites: those whose units some layer makes.

    Raises:
        ModelError: there is none.
    """

    def __init__(self, work: Work, start: Masks | None = None, power: int = 1):
        self.work, self.power = work, power
        self.start = start or {name: torch.ones(site.units, dtype=torch.bool) for name, site in work.sites.items()}
        view = View(work.task.model, work.structure, work.sites, work.task)
        self.places = weight_places(view, Members.PRODUCERS)
        self.tensors = tensors_of(work.task.model)
        own = {name: {(place.parameter, place.dim) for place in site.occurrences} for name, site in work.sites.items()}
        self.sites = {name: site for name, site in work.sites.items() if own[name] & self.places}
        if not self.sites:
            raise ModelError("no linear layer or convolution makes the units that may be cut; include others")
        self._masks: dict[Steps, Masks] = {(): self.start}
        self._scores: dict[tuple[Steps, str], Tensor] = {}

    def counts(self, removed: Removed) -> dict[str, int]:
        """Kept units of every site."""
        kept = {name: int(mask.sum()) for name, mask in self.start.items()}
        return kept | {name: kept[name] - count for name, count in removed.items()}

    def masks(self, removed: Removed) -> Masks:
        """What stays of every site."""
        done: Steps = ()
        for step in removed.items():
            before, done = done, (*done, step)
            if done not in self._masks:
                self._masks[done] = self._after(before, *step)
        return self._masks[done]

    def ranked(self, removed: Removed) -> dict[str, Tensor]:
        """The scores of every site when it was cut; of those that are not, in the end."""
        found, masks = dict[str, Tensor](), self.masks(removed)
        done: Steps = ()
        for step in removed.items():
            found[step[0]] = self._scores[done, step[0]]
            done = (*done, step)
        return {name: found[name] if name in found else self.scores(name, masks) for name in self.sites}

    def scores(self, name: str, masks: Masks) -> Tensor:
        """How large the units of a site are in a model cut by masks, `[units]`, float32.

        Raises:
            NumericsError: NaN weights; names the site.
        """
        gone = removed_indices(Plan(dict(self.work.sites), masks))

        def vector(parameter: str, dim: int) -> Tensor | None:
            if (parameter, dim) not in self.places:
                return None
            others = {d: index for d, index in gone.get(parameter, {}).items() if d != dim}
            tensor = smaller(self.tensors[parameter].detach(), others)
            mean = over_others(tensor, dim, self.power) / (tensor.numel() / tensor.shape[dim])
            return mean ** (1 / self.power)

        found = group_scores({name: self.sites[name]}, vector)[name].cpu()
        return check_scores(found, name)

    def _after(self, before: Steps, name: str, count: int) -> Masks:
        masks = self._masks[before]
        if (before, name) not in self._scores:
            self._scores[before, name] = self.scores(name, masks)
        alive = masks[name]
        ranked = self._scores[before, name].masked_fill(~alive, -torch.inf)
        return {**masks, name: keep_top(ranked, int(alive.sum()) - count)}
