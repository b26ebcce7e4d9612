"""Candidate subsets: which units could go together, in every way there is or in a uniform sample of the ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations, product
from math import comb, prod
from typing import Any

import torch

from secateur.core.errors import BudgetError

Removed = tuple[tuple[int, ...], ...]
"""One candidate: for every site the removed units, ascending."""


@dataclass(frozen=True)
class Candidates:
    """Distinct ways of removing a fixed number of units from each of several sites.

    Attributes:
        sites: their names, in the order in which `removed` speaks of them.
        removed: the candidates, sorted.
        ways: how many there are in all; as many as `removed` if it is exhaustive.
    """

    sites: tuple[str, ...]
    removed: tuple[Removed, ...]
    ways: int

    def __len__(self) -> int:
        return len(self.removed)

    @property
    def exhaustive(self) -> bool:
        """Whether nothing was left out."""
        return len(self.removed) == self.ways

    def named(self, removed: Removed) -> dict[str, list[int]]:
        """Site -> removed units, as plain data."""
        return {name: list(units) for name, units in zip(self.sites, removed, strict=True)}

    def to_data(self) -> dict[str, Any]:
        """What a ledger stores."""
        return {"sites": self.sites, "removed": list(self.removed), "ways": self.ways}

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Candidates:
        """The inverse of `to_data`."""
        return cls(data["sites"], tuple(data["removed"]), data["ways"])


def candidates(removals: Mapping[str, tuple[int, int]], limit: int, rng: torch.Generator) -> Candidates:
    """All ways where there are at most `limit`, else `limit` distinct ones, every set of them equally likely.

    Args:
        removals: site -> (its units, how many of them go).
        limit: the largest number of candidates.
        rng: of the sample; not touched where all ways fit.

    Raises:
        BudgetError: a site cannot lose that many; names it.
    """
    for name, (units, gone) in removals.items():
        if not 0 <= gone < units:
            raise BudgetError(
                f"'{name}' has {units} units and cannot lose {gone}; the reachable range is 0 to {units - 1}"
            )
    ways = prod(comb(units, gone) for units, gone in removals.values())
    if ways <= limit:
        found = list(_every(removals))
    elif ways <= 2 * limit:  # most draws would be repetitions
        chosen = set(torch.randperm(ways, generator=rng)[:limit].tolist())
        found = [removed for place, removed in enumerate(_every(removals)) if place in chosen]
    else:
        found = sorted(_drawn(removals, limit, rng))
    return Candidates(tuple(removals), tuple(found), ways)


def _every(removals: Mapping[str, tuple[int, int]]) -> Iterator[Removed]:
    """All ways, sorted; each site's own ways are held in memory."""
    return product(*(combinations(range(units), gone) for units, gone in removals.values()))


def _drawn(removals: Mapping[str, tuple[int, int]], limit: int, rng: torch.Generator) -> set[Removed]:
    """Uniform draws until enough of them are distinct."""
    found: set[Removed] = set()
    while len(found) < limit:
        found.add(
            tuple(
                tuple(sorted(torch.randperm(units, generator=rng)[:gone].tolist())) for units, gone in removals.values()
            )
        )
    return found
