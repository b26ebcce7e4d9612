"""Taylor terms of single weights, and how those of a row or column become one number (Ma et al. 2023)."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from enum import StrEnum

import torch
from torch import Tensor, nn

from secateur.core.method import Batch
from secateur.core.progress import Progress
from secateur.data.batches import split_batch
from secateur.scores.groups import Vector
from secateur.stats.gradients import weight_gradients


class Salience(StrEnum):
    """Which terms of the Taylor expansion count."""

    FIRST = "param_first"
    SECOND = "param_second"
    MIX = "param_mix"


class Reduce(StrEnum):
    """Whether signs inside a row may cancel."""

    ELEMENT = "element"
    VECTORIZE = "vectorize"


def weight_saliences(
    model: nn.Module, batches: Sequence[Batch], names: Sequence[str], salience: Salience, progress: Progress
) -> dict[str, Tensor]:
    """For every weight w g, w^2 a or w g - w^2 a / 2, with signs, float32, in the parameters' shapes.

    g is the gradient of the mean loss of all samples, a the mean over samples of the squared gradient of each.

    Raises:
        NumericsError: a gradient is NaN or infinite; names the layer.
        DataError: the batches carry no labels and are not text.
    """
    tensors = dict(model.named_parameters())
    weights = {name: tensors[name].detach().float() for name in names}
    second = {}
    if salience is not Salience.FIRST:
        squares = mean_squares(model, batches, names, progress)
        second = {name: weights[name].square() * squares[name] for name in names}
        if salience is Salience.SECOND:
            return second
    gradients = weight_gradients(model, batches, names, progress)
    first = {name: weights[name] * gradients[name] for name in names}
    return {name: first[name] - 0.5 * second[name] for name in names} if second else first


def mean_squares(
    model: nn.Module, batches: Sequence[Batch], names: Sequence[str], progress: Progress
) -> dict[str, Tensor]:
    """The mean over samples of each sample's squared gradient, one tensor per parameter name."""
    samples = [one for batch in batches for one in split_batch(batch)]
    sums: dict[str, Tensor] = {}
    for one in samples:
        found = weight_gradients(model, [one], names, progress)
        for name, gradient in found.items():
            square = gradient.square_() / len(samples)
            sums[name] = sums[name].add_(square) if name in sums else square
    return sums


def along(terms: Mapping[str, Tensor], places: Collection[tuple[str, int]], reduce: Reduce) -> Vector:
    """One number per index of the given (parameter, dimension) pairs: sums of absolute terms, or absolute sums."""

    def vector(name: str, dim: int) -> Tensor | None:
        if (name, dim) not in places:
            return None
        others = [d for d in range(terms[name].dim()) if d != dim]
        values = terms[name].abs() if reduce is Reduce.ELEMENT else terms[name]
        sums = values.sum(others) if others else values
        return torch.abs(sums)

    return vector
