"""Hard-concrete gates (Louizos, Welling, Kingma 2018, "Learning Sparse Neural Networks through L0 Regularization").

    s = sigmoid((log u - log(1 - u) + log_alpha) / beta)           u uniform in (0, 1)
    z = clamp(s (zeta - gamma) + gamma, 0, 1)
    P(z > 0) = sigmoid(log_alpha - beta log(-gamma / zeta))
    test time: z = clamp(sigmoid(log_alpha) (zeta - gamma) + gamma, 0, 1)

z is exactly 0 or exactly 1 with positive probability and differentiable in between. The distribution holds no
parameters: `log_alpha` may be a parameter or the output of a network. Half precision comes out as float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor

from secateur.core.errors import SettingsError
from secateur.core.select import keep_top
from secateur.gates.checks import refuse_nan, refuse_shape
from secateur.gates.freeze import Frozen, freeze_above, freeze_top


@dataclass(frozen=True)
class HardConcrete:
    """The distribution.

    Attributes:
        beta: temperature.
        gamma: lower end of the stretch, below 0.
        zeta: upper end of the stretch, above 1.
        delta: added to u and to 1 - u before the logarithms; bounds the noise to +-log((1 + delta) / delta).
            0 is the paper's gate; EcoDiff uses 0.1 and 0.5.

    Raises:
        SettingsError: a value out of its range.
    """

    beta: float = 2 / 3
    gamma: float = -0.1
    zeta: float = 1.1
    delta: float = 0.0

    def __post_init__(self) -> None:
        if not (self.beta > 0 and self.gamma < 0 and self.zeta > 1 and self.delta >= 0):
            raise SettingsError(f"{self}: a hard-concrete gate needs beta > 0, gamma < 0, zeta > 1 and delta >= 0")

    def sample(self, log_alpha: Tensor, uniform: Tensor) -> Tensor:
        """One gate value per entry, in [0, 1]; gradient to `log_alpha`.

        Args:
            log_alpha: any shape.
            uniform: noise of the same shape in (0, 1), from `NoiseStream.uniform`.

        Raises:
            ModelError: the noise has another shape.
            NumericsError: `log_alpha` contains NaN.
        """
        log_alpha = refuse_nan(log_alpha, "log_alpha")
        refuse_shape(uniform, log_alpha, "hard-concrete gate")
        noise = torch.log(uniform + self.delta) - torch.log1p(self.delta - uniform)
        return self._stretch(torch.sigmoid((noise + log_alpha) / self.beta))

    def open_probability(self, log_alpha: Tensor) -> Tensor:
        """P(z > 0) of every gate, in closed form; its sum is the expected L0 norm.

        With delta > 0 the noise is bounded, and so gates far from 0 are open or closed for certain.
        """
        log_alpha = refuse_nan(log_alpha, "log_alpha")
        logistic = torch.sigmoid(log_alpha - self.beta * log(-self.gamma / self.zeta))
        return torch.clamp((1 + 2 * self.delta) * logistic - self.delta, 0, 1) if self.delta else logistic

    def value(self, log_alpha: Tensor) -> Tensor:
        """The test-time gate: no noise, in [0, 1]."""
        return self._stretch(torch.sigmoid(refuse_nan(log_alpha, "log_alpha")))

    def counted_value(self, log_alpha: Tensor, sharpness: float = 0.8) -> Tensor:
        """The test-time gate with as many exact zeros as the distribution expects (Edge Pruning, CoFi).

        In one tensor, round(sum of P(z = 0)) gates with the lowest value are 0; the others are
        sigmoid(log_alpha * sharpness / beta).
        """
        closed = round(float((1 - self.open_probability(log_alpha.detach().double())).sum()))
        soft = torch.sigmoid(refuse_nan(log_alpha, "log_alpha") * sharpness / self.beta)
        keep = keep_top(log_alpha.reshape(-1), log_alpha.numel() - closed).view(log_alpha.shape)
        return torch.where(keep, soft, torch.zeros_like(soft))

    def frozen(self, log_alpha: Tensor, keep: int | None = None, threshold: float = 0.0) -> Frozen:
        """The final mask: the `keep` highest, or where the test-time value lies above the threshold.

        Raises:
            BudgetError: `keep` is out of range.
            ModelError: `keep` is given and all gates are equal.
            NumericsError: `log_alpha` contains NaN.
        """
        probability = self.open_probability(log_alpha)
        if keep is not None:
            return freeze_top(log_alpha, keep, probability, "log_alpha")
        return freeze_above(self.value(log_alpha), threshold, probability)

    def _stretch(self, s: Tensor) -> Tensor:
        return torch.clamp(s * (self.zeta - self.gamma) + self.gamma, 0, 1)
