"""Truncated singular values: a layer's weight as a product of two thinner ones, after training.

A weight, seen as a matrix M = U S V^T, keeps its leading r singular values: of all matrices of rank r that is the
nearest (Eckart, Young 1936). The layer becomes two where that has fewer weights and multiplications; otherwise it
stays whole, and the plan says so.
Schemes of convolutions `[N, C, k_h, k_w]`:

    channel    M = [N, C k_h k_w]: k_h x k_w convolution to r channels, then 1 x 1      (Zhang, Zou, He, Sun 2015)
    spatial    M = [C k_h, N k_w]: k_h x 1 convolution to r channels, then 1 x k_w      (Jaderberg et al. 2014)
    decoupled  one [C, k_h k_w] per output: 1 x 1, then depthwise                       (Guo et al. 2018)

With a budget (a sparsity is a share of the model's parameters) all layers keep the same share of their squared singular
values, the largest one that it allows. At sparsity 0 `rule` decides: every layer keeps a share `amount` of the energy
(squares) or of the sum, all values of at least `amount`, or a share of their number. No data is needed.
"""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from secateur.core import tags as t
from secateur.core.budget import Quantity
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.units import Scheme, UnitKind
from secateur.data.example import example_for
from secateur.scores.spectrum import Rule
from secateur.shrink.rank_budget import RankBudget
from secateur.shrink.ranks import RankLayers, undecided


class SvdSettings(Settings):
    """Settings of the factorisation."""

    scheme: Scheme = Field(Scheme.CHANNEL, description="of convolutions: channel, spatial or decoupled")
    linear: bool = Field(True, description="linear layers and 1 x 1 convolutions too")
    rule: Rule = Field(Rule.ENERGY, description="at sparsity 0: energy, sum, value or rate")
    amount: float = Field(0.9, gt=0, description="what the rule keeps, e.g. this share of the energy")

    @model_validator(mode="after")
    def _possible(self) -> Self:
        self.rule.checked(self.amount)
        return self


def plan(task: Task, settings: SvdSettings) -> Decision:
    """Decompose every layer, choose ranks, write the factors."""
    layers = RankLayers.find(task.model, settings.scheme, task.wants, settings.linear)
    spectra = layers.spectra()
    if undecided(task.budget):
        return layers.decision(spectra, layers.by_rule(spectra, settings.rule, settings.amount), task.keep_scores)

    asked = RankBudget.of(layers, spectra, task.budget, lambda: example_for(task.model, task.example))
    exact = task.budget.quantity in (Quantity.PARAMETERS, Quantity.FLOPS)  # a sparsity is met as whole ranks allow
    counts = asked.counts(near=exact)
    found = layers.decision(spectra, counts, task.keep_scores)
    found.warnings += filter(None, [asked.missed(counts)])
    return found


method = Method(
    name="svd",
    paper="-",
    title="Low-rank factorisation of trained layers",
    citation="Jaderberg, Vedaldi, Zisserman 2014, arXiv 1405.3866; Zhang, Zou, He, Sun 2015, arXiv 1505.06798",
    formula="M = U S V^T, the leading r singular values stay; the layer becomes sqrt(S) V^T and U sqrt(S)",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.RANK}),
        granularity=frozenset({t.Granularity.RANK}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_FREE,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.LLM, t.Domain.OTHER}),
        fusion=frozenset({t.Fusion.TENSOR_DECOMPOSITION}),
        physical=True,
        post_training=True,
    ),
    settings=SvdSettings,
    run=plan,
    units=UnitKind.RANK,
    exact=Group.COST,
)
