"""Plain fine-tuning with the masks kept: the baseline of every recovery."""

from __future__ import annotations

import math
from collections.abc import Iterator
from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.core.errors import NumericsError
from secateur.core.method import Batch, Settings
from secateur.core.progress import track
from secateur.core.seeding import generator
from secateur.data.batches import task_loss
from secateur.data.dataset import Dataset
from secateur.data.running import device_of, training
from secateur.recover.recovery import Recovery, Request
from secateur.train.keep import MaskKeeper


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


def finetune(request: Request, settings: FinetuneSettings) -> dict[str, float]:
    """Train all parameters for some steps; removed weights and their optimiser states stay zero.

    Raises:
        NumericsError: the loss became NaN or infinite; gives the step.
    """
    model = request.model
    optimizer = _optimizer(model, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: factor(step / settings.steps, settings.warmup))
    losses: list[float] = []
    with training(model, request.seed), MaskKeeper(model, request.plan, optimizer):
        stream = _stream(request.data, settings.batch, generator(request.seed, "finetune"))
        for step in track(range(settings.steps), request.progress, "fine-tuning"):
            loss = task_loss(model, next(stream).to(device_of(model)))
            if not torch.isfinite(loss):
                raise NumericsError(f"the loss is {loss.item()} at fine-tuning step {step}; lower lr")
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    tail = losses[-max(1, len(losses) // 10) :]
    return {"steps": float(settings.steps), "first_loss": losses[0], "last_loss": sum(tail) / len(tail)}


def factor(progress: float, warmup: float) -> float:
    """Learning-rate factor at `progress` in [0, 1): linear rise, then a cosine to zero."""
    if progress < warmup:
        return min(1.0, (progress + 1e-3) / warmup)
    return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))


def _optimizer(model: torch.nn.Module, settings: FinetuneSettings) -> torch.optim.Optimizer:
    if settings.optimizer is OptimizerName.SGD:
        return torch.optim.SGD(
            model.parameters(), settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
    return torch.optim.AdamW(model.parameters(), settings.lr, weight_decay=settings.weight_decay)


def _stream(data: Dataset, size: int, rng: torch.Generator) -> Iterator[Batch]:
    """Endless batches; every epoch in a new order."""
    size = min(size, len(data))
    while True:
        order: Tensor = torch.randperm(len(data), generator=rng)
        for chunk in torch.split(order, size)[: len(data) // size]:
            yield next(data.take(chunk).batches(size))


recovery = Recovery(
    name="finetune",
    title="train all parameters under the masks; expect most of the loss back at moderate sparsity",
    settings=FinetuneSettings,
    run=finetune,
)
