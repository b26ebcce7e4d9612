"""How alike two networks represent the same inputs: linear centred kernel alignment of their last features."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, ModelError
from secateur.data.dataset import Dataset
from secateur.data.running import evaluating, logits
from secateur.structure.sites import weight_layers


def linear_cka(one: Tensor, other: Tensor) -> float:
    """||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of centred features (Kornblith et al. 2019, equation 5).

    1 for features that are equal up to rotation and scale, 0 for unrelated ones.

    Args:
        one: X, `[samples, a]`.
        other: Y, `[samples, b]` on the same samples.

    Raises:
        DataError: other numbers of samples, or features that are the same for every sample.
    """
    if len(one) != len(other):
        raise DataError(f"CKA compares features of the same samples, got {len(one)} and {len(other)}")
    x, y = (features.double() - features.double().mean(0) for features in (one, other))
    own = (x.T @ x).norm() * (y.T @ y).norm()
    if not float(own) > 0:
        raise DataError("CKA is not defined for features that are the same for every sample")
    return float((y.T @ x).square().sum() / own)


def last_features(model: nn.Module, data: Dataset, size: int = 64) -> Tensor:
    """What enters the last layer with weights, `[samples, features]`, in eval mode.

    Raises:
        ModelError: that layer did not run.
    """
    head = list(weight_layers(model).layers.values())[-1]
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach().float().flatten(1).cpu())

    handle = head.module.register_forward_pre_hook(hook)
    try:
        with evaluating(model):
            for batch in data.batches(size):
                logits(model, batch)
    finally:
        handle.remove()
    if not found:
        raise ModelError(f"the last layer '{head.name}' did not run, so its input cannot be compared")
    return torch.cat(found)
