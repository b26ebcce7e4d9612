"""From scores of structured units and a budget to kept units: exact counts, widths that machines like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from math import ceil, floor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError
from secateur.core.select import check_scores, keep_top
from secateur.core.units import Site, UnitKind

TOLERANCE = 0.01  # of the dense model's cost: how near a budget must be met

Counts = dict[str, int]
Cost = Callable[[Counts], float]
Owners = np.ndarray[Any, np.dtype[np.int64]]


class Scope(StrEnum):
    """Which units are compared with each other."""

    LOCAL = "local"  # within a site: every site loses the same share
    GLOBAL = "global"  # all units of all sites in one ranking
    ISOMORPHIC = "isomorphic"  # sites of the same form in one ranking (Fang et al. 2024)


class Normalise(StrEnum):
    """What makes scores of different sites comparable."""

    NONE = "none"
    MEAN = "mean"
    MAX = "max"
    STANDARD = "standard"


@dataclass(frozen=True)
class Widths:
    """What kept widths must look like.

    Attributes:
        scope: which units are compared.
        multiple: kept counts are multiples of this where a site has at least 8 of them; 1 for any width.
        minimum: every site keeps at least this many.
        smallest_share: and at least this share of its units.
        uniform: sites of the same form keep the same number, so that a plain config can say it.
        hard: site -> multiple that its kernel asks for.
        least: site -> number that its code asks for.
        fixed: site -> kept units that are given.
    """

    scope: Scope = Scope.LOCAL
    multiple: int = 1
    minimum: int = 1
    smallest_share: float = 0.0
    uniform: bool = False
    hard: Mapping[str, int] = field(default_factory=dict)
    least: Mapping[str, int] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)

    def step(self, site: Site) -> int:
        """The multiple that a site's kept count is rounded to."""
        hard = self.hard.get(site.name, 1)
        if site.kind in (UnitKind.HEAD, UnitKind.KV_GROUP, UnitKind.EXPERT, UnitKind.HEAD_DIM):
            return hard
        step = self.multiple
        while step > 1 and site.units < 8 * step:
            step //= 2
        return max(hard, step - step % hard) if hard > 1 else step

    def rounded(self, site: Site, count: float) -> int:
        """The nearest count that is allowed."""
        step = self.step(site)
        nearest = max(1, int(count / step + 0.5)) * step
        return min(max(nearest, self.lowest(site)), site.units)

    def floor(self, site: Site) -> int:
        """The smallest count, widths that machines like aside."""
        least = max(min(self.minimum, site.units), ceil(self.smallest_share * site.units - 1e-9))
        hard = self.hard.get(site.name, 1)
        return min(-(-max(1, least, self.least.get(site.name, 1)) // hard) * hard, site.units)

    def lowest(self, site: Site) -> int:
        """The smallest count that is allowed."""
        step = self.step(site)
        return min(-(-self.floor(site) // step) * step, site.units)

    @property
    def floors(self) -> str:
        """What every site keeps, in words."""
        words = [f"{self.minimum} units (--minimum)" if self.minimum > 1 else "1 unit"]
        if self.smallest_share:
            words.append(f"{self.smallest_share:.4g} of its units (largest_cut={1 - self.smallest_share:g})")
        return " and ".join([*words, *(["what its code asks for"] if self.least or self.hard else [])])

    @property
    def wider(self) -> str:
        """The settings that would allow more widths than these do; empty if none would."""
        return ", ".join(word for word, on in (("multiple=1", self.multiple > 1), ("layout=free", self.uniform)) if on)


def normalised(scores: Mapping[str, Tensor], how: Normalise) -> dict[str, Tensor]:
    """Scores on a common scale, site by site."""
    if how is Normalise.NONE:
        return dict(scores)
    found = {}
    for name, score in scores.items():
        finite = score[torch.isfinite(score)]
        if not len(finite):
            found[name] = score
            continue
        if how is Normalise.STANDARD:
            found[name] = (score - finite.mean()) / finite.std().clamp_min(1e-12) if len(finite) > 1 else score * 0
        else:
            size = finite.abs().mean() if how is Normalise.MEAN else finite.abs().amax()
            found[name] = score / size.clamp_min(1e-30)
    return found


def form_of(site: Site) -> tuple[object, ...]:
    """What two sites share that do the same work in different places."""
    places = sorted((place.parameter.rpartition(".")[2], place.dim, place.repeat) for place in site.occurrences)
    leaves = sorted(place.parameter.split(".")[-2] for place in site.occurrences if "." in place.parameter)
    return site.kind, site.units, tuple(places), tuple(leaves)


def pools(sites: Mapping[str, Site], scope: Scope) -> list[list[str]]:
    """The sites whose units are ranked together."""
    if scope is Scope.GLOBAL:
        return [list(sites)] if sites else []
    if scope is Scope.LOCAL:
        return [[name] for name in sites]
    classes: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for name, site in sites.items():
        classes[form_of(site)].append(name)
    return list(classes.values())


class Ranking:
    """Kept counts as a function of one number: the share of units that goes."""

    def __init__(self, sites: Mapping[str, Site], scores: Mapping[str, Tensor], widths: Widths) -> None:
        self.sites, self.widths = sites, widths
        free = {name: site for name, site in sites.items() if name not in widths.fixed}
        self.pools = pools(free, widths.scope)
        self.orders = [self._order(names, scores) for names in self.pools]
        self.forms: dict[str, tuple[object, ...]] = {name: form_of(site) for name, site in sites.items()}

    def _order(self, names: list[str], scores: Mapping[str, Tensor]) -> Owners:
        """The sites (by place in `names`) that lose a unit, from the first loss on.

        Where a site is at its floor, the next lowest unit of another one goes; units that no floor lets go come last.
        """
        values = torch.cat([check_scores(scores[name], name).double().cpu() for name in names]).numpy()
        owners = np.repeat(np.arange(len(names)), [self.sites[name].units for name in names])
        order: Owners = owners[np.argsort(values, kind="stable")]
        held = np.zeros(len(order), dtype=bool)
        for index, name in enumerate(names):
            own = np.flatnonzero(order == index)
            held[own[len(own) - self.widths.lowest(self.sites[name]) :]] = True
        return np.concatenate([order[~held], order[held]])

    def counts(self, share: float, exact: bool = False) -> Counts:
        """Kept units per site when `share` of every pool goes; `exact` leaves out the rounding."""
        found: dict[str, int] = dict(self.widths.fixed)
        for names, order in zip(self.pools, self.orders, strict=True):
            gone = np.bincount(order[: floor(share * len(order) + 1e-9)], minlength=len(names))
            for name, removed in zip(names, gone, strict=True):
                left = self.sites[name].units - int(removed)
                found[name] = max(1, left) if exact else self.widths.rounded(self.sites[name], left)
        return self._made_uniform(found) if self.widths.uniform else {name: found[name] for name in self.sites}

    def short(self, budget: Budget) -> list[str]:
        """The sites of the pools that cannot lose a sparsity's share of their units, because of the sites' floors.

        Raises:
            BudgetError: not even all of them together can lose that many.
        """
        asked, possible, held = 0, 0, list[str]()
        for names, order in zip(self.pools, self.orders, strict=True):
            wanted = floor(budget.sparsity * len(order) + 1e-9)
            left = len(order) - sum(self.widths.floor(self.sites[name]) for name in names)
            held += names if left < wanted else []
            asked, possible = asked + wanted, possible + left
        if possible < asked:
            units = sum(len(order) for order in self.orders)
            raise BudgetError(
                f"{budget} is out of reach: of {units} units that may be cut, at most {possible} "
                f"({possible / units:.4g}) can go, because every site keeps {self.widths.floors}"
            )
        return held

    def _made_uniform(self, counts: Counts) -> Counts:
        groups: dict[tuple[object, ...], list[str]] = defaultdict(list)
        for name in self.sites:
            groups[self.forms[name]].append(name)
        for names in groups.values():
            mean = sum(counts[name] for name in names) / len(names)
            for name in names:
                counts[name] = self.widths.rounded(self.sites[name], mean)
        return {name: counts[name] for name in self.sites}


def choose_units(
    sites: Mapping[str, Site],
    scores: Mapping[str, Tensor],
    budget: Budget,
    widths: Widths,
    cost: Cost | None = None,
    *,
    near: bool = True,
) -> dict[str, Tensor]:
    """Keep-masks of structured sites that meet a budget, as far as widths and floors allow.

    Args:
        sites: what can be cut.
        scores: site -> `[units]`, comparable within `widths.scope`, higher = keep.
        budget: a sparsity or density of units, or an amount of what `cost` counts.
        widths: rounding, minimum, scope.
        cost: kept counts -> parameters, FLOPs, bytes or milliseconds of the whole model.
        near: whether what `cost` counts must be met within `TOLERANCE`.

    Raises:
        BudgetError: a cost out of reach; gives the reachable range.
    """
    ranking = Ranking(sites, scores, widths)
    if budget.quantity in (Quantity.SPARSITY, Quantity.DENSITY):
        counts = ranking.counts(budget.sparsity)
    else:
        if cost is None:
            raise BudgetError(f"a budget in {budget.quantity} needs a cost model; give a sparsity here")
        counts = within(ranking, scores, budget, cost, near=near)
    return {name: keep_top(scores[name], counts[name]) for name in sites}


def target_of(budget: Budget, dense: float) -> float:
    """The cost that may stay: an amount up to 1 is a share of the dense model's, and so is a density."""
    if budget.quantity is Quantity.SPARSITY:
        return (1 - budget.amount) * dense
    return budget.amount * dense if budget.amount <= 1 else budget.amount


def overshot(budget: Budget, reached: float, dense: float, why: str) -> list[str]:
    """A word where more goes than a budget asks, by more than `TOLERANCE`; `reached` and `dense` are costs."""
    if target_of(budget, dense) - reached <= TOLERANCE * dense:
        return []
    return [f"more goes than {budget} asks, {reached / dense:.4g} of the dense {budget.quantity} is left: {why}"]


def reachable(ranking: Ranking, budget: Budget, cost: Cost, *, refuse: bool = True) -> tuple[float, float]:
    """The dense cost and the one that may stay, whatever the scores are.

    Raises:
        BudgetError: out of reach; gives the reachable range.
    """
    dense = cost({name: site.units for name, site in ranking.sites.items()})
    target = target_of(budget, dense)
    least = cost(ranking.counts(1.0))
    if refuse and not least <= target <= dense * (1 + 1e-9):
        raise BudgetError(
            f"{budget} is out of reach: the sites that may be cut allow {least / dense:.4g} to 1 of the dense "
            f"{budget.quantity} ({least:.6g} to {dense:.6g}), {target:.6g} was asked for"
        )
    return dense, target


def within(ranking: Ranking, scores: Mapping[str, Tensor], budget: Budget, cost: Cost, *, near: bool = True) -> Counts:
    """Counts whose cost is the budget's, from below and within `TOLERANCE` of the dense cost.

    Args:
        ranking: of the units.
        scores: site -> `[units]`.
        budget: what may stay.
        cost: of kept counts.
        near: refuse what is not met; otherwise go as near as widths and floors allow.

    Raises:
        BudgetError: out of reach; gives the reachable range.
    """
    dense, target = reachable(ranking, budget, cost, refuse=near)
    low, high = 0.0, 1.0  # share removed: too little, enough
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(ranking.counts(middle)) > target else (low, middle)
    counts = ranking.counts(high)
    if not ranking.widths.uniform:
        counts = filled(ranking, scores, counts, Goal(cost, target, TOLERANCE * dense))
    reached = cost(counts)
    if near and target - reached > TOLERANCE * dense:
        above = cost(ranking.counts(low))
        wider = f"allow other widths ({ranking.widths.wider}) or ask" if ranking.widths.wider else "ask"
        raise BudgetError(
            f"{budget} cannot be met within {TOLERANCE:.0%}: the nearest that these widths allow are "
            f"{reached / dense:.4g} and {above / dense:.4g} of the dense {budget.quantity}; {wider} for another amount"
        )
    return counts


def meet_cost(
    counts_at: Callable[[float], Counts], sites: Mapping[str, Site], budget: Budget, cost: Cost, largest: float
) -> Counts:
    """Kept units by an allocation of its own, at the smallest removed share whose cost is within the budget.

    Args:
        counts_at: removed share -> kept units; never more for a larger share.
        sites: what can be cut.
        budget: in what `cost` counts; a sparsity or density is a share of it.
        cost: kept counts -> parameters, FLOPs or bytes of the whole model.
        largest: the largest share that the allocation can be asked for.

    Raises:
        BudgetError: out of reach; gives the reachable range.
    """
    dense = cost({name: site.units for name, site in sites.items()})
    target = target_of(budget, dense)
    least = cost(counts_at(largest))
    if not least <= target <= dense * (1 + 1e-9):
        counted = Quantity.PARAMETERS if budget.quantity in (Quantity.SPARSITY, Quantity.DENSITY) else budget.quantity
        raise BudgetError(
            f"{budget} is out of reach: this allocation allows {least / dense:.4g} to 1 of the dense "
            f"{counted} ({least:.6g} to {dense:.6g}), {target:.6g} was asked for"
        )
    low, high = 0.0, largest
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(counts_at(middle)) > target else (low, middle)
    return counts_at(low) if cost(counts_at(low)) <= target else counts_at(high)


@dataclass(frozen=True)
class Goal:
    """A cost that must not be passed, and how far below it is near enough."""

    cost: Cost
    target: float
    tolerance: float

    def met(self, counts: Counts) -> bool:
        """Whether the counts come near enough to the target."""
        return self.target - self.cost(counts) <= self.tolerance


def filled(ranking: Ranking, scores: Mapping[str, Tensor], counts: Counts, goal: Goal) -> Counts:
    """Give back units, the best lost ones first, while the budget allows it and is not met closely enough.

    Sites get their usual multiples back; single units only where no multiple fits any more.
    """
    for single in (False, True):
        more: Counts | None = counts
        while more is not None and not goal.met(more):
            counts = more
            more = _one_step_more(ranking, scores, counts, goal, single)
        counts = counts if more is None else more
    return counts


def _one_step_more(
    ranking: Ranking, scores: Mapping[str, Tensor], counts: Counts, goal: Goal, single: bool
) -> Counts | None:
    """The counts with one step more in the first site that has room under the budget; None if none has."""
    for name in _next_best(ranking, scores, counts):
        step = ranking.widths.hard.get(name, 1) if single else ranking.widths.step(ranking.sites[name])
        more = counts | {name: counts[name] + step}
        if more[name] <= ranking.sites[name].units and goal.cost(more) <= goal.target:
            return more
    return None


def _next_best(ranking: Ranking, scores: Mapping[str, Tensor], counts: Counts) -> Iterable[str]:
    """Sites by the score of the best unit they lost."""

    def best(name: str) -> float:
        lost = ranking.sites[name].units - counts[name]
        return float(torch.topk(scores[name], lost, largest=False).values.max()) if lost else float("-inf")

    free = [name for name in ranking.sites if name not in ranking.widths.fixed]
    return sorted((name for name in free if counts[name] < ranking.sites[name].units), key=best, reverse=True)
