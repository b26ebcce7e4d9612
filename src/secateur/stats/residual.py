"""How the blocks of a decoder read and write the residual stream, as one run shows it.

No names and no classes of any architecture: a norm is what the stream enters, a layer reads what the norm
gives, and a branch ends in the module whose output, added to the stream, is exactly the next state.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.core.units import Layout
from secateur.data.running import device_of, evaluating
from secateur.stats.catching import Call, hidden_of, run_safely
from secateur.structure.layers import layout_of
from secateur.structure.stacks import Stack, main_stack


@dataclass(frozen=True)
class Branch:
    """One addition to the stream; all are qualified names of modules.

    Attributes:
        norm: what the stream enters.
        readers: the linear layers that read what the norm gives.
        writer: the linear layer that makes what is added.
        host: the outermost module with the same output.
    """

    norm: str
    readers: tuple[str, ...]
    writer: str
    host: str


@dataclass(frozen=True)
class Residual:
    """The residual stream of a pre-norm decoder.

    Attributes:
        stack: its blocks.
        branches: of every block the two, in order.
        tables: the embeddings whose sum enters the first block.
        norm: what the last state enters.
        heads: the linear layers that read what that norm gives.
        width: features of the stream.
    """

    stack: Stack
    branches: tuple[tuple[Branch, Branch], ...]
    tables: tuple[str, ...]
    norm: str
    heads: tuple[str, ...]
    width: int


@dataclass(frozen=True)
class _Seen:
    """One module's call: its first floating-point input and its first output."""

    name: str
    module: nn.Module
    entered: Tensor | None
    left: Tensor | None

    @property
    def linear(self) -> bool:
        return layout_of(self.module) in (Layout.LINEAR, Layout.TRANSPOSED)

    @property
    def plain(self) -> bool:
        """A module without parts that is no layer with a weight matrix: a norm, or an activation."""
        return layout_of(self.module) is None and not any(self.module.children())


def find_residual(model: nn.Module, batch: Batch) -> Residual:
    """See how a decoder's blocks read and write the stream.

    Args:
        model: with its weights; it is left as it was.
        batch: a few tokens.

    Raises:
        ModelError: the blocks are not of the form h + attn(norm(h)), h + mlp(norm(h)); says where it differs.
    """
    stack = main_stack(model)
    calls = _watched_run(model, batch.to(device_of(model)))
    seen = {call.name: call for call in calls}
    missing = [name for name in stack.names if name not in seen or seen[name].left is None]
    if missing:
        raise ModelError(f"block '{missing[0]}' did not run on its own, so its residual stream cannot be followed")
    branches = tuple(_branches(name, seen) for name in stack.names)
    first, last = seen[stack.names[0]], seen[stack.names[-1]]
    assert first.entered is not None
    outside = [call for call in calls if not call.name.startswith(f"{stack.name}.")]
    tables = _tables(outside, first.entered, stack.names[0])
    norm, heads = _end(outside, last)
    return Residual(stack, branches, tables, norm, heads, first.entered.shape[-1])


def _watched_run(model: nn.Module, batch: Batch) -> list[_Seen]:
    """The calls of all modules in the order of their names, parents first; the last call of each."""
    found: dict[str, _Seen] = {}

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = Call.of(args, kwargs)
            found[name] = _Seen(name, module, None if call is None else call.hidden, hidden_of(output))

        return hook

    handles = [
        module.register_forward_hook(hook_of(name), with_kwargs=True) for name, module in model.named_modules() if name
    ]
    try:
        with evaluating(model):
            run_safely(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return [found[name] for name, _ in model.named_modules() if name in found]


def _branches(block: str, seen: dict[str, _Seen]) -> tuple[Branch, Branch]:
    inside = [call for name, call in seen.items() if name.startswith(f"{block}.")]
    x, out = seen[block].entered, seen[block].left
    assert x is not None
    assert out is not None
    first = [call for call in inside if call.plain and _shared(call.entered, x)]
    if len(first) != 1:
        raise ModelError(f"block '{block}' does not start with one norm that reads the stream; it is no pre-norm block")
    second = [
        (call, hosts)
        for call in inside
        if call.plain and call.entered is not None and (hosts := _adding(inside, x, call.entered))
    ]
    if not second:
        raise ModelError(
            f"block '{block}' has no second norm that reads the stream plus what attention adds; only blocks of the "
            "form h + attn(norm(h)), h + mlp(norm(h)) can be sliced, not parallel or post-norm ones"
        )
    middle, hosts = second[0]
    assert middle.entered is not None
    ends = _adding(inside, middle.entered, out)
    if not ends:
        raise ModelError(f"block '{block}' does not end in the stream plus the output of one module")
    return _branch(block, first[0], hosts, inside), _branch(block, middle, ends, inside)


def _adding(calls: list[_Seen], before: Tensor, after: Tensor) -> list[_Seen]:
    """The modules whose output is exactly what was added between two states, outermost first."""
    if before.numel() != after.numel():
        return []
    return [
        call
        for call in calls
        if call.left is not None
        and call.left.numel() == before.numel()
        and call.left.dtype == before.dtype
        and torch.equal(before.flatten() + call.left.flatten(), after.flatten())
    ]


def _branch(block: str, norm: _Seen, ends: list[_Seen], calls: list[_Seen]) -> Branch:
    """A branch from its norm and the modules that give what it adds; dropout may be one of them, and is passed by."""
    readers = _readers(calls, norm)
    writers = [call.name for call in ends if call.linear]
    if not readers or not writers:
        side = "reads the stream behind" if not readers else "writes to the stream behind"
        raise ModelError(f"block '{block}': no linear layer {side} '{norm.name}', so it cannot be sliced")
    writer = writers[0]
    host = next(call.name for call in ends if writer == call.name or writer.startswith(f"{call.name}."))
    return Branch(norm.name, readers, writer, host)


def _readers(calls: list[_Seen], norm: _Seen) -> tuple[str, ...]:
    return tuple(call.name for call in calls if call.linear and _shared(call.entered, norm.left))


def _shared(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two tensors are the same memory, perhaps seen in other shapes."""
    if one is None or other is None:
        return False
    return one.data_ptr() == other.data_ptr() and one.numel() == other.numel()


def _tables(calls: list[_Seen], entered: Tensor, block: str) -> tuple[str, ...]:
    found = [call for call in calls if isinstance(call.module, nn.Embedding) and call.left is not None]
    parts: Iterator[Tensor] = accumulate(call.left for call in found if call.left is not None)
    *_, total = [torch.zeros_like(entered), *parts]
    if total.shape != entered.shape or not torch.allclose(total, entered, rtol=1e-3, atol=1e-6):
        raise ModelError(f"what enters the block '{block}' is not the sum of embedding tables, so it cannot be sliced")
    return tuple(call.name for call in found)


def _end(calls: list[_Seen], last: _Seen) -> tuple[str, tuple[str, ...]]:
    norms = [call for call in calls if call.plain and _shared(call.entered, last.left)]
    heads = _readers(calls, norms[0]) if len(norms) == 1 else ()
    if not heads:
        raise ModelError(
            f"what the last block '{last.name}' returns does not go through one norm to linear heads; slicing needs a "
            "model with a head, such as ...ForCausalLM"
        )
    return norms[0].name, heads
