"""First-order Taylor pruning (Molchanov, Mallya, Tyree, Frosio, Kautz 2019, CVPR, arXiv 1906.10771).

S = |w * dL/dw|: the change of the loss, to first order, when the weight is set to zero. The gradient
is of the mean loss over the calibration data (signs may cancel between samples, as in LLM-Pruner's
`param_first`). Unlike magnitude the score does not change when a layer is rescaled and the next one
scaled back. Scope on single weights; on channels and heads it comes with the structure engine.
"""

from __future__ import annotations

from pydantic import Field

from secateur.allocate.spread import Spread, choose
from secateur.core import tags as t
from secateur.core.errors import DataError
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.units import UnitKind
from secateur.scores.weights import taylor
from secateur.stats.gradients import weight_gradients
from secateur.structure.sites import weight_layers


class TaylorSettings(Settings):
    """Settings of first-order Taylor pruning."""

    spread: Spread = Field(Spread.GLOBAL, description="one ranking over all layers, or uniform/erk densities")


def plan(task: Task, settings: TaylorSettings) -> Decision:
    """One backward pass over the calibration data, score, one ranking."""
    if not task.batches:
        raise DataError("taylor needs calibration data with labels, or text; give data=... (--data)")
    found = weight_layers(task.model, task.wants)
    for layer in found.layers.values():
        _ = layer.matrix  # refuses NaN and infinity, naming the layer
    gradients = weight_gradients(task.model, task.batches, list(found.layers), task.progress)
    scores = {name: taylor(layer.weight, gradients[name]) for name, layer in found.layers.items()}
    decision = Decision(
        sites=found.sites,
        masks=choose(scores, found.sites, task.budget.of(UnitKind.WEIGHT), settings.spread),
        scores=scores if task.keep_scores else {},
        warnings=[f"'{name}' was not pruned: it {why}" for name, why in found.skipped.items()],
    )
    silent = [name for name, gradient in gradients.items() if not gradient.any()]
    decision.warnings += [f"layer '{name}' has no gradient on this data: its weights went first" for name in silent]
    return decision


method = Method(
    name="taylor",
    paper="26",
    title="Importance estimation for neural network pruning",
    citation="Molchanov, Mallya, Tyree, Frosio, Kautz 2019, CVPR, arXiv 1906.10771",
    formula="S = |w * dL/dw|",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED, t.Speedup.SEMI_STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.LLM, t.Domain.OTHER}),
    ),
    settings=TaylorSettings,
    run=plan,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    needs_data=True,
    needs_labels=True,
    patterns=True,
)
