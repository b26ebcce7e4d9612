"""Global magnitude pruning with a minimum threshold (Gupta et al. 2022, arXiv 2209.14624).

One list of |w| over every convolution and linear weight, classifier included; the smallest
floor(sparsity * N) go. At extreme sparsity a layer can be emptied; the minimum threshold keeps at
least `minimum` weights in every layer and takes them from the others, so the total stays exact.

The official code keeps the k-th smallest (its `>=` prunes one weight fewer), starts its list with an
uninitialised element, and refines layer sparsities by repeated scaling; `reference` reproduces its
thresholds and its refinement without the uninitialised element.

During training (`sparsify`) the same ranking and the same minimum are applied at every event of a cubic
schedule (Zhu and Gupta 2017), to the magnitudes of that moment; the paper's gradual variant, for which there is
no official code. Weight sparsity is not FLOPs sparsity: early convolutions stay denser.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import floor

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.counts import reference_floor
from secateur.allocate.spread import Spread, choose
from secateur.core import tags as t
from secateur.core.budget import Budget
from secateur.core.errors import SettingsError
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.progress import track
from secateur.core.units import Site, UnitKind
from secateur.scores.weights import magnitude
from secateur.structure.sites import weight_layers
from secateur.train.events import PruningEvents
from secateur.train.parts import PruneTo
from secateur.train.schedules import Ramp, Shape
from secateur.train.sparsifier import Order, Sparsifier


class GlobalMagnitudeSettings(PruningEvents):
    """Settings; the code's default minimum is 0.05 % of all weights, the paper's plain variant has none.

    The events are those of the gradual variant; `sc.plan` has none.
    """

    minimum: int = Field(0, ge=0, description="every layer keeps at least this many weights (MT, absolute)")
    minimum_percent: float = Field(
        0.0, ge=0, le=100, description="the same in percent of ALL prunable weights, per layer (official code: 0.05)"
    )
    spread: Spread = Field(Spread.GLOBAL, description="one list over all layers (paper), or uniform/erk for comparison")
    reference: bool = Field(False, description="the official code's thresholds: keeps the k-th smallest weight")
    stop: float = Field(0.75, gt=0, description="last pruning event: up to 1 a share of the training, above it a step")

    def least(self, units: int, asked: int) -> int:
        """Weights that every layer keeps, of `units` in all, where the budget asks for a floor of `asked`."""
        return max(self.minimum, floor(self.minimum_percent * units / 100), asked)


def plan(task: Task, settings: GlobalMagnitudeSettings) -> Decision:
    """Score everything, one ranking, floors, exact total."""
    found = weight_layers(task.model, task.wants)
    scores = {name: magnitude(layer.weight) for name, layer in track(found.layers.items(), task.progress, "magnitudes")}
    for layer in found.layers.values():
        _ = layer.matrix  # refuses NaN and infinity, naming the layer
    budget = task.budget.of(UnitKind.WEIGHT)
    everything = sum(score.numel() for score in scores.values())
    minimum = settings.least(everything, budget.floor)
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


class FlooredPruneTo(PruneTo):
    """Prune along a ramp with the minimum threshold at every event."""

    def __init__(self, ramp: Ramp, settings: GlobalMagnitudeSettings):
        super().__init__(ramp, settings.spread)
        self.settings = settings

    def floor(self, run: Sparsifier) -> int:
        """The minimum threshold, at least one weight."""
        return self.settings.least(run.units, run.floor)


def parts(order: Order, settings: GlobalMagnitudeSettings) -> Sequence[PruneTo]:
    """The gradual variant: cubic from dense to the budget.

    Raises:
        SettingsError: the window is empty, or the released thresholds are asked for.
    """
    if settings.reference:
        raise SettingsError("the official code has no gradual variant; leave reference off while training")
    ramp = Ramp(settings.pruning(order.steps), initial=1.0, final=1 - order.budget.sparsity, shape=Shape.CUBIC)
    return [FlooredPruneTo(ramp, settings)]


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
    parts=parts,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    patterns=True,
)
