"""Growing regularisation, GReg-1 and GReg-2 (Wang, Qin, Zhang, Fu 2021, ICLR, arXiv 2012.09243).

Filters that are to go are not cut from a trained network at once: an L2 penalty on them grows until they have
faded, and the others take over their work meanwhile. With update n = 1, 2, ... every K_u = `every` steps:

    d w += r w,   GReg-1: r = min(tau, n delta) for the filters of smallest L1 norm at the start, 0 for all others
    GReg-2: r = n delta_pick for all filters until tau_pick; then the smallest by L1 norm are chosen, for which r
    grows on by delta up to tau, while the others get r = `recover`, slightly negative, to regain what they lost

Under a penalty on all, filters shrink the less the more curved the loss is along them: norms separate, which is what
GReg-2 chooses by. Bring a trained network and a small learning rate (official: 1e-3); the filters go when the training
ends. Fine-tune afterwards.

Official settings: K_u 5 on ImageNet and 10 on CIFAR, delta 1e-4, tau 1, delta_pick 1e-5, tau_pick 0.01, recover -1e-4
(as large as the ImageNet weight decay), and 40,000 (10,000) more steps at tau: 90,000 (110,000) steps in all. In a
shorter training delta and delta_pick are raised, so that tau_pick is reached after `pick` and tau after `until` of the
steps. `delta=1e-4` takes the official pace, and a training too short for it is refused.

The official code penalises the weights of convolutions and linear layers, every layer losing its own given share, the
last convolutions of residual blocks and shortcuts none (`coupled=false`; the default scores the layers that make a
residual stream's channels together); it also ends the growth of a layer when its kept filters are 1000 times as large
on average as the others, which saves time but changes little. `members=all` lets everything that goes with a channel
fade, also what reads it and its norm: behind a batch norm a filter matters at any size until the norm's eps drowns it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from math import ceil, floor
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from secateur.core import tags as t
from secateur.core.errors import SettingsError
from secateur.core.method import Decision, Group, Method, Protocol
from secateur.core.units import UnitKind
from secateur.shrink.ending import EndSettings, StructuredEnd, unit_places
from secateur.shrink.structured import Members
from secateur.train.groups import Groups
from secateur.train.part import Part
from secateur.train.sparsifier import Order, Sparsifier

DELTA, DELTA_PICK = 1e-4, 1e-5  # official


class Variant(StrEnum):
    """When the filters are chosen."""

    GREG_1 = "greg-1"  # at the start
    GREG_2 = "greg-2"  # after a penalty on all has let them separate


class GregSettings(EndSettings):
    """Settings; the official code's."""

    variant: Variant = Field(Variant.GREG_1, description="greg-1 chooses at the start, greg-2 after growing for all")
    every: int = Field(10, ge=1, description="K_u, steps between two growths; official 10 (CIFAR), 5 (ImageNet)")
    delta: float | None = Field(
        None, gt=0, description="growth for what goes; default the official 1e-4, more where training is too short"
    )
    ceiling: float = Field(1.0, gt=0, description="tau, where the growth ends")
    until: float = Field(0.75, gt=0, le=1, description="share of the training by which a default delta gets there")
    delta_pick: float | None = Field(
        None, gt=0, description="growth for all in greg-2; default the official 1e-5, more where training is too short"
    )
    ceiling_pick: float = Field(0.01, gt=0, description="where greg-2 chooses")
    pick: float = Field(0.25, gt=0, lt=1, description="share of the training by which a default delta_pick gets there")
    recover: float = Field(-1e-4, description="penalty on what stays, once greg-2 has chosen")
    members: Members = Field(Members.PRODUCERS, description="the layers that make a unit, or everything that goes")
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")


