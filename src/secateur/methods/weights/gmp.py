"""Gradual magnitude pruning (Zhu and Gupta 2017, arXiv 1710.01878; in the form of Liu et al. 2021, NeurIPS).

Between t_0 and t_f, every DeltaT steps, the smallest weights go, so that the sparsity follows

    s_t = s_f + (s_i - s_f) (1 - (t - t_0) / (t_f - t_0))^3

with s_i = 0 and one ranking of |w| over all layers. What is gone stays gone: survivors are ranked among
themselves. The event at t_0 finds the network as it is, the one at t_f leaves exactly the target.

Liu et al.'s released code stops one event short of t_f (with n events it leaves n^-3 of the way: 5.19 % where 5 %
were asked with n = 8), keeps what lies strictly above a threshold, so one weight fewer than asked, and zeroes
the momentum only; here the counts are exact and every optimiser state is zeroed. Training memory stays dense.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from secateur.allocate.spread import Spread
from secateur.core import tags as t
from secateur.core.method import Group, Method, Protocol
from secateur.core.units import UnitKind
from secateur.train.events import PruningEvents
from secateur.train.part import Part
from secateur.train.parts import PruneTo
from secateur.train.schedules import Ramp, Shape
from secateur.train.sparsifier import Order


class GmpSettings(PruningEvents):
    """Settings; defaults of the CIFAR runs of Liu et al. 2021: 160 epochs, pruning from 0 to 80."""

    spread: Spread = Field(Spread.GLOBAL, description="one ranking over all layers, or layer densities by a rule")
    shape: Shape = Field(Shape.CUBIC, description="curve of the density: cubic, linear, geometric, cosine or constant")


def parts(order: Order, settings: GmpSettings) -> Sequence[Part]:
    """Prune, and nothing else."""
    ramp = Ramp(settings.pruning(order.steps), 1.0, 1 - order.budget.of(UnitKind.WEIGHT).sparsity, settings.shape)
    return [PruneTo(ramp, settings.spread)]


method = Method(
    name="gmp",
    paper="01",
    title="To prune, or not to prune: exploring the efficacy of pruning for model compression",
    citation="Zhu, Gupta 2017, arXiv 1710.01878",
    formula="the lowest |w| over all layers go every DeltaT steps; s_t = s_f + (s_i - s_f)(1 - u)^3",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.LLM, t.Domain.OTHER}),
    ),
    settings=GmpSettings,
    parts=parts,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
)
