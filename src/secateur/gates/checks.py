"""What no gate accepts: NaN, noise of another shape, scores that share memory with weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from secateur.core.errors import ModelError, NumericsError


def refuse_nan(values: Tensor, where: str) -> Tensor:
    """The values themselves, half precision widened to float32; infinities order well and may pass.

    Raises:
        NumericsError: a value is NaN; a comparison would silently close that gate.
    """
    if torch.isnan(values).any():
        raise NumericsError(
            f"{where}: {int(torch.isnan(values).sum())} of {values.numel()} gate values are NaN; "
            "lower the gates' learning rate or clip their gradient"
        )
    return values.float() if values.dtype in (torch.bfloat16, torch.float16) else values


def refuse_shape(noise: Tensor, values: Tensor, where: str) -> None:
    """Refuse noise that would be broadcast: gates that share one draw are not independent.

    Raises:
        ModelError: the shapes differ.
    """
    if noise.shape != values.shape:
        raise ModelError(
            f"{where}: the noise has shape {list(noise.shape)}, the gates {list(values.shape)}; "
            "draw one number per gate"
        )


def refuse_aliases(scores: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse scores that live in the memory of a weight.

    Training either would then move both, and the learned mask is the weights' magnitude under another
    name (so in the released code of Zhang et al. 2022, BiP). Start from `scores_from` instead.

    Raises:
        ModelError: a score and a weight share storage; both are named.
    """
    owners = {weight.untyped_storage().data_ptr(): name for name, weight in weights.items() if weight.numel()}
    for name, score in scores.items():
        pointer = score.untyped_storage().data_ptr()
        if pointer and pointer in owners:  # tensors without memory (meta) have address 0
            raise ModelError(
                f"the scores '{name}' share their memory with the weight '{owners[pointer]}'; "
                "copy it: scores_from(weight)"
            )
