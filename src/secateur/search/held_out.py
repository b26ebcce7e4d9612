"""Figures of merit on two parts of the samples: one that a search sees, one that only tells what it came to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.batches import joined, loss_of, split_batch, taken
from secateur.data.running import logits


class Fitness(StrEnum):
    """What candidates are judged by; larger is better."""

    LOSS = "loss"  # minus the mean loss, of the next tokens or of the labels
    ACCURACY = "accuracy"  # share of right answers; the data needs labels


@dataclass(frozen=True)
class Measured:
    """A figure of merit on some samples."""

    batches: Sequence[Batch]
    fitness: Fitness

    def __call__(self, model: nn.Module) -> float:
        """Mean over the samples.

        Raises:
            DataError: the data has no labels and they are needed.
        """
        total = sum(self._of(logits(model, batch), batch) * batch.samples for batch in self.batches)
        return total / sum(batch.samples for batch in self.batches)

    def _of(self, out: Tensor, batch: Batch) -> float:
        moved = batch.to(out.device)
        if self.fitness is Fitness.LOSS:
            return -float(loss_of(out, moved))
        if moved.target is None:
            raise DataError("fitness=accuracy needs data with labels; use fitness=loss for text")
        return float((out.argmax(-1) == moved.target).double().mean())


def halves(batches: Sequence[Batch], share: float, fitness: Fitness, rng: torch.Generator) -> tuple[Measured, Measured]:
    """The figure on `share` of the samples, drawn by `rng`, and on all the others.

    Raises:
        DataError: fewer than two samples.
    """
    everything = joined(batches)
    if everything.samples < 2:
        raise DataError("a search needs samples to search on and others to report on; give two samples at least")
    order = torch.randperm(everything.samples, generator=rng)
    own = min(max(1, round(share * len(order))), len(order) - 1)
    parts = (taken(everything, part.sort()[0]) for part in (order[:own], order[own:]))
    first, second = (Measured(split_batch(part, batches[0].samples), fitness) for part in parts)
    return first, second
