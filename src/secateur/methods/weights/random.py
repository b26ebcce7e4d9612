"""Random pruning (Liu, Chen, Chen, Shen, Mocanu, Wang, Pechenizkiy 2022, ICLR, arXiv 2202.02643).

Only the layer densities d_l are designed; which weights of a layer stay is drawn. As a start for sparse
training ERK densities or those of SNIP come near the dense network once it is wide enough; at the
default, uniform densities, it is the control that every criterion must beat. Densities of a criterion
(snip, grasp, synflow) are read off its own masks, whose positions are then thrown away: the draws do not
know them.

Every weight draws an independent number from a generator seeded by the seed and its layer's name, so
a layer's numbers do not depend on what other layers there are. The official code draws every weight with
probability d_l on the global generator (`sampling=bernoulli` here, realised density fluctuates); exact
counts, with the total exact by largest remainder, are the default. Its uniform+ misses the budget (the
density of the rest is taken over all weights); ours meets it.

Zeros bring no speed without sparse kernels, and narrow networks do not survive random positions.
"""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum

from pydantic import Field
from torch import Tensor

from secateur.allocate.counts import largest_remainder, with_floor
from secateur.allocate.ratios import Ends, Shares
from secateur.allocate.spread import Spread, choose, choose_in_rounds, keep_counts, shares
from secateur.core import tags as t
from secateur.core.budget import Budget
from secateur.core.errors import BudgetError, DataError
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.select import keep_top
from secateur.core.units import Site, UnitKind
from secateur.data.batches import drawn
from secateur.data.example import example_for
from secateur.scores.flow import SYNFLOW_ROUNDS, synaptic_flow
from secateur.scores.sensitivity import GRASP_PER_CLASS, SNIP_SAMPLES, grasp, halves, snip
from secateur.scores.weights import uniform_random
from secateur.structure.sites import weight_layers


class Densities(StrEnum):
    """Where the layer densities come from: a rule on shapes, one global draw, or a criterion's own masks."""

    UNIFORM = "uniform"
    UNIFORM_PLUS = "uniform_plus"
    ER = "er"
    ERK = "erk"
    ERK_PLUS = "erk_plus"
    GLOBAL = "global"
    SNIP = "snip"
    GRASP = "grasp"
    SYNFLOW = "synflow"


class Sampling(StrEnum):
    """Exactly so many positions of a layer, or every weight by itself."""

    EXACT = "exact"
    BERNOULLI = "bernoulli"


class RandomSettings(Settings):
    """Settings of random pruning; the paper's best densities are erk and snip."""

    spread: Densities = Field(
        Densities.UNIFORM,
        description="layer densities: uniform, uniform_plus, er, erk, erk_plus, one global draw, or those that snip, "
        "grasp (labelled data) or synflow would give",
    )
    sampling: Sampling = Field(Sampling.EXACT, description="exact counts, or every weight with its layer's probability")
    power: float = Field(1.0, gt=0, description="exponent of the ER and ERK factors")
    first: str | None = Field(None, description="layer dense in uniform_plus; default: the first, if a convolution")
    classifier: str | None = Field(None, description="classifier in uniform_plus and erk_plus; default: the last layer")
    classifier_density: float = Field(1.0, gt=0, le=1, description="density of the classifier in erk_plus")

    @property
    def uses_data(self) -> bool:
        """Whether the densities are read off labelled samples."""
        return self.spread in (Densities.SNIP, Densities.GRASP)

    @property
    def uses_example(self) -> bool:
        """Whether the model is run on ones of its inputs' shape."""
        return self.spread is Densities.SYNFLOW

    @property
    def ends(self) -> Ends:
        """What the rules on shapes leave open."""
        return Ends(self.power, self.first, self.classifier, self.classifier_density)


def plan(task: Task, settings: RandomSettings) -> Decision:
    """Densities first, then draws."""
    found = weight_layers(task.model, task.wants)
    scores = {name: uniform_random(site.shape, task.rng("random", name)) for name, site in found.sites.items()}
    budget = task.budget.of(UnitKind.WEIGHT)
    decision = Decision(sites=found.sites, scores=scores if task.keep_scores else {})
    decision.warnings = [f"'{name}' was not pruned: it {why}" for name, why in found.skipped.items()]
    if budget.pattern:
        if settings.sampling is Sampling.BERNOULLI:
            raise BudgetError(f"sampling=bernoulli cannot keep the pattern {budget.pattern}; use sampling=exact")
        decision.masks = choose(scores, found.sites, budget, Spread.GLOBAL)
        return decision
    wanted = layer_shares(task, settings, scores, found.sites)
    draw = bernoulli if settings.sampling is Sampling.BERNOULLI else exact
    decision.masks, empty = draw(scores, wanted, budget)
    decision.warnings += [f"layer '{name}' would keep no weight; it was held at 1" for name in empty]
    return decision


