"""ResNet-20 on CIFAR-10 at 90 and 95 %: one start, one subset, as many epochs and one optimiser for every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import api
from secateur.core.budget import Budget
from secateur.core.method import Protocol
from secateur.core.progress import Progress
from secateur.data.dataset import Splits
from secateur.data.files import open_file
from secateur.lab.checks._training import sparse_trained
from secateur.lab.cifar import resnet20
from secateur.lab.reproduce import Expectation, FullCheck, Sample, folder_of
from secateur.measure import accuracy
from secateur.shrink.apply import apply_
from secateur.train.keep import weight_masks
from secateur.train.loop import Fitting, Recipe
from secateur.train.study import Ledger

LEVELS = (90, 95)
READ, SUBSET, EPOCHS, BATCH, CALIBRATION = 10_000, 4096, 8, 128, 128
RECIPE = Recipe(steps=EPOCHS * (SUBSET // BATCH), batch=BATCH, lr=0.05, weight_decay=5e-4)
PIXELS = "mean=0.485,0.456,0.406&std=0.229,0.224,0.225"
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "random": {"spread": "erk"},
    "granet": {"every": 8},
    "rd": {"resolution": 30, "batch": 128},
}
CONDITIONS = (
    f"Pretrained ResNet-20, CIFAR-10. Every method gets the same {SUBSET:,} training images for {EPOCHS} epochs "
    f"({RECIPE.steps} batches of {BATCH}; crops and mirror images): SGD {RECIPE.lr:g}, momentum {RECIPE.momentum:g}, "
    f"weight decay {RECIPE.weight_decay:g}, cosine. Accuracy on all 10,000 test images. One-shot methods prune "
    "first and train under their masks, GraNet prunes while training from the dense network, BiP spends every second "
    "batch on its scores. All convolutions and the classifier count. Seeds change the order, the crops, random masks."
)


@cache
def cifar() -> Splits:
    """The subset to train on and all test images.

    Raises:
        DataError: SECATEUR_DATA names no folder with `cifar10`.
    """
    splits = open_file(f"{folder_of('SECATEUR_DATA', 'cifar10')}?limit={READ}&{PIXELS}")
    return Splits(splits.calibration.sample(SUBSET, 0), splits.evaluation)


def crops_and_mirrors(images: Tensor, rng: torch.Generator) -> Tensor:
    """Each image [3, h, w] moved by up to 4 pixels over zeros, and mirrored or not."""
    size = images.shape[-1]
    padded = F.pad(images, (4, 4, 4, 4))
    moves = torch.randint(9, (len(images), 2), generator=rng)
    mirrored = torch.rand(len(images), generator=rng) < 0.5
    rows = moves[:, :1] + torch.arange(size)
    columns = moves[:, 1:] + torch.arange(size)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    place = torch.arange(len(images))[:, None, None]
    return padded.movedim(1, -1)[place, rows[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()


def right(model: nn.Module) -> float:
    """Percent of the test images."""
    return 100 * accuracy(model, cifar().evaluation, 500).value


def fitting(seed: int, progress: Progress) -> Fitting:
    """The common training."""
    return Fitting(cifar().calibration, RECIPE, seed=seed, augment=crops_and_mirrors, progress=progress)


def outcome(method: str, level: int, seed: int, progress: Progress, **settings: Any) -> float:
    """Accuracy in percent of the method at a sparsity of `level` percent after the common training."""
    model, fit, settings = resnet20(), fitting(seed, progress), {**SETTINGS.get(method, {}), **settings}
    if Protocol.PLAN not in api.find_method(method).protocols:
        sparse_trained(model, fit, method, level / 100, progress, **settings)
        return right(model)
    budget = Budget(level / 100, floor=1)
    plan = api.plan(
        model,
        method,
        budget=budget,
        data=cifar().calibration.sample(CALIBRATION, seed),
        seed=seed,
        progress=progress,
        **settings,
    )
    fit(apply_(model, plan), weight_masks(plan))
    return right(model)


def dense(seed: int, progress: Progress) -> float:
    """Accuracy of the dense network after the common training."""
    model = resnet20()
    fitting(seed, progress)(model)
    return right(model)


Runs = Callable[[str, int], float]


def runs_of(seed: int, progress: Progress, ledger: Ledger) -> Runs:
    """What trains a method once and remembers it; `dense` is a method of level 0."""

    def accuracy_of(method: str, level: int) -> float:
        def make() -> float:
            return outcome(method, level, seed, progress) if level else dense(seed, progress)

        return float(ledger.once(f"{method}-{level}-seed{seed}", make))

    return accuracy_of


def comparison(method: str) -> FullCheck:
    """The method's claims beside the dense network, global magnitude (baseline) and random ERK masks (control)."""
    claims = {}
    for level in LEVELS:
        claims[f"under_dense_{level}"] = Expectation(f"accuracy points under the dense network at {level} %", "<= 5")
        claims[f"over_random_{level}"] = Expectation(f"accuracy points over random ERK masks at {level} %", ">= 3")
        claims[f"over_magnitude_{level}"] = Expectation(
            f"accuracy points over one-shot global magnitude at {level} %", "> 0", "both"
        )
    if method == "global_magnitude":
        claims = {name: claim for name, claim in claims.items() if not name.startswith("over_magnitude")}

    def run(seed: int, progress: Progress, ledger: Ledger) -> dict[str, Sample]:
        found = runs_of(seed, progress, ledger)
        samples = {}
        for level in LEVELS:
            rivals = [found(name, level) for name in (method, "global_magnitude", "random")]
            goal = found("dense", 0)
            samples[f"under_dense_{level}"] = Sample(*(goal - value for value in rivals))
            samples[f"over_random_{level}"] = Sample(*(value - rivals[2] for value in rivals))
            samples[f"over_magnitude_{level}"] = Sample(*(value - rivals[1] for value in rivals))
        return {name: samples[name] for name in claims}

    return FullCheck(claims, run, CONDITIONS)


def random_comparison() -> FullCheck:
    """Random masks: ERK densities beside uniform ones (baseline and control), and beside the dense network."""
    claims = {
        f"over_uniform_{level}": Expectation(
            f"accuracy points of random ERK masks over random uniform ones at {level} %", ">= 0.5", "both"
        )
        for level in LEVELS
    }

    def run(seed: int, progress: Progress, ledger: Ledger) -> dict[str, Sample]:
        found = runs_of(seed, progress, ledger)

        def uniform(level: int) -> float:
            return float(
                ledger.once(
                    f"random-uniform-{level}-seed{seed}",
                    lambda: outcome("random", level, seed, progress, spread="uniform"),
                )
            )

        return {f"over_uniform_{level}": Sample(found("random", level) - uniform(level), 0.0, 0.0) for level in LEVELS}

    return FullCheck(claims, run, CONDITIONS)
