"""How big a model is: parameters, non-zeros, bytes. A tensor that several modules share counts once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once, zeros included."""
    return sum(parameter.numel() for parameter in model.parameters())


def nonzeros(model: nn.Module) -> int:
    """Number of parameters that are not zero, tied ones once; NaN is not zero.

    Raises:
        ModelError: a parameter has no values (meta device).
    """
    return sum(_count(name, parameter) for name, parameter in model.named_parameters())


def _count(name: str, parameter: Tensor) -> int:
    if parameter.device.type == "meta":
        raise ModelError(f"parameter '{name}' is on the meta device and has no values; load the weights first")
    return int(torch.count_nonzero(parameter.detach()))


def sparsity(model: nn.Module) -> float:
    """Fraction of all parameters (embeddings, norms and biases included) that is zero; 0 for none."""
    total = parameters(model)
    return 1 - nonzeros(model) / total if total else 0.0


def weight_bytes(model: nn.Module) -> int:
    """Bytes of what a checkpoint holds, stored dense: parameters and persistent buffers, tied ones once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in _stored(model))


def _stored(model: nn.Module) -> Iterator[Tensor]:
    seen: set[int] = set()
    for value in model.state_dict(keep_vars=True).values():  # keep_vars: tied tensors stay one object
        if isinstance(value, Tensor) and id(value) not in seen:
            seen.add(id(value))
            yield value
