"""A budget as ranks: one share of energy for all layers, and what that leaves to those with most to regain."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import floor

from secateur.allocate.knapsack import Item, knapsack
from secateur.allocate.structured import TOLERANCE, Counts, Goal, meet_cost, target_of
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError
from secateur.core.method import Batch
from secateur.core.units import UnitKind
from secateur.scores.spectrum import Rule, Spectrum
from secateur.shrink.ranks import RankLayers

AROUND = 16  # ranks more or less that are looked at where the nearest ones miss a budget
NOTHING = 1e-9  # share of a layer's energy that is no more than rounding


@dataclass(frozen=True)
class RankBudget:
    """What may stay of a model whose layers are factorised.

    Attributes:
        layers: that may be.
        spectra: of the layers.
        budget: a share of parameters, or an amount of parameters or FLOPs.
        goal: the same as a cost.
    """

    layers: RankLayers
    spectra: Mapping[str, Spectrum]
    budget: Budget
    goal: Goal

    @classmethod
    def of(
        cls, layers: RankLayers, spectra: Mapping[str, Spectrum], budget: Budget, example: Callable[[], Batch]
    ) -> RankBudget:
        """A budget of these layers; only FLOPs ask for an example.

        Raises:
            BudgetError: it counts something else than parameters or FLOPs.
        """
        budget = budget.of(UnitKind.RANK)
        cost = layers.cost(budget, example)
        dense = cost({name: layer.full for name, layer in layers.layers.items()})
        return cls(layers, spectra, budget, Goal(cost, target_of(budget, dense), TOLERANCE * dense))

    def counts(self, *, near: bool = True) -> Counts:
        """Ranks that meet the budget: the largest share of energy, common to all layers, that it allows.

        No layer falls below the budget's floor; one that would not get smaller or cheaper stays whole. What is left of
        the budget goes to single layers, those with most to regain first, until it is met within 1 %.

        Args:
            near: refuse what is not met within 1 % while there is energy to regain.

        Raises:
            BudgetError: out of reach, or not met; gives what is reachable.
        """
        layers = self.layers.layers
        least = {name: min(layer.full, max(1, self.budget.floor)) for name, layer in layers.items()}
        sites = {name: layer.site for name, layer in layers.items()}

        def at(share: float) -> Counts:
            if share >= 1:
                return self.layers.worth(least)
            found = {name: self.spectra[name].rank(Rule.ENERGY, 1 - share) for name in sites}
            return self.layers.worth({name: max(rank, least[name]) for name, rank in found.items()})

        counts = self._rearranged(self._filled(meet_cost(at, sites, self.budget, self.goal.cost, 1.0)))
        if near and (why := self.missed(counts)):
            raise BudgetError(f"{why}; ask for another amount or exclude layers")
        return counts

    def missed(self, counts: Counts) -> str:
        """By how much ranks are below the budget, in words; empty where it is met or no energy is lost."""
        more = [counts | {name: rank} for name in counts if (rank := self._more(name, counts))]
        if self.goal.met(counts) or not more:
            return ""
        dense = self.goal.tolerance / TOLERANCE
        return (
            f"{self.budget} was not met within {TOLERANCE:.0%}: the nearest whole ranks that were found leave "
            f"{self.goal.cost(counts) / dense:.4g}, and one rank more {min(map(self.goal.cost, more)) / dense:.4g}, of "
            f"the dense {'FLOPs' if self.budget.quantity is Quantity.FLOPS else 'parameters'}"
        )

    def _more(self, name: str, counts: Mapping[str, int]) -> int:
        """The next rank that is worth having above a layer's; 0 if it is whole or has lost nothing."""
        layer, rank = self.layers.layers[name], counts[name]
        if rank == layer.full or 1 - self.spectra[name].energy(rank) <= NOTHING:
            return 0
        return rank + 1 if layer.pays(rank + 1) else layer.full

    def _rearranged(self, counts: Counts) -> Counts:
        """Where the budget is not met: other ranks near these, with most energy or else as near as whole ranks come."""
        if not self.missed(counts):
            return counts
        layers = self.layers.layers
        whole = {name: layer.full for name, layer in layers.items()}
        dense = self.goal.cost(whole)
        ranks = {name: self._near(name, rank) for name, rank in counts.items()}
        saved = {name: [dense - self.goal.cost(whole | {name: rank}) for rank in ranks[name]] for name in ranks}
        costs = {name: [round(max(found) - one) for one in found] for name, found in saved.items()}
        room = floor(self.goal.target) - round(dense) + sum(round(max(found)) for found in saved.values())
        lost = {name: [1 - self.spectra[name].energy(rank) for rank in ranks[name]] for name in ranks}
        unused = {name: [float(max(found) - one) for one in found] for name, found in costs.items()}
        for losses in (lost, unused):
            picks = knapsack({name: Item(costs[name], losses[name]) for name in ranks}, room, None).picks
            found = {name: ranks[name][pick] for name, pick in picks.items()}
            if self.goal.met(found):
                return found
            counts = max(counts, found, key=self.goal.cost)
        return counts

    def _near(self, name: str, rank: int) -> list[int]:
        """The ranks of a layer around one, and the full one, as far as they are worth having; the highest first."""
        layer = self.layers.layers[name]
        around = range(min(layer.full, rank + AROUND), max(0, min(rank, self.budget.floor or 1) - 1, rank - AROUND), -1)
        return sorted({layer.full, rank, *filter(layer.pays, around)}, reverse=True)

    def _filled(self, counts: Counts) -> Counts:
        """Give ranks back where most of a layer's energy comes with them, while the budget allows and is not met."""

        def entry(name: str) -> tuple[float, str]:
            spectrum = self.spectra[name]
            return spectrum.energy(counts[name]) - spectrum.energy(self._more(name, counts)), name

        heap = [entry(name) for name in counts if self._more(name, counts)]
        heapify(heap)
        while heap and not self.goal.met(counts):
            name = heappop(heap)[1]
            more = counts | {name: self._more(name, counts)}
            if self.goal.cost(more) <= self.goal.target:
                counts = more
                if self._more(name, counts):
                    heappush(heap, entry(name))
        return counts
