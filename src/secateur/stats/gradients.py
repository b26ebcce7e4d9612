"""Gradients of the task loss with respect to weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from secateur.core.errors import NumericsError
from secateur.core.method import Batch
from secateur.core.progress import Progress, track
from secateur.core.select import all_finite
from secateur.data.batches import task_loss


def weight_gradients(
    model: nn.Module, batches: Sequence[Batch], names: Sequence[str], progress: Progress
) -> dict[str, Tensor]:
    """dL/dw of the mean loss over all samples, one tensor per parameter name, float32.

    The model's own `.grad` fields and `requires_grad` flags are left as they are.

    Raises:
        NumericsError: a gradient is NaN or infinite; names the layer.
        DataError: the batches carry no labels and are not text.
    """
    parameters = dict(model.named_parameters())
    chosen = [parameters[name] for name in names]
    total = sum(batch.samples for batch in batches)
    flags = [parameter.requires_grad for parameter in chosen]
    sums = {name: torch.zeros_like(parameters[name], dtype=torch.float32) for name in names}
    try:
        for parameter in chosen:
            parameter.requires_grad_(True)
        with torch.enable_grad():
            for batch in track(batches, progress, "gradients"):
                loss = task_loss(model, batch)
                found = torch.autograd.grad(loss, chosen, allow_unused=True)
                for name, gradient in zip(names, found, strict=True):
                    if gradient is not None:
                        sums[name] += gradient.float() * (batch.samples / total)
    finally:
        for parameter, flag in zip(chosen, flags, strict=True):
            parameter.requires_grad_(flag)
    for name, gradient in sums.items():
        if not all_finite(gradient):
            raise NumericsError(f"the gradient of layer '{name}' is NaN or infinite on the calibration data")
    return sums
