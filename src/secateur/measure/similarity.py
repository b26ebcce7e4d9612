"""How alike two networks represent the same inputs: linear centred kernel alignment of their last features."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.running import evaluating, logits
from secateur.stats.output_layer import output_layer

ROWS = 1024  # samples whose products with all others are held at a time


def linear_cka(one: Tensor, other: Tensor) -> float:
    """||Y^T X||_F^2 / (||X^T X||_F ||Y^T Y||_F) of centred features (Kornblith et al. 2019, equation 5).

    1 for features that are equal up to rotation and scale, 0 for unrelated ones. Where there are more features than
    samples, the same is computed from XX^T and YY^T, which are smaller.

    Args:
        one: X, `[samples, a]`.
        other: Y, `[samples, b]` on the same samples.

    Raises:
        DataError: other numbers of samples, or features that are the same for every sample.
    """
    if len(one) != len(other):
        raise DataError(f"CKA compares features of the same samples, got {len(one)} and {len(other)}")
    x, y = (features.double() - features.double().mean(0) for features in (one, other))
    common, squares = _by_samples(x, y) if max(x.shape[1], y.shape[1]) > len(x) else _by_features(x, y)
    if not squares > 0:
        raise DataError("CKA is not defined for features that are the same for every sample")
    return common / sqrt(squares)


def _by_features(x: Tensor, y: Tensor) -> tuple[float, float]:
    """||Y^T X||^2 and ||X^T X||^2 ||Y^T Y||^2."""
    return float((y.T @ x).square().sum()), float((x.T @ x).square().sum() * (y.T @ y).square().sum())


def _by_samples(x: Tensor, y: Tensor) -> tuple[float, float]:
    """The same as <XX^T, YY^T> and ||XX^T||^2 ||YY^T||^2, some rows of these at a time."""
    sums = torch.zeros(3, dtype=torch.float64)
    for own, others in zip(torch.split(x, ROWS), torch.split(y, ROWS), strict=True):
        k, l = own @ x.T, others @ y.T  # noqa: E741
        sums += torch.stack([(k * l).sum(), k.square().sum(), l.square().sum()])
    return float(sums[0]), float(sums[1] * sums[2])


def last_features(model: nn.Module, batches: Sequence[Batch]) -> Tensor:
    """What enters the output layer, `[samples, features]`, in eval mode; of text all tokens of a sample side by side.

    Raises:
        ModelError: the model cannot be run on these samples.
    """
    head = model.get_submodule(output_layer(model, batches[0]).name)
    found: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        found.append(args[0].detach().float().flatten(1).cpu())

    handle = head.register_forward_pre_hook(hook)
    try:
        with evaluating(model):
            for batch in batches:
                logits(model, batch)
    finally:
        handle.remove()
    return torch.cat(found)
