"""Tyr-the-Pruner (Li, Xu, Li, Liu, Yin, Li, Barsoum 2025, NeurIPS, arXiv 2503.09657): searched structured sparsity.

How much goes from every attention and MLP is searched, in iterations from coarse to fine. Each iteration

1. prunes every o_proj and down_proj from its dense weights at up to `levels` levels around the sparsities found so far,
   by groups and with compensation (`recover.group_obs`): the supernet. What enters a block carries the error of
   the blocks before it: X = sum_e (1 - s_e) X_e / sum_e (1 - s_e) over the levels e;
2. searches one level per matrix by evolution: flips of -1 and +1 between matrices of one kind, so that the total
   stays what it is, and selection in stages by KL(dense || candidate) on fresh tokens, the parent joining the last;
3. starts the next around the winner with half the step (12.5 % of the units, 6.25 %, ...).

The budget: floor(sparsity * units) units go in all, shared out between heads and neurons, and at first between
blocks, in proportion; from then on the numbers of heads and of neurons never change. Where query heads
share keys and values, whole key/value groups go with all their query heads, keys and values, so parameters are those
of the cut model; the published code scores query heads of o_proj alone and cuts nothing. Every site keeps a unit;
where that leaves more heads than asked for, as many more neurons go, and a warning says so.

The published code means to pass on the middle level's error (`accumulation=level0`), but compares with a variable it
has just set to 0 and so passes on dense outputs; its saliency is signed and it removes neurons in 16 rounds and heads
in one (`reference`: this saliency, these rounds and level0 as meant).
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from pydantic import Field
from torch import nn

from secateur.allocate.structured import Counts
from secateur.core import tags as t
from secateur.core.budget import Quantity
from secateur.core.errors import SettingsError
from secateur.core.journal import Notes, Section, overlaid
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.units import UnitKind
from secateur.recover.group_obs import Pace, Saliency
from secateur.search.evolution import Evolution, Generation, Stage, distinct
from secateur.search.fitness import Comparison, Objective, Samples, Target, Teacher, ordered_blocks
from secateur.search.levels import LevelBank
from secateur.search.moves import Flips, Levels
from secateur.shrink.ladder import Ladder
from secateur.shrink.structured import StructuredSettings, Work, begin
from secateur.shrink.supernet import Accumulation, Local, Place, Supernet, blocks_of, places_of
from secateur.structure.readers import readers

RESULT = "tyr-result"


class TyrSettings(StructuredSettings):
    """Tyr-the-Pruner's settings; defaults from the paper, sizes of the search from the official script."""

    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")
    largest_cut: float = Field(1.0, gt=0, le=1, description="largest share of a site's units that may go")
    iterations: int = Field(4, ge=1, description="rounds of supernet and search, each with half the step of the last")
    levels: int = Field(9, ge=1, description="sparsities per matrix in a supernet, the current one in the middle")
    neuron_step: float = Field(0.125, gt=0, lt=1, description="share of the neurons between two levels at first")
    head_step: float = Field(0.125, gt=0, lt=1, description="share of the heads between two levels at first")
    least_neurons: int = Field(32, ge=1, description="fewest neurons between two levels; of heads it is one")
    generations: int = Field(
        50, ge=0, description="of the search, per iteration; 0: local pruning, the same everywhere"
    )
    offspring: int = Field(128, ge=1, description="distinct candidates per generation")
    tokens: tuple[int, ...] = Field(
        (2048, 16384, 131072), description="tokens that candidates are compared on, by stage"
    )
    survivors: tuple[int, ...] = Field((16, 4, 2), description="candidates that go on after each stage")
    flips: int = Field(4, ge=1, description="most exchanges between two matrices in one candidate")
    largest_level: int = Field(0, ge=0, description="largest level either way that the search may take; 0: any")
    largest_total: int = Field(0, ge=0, description="largest sum of absolute levels; 0: any")
    fitness: Target = Field(
        Target.SPARSE_KL, description="sparse_kl (among the top logits), kl, or ppl on the data itself"
    )
    topk: int = Field(8192, ge=1, description="logits of the dense model that sparse_kl compares at every position")
    beta: float = Field(1.0, ge=0, description="weight of the term of `fitness`")
    alpha: float = Field(0.0, ge=0, description="weight of squared distances between hidden states; the paper's option")
    depths: tuple[float, ...] = Field((0.0, 0.5, 1.0), description="blocks whose states count, as shares of the depth")
    accumulation: Accumulation = Field(
        Accumulation.EXPECTATION, description="what later blocks see of earlier ones' error: expectation, level0, none"
    )
    saliency: Saliency = Field(Saliency.PAPER, description="which saliency of groups: paper or code")
    neurons_at_once: int = Field(16, ge=1, description="neurons removed before the rest is compensated again")
    heads_at_once: int = Field(1, ge=1, description="heads removed before the rest is compensated again")
    percdamp: float = Field(0.01, gt=0, description="damping as a fraction of the Hessian's mean diagonal")
    on_disk: bool = Field(False, description="keep supernets on disk in memory's stead also without a work folder")
    reference: bool = Field(False, description="the official code's saliency, rounds and error accumulation")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """Of selection.

        Raises:
            SettingsError: there are not as many tokens as survivors.
        """
        if len(self.tokens) != len(self.survivors) or min((*self.tokens, *self.survivors), default=0) < 1:
            raise SettingsError(
                f"tokens={self.tokens} and survivors={self.survivors} must be as many numbers, one or more of each, "
                "all of them 1 or more"
            )
        return tuple(map(Stage, self.tokens, self.survivors))

    @property
    def local(self) -> Local:
        """How a matrix is pruned."""
        if self.reference:
            return Local(Saliency.CODE, Pace(rounds=1), Pace(rounds=16), self.percdamp)
        return Local(self.saliency, Pace(step=self.heads_at_once), Pace(step=self.neurons_at_once), self.percdamp)


