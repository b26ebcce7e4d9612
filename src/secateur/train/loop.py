"""A plain training loop whose every step depends on the step's number only: recipe, data order, learning rate.

So training from step a to step b is the same whether it starts there or comes from before, which is what
rewinding, resuming and comparing under one data order need.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Any, Protocol

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.errors import NumericsError, SettingsError
from secateur.core.method import Batch, Settings
from secateur.core.progress import Progress, Silent, track
from secateur.core.seeding import generator
from secateur.data.batches import forward, label_loss, task_loss
from secateur.data.dataset import Dataset
from secateur.data.running import device_of, evaluating, training
from secateur.train.keep import MaskKeeper
from secateur.train.schedules import warm_stable_decay


class OptimizerName(StrEnum):
    """Which optimiser."""

    SGD = "sgd"
    ADAM = "adam"
    ADAMW = "adamw"


class Decay(StrEnum):
    """How the learning rate falls."""

    CONSTANT = "constant"
    COSINE = "cosine"  # to `last` times the peak at the end
    STEPS = "steps"  # times `factor` at every milestone
    WSD = "wsd"  # constant, and straight down to `last` times the peak in the last `cooldown` of the training


class Recipe(Settings):
    """How to train. Milestones and warm-up are shares of the steps, so a recipe stretches."""

    steps: int = Field(1000, ge=1, description="optimiser steps of the whole training")
    batch: int = Field(64, ge=1, description="samples per step")
    optimizer: OptimizerName = Field(OptimizerName.SGD, description="sgd, adam or adamw")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    momentum: float = Field(0.9, ge=0, lt=1, description="of sgd")
    nesterov: bool = Field(False, description="Nesterov momentum, of sgd")
    betas: tuple[float, float] = Field((0.9, 0.999), description="of adam and adamw")
    weight_decay: float = Field(0.0, ge=0, description="decoupled for adamw, L2 otherwise")
    decay: Decay = Field(Decay.COSINE, description="constant, cosine, steps or wsd (warm-up, stable, decay)")
    milestones: tuple[float, ...] = Field(
        (0.5, 0.75), description="shares of the training where the rate drops (steps)"
    )
    factor: float = Field(0.1, gt=0, description="by which the rate drops at a milestone")
    last: float = Field(0.0, ge=0, le=1, description="share of the peak rate that a cosine or wsd ends at")
    cooldown: float = Field(0.1, ge=0, le=1, description="share of the training with falling rate, of wsd")
    warmup: float = Field(0.0, ge=0, lt=1, description="share of the training with linearly rising rate")
    clip: float | None = Field(None, gt=0, description="largest gradient norm; none by default")
    smoothing: float = Field(0.0, ge=0, lt=1, description="label smoothing")

    def rate(self, step: int) -> float:
        """Learning rate of the step after `step` steps are done (so 0 is the first)."""
        risen = round(self.warmup * self.steps)
        if step < risen:
            return self.lr * (step + 1) / risen
        if self.decay is Decay.CONSTANT:
            return self.lr
        if self.decay is Decay.WSD:
            return self.lr * warm_stable_decay(step, self.steps, self.warmup, self.cooldown, self.last)
        if self.decay is Decay.STEPS:
            return self.lr * self.factor ** sum(step >= round(share * self.steps) for share in self.milestones)
        done = (step - risen) / max(1, self.steps - risen)
        return self.lr * (self.last + (1 - self.last) * 0.5 * (1 + math.cos(math.pi * done)))

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimiser over all parameters that want gradients."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        if self.optimizer is OptimizerName.SGD:
            return torch.optim.SGD(
                parameters, self.lr, self.momentum, nesterov=self.nesterov, weight_decay=self.weight_decay
            )
        kind = torch.optim.Adam if self.optimizer is OptimizerName.ADAM else torch.optim.AdamW
        return kind(parameters, self.lr, betas=self.betas, weight_decay=self.weight_decay)


Augment = Callable[[Tensor, torch.Generator], Tensor]
Evaluate = Callable[[nn.Module], Mapping[str, float]]


class Stream:
    """Batches by step number: every epoch in its own order, drawn from the seed; no state to save.

    Args:
        data: the samples.
        size: samples per batch; the last incomplete batch of an epoch is left out.
        seed: of the order and of the augmentation.
        augment: inputs and a generator -> inputs; gets the same generator at the same step.
    """

    def __init__(self, data: Dataset, size: int, seed: int, augment: Augment | None = None):
        self.data, self.size, self.seed, self.augment = data, min(size, len(data)), seed, augment
        self.per_epoch = len(data) // self.size
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))

    def at(self, step: int) -> Batch:
        """The batch of the step after `step` steps are done."""
        epoch, place = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            rng = generator(self.seed, "order", str(epoch))
            self._order = (epoch, torch.randperm(len(self.data), generator=rng))
        chosen = self._order[1][place * self.size : (place + 1) * self.size]
        (batch,) = self.data.take(chosen).batches(self.size)
        if self.augment is None:
            return batch
        inputs = self.augment(batch.args[0], generator(self.seed, "augment", str(step)))
        return Batch((inputs, *batch.args[1:]), batch.kwargs, batch.target, batch.targets)


class Fit(Protocol):
    """The caller's training: `fit(model, masks, start, stop) -> metrics`.

    Trains the model in place from optimiser step `start` to `stop` of its recipe, with learning rate and data
    as they are at `start` and a fresh optimiser, keeping what the masks (name -> bool, True = keep) remove at
    exactly zero; `Fitting` is one for data in memory. Returns figures such as `accuracy`, higher = better unless the
    name says loss.
    """

    def __call__(self, model: nn.Module, masks: Mapping[str, Tensor], start: int, stop: int) -> Mapping[str, float]:
        """Train and evaluate."""


class Fitting:
    """`fit(model, masks, start, stop)` on data in memory.

    Args:
        data: training samples.
        recipe: how to train.
        evaluate: model in eval mode -> figures; by default only the training loss is known.
        seed: of data order and augmentation.
        augment: as for `Stream`.
        also_at: steps after which figures are taken as well, reported as `accuracy@100`.
        progress: where to report.
        stage: name of the work there and in errors.
    """

    def __init__(
        self,
        data: Dataset,
        recipe: Recipe,
        evaluate: Evaluate | None = None,
        *,
        seed: int = 0,
        augment: Augment | None = None,
        also_at: Sequence[int] = (),
        progress: Progress | None = None,
        stage: str = "training",
    ):
        self.data, self.recipe, self.evaluate, self.seed, self.stage = data, recipe, evaluate, seed, stage
        self.augment, self.also_at, self.progress = augment, tuple(also_at), progress or Silent()
        self.stream = Stream(data, recipe.batch, seed, augment)

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole recipe."""
        return self.recipe.steps

    @property
    def known_by(self) -> dict[str, Any]:
        """What a training depends on, as plain data, augmentation and evaluation aside; see `secateur.study`."""
        own = {"data_order": self.seed, "also_at": list(self.also_at)}
        return {"recipe": self.recipe.model_dump(mode="json"), "training_data": self.data.digest, **own}

    def reordered(self, seed: int) -> Fitting:
        """The same training with another order of the data."""
        return Fitting(
            self.data,
            self.recipe,
            self.evaluate,
            seed=seed,
            augment=self.augment,
            also_at=self.also_at,
            progress=self.progress,
            stage=self.stage,
        )

    def __call__(
        self, model: nn.Module, masks: Mapping[str, Tensor] | None = None, start: int = 0, stop: int | None = None
    ) -> dict[str, float]:
        """Train from `start` to `stop` with a fresh optimiser; see `Fit`.

        Raises:
            SettingsError: the steps lie outside of the recipe.
            NumericsError: the loss became NaN or infinite; gives the step.
        """
        stop = self.steps if stop is None else stop
        if not 0 <= start <= stop <= self.steps:
            raise SettingsError(f"cannot train from step {start} to {stop} of a recipe of {self.steps} steps")
        optimizer = self.recipe.make_optimizer(model)
        losses: list[float] = []
        found: dict[str, float] = {}
        with training(model, self.seed), MaskKeeper(model, masks or {}, optimizer):
            for step in track(range(start, stop), self.progress, self.stage):
                losses += [self.advance(model, optimizer, step)]
                if step + 1 in self.also_at:
                    found |= {f"{name}@{step + 1}": value for name, value in self.figures(model).items()}
        tail = losses[-max(1, len(losses) // 10) :]
        found |= {"first_loss": losses[0], "train_loss": sum(tail) / len(tail)} if tail else {}
        return found | self.figures(model)

    def figures(self, model: nn.Module) -> dict[str, float]:
        """What `evaluate` says of the model as it is now."""
        if self.evaluate is None:
            return {}
        with evaluating(model):
            return dict(self.evaluate(model))

    def advance(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        step: int,
        penalty: Callable[[], Tensor] | None = None,
    ) -> float:
        """One optimiser step, number `step` of the recipe; the loss before it.

        Raises:
            NumericsError: the loss is NaN or infinite.
        """
        for group in optimizer.param_groups:
            group["lr"] = self.recipe.rate(step) * group.get("lr_scale", 1.0)
        # the same after a resume; on a CPU without queueing calls for devices that are never used
        seed = torch.default_generator.manual_seed if device_of(model).type == "cpu" else torch.manual_seed
        seed(generator(self.seed, "dropout", str(step)).initial_seed())
        optimizer.zero_grad()
        loss = self.loss(model, self.stream.at(step).to(device_of(model)))
        if penalty is not None:
            loss = loss + penalty()
        if not torch.isfinite(loss):
            raise NumericsError(f"the loss is {loss.item()} at {self.stage} step {step}; lower lr")
        torch.autograd.backward(loss)
        if self.recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), self.recipe.clip)
        optimizer.step()
        return loss.item()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Cross entropy with the recipe's label smoothing, or the next token's."""
        if batch.target is None or not self.recipe.smoothing:
            return task_loss(model, batch)
        return label_loss(forward(model, batch), batch.target, self.recipe.smoothing)
