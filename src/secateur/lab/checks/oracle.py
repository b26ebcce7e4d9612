"""The oracle study's small-scale check: the loss after pruning ranks networks until they are retrained.

A LeNet for 8x8 digits is trained; 40 random ways of removing 5 of the 10 filters, of the first and of the second
layer, are retrained for ten epochs. Right after pruning the training loss ranks them nearly as the test loss does,
ten epochs later hardly any more. That this is not noise shows the control: two retrainings of the same candidates,
with other orders of the data, still agree on which are good.

A single candidate decides the anomaly ratio, so it is averaged over both layers. On the test loss it is near zero
before retraining, not zero; on the training loss itself it must be.
"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

import torch
from torch import nn

from secateur import api
from secateur.core.progress import Progress
from secateur.core.seeding import generator, seeded
from secateur.lab.checks._digits import digits
from secateur.lab.checks._training import accuracy_of
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure.quality import mean_loss
from secateur.shrink.subsets import Units
from secateur.train.loop import Fitting, Recipe
from secateur.train.snapshot import model_state
from secateur.train.study import State

BATCH, CANDIDATES, LAYERS = 64, 40, ("0", "3")
EPOCH = 1347 // BATCH
DENSE = Recipe(steps=60 * EPOCH, batch=BATCH, lr=0.05)
RETRAINED = Recipe(steps=10 * EPOCH, batch=BATCH, lr=0.01, decay="constant")

CLAIMS = {
    "itself": Expectation(
        "Kendall's tau of pruned training loss and training loss, no retraining", ">= 0.9999", "both"
    ),
    "before": Expectation("Kendall's tau of pruned training loss and test loss, no retraining", ">= 0.8", "both"),
    "after": Expectation(
        "Kendall's tau of pruned training loss and test loss after 10 epochs (baseline: between two retrainings)",
        "<= 0.35",
        "baseline",
    ),
    "anomaly_itself": Expectation(
        "percent of candidates with less training loss than the oracle's choice, no retraining", "== 0", "random"
    ),
    "anomaly_before": Expectation(
        "percent of candidates with less test loss than the oracle's choice, no retraining", "<= 5", "random"
    ),
    "anomaly_after": Expectation(
        "percent of candidates with less test loss than the oracle's choice after 10 epochs (baseline: before them)",
        "> 15",
        "baseline",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed, averaged over the layers. Baseline: L1 norms; random: a number per candidate."""
    state = dense(seed, progress)
    found = [studied(seed, layer, state, progress) for layer in LAYERS]
    return {
        name: Sample(*(fmean(getattr(one[name], part) for one in found) for part in ("value", "baseline", "random")))
        for name in CLAIMS
    }


def lenet() -> nn.Sequential:
    """LeNet5-Mini for 8x8 images: three convolutions of ten filters, no norms."""
    widths = (1, 10, 10, 10)
    stages = [
        [nn.Conv2d(widths[i], widths[i + 1], kernel, padding=kernel // 3), nn.ReLU()]
        for i, kernel in enumerate((3, 3, 2))
    ]
    pool = nn.MaxPool2d(2)
    head = [nn.Flatten(), nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 10)]
    return nn.Sequential(*stages[0], pool, *stages[1], pool, *stages[2], *head)


def figures(model: nn.Module) -> dict[str, float]:
    """On the evaluation digits, and the loss on the training digits."""
    return {
        "loss": mean_loss(model, digits().evaluation),
        "accuracy": accuracy_of(model),
        "training_loss": mean_loss(model, digits().calibration),
    }


def dense(seed: int, progress: Progress) -> State:
    """The weights of the network that is pruned."""
    with seeded(seed):
        model = lenet()
    Fitting(digits().calibration, DENSE, seed=seed, progress=progress)(model)
    return model_state(model)


def studied(seed: int, layer: str, state: State, progress: Progress) -> dict[str, Sample]:
    """Every claim for one layer."""

    def chance(model: nn.Module, removed: Units) -> float:
        return float(torch.rand((), generator=generator(seed, "chance", str(removed))))

    found = api.study(
        lenet,
        Fitting(digits().calibration, RETRAINED, figures, seed=seed),
        "oracle",
        sparsity=0.5,
        seed=seed,
        include=(f"{layer}.weight",),
        extras={"state": state, "criteria": {"chance": chance}},
        progress=progress,
        candidates=CANDIDATES,
        repeats=2,
        figures=("loss", "training_loss"),
    ).summary
    ranks = {(rank["criterion"], rank["figure"]): rank for rank in found["rankings"]}

    def before(figure: str, what: str, factor: float = 1.0) -> Sample:
        return Sample(*(factor * ranks[name, figure]["before"][what] for name in ("pruned_loss", "l1_norm", "chance")))

    after, again = ranks["pruned_loss", "loss"], found["repeatability"]["loss"]
    at_random = ranks["chance", "loss"]
    return {
        "itself": before("training_loss", "tau"),
        "before": before("loss", "tau"),
        "after": Sample(after["tau"], again["tau"], at_random["tau"]),
        "anomaly_itself": before("training_loss", "anomaly", 100),
        "anomaly_before": before("loss", "anomaly", 100),
        "anomaly_after": Sample(100 * after["anomaly"], 100 * after["before"]["anomaly"], 100 * at_random["anomaly"]),
    }


check = Check(CLAIMS, run)
