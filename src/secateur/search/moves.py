"""Moves between candidates that keep a budget: what one place gives up, another place of its kind gets."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from secateur.core.errors import SettingsError

Levels = tuple[int, ...]
"""One integer per place: how far it is from where it started."""


@dataclass(frozen=True)
class Flips:
    """-1/+1 flips within a kind: the levels of a kind always add up to what they did.

    Attributes:
        lows, highs: the lowest and highest level of every place.
        kinds: of every place; only places of one kind cost the same per level and may exchange it.
        most: flips in one move; their number is the smaller of two uniform draws from 1 to this (Tyr-the-Pruner).
        largest_level: largest absolute level.
        largest_total: largest sum of absolute levels.
    """

    lows: Levels
    highs: Levels
    kinds: Sequence[Hashable]
    most: int = 4
    largest_level: int | None = None
    largest_total: int | None = None

    def __post_init__(self) -> None:
        if not len(self.lows) == len(self.highs) == len(self.kinds):
            raise SettingsError(f"{len(self.lows)} lowest levels, {len(self.highs)} highest, {len(self.kinds)} kinds")

    @cached_property
    def _members(self) -> dict[Hashable, list[int]]:
        members: dict[Hashable, list[int]] = {}
        for place, kind in enumerate(self.kinds):
            members.setdefault(kind, []).append(place)
        return members

    def _room(self, place: int, level: int) -> bool:
        low, high, largest = self.lows[place], self.highs[place], self.largest_level
        return low <= level <= high and (largest is None or abs(level) <= largest)

    def propose(self, levels: Levels, rng: torch.Generator) -> Levels | None:
        """Another candidate near this one; None where the draw led nowhere.

        First a place that can go down is drawn, then one of its kind, perhaps the same, that can go up.
        """
        found = list(levels)
        flips = min(_draw(self.most, rng), _draw(self.most, rng)) + 1
        for _ in range(flips):
            down = [place for place, level in enumerate(found) if self._room(place, level - 1)]
            if not down:
                return None
            lower = down[_draw(len(down), rng)]
            up = [place for place in self._members[self.kinds[lower]] if self._room(place, found[place] + 1)]
            if not up:
                return None
            higher = up[_draw(len(up), rng)]
            found[lower] -= 1
            found[higher] += 1
        far = self.largest_total is not None and sum(map(abs, found)) > self.largest_total
        return None if far else tuple(found)


def _draw(below: int, rng: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=rng))