def layer_shares(task: Task, settings: RandomSettings, scores: dict[str, Tensor], sites: dict[str, Site]) -> Shares:
    """How many weights each layer should keep: real numbers for a rule, counts for a ranking."""
    budget = replace(task.budget.of(UnitKind.WEIGHT), floor=0)
    match settings.spread:
        case Densities.SNIP | Densities.GRASP | Densities.SYNFLOW:
            masks = criterion_masks(task, settings.spread, sites, budget)
        case Densities.GLOBAL:
            masks = choose(scores, sites, budget, Spread.GLOBAL)
        case _:
            total = budget.keep(sum(site.units for site in sites.values()))
            shapes = {name: site.shape for name, site in sites.items()}
            return shares(Spread(settings.spread.value), shapes, total, settings.ends)
    return {name: float(mask.sum()) for name, mask in masks.items()}  # positions are thrown away here


def criterion_masks(task: Task, spread: Densities, sites: dict[str, Site], budget: Budget) -> dict[str, Tensor]:
    """What SNIP (on Xavier weights), GraSP or SynFlow would keep.

    Raises:
        DataError: no samples for a criterion that needs them.
    """
    names = list(sites)
    if spread is Densities.SYNFLOW:
        score = synaptic_flow(task.model, example_for(task.model, task.example), names)
        return choose_in_rounds(score, sites, budget, SYNFLOW_ROUNDS, task.progress)[0]
    if not task.batches:
        raise DataError(f"spread={spread.value} reads the densities off labelled samples; give data=... (--data)")
    if spread is Densities.SNIP:
        batch = drawn(task.batches, SNIP_SAMPLES, task.rng("snip", "batch"))
        scores = snip(task.model, batch, names, task.progress, lambda name: task.rng("snip", "xavier", name))
    else:
        scores = grasp(task.model, halves(task.batches, GRASP_PER_CLASS, task.rng("grasp", "batch")), names)
    return choose(scores, sites, budget, Spread.GLOBAL)


def exact(scores: dict[str, Tensor], wanted: Shares, budget: Budget) -> tuple[dict[str, Tensor], list[str]]:
    """Rounded counts with an exact total and at least one weight per layer; the layers that had none."""
    sizes = {name: score.numel() for name, score in scores.items()}
    counts = largest_remainder(wanted, round(sum(wanted.values())), sizes)
    floored = with_floor(counts, sizes, max(1, budget.floor))
    return keep_counts(scores, floored), [name for name, count in counts.items() if not count]


def bernoulli(scores: dict[str, Tensor], wanted: Shares, budget: Budget) -> tuple[dict[str, Tensor], list[str]]:
    """Every weight by itself, kept with its layer's density; the layers that drew none."""
    masks, empty = {}, []
    for name, score in scores.items():
        masks[name] = score >= 1 - wanted[name] / score.numel()
        kept, least = int(masks[name].sum()), min(max(1, budget.floor), score.numel())
        if kept < least:
            masks[name] = keep_top(score.reshape(-1), least).view(score.shape)
        empty += [] if kept else [name]
    return masks, empty


method = Method(
    name="random",
    paper="42",
    title="The unreasonable effectiveness of random pruning: return of the most naive baseline for sparse training",
    citation="Liu, Chen, Chen, Shen, Mocanu, Wang, Pechenizkiy 2022, ICLR, arXiv 2202.02643",
    formula="S ~ U(0, 1), lowest per layer at uniform, ER(K) or a criterion's densities",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED, t.Speedup.SEMI_STRUCTURED}),
        when=frozenset({t.When.BEFORE_TRAINING, t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.RANDOM}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.SCRATCH,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.LLM, t.Domain.OTHER}),
    ),
    settings=RandomSettings,
    run=plan,
    streams=True,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    patterns=True,
)
