"""Replayable noise: the same seed, purpose, step and place give the same numbers, after a resume and on any device.

Nothing is stored and no stream advances. A step that is computed twice (gradient checkpointing, a
killed run, another number of workers) sees the same gates; the gradient of a recomputed step is then the
gradient of the loss that was reported.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.seeding import generator

EDGE = 1e-6
"""Uniform noise lies in [EDGE, 1 - EDGE], so that its log-odds stay within +-13.8."""


@dataclass(frozen=True)
class NoiseStream:
    """Noise for one purpose.

    Attributes:
        seed: the user's seed.
        purpose: what the noise is for; two purposes are independent.
    """

    seed: int
    purpose: str

    def uniform(self, shape: Sequence[int], step: int, *where: str | int, device: torch.device | str = "cpu") -> Tensor:
        """Uniform noise in [EDGE, 1 - EDGE].

        Args:
            shape: shape of the result, one number per gate.
            step: optimiser step; a new step gives new noise.
            where: what else tells draws of one step apart (a module's name, a denoising step, a micro-batch).
            device: where the result goes. It is always drawn on the CPU: devices have different generators.

        Returns:
            float32 of the given shape.
        """
        # JSON, because joined words could not tell ("a", "b") from ("a/b",)
        rng = generator(self.seed, "gate noise", json.dumps([self.purpose, step, *where]))
        draw = torch.rand(tuple(shape), generator=rng, dtype=torch.float32)
        return draw.mul_(1 - 2 * EDGE).add_(EDGE).to(device)


def logistic(uniform: Tensor) -> Tensor:
    """Standard logistic noise log(u / (1 - u)): the difference of two Gumbel draws."""
    return torch.log(uniform) - torch.log1p(-uniform)


def gumbel(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise -log(-log u); its median is -log(log 2), not 0."""
    return -torch.log(-torch.log(uniform))
