"""First-order Taylor on channels, neurons and heads (Molchanov, Mallya, Tyree, Frosio, Kautz 2019, arXiv 1906.10771).

`squared` is the paper's score for a structure, (sum over its weights of w * dL/dw) squared: what the loss
changes to first order when the whole unit goes. It is squared for every few samples (the paper's
mini-batch) and averaged: the gradient of all data together is near zero at a minimum. `absolute` adds
|w * dL/dw| of the mean loss over all calibration data, so that signs inside a unit do not cancel. The weights of
a unit are those of the layers that make it; `members=all` adds those that read it, which count the same change
again.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.core import tags as t
from secateur.core.method import Batch, Decision, Group, Method, Protocol, Task
from secateur.core.units import UnitKind
from secateur.data.batches import split_batch
from secateur.scores.groups import Combine, group_scores
from secateur.shrink.cut import tensors_of
from secateur.shrink.structured import Members, StructuredSettings, View, decide, weight_places
from secateur.stats.gradients import weight_gradients


class Form(StrEnum):
    """How a unit's weights are put together."""

    SQUARED = "squared"
    ABSOLUTE = "absolute"


class GroupTaylorSettings(StructuredSettings):
    """Settings of first-order Taylor pruning of structured units."""

    form: Form = Field(Form.SQUARED, description="(sum w g)^2 as in the paper, or sum |w g|")
    samples: int = Field(1, ge=1, description="samples per gradient that is squared")
    members: Members = Field(Members.PRODUCERS, description="the layers that make the unit, or all its weights")


def products(view: View, settings: GroupTaylorSettings) -> dict[str, Tensor]:
    """One Taylor score per unit."""
    chosen = weight_places(view, settings.members, biases=True)
    names = sorted({name for name, _ in chosen})
    if settings.form is Form.ABSOLUTE:
        return _per_unit(view, chosen, names, view.task.batches, Form.ABSOLUTE)
    parts = [part for batch in view.task.batches for part in split_batch(batch, settings.samples)]
    total: dict[str, Tensor] = {}
    for part in parts:
        for name, score in _per_unit(view, chosen, names, [part], Form.SQUARED).items():
            total[name] = total.get(name, torch.zeros_like(score)) + score.square() / len(parts)
    return total


def _per_unit(
    view: View, chosen: set[tuple[str, int]], names: list[str], batches: Sequence[Batch], form: Form
) -> dict[str, Tensor]:
    """The sum of w * dL/dw, or of its absolute values, over the weights of every unit."""
    tensors = tensors_of(view.model)
    gradients = weight_gradients(view.model, batches, names, view.task.progress)

    def vector(name: str, dim: int) -> Tensor | None:
        if (name, dim) not in chosen:
            return None
        product = tensors[name].detach().float() * gradients[name]
        product = product.abs() if form is Form.ABSOLUTE else product
        others = [d for d in range(product.dim()) if d != dim]
        return product.sum(others) if others else product

    return group_scores(view.sites, vector, Combine.SUM)


def plan(task: Task, settings: GroupTaylorSettings) -> Decision:
    """One backward pass over the calibration data per step, score, cut."""
    return decide(task, settings, lambda view: products(view, settings))


method = Method(
    name="group_taylor",
    paper="-",
    title="Importance estimation for neural network pruning (on channels, neurons and heads)",
    citation="Molchanov, Mallya, Tyree, Frosio, Kautz 2019, CVPR, arXiv 1906.10771",
    formula="S_i = (sum_w in unit w * dL/dw)^2, smallest units go from all coupled layers",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LOSS_CHANGE, t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.CHANNEL, t.Granularity.NEURON, t.Granularity.HEAD}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.LLM, t.Domain.OTHER}),
        physical=True,
    ),
    settings=GroupTaylorSettings,
    run=plan,
    units=UnitKind.CHANNEL,
    exact=Group.SITE,
    needs_data=True,
    needs_labels=True,
    structured=True,
)
