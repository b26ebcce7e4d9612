"""How many units of every place stay at each of several levels, with totals that exchanges between levels keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import floor

from secateur.allocate import counts
from secateur.allocate.structured import Counts
from secateur.core.budget import Budget
from secateur.core.errors import BudgetError
from secateur.shrink.structured import Work
from secateur.shrink.supernet import Place


@dataclass(frozen=True, eq=False)
class Ladder:
    """Counts for the places of a supernet.

    Attributes:
        work: budget and widths.
        places: all of them.
    """

    work: Work
    places: Sequence[Place]

    @cached_property
    def kinds(self) -> dict[str, list[Place]]:
        """Places whose units cost the same."""
        return {kind: [p for p in self.places if p.kind == kind] for kind in dict.fromkeys(p.kind for p in self.places)}

    def grain(self, place: Place) -> int:
        """Kept units are multiples of this."""
        step = max(self.work.widths.step(other.reader.site) for other in self.kinds[place.kind])
        return step if all(other.units % step == 0 for other in self.kinds[place.kind]) else 1

    def least(self, place: Place) -> int:
        """Units that must stay."""
        least: int = self.work.widths.rounded(place.reader.site, 0)
        return least

    def step(self, place: Place, share: float, least: int) -> int:
        """Units between two levels: a share of a place's, the same for all of its kind, or totals would change."""
        own = self.kinds[place.kind]
        units, grain = sum(other.units for other in own) / len(own), self.grain(place)
        return max(1, round(max(least, share * units) / grain)) * grain

    def around(self, place: Place, kept: int, step: int, half: int) -> dict[int, int]:
        """Level -> kept units, up to `half` levels either way; one level more is one step more that goes."""
        low = min((place.units - kept) // step, half)
        high = min((kept - self.least(place)) // step, half)
        return {level: kept - level * step for level in range(-low, max(0, high) + 1)}

    def evenly(self, share: float) -> Counts:
        """Kept units where the same share goes everywhere, exact in total."""
        sizes = {
            kind: {place.name: place.units // self.grain(place) for place in own} for kind, own in self.kinds.items()
        }
        least = {
            kind: max(-(-self.least(place) // self.grain(place)) for place in own) for kind, own in self.kinds.items()
        }
        whole = {kind: sum(own.values()) for kind, own in sizes.items()}
        budget = self.work.task.budget
        if budget.per_kind and self.work.cost is None:
            totals = {kind: budget.of(own[0].reader.site.kind).keep(whole[kind]) for kind, own in self.kinds.items()}
        else:
            floors = {kind: len(sizes[kind]) * least[kind] for kind in whole}
            total = Budget(share).keep(sum(whole.values()))
            if self.work.cost is not None:  # how little may stay is asked for as well
                total = max(total, sum(floors.values()))
            totals = shared_out(whole, floors, total)
        kept: Counts = {}
        for kind, own in self.kinds.items():
            found = counts.with_floor(counts.uniform(sizes[kind], totals[kind]), sizes[kind], least[kind])
            kept |= {name: count * self.grain(own[0]) for name, count in found.items()}
        return kept

    def differences(self, kept: Counts) -> list[str]:
        """A sentence for every kind that lost another share than was asked for."""
        if self.work.cost is not None:
            return []
        found = []
        for own in self.kinds.values():
            kind, units = own[0].reader.site.kind, sum(place.units for place in own)
            asked = units - self.work.task.budget.of(kind).keep(units)
            gone = units - sum(kept[place.name] for place in own)
            if abs(gone - asked) > self.grain(own[0]):
                found.append(
                    f"{gone} of {units} units of kind {kind} went where {asked} were asked for: every site keeps one"
                )
        return found


def shared_out(whole: Counts, floors: Counts, total: int) -> Counts:
    """Kept units by kind in proportion, none below its floor; what a floor takes, the other kinds give.

    Raises:
        BudgetError: the floors need more than there is.
    """
    if sum(floors.values()) > total:
        most = floor((1 - sum(floors.values()) / sum(whole.values())) * 1e6) / 1e6
        raise BudgetError(
            f"{total} of {sum(whole.values())} units are to stay, and at least {sum(floors.values())} must, so many in "
            f"every site; the highest sparsity is {most:g}"
        )
    fixed: Counts = {}
    while True:
        free = {kind: units for kind, units in whole.items() if kind not in fixed}
        found = counts.uniform(free, total - sum(fixed.values()))
        low = {kind: floors[kind] for kind in free if found[kind] < floors[kind]}
        if not low:
            return {**fixed, **found}
        fixed |= low
