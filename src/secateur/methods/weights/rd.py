"""RD pruning: the sparsity of every layer from rate-distortion curves (Xu et al., ICCV 2023).

For layer l and amount phi = d/D, delta_l(phi) is the squared error of the NETWORK's output when the
phi * n_l smallest |w| of that layer alone are zeroed (worst case over the calibration samples, as in the
published runs, or their mean). Output errors of several layers add up to first order, so the amounts are

    argmin sum_l delta_l(phi_l)   subject to   sum_l n_l (1 - phi_l) <= budget,

a multiple-choice knapsack, solved exactly. |w| ranks the weights inside a layer. The budget counts
weights or, with FLOPs per weight in place of 1, the FLOPs of the model.

The official code (RD_PRUNE, tools/algo.py) tests the budget strictly and lets the smallest layer take the
amount *closest* to what is left, so it may keep more than asked; amounts end as fractions of the grid, and a
FLOPs budget lacks its function. Here the budget is never exceeded, and what the grid leaves over is given to the
layer with the steepest curve, so that a count of weights is met exactly. A layer never goes altogether: the last
amount, 1, is not offered, because a plain network has no other way around the layer.

Iterative use: plan at R_t = 1 - (1 - a)^t, apply, retrain with the mask, plan again. Weights that are exactly
zero count as removed and do not come back (`monotone`).
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from math import floor, inf

import torch
from pydantic import Field

from secateur.allocate.amounts import Amounts, allocate, present_cost
from secateur.allocate.knapsack import Choice
from secateur.allocate.spread import keep_counts
from secateur.core import tags as t
from secateur.core.budget import Quantity
from secateur.core.errors import BudgetError, DataError
from secateur.core.method import Batch, Decision, Group, Method, Protocol, Settings, Task
from secateur.core.units import UnitKind
from secateur.data.calibration import normal_like, regrouped
from secateur.data.running import resized
from secateur.measure.shares import weight_flops
from secateur.scores.weights import magnitude
from secateur.stats.responses import Responses, response_curves
from secateur.structure.layers import WeightLayer
from secateur.structure.sites import weight_layers


class RdSettings(Settings):
    """Settings; defaults as in the paper's published runs."""

    worst_case: bool = Field(True, description="largest error over the samples; false: their mean")
    resolution: int = Field(100, ge=2, le=10_000, description="amounts tried per layer: d / resolution")
    quantum: int = Field(
        0, ge=0, description="weights (or FLOPs) that the solver counts as one, rounded up; 1 = exact, 0 = by size"
    )
    monotone: bool = Field(True, description="weights that are zero already never count as kept (iterative pruning)")
    zero_data: bool = Field(
        False, description="standard normal inputs in place of the data, of which only shapes count"
    )
    batch: int = Field(64, ge=1, description="samples run at once")


def plan(task: Task, settings: RdSettings) -> Decision:
    """Curves, knapsack, masks by magnitude."""
    found = weight_layers(task.model, task.wants)
    batches = calibration(task, settings)

    def curves(layers: Mapping[str, WeightLayer], resolution: int) -> Responses:
        progress, worst = task.progress, settings.worst_case
        return response_curves(task.model, layers, batches, resolution, progress, worst_case=worst)

    responses = curves(found.layers, 1)  # a whole layer each: which ones matter at all
    if not responses.curves:
        raise DataError("no weight layer of the model is used on the calibration data; give other data")
    skipped = found.skipped | dict.fromkeys(responses.unreached, "is not used in the forward pass")
    reached = {name: found.layers[name] for name in responses.curves}
    prices, limit = terms(task, reached, batches[0])
    layers = amounts(task, settings, reached, responses, prices)
    if present_cost(layers) > limit:
        layers = amounts(task, settings, reached, curves(reached, settings.resolution), prices)
    counts, choice = allocate(layers, limit, settings.quantum or None)
    scores = {name: magnitude(layer.weight) for name, layer in reached.items()}
    return Decision(
        sites={name: layer.site for name, layer in reached.items()},
        masks=keep_counts(scores, counts),
        scores=scores if task.keep_scores else {},
        facts={name: _facts(layer, counts[name], choice.picks.get(name, 0)) for name, layer in layers.items()},
        warnings=[f"'{name}' was not pruned: it {why}" for name, why in skipped.items()] + _remarks(layers, choice),
    )


