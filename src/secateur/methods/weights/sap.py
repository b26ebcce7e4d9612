"""SAP: sparsity-informed adaptive pruning by the PQ index (Diao et al. 2023, ICLR).

The lottery-ticket loop without a fixed ratio: train, measure how compressible the trained weights still are, prune
that much, rewind to the initial values, train again. Per unit (all weights, a layer, or an output neuron) with d
weights left:

    I = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q
    r = ceil(d (1 + eta)^(-q/(q-p)) (1 - I)^(pq/(q-p)))            (the fewest that have to stay)
    c = floor(d clamp(gamma (1 - r/d), 0, beta)),                  and the c smallest |w| of the unit go

so the ratio is large while the network is compressible and falls towards zero by itself. The rows hold the curve of the
index against the rounds: down = regularisation, up = compression limit, down again = collapse.

The sparsity asked is where the loop stops: the last round prunes a share of c in every unit so that it is hit exactly.
SAP may stall (c = 0 everywhere) or run out of rounds before; then it says so and returns what it reached.

The official code finds c in float32, where 1 - r/d can lose a weight, and prunes below the (c + 1)-th smallest
magnitude, so that ties survive (`reference`); here c is computed on integers and exactly c go. Its test set picks each
round's checkpoint; here a round ends with the weights that `fit` leaves. It rewinds parameters and not batch-norm
statistics; here both. Its fixed ratio P is the quantile of |w|, which removes ceil(P (d - 1)); so does `ratio=fixed`,
per filter where the scope is neuron. Gradients are clipped to norm 1 before masks act: `Recipe(clip=1.0)`. Biases and
norms are never pruned.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.counts import largest_remainder, with_floor
from secateur.allocate.spread import keep_counts
from secateur.core import tags as t
from secateur.core.method import Group, Method, Protocol
from secateur.core.progress import track
from secateur.core.units import Site, UnitKind
from secateur.scores.compressibility import check_powers, gini, pq_index, retained
from secateur.scores.weights import magnitude
from secateur.structure.layers import from_matrix, to_matrix
from secateur.train.study import Findings, Level, Masks, RewindSettings, Rounds, State, Study, masked_state

EVERYTHING = "all layers"


class Scope(StrEnum):
    """What gets one index, one ratio and one ranking."""

    GLOBAL = "global"  # all prunable weights together
    LAYER = "layer"
    NEURON = "neuron"  # one output row or filter


class Ratio(StrEnum):
    """How many weights go in a round."""

    SAP = "sap"
    FIXED = "fixed"  # the lottery ticket's constant share


class SapSettings(RewindSettings):
    """Settings; defaults as in the official code, p and q as in its first setting."""

    scope: Scope = Field(Scope.GLOBAL, description="one index for all weights (global), per layer or per neuron")
    p: float = Field(0.5, gt=0, description="lower power of the PQ index; the paper uses 0.5 with q=1, 1 with q=2")
    q: float = Field(1.0, gt=0, description="upper power, above p")
    eta: float = Field(0.0, ge=0, description="share of the kept |w|^p that the pruned weights may hold")
    gamma: float = Field(1.0, gt=0, description="factor on the ratio; above 1 prunes faster")
    beta: float = Field(0.9, gt=0, le=1, description="largest share of a unit that goes in one round")
    rounds: int = Field(30, ge=1, description="pruning rounds at most (official code: 30, ResNets 15)")
    ratio: Ratio = Field(Ratio.SAP, description="sap, or fixed for the lottery-ticket baseline")
    rate: float = Field(0.2, gt=0, lt=1, description="share that goes per round with ratio=fixed")
    one_shot: bool = Field(False, description="rank by the first trained dense network in every round")
    reference: bool = Field(False, description="the official code's float32 counts, and ties at the cut survive")
    evaluate_pruned: bool = Field(
        True, description="report the pruned, not yet retrained model as well: calls fit with start = stop"
    )


@dataclass(frozen=True)
class Units:
    """Weights of one or all layers as rows, each row a unit: `[units, weights]`."""

    weights: Tensor
    kept: Tensor

    @property
    def counts(self) -> Tensor:
        """d: weights left in each unit, `[units]`."""
        return self.kept.sum(-1)


def units(weights: State, masks: Masks, sites: Mapping[str, Site], scope: Scope) -> dict[str, Units]:
    """The weights cut into units."""
    if scope is Scope.NEURON:
        return {
            name: Units(to_matrix(weights[name], site.layout), to_matrix(masks[name], site.layout))
            for name, site in sites.items()
        }
    flat = {name: Units(weights[name].reshape(1, -1), masks[name].reshape(1, -1)) for name in sites}
    if scope is Scope.LAYER:
        return flat
    joined = (torch.cat([getattr(part, key) for part in flat.values()], 1) for key in ("weights", "kept"))
    return {EVERYTHING: Units(*joined)}


def due(name: str, unit: Units, settings: SapSettings) -> Tensor:
    """c: how many weights of each unit go now, int64 `[units]`."""
    d = unit.counts
    if settings.ratio is Ratio.FIXED:
        return (settings.rate * (d - 1).double() - 1e-9).ceil().long().clamp(min=0)
    index = pq_index(unit.weights, unit.kept, settings.p, settings.q, name)
    r = retained(d, index, settings.p, settings.q, settings.eta)
    if settings.reference:
        ratio = (settings.gamma * (1 - r / d)).clamp(0, settings.beta)  # float32
        return (d * ratio.nan_to_num()).floor().long()
    share = torch.minimum(settings.gamma * (d - r).double(), settings.beta * d.double())
    return (share + 1e-9).floor().long()


def prune(level: Level, ranking: State, sites: Mapping[str, Site], settings: SapSettings, target: int = 0) -> Masks:
    """The next round's masks: in every unit the c smallest magnitudes go, but `target` weights stay in all.

    Args:
        level: the trained round.
        ranking: weights whose magnitudes rank; the level's own unless one-shot.
        sites: what may be pruned.
        settings: SAP's.
        target: weights that stay at least, over all sites.
    """
    counts = {
        name: due(name, unit, settings) for name, unit in units(level.after, level.masks, sites, settings.scope).items()
    }
    left = sum(int(mask.sum()) for mask in level.masks.values())
    counts = _capped(counts, left - target)
    ranked = units(ranking, level.masks, sites, settings.scope)
    kept = {name: _without(ranked[name], gone, settings.reference) for name, gone in counts.items()}
    return _as_masks(kept, sites, settings.scope)


def floored(masks: Masks, before: Masks, ranking: State, floor: int) -> Masks:
    """The same masks, or others with the same total in which every layer keeps `floor` of what it had before."""
    kept, alive = ({name: int(mask.sum()) for name, mask in part.items()} for part in (masks, before))
    counts = with_floor(kept, alive, floor)
    if counts == kept:
        return masks
    return keep_counts({name: magnitude(ranking[name]).masked_fill(~before[name], -1.0) for name in masks}, counts)


def _capped(counts: Mapping[str, Tensor], allowed: int) -> dict[str, Tensor]:
    """The same counts, or the same share of each so that exactly `allowed` weights go."""
    limits = {f"{name}/{row}": int(c) for name, rows in counts.items() for row, c in enumerate(rows)}
    total = sum(limits.values())
    if total <= allowed:
        return dict(counts)
    found = largest_remainder({unit: c * allowed / total for unit, c in limits.items()}, allowed, limits)
    return {name: torch.tensor([found[f"{name}/{row}"] for row in range(len(c))]) for name, c in counts.items()}


def _without(unit: Units, gone: Tensor, reference: bool) -> Tensor:
    """Keep-mask without the `gone[i]` smallest kept magnitudes of row i; ties by index, or all stay (reference)."""
    size = unit.weights.abs().masked_fill(~unit.kept, torch.inf)
    if reference:
        threshold = size.sort(dim=-1).values.gather(-1, gone.clamp(max=size.shape[-1] - 1).unsqueeze(-1))
        return unit.kept & (size >= threshold)
    rank = size.argsort(dim=-1, stable=True).argsort(dim=-1)
    return unit.kept & (rank >= gone.to(rank.device).unsqueeze(-1))


def _as_masks(rows: Mapping[str, Tensor], sites: Mapping[str, Site], scope: Scope) -> Masks:
    if scope is Scope.NEURON:
        return {name: from_matrix(rows[name], site) for name, site in sites.items()}
    if scope is Scope.LAYER:
        return {name: rows[name].view(site.shape) for name, site in sites.items()}
    parts = torch.split(rows[EVERYTHING].flatten(), [site.units for site in sites.values()])
    return {name: part.view(site.shape) for (name, site), part in zip(sites.items(), parts, strict=True)}


def indices(weights: State, masks: Masks, sites: Mapping[str, Site], settings: SapSettings) -> dict[str, float]:
    """PQ and Gini index per scope; for layers and neurons the mean over the units."""
    found: dict[str, float] = {}
    for scope in Scope:
        cut = units(weights, masks, sites, scope)
        pq = torch.cat([pq_index(u.weights, u.kept, settings.p, settings.q, name) for name, u in cut.items()])
        uneven = torch.cat([gini(u.weights, u.kept, name) for name, u in cut.items()])
        found |= {f"pq_index_{scope}": float(pq.mean()), f"gini_{scope}": float(uneven.mean())}
    return found


def procedure(study: Study, settings: SapSettings) -> Findings:
    """Rounds until the sparsity is reached, nothing is due any more, or the rounds are used up."""
    check_powers(settings.p, settings.q)
    sites, rounds = study.sites(study.model()), Rounds(study, settings)
    target = study.budget.of(UnitKind.WEIGHT).keep(sum(site.units for site in sites.values()))
    floor = study.budget.floor
    level = first = rounds.first()
    found = Findings(rows=[_row(study, level, sites, settings)])
    for _ in track(range(settings.rounds), study.progress, "pruning rounds"):
        ranking = first.after if settings.one_shot else level.after
        masks = floored(prune(level, ranking, sites, settings, target), level.masks, ranking, floor)
        if _left(masks) == _left(level.masks):
            break
        found.rows[-1] |= _pruned(study, level, masks, sites, settings)
        level = rounds.next(level, masks)
        found.rows.append(_row(study, level, sites, settings))
    found.masks, found.state = level.masks, level.after
    found.summary = {"rounds": level.index, "density": level.density, "stop": _ending(level, settings, target)}
    if _left(level.masks) > target:
        found.warnings.append(
            f"SAP {found.summary['stop']} at sparsity {1 - level.density:.4f}, before the sparsity asked; "
            "raise gamma, eta or rounds, or take p closer to q=1 to go further"
        )
    return found


def _ending(level: Level, settings: SapSettings, target: int) -> str:
    if _left(level.masks) == target:
        return "reached the sparsity"
    return "used up its rounds" if level.index == settings.rounds else "stalled (the index asks for no more pruning)"


def _left(masks: Masks) -> int:
    return sum(int(mask.sum()) for mask in masks.values())


def _row(study: Study, level: Level, sites: Mapping[str, Site], settings: SapSettings) -> dict[str, Any]:
    """A trained round: density in all and per layer, the caller's figures, the indices."""
    densities = {name: float(mask.float().mean()) for name, mask in level.masks.items()}
    figures = {"round": level.index, "density": level.density, "densities": densities, **level.metrics}
    return figures | indices(level.after, level.masks, sites, settings)


def _pruned(
    study: Study, level: Level, masks: Masks, sites: Mapping[str, Site], settings: SapSettings
) -> dict[str, Any]:
    """The share that goes after this round, and the pruned model before it is rewound."""
    state = masked_state(level.after, masks)
    figures: dict[str, Any] = {"pruned_share": 1 - _left(masks) / _left(level.masks)}
    found = indices(state, masks, sites, settings)
    if settings.evaluate_pruned:

        def evaluate() -> dict[str, float]:
            return study.trained(state, masks, study.steps, study.steps)[1]

        found |= study.ledger.once(f"pruned-{level.index}", evaluate)
    return figures | {f"pruned_{name}": value for name, value in found.items()}


method = Method(
    name="sap",
    paper="16",
    title="Pruning Deep Neural Networks from a Sparsity Perspective",
    citation="Diao, Wang, Zhang, Yang, Ding, Tarokh 2023, ICLR, arXiv 2302.05601",
    formula="share to prune = 1 - (1 - PQ index)^(pq/(q-p)) of the trained weights, then the smallest |w|; rewind",
    kind=Protocol.PROCEDURE,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE, t.Criterion.LP_NORM}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.REWIND,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
    ),
    settings=SapSettings,
    procedure=procedure,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
)
