"""A whole training with a sparsifier at work, for procedures and checks that compare such trainings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import nn

from secateur.core.errors import SettingsError
from secateur.core.progress import track
from secateur.data.running import training
from secateur.train.loop import Fitting
from secateur.train.sparsifier import Sparsifier
from secateur.train.study import Study

Attach = Callable[[nn.Module, torch.optim.Optimizer], Sparsifier]


class SparseFit(Protocol):
    """The caller's training of a model under a sparsifier.

    Calls `sparsifier = attach(model, optimizer)` before its loop, trains all steps with that optimiser, calls
    `sparsifier.finish()`, and returns figures like `Fit`.
    """

    def __call__(self, model: nn.Module, attach: Attach) -> Mapping[str, float]:
        """Train and evaluate."""


def fit_sparsely(fitting: Fitting, model: nn.Module, attach: Attach) -> dict[str, float]:
    """The whole recipe of a `Fitting` with a sparsifier attached; the same batches and rates as without.

    Raises:
        NumericsError: the loss became NaN or infinite; gives the step.
        BudgetError: the sparsifier did not reach its target.
    """
    optimizer = fitting.recipe.make_optimizer(model)
    found: dict[str, float] = {}
    with training(model, fitting.seed), attach(model, optimizer) as sparsifier:
        for step in track(range(fitting.steps), fitting.progress, "training"):
            fitting.advance(model, optimizer, step, sparsifier.penalty)
            if step + 1 in fitting.also_at:
                found |= {f"{name}@{step + 1}": value for name, value in fitting.figures(model).items()}
        sparsifier.finish()
    return found | fitting.figures(model)


def sparse_fit_of(study: Study, method: str) -> SparseFit:
    """`sparse_fit` of the study's extras, or the loop of its `Fitting`.

    Raises:
        SettingsError: the study's `fit` is the caller's own and there is no `sparse_fit`.
    """
    given = study.extras.get("sparse_fit")
    if given is not None:
        found: SparseFit = given
        return found
    fitting = study.fit
    if not isinstance(fitting, Fitting):
        raise SettingsError(
            f"{method} prunes while your fit trains: give extras={{'sparse_fit': ...}}, a function (model, attach) "
            "that calls attach(model, optimizer) before its loop and finish() on the result after it"
        )
    return lambda model, attach: fit_sparsely(fitting, model, attach)
