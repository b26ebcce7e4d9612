"""AP: activate while pruning (Liu, Ghosh, Tan, Motani 2023, TMLR): prune a few weights to switch neurons on.

An add-on to any iterative pruner, the host. Per cycle a share p of the survivors goes:

    the host removes the share p - q by its own criterion,
    AP removes the share q: of the negative weights that are left, those that moved least, |W - P|,

where W are the trained weights and P the same weights when the cycle's training began. Without a negative weight
the pre-activation of its neuron rises for non-negative inputs, so fewer ReLUs are at zero; a weight that hardly
moved has learnt little. Then the survivors are rewound (AP-Pro: rewind=init or step) or trained on (AP-Lite:
rewind=none or lr).

The sparsity falls exactly as with the host alone at share p; the last cycle goes no further than the sparsity
asked. Each cycle is trained once: the training after AP is the one that the next cycle ranks by. AP cannot be used
alone, its gain depends on ReLU sparsity and shows at high sparsity. Behind a first layer with negative inputs the
rationale fails: `skip_first` leaves that layer to the host. When the negative weights run out the host takes the rest.

The official script counts BatchNorm gains as weights, removes one weight more than counted, knows pruned weights by
their value 0, and draws new weights before every cycle by default; here only linear and convolution weights are
pruned, counts are exact and masks are masks.

Extras: `host`, for host=given, is a function (model, sparsity, masks) -> masks, e.g. any method of the catalogue:
`lambda model, sparsity, masks: sc.plan(model, "taylor", sparsity=sparsity, data=data).masks`. `data` is what the zero
rates are measured on: a data set or batches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.allocate.counts import largest_remainder, with_floor
from secateur.allocate.spread import Spread, choose, keep_counts
from secateur.core import tags as t
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import ModelError, SettingsError
from secateur.core.method import Batch, Group, Method, Protocol
from secateur.core.select import keep_global
from secateur.core.units import Site, UnitKind
from secateur.data.batches import as_batches
from secateur.scores.weights import magnitude, uniform_random
from secateur.stats.zeros import overall, zero_rates
from secateur.train.snapshot import put_back
from secateur.train.study import Findings, Level, Masks, RewindSettings, Rounds, State, Study, masked_state

Host = Callable[[nn.Module, float, Masks], Mapping[str, Tensor]]
GONE = -1.0  # below every magnitude


class HostName(StrEnum):
    """The pruner that AP is added to."""

    GLOBAL = "global"  # magnitude, one ranking over all layers
    LAYER = "layer"  # magnitude, the same share in every layer
    GIVEN = "given"  # the study's extra `host`


class Pool(StrEnum):
    """Which weights AP takes."""

    NEGATIVE = "negative"  # the negative ones that moved least
    POSITIVE = "positive"  # a control: the positive ones that moved least
    RANDOM = "random"  # a control: any, at random


class ApSettings(RewindSettings):
    """Settings; defaults as in the official script, rewinding as in the paper."""

    p: float = Field(0.2, gt=0, lt=1, description="share of the survivors that goes in each cycle")
    q: float = Field(
        0.02, ge=0, lt=1, description="the part of p that AP takes; 0 is the host alone (paper: 0.01-0.05)"
    )
    host: HostName = Field(HostName.GLOBAL, description="global or layer (magnitude), or given as an extra")
    skip_first: bool = Field(False, description="AP takes nothing from the first layer, whose inputs may be negative")
    pool: Pool = Field(Pool.NEGATIVE, description="negative (the paper); positive and random are controls")
    surrogate: bool = Field(False, description="zero rates count outputs of GELU or SiLU that are not above zero")


@dataclass(frozen=True)
class Cut:
    """What one cycle removes. `missing`: weights that AP was to take and did not find."""

    masks: Masks
    by_host: Masks
    by_ap: Masks
    missing: int


def shares(alive: int, target: int, settings: ApSettings) -> tuple[int, int]:
    """How many of the survivors go in this cycle, and how many of these AP takes."""
    whole = math.floor(settings.p * alive + 1e-9)
    if whole < alive - target:
        return whole, math.floor(settings.q * alive + 1e-9)
    return alive - target, math.floor(settings.q / settings.p * (alive - target) + 1e-9)


def least_moved(level: Level, eligible: Masks, pool: Pool) -> dict[str, Tensor]:
    """|W - P| where AP may take a weight, infinite elsewhere. The sign is the trained weight's.

    Args:
        level: the trained round; `level.before` is P, the start of this very training.
        eligible: weights to look at.
        pool: negative or positive.
    """
    sign = {Pool.NEGATIVE: -1, Pool.POSITIVE: 1}[pool]
    found = {}
    for name, mask in eligible.items():
        after, before = level.after[name], level.before[name]
        found[name] = (after.double() - before.double()).abs().masked_fill(~mask | (after * sign <= 0), torch.inf)
    return found


class Cycles:
    """One cycle after another over the caller's trainings."""

    def __init__(self, study: Study, settings: ApSettings):
        self.study, self.settings = study, settings
        self.sites: dict[str, Site] = study.sites(study.model())
        self.host: Host | None = study.extra("host", "host=given") if settings.host is HostName.GIVEN else None

    def cut(self, level: Level, target: int) -> Cut:
        """Host, AP, and the host again where AP finds too few."""
        alive = _count(level.masks)
        going, due = shares(alive, target, self.settings)
        left = self.hosted(level.after, level.masks, alive - going + due)
        activated = self.activated(level, left, due)
        missing = due - (_count(left) - _count(activated))
        masks = self.hosted(level.after, activated, alive - going) if missing else activated
        by_ap = {name: left[name] & ~activated[name] for name in left}
        return Cut(masks, {name: level.masks[name] & ~masks[name] & ~by_ap[name] for name in masks}, by_ap, missing)

    def activated(self, level: Level, masks: Masks, due: int) -> Masks:
        """The masks without the `due` weights that AP takes, or without all it may take."""
        eligible = self._eligible(masks, due)
        if self.settings.pool is Pool.RANDOM:
            rng = {name: self.study.rng("ap", str(level.index), name) for name in masks}
            draws = {name: uniform_random(tuple(mask.shape), rng[name]) for name, mask in masks.items()}
            scores = {name: draw.masked_fill(~eligible[name], torch.inf) for name, draw in draws.items()}
        else:
            scores = least_moved(level, eligible, self.settings.pool)
        found = min(due, sum(int(torch.isfinite(score).sum()) for score in scores.values()))
        kept = keep_global(scores, sum(score.numel() for score in scores.values()) - found)
        return {name: masks[name] & kept[name] for name in masks}

    def _eligible(self, masks: Masks, due: int) -> Masks:
        """Survivors but those of a first layer that is skipped, and of layers that could fall below the floor."""
        first = next(iter(self.sites)) if self.settings.skip_first else None
        floor = self.study.budget.floor
        closed = {name for name, mask in masks.items() if name == first or (floor and int(mask.sum()) - due < floor)}
        return {name: torch.zeros_like(mask) if name in closed else mask for name, mask in masks.items()}

    def hosted(self, state: State, masks: Masks, keep: int) -> Masks:
        """The host's masks: `keep` of the survivors."""
        if self.host is not None:
            return self._asked(self.host, state, masks, keep)
        scores = {name: magnitude(state[name]).masked_fill(~masks[name], GONE) for name in masks}
        floor = self.study.budget.floor
        if self.settings.host is HostName.GLOBAL:
            return choose(scores, self.sites, Budget(keep, Quantity.UNITS, floor), Spread.GLOBAL)
        alive = {name: int(mask.sum()) for name, mask in masks.items()}
        wanted = {name: count * keep / sum(alive.values()) for name, count in alive.items()}
        return keep_counts(scores, with_floor(largest_remainder(wanted, keep, alive), alive, floor))

    def _asked(self, host: Host, state: State, masks: Masks, keep: int) -> Masks:
        """What the given host says.

        Raises:
            ModelError: it brings weights back, or keeps another number.
        """
        model = self.study.model()
        put_back(model, masked_state(state, masks))
        units = sum(site.units for site in self.sites.values())
        given = host(model, 1 - keep / units, masks)
        for name, mask in masks.items():
            if name not in given or bool((given[name] & ~mask).any()):
                raise ModelError(f"the host gave no mask for '{name}', or brought removed weights of it back")
        found = {name: given[name] for name in masks}
        if _count(found) != keep:
            raise ModelError(
                f"the host kept {_count(found)} weights instead of {keep}; AP needs one that is exact over all layers"
            )
        return found


