"""What blocks hand on, reduced sample by sample while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError, NumericsError
from secateur.core.method import Batch
from secateur.core.progress import Progress, track
from secateur.core.select import all_finite
from secateur.data.running import evaluating, logits
from secateur.structure.removable import channels_first

Reduce = Callable[[nn.Module, Tensor], Tensor]


def block_outputs(
    model: nn.Module, batches: Sequence[Batch], names: Sequence[str], reduce: Reduce, progress: Progress
) -> dict[str, Tensor]:
    """Block -> what `reduce(block, output)` makes of its output, `[samples, ...]`, in eval mode.

    Raises:
        ModelError: the model cannot be run on a batch, or a block did not run.
        NumericsError: NaN or infinity in an output; names the block.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in names}

    def listening(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(block: nn.Module, _: Any, output: Any) -> None:
            state = output[0] if isinstance(output, tuple) else output
            if not all_finite(state):
                raise NumericsError(f"block '{name}' returns NaN or infinity on the calibration data")
            found[name].append(reduce(block, state.float()).cpu())

        return hook

    handles = [model.get_submodule(name).register_forward_hook(listening(name)) for name in names]
    try:
        with evaluating(model):
            for batch in track(batches, progress, "outputs of blocks"):
                logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    silent = [name for name, parts in found.items() if not parts]
    if silent:
        raise ModelError(f"the block '{silent[0]}' did not run; leave it out")
    return {name: torch.cat(parts) for name, parts in found.items()}


def pooled(block: nn.Module, state: Tensor) -> Tensor:
    """The mean over all positions, `[samples, channels]`."""
    positions = range(2, state.dim()) if channels_first(block) else range(1, state.dim() - 1)
    return state.mean(list(positions)) if len(positions) else state


def mean_absolute(_: nn.Module, state: Tensor) -> Tensor:
    """The mean absolute activation of every sample, `[samples]`."""
    return state.abs().flatten(1).mean(1)


def mean_rank(block: nn.Module, state: Tensor) -> Tensor:
    """The mean numerical rank of the feature maps of every sample, `[samples]` (Lin et al. 2020, HRank).

    Raises:
        ModelError: the output is no stack of feature maps `[samples, channels, height, width]`.
    """
    if state.dim() != 4 or not channels_first(block):
        raise ModelError(
            f"a block returns {list(state.shape)}; ranks are of feature maps [samples, channels, height, width] of "
            "convolutions, choose another criterion for this model"
        )
    ranks: Tensor = torch.linalg.matrix_rank(state)
    return ranks.float().mean(1)
