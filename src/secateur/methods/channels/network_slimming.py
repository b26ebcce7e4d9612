"""Network slimming (Liu, Li, Shen, Huang, Yan, Zhang 2017, ICCV, arXiv 1708.06519).

While the network trains, the scales gamma of its batch norms are pulled to zero, and in the end the channels with the
smallest go, in one ranking of all layers:

    L = L_task + weight * sum |gamma|, by the subgradient: d gamma += weight * sign(gamma), sign(0) = 0
    S_i = |gamma_i|, smallest units go from all coupled layers; fine-tune afterwards

The subgradient is added to the gradient before the optimiser's step, so momentum amplifies it and weight decay acts
beside it, as in the official code (subgradients, not the smooth L1 that the paper mentions as another way). Over a
training a scale that the loss does not need moves by up to weight * sum of learning rates / (1 - momentum): 6.6 in
the paper's 160 epochs at 1e-4. Shorter trainings need a larger weight. The paper starts scales at 0.5: `start=0.5`.

`sc.plan` makes the same cut, without any training, of a network whose scales were trained so before.

Residual streams: the official code prunes pre-activation networks and leaves a stream whole; a layer behind a block's
first norm (channel selection) picks what the block reads of it. Here no layer is added: a stream's channels stand in
all norms that write to or read it, their scales are averaged (`combine`) and the channel goes everywhere.
`coupled=false` leaves streams whole. Channels that no batch norm scales stay, which a warning says. The official
threshold can empty a layer (its authors say so) and drops ties of the threshold; here counts are exact, and
`largest_cut` holds the rest of a layer.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.structured import Normalise, Scope
from secateur.core import tags as t
from secateur.core.errors import ModelError
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.units import UnitKind
from secateur.scores.groups import Combine, group_scores
from secateur.shrink.ending import EndSettings, StructuredEnd
from secateur.shrink.structured import View, decide, norm_places
from secateur.train.part import Part
from secateur.train.sparsifier import Order, Sparsifier


class NetworkSlimmingSettings(EndSettings):
    """Settings; the paper's, and its code's any width."""

    weight: float = Field(1e-4, ge=0, description="of the L1 penalty; the paper's 1e-4 for VGG, 1e-5 for ResNet-164")
    start: float | None = Field(None, gt=0, description="set all scales to this first, untrained networks to 0.5")
    combine: Combine = Field(Combine.MEAN, description="how the scales of coupled norms become one score")
    scope: Scope = Field(Scope.GLOBAL, description="which units compete: all (the paper), within a site, equal sites")
    normalise: Normalise = Field(Normalise.NONE, description="scale of a site's scores in a common ranking")
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")


def scales(view: View, settings: NetworkSlimmingSettings) -> dict[str, Tensor]:
    """|gamma| per unit; sites that no batch norm scales are left out.

    Raises:
        ModelError: there is no such site.
    """
    parameters = dict(view.model.named_parameters())
    norms = norm_places(view)

    def vector(name: str, dim: int) -> Tensor | None:
        return parameters[name].detach().float().abs() if (name, dim) in norms else None

    found = group_scores(view.sites, vector, settings.combine)
    if not found:
        raise ModelError(
            f"network slimming reads the scales of batch norms, and none of {type(view.model).__name__} scales units "
            f"that may be cut, e.g. '{next(iter(view.sites))}'; use channel_norm or group_lasso"
        )
    return found


def with_warning(decision: Decision, scored: Iterable[str]) -> Decision:
    """The decision, and a sentence on the sites that stay whole."""
    whole = sorted(decision.sites.keys() - set(scored))
    if whole:
        some = ", ".join(f"'{name}'" for name in whole[:3])
        more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
        decision.warnings.append(f"no batch norm scales the units of {some}{more}: they were left whole")
    return decision


class Slimming(StructuredEnd):
    """The pull on the scales while the network trains, and the cut at the end."""

    def __init__(self, settings: NetworkSlimmingSettings):
        super().__init__(settings, lambda view: scales(view, settings))
        self.weight, self.first = settings.weight, settings.start

    def start(self, run: Sparsifier) -> None:
        """Find the scales."""
        super().start(run)
        self.scales = self.groups(run, norm_places(self.view()))
        self.rates = {
            name: torch.full(site.shape, self.weight)
            for name, site in self.work.sites.items()
            if name in self.scales.sizes
        }
        if self.first is not None and run.masks.writes:
            for parameter in self.scales.parameters.values():
                parameter.detach().fill_(self.first)

    def after_backward(self, run: Sparsifier) -> None:
        """Weight * sign(gamma)."""
        if run.step < run.steps:
            self.scales.pull(self.rates, torch.sign)

    def decided(self, run: Sparsifier) -> Decision:
        """With a warning for what no norm scales."""
        return with_warning(super().decided(run), self.rates)


def plan(task: Task, settings: NetworkSlimmingSettings) -> Decision:
    """The scales as they are; no data needed."""
    scored: set[str] = set()

    def criterion(view: View) -> dict[str, Tensor]:
        found = scales(view, settings)
        scored.update(found)
        return found

    return with_warning(decide(task, settings, criterion, settings.filter(task.model)), scored)


def make_parts(order: Order, settings: NetworkSlimmingSettings) -> list[Part]:
    """One part does it all."""
    return [Slimming(settings)]


method = Method(
    name="network_slimming",
    paper="-",
    title="Learning efficient convolutional networks through network slimming",
    citation="Liu, Li, Shen, Huang, Yan, Zhang 2017, ICCV, arXiv 1708.06519",
    formula="L + a sum |gamma| over the scales of batch norms; S_i = |gamma_i|, smallest of all layers go",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING, t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LEARNED}),
        granularity=frozenset({t.Granularity.CHANNEL}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN}),
        learn=frozenset({t.Learn.SPARSITY_REGULARIZATION}),
        physical=True,
    ),
    settings=NetworkSlimmingSettings,
    run=plan,
    parts=make_parts,
    units=UnitKind.CHANNEL,
    exact=Group.TOTAL,
    structured=True,
)
