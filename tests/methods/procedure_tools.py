"""A tiny data set, net and training for the tests of procedures."""

from __future__ import annotations

import torch
from torch import nn

from secateur.data.dataset import DataKind, Dataset
from secateur.data.running import logits
from secateur.train.loop import Fitting, Recipe


def dataset(samples: int = 60) -> Dataset:
    """Three classes that a small net can tell apart; inputs are not negative."""
    rng = torch.Generator().manual_seed(0)
    targets = torch.arange(samples) % 3
    inputs = torch.rand(samples, 12, generator=rng) + nn.functional.one_hot(targets, 12)
    return Dataset("tiny", DataKind.IMAGE, inputs, targets)


def make() -> nn.Sequential:
    """Two hidden layers and a norm; 12*20 + 20*16 + 16*3 = 608 prunable weights."""
    return nn.Sequential(
        nn.Linear(12, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)
    )


def fitting(seed: int = 0, steps: int = 12) -> Fitting:
    """A few steps; accuracy on the training data."""
    (batch,) = dataset().batches(60)

    def evaluate(model: nn.Module) -> dict[str, float]:
        return {"accuracy": float((logits(model, batch).argmax(1) == batch.target).double().mean())}

    return Fitting(dataset(), Recipe(steps=steps, batch=20, lr=0.1, clip=1.0), evaluate, seed=seed)


class Dying:
    """A fit that is killed in the middle of its n-th call."""

    def __init__(self, at: int, fit: Fitting):
        self.left, self.fit, self.steps, self.known_by = at, fit, fit.steps, fit.known_by

    def __call__(self, model, masks, start, stop):
        self.left -= 1
        if not self.left:
            self.fit(model, masks, start, (start + stop) // 2)
            raise KeyboardInterrupt
        return self.fit(model, masks, start, stop)
