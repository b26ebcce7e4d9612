"""Rewinding's small-scale check: the later the step rewound to, the more stable the ticket.

On the digits every network is accurate enough, so that the mechanism is looked at, not its consequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import nn

from secateur import api
from secateur.core.budget import Budget, Quantity
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent
from secateur.lab.checks._digits import digits
from secateur.lab.checks._training import fitting
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.recover.batchnorm import BatchNormSettings, reestimate
from secateur.recover.recovery import Request
from secateur.train.loop import Recipe

STEPS = (0, 8, 40)  # 0, 2 and 10 % of 400
KEPT = 1801 + 1280  # 14 rounds of 20 % of the three hidden layers, and the output layer whole: 7.3 %

CLAIMS = {
    "step_8": Expectation("distance to dense, k = 8 over k = 0 (learning rate 0.1)", "< 1", "baseline"),
    "step_40": Expectation("distance to dense, k = 40 over k = 8 (learning rate 0.1)", "< 1", "baseline"),
    "falls": Expectation("distance to dense, k = 40 over k = 0 (learning rate 0.1)", "<= 0.65", "both"),
    "to_dense": Expectation(
        "distance to dense over a shuffled mask's, worst k (both learning rates)", "< 0.7", "random"
    ),
    "orders": Expectation("distance of two data orders, k = 40 over k = 0 (learning rate 0.4)", "<= 0.7", "both"),
    "barrier": Expectation(
        "error points on the line between two data orders, worst k, learning rate 0.4", "<= 2", "random"
    ),
}


def network() -> nn.Sequential:
    """64-128-128-128-10 with batch norm and ReLU, Kaiming-normal weights."""
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, 128, 128):
        layers += [_linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(*layers, _linear(128, 10))


def _linear(inputs: int, outputs: int) -> nn.Linear:
    linear = nn.Linear(inputs, outputs)
    nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
    nn.init.zeros_(linear.bias)
    return linear


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Baseline: k = 0 whatever k says; random: shuffled masks."""
    low, high = measured(0.1, seed, progress), measured(0.4, seed, progress)

    def ratio(table: dict[Any, Any], figure: str, later: int, earlier: int) -> Sample:
        def of(name: str) -> float:
            return float(table[name, later][figure] / table[name, earlier][figure])

        return Sample(of("ticket"), 1.0, of("shuffled"))

    worst = max(
        table["ticket", k]["distance_to_dense"] / table["shuffled", k]["distance_to_dense"]
        for table in (low, high)
        for k in STEPS
    )
    heights = {name: max(high[name, k]["barrier_of_orders"] for k in STEPS) for name in ("ticket", "shuffled")}
    return {
        "step_8": ratio(low, "distance_to_dense", 8, 0),
        "step_40": ratio(low, "distance_to_dense", 40, 8),
        "falls": ratio(low, "distance_to_dense", 40, 0),
        "to_dense": Sample(worst, worst, 1.0),
        "orders": ratio(high, "distance_of_orders", 40, 0),
        "barrier": Sample(heights["ticket"], high["ticket", 0]["barrier_of_orders"], heights["shuffled"]),
    }


def measured(lr: float, seed: int, progress: Progress) -> dict[tuple[str, int], dict[str, Any]]:
    """(network, k) -> its row with distances."""
    recipe = Recipe(steps=400, batch=64, lr=lr, weight_decay=1e-4, decay="steps", milestones=(0.5, 0.75))
    found = api.study(
        network,
        fitting(recipe, seed, progress=progress),
        "rewinding",
        budget=Budget(KEPT, Quantity.UNITS),
        seed=seed,
        scan=STEPS,
        stability=True,
        extras={"reestimate": partial(_statistics, seed=seed)},
    )
    return {(row["network"], row["k"]): row for row in found.rows if "distance_to_dense" in row}


def _statistics(model: nn.Module, seed: int) -> None:
    """Batch-norm statistics over all training digits."""
    reestimate(Request(model, Plan({}, {}), digits().calibration, seed, Silent()), BatchNormSettings(batches=21))


check = Check(CLAIMS, run)
