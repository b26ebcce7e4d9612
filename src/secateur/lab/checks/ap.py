"""AP's small-scale check: fewer neurons at zero than the host alone leaves, at equal sparsity and equal accuracy.

Accuracy gains are reported for CIFAR at high sparsity; the digits are too easy to show them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur import api
from secateur.core.budget import Budget, Quantity
from secateur.core.progress import Progress
from secateur.core.seeding import seeded
from secateur.lab.checks._digits import digits, mlp
from secateur.lab.checks._training import fitting
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.train.loop import Recipe
from secateur.train.schedules import geometric_counts

WIDTHS = (64, 300, 100, 10)
RECIPE = Recipe(steps=300, batch=60, lr=0.1, momentum=0.9, weight_decay=5e-4)
SHARE, CYCLES = 0.2, 10
DENSITIES = {26: 6, 11: 10}  # percent left -> cycles
WEIGHTS = 64 * 300 + 300 * 100 + 100 * 10

CLAIMS = {
    "dynamic_26": Expectation("dynamic zero rate relative to the host alone's, 26 % of the weights", "<= 0.9", "both"),
    "dynamic_11": Expectation("dynamic zero rate relative to the host alone's, 11 % of the weights", "<= 0.87", "both"),
    "total_26": Expectation("total zero rate relative to the host alone's, 26 % of the weights", "<= 0.87", "both"),
    "total_11": Expectation("total zero rate relative to the host alone's, 11 % of the weights", "<= 0.85", "both"),
    "accuracy_26": Expectation("accuracy points over the host alone, 26 % of the weights", ">= -0.5", "random"),
    "accuracy_11": Expectation("accuracy points over the host alone, 11 % of the weights", ">= -0.5", "random"),
    "counts": Expectation("weights kept too many or too few over all cycles, against the host alone", "== 0", "random"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed.

    Zero rates: the baseline takes positive weights instead, the random control any weights. Accuracy: the baseline is
    the host alone, the random control a randomly pruned network. Counts: the random control is a share added on
    top of the host's.
    """
    host = cycles(seed, progress, q=0.0)
    ap, positive, any_ = (cycles(seed, progress, pool=pool) for pool in ("negative", "positive", "random"))
    samples = {"counts": Sample(miscount(ap, host), 0.0, miscount(cycles(seed, progress, p=0.22, upto=1), host))}
    for percent, cycle in DENSITIES.items():
        for rate in ("dynamic", "total"):
            reference = host[cycle]["zero_rate"][rate]
            found = (rows[cycle]["zero_rate"][rate] / reference for rows in (ap, positive, any_))
            samples[f"{rate}_{percent}"] = Sample(*found)
        dense = host[cycle]["accuracy"]
        chance = random_accuracy(seed, progress, cycle)
        samples[f"accuracy_{percent}"] = Sample(ap[cycle]["accuracy"] - dense, 0.0, chance - dense)
    return samples


def cycles(seed: int, progress: Progress, upto: int = CYCLES, **settings: Any) -> list[dict[str, Any]]:
    """One row per cycle."""
    share = settings.get("p", SHARE)
    budget = Budget(geometric_counts(WEIGHTS, share, upto)[-1], Quantity.UNITS)
    extras = {"data": digits().evaluation}
    fit = fitting(RECIPE, seed, progress=progress)
    return api.study(lambda: mlp(WIDTHS), fit, "ap", budget=budget, seed=seed, extras=extras, **settings).rows


def miscount(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> int:
    """By how many weights two runs differ, summed over the cycles that both have."""
    pairs = zip(rows, others, strict=False)
    return sum(abs(round((row["density"] - other["density"]) * WEIGHTS)) for row, other in pairs)


def random_accuracy(seed: int, progress: Progress, cycle: int) -> float:
    """Accuracy of a network that was pruned at random before the same training."""
    with seeded(seed):
        model = mlp(WIDTHS)
    kept = geometric_counts(WEIGHTS, SHARE, CYCLES)[cycle]
    masks = api.plan(model, "random", budget=Budget(kept, Quantity.UNITS), seed=seed).masks
    return fitting(RECIPE, seed, progress=progress)(model, masks)["accuracy"]


check = Check(CLAIMS, run)
