"""SET: sparse evolutionary training (Mocanu et al. 2018, Nature Communications, arXiv 1707.04780).

Training starts on a random mask at the final density. Every DeltaT steps, in every layer, the smallest survivors
go and as many connections come back at random places; layer densities never change.

Defaults are those of the engine that GraNet is compared in (ERK start, rate from 0.5 to 0.005), so that SET differs
from RigL by where connections come back only. The original keeps one rate and starts from Erdos-Renyi densities:
rate=0.3 last_rate=0.3 spread=er; it removes the smallest of the positive and of the negative weights apart and
gives new connections random values, where ours start at 0. Positions here are drawn without replacement, so counts
are exact; GraNet's code draws every place with a probability.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from secateur.allocate.spread import Spread
from secateur.core import tags as t
from secateur.core.method import Group, Method, Protocol
from secateur.core.units import UnitKind
from secateur.train.events import RegrowingEvents
from secateur.train.part import Part
from secateur.train.parts import Growth, StartSparse
from secateur.train.sparsifier import Order


class SetSettings(RegrowingEvents):
    """Settings; growth is random, everything else as in RigL."""

    growth: Growth = Field(Growth.RANDOM, description="connections come where: random, gradient or momentum")
    until: float = Field(1.0, gt=0, description="last exchange: up to 1 a share of the training, above it a step")
    spread: Spread = Field(Spread.ERK, description="layer densities: erk, er, uniform, erk_plus or uniform_plus")


def parts(order: Order, settings: SetSettings) -> Sequence[Part]:
    """A random start, then exchanges."""
    return [StartSparse(spread=settings.spread), settings.regrowing(order.steps, until=settings.until)]


method = Method(
    name="set",
    paper="01",
    title="Scalable training of artificial neural networks with adaptive sparse connectivity inspired by network "
    "science",
    citation="Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta 2018, Nature Communications, arXiv 1707.04780",
    formula="per layer the ceil(r A) lowest |w| are exchanged for random places, at a fixed density",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE, t.Criterion.RANDOM}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
    ),
    settings=SetSettings,
    parts=parts,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
)
