"""FPGM's small-scale check: filters that others stand for are found where no norm can tell them apart.

A CNN is trained on the digits, and its middle layer gets near-copies of some of its filters, 5 % off, which share
what the next layer made of the original. Then every filter is scaled to one L1 norm, and its batch norm with it. All
this leaves the logits as they were, up to the 5 %. As many filters go as were added: the best choice costs nothing.

What does not show on a task this easy: on a CNN as it was trained (widths 32, 32, 64), at half and at a quarter of
its channels, distances, norms and chance are within each other's spread (66 %, 64 % and 69 % at half, batch-norm
statistics re-estimated, one seed), as the paper's own gains of some tenths of a point would have it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur import api
from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.lab.checks._plain_cnn import PlainCNN, trained_cnn
from secateur.lab.checks._resnet_full import of_trained
from secateur.lab.checks._structured import cut_copy, example, points
from secateur.lab.reproduce import Check, Expectation, Sample

WIDTHS = (16, 24, 48)
NOISE = 0.05  # size of the difference between a copy and its original, as a fraction of the original's
DRAWS = 4  # of the filters that are copied, under each seed
L1 = {"norm": "l1", "members": "producers"}
COPIED = "as many filters go as were added as copies"
CLAIMS = {
    "copies": Expectation(
        f"filters among the removed that have copies, one filter copied 12 times, {COPIED}, as a fraction",
        ">= 0.9",
        "both",
    ),
    "lost": Expectation(
        f"of 24 different filters those without a copy left, six copied 3 times, {COPIED} in as many steps "
        "(baseline: the L1 norm)",
        "<= 2",
        "both",
    ),
    "again": Expectation(
        "the same; baseline: FPGM in one step, in which all copies of a filter score alike", "<= 2", "both"
    ),
    "drop": Expectation("accuracy points lost, one filter copied 12 times, right after the cut", "<= 1", "both"),
    "steps": Expectation(
        "accuracy points lost, six filters copied 3 times, as many steps, right after the cut", "<= 3", "both"
    ),
}


@dataclass(frozen=True)
class Redundant:
    """A network with copies in its middle layer.

    Attributes:
        model: the widened network.
        source: int64 `[filters]`: whose copy each filter is, the original its own.
        added: how many filters were added.
    """

    model: PlainCNN
    source: Tensor
    added: int

    @property
    def copied(self) -> Tensor:
        """Which filters have copies, bool `[filters]`."""
        return torch.bincount(self.source)[self.source] > 1


@dataclass(frozen=True)
class Outcome:
    """What a choice cost: fraction of the removed that had copies, filters lost, accuracy points lost."""

    copies: float
    lost: float
    drop: float


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Baseline: the L1 norm of the filters, unless a claim names another."""
    model = trained_cnn(WIDTHS, seed, progress)

    def means(originals: int, copies: int, method: str, **settings: Any) -> Outcome:
        draws = range(seed * DRAWS, (seed + 1) * DRAWS)
        found = [outcome(widened(model, draw, originals, copies), draw, method, **settings) for draw in draws]
        return Outcome(*(sum(vars(one)[name] for one in found) / DRAWS for name in ("copies", "lost", "drop")))

    one, one_norm, one_chance = (
        means(1, 12, name, **more) for name, more in (("fpgm", {}), ("channel_norm", L1), ("group_random", {}))
    )
    six, six_norm, six_chance = (
        means(6, 3, name, **more)
        for name, more in (("fpgm", {"steps": 18}), ("channel_norm", L1), ("group_random", {}))
    )
    return {
        "copies": Sample(one.copies, one_norm.copies, one_chance.copies),
        "lost": Sample(six.lost, six_norm.lost, six_chance.lost),
        "again": Sample(six.lost, means(6, 3, "fpgm").lost, six_chance.lost),
        "drop": Sample(one.drop, one_norm.drop, one_chance.drop),
        "steps": Sample(six.drop, six_norm.drop, six_chance.drop),
    }


def outcome(network: Redundant, seed: int, method: str, **settings: Any) -> Outcome:
    """Remove as many filters of the middle layer as were added to it."""
    share = (network.added + 0.5) / len(network.source)  # counts are rounded down
    plan = api.plan(
        network.model,
        method,
        sparsity=share,
        seed=seed,
        example=example(),
        multiple=1,
        exclude=("conv1", "head"),
        **settings,
    )
    keep = plan.masks["conv2:channel"]
    assert int((~keep).sum()) == network.added
    return Outcome(
        copies=float(network.copied[~keep].float().mean()),
        lost=len(set(network.source.tolist()) - set(network.source[keep].tolist())),
        drop=points(network.model) - points(cut_copy(network.model, plan)),
    )


@torch.no_grad()
def widened(model: PlainCNN, seed: int, originals: int, copies: int) -> Redundant:
    """A network with `copies` near-copies of some filters in shuffled order, all filters of one L1 norm."""
    rng, filters = generator(seed, "copies"), model.conv2.out_channels
    chosen = torch.randperm(filters, generator=rng)[:originals]
    source = torch.cat([torch.arange(filters), chosen.repeat(copies)])
    source = source[torch.randperm(len(source), generator=rng)]
    wide = PlainCNN((model.conv1.out_channels, len(source), model.conv3.out_channels)).eval()
    for name in ("conv1", "norm1", "norm3", "head"):
        setattr(wide, name, copy.deepcopy(getattr(model, name)))
    times = torch.bincount(source)[source]
    weight = model.conv2.weight[source]
    noise = torch.randn(weight.shape, generator=rng) * (times > 1).view(-1, 1, 1, 1)
    weight += NOISE * noise * (_norms(weight, 2) / _norms(noise, 2).clamp_min(1e-12))
    scale = weight[0].numel() / _norms(weight, 1)
    wide.conv2.weight.copy_(weight * scale)
    wide.conv3.weight.copy_(model.conv3.weight[:, source] / times.view(1, -1, 1, 1))
    _rescale(model.norm2, wide.norm2, source, scale.flatten())
    return Redundant(wide, source, originals * copies)


def _norms(filters: Tensor, power: int) -> Tensor:
    """`[n, 1, 1, 1]`."""
    found: Tensor = torch.linalg.vector_norm(filters.flatten(1), power, dim=1)
    return found.view(-1, 1, 1, 1)


def _rescale(norm: nn.BatchNorm2d, wide: nn.BatchNorm2d, source: Tensor, scale: Tensor) -> None:
    """The batch norm of copied filters that are `scale` times as large."""
    for name, factor in (("weight", 1.0), ("bias", 1.0), ("running_mean", scale), ("running_var", scale.square())):
        getattr(wide, name).copy_(getattr(norm, name)[source] * factor)


check = Check(CLAIMS, run, of_trained("fpgm"))
