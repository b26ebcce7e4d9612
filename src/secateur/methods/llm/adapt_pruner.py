"""Adapt-Pruner (Pan, Shekhar, Wang, Diao, Zhang, Pan, Pi, Zhang 2025): many small cuts, less from layers that matter.

Before each of K iterations every decoder layer says how much it changes its input, D_i = mean over tokens of
1 - cos(input, output) (or a distance), on freshly drawn samples and on the model as cut so far. With v = D - mean(D),
divided by max |v|, the share of a module's ORIGINAL width that is to go moves by

    s_i <- clip(s_i + b - A v_i, 0, 0.99),   b = total / K

for the attention and the MLP of layer i alike. Inside a module the groups with the lowest |w dL/dw|, summed over
elements and matrices, go: a neuron with its gate and up rows and its down column, a key/value head with all query
heads that share it. The model is cut and everything is estimated again, until the budget is met. With A > b shares
saturate at 0 or 0.99.

`sc.study` runs Adapt-Accel: P stages of pruning from the last trained network and of training. Stage p ends at
N_0 - (N_0 - N) p / P and gets the share 2p / (P (P + 1)) of the steps, each with a new optimiser; learning rate and
data go on where they were, so give ONE recipe for all stages (paper: AdamW, `decay=wsd, warmup=0.05, cooldown=0.1,
last=0.1`, clip 1) and at least `steps * batch` samples. `make` gives the trained model, or extras={"state": its
weights}; extras["calibration"] the data to prune on (default: those of the `Fitting`). Findings hold the trained
weights at the dense shape and a plan that cuts them.

The released code stops below the target wherever its last iteration leads; here that one goes only as far as it
must. It gives layers with a larger Euclidean or Manhattan distance LESS importance (`reference`), and folds the
longer query vector onto the keys by modulo, which mixes heads; here query head h belongs to head h // repeats.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.adaptive import Goal, centred, kept_at, last_step, moved_shares
from secateur.allocate.structured import Counts, Normalise
from secateur.core import tags as t
from secateur.core.budget import Quantity
from secateur.core.errors import BudgetError, SettingsError
from secateur.core.method import Batch, Decision, Group, Method, Protocol, Settings, Task
from secateur.core.progress import track
from secateur.core.select import keep_top
from secateur.core.units import Site, UnitKind
from secateur.data.calibration import fresh, window_length
from secateur.scores.groups import Combine, group_scores, over_others
from secateur.scores.saliences import Reduce, Salience, along, weight_saliences
from secateur.shrink.cut import tensors_of
from secateur.shrink.goals import goals_of
from secateur.shrink.interleave import Interleaved, Shrunk
from secateur.shrink.structured import StructuredSettings, View, Work, begin, weight_places
from secateur.stats.changes import Distance, block_changes
from secateur.structure.stacks import block_of, blocks_between, main_stack
from secateur.train.stages import Slices
from secateur.train.study import Findings, Masks, Study

LARGE_STEP = 0.2  # of a module's original width, in one iteration


class Score(StrEnum):
    """What ranks the groups of a module."""

    TAYLOR = "taylor"
    L1 = "l1"
    L2 = "l2"  # squared, summed over the group's matrices
    RANDOM = "random"  # the control


class AdaptPrunerSettings(Settings):
    """Defaults: the paper's recipes."""

    iterations: int = Field(50, ge=1, description="K, iterations that would remove `total` of everything")
    amplitude: float = Field(0.02, ge=0, description="A, by how much importance moves a share; 0 is uniform")
    total: float = Field(1.0, gt=0, le=1, description="share that K iterations would remove; the budget ends them")
    distance: Distance = Field(Distance.COSINE, description="change of a layer: cosine, euclidean or manhattan")
    score: Score = Field(Score.TAYLOR, description="of a group: taylor, l1, l2 or random")
    salience: Salience = Field(Salience.FIRST, description="of taylor: param_first, param_second or param_mix")
    reduce: Reduce = Field(Reduce.ELEMENT, description="of taylor: absolute values first (element) or sums (vectorize)")
    combine: Combine = Field(Combine.SUM, description="how a group's matrices become one score")
    samples: int | None = Field(
        None, ge=1, description="drawn anew per iteration; default: half of the data, 512 at most"
    )
    length: int = Field(64, ge=2, description="tokens of a sample, cut out of the windows at random offsets")
    batch: int = Field(16, ge=1, description="samples of one pass")
    first: int = Field(0, ge=0, description="first block to prune, 0-based")
    last: int | None = Field(None, ge=1, description="block to stop before; default: all")
    kinds: str = Field("auto", description="kinds of unit, comma-separated; auto: heads (key/value groups) and neurons")
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")
    largest_cut: float = Field(0.99, gt=0, le=1, description="largest share of a module that may go")
    reference: bool = Field(
        False, description="the released sign of euclidean and manhattan: large change = goes first"
    )
    stages: int = Field(5, ge=1, description="P, stages of pruning and training (sc.study)")
    slices: Slices = Field(Slices.LINEAR, description="steps per stage: linear, constant or cosine (sc.study)")
    alpha: float = Field(0.0, ge=0, le=1, description="weight of the dense teacher's logits in the loss (sc.study)")
    temperature: float = Field(2.0, gt=0, description="T of the teacher's logits (sc.study)")

    @property
    def step(self) -> float:
        """What an iteration adds to every share."""
        return self.total / self.iterations

    @property
    def structured(self) -> StructuredSettings:
        """What the search for sites and widths is told."""
        return StructuredSettings(
            kinds=self.kinds, multiple=self.multiple, largest_cut=self.largest_cut, normalise=Normalise.NONE
        )


