"""Several processes, one decision: rank 0's result is everybody's."""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def several() -> bool:
    """Whether this is one of several processes of a job."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def share() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) in a job of one."""
    return (dist.get_rank(), dist.get_world_size()) if several() else (0, 1)


def total(value: Tensor) -> Tensor:
    """The sum of the ranks' tensors, on every rank with the same bits; in place. `value` itself in a job of one."""
    if several():
        dist.all_reduce(value)
    return value


def total_count(value: int) -> int:
    """The sum of the ranks' numbers."""
    if not several():
        return value
    return int(total(torch.tensor(value, dtype=torch.int64)))


def least(value: int) -> int:
    """The smallest of the ranks' numbers."""
    if several():
        box = torch.tensor(value, dtype=torch.int64)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        return int(box)
    return value


def agreed(value: T) -> T:
    """Rank 0's `value` on every rank; the value itself where there is one process.

    Uses the object collectives, so `value` must be plain data or CPU tensors made by this library.
    """
    if not several():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