def procedure(study: Study, settings: ApSettings) -> Findings:
    """Cycles until the sparsity is reached."""
    if settings.q >= settings.p:
        raise SettingsError(f"q={settings.q:g} is the part of p={settings.p:g} that AP takes; give q < p")
    cycles, rounds = Cycles(study, settings), Rounds(study, settings)
    target = study.budget.of(UnitKind.WEIGHT).keep(sum(site.units for site in cycles.sites.values()))
    batches = as_batches(study.extras["data"]) if "data" in study.extras else []
    level = rounds.first()
    found = Findings(rows=[_row(study, level, settings, batches)])
    while (alive := _count(level.masks)) > target:
        cut = cycles.cut(level, target)
        if _count(cut.masks) == alive:
            raise SettingsError(f"a share p={settings.p:g} of {alive} weights is less than one; raise p")
        found.rows[-1] |= _removed(cut)
        if cut.missing:
            found.warnings.append(
                f"cycle {level.index + 1}: AP found {cut.missing} weights too few, the host took them instead; lower q"
            )
        level = rounds.next(level, cut.masks)
        found.rows.append(_row(study, level, settings, batches))
    found.masks, found.state = level.masks, level.after
    found.summary = {"cycles": level.index, "density": level.density, "removed_by_ap": _sum(found.rows)}
    return found


def _sum(rows: list[dict[str, Any]]) -> int:
    return sum(sum(row["by_ap"].values()) for row in rows if "by_ap" in row)


def _count(masks: Mapping[str, Tensor]) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _removed(cut: Cut) -> dict[str, Any]:
    """What goes after a round, per layer."""
    return {
        "by_host": {name: int(gone.sum()) for name, gone in cut.by_host.items()},
        "by_ap": {name: int(gone.sum()) for name, gone in cut.by_ap.items()},
        "missing": cut.missing,
    }


def _row(study: Study, level: Level, settings: ApSettings, batches: list[Batch]) -> dict[str, Any]:
    """A trained round: density, the caller's figures, zero rates after each ReLU and over all."""
    row: dict[str, Any] = {"round": level.index, "density": level.density, **level.metrics}
    if not batches:
        return row
    model = study.model()
    put_back(model, level.after)
    rates = zero_rates(model, batches, settings.surrogate)
    return row | {
        "zero_rate": overall(rates).to_json(),
        "zero_rates": {name: rate.to_json() for name, rate in rates.items()},
    }


method = Method(
    name="ap",
    paper="07",
    title="AP: Selective Activation for De-sparsifying Pruned Networks",
    citation="Liu, Ghosh, Tan, Motani 2023, TMLR, arXiv 2212.06145",
    formula="a host removes p - q of the survivors, then q go: the negative weights with the least |W - W_start|",
    kind=Protocol.PROCEDURE,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE, t.Criterion.ACTIVATION}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.REWIND,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.OTHER}),
    ),
    settings=ApSettings,
    procedure=procedure,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
)
