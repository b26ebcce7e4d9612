"""Norm of channels, neurons and heads: the smallest go (Li, Kadav, Durdanovic, Samet, Graf 2017, arXiv 1608.08710).

A unit's score is the L1 or L2 norm of its weights. `producers` is the paper's rule, the filter alone;
`all` adds the weights that read the unit: coupled layers are scored together, as in dependency-graph pruning
(Fang et al. 2023, arXiv 2301.12900), which counts batch-norm scales too. `bn` is the batch-norm scale (Network
Slimming, Liu et al. 2017, arXiv 1708.06519); sites without a norm are then left whole.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field
from torch import Tensor

from secateur.core import tags as t
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.units import UnitKind
from secateur.scores.groups import Combine, group_scores, over_others
from secateur.shrink.cut import tensors_of
from secateur.shrink.structured import Members, StructuredSettings, View, decide, norm_places, weight_places


class Norm(StrEnum):
    """What is measured of a unit's weights."""

    L1 = "l1"
    L2 = "l2"
    BN = "bn"


class ChannelNormSettings(StructuredSettings):
    """Settings of norm pruning."""

    norm: Norm = Field(Norm.L2, description="l1, l2, or the absolute batch-norm scale")
    members: Members = Field(Members.ALL, description="all weights of a unit, or those of the layers that make it")
    combine: Combine = Field(Combine.MEAN, description="how the coupled layers' norms become one score")


def norms(view: View, settings: ChannelNormSettings) -> dict[str, Tensor]:
    """One norm per unit."""
    tensors = tensors_of(view.model)
    chosen = norm_places(view) if settings.norm is Norm.BN else weight_places(view, settings.members)

    def vector(name: str, dim: int) -> Tensor | None:
        return over_others(tensors[name], dim, 2 if settings.norm is Norm.L2 else 1) if (name, dim) in chosen else None

    found = group_scores(view.sites, vector, settings.combine)
    return {name: score.sqrt() for name, score in found.items()} if settings.norm is Norm.L2 else found


def plan(task: Task, settings: ChannelNormSettings) -> Decision:
    """Norms of the weights alone; no data needed."""
    return decide(task, settings, lambda view: norms(view, settings))


method = Method(
    name="channel_norm",
    paper="-",
    title="Pruning filters for efficient convnets (channels, neurons and heads by norm)",
    citation="Li, Kadav, Durdanovic, Samet, Graf 2017, ICLR, arXiv 1608.08710",
    formula="S_i = ||W_i||_1, ||W_i||_2 or |gamma_i|, smallest units go from all coupled layers",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LP_NORM}),
        granularity=frozenset({t.Granularity.CHANNEL, t.Granularity.FILTER, t.Granularity.NEURON, t.Granularity.HEAD}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_FREE,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.LLM, t.Domain.OTHER}),
        physical=True,
    ),
    settings=ChannelNormSettings,
    run=plan,
    units=UnitKind.CHANNEL,
    exact=Group.SITE,
    structured=True,
)
