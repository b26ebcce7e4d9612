"""Perplexity of a model whose weights are not all in memory: block by block, the head last."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.method import Task
from secateur.data.batches import logits_of, token_losses
from secateur.measure.quality import Metric, Quality
from secateur.stats.catching import run_rest, streamed_stack
from secateur.stats.walker import BlockWalk


def streamed_perplexity(task: Task) -> Quality:
    """As `perplexity`, for windows of tokens given as the task's batches.

    Args:
        task: a model with a residency, and one tensor of token ids `[windows, length]` per batch.

    Raises:
        DataError: inputs that are not windows of token ids, or logits that are not per token.
    """
    assert task.residency is not None
    for batch in task.batches:
        ids = batch.args[0] if batch.args else None
        if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.dtype != torch.int64 or ids.shape[1] < 2:
            raise DataError("perplexity needs int64 token ids [windows, length] with a length of 2 or more")
    hidden: list[Tensor] = []
    with BlockWalk(task) as walk:
        stack = walk.stacks[0].stack
        for visit in walk:
            hidden = visit.outputs()
    like = streamed_stack(task.model, task.batches[0], task.residency).outputs[-1]
    losses = []
    with torch.no_grad(), task.residency.outside(stack.names):
        for batch, state in zip(walk.batches, hidden, strict=True):
            out = logits_of(run_rest(task.model, stack, batch, state, like))
            losses.append(token_losses(out, batch.args[0]).double().mean(1).cpu())
    values = torch.cat(losses)
    return Quality(Metric.PERPLEXITY, float(Metric.PERPLEXITY.from_mean(values.mean().item())), values)
