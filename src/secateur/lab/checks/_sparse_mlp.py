"""What the checks of sparse training share: one MLP on the digits, trained from scratch by one recipe."""

from __future__ import annotations

from typing import Any

from torch import nn

from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import seeded
from secateur.lab.checks._digits import mlp
from secateur.lab.checks._training import accuracy_of, fitting, sparse_trained
from secateur.train.loop import Decay, Recipe

WIDTHS = (64, 300, 100, 10)
STEPS, EVERY = 600, 20
RECIPE = Recipe(steps=STEPS, batch=64, lr=0.1, momentum=0.9, weight_decay=5e-4)
DROPS = RECIPE.model_copy(update={"decay": Decay.STEPS})


def fresh() -> nn.Sequential:
    """The untrained network; the caller seeds torch."""
    return mlp(WIDTHS)


def trained(seed: int, sparsity: float, method: str, progress: Progress, **settings: Any) -> tuple[float, Plan]:
    """Accuracy in percent after the whole training, and what stays; events every 20 steps where there are any."""
    with seeded(seed):
        model = fresh()
    if method != "static":
        settings = {"every": EVERY, **settings}
    plan = sparse_trained(model, fitting(RECIPE, seed), method, sparsity, progress, **settings)
    return accuracy_of(model.eval()), plan


def points(seed: int, sparsity: float, method: str, progress: Progress, **settings: Any) -> float:
    """Accuracy alone."""
    return trained(seed, sparsity, method, progress, **settings)[0]


def miscount(plan: Plan, sparsity: float) -> int:
    """By how many weights a plan misses the asked count."""
    kept, total = plan.units()
    return abs(kept - (total - int(sparsity * total + 1e-9)))
