"""Statistics of a layer's input, updated batch by batch in float32.

All count samples (sequences, images), not tokens: N of the papers. Layers that read the same tensor
share one statistic. Letters: T tokens, I input features.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from secateur.core.distributed import several, total, total_count
from secateur.core.errors import NumericsError
from secateur.core.select import all_finite

PANEL = 256  # rows of a Hessian computed together
CHUNK = 2**20  # elements squared at a time: a few MiB that stay in the cache, yet worth a parallel loop


class Statistic(Protocol):
    """Something that is updated with a layer's inputs."""

    samples: int

    def update(self, inputs: Tensor, samples: int) -> None:
        """Take in `inputs` `[T, I]` that belong to `samples` new samples."""

    def reduce(self) -> None:
        """Take in what the other processes of the job saw of their share of the data."""

    def check(self, name: str) -> None:
        """Refuse NaN and infinity; the message names the layer."""


def _require_finite(value: Tensor, name: str) -> None:
    if not all_finite(value):
        raise NumericsError(
            f"the calibration activations that enter layer '{name}' contain NaN or infinity; "
            "check the data and the layers before it"
        )


class SecondMoment:
    """r_j = (1/N) * sum over samples and tokens of x_tj^2, `[I]`: Wanda's statistic."""

    def __init__(self, features: int):
        self.value = torch.zeros(features)
        self.samples = 0

    def update(self, inputs: Tensor, samples: int) -> None:
        """Running mean over samples, one pass, no overflow in half precision."""
        self.value = self.value.to(inputs.device)
        count = self.samples + samples
        self.value *= self.samples / count
        for part in torch.split(inputs, max(1, CHUNK // inputs.shape[1])):
            self.value += part.float().square().sum(0) / count
        self.samples = count

    def reduce(self) -> None:
        """The mean over the samples of all processes."""
        _reduce_mean(self)

    def check(self, name: str) -> None:
        """Refuse NaN and infinity."""
        _require_finite(self.value, name)


class Hessian:
    """H = (2/N) * sum over samples of X X^T, `[I, I]` float32: the layer's least-squares Hessian.

    Its diagonal is twice `SecondMoment`. SparseGPT's statistic.
    """

    def __init__(self, features: int):
        self._rows = torch.zeros(features, features)  # from the diagonal on; the rest mirrors it
        self._whole = True
        self.samples = 0

    @property
    def value(self) -> Tensor:
        """The matrix, symmetric."""
        if not self._whole:
            for start in range(0, len(self._rows), PANEL):
                end = start + PANEL
                self._rows[end:, start:end] = self._rows[start:end, end:].t()
            self._whole = True
        return self._rows

    @value.setter
    def value(self, found: Tensor) -> None:
        self._rows, self._whole = found, True

    def update(self, inputs: Tensor, samples: int) -> None:
        """Running mean over samples."""
        self._rows = self._rows.to(inputs.device)
        count = self.samples + samples
        inputs = inputs.float()
        for start in range(0, inputs.shape[1], PANEL):
            rows = self._rows[start : start + PANEL, start:]
            left = inputs[:, start : start + PANEL].t()
            rows.addmm_(left, inputs[:, start:], beta=self.samples / count, alpha=2 / count)
        self.samples, self._whole = count, False

    def reduce(self) -> None:
        """The mean over the samples of all processes."""
        _reduce_mean(self)

    def check(self, name: str) -> None:
        """Refuse NaN and infinity."""
        _require_finite(self.value, name)


class TokenMoments:
    """Mean and sum of squared deviations of each input feature over all tokens, `[I]` each, float64 sums.

    Batches are joined by Chan's formula, which is exact for any split of the data.
    """

    def __init__(self, features: int):
        self.mean = torch.zeros(features, dtype=torch.float64)
        self.deviations = torch.zeros(features, dtype=torch.float64)
        self.samples = 0
        self.tokens = 0

    @property
    def variance(self) -> Tensor:
        """Unbiased variance over tokens, `[I]` float32; 0 for a single token."""
        return (self.deviations / max(1, self.tokens - 1)).float()

    def update(self, inputs: Tensor, samples: int) -> None:
        """Take in a batch."""
        self.samples += samples
        if not len(inputs):
            return
        x = inputs.float()
        mean = x.mean(0, dtype=torch.float64)
        self._join(len(x), mean, (x - mean.float()).square().sum(0, dtype=torch.float64))

    def _join(self, tokens: int, mean: Tensor, deviations: Tensor) -> None:
        self.mean, self.deviations = self.mean.to(mean.device), self.deviations.to(mean.device)
        count = self.tokens + tokens
        shift = mean - self.mean
        self.mean = self.mean + shift * (tokens / count)
        self.deviations = self.deviations + deviations + shift.square() * (self.tokens * tokens / count)
        self.tokens = count

    def reduce(self) -> None:
        """Mean and deviations over the tokens of all processes."""
        if several():
            own, tokens = self.mean, self.tokens
            self.tokens, self.samples = total_count(tokens), total_count(self.samples)
            self.mean = total(own * tokens) / max(1, self.tokens)
            self.deviations = total(self.deviations + tokens * (own - self.mean).square())

    def check(self, name: str) -> None:
        """Refuse NaN and infinity."""
        _require_finite(self.mean + self.deviations, name)


class AbsoluteMean:
    """Mean over samples of each sample's mean absolute value per feature, `[I]`: every sample weighs the same."""

    def __init__(self, features: int):
        self.value = torch.zeros(features)
        self.samples = 0

    def update(self, inputs: Tensor, samples: int) -> None:
        """Running mean over samples of one length."""
        count = self.samples + samples
        self.value = self.value.to(inputs.device) * (self.samples / count)
        if len(inputs):
            self.value += inputs.float().abs().view(samples, -1, inputs.shape[1]).mean(1).sum(0) / count
        self.samples = count

    def reduce(self) -> None:
        """The mean over the samples of all processes."""
        _reduce_mean(self)

    def check(self, name: str) -> None:
        """Refuse NaN and infinity."""
        _require_finite(self.value, name)


def _reduce_mean(stat: SecondMoment | Hessian | AbsoluteMean) -> None:
    if several():
        own = stat.samples
        stat.samples = total_count(own)
        stat.value = total(stat.value * own) / max(1, stat.samples)
