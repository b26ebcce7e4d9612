"""GraSP: keep what keeps the gradient flowing (Wang, Zhang, Grosse 2020, ICLR, arXiv 2002.07376).

Before training, on a class-balanced batch: removing w changes the gradient's norm by about -w * (H g), H the
Hessian and g the gradient of the loss; the weights with the largest values go, those whose removal would
slow training most stay. Logits are divided by T = 200. The batch goes in two halves, g and H g are summed.
Scores in the plan are w * (H g): higher = keep.

The official code sorts the batch by class before halving it, so each half holds half of the classes.
Without batch norm that changes nothing; with it the statistics differ. `reference` does the same; the default
mixes the classes. It also keeps the weight at the threshold, so one too few goes; counts are exact here.

At high sparsity one ranking can empty a layer; that is refused unless the budget has a floor.
"""

from __future__ import annotations

from pydantic import Field

from secateur.allocate.spread import Spread, choose
from secateur.core import tags as t
from secateur.core.errors import DataError
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.units import UnitKind
from secateur.scores.sensitivity import GRASP_PER_CLASS, GRASP_TEMPERATURE, grasp, halves
from secateur.structure.sites import weight_layers


class GraspSettings(Settings):
    """Settings of GraSP."""

    per_class: int = Field(
        GRASP_PER_CLASS, ge=1, description="samples of each class; of text, 10 times as many windows"
    )
    temperature: float = Field(GRASP_TEMPERATURE, gt=0, description="the logits are divided by it")
    spread: Spread = Field(Spread.GLOBAL, description="one ranking over all layers (paper), or a rule for comparison")
    reference: bool = Field(False, description="the official code's halves: the batch sorted by class, then cut")


def plan(task: Task, settings: GraspSettings) -> Decision:
    """Two backward passes over a balanced batch, one ranking."""
    if not task.batches:
        raise DataError("grasp needs samples with labels, or text; give data=... (--data)")
    found = weight_layers(task.model, task.wants)
    parts = halves(task.batches, settings.per_class, task.rng("grasp", "batch"), settings.reference)
    scores = grasp(task.model, parts, list(found.layers), settings.temperature)
    decision = Decision(
        sites=found.sites,
        masks=choose(scores, found.sites, task.budget.of(UnitKind.WEIGHT), settings.spread),
        scores=scores if task.keep_scores else {},
        warnings=[f"'{name}' was not pruned: it {why}" for name, why in found.skipped.items()],
    )
    silent = [name for name, score in scores.items() if not score.any()]
    decision.warnings += [f"layer '{name}' has no gradient flow on this data: all scores are 0" for name in silent]
    return decision


method = Method(
    name="grasp",
    paper="42",
    title="Picking winning tickets before training by preserving gradient flow",
    citation="Wang, Zhang, Grosse 2020, ICLR, arXiv 2002.07376",
    formula="S = w * (H g) before training, lowest over all layers together",
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
    settings=GraspSettings,
    run=plan,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    needs_data=True,
    needs_labels=True,
    patterns=True,
)
