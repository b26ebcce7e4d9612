"""Gumbel-sigmoid gates, the binary concrete distribution (Maddison et al. 2017; Jang et al. 2017).

    soft = sigmoid((logits + noise) / temperature)                 hard = 1[soft >= 0.5], straight-through

Two kinds of noise are in use. The binary concrete distribution has logistic noise (two Gumbel draws, median 0):
P(open) = sigmoid(logits). Several published systems (ATP, APTP) draw a single Gumbel, whose median is -log(log 2) =
0.3665: P(open) = 1 - exp(-exp(logits)); a noise-free mask must then be cut at -0.3665 and not at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import log

import torch
from torch import Tensor

from secateur.core.errors import SettingsError
from secateur.gates.binary import through
from secateur.gates.checks import refuse_nan, refuse_shape
from secateur.gates.freeze import Frozen, freeze_above, freeze_top
from secateur.gates.noise import gumbel, logistic


class Noise(StrEnum):
    """What is added to the logits."""

    LOGISTIC = "logistic"
    GUMBEL = "gumbel"


@dataclass(frozen=True)
class GumbelSigmoid:
    """The distribution; logits may be a parameter or the output of a network.

    Attributes:
        temperature: of the sigmoid; lower = closer to 0 and 1.
        noise: logistic (the paper's distribution) or a single Gumbel.
        base: added to all logits; positive = most gates start open (ATP, APTP: 3).

    Raises:
        SettingsError: the temperature is not positive.
    """

    temperature: float = 0.4
    noise: Noise = Noise.LOGISTIC
    base: float = 0.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise SettingsError(f"the temperature of a Gumbel-sigmoid gate is {self.temperature}; it must be above 0")

    def sample(self, logits: Tensor, uniform: Tensor, *, hard: bool = False) -> Tensor:
        """One gate value per entry.

        Args:
            logits: any shape.
            uniform: noise of the same shape in (0, 1), from `NoiseStream.uniform`.
            hard: exact 0 and 1 forward, the gradient of the soft value backward.

        Raises:
            ModelError: the noise has another shape.
            NumericsError: the logits contain NaN.
        """
        logits = refuse_nan(logits, "logits") + self.base
        refuse_shape(uniform, logits, "Gumbel-sigmoid gate")
        noise = logistic(uniform) if self.noise is Noise.LOGISTIC else gumbel(uniform)
        soft = torch.sigmoid((logits + noise) / self.temperature)
        return through(soft >= 0.5, soft) if hard else soft

    def open_probability(self, logits: Tensor) -> Tensor:
        """P(hard gate = 1), in closed form; it does not depend on the temperature."""
        logits = refuse_nan(logits, "logits") + self.base
        return torch.sigmoid(logits) if self.noise is Noise.LOGISTIC else -torch.expm1(-torch.exp(logits))

    def value(self, logits: Tensor) -> Tensor:
        """The gate without noise: the soft gate at the median of the noise."""
        return torch.sigmoid((refuse_nan(logits, "logits") + self.base + self._median) / self.temperature)

    def frozen(self, logits: Tensor, keep: int | None = None, threshold: float = 0.5) -> Frozen:
        """The final mask: the `keep` highest, or where the gate is open with a probability above the threshold.

        At 0.5 this is the mask at the median of the noise.

        Raises:
            BudgetError: `keep` is out of range.
            ModelError: `keep` is given and all gates are equal.
            NumericsError: the logits contain NaN.
        """
        probability = self.open_probability(logits)
        if keep is not None:
            return freeze_top(logits, keep, probability, "logits")
        return freeze_above(probability, threshold, probability)

    @property
    def _median(self) -> float:
        return 0.0 if self.noise is Noise.LOGISTIC else -log(log(2))
