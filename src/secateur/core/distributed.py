"""Several processes, one decision: rank 0's result is everybody's."""

from __future__ import annotations

from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def agreed(value: T) -> T:
    """Rank 0's `value` on every rank; the value itself where there is one process.

    Uses the object collectives, so `value` must be plain data or CPU tensors made by this library.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
