"""Example inputs as plain data: shapes and ranges, so that a plan can be applied where its data is not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.batches import as_batches
from secateur.data.dataset import Dataset
from secateur.data.probe import SAMPLES, probe_for
from secateur.data.running import resized

PLAIN = (bool, int, float, str, type(None))


def describe_example(batch: Batch | None) -> dict[str, Any] | None:
    """What a batch looks like, without its values; None where something in it has no plain description."""
    if batch is None:
        return None
    args = [_described(item) for item in batch.args]
    kwargs = {name: _described(item) for name, item in batch.kwargs.items()}
    if any(item is None for item in (*args, *kwargs.values())):
        return None
    return {"args": args, "kwargs": kwargs}


def _described(item: Any) -> dict[str, Any] | None:
    if isinstance(item, Tensor):
        whole = not item.is_floating_point() and item.numel() > 0
        low, high = (int(item.min()), int(item.max())) if whole else (0, 0)
        return {"shape": list(item.shape), "dtype": str(item.dtype).removeprefix("torch."), "low": low, "high": high}
    return {"value": item} if isinstance(item, PLAIN) else None


def make_example(described: dict[str, Any]) -> Batch:
    """Made-up inputs that look like the described ones."""
    rng = torch.Generator().manual_seed(0)
    return Batch(
        tuple(_made(item, rng) for item in described["args"]),
        {name: _made(item, rng) for name, item in described["kwargs"].items()},
    )


def _made(item: dict[str, Any], rng: torch.Generator) -> Any:
    if "value" in item:
        return item["value"]
    dtype = getattr(torch, item["dtype"])
    if dtype.is_floating_point:
        return torch.randn(item["shape"], generator=rng).to(dtype)
    return torch.randint(item["low"], item["high"] + 1, item["shape"], generator=rng).to(dtype)


def example_for(model: nn.Module, given: Any = None, described: dict[str, Any] | None = None) -> Batch:
    """Inputs to observe a model with: the given ones, made-up ones like those of a plan, or guessed ones.

    Args:
        model: what takes them.
        given: a Dataset, a tensor, a mapping of keyword inputs, a `Batch` or an iterable of batches; two
            samples are taken.
        described: what a plan says of the inputs it was made with.

    Raises:
        DataError: none of these; says what to give.
    """
    if given is not None:
        batch = next(given.batches(SAMPLES)) if isinstance(given, Dataset) else as_batches(given, SAMPLES)[0]
        return resized(batch, min(SAMPLES, batch.samples)) if batch.tensors else batch
    if described is not None:
        return make_example(described)
    guessed = probe_for(model)
    if guessed is None:
        raise DataError(
            f"it is not clear what {type(model).__name__} takes; give example inputs (example=..., --data, "
            "--input 2,3,224,224 for numbers of that shape or --tokens 2x16 for token ids)"
        )
    return guessed
