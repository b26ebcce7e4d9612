"""What whole blocks do to the hidden state: the flow through one block, checked."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from secateur.core.errors import ModelError, NumericsError
from secateur.core.select import all_finite
from secateur.stats.walker import BlockVisit


def block_flow(visit: BlockVisit) -> Iterator[tuple[Tensor, Tensor]]:
    """The hidden state `[samples, tokens, features]` before and after a block that could be removed, batch by batch.

    Raises:
        ModelError: the state has another form, or the block changes its shape.
        NumericsError: NaN or infinity in it.
    """
    for before, after in visit.flow():
        if before.dim() != 3:
            raise ModelError(
                f"block '{visit.name}' passes on a state of shape {list(before.shape)}; block influence is "
                "defined for [samples, tokens, features], as in transformers"
            )
        if before.shape != after.shape:
            raise ModelError(
                f"block '{visit.name}' turns {list(before.shape)} into {list(after.shape)}; "
                "blocks that change the shape cannot be removed"
            )
        if not (all_finite(before) and all_finite(after)):
            raise NumericsError(f"block '{visit.name}' gets or returns NaN or infinity on the calibration data")
        yield before, after
