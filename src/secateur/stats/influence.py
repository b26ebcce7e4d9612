"""One pass through a block: how far it moves the hidden state, and how large what enters its parts is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from secateur.core.distributed import total, total_count
from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.data.batches import token_mask
from secateur.scores.blocks import Influence, influence
from secateur.stats.walker import BlockVisit, Captured


@dataclass
class Passage:
    """Sums over all tokens of the calibration data; padding counts nowhere.

    Attributes:
        distance: the block's influence, float64.
        squares: module name -> sum of squares of each feature that enters it, `[features]` float64.
        tokens, samples: how many.
    """

    distance: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    squares: dict[str, Tensor] = field(default_factory=dict)
    tokens: int = 0
    samples: int = 0

    def add(self, seen: Captured, batch: Batch, how: Influence) -> None:
        """Take in one batch."""
        real = token_mask(batch)
        before, after = _tokens(seen.before, real), _tokens(seen.after, real)
        self.distance = self.distance + influence(before, after, how).sum().cpu()
        for name, entering in seen.inputs.items():
            squares = _tokens(entering, real).float().square().sum(0, dtype=torch.float64).cpu()
            self.squares[name] = self.squares[name] + squares if name in self.squares else squares
        self.tokens += len(before)
        self.samples += batch.samples

    def norm(self, module: str) -> Tensor:
        """Root of the sum of squares per sample, `[features]` float32: Wanda's activation norm."""
        return (self.squares[module] / self.samples).sqrt().float()


def passage(visit: BlockVisit, modules: Sequence[str], batches: Sequence[Batch], how: Influence) -> Passage:
    """Run a block as it stands over all data, and over that of the other processes of the job.

    Args:
        visit: of the block.
        modules: qualified names of parts whose inputs are summed up.
        batches: the task's data.
        how: the distance between the hidden state before and after.

    Raises:
        ModelError: the block does not hand on `[samples, tokens, features]` of the same shape.
    """
    found = Passage()
    for seen, batch in zip(visit.capture(modules), batches, strict=True):
        if seen.before.dim() != 3 or seen.before.shape != seen.after.shape:
            raise ModelError(
                f"block '{visit.name}' turns {list(seen.before.shape)} into {list(seen.after.shape)}; the influence of "
                "a block is defined where [samples, tokens, features] go in and come out"
            )
        found.add(seen, batch, how)
    found.distance = total(found.distance)
    found.squares = {name: total(value) for name, value in found.squares.items()}
    found.tokens, found.samples = total_count(found.tokens), total_count(found.samples)
    return found


def _tokens(states: Tensor, real: Tensor | None) -> Tensor:
    """The rows of all real tokens, `[tokens, features]`."""
    rows = states.reshape(-1, states.shape[-1])
    return rows if real is None else rows[real.flatten().to(rows.device)]
