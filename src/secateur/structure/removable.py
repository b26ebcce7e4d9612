"""Residual blocks that can be taken out of their lists, and which of them stand next to a change of resolution."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from secateur.core.method import Batch
from secateur.data.batches import run
from secateur.data.running import device_of, evaluating
from secateur.structure.analysis import Structure
from secateur.structure.layers import CONVOLUTIONS
from secateur.structure.stacks import Stack

Resolution = tuple[int, ...]


@dataclass(frozen=True)
class Removable:
    """One list of blocks.

    Attributes:
        stack: the list with all its members.
        free: indices of the members that can go.
    """

    stack: Stack
    free: tuple[int, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of the blocks that can go."""
        return tuple(self.stack.block_name(index) for index in self.free)


def residual_blocks(model: nn.Module, structure: Structure) -> list[str]:
    """Blocks that add what they compute to their unchanged input, in the model's order.

    They stand in lists inside the model, from which they can be taken out; blocks inside of blocks are left alone.
    """
    found = {name for names in structure.blocks.values() for name in names}
    ordered: list[str] = []
    for name, block in model.named_modules():
        stack = name.rpartition(".")[0]
        listed = bool(stack) and isinstance(model.get_submodule(stack), (nn.Sequential, nn.ModuleList))
        inside = any(name.startswith(f"{outer}.") for outer in ordered)
        if name in found and listed and not inside and not isinstance(block, nn.Sequential):
            ordered.append(name)
    return ordered


def removable(
    model: nn.Module,
    structure: Structure,
    example: Batch,
    *,
    strict: bool = True,
    wants: Callable[[str], bool] = lambda name: True,
) -> list[Removable]:
    """Every list that holds residual blocks, and which of these may go.

    Args:
        model: any module; it is run once on the example.
        structure: of that model.
        example: inputs to see resolutions with.
        strict: spare the neighbours of a change of resolution. Members that change it are no residual blocks
            and never go; neighbours are the blocks that run directly before and after, also in another list.
        wants: filter over block names.
    """
    blocks = residual_blocks(model, structure)
    names = dict.fromkeys(block.rpartition(".")[0] for block in blocks)
    stacks = [Stack.of(name, model.get_submodule(name)) for name in names]
    spared = next_to_turns(model, example, [name for stack in stacks for name in stack.names]) if strict else set()
    free = {name for name in blocks if name not in spared and wants(name)}
    return [Removable(one, tuple(i for i, name in enumerate(one.names) if name in free)) for one in stacks]


def next_to_turns(model: nn.Module, example: Batch, names: Sequence[str]) -> set[str]:
    """Modules that run directly before or after a change of resolution, as one run shows it.

    Args:
        model: what is run.
        example: its inputs.
        names: modules that follow each other, such as the members of all stages.
    """
    runs = _resolutions(model, example, names)
    turning = {name for name, before, after in runs if before != after}
    found: set[str] = set()
    for (first, _, leaving), (second, entering, _) in pairwise(runs):
        if turning & {first, second} or leaving != entering:
            found |= {first, second}
    return found - turning


def _resolutions(model: nn.Module, example: Batch, names: Sequence[str]) -> list[tuple[str, Resolution, Resolution]]:
    """(module, resolution of its input, of its output) in the order in which they end."""
    found: list[tuple[str, Resolution, Resolution]] = []

    def listening(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            ends = _first((*args, *kwargs.values())), _first(output if isinstance(output, tuple) else (output,))
            if ends[0] is not None and ends[1] is not None:
                found.append((name, _resolution(module, ends[0]), _resolution(module, ends[1])))

        return hook

    handles = [model.get_submodule(name).register_forward_hook(listening(name), with_kwargs=True) for name in names]
    try:
        with evaluating(model):
            run(model, example.to(device_of(model)))
    finally:
        for handle in handles:
            handle.remove()
    return found


def _first(items: Sequence[Any]) -> Tensor | None:
    return next((item for item in items if isinstance(item, Tensor)), None)


def channels_first(module: nn.Module) -> bool:
    """Whether a block's states are `[samples, channels, ...]`, as convolutions take them, or have features last."""
    return any(isinstance(part, CONVOLUTIONS) for part in module.modules())


def _resolution(module: nn.Module, state: Tensor) -> Resolution:
    """Everything of a state's shape but samples and channels."""
    return tuple(state.shape[2:] if channels_first(module) else state.shape[1:-1])
