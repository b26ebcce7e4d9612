"""Rewinding: lottery tickets for deeper networks (Frankle, Dziugaite, Roy, Carbin 2019, arXiv 1903.01611).

Resetting survivors to initialisation fails on deeper networks at usual learning rates. Resetting them to their
values W_k after a few steps k works (0.1 to 7 % of the training):

    W_k <- train W_0 for k steps;  m <- 1
    repeat: train m * W_k from step k to T;  m <- the (1 - p) largest |W_T| of the survivors, over all layers but
    the output

The T - k steps run with the learning rates and the data of steps k to T; batch-norm statistics go back as well;
the optimiser starts fresh, momentum at zero, as in the authors' OpenLTH. The dense network (level 0) goes on from
the same W_k, so that all networks of one k have one trunk. k = 0 is the lottery ticket, k = T is pruning without
retraining. `rewind=lr` keeps W_T and replays the schedule only (Renda et al. 2020). `scan` tries several k
and chooses the smallest whose ticket is within `tolerance` of the dense network.

Why it works, says the paper, is stability. For the last level, its ticket and a layer-wise shuffled mask from the
same W_k, `stability` measures with kept weights only:

    to pruning:    || m * W_T(dense) - W_T(sparse) ||_2, both trained with the same order of the data
    to the order:  || W_T(sparse, order A) - W_T(sparse, order B) ||_2

the angles, and the barrier on the line between the two orders (below 2 points: stable, Frankle et al. 2020).
It needs a `fit` with `reordered(seed)` or `extras={"reordered": seed -> fit}`; for networks with batch norm also
`extras={"reestimate": model -> None}`, which takes their statistics anew on training data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from secateur.core import tags as t
from secateur.core.errors import SettingsError
from secateur.core.method import Group, Method, Protocol
from secateur.core.progress import track
from secateur.core.units import UnitKind
from secateur.train.controls import shuffled
from secateur.train.cuts import REFERENCE_COUNTS, Cuts, CutSettings, Ranking
from secateur.train.loop import Decay, Recipe
from secateur.train.stability import stability
from secateur.train.study import Findings, Level, RewindSettings, RewindTo, Rounds, Study
from secateur.train.tickets import dead_layers, gain, level_row, trained_beside

RESETS = (RewindTo.INIT, RewindTo.STEP)


class RewindingSettings(CutSettings):
    """Defaults: OpenLTH's, 20 % per round in one ranking over all layers but the output."""

    ranking: Ranking = Field(Ranking.GLOBAL, description="global: one ranking over all layers; layer: rates per layer")
    rewind: RewindTo = Field(RewindTo.STEP, description="step (weights of step k), lr (schedule only), init or none")
    k: int | None = Field(None, ge=0, description="optimiser steps to rewind to; default: 1 % of the training")
    scan: tuple[int, ...] = Field((), description="several k instead; the smallest good one is chosen")
    tolerance: float = Field(0.5, ge=0, description="of the metric: what still counts as good as the dense network")
    shuffled: bool = Field(
        False, description="train a layer-wise shuffled mask from the same step beside the last level"
    )
    stability: bool = Field(False, description="distances, angles and the barrier, of ticket and shuffled mask")
    shares: tuple[float, ...] = Field((0.5,), description="where between two networks the barrier is looked for")


def rewinding(study: Study, settings: RewindingSettings) -> Findings:
    """One run of rounds per k; one row per network."""
    steps = _steps(study, settings)
    runs = [_run(study, settings, k) for k in track(steps, study.progress, "steps to rewind to")]
    chosen = next((run for run in runs if run.lost <= settings.tolerance), runs[-1])
    return Findings(
        rows=[row for run in runs for row in run.rows],
        summary={
            "k": chosen.k if chosen.lost <= settings.tolerance else None,
            "scan": [{"k": run.k, "share": run.k / study.steps, "lost": run.lost} for run in runs],
            "trainings": sum(len(run.rows) for run in runs),
        },
        masks=chosen.last.masks,
        state=chosen.last.after,
        warnings=[*_warnings(study, settings, runs, chosen), *dead_layers(chosen.last.masks)],
    )


