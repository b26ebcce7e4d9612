"""The journey matters: prune in the middle half of the pre-training's compute (Jin et al., ICLR 2025).

Dense for the first quarter of the compute, global magnitude pruning in K events over the middle half, sparse for
the last quarter. Every event removes the same share of what is left, so that after event j = 0 .. K-1 the density
is (1 - s)^((j+1)/K) and the last one lands on 1 - s. The paper's law: the final loss is that of a dense model
with the average number of active weights over the steps, on the same tokens (`measure/scaling_law.py`).

    T = C (a + (b - a) / g + (1 - b) / d),  g = (1 - d) / (-ln d),  N_avg = N C / T

C is the compute in dense steps, a and b are shares of it. T, not C, is the length of the learning-rate
schedule, which knows nothing of pruning: `train.compute.plan_compute(C, s).steps` is what to give as `steps`.

Pruned are all linear weights (and convolutions where there are any), the output head included unless it is tied
to the embedding, which is said. Removed weights never come back. With an N:M budget only the smallest
M - N of each group may go, so N of them always stay. What it brings is a smaller final model, at the training
cost of the average one; masks are unstructured, speed at inference needs a sparse runtime.

The official code keeps masks as parameters that weight decay would shrink and re-binarises them, keeps the removed
values, keeps all ties at the threshold, and fires only at steps that `every` divides; here masks are outside of
the optimiser, counts are exact, and events count from the first one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core import tags as t
from secateur.core.budget import Pattern
from secateur.core.errors import BudgetError, SettingsError
from secateur.core.method import Group, Method, Protocol, Settings
from secateur.core.seeding import seeded
from secateur.core.select import keep_pattern
from secateur.core.units import UnitKind
from secateur.scores.weights import magnitude, uniform_random
from secateur.structure.layers import from_matrix, to_matrix
from secateur.structure.sites import weight_layers
from secateur.train.compute import ComputePlan, account, matched_plan, plan_steps
from secateur.train.parts import GONE, PruneTo
from secateur.train.schedules import Ramp, Shape
from secateur.train.snapshot import model_state
from secateur.train.sparse_fit import SparseFit, sparse_fit_of
from secateur.train.sparsifier import Order, Sparsifier
from secateur.train.study import Findings, Study


class Score(StrEnum):
    """What is ranked."""

    MAGNITUDE = "magnitude"
    RANDOM = "random"  # the control


class JourneySettings(Settings):
    """Settings; defaults as in the paper."""

    start: float = Field(0.25, ge=0, lt=1, description="share of the training COMPUTE before the first event")
    stop: float = Field(0.75, gt=0, le=1, description="share of the training COMPUTE before the last event")
    every: int = Field(100, ge=1, description="optimiser steps between two events")
    shape: Shape = Field(
        Shape.GEOMETRIC, description="curve of the density: geometric (paper), cubic, linear, cosine or constant"
    )
    score: Score = Field(Score.MAGNITUDE, description="magnitude, or random as a control")
    against: tuple[Shape, ...] = Field(
        (Shape.CUBIC, Shape.LINEAR, Shape.CONSTANT),
        description="study: other curves at the same compute and the same tokens; constant is one-shot",
    )

    def plan(self, steps: int, sparsity: float) -> ComputePlan:
        """When to prune in a training of `steps` steps."""
        return plan_steps(steps, sparsity, self.start, self.stop, self.every, shape=self.shape)


class GlobalPruneTo(PruneTo):
    """Prune along a ramp by one ranking of all layers; N:M groups keep their N best."""

    def __init__(self, ramp: Ramp, score: Score, pattern: Pattern | None):
        super().__init__(ramp)
        self.kind, self.pattern = score, pattern

    def start(self, run: Sparsifier) -> None:
        """Refuse what cannot be reached; say what is left out."""
        super().start(run)
        if self.pattern:
            least = sum(int(self._protected(run, name, run.weight(name)).sum()) for name in run.sites)
            if run.target < least:
                raise BudgetError(
                    f"{self.pattern} keeps at least {least} of {run.units} weights, the budget asks for {run.target}; "
                    f"the highest sparsity is {1 - self.pattern.keep / self.pattern.of:g}"
                )
        for name, why in weight_layers(run.model).skipped.items():
            run.warn(f"'{name}' is not pruned: it {why}")

    def ranked(self, run: Sparsifier, name: str, alive: Tensor) -> Tensor:
        """|w|, or a draw per weight; infinite for what its group must keep."""
        return self._ranked(run, name).reshape(-1)[alive]

    def _ranked(self, run: Sparsifier, name: str) -> Tensor:
        weight = run.weight(name)
        score = magnitude(weight)
        if self.kind is Score.RANDOM:
            score = uniform_random(tuple(weight.shape), run.rng("journey", name)).to(weight.device)
        if not self.pattern:
            return score
        score = score.masked_fill(~run.masks.get(name), GONE)
        return score.masked_fill(self._protected(run, name, score), torch.inf)

    def _protected(self, run: Sparsifier, name: str, score: Tensor) -> Tensor:
        assert self.pattern
        site = run.sites[name]
        return from_matrix(keep_pattern(to_matrix(score, site.layout), self.pattern, name), site)


def parts(order: Order, settings: JourneySettings) -> Sequence[PruneTo]:
    """One gradual pruner, its window planned from the length of the training."""
    return [pruner(order, settings, settings.plan(order.steps, order.budget.sparsity))]


def pruner(order: Order, settings: JourneySettings, plan: ComputePlan) -> PruneTo:
    """What prunes along a plan's ramp."""
    return GlobalPruneTo(plan.ramp, settings.score, order.budget.pattern)


