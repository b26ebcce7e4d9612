"""The best choice of one candidate per item under a budget: the multiple-choice knapsack, solved exactly.

Response curves become allocations with it: an item is a layer, a candidate an amount to remove, the cost
what then stays (weights, FLOPs, any integer) and the loss what the removal does. Dynamic programming needs
no convex curves, which greedy and Lagrangian choices do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import fsum, gcd, inf, isnan

import numpy as np

from secateur.core.errors import BudgetError, NumericsError

STATES = 100_000  # of the table, beyond which an automatic quantum makes it coarser


@dataclass(frozen=True)
class Item:
    """The candidates of one item, the preferred one first.

    Attributes:
        costs: integers, 0 or more, in any order.
        losses: what each candidate does to the objective; infinity forbids it.
        least: candidates before this one are not allowed.
    """

    costs: Sequence[int]
    losses: Sequence[float]
    least: int = 0

    @property
    def allowed(self) -> list[int]:
        """Indices that may be chosen."""
        return [d for d in range(self.least, len(self.costs)) if self.losses[d] < inf]


@dataclass(frozen=True)
class Choice:
    """What `knapsack` decides.

    Attributes:
        picks: item -> index of its candidate.
        cost: sum of the exact costs, never above the budget.
        loss: sum of the losses.
        quantum: costs were rounded up to multiples of it.
        exact: whether nothing was lost by that.
    """

    picks: dict[str, int]
    cost: int
    loss: float
    quantum: int
    exact: bool


def knapsack(items: Mapping[str, Item], budget: int, quantum: int | None = 1) -> Choice:
    """Choose one candidate of every item so that the sum of losses is least and the costs fit the budget.

    With D_l[j] the least loss of the first l items at a total cost of at most j,
    D_l[j] = min over d of loss_l(d) + D_{l-1}[j - cost_l(d)]: O(items * candidates * budget / quantum)
    time. Of equally good candidates the first is taken.

    Args:
        items: name -> candidates.
        budget: highest total cost.
        quantum: costs are counted in multiples of it, each rounded up, so the budget holds and the
            choice may be a little worse. 1 is exact; None takes the finest that needs no more than
            `STATES` states.

    Raises:
        BudgetError: even the cheapest candidates do not fit; gives the reachable range.
        NumericsError: a loss is NaN.
    """
    if quantum is not None and quantum < 1:
        raise BudgetError(f"the quantum of a knapsack must be 1 or more, got {quantum}")
    _check(items, budget)
    common = gcd(*(cost for item in items.values() for cost in item.costs)) or 1
    unit = max(common, quantum or common * -(-budget // (common * STATES)))
    units = {name: [-(-cost // unit) for cost in item.costs] for name, item in items.items()}
    _fits(items, units, budget // unit, f"; at a quantum of {unit} costs are rounded up")
    order = sorted(items, key=lambda name: max(units[name]))  # the smallest first, as in the paper
    room = min(budget // unit, sum(map(max, units.values())))
    table, taken = np.zeros(room + 1), []
    for name in order:
        table, best = _with(table, items[name], units[name])
        taken.append(best)
    picks: dict[str, int] = {}
    for name, best in zip(reversed(order), reversed(taken), strict=True):
        picks[name] = int(best[room])
        room -= units[name][picks[name]]
    return Choice(
        picks={name: picks[name] for name in items},
        cost=sum(item.costs[picks[name]] for name, item in items.items()),
        loss=fsum(item.losses[picks[name]] for name, item in items.items()),
        quantum=unit,
        exact=unit == common,
    )


def _with(table: np.ndarray, item: Item, costs: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """D_l from D_{l-1}, and the candidate that each state takes."""
    found = np.full_like(table, inf)
    best = np.zeros(table.size, dtype=np.min_scalar_type(len(costs)))
    for d in item.allowed:
        cost = costs[d]
        if cost < table.size:
            losses = table[: table.size - cost] + item.losses[d]
            better = losses < found[cost:]
            np.copyto(found[cost:], losses, where=better)
            np.putmask(best[cost:], better, d)
    return found, best


def _check(items: Mapping[str, Item], budget: int) -> None:
    for name, item in items.items():
        if len(item.costs) != len(item.losses) or any(cost < 0 for cost in item.costs):
            raise BudgetError(f"'{name}' must give one loss and one cost of 0 or more for every candidate")
        if any(map(isnan, item.losses)):
            raise NumericsError(f"a loss of '{name}' is NaN; give infinity for what must not be chosen")
        if not item.allowed:
            raise BudgetError(f"'{name}' has no candidate that may be chosen")
    _fits(items, {name: item.costs for name, item in items.items()}, budget, "")


def _fits(items: Mapping[str, Item], costs: Mapping[str, Sequence[int]], budget: int, remark: str) -> None:
    least = sum(min(costs[name][d] for d in item.allowed) for name, item in items.items())
    most = sum(max(costs[name][d] for d in item.allowed) for name, item in items.items())
    if least > budget:
        raise BudgetError(
            f"the cheapest candidates of {len(items)} items cost {least} together, the budget is {budget}; "
            f"the reachable range is {least} to {most}{remark}"
        )
