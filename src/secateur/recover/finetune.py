"""Plain fine-tuning with the masks kept: the baseline of every recovery."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from secateur.core.method import Settings
from secateur.recover.recovery import Recovery, Request
from secateur.train.keep import weight_masks
from secateur.train.loop import Fitting, Recipe


class OptimizerName(StrEnum):
    """Which optimiser: SGD with Nesterov momentum, or AdamW."""

    SGD = "sgd"
    ADAMW = "adamw"


class FinetuneSettings(Settings):
    """Defaults suit a small network; the learning rate falls to zero along a cosine."""

    steps: int = Field(300, ge=1, description="optimiser steps")
    lr: float = Field(1e-3, gt=0, description="peak learning rate (1e-3 for adamw, 0.05 for sgd)")
    batch: int = Field(64, ge=1, description="samples per step")
    optimizer: OptimizerName = Field(OptimizerName.ADAMW, description="adamw or sgd (momentum 0.9, Nesterov)")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, L2 for sgd")
    warmup: float = Field(0.05, ge=0, lt=1, description="fraction of the steps with rising learning rate")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")


def recipe_of(settings: FinetuneSettings) -> Recipe:
    """The settings as a recipe."""
    return Recipe(**settings.model_dump(mode="json"), nesterov=True)


def finetune(request: Request, settings: FinetuneSettings) -> dict[str, float]:
    """Train all parameters for some steps; removed weights and their optimiser states stay zero.

    Raises:
        NumericsError: the loss became NaN or infinite; gives the step.
    """
    fit = Fitting(request.data, recipe_of(settings), seed=request.seed, progress=request.progress, stage="fine-tuning")
    found = fit(request.model, weight_masks(request.plan))
    return {"steps": float(settings.steps), "first_loss": found["first_loss"], "last_loss": found["train_loss"]}


recovery = Recovery(
    name="finetune",
    title="train all parameters under the masks; expect most of the loss back at moderate sparsity",
    settings=FinetuneSettings,
    run=finetune,
)
