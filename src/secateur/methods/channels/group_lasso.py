"""Group lasso on channels, structured sparsity learning (Wen, Wu, Wang, Chen, Li 2016, NeurIPS, arXiv 1608.03665).

While the network trains, every channel's weights together are pulled to zero, and in the end the smallest groups go:

    L = L_task + weight * sum_g sqrt(|g|) ||W_g||_2,   S_g = ||W_g||_2 / sqrt(|g|)

`proximal` (default) shrinks after every step of the optimiser, W_g *= max(0, 1 - lr * weight * sqrt(|g|) / ||W_g||): a
group's root mean square falls by lr * weight, and it becomes exactly zero, so that what is cut was not there any more.
`subgradient` adds weight * sqrt(|g|) W_g / ||W_g|| to the gradients (0 at 0), which the optimiser scales as it does all
gradients (momentum amplifies it by 1 / (1 - momentum)); groups end near zero, never at it.

`members=all` (default): a group is everything that goes with the channel: the weights that make it and those that read
it, biases, scale and shift of its norm. Behind a batch norm the making weights alone can shrink without any effect.
Groups of two layers then share weights; each factor is computed before any is applied, and shared weights get both: the
exact step for each group, an approximation for their sum. `producers`: only the layers that make the channel, disjoint
groups, an exact proximal step, the paper's filters.

The paper penalises filters and input channels of each layer as separate groups and writes no sqrt(|g|); its code (a
Caffe fork) takes subgradients after clipping and sets tiny weights to zero. Here both are one group, as they go
together. Its weights differ by network; the default is ours. Over a training a group's root mean square falls by
weight * sum of learning rates at most, so shorter trainings need a larger weight.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.structured import Normalise, Scope
from secateur.core import tags as t
from secateur.core.errors import SettingsError
from secateur.core.method import Group, Method, Protocol
from secateur.core.units import UnitKind
from secateur.shrink.ending import EndSettings, StructuredEnd, unit_places
from secateur.shrink.structured import Members, View
from secateur.train.groups import Groups
from secateur.train.part import Part
from secateur.train.sparsifier import Order, Sparsifier


class Step(StrEnum):
    """How the penalty acts."""

    PROXIMAL = "proximal"
    SUBGRADIENT = "subgradient"


class GroupLassoSettings(EndSettings):
    """Settings of the group lasso."""

    weight: float = Field(1e-4, ge=0, description="of the penalty; a group's root mean square falls by it times lr")
    step: Step = Field(Step.PROXIMAL, description="proximal: groups become exactly zero; subgradient: the official way")
    members: Members = Field(Members.ALL, description="everything that goes with a unit, or the layers that make it")
    scope: Scope = Field(Scope.GLOBAL, description="which units compete: all, within a site, those of equal sites")
    normalise: Normalise = Field(Normalise.NONE, description="scale of a site's scores in a common ranking")
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")


def sizes(groups: Groups) -> dict[str, Tensor]:
    """Site -> root mean square of every group, ||W_g|| / sqrt(|g|)."""
    return {name: (total / groups.sizes[name]).sqrt() for name, total in groups.sums(2).items()}


def shrunk(size: Tensor, amount: float) -> Tensor:
    """The factor that takes a root mean square down by `amount`, to zero at least.

    max(0, 1 - a sqrt(|g|) / ||W_g||): the proximal operator of a sqrt(|g|) ||W_g||.
    """
    return (1 - amount / size.clamp_min(torch.finfo(size.dtype).tiny)).clamp_min(0)


class GroupLasso(StructuredEnd):
    """The pull on the groups while the network trains, and the cut at the end."""

    def __init__(self, settings: GroupLassoSettings):
        super().__init__(settings, lambda view: sizes(Groups(view.model, view.sites, self.places(view))))
        self.own = settings

    def places(self, view: View) -> set[tuple[str, int]]:
        """Where a unit's weights stand."""
        return unit_places(view, self.own.members)

    def start(self, run: Sparsifier) -> None:
        """Find the groups."""
        super().start(run)
        self.weights = self.groups(run, self.places(self.view()))

    def after_backward(self, run: Sparsifier) -> None:
        """Weight * sqrt(|g|) W_g / ||W_g|| = weight * W_g / its root mean square; 0 at 0."""
        if self.own.step is Step.SUBGRADIENT and run.step < run.steps:
            found = sizes(self.weights)
            self.weights.pull({name: torch.where(s > 0, self.own.weight / s, 0.0) for name, s in found.items()})

    def after_step(self, run: Sparsifier) -> None:
        """The proximal step, with the learning rate of the step just made."""
        if self.own.step is Step.PROXIMAL:
            amount = self.own.weight * learning_rate(run, self.weights.parameters)
            self.weights.scale_({name: shrunk(s, amount) for name, s in sizes(self.weights).items()})


def learning_rate(run: Sparsifier, parameters: Mapping[str, Tensor]) -> float:
    """The one learning rate of these parameters.

    Raises:
        SettingsError: their groups in the optimiser have several.
    """
    wanted = {id(parameter) for parameter in parameters.values()}
    rates = {
        float(group["lr"]) for group in run.optimizer.param_groups if any(id(p) in wanted for p in group["params"])
    }
    if len(rates) > 1:
        raise SettingsError(
            f"a proximal step needs one learning rate for all weights of a group, the optimizer has {sorted(rates)}; "
            "give them the same, or take step=subgradient"
        )
    return rates.pop()


def make_parts(order: Order, settings: GroupLassoSettings) -> list[Part]:
    """One part does it all."""
    return [GroupLasso(settings)]


method = Method(
    name="group_lasso",
    paper="-",
    title="Learning structured sparsity in deep neural networks",
    citation="Wen, Wu, Wang, Chen, Li 2016, NeurIPS, arXiv 1608.03665",
    formula="L + a sum_g sqrt(|g|) ||W_g||_2, W_g: all weights of a channel; smallest ||W_g|| / sqrt(|g|) go",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.LP_NORM, t.Criterion.LEARNED}),
        granularity=frozenset({t.Granularity.CHANNEL, t.Granularity.FILTER, t.Granularity.NEURON, t.Granularity.HEAD}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.OTHER}),
        learn=frozenset({t.Learn.SPARSITY_REGULARIZATION}),
        physical=True,
    ),
    settings=GroupLassoSettings,
    parts=make_parts,
    units=UnitKind.CHANNEL,
    exact=Group.TOTAL,
    changes_weights=True,
    structured=True,
)
