"""How much every block of a stack changes the hidden state, from hooks on the whole blocks in one pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError, NumericsError
from secateur.core.method import Batch
from secateur.core.progress import Progress, track
from secateur.data.running import device_of, evaluating
from secateur.scores.blocks import cosine
from secateur.stats.catching import Call, hidden_of, run_safely

ROUNDING = 1e-12  # of a cosine: a block that does nothing must not differ from another one that does nothing


class Distance(StrEnum):
    """How a token's state before a block is compared with its state behind it."""

    COSINE = "cosine"  # 1 - cos
    EUCLIDEAN = "euclidean"
    MANHATTAN = "manhattan"


def distances(before: Tensor, after: Tensor, distance: Distance) -> Tensor:
    """One distance per token, `[tokens]`, float64."""
    if distance is Distance.COSINE:
        angle = 1 - cosine(before, after)
        return angle.masked_fill(angle < ROUNDING, 0.0)
    change = (after.double() - before.double()).flatten(0, -2)
    return change.norm(dim=-1) if distance is Distance.EUCLIDEAN else change.abs().sum(-1)


def block_changes(
    model: nn.Module, blocks: Sequence[str], batches: Sequence[Batch], distance: Distance, progress: Progress
) -> dict[str, float]:
    """Block -> mean over all tokens of the distance between its input and its output; 0 = it does nothing.

    Args:
        model: run as it is, in eval mode; the hooks are gone afterwards.
        blocks: qualified names of modules that pass a hidden state `[samples, tokens, features]` along.
        batches: calibration data.
        distance: of two states.
        progress: one step per batch.

    Raises:
        ModelError: a block gives another shape than it takes, or never runs; names it.
        NumericsError: a hidden state is NaN or infinite; names the block.
    """
    sums, tokens = dict.fromkeys(blocks, 0.0), dict.fromkeys(blocks, 0)

    def hook(name: str) -> Callable[..., None]:
        def seen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call, after = Call.of(args, kwargs), hidden_of(output)
            if call is None or after is None or call.hidden.shape != after.shape:
                raise ModelError(f"block '{name}' gives another shape than it takes, so its change is not defined")
            found = distances(call.hidden, after, distance)
            sums[name] += float(found.sum())
            tokens[name] += len(found)

        return seen

    handles = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in blocks]
    try:
        with evaluating(model):
            for batch in track(batches, progress, "changes of blocks"):
                run_safely(model, batch.to(device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return {name: _mean(name, sums[name], tokens[name]) for name in blocks}


def _mean(name: str, total: float, tokens: int) -> float:
    if not tokens:
        raise ModelError(f"block '{name}' never ran on the calibration data")
    if not torch.isfinite(torch.tensor(total)):
        raise NumericsError(f"the hidden state of block '{name}' is NaN or infinite on the calibration data")
    return total / tokens