@dataclass
class Run:
    """All rounds with one k.

    Attributes:
        k: the step rewound to.
        last: the last level's ticket, trained.
        lost: by how much it is worse than its dense network.
        rows: one per network.
    """

    k: int
    last: Level
    lost: float
    rows: list[dict[str, Any]]


def _steps(study: Study, settings: RewindingSettings) -> list[int]:
    """The k to try, ascending."""
    if settings.scan and settings.k is not None:
        raise SettingsError(f"give k={settings.k} or scan={settings.scan}, not both")
    if settings.rewind in (RewindTo.INIT, RewindTo.NONE):
        if settings.scan or settings.k:
            raise SettingsError(
                f"rewind={settings.rewind.value} goes back to step 0; for a step k give rewind=step or lr"
            )
        return [0]
    alone = round(0.01 * study.steps) if settings.k is None else settings.k
    return sorted(set(settings.scan or (alone,)))


def _run(study: Study, settings: RewindingSettings, k: int) -> Run:
    """Rounds of pruning that go back to step k."""
    cuts = Cuts(study.sites(study.model()), study.budget, settings)
    rounds = Rounds(study, RewindSettings(rewind=settings.rewind, k=k), name=f"k{k}")
    dense = level = rounds.first()
    rows = [{"k": k, **level_row(study, dense, "dense")}]
    for index in track(range(1, cuts.rounds + 1), study.progress, "rounds of pruning"):
        level = rounds.next(level, cuts.masks(index, level.masks, level.after))
        rows.append({"k": k, **level_row(study, level, "ticket")})
    if cuts.rounds and (settings.shuffled or settings.stability):
        # from the dense network's weights where these are kept, otherwise from the step rewound to
        state = rounds.trunk() if settings.rewind in RESETS else dense.after
        masks = shuffled(level.masks, study.seed, whole=cuts.whole)
        control = trained_beside(study, f"k{k}-shuffled", level.index, state, masks, start=rounds.start)
        rows.append({"k": k, **level_row(study, control, "shuffled")})
        if settings.stability:
            for network, row in ((level, rows[-2]), (control, rows[-1])):
                name = f"k{k}-{row['network']}"
                row |= stability(study, dense, network, name, start=rounds.start, shares=settings.shares)
    return Run(k, level, -gain(level.metrics, dense.metrics, study.metric), rows)


def _warnings(study: Study, settings: RewindingSettings, runs: list[Run], chosen: Run) -> Iterator[str]:
    """What is no ticket, and what was not found."""
    drop = _first_drop(study)
    for run in runs:
        if drop is not None and run.k > drop:
            yield f"k={run.k} lies beyond the first drop of the learning rate at step {drop}: fine-tuning, no ticket"
    if chosen.lost > settings.tolerance:
        yield (
            f"no ticket is within {settings.tolerance:g} of the dense network in {study.metric} (lost: "
            f"{chosen.lost:.4g} at k={chosen.k}); rewind to a later step or keep more weights"
        )
    if settings.reference:
        yield REFERENCE_COUNTS


def _first_drop(study: Study) -> int | None:
    """The step where the learning rate first drops by a factor, if the training says so."""
    recipe = getattr(study.fit, "recipe", None)
    if not isinstance(recipe, Recipe) or recipe.decay is not Decay.STEPS:
        return None
    return min((round(share * recipe.steps) for share in recipe.milestones), default=None)


method = Method(
    name="rewinding",
    paper="05",
    title="Stabilizing the lottery ticket hypothesis",
    citation="Frankle, Dziugaite, Roy, Carbin 2019, arXiv 1903.01611",
    formula="n rounds: train W_k * m from step k to T, remove the share p of the survivors with the smallest |w|",
    kind=Protocol.PROCEDURE,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.REWIND,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
    ),
    settings=RewindingSettings,
    procedure=rewinding,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    changes_weights=True,
)
