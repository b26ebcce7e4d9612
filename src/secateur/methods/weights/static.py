"""Static sparse training: a random mask, fixed for the whole training (Evci et al. 2020; Liu et al. 2022).

Layer densities are designed (ERK by default), positions are drawn once and never change. It is the control of all
dynamic sparse training: what moves connections must beat the same network whose connections stay.

Released code draws every weight with its layer's probability; here layer counts are rounded so that the total is
exact.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from secateur.allocate.spread import Spread
from secateur.core import tags as t
from secateur.core.method import Group, Method, Protocol, Settings
from secateur.core.units import UnitKind
from secateur.train.part import Part
from secateur.train.parts import StartSparse
from secateur.train.sparsifier import Order


class StaticSettings(Settings):
    """Settings."""

    spread: Spread = Field(Spread.ERK, description="layer densities: erk, er, uniform, erk_plus or uniform_plus")


def parts(order: Order, settings: StaticSettings) -> Sequence[Part]:
    """A random start."""
    return [StartSparse(spread=settings.spread)]


method = Method(
    name="static",
    paper="01",
    title="Rigging the lottery: making all tickets winners (its static baseline)",
    citation="Evci, Gale, Menick, Castro, Elsen 2020, ICML, arXiv 1911.11134",
    formula="S ~ U(0, 1) before training, ERK layer densities, fixed",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.BEFORE_TRAINING}),
        criterion=frozenset({t.Criterion.RANDOM}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.SCRATCH,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
    ),
    settings=StaticSettings,
    parts=parts,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
)
