"""Running a model without changing it: in eval mode, on its own device, left as it was found."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.core.seeding import seeded
from secateur.data.batches import cacheless, forward, taken


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode without gradients inside the block; every module's mode is put back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def training(model: nn.Module, seed: int) -> Iterator[None]:
    """Train mode with gradients and seeded randomness inside the block; modes are put back, gradients dropped."""
    modes = [(module, module.training) for module in model.modules()]
    model.train()
    try:
        with torch.enable_grad(), seeded(seed):
            yield
    finally:
        for module, was_training in modes:
            module.training = was_training
        model.zero_grad(set_to_none=True)


def device_of(model: nn.Module) -> torch.device:
    """Where the model's first tensor lives; the CPU for a model without tensors."""
    first = next(chain(model.parameters(), model.buffers()), None)
    return torch.device("cpu") if first is None else first.device


def dtype_of(model: nn.Module) -> str:
    """The dtype of the model's first floating-point tensor, e.g. `float32`; `none` without one."""
    tensors = (tensor for tensor in chain(model.parameters(), model.buffers()) if tensor.is_floating_point())
    first = next(tensors, None)
    return "none" if first is None else str(first.dtype).removeprefix("torch.")


def logits(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits on a batch that is moved to the model's device.

    Raises:
        ModelError: the model cannot be run on this batch; gives the shapes and the model's own words.
    """
    try:
        return forward(model, batch.to(device_of(model)))
    except (RuntimeError, ValueError, TypeError, IndexError) as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in batch.tensors)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(
            f"{type(model).__name__} cannot be run on inputs of shape {shapes}: {first_line}; "
            f"give data of the shape and range the model expects"
        ) from error


def bound(model: nn.Module, batch: Batch) -> Callable[[], Any]:
    """The model's call on a batch with everything around it done beforehand, fit for a stopwatch.

    A transformers model is asked not to build a key/value cache, as everywhere in the library; its
    configuration is looked at here, once, because reading it can take longer than a tiny model's pass.
    """
    moved = batch.to(device_of(model))
    kwargs = cacheless(model) | moved.kwargs
    return lambda: model(*moved.args, **kwargs)


def resized(batch: Batch, size: int) -> Batch:
    """A batch of `size` samples: the first ones, repeated from the start where there are too few.

    Tensors whose first dimension is not the batch's number of samples are left alone.
    """
    return taken(batch, torch.arange(size) % batch.samples)
