"""Blocks left out of the chain for a while: what a walk sees of a shortened model whose blocks keep their names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn

from secateur.stats.catching import Call


@contextlib.contextmanager
def bypassed(blocks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, these blocks hand on the hidden state that they got.

    They are still run, so that what they return has its usual form and models that are streamed need no other
    walk; that costs their share of the computing.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        call = Call.of(args, kwargs)
        assert call is not None  # a stack's blocks were seen to get a hidden state
        return call.hidden if isinstance(output, Tensor) else type(output)((call.hidden, *output[1:]))

    handles = [block.register_forward_hook(hook, with_kwargs=True) for block in blocks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