def procedure(study: Study, settings: JourneySettings) -> Findings:
    """One training per curve, all with the same steps and the same compute, and dense models to compare with.

    `study.extras["dense"]` may name dense models, name -> make: the paper compares with one whose prunable
    weights number N_avg. `study.fit` is a `Fitting`, or extras bring a `sparse_fit` (see `train/sparse_fit.py`).

    Returns:
        A row per training: `weights` (prunable), `final`, `average` (N_avg), `compute` (dense steps of the
        pruned model), `start`, `stop`, and the figure. Masks and weights are those of the settings' own curve.

    Raises:
        SettingsError: a curve cannot spend the same compute in these steps; the figure is missing.
    """
    train = sparse_fit_of(study, "journey")
    chosen = settings.plan(study.steps, study.budget.sparsity)
    plans = {settings.shape: chosen}
    for shape in settings.against:
        other = partial(matched_plan, study.steps, chosen.spent, study.budget.sparsity, first=chosen.start)
        plans.setdefault(shape, other(every=settings.every, shape=shape))
    found = Findings(rows=[])
    for shape, plan in plans.items():
        result = study.ledger.once(f"sparse-{shape}", partial(_sparse, study, settings, plan, train))
        found.rows.append(result["row"] | {"run": shape.value, "start": plan.start, "stop": plan.stop})
        if shape is settings.shape:
            found.masks, found.state = result["masks"], result["state"]
        found.warnings += [f"{shape}: {line}" for line in result["warnings"]]
    total = found.rows[0]["weights"]
    for name, make in study.extras.get("dense", {}).items():
        row = study.ledger.once(f"dense-{name}", partial(_dense, study, make, total))
        found.rows.append(row | {"run": name, "start": None, "stop": None})
    found.summary = {"planned_average": chosen.average_density * total, "planned_compute": chosen.spent}
    return found


def _sparse(study: Study, settings: JourneySettings, plan: ComputePlan, train: SparseFit) -> dict[str, Any]:
    order = Order(
        method="journey",
        budget=study.budget,
        steps=study.steps,
        settings=settings.model_dump(mode="json"),
        seed=study.seed,
        include=study.include,
        exclude=study.exclude,
    )
    model, runs = study.model(), list[Sparsifier]()

    def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> Sparsifier:
        runs.append(Sparsifier(model, optimizer, [pruner(order, settings, plan)], order))
        return runs[-1]

    figures = train(model, attach)
    if len(runs) != 1 or runs[0].step != study.steps:
        raise SettingsError(
            f"sparse_fit must call attach once and make {study.steps} optimiser steps; it made "
            f"{runs[-1].step if runs else 0} after {len(runs)} calls"
        )
    cost = account(runs[0].log, runs[0].units, study.steps)
    return {
        "row": {
            "weights": cost.total,
            "final": cost.final,
            "average": cost.average,
            "compute": cost.dense_steps,
            study.metric: _figure(study, figures),
        },
        "masks": {name: mask.cpu() for name, mask in runs[0].masks.all().items()},
        "state": model_state(model),
        "warnings": runs[0].warnings,
    }


def _dense(study: Study, make: Callable[[], nn.Module], total: int) -> dict[str, Any]:
    """A dense training; its compute in steps of the model that is pruned."""
    with seeded(study.seed):
        model = make()
    weights = sum(site.units for site in study.sites(model).values())
    figure = _figure(study, study.fit(model, {}, 0, study.steps))
    compute = weights / total * study.steps
    return {"weights": weights, "final": weights, "average": weights, "compute": compute, study.metric: figure}


def _figure(study: Study, figures: Any) -> float:
    if study.metric not in figures:
        raise SettingsError(f"fit gives no '{study.metric}', only {', '.join(figures)}; choose metric=... from these")
    return float(figures[study.metric])


method = Method(
    name="journey",
    paper="20",
    title="The journey matters: average parameter count over pre-training unifies sparse and dense scaling laws",
    citation="Jin, Humayun, Evci, Subramanian, Yazdanbakhsh, Alistarh, Dziugaite 2025, ICLR",
    formula="S = |w|, one list, density (1 - s)^((j+1)/K) after event j, between 25 % and 75 % of the compute",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED, t.Speedup.SEMI_STRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM, t.Domain.OTHER}),
    ),
    settings=JourneySettings,
    parts=parts,
    procedure=procedure,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    patterns=True,
)
