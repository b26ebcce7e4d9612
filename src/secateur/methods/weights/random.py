"""Random pruning: the control that every criterion must beat (layer ratios after Liu et al. 2022, arXiv 2202.02643).

Every weight draws an independent number from a generator seeded by the seed and its layer's name, so
a layer's mask does not depend on what other layers there are.
"""

from __future__ import annotations

from pydantic import Field

from secateur.allocate.spread import Spread, choose
from secateur.core import tags as t
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.units import UnitKind
from secateur.scores.weights import uniform_random
from secateur.structure.sites import weight_layers


class RandomSettings(Settings):
    """Settings of random pruning."""

    spread: Spread = Field(Spread.UNIFORM, description="layer densities: uniform, erk, or one global ranking")


def plan(task: Task, settings: RandomSettings) -> Decision:
    """Draw, rank, cut."""
    found = weight_layers(task.model, task.wants)
    scores = {name: uniform_random(site.shape, task.rng("random", name)) for name, site in found.sites.items()}
    return Decision(
        sites=found.sites,
        masks=choose(scores, found.sites, task.budget.of(UnitKind.WEIGHT), settings.spread),
        scores=scores if task.keep_scores else {},
        warnings=[f"'{name}' was not pruned: it {why}" for name, why in found.skipped.items()],
    )


method = Method(
    name="random",
    paper="42",
    title="The unreasonable effectiveness of random pruning (here: the random control after training)",
    citation="Liu, Chen, Chen, Shen, Mocanu, Wang, Pechenizkiy 2022, ICLR, arXiv 2202.02643",
    formula="S ~ U(0, 1), lowest per layer at uniform or ERK densities",
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
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    patterns=True,
)
