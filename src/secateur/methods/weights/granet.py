"""GraNet: gradual pruning with zero-cost neuroregeneration (Liu et al. 2021, NeurIPS, arXiv 2106.10404).

Every DeltaT steps, after the optimiser's step,

(a) from t_0 to t_f: magnitude pruning over all layers together, s_t = s_f + (s_i - s_f) (1 - u)^3;
(b) to the end of training: in every layer the ceil(r A) smallest of A survivors go, and as many places come back
    where |dL/dw| of the batch just used is largest. All open places compete, those that have just left as well.
    A layer's density does not change; what comes in starts at 0 with clean optimiser states.
    r(t) = 0.005 + (r_0 - 0.005) (1 + cos(pi t / T)) / 2.

`initial_density` 1 is dense-to-sparse; below it (paper: 0.5) training starts on a random ERK mask and costs less.
`spread=uniform` is GraNet_uniform: one density for every layer, but the classifier keeps at least
`classifier_density`; the random start then has the same densities, since ERK ones would have to grow.
To keep the stem dense and out of the count, exclude it: exclude=["conv1"].

The released code differs from the paper and from this file: its last pruning event is at u < 1, so it ends denser
than asked by (d_i - d_f) n^-3; it keeps what is strictly above a threshold (one weight fewer); it draws the start
mask weight by weight; it zeroes the momentum only, not Adam's moments; it regrows after the very last step
too, connections that are never trained. There is no switch for that: it would break the promised count.
A count above the target is never accuracy's due either: look at accuracies from t_f on only.

Training memory stays dense, and savings in FLOPs are theoretical without sparse kernels.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from secateur.allocate.ratios import PLAIN, Ends
from secateur.allocate.spread import Spread
from secateur.core import tags as t
from secateur.core.method import Group, Method, Protocol
from secateur.core.units import UnitKind
from secateur.scores.weights import magnitude
from secateur.train.events import PruningEvents, RegrowingEvents
from secateur.train.part import Part
from secateur.train.parts import PruneTo, StartSparse
from secateur.train.schedules import Ramp
from secateur.train.sparsifier import Order


class GranetSettings(PruningEvents, RegrowingEvents):
    """Settings; defaults of the paper's CIFAR runs: 160 epochs, pruning from 0 to 80."""

    initial_density: float = Field(1.0, gt=0, le=1, description="d_i: fraction of the weights at the start (1 or 0.5)")
    spread: Spread = Field(Spread.GLOBAL, description="one ranking over all layers (paper); uniform: GraNet_uniform")
    classifier_density: float = Field(
        0.2, ge=0, le=1, description="least density of the classifier under spread=uniform; 0: as all layers"
    )
    classifier: str | None = Field(None, description="classifier under spread=uniform; default: the last layer")

    @property
    def rule(self) -> tuple[Spread, Ends]:
        """How pruning spreads the density over the layers."""
        if self.spread is not Spread.UNIFORM or not self.classifier_density:
            return self.spread, PLAIN
        ends = Ends(classifier=self.classifier, classifier_least=self.classifier_density, dense_stem=False)
        return Spread.UNIFORM_PLUS, ends


def parts(order: Order, settings: GranetSettings) -> Sequence[Part]:
    """Start, prune, regrow: in this order at one event."""
    (spread, ends), window = settings.rule, settings.pruning(order.steps)
    ramp = Ramp(window, settings.initial_density, 1 - order.budget.of(UnitKind.WEIGHT).sparsity)
    prune_and_regrow = [PruneTo(ramp, spread, magnitude, ends), settings.regrowing(order.steps, window.start)]
    if settings.initial_density == 1:
        return prune_and_regrow
    start = Spread.ERK if spread is Spread.GLOBAL else spread
    return [StartSparse(settings.initial_density, start, ends), *prune_and_regrow]


method = Method(
    name="granet",
    paper="01",
    title="Sparse training via boosting pruning plasticity with neuroregeneration",
    citation="Liu, Chen, Chen, Atashgahi, Yin, Kou, Shen, Pechenizkiy, Wang, Mocanu 2021, NeurIPS, arXiv 2106.10404",
    formula="gradual global magnitude pruning; per layer the ceil(r A) lowest |w| are exchanged for the top |dL/dw|",
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
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
    ),
    settings=GranetSettings,
    parts=parts,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
)