@dataclass(frozen=True)
class Pace:
    """The growth of the penalty, counted in updates from 1.

    Attributes:
        every: steps between two updates.
        picks: updates on all units before the choice; 0 chooses at the start.
        delta_pick, ceiling_pick: of those updates.
        delta, ceiling: of the updates on what was chosen.
    """

    every: int
    picks: int
    delta_pick: float
    ceiling_pick: float
    delta: float
    ceiling: float

    @classmethod
    def of(cls, settings: GregSettings, steps: int) -> Pace:
        """The pace of a training of `steps` steps.

        Raises:
            SettingsError: a given delta does not get to its ceiling in time; says what would.
        """
        own, picks, delta_pick = settings, 0, 0.0
        base = 0.0
        if own.variant is Variant.GREG_2:
            delta_pick = own.delta_pick or _enough(own.ceiling_pick, own.pick * steps / own.every, DELTA_PICK)
            picks, base = ceil(own.ceiling_pick / delta_pick - 1e-9), own.ceiling_pick
        room = own.until * steps / own.every - picks
        delta = own.delta or _enough(own.ceiling - base, room, DELTA)
        needed = (picks + ceil((own.ceiling - base) / delta - 1e-9) - 1) * own.every + 1
        if needed > steps:
            raise SettingsError(
                f"growing by delta={delta:g} every {own.every} steps, the penalty reaches its ceiling of "
                f"{own.ceiling:g} at step {needed}, and training has {steps} steps; train longer, raise delta "
                "(delta_pick) or leave it to the method, or lower `every`"
            )
        return cls(own.every, picks, delta_pick, own.ceiling_pick, delta, own.ceiling)

    def update(self, step: int) -> int:
        """The last update before the step after `step` steps takes place."""
        return step // self.every + 1

    def on_all(self, update: int) -> float:
        """The penalty on every unit before the choice, and until the next update."""
        return min(self.ceiling_pick, update * self.delta_pick)

    def on_chosen(self, update: int) -> float:
        """The penalty on a chosen unit."""
        base = self.ceiling_pick if self.picks else 0.0
        return min(self.ceiling, base + (update - self.picks) * self.delta)


def _enough(height: float, updates: float, official: float) -> float:
    """The official growth, or the least that gets to `height` within so many updates."""
    return max(official, height / max(1, floor(updates)))


class GrowingPenalty(StructuredEnd):
    """The growing penalty while the network trains, and the cut of the chosen units at the end.

    Attributes:
        masks: site -> what stays; empty before the choice.
    """

    def __init__(self, settings: GregSettings):
        super().__init__(settings, lambda view: means(Groups(view.model, view.sites, unit_places(view, self.members))))
        self.own, self.members = settings, settings.members
        self.masks: Mapping[str, Tensor] = {}

    def start(self, run: Sparsifier) -> None:
        """Find the groups and the pace; GReg-1 chooses."""
        self.pace = Pace.of(self.own, run.steps)
        super().start(run)
        self.weights = self.groups(run, unit_places(self.view(), self.members))
        if not self.pace.picks:
            self._choose(run)

    def _choose(self, run: Sparsifier) -> None:
        self.masks = self.decided(run).masks
        kept = sum(int(mask.sum()) for mask in self.masks.values()) / sum(s.units for s in self.work.sites.values())
        run.log.append({"step": run.step, "what": "choose", "density": kept})

    def after_backward(self, run: Sparsifier) -> None:
        """R w on every unit's weights."""
        if run.step >= run.steps:
            return
        update = self.pace.update(run.step)
        if not self.masks and update >= self.pace.picks:
            self._choose(run)
        self.weights.pull(self.rates(update))

    def rates(self, update: int) -> dict[str, Tensor]:
        """Site -> r of every unit."""
        if update <= self.pace.picks:
            return {name: torch.full(site.shape, self.pace.on_all(update)) for name, site in self.work.sites.items()}
        kept = self.own.recover if self.pace.picks else 0.0
        gone = self.pace.on_chosen(update)
        return {name: torch.where(mask, kept, gone) for name, mask in self.masks.items()}

    def decided(self, run: Sparsifier) -> Decision:
        """What was chosen goes, whatever has become of it; before the choice, what would be chosen now."""
        if self.masks:
            scores = self.work.scores(self.criterion, self.work.whole())
            return self.work.conclude(self.masks, scores)
        return super().decided(run)

    def state_dict(self) -> dict[str, Any]:
        """The choice; the penalty follows from the step."""
        return {"masks": dict(self.masks)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.masks = dict(state["masks"])


def means(groups: Groups) -> dict[str, Tensor]:
    """Site -> mean |w| of every group."""
    return {name: total / groups.sizes[name] for name, total in groups.sums(1).items()}


def make_parts(order: Order, settings: GregSettings) -> list[Part]:
    """One part does it all."""
    return [GrowingPenalty(settings)]


method = Method(
    name="greg",
    paper="-",
    title="Neural pruning via growing regularization",
    citation="Wang, Qin, Zhang, Fu 2021, ICLR, arXiv 2012.09243",
    formula="L + r/2 ||w||^2 on the filters of smallest L1 norm, r += delta every K_u steps up to tau, then they go",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LP_NORM}),
        granularity=frozenset({t.Granularity.CHANNEL, t.Granularity.FILTER, t.Granularity.NEURON, t.Granularity.HEAD}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.OTHER}),
        learn=frozenset({t.Learn.SPARSITY_REGULARIZATION}),
        physical=True,
    ),
    settings=GregSettings,
    parts=make_parts,
    units=UnitKind.CHANNEL,
    exact=Group.SITE,
    changes_weights=True,
    structured=True,
)
