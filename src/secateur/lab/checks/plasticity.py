"""Pruning plasticity's small-scale check: a falling learning rate costs it, regeneration raises it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from secateur import api
from secateur.core.progress import Progress
from secateur.lab.checks._sparse_mlp import DROPS, STEPS, fresh
from secateur.lab.checks._training import fitting
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.train.loop import Fitting

RECOVERY, EARLY, HALF = 0.1, 0.2, 0.5
STAYS = DROPS.model_copy(update={"milestones": (0.9,)})

CLAIMS = {
    "rate": Expectation(
        "accuracy points that pruning 98 % at half time loses more if the learning rate drops there", ">= 3", "baseline"
    ),
    "regeneration": Expectation(
        "accuracy points that regrowing by gradient adds after pruning 99.5 %, early in the training",
        ">= 20",
        "baseline",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """Baselines: the unpruned network under the same two rates; an exchange at the same density."""
    drops, stays = (
        measured(fitting(recipe, seed, progress=progress), HALF, (0.0, 0.98), ("none",)) for recipe in (DROPS, STAYS)
    )
    early = measured(fitting(DROPS, seed, progress=progress), EARLY, (0.995,), ("none", "restore", "exchange"))
    plain = early[0.995, "none"]
    return {
        "rate": Sample(
            stays[0.98, "none"] - drops[0.98, "none"],
            stays[0.0, "none"] - drops[0.0, "none"],
            0.0,
        ),
        "regeneration": Sample(early[0.995, "restore"] - plain, early[0.995, "exchange"] - plain, 0.0),
    }


def measured(
    fit: Fitting, moment: float, rates: Sequence[float], modes: Sequence[str]
) -> dict[tuple[float, str], float]:
    """(sparsity, regeneration) -> plasticity at one moment."""
    *further, last = rates
    found = api.study(
        fresh,
        fit,
        "plasticity",
        last,
        steps=STEPS,
        seed=fit.seed,
        moments=(moment,),
        rates=tuple(further),
        recovery=RECOVERY,
        regenerate=tuple(modes),
    )
    return {(row["sparsity"], row["regenerate"]): row["plasticity"] for row in found.rows}


check = Check(CLAIMS, run)
