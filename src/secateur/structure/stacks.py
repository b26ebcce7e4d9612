"""Stacks: lists of blocks that pass one hidden state along, found without per-model code."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import nn

from secateur.core.errors import BudgetError, ModelError
from secateur.core.units import Site
from secateur.structure.layers import layout_of


@dataclass(frozen=True)
class Stack:
    """A module list whose blocks run one after the other.

    Attributes:
        name: qualified name of the list; empty for a model that is taken as one block.
        blocks: its modules in order.
        leaves: what they are called in the list; their numbers if not given.
    """

    name: str
    blocks: tuple[nn.Module, ...]
    leaves: tuple[str, ...] = ()

    @classmethod
    def of(cls, name: str, container: nn.Module) -> Stack:
        """The members of a module list or sequence, under the names that they have there."""
        members = dict(container.named_children())
        return cls(name, tuple(members.values()), tuple(members))

    def block_name(self, index: int) -> str:
        """Qualified name of one block."""
        if not self.name:
            return ""
        return f"{self.name}.{self.leaves[index] if self.leaves else index}"

    @property
    def names(self) -> tuple[str, ...]:
        """Qualified names of all blocks."""
        return tuple(self.block_name(index) for index in range(len(self.blocks)))


def find_stacks(model: nn.Module) -> list[Stack]:
    """All candidate stacks, outermost first in module order.

    A candidate is a ModuleList whose members all contain weight layers, or a Sequential of two or
    more blocks of one class; lists inside a block (experts, say) do not count. Whether a hidden
    state really flows through is seen only when the model runs (`stats.walker` checks it).
    """
    return list(_search(model, ""))


def _search(module: nn.Module, name: str) -> Iterator[Stack]:
    if name and _is_stack(module):
        yield Stack.of(name, module)
        return
    for child_name, child in module.named_children():
        yield from _search(child, f"{name}.{child_name}" if name else child_name)


def _is_stack(module: nn.Module) -> bool:
    blocks = list(module.children())
    if not blocks or not all(map(_is_block, blocks)):
        return False
    if isinstance(module, nn.ModuleList):
        return True
    return isinstance(module, nn.Sequential) and len(blocks) > 1 and len({type(block) for block in blocks}) == 1


def _is_block(module: nn.Module) -> bool:
    if layout_of(module) is not None or isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    return any(layout_of(part) is not None for part in module.modules())


def main_stack(model: nn.Module) -> Stack:
    """The stack with the most parameters: the one that depth pruning works on.

    Raises:
        ModelError: the model has no stack.
    """
    stacks = find_stacks(model)
    if not stacks:
        raise ModelError(f"{type(model).__name__} has no list of blocks that could be removed")
    return max(stacks, key=lambda stack: sum(p.numel() for block in stack.blocks for p in block.parameters()))


def block_of(site: Site, blocks: Sequence[str]) -> str | None:
    """The one of the named blocks that everything which is cut with a site's units lies in; None if there is none."""
    for block in blocks:
        if all(place.parameter.startswith(f"{block}.") for place in site.occurrences):
            return block
    return None


def blocks_between(stack: Stack, first: int, last: int) -> list[str]:
    """Names of the blocks `first`, ..., `last` - 1.

    Raises:
        BudgetError: there is none.
    """
    if not 0 <= first < last <= len(stack.blocks):
        raise BudgetError(
            f"first={first} and last={last} name no block of '{stack.name}', which has {len(stack.blocks)}"
        )
    return list(stack.names[first:last])
