"""HRank: channels with feature maps of low rank go (Lin, Ji, Wang, Zhang, Zhang, Tian, Shao 2020, arXiv 2002.10179).

    S_j = mean over images t of Rank(o_j(t))    with o_j(t) the h x w feature map of channel j for image t

The rank of a map hardly depends on which images are looked at, and maps of low rank carry little; no labels are
needed. As in the released code maps are taken after the activation, after the residual sum where there is one,
with the model in eval mode, and ranks are of torch's default tolerance. It looks at 640 augmented training images where
the paper says 500; here it is 500 of the calibration data. It prunes and retrains one convolution after the other,
each by itself; here all go at once, coupled layers lose the same channels, and a unit whose maps are seen in
several places (a residual stream after every block, a concatenation in every layer that reads it) has their mean.
Where no activation follows, maps are taken after the norm, or as the layer makes them.

What a rank says depends on the map. A 1 x 1 map, or the outputs of a neuron for all tokens, has rank 1 unless it is all
zero: the score of neurons between linear layers is the share of samples for which they are not all zero. After
rectifiers that still ranks units; after GELU or SiLU it is 1 for all of them. A head's map is tokens x head_dim. Where
all units of a site have the same mean rank, ranks cannot choose, the first units go, and the plan warns of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from pydantic import Field
from torch import Tensor

from secateur.core import tags as t
from secateur.core.method import Batch, Decision, Group, Method, Protocol, Task
from secateur.core.units import UnitKind
from secateur.data.batches import split_batch
from secateur.shrink.structured import StructuredSettings, View, decide
from secateur.stats.maps import mean_over_maps


class HRankSettings(StructuredSettings):
    """Settings; the paper's are the defaults."""

    samples: int = Field(500, ge=1, description="calibration images whose maps are looked at, the first ones")


def ranks(maps: Tensor) -> Tensor:
    """Numerical rank of each matrix, `[n, rows, columns]` -> `[n]`."""
    if 1 in maps.shape[1:]:
        return (maps != 0).flatten(1).any(1).float()  # what a decomposition would say, at once
    found: Tensor = torch.linalg.matrix_rank(maps)
    return found.float()


def first_samples(batches: Sequence[Batch], samples: int) -> Iterator[Batch]:
    """The batches up to so many samples."""
    left = samples
    for batch in batches:
        if left > 0:
            yield batch if batch.samples <= left else split_batch(batch, left)[0]
        left -= batch.samples


def mean_ranks(view: View, settings: HRankSettings) -> dict[str, Tensor]:
    """One score per unit; sites whose maps are nowhere to be seen are left out."""
    batches = first_samples(view.task.batches, settings.samples)
    return mean_over_maps(view.model, view.structure, view.sites, batches, measure=ranks, progress=view.task.progress)


def plan(task: Task, settings: HRankSettings) -> Decision:
    """One pass over the calibration images per step, no labels and no gradients."""
    doubts: dict[str, str] = {}

    def criterion(view: View) -> dict[str, Tensor]:
        found = mean_ranks(view, settings)
        for name in view.sites:
            if name not in found:
                doubts[name] = "its feature maps are computed where they cannot be seen; it was left whole"
            elif bool((found[name] == found[name][0]).all()):
                rank = float(found[name][0])
                doubts[name] = f"all units have the mean rank {rank:g}, which of them go was not chosen by rank"
        return found

    decision = decide(task, settings, criterion)
    decision.warnings += [f"'{name}': {doubt}" for name, doubt in doubts.items() if not decision.masks[name].all()]
    return decision


method = Method(
    name="hrank",
    paper="-",
    title="HRank: filter pruning using high-rank feature map",
    citation="Lin, Ji, Wang, Zhang, Zhang, Tian, Shao 2020, CVPR, arXiv 2002.10179",
    formula="S_j = mean over images of the rank of channel j's feature map, low ranks go",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.RANK, t.Criterion.ACTIVATION}),
        granularity=frozenset({t.Granularity.CHANNEL, t.Granularity.FILTER, t.Granularity.NEURON, t.Granularity.HEAD}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN}),
        physical=True,
    ),
    settings=HRankSettings,
    run=plan,
    units=UnitKind.CHANNEL,
    exact=Group.SITE,
    needs_data=True,
    structured=True,
)
