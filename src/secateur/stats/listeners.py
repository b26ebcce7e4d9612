"""Statistics of a layer's input, updated batch by batch in float32.

All count samples (sequences, images), not tokens: N of the papers. Layers that read the same tensor
share one statistic. Letters: T tokens, I input features.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from secateur.core.errors import NumericsError

CHUNK = 2**20  # elements squared at a time: a few MiB that stay in the cache, yet worth a parallel loop


class Statistic(Protocol):
    """Something that is updated with a layer's inputs."""

    samples: int

    def update(self, inputs: Tensor, samples: int) -> None:
        """Take in `inputs` `[T, I]` that belong to `samples` new samples."""

    def check(self, name: str) -> None:
        """Refuse NaN and infinity; the message names the layer."""


def _require_finite(value: Tensor, name: str) -> None:
    if not torch.isfinite(value).all():
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
        total = self.samples + samples
        self.value *= self.samples / total
        for part in torch.split(inputs, max(1, CHUNK // inputs.shape[1])):
            self.value += part.float().square().sum(0) / total
        self.samples = total

    def check(self, name: str) -> None:
        """Refuse NaN and infinity."""
        _require_finite(self.value, name)


class Hessian:
    """H = (2/N) * sum over samples of X X^T, `[I, I]` float32: the layer's least-squares Hessian.

    Its diagonal is twice `SecondMoment`. SparseGPT's statistic.
    """

    def __init__(self, features: int):
        self.value = torch.zeros(features, features)
        self.samples = 0

    def update(self, inputs: Tensor, samples: int) -> None:
        """Running mean over samples."""
        self.value = self.value.to(inputs.device)
        total = self.samples + samples
        inputs = inputs.float()
        self.value.addmm_(inputs.t(), inputs, beta=self.samples / total, alpha=2 / total)
        self.samples = total

    def check(self, name: str) -> None:
        """Refuse NaN and infinity."""
        _require_finite(self.value, name)


class FeatureMean:
    """Mean of each input feature over all tokens, `[I]`: what a removed feature is replaced by."""

    def __init__(self, features: int):
        self.value = torch.zeros(features)
        self.samples = 0
        self.tokens = 0

    def update(self, inputs: Tensor, samples: int) -> None:
        """Running mean over tokens."""
        self.value = self.value.to(inputs.device)
        self.tokens += inputs.shape[0]
        self.samples += samples
        if len(inputs):
            self.value += (inputs.float() - self.value).sum(0) / self.tokens

    def check(self, name: str) -> None:
        """Refuse NaN and infinity."""
        _require_finite(self.value, name)
