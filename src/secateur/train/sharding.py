"""Parameters that are spread over processes: whole tensors for decisions, local parts for the work."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from secateur.core.distributed import agreed


def is_sharded(tensor: Tensor) -> bool:
    """Whether each process holds a part of the tensor only (FSDP2, tensor parallelism)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """The whole tensor, the same on every process."""
    sharded: Any = tensor
    return sharded.full_tensor() if is_sharded(tensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """This process's part; shares memory with the tensor."""
    sharded: Any = tensor
    return sharded.to_local() if is_sharded(tensor) else tensor


def parted_like(value: Tensor, tensor: Tensor) -> Tensor:
    """This process's part of `value`, cut as `tensor` is. Rank 0's value counts where it is sharded."""
    if not is_sharded(tensor):
        return value.to(tensor.device)
    from torch.distributed.tensor import distribute_tensor

    sharded: Any = tensor
    parted: Any = distribute_tensor(value.to(sharded.to_local().device), sharded.device_mesh, sharded.placements)
    return local(parted)


def same_everywhere(masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rank 0's masks on every process, one bit per weight on the wire."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return masks
    from secateur.core.masks import pack, unpack

    packed = agreed({name: pack(mask) for name, mask in masks.items()})
    return {name: unpack(packed[name], tuple(mask.shape), name).to(mask.device) for name, mask in masks.items()}
