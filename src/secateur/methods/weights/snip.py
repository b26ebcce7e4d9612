"""SNIP: single-shot pruning by connection sensitivity (Lee, Ajanthan, Torr 2019, ICLR, arXiv 1810.02340).

Before training, on one mini-batch: a mask c = 1 on every weight, S = |dL/dc| = |w * dL/dw|, one ranking over
all layers. Only the order counts, so the paper's division by the sum is left out. Batch norms
normalise by the mini-batch, as at the first training step.

The scores follow the initialisation: a layer with large weights has large scores. The paper therefore
wants weights of equal variance per unit, and the copy of SNIP in the random-pruning code draws new Xavier
weights for the scores; `redraw` does that. The default scores the weights that will be trained. That
code also keeps whatever ties with the threshold; counts are exact here.

At extreme sparsity one ranking can empty a layer; that is refused unless the budget has a floor.
"""

from __future__ import annotations

from pydantic import Field

from secateur.allocate.spread import Spread, choose
from secateur.core import tags as t
from secateur.core.errors import DataError
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.units import UnitKind
from secateur.data.batches import drawn
from secateur.scores.sensitivity import SNIP_SAMPLES, snip
from secateur.structure.sites import weight_layers


class SnipSettings(Settings):
    """Settings of SNIP."""

    samples: int = Field(SNIP_SAMPLES, ge=1, description="labelled samples in the one mini-batch, drawn from the data")
    redraw: bool = Field(False, description="score new Xavier-normal weights instead of the given ones")
    spread: Spread = Field(Spread.GLOBAL, description="one ranking over all layers (paper), or a rule for comparison")


def plan(task: Task, settings: SnipSettings) -> Decision:
    """One backward pass on one mini-batch, one ranking."""
    if not task.batches:
        raise DataError("snip needs a mini-batch with labels, or text; give data=... (--data)")
    found = weight_layers(task.model, task.wants)
    batch = drawn(task.batches, settings.samples, task.rng("snip", "batch"))
    redraw = (lambda name: task.rng("snip", "xavier", name)) if settings.redraw else None
    scores = snip(task.model, batch, list(found.layers), task.progress, redraw)
    decision = Decision(
        sites=found.sites,
        masks=choose(scores, found.sites, task.budget.of(UnitKind.WEIGHT), settings.spread),
        scores=scores if task.keep_scores else {},
        warnings=[f"'{name}' was not pruned: it {why}" for name, why in found.skipped.items()],
    )
    silent = [name for name, score in scores.items() if not score.any()]
    decision.warnings += [f"layer '{name}' has no gradient on this data: its weights went first" for name in silent]
    return decision


method = Method(
    name="snip",
    paper="42",
    title="SNIP: single-shot network pruning based on connection sensitivity",
    citation="Lee, Ajanthan, Torr 2019, ICLR, arXiv 1810.02340",
    formula="S = |w * dL/dw| before training, lowest over all layers together",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED, t.Speedup.SEMI_STRUCTURED}),
        when=frozenset({t.When.BEFORE_TRAINING}),
        criterion=frozenset({t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.SCRATCH,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.LLM, t.Domain.OTHER}),
    ),
    settings=SnipSettings,
    run=plan,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    needs_data=True,
    needs_labels=True,
    patterns=True,
)
