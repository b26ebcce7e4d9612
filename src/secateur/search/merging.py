"""Which experts stay and how the others are mixed into them: candidates and moves of EEP (arXiv 2407.00945, section 3).

A candidate has for every group of layers a merging matrix M and a routing matrix R, both `[kept, experts]`. Their
rows are kept as a number where they are one-hot, else as a tuple of floats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from secateur.core.journal import Notes, Section
from secateur.core.progress import Progress, Silent
from secateur.core.seeding import generator
from secateur.search.evolution import Archive, Evaluated, distinct

Row = int | tuple[float, ...]
Rows = tuple[Row, ...]
Mixture = tuple[tuple[Rows, Rows], ...]
"""(M, R) of every group."""
SMALLEST_SUM = 1e-3  # rows whose sum is nearer to 0 are not divided by it


def matrix(rows: Rows, experts: int) -> Tensor:
    """Rows as float32 `[kept, experts]`."""
    found = torch.zeros(len(rows), experts)
    for index, row in enumerate(rows):
        if isinstance(row, int):
            found[index, row] = 1
        else:
            found[index] = torch.tensor(row)
    return found


def rows_of(values: Tensor) -> Rows:
    """The inverse of `matrix`."""
    return tuple(_row(row) for row in values)


def _row(values: Tensor) -> Row:
    place = values.nonzero().flatten().tolist()
    return place[0] if len(place) == 1 and float(values[place[0]]) == 1 else tuple(values.tolist())


def one_hot(rows: Rows) -> bool:
    """Whether every row picks one expert, each another one."""
    return all(isinstance(row, int) for row in rows) and len(set(rows)) == len(rows)


@dataclass(frozen=True)
class Mixing:
    """How candidates change. All draws come from the generator given.

    Attributes:
        experts, kept: of every group.
        change: chance that a group's matrix changes; one does at least.
        replace: chance that a row of a changed group gets another expert (first phase).
        entry, scale: chance that an entry of a changed matrix gets noise, and its standard deviation (second phase).
        cross: chance of two parents (second phase).
        front: chance that a row comes from the first of them.
        norm: chance that the rows of all merging matrices are divided by their sums.
        fold: leave the routing matrices one-hot.
    """

    experts: tuple[int, ...]
    kept: tuple[int, ...]
    change: float
    replace: float
    entry: float
    scale: float
    cross: float
    front: float
    norm: float
    fold: bool

    def start(self, _: Sequence[Mixture], rng: torch.Generator) -> Mixture:
        """A random subset for every group."""
        picks = (torch.randperm(n, generator=rng)[:k].sort()[0] for n, k in zip(self.experts, self.kept, strict=True))
        return tuple((rows, rows) for rows in (tuple(pick.tolist()) for pick in picks))

    def pruned(self, parents: Sequence[Mixture], rng: torch.Generator) -> Mixture:
        """Another choice of experts near one parent's; rows stay one-hot and distinct, R = M."""
        child = list(_pick(parents, rng))
        for group in self._marked(len(child), rng):
            rows = list(child[group][0])
            for index in range(len(rows)):
                unused = sorted(set(range(self.experts[group])) - set(rows))
                if unused and _chance(self.replace, rng):
                    rows[index] = unused[_draw(len(unused), rng)]
            child[group] = (tuple(rows), tuple(rows))
        return tuple(child)

    def merged(self, parents: Sequence[Mixture], rng: torch.Generator) -> Mixture:
        """Noise on some matrices, after a mixture of two parents or of one; M and R change apart."""
        groups = len(self.experts)
        slots = [(group, which) for group in range(groups) for which in ((0,) if self.fold else (0, 1))]
        marked = {slots[index] for index in self._marked(len(slots), rng)}
        first, second = _pick(parents, rng), _pick(parents, rng)
        child = self._crossed(first, second, marked, rng) if _chance(self.cross, rng) else [list(p) for p in first]
        for group, which in sorted(marked):
            child[group][which] = self._noisy(child[group][which], self.experts[group], rng)
        if _chance(self.norm, rng):
            for group, pair in enumerate(child):
                pair[0] = _normalised(pair[0], self.experts[group])
        return tuple((pair[0], pair[1]) for pair in child)

    def _marked(self, count: int, rng: torch.Generator) -> list[int]:
        found = (torch.rand(count, generator=rng) < self.change).nonzero().flatten().tolist()
        return found or [_draw(count, rng)]

    def _crossed(
        self, first: Mixture, second: Mixture, marked: set[tuple[int, int]], rng: torch.Generator
    ) -> list[list[Rows]]:
        """Marked matrices row by row from either parent, others whole; a fixed routing keeps its own rows' experts."""
        child = []
        for group, pair in enumerate(zip(first, second, strict=True)):
            if self.fold and pair[0][1] != pair[1][1]:
                child.append(list(pair[0] if _chance(self.front, rng) else pair[1]))
                continue
            found = []
            for which in (0, 1):
                a, b = pair[0][which], pair[1][which]
                if (group, which) in marked:
                    found.append(tuple(x if _chance(self.front, rng) else y for x, y in zip(a, b, strict=True)))
                else:
                    found.append(a if _chance(self.front, rng) else b)
            child.append(found)
        return child

    def _noisy(self, rows: Rows, experts: int, rng: torch.Generator) -> Rows:
        values = matrix(rows, experts)
        hit = torch.rand(values.shape, generator=rng) < self.entry
        return rows_of(values + hit * self.scale * torch.randn(values.shape, generator=rng))


