"""Structured cuts on trial: a model without chosen units, its losses, and how far it is from a budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from secateur.allocate.adaptive import Goal
from secateur.core.budget import COSTS, Budget, Quantity
from secateur.core.errors import BudgetError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.data.losses import TaskLosses, mean_losses
from secateur.search.greedy import Taken
from secateur.shrink.cut import cut_out
from secateur.shrink.goals import goals_of
from secateur.shrink.in_order import InOrder
from secateur.shrink.structured import Work


@dataclass(frozen=True, eq=False)
class Trying:
    """Units taken from sites in an order (`Taken`: site -> how many), and what the model is then.

    Attributes:
        work: the model and its sites.
        cuts: which units go.
        batches: what losses are measured on.
        losses: of every task.
    """

    work: Work
    cuts: InOrder
    batches: Sequence[Batch]
    losses: TaskLosses

    def measured(self, removed: Taken) -> dict[str, float]:
        """Every task's loss, on a model that is really cut."""
        model = self.work.task.model
        with cut_out(model, Plan(dict(self.work.sites), self.cuts.masks(removed)), self.work.structure):
            return mean_losses(model, self.batches, self.losses)

    def flops(self, removed: Taken) -> float:
        """FLOPs that are left."""
        return self.work.structure.flops(self.cuts.counts(removed))

    @cached_property
    def goals(self) -> list[Goal]:
        """What the budget asks."""
        return goals_of(self.work)

    def met(self, removed: Taken) -> bool:
        """Whether the budget is met."""
        counts = self.cuts.counts(removed)
        return all(goal.met(counts) for goal in self.goals)

    def achieved(self, removed: Taken) -> str:
        """What is left as a share of the dense model, in the budget's terms."""
        counts, dense = self.cuts.counts(removed), {name: site.units for name, site in self.work.sites.items()}
        shares = " and ".join(f"{goal.spent(counts) / goal.spent(dense):.4g}" for goal in self.goals)
        quantity = self.work.budget.quantity
        return f"{shares} of the {quantity if quantity in COSTS or quantity is Quantity.PARAMETERS else 'units'}"

    def levels(self, name: str, ratios: Sequence[float]) -> list[int]:
        """How many units of a site go at ratios of its present width: `floor(ratio * width)`, but never all.

        Widths that machines or the code ask for are kept; zeros and repetitions are left out.
        """
        site, width = self.work.sites[name], self.cuts.counts({})[name]
        gone = [min(Budget(ratio, Quantity.DENSITY).keep(width), width - 1) for ratio in ratios]
        # the largest ratio bounds what goes from the present width, not from the dense one
        widths = replace(self.work.widths, smallest_share=(width - max(gone, default=0)) / site.units)
        kept = [widths.rounded(site, width - count) for count in gone]
        return sorted({width - count for count in kept if count < width})

    def refuse_unreachable(self, ratios: Sequence[float]) -> None:
        """Say before a long search that even the largest ratios would not do.

        Raises:
            BudgetError: gives what is reachable.
        """
        least = {name: levels[-1] for name in self.cuts.sites if (levels := self.levels(name, ratios))}
        if not self.met(least):
            raise BudgetError(
                f"{self.work.budget} is out of reach: with ratios up to {max(ratios):g} {self.achieved(least)} is the "
                "least that stays; allow larger ratios or more layers, or ask for another amount"
            )
