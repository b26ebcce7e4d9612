"""RigL: dynamic sparse training with gradients (Evci et al. 2020, ICML, arXiv 1911.11134; ITOP form, Liu et al. 2021).

Training starts on a random mask at the final density (layer densities ERK). Every DeltaT steps, in every layer,
the ceil(r A) smallest of A survivors go and as many places come back where |dL/dw| is largest; r falls along half
a cosine. Layer densities never change.

This is the form that GraNet is compared with ("DST" in its code): r from 0.5 to 0.005 over the whole training and
exchanges to its end. The original stops earlier and starts lower: rate=0.3 last_rate=0 until=0.75. It also bars a
place that has just left from coming back at once; here all open places compete, as in the ITOP code. The released
code draws the mask weight by weight, so its density is only near the asked one; here it is exact.
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
from secateur.train.parts import StartSparse
from secateur.train.sparsifier import Order


class RiglSettings(RegrowingEvents):
    """Settings; defaults of the ITOP form."""

    until: float = Field(1.0, gt=0, description="last exchange: up to 1 a share of the training, above it a step")
    spread: Spread = Field(Spread.ERK, description="layer densities: erk, er, uniform, erk_plus or uniform_plus")


def parts(order: Order, settings: RiglSettings) -> Sequence[Part]:
    """A random start, then exchanges."""
    return [StartSparse(spread=settings.spread), settings.regrowing(order.steps, until=settings.until)]


method = Method(
    name="rigl",
    paper="01",
    title="Rigging the lottery: making all tickets winners",
    citation="Evci, Gale, Menick, Castro, Elsen 2020, ICML, arXiv 1911.11134",
    formula="per layer the ceil(r A) lowest |w| are exchanged for the top |dL/dw|, at a fixed density",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE, t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
    ),
    settings=RiglSettings,
    parts=parts,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
)
