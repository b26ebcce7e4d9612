"""From learned gates to the final keep-mask, said explicitly, with the open share before and after.

A frozen mask and the sampled gates it came from can differ widely in how many units are open; a report
that shows only one of the two numbers hides it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, ModelError
from secateur.core.select import keep_global, keep_top
from secateur.gates.checks import refuse_nan


@dataclass(frozen=True)
class Frozen:
    """A final mask beside the gates it was made from.

    Attributes:
        mask: bool, True = keep.
        sampled_share: expected fraction of open gates while they were still sampled, in [0, 1].
    """

    mask: Tensor
    sampled_share: float

    @property
    def frozen_share(self) -> float:
        """Fraction of units that the mask keeps."""
        return float(self.mask.double().mean())

    @property
    def shift(self) -> float:
        """By how much freezing changed the open share; positive = more is open than in training."""
        return self.frozen_share - self.sampled_share

    def __str__(self) -> str:
        kept = f"{int(self.mask.sum())} of {self.mask.numel()} kept ({self.frozen_share:.4f})"
        return f"{kept}, open share while sampled {self.sampled_share:.4f}"


def keep_above(scores: Tensor, threshold: Tensor | float, minimum: int = 0) -> Tensor:
    """The mask `scores > threshold`, where the `minimum` highest of all entries stay in any case; bool.

    Raises:
        BudgetError: `minimum` is larger than the number of entries.
        NumericsError: scores or threshold are NaN.
    """
    scores = refuse_nan(scores, "scores")
    if isinstance(threshold, Tensor):
        threshold = refuse_nan(threshold, "threshold").detach()
    mask = scores.detach() > threshold
    if not minimum:
        return mask
    return mask | keep_top(scores.reshape(-1), minimum).view(scores.shape)


def freeze_above(scores: Tensor, threshold: Tensor | float, open_share: Tensor, minimum: int = 0) -> Frozen:
    """Keep what lies above the threshold.

    Args:
        scores: any shape, higher = keep.
        threshold: number or tensor that broadcasts against `scores`.
        open_share: probability that each gate is open (or sampled 0/1 gates); its mean is reported.
        minimum: at least so many units stay.
    """
    return Frozen(keep_above(scores, threshold, minimum), _mean(open_share))


def freeze_top(scores: Tensor, keep: int, open_share: Tensor, where: str = "gates") -> Frozen:
    """Keep exactly the `keep` highest of all entries, ties to the lower index going first.

    Raises:
        BudgetError: `keep` is out of range.
        ModelError: all scores are equal, so that the index order would decide.
    """
    return freeze_global({where: scores}, keep, {where: open_share})[where]


def freeze_global(scores: Mapping[str, Tensor], keep: int, open_share: Mapping[str, Tensor]) -> dict[str, Frozen]:
    """The same with one ranking over several tensors of gates.

    Raises:
        BudgetError: `keep` is out of range.
        ModelError: all scores are equal, so that the index order would decide.
    """
    units = sum(score.numel() for score in scores.values())
    if not 0 <= keep <= units:
        raise BudgetError(f"cannot keep {keep} of {units} gates ({', '.join(scores)}); the range is 0 to {units}")
    for name, score in scores.items():
        refuse_nan(score, name)
    if 0 < keep < units and _all_equal(scores):
        raise ModelError(
            f"all {units} gates ({', '.join(scores)}) have the same score, so nothing was learned; "
            "raise their learning rate or train longer"
        )
    masks = keep_global(scores, keep)
    return {name: Frozen(mask, _mean(open_share[name])) for name, mask in masks.items()}


def _all_equal(scores: Mapping[str, Tensor]) -> bool:
    first = next(score for score in scores.values() if score.numel()).detach().reshape(-1)[0].item()
    return all(bool((score.detach() == first).all()) for score in scores.values())


def _mean(open_share: Tensor) -> float:
    return float(torch.as_tensor(open_share).detach().double().mean())
