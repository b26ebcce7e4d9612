"""What the checks of training methods share: a recipe on the digits, plain or with a method acting during it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from secateur import api
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent, track
from secateur.data.running import training
from secateur.lab.checks._digits import digits
from secateur.measure import accuracy
from secateur.train.loop import Fitting, Recipe


def accuracy_of(model: nn.Module) -> float:
    """Percent right on the evaluation digits."""
    return 100 * accuracy(model, digits().evaluation).value


def fitting(recipe: Recipe, seed: int, also_at: Sequence[int] = (), progress: Progress | None = None) -> Fitting:
    """The recipe on the training digits; `accuracy` on the evaluation digits."""
    return Fitting(
        digits().calibration,
        recipe,
        lambda model: {"accuracy": accuracy_of(model)},
        seed=seed,
        also_at=also_at,
        progress=progress,
    )


def sparse_trained(
    model: nn.Module,
    fit: Fitting,
    method: str,
    sparsity: float | None,
    progress: Progress | None = None,
    **settings: Any,
) -> Plan:
    """Train the model in place by the whole recipe of `fit` with a method acting; what stays in the end.

    Without a sparsity the settings hold a `budget`.
    """
    optimizer = fit.recipe.make_optimizer(model)
    sparsifier = api.sparsify(model, optimizer, method, sparsity, steps=fit.steps, seed=fit.seed, **settings)
    with training(model, fit.seed):
        for step in track(range(fit.steps), progress or Silent(), f"training with {method}"):
            fit.advance(model, optimizer, step, sparsifier.penalty)
    return sparsifier.finish()
