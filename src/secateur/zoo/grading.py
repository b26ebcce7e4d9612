"""The one number that says how good a zoo model is."""

from __future__ import annotations

import torch
from torch import nn

from secateur.data.batches import forward, token_losses
from secateur.data.dataset import Dataset


@torch.no_grad()
def quality(model: nn.Module, data: Dataset, batch: int = 64) -> dict[str, float]:
    """`{"accuracy": fraction}` where the data has targets, else `{"perplexity": per token}`.

    Perplexity is the exponential of the mean loss over all predicted tokens, `length - 1` a window.
    The model must be in eval mode.
    """
    if data.targets is None:
        losses = [token_losses(forward(model, part), part.args[0]) for part in data.batches(batch)]
        return {"perplexity": float(torch.cat(losses).double().mean().exp())}
    guesses = torch.cat([forward(model, part).argmax(-1) for part in data.batches(batch)])
    return {"accuracy": float((guesses == data.targets).double().mean())}
