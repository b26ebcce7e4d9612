"""Global magnitude pruning with a minimum threshold (Gupta et al. 2022, arXiv 2209.14624).

One list of |w| over every convolution and linear weight, classifier included; the smallest
floor(sparsity * N) go. At extreme sparsity a layer can be emptied; the minimum threshold keeps at
least `minimum` weights in every layer and takes them from the others, so the total stays exact.

The official code keeps the k-th smallest (its `>=` prunes one weight fewer), starts its list with an
uninitialised element, and refines layer sparsities by repeated scaling; `reference` reproduces its
thresholds and its refinement without the uninitialised element. The paper's gradual variant needs
training and belongs to the training engine.
"""

from __future__ import annotations

from math import floor

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.counts import reference_floor
from secateur.allocate.spread import Spread, choose
from secateur.core import tags as t
from secateur.core.budget import Budget
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.progress import track
from secateur.core.units import Site, UnitKind
from secateur.scores.weights import magnitude
from secateur.structure.sites import weight_layers


class GlobalMagnitudeSettings(Settings):
    """Settings; the code's default minimum is 0.05 % of all weights, the paper's plain variant has none."""

    minimum: int = Field(0, ge=0, description="every layer keeps at least this many weights (MT, absolute)")
    minimum_percent: float = Field(
        0.0, ge=0, le=100, description="the same in percent of ALL prunable weights, per layer (official code: 0.05)"
    )
    spread: Spread = Field(Spread.GLOBAL, description="one list over all layers (paper), or uniform/erk for comparison")
    reference: bool = Field(False, description="the official code's thresholds: keeps the k-th smallest weight")


def plan(task: Task, settings: GlobalMagnitudeSettings) -> Decision:
    """Score everything, one ranking, floors, exact total."""
    found = weight_layers(task.model, task.wants)
    scores = {name: magnitude(layer.weight) for name, layer in track(found.layers.items(), task.progress, "magnitudes")}
    for layer in found.layers.values():
        _ = layer.matrix  # refuses NaN and infinity, naming the layer
    budget = task.budget.of(UnitKind.WEIGHT)
    everything = sum(score.numel() for score in scores.values())
    minimum = max(settings.minimum, floor(settings.minimum_percent * everything / 100), budget.floor)
    decision = Decision(sites=found.sites, scores=scores if task.keep_scores else {})
    if settings.reference:
        decision.masks = reference_masks(scores, budget.sparsity, minimum)
    else:
        floored = Budget(budget.amount, budget.quantity, minimum, budget.pattern)
        decision.masks = choose(scores, found.sites, floored, settings.spread)
    decision.warnings = [f"'{name}' was not pruned: it {why}" for name, why in found.skipped.items()]
    decision.warnings += _clamped(decision.masks, found.sites, minimum)
    return decision


def _clamped(masks: dict[str, Tensor], sites: dict[str, Site], minimum: int) -> list[str]:
    at_floor = [name for name, mask in masks.items() if 0 < minimum == int(mask.sum()) < sites[name].units]
    return [f"layer '{name}' was held at the minimum of {minimum} weights" for name in at_floor]


def reference_masks(scores: dict[str, Tensor], sparsity: float, minimum: int) -> dict[str, Tensor]:
    """The official code's masks: threshold at the k-th smallest, `>=` keeps; refined per layer with MT."""
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    threshold = flat.kthvalue(max(1, floor(sparsity * flat.numel()))).values
    masks = {name: score >= threshold for name, score in scores.items()}
    if not minimum:
        return masks
    sizes = {name: score.numel() for name, score in scores.items()}
    found = {name: 1 - int(mask.sum()) / mask.numel() for name, mask in masks.items()}
    refined = reference_floor(sizes, found, sparsity, minimum)
    return {
        name: score >= score.reshape(-1).kthvalue(max(1, floor(refined[name] * sizes[name]))).values
        for name, score in scores.items()
    }


method = Method(
    name="global_magnitude",
    paper="15",
    title="Is complexity required for neural network pruning? A case study on global magnitude pruning",
    citation="Gupta, Camci, Keneta, Vaidyanathan, Kanodia, James, Foo, Wu, Lin 2022, arXiv 2209.14624",
    formula="S = |w|, lowest over all layers together, every layer keeps at least a minimum",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED, t.Speedup.SEMI_STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_FREE,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.LLM, t.Domain.OTHER}),
    ),
    settings=GlobalMagnitudeSettings,
    run=plan,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    patterns=True,
)
