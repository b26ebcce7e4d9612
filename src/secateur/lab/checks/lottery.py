"""Lottery tickets' small-scale check: a ticket at 3 % keeps the dense accuracy, its controls do not.

`full` is the paper's own experiment on LeNet-300-100 and MNIST, with shorter trainings.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from secateur import api
from secateur.core.progress import Progress
from secateur.data.dataset import Splits
from secateur.data.files import open_file
from secateur.lab.checks._digits import mlp
from secateur.lab.checks._training import fitting
from secateur.lab.reproduce import Check, Expectation, FullCheck, Sample, folder_of
from secateur.measure import accuracy
from secateur.train.loop import Fitting, Recipe
from secateur.train.study import Ledger

WIDTHS = (64, 300, 100, 10)
RECIPE = Recipe(steps=800, batch=60, lr=0.1, momentum=0.0, decay="constant")
EARLY, SOON = 100, 200  # steps at which learning speed is looked at
AT_17_PERCENT = 8  # level: 0.8 ** 8

CLAIMS = {
    "end": Expectation("accuracy points over the dense network, ticket at 3 %", ">= -2", "both"),
    "reinit": Expectation("accuracy points over the same mask re-initialised, at 3 %", ">= 5", "both"),
    "soon": Expectation("accuracy points over the same mask re-initialised, at 3 %, after 200 steps", ">= 30", "both"),
    "shuffled": Expectation("accuracy points over a layer-wise shuffled mask, at 3 %", ">= 30", "random"),
    "early": Expectation("accuracy points over the dense network, at 17 %, both after 100 steps", ">= -1", "both"),
    "one_shot": Expectation("accuracy points over pruning to 3 % in one shot, after 200 steps", ">= 5", "both"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Baseline: the mask re-initialised; random: shuffled masks."""
    fit = fitting(RECIPE, seed, also_at=(EARLY, SOON), progress=progress)

    def search(**settings: Any) -> list[dict[str, Any]]:
        return api.study(lambda: mlp(WIDTHS), fit, "lottery", sparsity=0.97, seed=seed, **settings).rows

    rows = search(controls=("reinit", "shuffled"), control_levels=(AT_17_PERCENT,))
    one_shot = search(strategy="one_shot")[-1]
    dense, last = rows[0], rows[-1]["level"]
    ticket, reinit, shuffled = (_row(rows, last, network) for network in ("ticket", "reinit", "shuffled"))
    early = [_row(rows, AT_17_PERCENT, network) for network in ("ticket", "reinit", "shuffled")]

    def over(other: Mapping[str, Any], figure: str = "accuracy") -> Sample:
        return Sample(*(row[figure] - other[figure] for row in (ticket, reinit, shuffled)))

    at_once = f"accuracy@{EARLY}"
    return {
        "end": over(dense),
        "reinit": over(reinit),
        "soon": over(reinit, f"accuracy@{SOON}"),
        "shuffled": over(shuffled),
        "early": Sample(*(row[at_once] - dense[at_once] for row in early)),
        "one_shot": over(one_shot, f"accuracy@{SOON}"),
    }


def _row(rows: list[dict[str, Any]], level: int, network: str) -> dict[str, Any]:
    return next(row for row in rows if row["level"] == level and row["network"] == network)


# --- the paper's own scale ----------------------------------------------------------------------------

LENET = (784, 300, 100, 10)
FULL_RECIPE = Recipe(steps=2000, batch=60, optimizer="adam", lr=1.2e-3, decay="constant")

FULL_CLAIMS = {
    "best": Expectation("accuracy points over dense, the better of the tickets at 17 and 7 %", ">= 0", "both"),
    "last": Expectation("accuracy points over the same mask re-initialised, at 7 %", ">= 0.5", "both"),
    "early": Expectation("accuracy points over dense, ticket at 17 %, after 500 steps", ">= 0", "both"),
}


CONDITIONS = (
    f"LeNet-300-100 on all of MNIST, Glorot normal. Adam {FULL_RECIPE.lr:g}, batch {FULL_RECIPE.batch}, "
    f"{FULL_RECIPE.steps:,} steps a training (the paper: 50,000), 20 % of every layer's survivors gone per round, 10 % "
    "of the output layer's, down to 7 % of the weights, rewound to initialisation. Accuracy on the 10,000 test images. "
    "Baseline: the same masks with new initial weights; random: masks shuffled within each layer."
)


def full(seed: int, progress: Progress, ledger: Ledger) -> Mapping[str, Sample]:
    """The paper's experiment, shortened."""
    rows = ledger.once(f"seed{seed}", lambda: full_rows(seed, progress))
    dense, last = rows[0], rows[-1]["level"]

    def best(network: str) -> float:
        found = [_row(rows, level, network)["accuracy"] for level in (AT_17_PERCENT, last)]
        return float(max(found) - dense["accuracy"])

    ends = [_row(rows, last, network)["accuracy"] for network in ("ticket", "reinit", "shuffled")]
    early = [_row(rows, AT_17_PERCENT, network)["accuracy@500"] for network in ("ticket", "reinit", "shuffled")]
    return {
        "best": Sample(*map(best, ("ticket", "reinit", "shuffled"))),
        "last": Sample(*(value - ends[1] for value in ends)),
        "early": Sample(*(value - dense["accuracy@500"] for value in early)),
    }


def full_rows(seed: int, progress: Progress) -> list[dict[str, Any]]:
    """Every training under one seed."""
    data = _mnist()
    fit = Fitting(
        data.calibration,
        FULL_RECIPE,
        lambda model: {"accuracy": 100 * accuracy(model, data.evaluation, 1000).value},
        seed=seed,
        also_at=(500,),
        progress=progress,
    )
    found = api.study(
        lambda: mlp(LENET),
        fit,
        "lottery",
        sparsity=0.93,
        seed=seed,
        controls=("reinit", "shuffled"),
        control_levels=(AT_17_PERCENT,),
    )
    return found.rows


@cache
def _mnist() -> Splits:
    """All 60,000 and 10,000 images."""
    return open_file(str(folder_of("SECATEUR_DATA", "mnist")))


check = Check(CLAIMS, run, FullCheck(FULL_CLAIMS, full, CONDITIONS))
