"""How a model calls its blocks: one recorded call per batch and block, without running the blocks.

The blocks of a stack get arguments from the model around them (masks, positions, layer-specific
ones such as sliding windows). They are recorded by running the model once with its blocks replaced
by stand-ins that hand the hidden state through.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, ModelError, SecateurError
from secateur.core.method import Batch, Residency
from secateur.data.batches import run
from secateur.structure.stacks import Stack, find_stacks, main_stack

PROBE_TOKENS = 16


class _StackDoneError(Exception):
    """Ends a recording run once the last block has been called."""


@dataclass(frozen=True)
class Call:
    """The arguments of one block in one batch. `slot` says where the hidden state stands."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    slot: int | str

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call, with the first floating-point tensor as hidden state; None if there is none."""
        slots: list[tuple[int | str, Any]] = [*enumerate(args), *kwargs.items()]
        for slot, value in slots:
            if isinstance(value, Tensor) and value.is_floating_point():
                return cls(args, kwargs, slot)
        return None

    @property
    def hidden(self) -> Tensor:
        """The hidden state that enters the block."""
        value = self.args[self.slot] if isinstance(self.slot, int) else self.kwargs[self.slot]
        assert isinstance(value, Tensor)
        return value

    def with_hidden(self, hidden: Tensor) -> Call:
        """The same call on another hidden state."""
        if isinstance(self.slot, int):
            return replace(self, args=(*self.args[: self.slot], hidden, *self.args[self.slot + 1 :]))
        return replace(self, kwargs={**self.kwargs, self.slot: hidden})


def hidden_of(output: Any) -> Tensor | None:
    """The hidden state in a block's output: the tensor itself or a tuple's first."""
    if isinstance(output, (tuple, list)) and output:
        output = output[0]
    return output if isinstance(output, Tensor) else None


def run_safely(model: nn.Module, batch: Batch) -> Any:
    """Run the model and turn what it raises on unfit data into a sentence for the user."""
    try:
        return run(model, batch)
    except (_StackDoneError, SecateurError):
        raise
    except Exception as error:
        shapes = ", ".join(f"{list(t.shape)} {str(t.dtype).removeprefix('torch.')}" for t in batch.tensors)
        first = str(error).strip().splitlines()[0] if str(error).strip() else ""
        raise DataError(
            f"{type(model).__name__} cannot run on the data (inputs {shapes}): {type(error).__name__}: {first}"
        ) from error


@dataclass(frozen=True)
class _Flow:
    """What one real run showed: block outputs in order, and whether they feed each other."""

    outputs: tuple[Any, ...]
    chained: bool


def _observe_flow(model: nn.Module, stack: Stack, batch: Batch) -> _Flow:
    order: list[int] = []
    calls: dict[int, Call | None] = {}
    outputs: dict[int, Any] = {}

    def before(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            order.append(index)
            calls[index] = Call.of(args, kwargs)

        return hook

    def after(index: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            outputs[index] = output

        return hook

    handles = []
    for index, block in enumerate(stack.blocks):
        handles.append(block.register_forward_pre_hook(before(index), with_kwargs=True))
        handles.append(block.register_forward_hook(after(index)))
    try:
        run_safely(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    if order != list(range(len(stack.blocks))) or None in calls.values():
        return _Flow((), chained=False)
    hidden = [hidden_of(outputs[index]) for index in order]
    entered = [call.hidden for call in calls.values() if call is not None]
    links = zip(hidden[:-1], entered[1:], strict=True)
    chained = all(h is not None for h in hidden) and all(out is into for out, into in links)
    return _Flow(tuple(outputs[index] for index in order), chained)


def _probe_batch(batch: Batch) -> Batch:
    """One sample; of plain token ids the first few only, since just the wiring is looked at."""

    def cut(item: Any) -> Any:
        per_sample = isinstance(item, Tensor) and item.dim() > 0 and item.shape[0] == batch.samples
        return item[:1] if per_sample else item

    if len(batch.tensors) == 1 and batch.tensors[0].dtype == torch.int64 and batch.tensors[0].dim() == 2:

        def cut(item: Any) -> Any:
            return item[:1, :PROBE_TOKENS] if isinstance(item, Tensor) else item

    return Batch(tuple(map(cut, batch.args)), {key: cut(value) for key, value in batch.kwargs.items()})


@dataclass(frozen=True)
class WalkableStack:
    """A stack through which a hidden state was seen to flow."""

    stack: Stack
    outputs: tuple[Any, ...]  # of the probe run

    @property
    def stand_ins_suffice(self) -> bool:
        """Whether blocks give nothing but the hidden state, so that stand-ins can replace them."""
        return all(
            isinstance(out, Tensor) or not any(isinstance(extra, Tensor) for extra in out[1:]) for out in self.outputs
        )


def walkable_stacks(model: nn.Module, batch: Batch) -> list[WalkableStack]:
    """The model's stacks whose blocks feed each other, in module order; the model itself if none does.

    Raises:
        DataError: the model does not run on the batch.
    """
    found = []
    probe = _probe_batch(batch)
    for stack in find_stacks(model):
        flow = _observe_flow(model, stack, probe)
        if flow.chained:
            found.append(WalkableStack(stack, flow.outputs))
    return found or [WalkableStack(Stack("", (model,)), ())]


def streamed_stack(model: nn.Module, batch: Batch, residency: Residency) -> WalkableStack:
    """The main stack of a model whose weights come and go; its first block is run to see what blocks return.

    Raises:
        DataError: the model does not run on the batch.
        ModelError: something happens to the hidden state between the blocks.
    """
    stack = main_stack(model)
    through = WalkableStack(stack, tuple(torch.empty(0) for _ in stack.blocks))  # hands the tensor itself on
    with residency.outside(stack.names):
        calls = record_calls(model, through, [_probe_batch(batch).to(residency.device)])[0]
    if len(calls) != len(stack.blocks) or any(call.hidden is not calls[0].hidden for call in calls):
        raise ModelError(
            f"'{stack.name}': the model does not simply hand the state from block to block, so it cannot be streamed"
        )
    with residency.inside(stack.block_name(0)):
        output = stack.blocks[0](*calls[0].args, **calls[0].kwargs)
    if hidden_of(output) is None:
        raise ModelError(f"block '{stack.block_name(0)}' returns no hidden state")
    return WalkableStack(stack, tuple(output for _ in stack.blocks))


def record_calls(model: nn.Module, walkable: WalkableStack, batches: Sequence[Batch]) -> list[list[Call]]:
    """For each batch, the call of every block; hidden states of later blocks are placeholders.

    A model that is its own only block is called with the batch itself.
    """
    if not walkable.stack.name:
        return [[Call(batch.args, batch.kwargs, 0)] for batch in batches]
    recorded: list[list[Call]] = []
    with _recording(walkable, recorded):
        for batch in batches:
            recorded.append([])
            with contextlib.suppress(_StackDoneError):
                run_safely(model, batch)
    return recorded


@contextlib.contextmanager
def _recording(walkable: WalkableStack, recorded: list[list[Call]]) -> Iterator[None]:
    blocks = walkable.stack.blocks
    last = len(blocks) - 1

    def stand_in(index: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = Call.of(args, kwargs)
            assert call is not None
            recorded[-1].append(call)
            if index == last:
                raise _StackDoneError
            if not walkable.stand_ins_suffice:
                return real(*args, **kwargs)
            like = walkable.outputs[index]
            return call.hidden if isinstance(like, Tensor) else type(like)((call.hidden, *like[1:]))

        return forward

    own = [block.__dict__.get("forward") for block in blocks]  # set by wrappers such as accelerate's
    try:
        for index, block in enumerate(blocks):
            block.forward = stand_in(index, block.forward)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def run_rest(model: nn.Module, stack: Stack, batch: Batch, hidden: Tensor, like: Any) -> Any:
    """What the model returns on a batch when its last block gives `hidden`; the blocks themselves are not run.

    Args:
        model: any model with the stack.
        stack: its blocks.
        batch: the inputs that `hidden` came from.
        hidden: the state after the last block.
        like: what a block returns: a tensor, or a tuple that starts with one.
    """

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return hidden if isinstance(like, Tensor) else type(like)((hidden, *like[1:]))

    own = [vars(block).get("forward") for block in stack.blocks]
    try:
        for block in stack.blocks:
            vars(block)["forward"] = stand_in
        return run_safely(model, batch)
    finally:
        for block, forward in zip(stack.blocks, own, strict=True):
            del vars(block)["forward"]
            if forward is not None:
                vars(block)["forward"] = forward
