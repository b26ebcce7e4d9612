"""Greedy removal: again and again the candidate goes without which the rest does best."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isnan

from secateur.core.progress import Progress, Silent


@dataclass(frozen=True)
class Removal:
    """What greedy removal took.

    Attributes:
        order: indices in the order in which they went.
        rounds: of each round, index -> fitness without it and without all that went before.
    """

    order: tuple[int, ...]
    rounds: tuple[dict[int, float], ...]


def remove_greedily(
    candidates: Iterable[int],
    count: int,
    fitness: Callable[[tuple[int, ...]], float],
    progress: Progress | None = None,
) -> Removal:
    """Remove `count` of the candidates one by one, each time the one without which the fitness is highest.

    Indices always are the original ones. Of equal candidates the later goes; a fitness of NaN is the worst.

    Args:
        candidates: indices that may go, at least `count`.
        count: how many go.
        fitness: of the rest when these indices, ascending, are gone; higher = better.
        progress: receives one step for each evaluation.
    """
    left, gone, rounds = sorted(set(candidates)), list[int](), list[dict[int, float]]()
    progress = progress or Silent()
    progress.start("greedy removal", sum(len(left) - done for done in range(count)))
    try:
        for _ in range(count):
            values = {}
            for index in left:
                values[index] = fitness(tuple(sorted([*gone, index])))
                progress.advance()
            best = max(left, key=lambda index: (_ranked(values[index]), index))
            gone.append(best)
            left.remove(best)
            rounds.append(values)
    finally:
        progress.finish()
    return Removal(tuple(gone), tuple(rounds))


def _ranked(value: float) -> float:
    return float("-inf") if isnan(value) else value
