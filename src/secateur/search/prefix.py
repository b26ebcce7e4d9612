"""Run many variants of a model that differ in few blocks without repeating the blocks before the first difference.

Blocks that a run may skip give back what they gave before on the same batch; the blocks after them and everything
around them run as always, so results have the same bits as those of whole runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.method import Batch
from secateur.data.running import logits

ROOM = 2**30  # bytes of blocks' outputs that are kept at most


class PrefixRuns:
    """Runs of a model on a fixed list of batches.

    Args:
        model: whose blocks run in the order given, once each, and keep no state between runs.
        blocks: that order.
        batches: that are run again and again.
        room: bytes of outputs that may be kept; batches beyond are run whole.

    Example:
        with runs:
            before = runs.logits(0, first=0)
            ...  # other weights from the fifth block on
            after = runs.logits(0, first=4)
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], batches: Sequence[Batch], room: int = ROOM):
        self.model, self.blocks, self.batches, self.room = model, list(blocks), batches, room
        self._kept: list[list[Any] | None] = [None] * len(batches)
        self._outputs: list[Any] = []  # of the run that is going on, or of the last one
        self._versions = [0] * len(self.blocks)
        self._first = 0

    def logits(self, index: int, first: int) -> Tensor:
        """The model's logits on one batch.

        Args:
            index: of the batch.
            first: the first block whose weights may differ from those of the last run on this batch.
        """
        kept = self._kept[index]
        self._first = first if kept is not None else 0
        self._outputs = [None] * len(self.blocks) if kept is None else kept
        found = logits(self.model, self.batches[index])
        if kept is None:
            self._keep(index)
        return found

    def output(self, block: int) -> Any:
        """What a block gave in the last run."""
        return self._outputs[block]

    def _keep(self, index: int) -> None:
        if [_version(output) for output in self._outputs] != self._versions:
            return  # a later part of the model wrote into what a block gave
        size = sum(tensor.nbytes for output in self._outputs for tensor in _tensors(output))
        if size <= self.room:
            self.room -= size
            self._kept[index] = self._outputs

    def __enter__(self) -> PrefixRuns:
        self._stack = contextlib.ExitStack()
        self._stack.enter_context(self._in_place())
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()
        self._kept, self._outputs = [None] * len(self.batches), []

    @contextlib.contextmanager
    def _in_place(self) -> Iterator[None]:
        own = [vars(block).get("forward") for block in self.blocks]  # set by wrappers such as accelerate's
        for index, block in enumerate(self.blocks):
            block.forward = self._standing_in(index, block.forward)
        try:
            yield
        finally:
            for block, forward in zip(self.blocks, own, strict=True):
                del block.forward
                if forward is not None:
                    block.forward = forward

    def _standing_in(self, index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if index >= self._first:
                self._outputs[index] = real(*args, **kwargs)
                self._versions[index] = _version(self._outputs[index])
            return self._outputs[index]

        return forward


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, (tuple, list)):
        for part in output:
            yield from _tensors(part)


def _version(output: Any) -> int:
    """Grows when a tensor among a block's outputs is written in place."""
    return sum(tensor._version for tensor in _tensors(output))


def run_order(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> list[int] | None:
    """The order in which blocks run on a batch; None if one runs not at all or several times."""
    order: list[int] = []

    def hook_of(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            order.append(index)

        return hook

    handles = [block.register_forward_pre_hook(hook_of(index)) for index, block in enumerate(blocks)]
    try:
        with torch.no_grad():
            logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return order if sorted(order) == list(range(len(blocks))) else None
