"""What a budget asks of methods that cut structured units in small steps until it is met."""

from __future__ import annotations

from secateur.allocate.adaptive import Goal
from secateur.allocate.structured import Counts, target_of
from secateur.shrink.structured import Work
from secateur.train.stages import stage_targets


def goals_of(work: Work, stage: int = 1, stages: int = 1) -> list[Goal]:
    """Units of all sites, or of each kind apart where the budget says so, or a cost of the whole model.

    Args:
        work: sites and budget.
        stage: 1 to `stages`: the goal of an earlier one is the same share of the way, in integers.
        stages: in how many the budget is reached.
    """
    budget = work.task.budget
    dense = {name: site.units for name, site in work.sites.items()}
    if work.cost is not None:
        target = target_of(budget, work.cost(dense))
        if stage < stages:
            target = stage_targets(int(work.cost(dense)), int(target), stages)[stage - 1]
        return [Goal(tuple(dense), work.cost, target)]
    kinds = dict.fromkeys(site.kind for site in work.sites.values()) if budget.per_kind else [None]
    found = []
    for kind in kinds:
        own = {name: site.units for name, site in work.sites.items() if kind in (None, site.kind)}
        keep = (budget if kind is None else budget.of(kind)).keep(units(own))
        found.append(Goal(tuple(own), units, stage_targets(units(own), keep, stages)[stage - 1]))
    return found


def units(counts: Counts) -> int:
    """Kept units of all sites together."""
    return sum(counts.values())
