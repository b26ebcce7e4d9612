"""How much experts are used: counts of tokens and sums of routing shares."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Usage:
    """Of the experts of one router, over all tokens seen.

    Args:
        experts: how many there are.
        chosen: how many of them a token takes.

    Attributes:
        tokens: how many were seen.
        frequency: float64 `[experts]`, tokens that took the expert.
        activation: float64 `[experts]`, sum of its shares; the shares of a token's experts add up to 1.
    """

    def __init__(self, experts: int, chosen: int) -> None:
        self.chosen, self.tokens = chosen, 0
        self.frequency = torch.zeros(experts, dtype=torch.float64)
        self.activation = torch.zeros(experts, dtype=torch.float64)

    def update(self, logits: Tensor) -> None:
        """Take in the router's logits `[..., experts]`."""
        best, places = logits.detach().float().softmax(-1).flatten(0, -2).topk(self.chosen, -1)
        shares = (best / best.sum(-1, keepdim=True)).double().flatten().cpu()
        index = places.flatten().cpu()
        self.tokens += len(best)
        self.frequency.index_add_(0, index, torch.ones_like(shares))
        self.activation.index_add_(0, index, shares)


@contextlib.contextmanager
def watching(model: nn.Module, usage: Mapping[str, Usage]) -> Iterator[None]:
    """What routers score inside the block is counted.

    Args:
        model: runs inside the block.
        usage: name of a router, a module with `weight` `[experts, features]` -> its counts.
    """

    def counter(found: Usage) -> Any:
        def count(gate: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(gate.weight, Tensor)
            found.update(F.linear(args[0], gate.weight, getattr(gate, "bias", None)))

        return count

    handles = [model.get_submodule(name).register_forward_pre_hook(counter(found)) for name, found in usage.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
