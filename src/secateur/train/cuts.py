"""Pruning in rounds: how many weights are left after each round, and which ones.

The counts of all rounds are fixed before the first training. A share of the *survivors* goes in each round,
so the density after n rounds is (1 - p)^n; the last round removes less, so that exactly the asked number
is left.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.counts import largest_remainder
from secateur.allocate.spread import Spread, choose
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, NumericsError, SettingsError
from secateur.core.method import Settings
from secateur.core.select import all_finite
from secateur.core.units import Layout, Site
from secateur.scores.weights import magnitude

GONE = -1.0  # below every magnitude
REFERENCE_COUNTS = "reference=True removes at least one weight more per round than asked: the count is not exact"
CONVOLUTIONS = (Layout.CONV, Layout.CONV_TRANSPOSED)


class Ranking(StrEnum):
    """Which weights compete."""

    LAYER = "layer"  # those of one layer: shallow networks
    GLOBAL = "global"  # all that are pruned: deep networks, whose layers differ in size by orders of magnitude


class CutSettings(Settings):
    """How much goes in each round, and from where."""

    ranking: Ranking = Field(Ranking.LAYER, description="layer: rates per layer; global: one ranking over all layers")
    rate: float = Field(0.2, gt=0, lt=1, description="share of the survivors that goes in each round")
    rate_conv: float | None = Field(
        None, gt=0, lt=1, description="the same for convolutions, layer-wise; default: rate (paper's Conv-2/4: 0.1)"
    )
    rate_output: float | None = Field(
        None, gt=0, lt=1, description="the same for the output layer, layer-wise; default: half of rate"
    )
    prune_output: bool | None = Field(
        None, description="whether the output layer is pruned; default: yes layer-wise, no in a global ranking"
    )
    output: str = Field("", description="name of the output layer's weight; default: the last layer's")
    rounds: int | None = Field(
        None,
        ge=1,
        description="number of rounds, rates scaled to fit; default: as many as the rates take to the asked density",
    )
    reference: bool = Field(
        False, description="the released codes' thresholds: at least one weight more per round, ties go together"
    )

    def output_of(self, sites: Mapping[str, Site]) -> str:
        """The output layer's weight.

        Raises:
            SettingsError: there is none of that name.
        """
        if self.output and self.output not in sites:
            raise SettingsError(f"output='{self.output}' is no weight that may be pruned; there are {list(sites)}")
        return self.output or list(sites)[-1]

    @property
    def spares_output(self) -> bool:
        """Whether the output layer stays whole."""
        return self.ranking is Ranking.GLOBAL if self.prune_output is None else not self.prune_output

    def rates(self, sites: Mapping[str, Site]) -> dict[str, float]:
        """Share of the survivors that goes from each layer; 0 for a layer that stays whole."""
        output = self.output_of(sites)
        layerwise = self.ranking is Ranking.LAYER

        def of(name: str) -> float:
            if name == output and self.spares_output:
                return 0.0
            if name == output and layerwise:
                return self.rate / 2 if self.rate_output is None else self.rate_output
            is_conv = sites[name].layout in CONVOLUTIONS
            return self.rate_conv if is_conv and layerwise and self.rate_conv is not None else self.rate

        return {name: of(name) for name in sites}


class Cuts:
    """The rounds of one run.

    Attributes:
        whole: layers that are not pruned.
        rounds: how many rounds there are; none for a sparsity of 0.
        counts: kept weights per group after 0, 1, ... rounds; a group is what is ranked together.

    Args:
        sites: what may be pruned.
        budget: what stays in the end, over all sites; its floor holds in every round.
        settings: how much goes when.

    Raises:
        BudgetError: the budget cannot be reached; gives the reachable range.
        SettingsError: the rounds do not fit the budget.
    """

    def __init__(self, sites: Mapping[str, Site], budget: Budget, settings: CutSettings):
        self.sites, self.settings, self.floor = dict(sites), settings, budget.floor
        self.rates = settings.rates(sites)
        self.whole = tuple(name for name, rate in self.rates.items() if not rate)
        self.groups = self._groups()
        sizes = {group: sum(sites[name].units for name in names) for group, names in self.groups.items()}
        rates = {group: self.rates[names[0]] for group, names in self.groups.items()}
        if settings.reference and settings.rounds is not None:
            raise SettingsError("reference=True removes the share that the rates say in every round; leave out rounds")
        keep = budget.keep(sum(sizes.values()))
        self.counts = round_counts(sizes, rates, keep, budget.floor, settings.rounds)
        self.rounds = len(self.counts) - 1

    def _groups(self) -> dict[str, tuple[str, ...]]:
        if self.settings.ranking is Ranking.LAYER:
            return {name: (name,) for name in self.sites}
        together = tuple(name for name in self.sites if name not in self.whole)
        return {"together": together, **{name: (name,) for name in self.whole}}

    def masks(self, index: int, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What stays after round `index` of what `masks` kept: the largest magnitudes of the trained weights.

        Raises:
            NumericsError: a weight is NaN or infinite; names the layer.
        """
        for name in self.sites:
            if not all_finite(weights[name]):
                raise NumericsError(f"'{name}' has NaN or infinite weights after training; lower the learning rate")
        if self.settings.reference:
            return self._reference_masks(masks, weights)
        found: dict[str, Tensor] = {}
        for group, names in self.groups.items():
            scores = {name: magnitude(weights[name]).masked_fill(~masks[name], GONE) for name in names}
            sites = {name: self.sites[name] for name in names}
            budget = Budget(self.counts[index][group], Quantity.UNITS, floor=self.floor)
            found |= choose(scores, sites, budget, Spread.GLOBAL)
        return {name: found[name] for name in self.sites}

    def _reference_masks(self, masks: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.settings.ranking is Ranking.GLOBAL:
            return reference_global(masks, weights, self.settings.rate, self.whole)
        return {
            name: reference_layer(masks[name], weights[name], rate, name) if rate else masks[name].clone()
            for name, rate in self.rates.items()
        }


def round_counts(
    sizes: Mapping[str, int], rates: Mapping[str, float], keep: int, floor: int = 0, rounds: int | None = None
) -> list[dict[str, int]]:
    """Kept weights per group after 0, 1, ... rounds; the last entry adds up to `keep` exactly.

    Args:
        sizes: group -> weights.
        rates: group -> share of the survivors that goes in a round, at most.
        keep: what is left in the end, over all groups.
        floor: no group falls below `min(floor, its size)`.
        rounds: fixed number of rounds: one factor on all rates makes it fit.

    Raises:
        BudgetError: `keep` is out of reach.
        SettingsError: more rounds than there is something to remove in.
    """
    if keep >= sum(sizes.values()):
        return [dict(sizes)]
    floors = {group: size if not rates[group] else min(floor, size) for group, size in sizes.items()}
    counts = _until(sizes, rates, floors, keep) if rounds is None else _scaled(sizes, rates, floors, keep, rounds)
    return [*counts[:-1], _trimmed(counts[-2], counts[-1], keep)]


def _step(counts: Mapping[str, int], rates: Mapping[str, float], floors: Mapping[str, int]) -> dict[str, int]:
    return {
        group: max(floors[group], count - math.floor(rates[group] * count + 1e-9)) for group, count in counts.items()
    }


def _until(
    sizes: Mapping[str, int], rates: Mapping[str, float], floors: Mapping[str, int], keep: int
) -> list[dict[str, int]]:
    counts = [dict(sizes)]
    while sum(counts[-1].values()) > keep:
        counts.append(_step(counts[-1], rates, floors))
        if counts[-1] == counts[-2]:
            raise BudgetError(
                f"rounds of this rate end at {sum(counts[-1].values())} weights, {keep} were asked for; raise the "
                "rate, lower the sparsity, or prune the layers that stay whole"
            )
    return counts


def _scaled(
    sizes: Mapping[str, int], rates: Mapping[str, float], floors: Mapping[str, int], keep: int, rounds: int
) -> list[dict[str, int]]:
    """The smallest common factor on the rates with which `rounds` rounds reach `keep`."""

    def counts(factor: float) -> list[dict[str, int]]:
        found = [dict(sizes)]
        for _ in range(rounds):
            found.append(_step(found[-1], {group: factor * rate for group, rate in rates.items()}, floors))
        return found

    def left(factor: float) -> int:
        return sum(counts(factor)[-1].values())

    low, high = 0.0, (1 - 1e-9) / max(rates.values())  # the highest rate that still leaves something
    if left(high) > keep:
        raise BudgetError(
            f"{rounds} rounds leave {left(high)} weights at least with these rates, {keep} were asked for; take more "
            "rounds, raise rate_output, or lower the sparsity"
        )
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > keep else (low, middle)
    found = counts(high)
    if sum(found[-2].values()) <= keep:
        raise SettingsError(f"{rounds} rounds are too many to remove {sum(sizes.values()) - keep} weights; take fewer")
    return found


def _trimmed(before: Mapping[str, int], after: Mapping[str, int], keep: int) -> dict[str, int]:
    """Between the counts before and after a round, in the same proportion everywhere, with an exact total."""
    first, last = sum(before.values()), sum(after.values())
    share = (first - keep) / (first - last)
    wanted = {group: before[group] - share * (before[group] - after[group]) for group in before}
    return largest_remainder(wanted, keep, before)


def reference_layer(mask: Tensor, weight: Tensor, rate: float, name: str) -> Tensor:
    """The authors' first code: `|w| <= sorted survivors[round(rate * survivors)]` goes, ties included.

    Raises:
        BudgetError: too few survivors for that index.
    """
    alive = weight.abs()[mask].sort().values
    index = round(rate * len(alive))
    if index >= len(alive):
        raise BudgetError(f"'{name}' has {len(alive)} weights left, too few for a rate of {rate:g}; stop earlier")
    return mask & (weight.abs() > alive[index])


def reference_global(
    masks: Mapping[str, Tensor], weights: Mapping[str, Tensor], rate: float, whole: tuple[str, ...] = ()
) -> dict[str, Tensor]:
    """OpenLTH: the count is `ceil(rate * all survivors)`, also those of layers that stay whole.

    It is taken from the others, and `|w| > sorted[count]` stays: one more goes than counted, ties included.

    Raises:
        BudgetError: too few survivors for that index.
    """
    count = math.ceil(rate * sum(int(mask.sum()) for mask in masks.values()))
    alive = torch.cat([weights[name].abs()[mask] for name, mask in masks.items() if name not in whole]).sort().values
    if count >= len(alive):
        raise BudgetError(
            f"only {len(alive)} weights are left to prune, a rate of {rate:g} takes {count}; stop earlier"
        )
    return {
        name: mask.clone() if name in whole else mask & (weights[name].abs() > alive[count])
        for name, mask in masks.items()
    }