def plan(task: Task, settings: TyrSettings) -> Decision:
    """Supernet and search, from coarse to fine; the winner's weights and masks."""
    if task.residency is not None:
        raise SettingsError("the search runs whole candidates and needs the model in memory; leave out --stream")
    work = begin(task, settings)
    _check(work, settings)
    return _Tyr(work, settings).run()


def _check(work: Work, settings: TyrSettings) -> None:
    fields = TyrSettings.model_fields
    for name in ("scope", "normalise", "layout", "steps", "shares"):
        if getattr(settings, name) != fields[name].default:
            raise SettingsError(f"{name} has no meaning here: the search finds how much goes from where; leave it out")
    if work.budget.quantity is Quantity.MILLISECONDS:
        raise SettingsError(
            "a budget in milliseconds is not supported here; give a sparsity, parameters, flops or bytes"
        )


@dataclass(frozen=True, eq=False)
class _Tyr:
    """One run."""

    work: Work
    settings: TyrSettings

    @property
    def task(self) -> Task:
        return self.work.task

    @cached_property
    def places(self) -> list[Place]:
        return places_of(self.task.model, readers(self.task.model, self.work.sites))

    @cached_property
    def ladder(self) -> Ladder:
        return Ladder(self.work, self.places)

    @cached_property
    def blocks(self) -> list[nn.Module]:
        """In the order they run; none where they do not run one after the other."""
        found = list(blocks_of(self.task.model).values())
        return found if ordered_blocks(self.task.model, found, self.task.batches[0]) else []

    @cached_property
    def samples(self) -> Samples:
        return Samples(self.task.batches)

    @cached_property
    def teacher(self) -> Teacher:
        """Made while the model is dense."""
        s, task = self.settings, self.task
        objective = Objective(s.fitness, s.topk, s.beta, s.alpha, s.depths)
        if s.alpha and not self.blocks:
            raise SettingsError("alpha compares the states after blocks, and this model has none in a row; leave it 0")
        section = task.journal.section("tyr-teacher")
        teacher = Teacher(objective, self.samples, section, len(self.blocks))
        teacher.ask(task.model, self.blocks, task.progress)
        return teacher

    def run(self) -> Decision:
        """All iterations; what the journal has is not done again."""
        kept = self.work.meet(self.ladder.evenly)
        section = self.task.journal.section(RESULT)
        if RESULT not in section:
            notes = Notes(facts={name: {} for name in ("search", *(place.name for place in self.places))})
            for iteration in range(self.settings.iterations):
                with self.bank(iteration) as bank:
                    kept = self.iterate(iteration, self.supernet(iteration, kept, bank), notes)
                    if iteration + 1 == self.settings.iterations:
                        section.write(RESULT, notes)
                    bank.drop()
        with self.bank(self.settings.iterations - 1) as bank:
            bank.drop()  # of a run that was killed right after its last note
        return self.decision(section)

    @contextlib.contextmanager
    def bank(self, iteration: int) -> Iterator[LevelBank]:
        """On disk where the run has a folder, so that a killed one finds its levels; otherwise in memory."""
        folder = self.task.journal.folder
        if folder is not None or not self.settings.on_disk:
            yield LevelBank(None if folder is None else folder / f"tyr-bank-{iteration + 1}")
            return
        with tempfile.TemporaryDirectory(prefix="secateur-tyr-") as temporary:
            yield LevelBank(Path(temporary) / "bank")

    def iterate(self, iteration: int, supernet: Supernet, notes: Notes) -> Counts:
        """One supernet and the search in it; the winner's kept units. The last one's matrices go to the notes."""
        if self.settings.generations:
            _ = self.teacher  # while the model is dense
        found = supernet.build(self.task, f"tyr-supernet-{iteration + 1}")
        history = self.search(iteration, supernet)
        levels = history[-1].best.genome if history else (0,) * len(self.places)
        overall = notes.facts["search"]
        overall |= {f"fitness_{iteration + 1}_{n + 1}": one.best.fitness for n, one in enumerate(history)}
        overall[f"supernet_bytes_{iteration + 1}"] = float(supernet.bytes)
        overall[f"candidates_{iteration + 1}"] = float(sum(one.evaluated for one in history))
        facts = found.facts()
        for index, (place, level) in enumerate(zip(self.places, levels, strict=True)):
            own = notes.facts[place.name]
            own |= {f"levels_{iteration + 1}": len(supernet.kept[index]), f"level_{iteration + 1}": level}
            if iteration + 1 == self.settings.iterations:
                own["error"] = facts[f"{place.name}/{level}"]["error"]
                notes.tensors[f"keep/{place.name}"] = found.tensors("keep")[f"{place.name}/{level}"]
                notes.tensors[f"weight/{place.layer.name}"] = supernet.weight(index, level).cpu()
        return {p.name: kept[level] for p, kept, level in zip(self.places, supernet.kept, levels, strict=True)}

    def search(self, iteration: int, supernet: Supernet) -> list[Generation[Levels]]:
        """Evolution over levels; one minibatch for all candidates of a stage."""
        s, task = self.settings, self.task
        kinds = [place.kind for place in self.places]
        flips = Flips(supernet.lows, supernet.highs, kinds, s.flips, s.largest_level or None, s.largest_total or None)

        def breed(generation: int, parent: Levels) -> list[Levels]:
            rng = task.rng("tyr", "offspring", str(iteration), str(generation))
            return distinct(lambda: flips.propose(parent, rng), s.offspring, {parent})

        def fitness(generation: int, stage: int, candidates: Sequence[Levels]) -> list[float]:
            rng = task.rng("tyr", "tokens", str(iteration), str(generation), str(stage))
            minibatch = self.samples.draw(s.tokens[stage], rng)
            task.progress.advance(int(stage + 1 == len(s.tokens)))
            with supernet.assembled() as assemble:
                return Comparison(task.model, self.blocks, minibatch, self.teacher).fitness(candidates, assemble)

        task.progress.start(f"search {iteration + 1} of {s.iterations}", s.generations)
        try:
            evolution = Evolution(s.generations, s.offspring, s.stages)
            section = task.journal.section(f"tyr-search-{iteration + 1}")
            return evolution.run((0,) * len(kinds), breed, fitness, section)
        finally:
            task.progress.finish()

    def supernet(self, iteration: int, kept: Counts, bank: LevelBank) -> Supernet:
        """The levels around what is kept now; level +1 is one step more that goes."""
        half = self.settings.levels // 2 if self.settings.generations else 0
        ladder, places = self.ladder, self.places
        around = [ladder.around(p, kept[p.name], self._step(p, iteration), half) for p in places]
        accumulation = Accumulation.LEVEL0 if self.settings.reference else self.settings.accumulation
        return Supernet(self.places, around, bank, self.settings.local, accumulation)

    def _step(self, place: Place, iteration: int) -> int:
        s, heads = self.settings, place.reader.site.kind in (UnitKind.HEAD, UnitKind.KV_GROUP)
        share, least = (s.head_step, 1) if heads else (s.neuron_step, s.least_neurons)
        return self.ladder.step(place, share * 0.5**iteration, least)

    def decision(self, section: Section) -> Decision:
        masks = section.tensors("keep")
        decision = self.work.conclude({name: masks[name] for name in self.work.sites}, {})
        decision.weights = overlaid(section.tensors("weight"))
        for name, facts in section.facts().items():
            decision.facts.setdefault(name, {}).update(facts)
        kept = {name: int(mask.sum()) for name, mask in decision.masks.items()}
        decision.warnings += self.ladder.differences(kept)
        decision.facts["search"]["parameters"] = float(self.work.structure.parameters(kept))
        return decision


method = Method(
    name="tyr",
    paper="11",
    title="Tyr-the-Pruner: structural pruning LLMs via global sparsity distribution optimization",
    citation="Li, Xu, Li, Liu, Yin, Li, Barsoum 2025, NeurIPS, arXiv 2503.09657",
    formula="S = mean(|<G, W>| + |W|^2 / (2 [H^-1])), W_K = H_KK^-1 G_K; levels per matrix by KL to the dense model",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LOSS_CHANGE, t.Criterion.ACTIVATION}),
        granularity=frozenset({t.Granularity.HEAD, t.Granularity.NEURON}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.SEARCHED,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM}),
        learn=frozenset({t.Learn.EVOLUTIONARY}),
        physical=True,
        post_training=True,
    ),
    settings=TyrSettings,
    run=plan,
    units=UnitKind.HEAD,
    exact=Group.TOTAL,
    needs_data=True,
    needs_labels=False,
    changes_weights=True,
    structured=True,
)
