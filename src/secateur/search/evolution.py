"""Evolutionary search over discrete candidates: cached fitness, distinct offspring, stages of selection, elitism.

A genome is anything hashable that JSON can hold: numbers, strings and tuples of them, nested as you like. The
caller says how candidates change and what they are worth; nothing here knows a model. Every draw is the caller's,
from `core.seeding.generator` with the number of the generation or evaluation in its purpose, so that a search that
was killed and goes on from its notes ends as one that was not.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from secateur.core.errors import SettingsError
from secateur.core.journal import Notes, Section

G = TypeVar("G", bound=Hashable)
ARCHIVE = "archive"  # the tensor of a step's notes that holds one


@dataclass(frozen=True)
class Evaluated(Generic[G]):
    """A candidate and what it is worth."""

    genome: G
    fitness: float


class Archive(Generic[G]):
    """Every candidate that was evaluated, in that order, with its fitness; none is evaluated twice.

    Args:
        maximise: whether a larger fitness is better. NaN is worse than anything.
    """

    def __init__(self, *, maximise: bool = False):
        self.maximise = maximise
        self._fitness: dict[G, float] = {}

    def __len__(self) -> int:
        return len(self._fitness)

    def __contains__(self, genome: object) -> bool:
        return genome in self._fitness

    def __iter__(self) -> Iterator[G]:
        return iter(self._fitness)

    def __getitem__(self, genome: G) -> float:
        return self._fitness[genome]

    def evaluate(self, genome: G, fitness: Callable[[G], float]) -> float:
        """The candidate's fitness, found once."""
        if genome not in self._fitness:
            self._fitness[genome] = float(fitness(genome))
        return self._fitness[genome]

    def ranked(self, rng: torch.Generator | None = None) -> list[Evaluated[G]]:
        """Best first. Equals in the order of evaluation, or shuffled among themselves by `rng`."""
        found = [Evaluated(genome, fitness) for genome, fitness in self._fitness.items()]
        if rng is not None:
            found = [found[index] for index in torch.randperm(len(found), generator=rng).tolist()]
        return ranked(found, maximise=self.maximise)

    def best(self) -> Evaluated[G]:
        """The best so far, the earliest of equals."""
        return self.ranked()[0]

    def trace(self) -> list[float]:
        """The best fitness after every evaluation."""
        best: list[float] = []
        for value in self._fitness.values():
            worse = best and worth(best[-1], self.maximise) >= worth(value, self.maximise)
            best.append(best[-1] if worse else value)
        return best

    def to_json(self) -> dict[str, Any]:
        """Plain data, in the order of evaluation."""
        return {"maximise": self.maximise, "evaluated": [[genome, value] for genome, value in self._fitness.items()]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Archive[G]:
        """The inverse of `to_json`; lists become the tuples they were."""
        archive: Archive[G] = cls(maximise=data["maximise"])
        archive._fitness = {_frozen(genome): float(value) for genome, value in data["evaluated"]}
        return archive

    def keep(self, section: Section, step: str) -> None:
        """Write the archive to a journal's section as the notes of one step; an earlier one of that name goes."""
        section.write(step, Notes({ARCHIVE: json_tensor(self.to_json())}))

    @classmethod
    def kept(cls, section: Section, step: str) -> Archive[G] | None:
        """What `keep` wrote; None if there is nothing yet."""
        return cls.from_json(json_value(section.tensor(step, ARCHIVE))) if step in section else None


def json_tensor(value: Any) -> Tensor:
    """Plain data as the uint8 tensor of its JSON text, for a journal's notes. Numbers come back bit for bit."""
    return torch.frombuffer(bytearray(json.dumps(value), "ascii"), dtype=torch.uint8)


def json_value(tensor: Tensor) -> Any:
    """The inverse of `json_tensor`; tuples come back as lists."""
    return json.loads(bytes(tensor.numpy()))


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def worth(fitness: float, maximise: bool) -> float:
    """A number that is higher where the fitness is better, lowest for NaN."""
    if math.isnan(fitness):
        return -math.inf
    return fitness if maximise else -fitness


def ranked(candidates: Sequence[Evaluated[G]], *, maximise: bool = False) -> list[Evaluated[G]]:
    """Best first, equals in the order given."""
    return sorted(candidates, key=lambda one: -worth(one.fitness, maximise))


def distinct(propose: Callable[[], G | None], count: int, known: Container[object] = (), tries: int = 200) -> list[G]:
    """Up to `count` proposals that differ from each other and from all that is `known`.

    Fewer where `tries` proposals in a row brought nothing new, as in a space that is nearly used up; a proposal
    of None is one that failed.
    """
    found: dict[G, None] = {}
    failed = 0
    while len(found) < count and failed < tries:
        genome = propose()
        new = genome is not None and genome not in found and genome not in known
        failed = 0 if new else failed + 1
        if new and genome is not None:
            found[genome] = None
    return list(found)


@dataclass(frozen=True)
class Stage:
    """One round of selection: on how much data all candidates are compared, and how many go on."""

    size: int
    survivors: int


Fitness = Callable[[int, Sequence[G]], Sequence[float]]
"""(number of the stage, candidates) -> their fitness, all on the same data."""


def select(
    candidates: Sequence[G],
    stages: Sequence[Stage],
    fitness: Fitness[G],
    *,
    elite: G | None = None,
    maximise: bool = False,
) -> list[Evaluated[G]]:
    """The last stage's survivors, best first.

    Args:
        candidates: distinct.
        stages: narrowing down; every stage evaluates what the one before left.
        fitness: of a stage's candidates.
        elite: joins before the last stage if it is not there: the parent, so that the search never goes back
            by choice.
        maximise: whether a larger fitness is better.
    """
    left, found = list(candidates), []
    for number, stage in enumerate(stages):
        if number + 1 == len(stages) and elite is not None and elite not in left:
            left.append(elite)
        values = fitness(number, left)
        found = ranked([Evaluated(*pair) for pair in zip(left, values, strict=True)], maximise=maximise)
        found = found[: stage.survivors]
        left = [one.genome for one in found]
    return found


@dataclass(frozen=True)
class Generation(Generic[G]):
    """What a generation came to.

    Attributes:
        best: the next parent, with its fitness in the last stage.
        evaluated: candidates whose fitness was found, over all stages.
    """

    best: Evaluated[G]
    evaluated: int


@dataclass(frozen=True)
class Evolution:
    """A (1 + n) search: a parent's offspring go through stages, the best becomes the parent.

    Attributes:
        generations: how many.
        offspring: distinct ones in a generation.
        stages: of selection.
        maximise: whether a larger fitness is better.
    """

    generations: int
    offspring: int
    stages: tuple[Stage, ...]
    maximise: bool = False

    def __post_init__(self) -> None:
        if not self.stages or min(stage.survivors for stage in self.stages) < 1:
            raise SettingsError("an evolutionary search needs a stage of selection, and survivors in every stage")

    def run(
        self,
        start: G,
        breed: Callable[[int, G], Sequence[G]],
        fitness: Callable[[int, int, Sequence[G]], Sequence[float]],
        section: Section,
    ) -> list[Generation[G]]:
        """All generations; those whose notes are in `section` are read instead of run.

        Args:
            start: the first parent.
            breed: (number of the generation, parent) -> distinct offspring.
            fitness: (generation, stage, candidates) -> fitness of each on that stage's data.
            section: of a journal, where every generation leaves its notes.
        """
        history: list[Generation[G]] = []
        for number in range(self.generations):
            step = f"generation-{number:04d}"
            if step not in section:
                parent = history[-1].best.genome if history else start
                section.write(step, _notes(self._generation(number, parent, breed, fitness)))
            history.append(_noted(section[step]))
        return history

    def _generation(
        self,
        number: int,
        parent: G,
        breed: Callable[[int, G], Sequence[G]],
        fitness: Callable[[int, int, Sequence[G]], Sequence[float]],
    ) -> Generation[G]:
        evaluated = 0

        def of_stage(stage: int, candidates: Sequence[G]) -> Sequence[float]:
            nonlocal evaluated
            evaluated += len(candidates)
            return fitness(number, stage, candidates)

        candidates = breed(number, parent)
        best = select(candidates, self.stages, of_stage, elite=parent, maximise=self.maximise)[0]
        return Generation(best, evaluated)


def _notes(generation: Generation[Any]) -> Notes:
    best = generation.best
    return Notes({ARCHIVE: json_tensor([best.genome, best.fitness, generation.evaluated])})


def _noted(notes: Notes) -> Generation[Any]:
    genome, fitness, evaluated = json_value(notes.tensors[ARCHIVE])
    return Generation(Evaluated(_frozen(genome), fitness), evaluated)