def group_importance(view: View, batches: list[Batch], settings: AdaptPrunerSettings, key: str) -> dict[str, Tensor]:
    """One score per head and neuron of the model as it is now."""
    if settings.score is Score.RANDOM:
        rng = view.task.rng
        return {name: torch.rand(site.units, generator=rng("random", key, name)) for name, site in view.sites.items()}
    places = weight_places(view)
    if settings.score is Score.TAYLOR:
        names = sorted({name for name, _ in places})
        terms = weight_saliences(view.model, batches, names, settings.salience, view.task.progress)
        return group_scores(view.sites, along(terms, places, settings.reduce), settings.combine)
    tensors, power = tensors_of(view.model), 1.0 if settings.score is Score.L1 else 2.0

    def vector(name: str, dim: int) -> Tensor | None:
        return over_others(tensors[name], dim, power) if (name, dim) in places else None

    return group_scores(view.sites, vector, settings.combine)


@dataclass
class Adaptive:
    """The iterations on one model.

    Attributes:
        work: sites, structure and task.
        settings: of the method.
        blocks: site -> the decoder layer that it lies in.
        importance: v at the last iteration.
        shares: s after it.
        warnings: sentences for the user.
    """

    work: Work
    settings: AdaptPrunerSettings
    blocks: Mapping[str, str]
    importance: dict[str, float] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @property
    def whole(self) -> Masks:
        """Masks that keep everything."""
        return {name: torch.ones(site.units, dtype=torch.bool) for name, site in self.work.sites.items()}

    def shrink(self, masks: Masks, goals: list[Goal], key: str) -> Shrunk:
        """Cut further until every goal is met; widths are shares of what the masks keep at the start.

        Raises:
            BudgetError: a goal is out of reach, or not met after all iterations.
        """
        settings, scores = self.settings, dict[str, Tensor]()
        counts = start = {name: int(mask.sum()) for name, mask in masks.items()}
        self.refuse_unreachable(start, goals)
        self.shares, done = dict.fromkeys(masks, 0.0), 0
        for index in track(range(settings.iterations), self.work.task.progress, "adaptive cuts"):
            if all(goal.met(counts) for goal in goals):
                break
            found = self.look(masks, f"{key}/{index}")
            v = {name: self.importance[block] for name, block in self.blocks.items()}
            self.shares = moved_shares(self.shares, settings.step, settings.amplitude, v, settings.largest_cut)
            before, counts = counts, self.toward(start, counts, goals, found.keys())
            self.say_large_steps(start, before, counts)
            masks = masks | {name: keep_top(found[name], counts[name]) for name in found}
            scores, done = scores | found, index + 1
        self.refuse_unmet(counts, goals)
        return Shrunk(masks, scores, counts, done, self.warnings)

    def look(self, masks: Masks, key: str) -> dict[str, Tensor]:
        """Scores of all groups; also sets the layers' importance. Both on the cut model and the same fresh samples."""
        task, settings = self.work.task, self.settings
        total = sum(batch.samples for batch in task.batches)
        samples = max(1, min(total // 2, 512)) if settings.samples is None else settings.samples
        rng = task.rng("adapt_pruner", "samples", key)
        batches = fresh(task.batches, samples, settings.length, settings.batch, rng)

        def criterion(view: View) -> dict[str, Tensor]:
            names = list(dict.fromkeys(self.blocks.values()))
            changes = block_changes(view.model, names, batches, settings.distance, task.progress)
            if settings.reference and settings.distance is not Distance.COSINE:
                changes = {name: -value for name, value in changes.items()}
            self.importance = centred(changes)
            return group_importance(view, batches, settings, key)

        scores = self.work.scores(criterion, masks)
        if not any(self.importance.values()):
            self.say(f"all {len(self.importance)} layers are equally important, so all lose the same share")
        return scores

    def toward(self, start: Counts, counts: Counts, goals: list[Goal], scored: Collection[str]) -> Counts:
        """What is kept after an iteration; where a goal is met by it, no less than it asks for.

        A module that is down to what the code needs, such as one key/value head, is no site of the cut model any
        more: it has no score and stays.
        """
        found = dict(counts)
        for goal in goals:
            own = {name: counts[name] for name in goal.sites}
            if goal.met(own):
                continue
            wanted = own | {name: min(own[name], self.wanted(name, start[name])) for name in own if name in scored}
            multiples = {name: self.work.widths.step(self.work.sites[name]) for name in own}
            found |= last_step(own, wanted, goal, multiples) if goal.met(wanted) else wanted
        return found

    def wanted(self, name: str, units: int, share: float | None = None) -> int:
        """Kept units of a site that had `units`, at its present share or another."""
        site = self.work.sites[name]
        share = self.shares[name] if share is None else share
        return self.work.widths.rounded(site, kept_at(units, share, width_of(site)))

    def refuse_unreachable(self, start: Counts, goals: list[Goal]) -> None:
        """Say before anything is computed what even the largest cut would leave."""
        for goal in goals:
            own = {name: start[name] for name in goal.sites}
            least = {
                name: min(units, self.wanted(name, units, self.settings.largest_cut)) for name, units in own.items()
            }
            if not goal.met(least):
                raise BudgetError(
                    f"{self.work.task.budget} is out of reach: the modules that may be cut allow "
                    f"{goal.spent(least):.6g} to {goal.spent(own):.6g}, {goal.target:.6g} was asked for"
                )

    def refuse_unmet(self, counts: Counts, goals: list[Goal]) -> None:
        """Say what is left if the iterations were not enough."""
        settings = self.settings
        for goal in goals:
            if not goal.met(counts):
                raise BudgetError(
                    f"after all iterations {goal.spent(counts):.6g} is left where {goal.target:.6g} was asked for; "
                    f"raise total (now {settings.total:g}), or lower the amplitude below total / iterations = "
                    f"{settings.step:g}"
                )

    def say_large_steps(self, start: Counts, before: Counts, after: Counts) -> None:
        """The estimates of an iteration hold for small cuts only."""
        for name in start:
            gone = before[name] - after[name]
            if gone > 1 and gone > LARGE_STEP * start[name]:
                self.say(f"'{name}' lost {gone} of {start[name]} units in one iteration; take more iterations")

    def say(self, sentence: str) -> None:
        """Warn once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)


def width_of(site: Site) -> int:
    """Features of one unit in the module's root: the head dimension of a key/value head, 1 of a neuron."""
    return min(place.repeat * place.times for place in site.occurrences)


def adaptive(task: Task, settings: AdaptPrunerSettings) -> Adaptive:
    """Find the modules and say what will not work as meant.

    Raises:
        SettingsError: the weights are streamed, or the budget is a latency.
        BudgetError: the range of blocks is empty.
        ModelError: the model has no stack of blocks, or nothing in it can be cut.
    """
    if task.residency is not None:
        raise SettingsError("adapt_pruner needs gradients of a model that shrinks: load the whole model into memory")
    if task.budget.quantity is Quantity.MILLISECONDS:
        raise SettingsError("adapt_pruner takes a sparsity or a budget in parameters, flops or bytes, not a latency")
    stack = main_stack(task.model)
    blocks = blocks_between(stack, settings.first, len(stack.blocks) if settings.last is None else settings.last)
    work = begin(task, settings.structured, lambda site: block_of(site, blocks) is not None)
    owners = {name: block_of(site, blocks) or "" for name, site in work.sites.items()}
    found = Adaptive(work, settings, owners)
    if settings.amplitude > settings.step * (1 + 1e-9):
        found.say(
            f"amplitude {settings.amplitude:g} is above total / iterations = {settings.step:g}: shares of some modules "
            f"saturate at 0 or {settings.largest_cut:g}"
        )
    shortest = min((window_length(batch) or settings.length for batch in task.batches), default=settings.length)
    if shortest < settings.length:
        found.say(
            f"calibration windows have {shortest} tokens, fewer than length={settings.length}; whole ones are used"
        )
    return found


def plan(task: Task, settings: AdaptPrunerSettings) -> Decision:
    """Small cuts until the budget is met."""
    run = adaptive(task, settings)
    found = run.shrink(run.whole, goals_of(run.work), "plan")
    decision = run.work.conclude(found.masks, found.scores)
    decision.warnings += run.warnings
    for name, block in run.blocks.items():
        figures = {"importance": run.importance.get(block, 0.0), "share": run.shares[name]}
        decision.facts.setdefault(name, {}).update({key: round(value, 6) for key, value in figures.items()})
    return decision


def procedure(study: Study, settings: AdaptPrunerSettings) -> Findings:
    """Adapt-Accel: a row per stage with its size, widths and the figures of `fit` before and after its training."""
    rounds = Interleaved(study, settings.stages, settings.slices, "adapt_pruner", settings.model_dump(mode="json"))
    if settings.alpha:
        rounds.distil(settings.temperature, settings.alpha)

    def shrink(task: Task, masks: Masks, stage: int) -> tuple[Work, Shrunk]:
        run = adaptive(task, settings)
        return run.work, run.shrink(masks or run.whole, goals_of(run.work, stage, settings.stages), f"stage {stage}")

    return rounds.run(shrink)


method = Method(
    name="adapt_pruner",
    paper="38",
    title="Adapt-Pruner: adaptive structural pruning for efficient small language model training",
    citation="Pan, Shekhar, Wang, Diao, Zhang, Pan, Pi, Zhang 2025, arXiv 2502.03460",
    formula="s_i <- clip(s_i + b - A v_i, 0, 0.99), v_i = centred change of layer i; lowest sum |w dL/dw| go",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING, t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.LOSS_CHANGE, t.Criterion.SENSITIVITY_SALIENCY, t.Criterion.SIMILARITY}),
        granularity=frozenset({t.Granularity.HEAD, t.Granularity.NEURON}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.LLM}),
        fusion=frozenset({t.Fusion.DISTILLATION}),
        physical=True,
    ),
    settings=AdaptPrunerSettings,
    run=plan,
    procedure=procedure,
    units=UnitKind.HEAD,
    exact=Group.TOTAL,
    needs_data=True,
    needs_labels=False,
    structured=True,
)
