"""The layer that makes a model's output, as one run shows it: registration order says nothing about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.data.running import evaluating, logits, resized
from secateur.structure.layers import layout_of


@dataclass(frozen=True)
class OutputLayer:
    """A layer with weights.

    Attributes:
        name: its qualified name.
        exact: the model's output is what this layer returns; else it is only the last layer that ran.
    """

    name: str
    exact: bool


def output_layer(model: nn.Module, batch: Batch) -> OutputLayer:
    """The last linear layer whose output is the model's, one that a transformers model names, or the last that ran.

    Args:
        model: run once, in eval mode.
        batch: inputs; one sample is used.

    Raises:
        ModelError: the model cannot be run on the batch, or no layer with weights runs.
    """
    ran, out = _run(model, resized(batch, 1))
    if not ran:
        raise ModelError(f"no linear or convolution layer of {type(model).__name__} runs, so it has no output layer")
    linear = (
        name for name, own in reversed(ran) if isinstance(model.get_submodule(name), nn.Linear) and _same(own, out)
    )
    exact = next(linear, None) or _declared(model)
    return OutputLayer(exact, True) if exact else OutputLayer(ran[-1][0], False)


def _run(model: nn.Module, batch: Batch) -> tuple[list[tuple[str, Tensor]], Tensor]:
    """(layer, its output) in the order of the run, and the model's output."""
    ran: list[tuple[str, Tensor]] = []  # outputs are held, so that none gets the memory of another

    def listening(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, __, output: ran.append((name, output))

    layers = [(name, module) for name, module in model.named_modules() if layout_of(module) is not None]
    handles = [module.register_forward_hook(listening(name)) for name, module in layers]
    try:
        with evaluating(model):
            return ran, logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether a tensor is another or a view of it."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _declared(model: nn.Module) -> str | None:
    """The output layer by transformers' own word, for models that return a copy of what it makes."""
    ask: Callable[[], nn.Module | None] = getattr(model, "get_output_embeddings", lambda: None)
    found = ask()
    names = (name for name, module in model.named_modules() if module is found and isinstance(module, nn.Linear))
    return next(names, None)