def _normalised(rows: Rows, experts: int) -> Rows:
    values = matrix(rows, experts)
    sums = values.sum(1, keepdim=True)
    return rows_of(torch.where(sums.abs() < SMALLEST_SUM, values, values / sums))


def _chance(share: float, rng: torch.Generator) -> bool:
    return float(torch.rand((), generator=rng)) < share


def _draw(below: int, rng: torch.Generator) -> int:
    return int(torch.randint(below, (), generator=rng))


def _pick(parents: Sequence[Mixture], rng: torch.Generator) -> Mixture:
    return parents[_draw(len(parents), rng)]


NOTED = 20  # evaluations between two notes in the journal


@dataclass(frozen=True)
class Phases:
    """How long a search goes on.

    Attributes:
        initial: random candidates.
        discrete: evaluations, the random ones included, after which experts are no longer only chosen.
        total: evaluations in all; at most `discrete`: no second phase.
        parents: the best from which parents are drawn.
    """

    initial: int
    discrete: int
    total: int
    parents: int

    def run(
        self,
        mixing: Mixing,
        fitness: Callable[[Mixture], float],
        seed: int,
        section: Section,
        progress: Progress | None = None,
    ) -> tuple[Archive[Mixture], Evaluated[Mixture]]:
        """All candidates with their fitness, larger is better, and the best of those that only choose.

        Every candidate stays; draws depend on the seed and the number of candidates so far, so that a search
        that goes on from the notes in `section` ends as one that was not killed.
        """
        progress = progress or Silent()
        found: Archive[Mixture] = Archive.kept(section, "archive") or Archive(maximise=True)
        ends = [self.initial, max(self.initial, self.discrete)]
        ends.append(self.total if self.total > ends[-1] else 0)
        progress.start("evolution of experts", max(ends))
        progress.advance(len(found))
        try:
            for phase, (move, end) in enumerate(zip((mixing.start, mixing.pruned, mixing.merged), ends, strict=True)):
                while len(found) < end and f"phase-{phase}" not in section:
                    if not self._step(found, move, fitness, seed):
                        break  # every candidate that these moves reach is known
                    progress.advance()
                    if len(found) % NOTED == 0:
                        found.keep(section, "archive")
                found.keep(section, "archive")
                section.write(f"phase-{phase}", Notes())
        finally:
            progress.finish()
        chosen = (
            one for one in found.ranked() if all(merge == route and one_hot(merge) for merge, route in one.genome)
        )
        return found, next(chosen)

    def _step(
        self, found: Archive[Mixture], move: Callable[..., Mixture], fitness: Callable[[Mixture], float], seed: int
    ) -> bool:
        rng = generator(seed, "experts", str(len(found)))
        parents = [one.genome for one in found.ranked(rng)[: self.parents]]
        child = distinct(partial(move, parents, rng), 1, found)
        if child:
            found.evaluate(child[0], fitness)
        return bool(child)
