"""FPGM: filters near the geometric median of their layer go (He, Liu, Wang, Hu, Yang 2019, arXiv 1811.00250).

    S_i = sum over j of ||F_i - F_j||    with F_i the weights of filter i of a layer, as one vector

The filter with the smallest sum is nearest to the geometric median of all filters of the layer: the others can
stand for it. A small norm is not needed, so filters of equal norm are told apart, and what all filters have in
common does not count. Equal filters have equal scores, and go or stay together; `steps` above 1 scores again after
each, so that copies go one by one.

Where several layers make a unit together, on residual streams or as gate and up, each has distances of its own,
which are combined; the paper and its code prune each convolution by itself. A head is the vector of all its rows.

The mixture of the paper ("FPGM-mix") first takes a share of every layer's filters by their norm and then goes by
distances among the rest: `norm_share=0.1` with a sparsity of 0.4 is its 40 %. In several steps the share is taken in
each of them, of the units that are left.

The released code offers l1 and cos as well, but two conditions that always hold (`if dist_type == "l2" or "cos"`) make
it compute Euclidean distances and L2 norms whatever is chosen, and its cosine branch would take the filters that
are least alike. Here each is what its name says, and the most alike go; `reference=True` is the released
behaviour. Its int(n * (1 - 0.9)) is 0 for n = 10 by rounding, here 1. It also zeroes filters again after every epoch of
training, and each layer by itself; here coupled layers lose the same units, once, in `steps`.
"""

from __future__ import annotations

from math import floor

import torch
from pydantic import Field
from torch import Tensor

from secateur.core import tags as t
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.units import Occurrence, Site, UnitKind
from secateur.scores.distances import Distance, distance_sums
from secateur.scores.groups import Combine, combined
from secateur.shrink.cut import tensors_of
from secateur.shrink.structured import Members, StructuredSettings, View, decide, weight_places


class FpgmSettings(StructuredSettings):
    """Settings; the paper's are the defaults."""

    distance: Distance = Field(Distance.L2, description="between two filters: l2, l1, or cos (1 - cosine)")
    members: Members = Field(Members.PRODUCERS, description="the layers that make the unit, or all its weights")
    combine: Combine = Field(Combine.MEAN, description="how the coupled layers' distances become one score")
    norm_share: float = Field(
        0.0, ge=0, lt=1, description="share of a site's units that goes by norm before distances count; paper's mix 0.1"
    )
    reference: bool = Field(False, description="as released: l2 whatever `distance` says")

    @property
    def between(self) -> Distance:
        """The distance that is taken."""
        return Distance.L2 if self.reference else self.distance


def scores(view: View, settings: FpgmSettings) -> dict[str, Tensor]:
    """One score per unit; sites in no linear or convolution layer are left out."""
    tensors, chosen = tensors_of(view.model), weight_places(view, settings.members)
    found = {}
    for name, site in view.sites.items():
        places = [place for place in site.occurrences if (place.parameter, place.dim) in chosen]
        if places:
            layers = [vectors(tensors[place.parameter], place, site) for place in places]
            found[name] = score(layers, settings)
    return found


def vectors(weight: Tensor, place: Occurrence, site: Site) -> Tensor:
    """Everything of a weight that belongs to each unit, `[units, d]`."""
    rows = weight.detach().movedim(place.dim, 0)
    return rows[place.indices(site.units).flatten().to(rows.device)].reshape(site.units, -1)


def score(layers: list[Tensor], settings: FpgmSettings) -> Tensor:
    """Distances to the other units, combined over layers; those that go by norm are below all others.

    Args:
        layers: `[units, d]` of each layer that makes the units.
        settings: distance, share of the norm.
    """
    units = len(layers[0])
    power = 1 if settings.between is Distance.L1 else 2
    norms = combined([layer.float().norm(power, dim=1) for layer in layers], settings.combine)
    order = torch.argsort(norms, stable=True)
    small = floor(settings.norm_share * units + 1e-9)
    by_norm, rest = order[:small], order[small:].sort().values
    sums = combined([distance_sums(layer[rest], settings.between) for layer in layers], settings.combine)
    found = sums.new_empty(units)
    found[rest] = sums
    scale = float(sums.mean()) or 1.0  # of one size with the others, for rankings over several sites
    found[by_norm] = scale * (torch.arange(small, dtype=sums.dtype, device=sums.device) - small) / max(1, small)
    return found


def plan(task: Task, settings: FpgmSettings) -> Decision:
    """Distances between the weights alone; no data needed."""
    return decide(task, settings, lambda view: scores(view, settings))


method = Method(
    name="fpgm",
    paper="-",
    title="Filter pruning via geometric median for deep convolutional neural networks acceleration",
    citation="He, Liu, Wang, Hu, Yang 2019, CVPR, arXiv 1811.00250",
    formula="S_i = sum_j ||F_i - F_j||_2, the filters nearest to the geometric median of their layer go",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.SIMILARITY}),
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
    settings=FpgmSettings,
    run=plan,
    units=UnitKind.CHANNEL,
    exact=Group.SITE,
    structured=True,
)