def calibration(task: Task, settings: RdSettings) -> list[Batch]:
    """The data in batches that are run at once, or noise of their shapes, drawn anew for every budget."""
    batches = regrouped(task.batches, settings.batch)
    if not settings.zero_data:
        return batches
    return [normal_like(batch, task.rng("rd", str(task.budget), str(i))) for i, batch in enumerate(batches)]


def terms(task: Task, layers: Mapping[str, WeightLayer], batch: Batch) -> tuple[dict[str, Fraction], int]:
    """What one weight of each layer costs, and how much the layers may cost together.

    A budget in FLOPs is of the whole model on one sample; up to 1 it is the share kept.
    """
    budget = task.budget.of(UnitKind.WEIGHT)
    if budget.quantity is not Quantity.FLOPS:
        total = sum(layer.site.units for layer in layers.values())
        return dict.fromkeys(layers, Fraction(1)), budget.keep(total)
    prices, rest = weight_flops(task.model, layers, resized(batch, 1), task.progress)
    dense = rest + int(sum(price * layers[name].site.units for name, price in prices.items()))
    allowed = budget.amount * dense if budget.amount <= 1 else budget.amount
    if allowed < rest:
        raise BudgetError(
            f"{budget} is out of reach: {rest} of the model's {dense} FLOPs a sample are not in the pruned layers; "
            f"the reachable range is {rest} to {dense}, or {rest / dense:.4g} to 1 as a share"
        )
    return prices, floor(allowed) - rest


def amounts(
    task: Task,
    settings: RdSettings,
    layers: Mapping[str, WeightLayer],
    responses: Responses,
    prices: Mapping[str, Fraction],
) -> dict[str, Amounts]:
    """The knapsack's candidates."""
    made, minimum = {}, task.budget.of(UnitKind.WEIGHT).floor
    for name, layer in layers.items():
        curve, size = responses.curves[name], layer.site.units
        most = int(torch.count_nonzero(layer.weight)) if settings.monotone else size
        made[name] = Amounts(size, most, curve.removed, curve.distortions, prices[name], minimum)
    return made


def _facts(layer: Amounts, kept: int, pick: int) -> dict[str, float]:
    return {"amount": 1 - kept / layer.size, "distortion": layer.distortions[pick]}


def _remarks(layers: Mapping[str, Amounts], choice: Choice) -> list[str]:
    zeros = sum(layer.size - layer.most for layer in layers.values())
    if not choice.picks:
        return [f"nothing more was removed: {zeros} weights that are zero already meet the budget"] if zeros else []
    remarks = [
        f"layer '{name}' was held at the largest amount on offer, {layers[name].removed[d] / layers[name].size:.4g}; "
        f"a higher resolution offers larger ones"
        for name, d in choice.picks.items()
        if d == layers[name].last
    ]
    remarks += [
        f"some amounts of layer '{name}' make the output NaN or infinite; they were not considered"
        for name, layer in layers.items()
        if inf in layer.distortions[: layer.last + 1]
    ]
    return remarks + ([] if choice.exact else [f"the budget was solved in units of {choice.quantum}"])


method = Method(
    name="rd",
    paper="31",
    title="Efficient Joint Optimization of Layer-Adaptive Weight Pruning in Deep Neural Networks",
    citation="Xu, Wang, Geng, Lin, Wu, Li, Lin 2023, ICCV 2023, arXiv 2308.10438",
    formula="min sum of output distortions delta_l(phi_l) under a budget (knapsack); inside a layer S = |w|",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.SEARCHED,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.OTHER}),
    ),
    settings=RdSettings,
    run=plan,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    needs_data=True,
)
