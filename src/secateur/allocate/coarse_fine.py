"""A parameter budget split between whole blocks and the heads and neurons of the blocks that stay.

Reconstruction of COMP's budget (Xu et al. 2025), and the exact form of AMP's rounding: what whole heads miss of a
block's share is made up for by neurons, counted in parameters. All functions are pure.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor

from secateur.allocate.structured import Counts
from secateur.core.errors import BudgetError


def nearest(amount: float) -> int:
    """The nearest whole number, halves up."""
    return floor(amount + 0.5 + 1e-9)


def whole_blocks(removed: float, share: float, sizes: Sequence[int], total: int) -> int:
    """Blocks to remove: the nearest number to `share * removed` of them, and no more than the budget has room for.

    Args:
        removed: fraction of all parameters that goes.
        share: part of that which whole blocks are to make up.
        sizes: parameters of every block.
        total: parameters of the model.
    """
    count = nearest(share * removed * len(sizes))
    while count and count * max(sizes) > removed * total:
        count -= 1
    return count


@dataclass(frozen=True)
class Part:
    """Units of one site in a block.

    Attributes:
        units: how many.
        cost: parameters that go with one.
        large: rounded first; the others make up for what that misses.
    """

    units: int
    cost: float
    large: bool

    @property
    def parameters(self) -> float:
        """Of all units."""
        return self.units * self.cost


def cut_share(goal: float, blocks: Sequence[Mapping[str, Part]]) -> float:
    """c: the same share of the parameters of every block's units that makes up `goal` parameters.

    Raises:
        BudgetError: the units do not hold so many.
    """
    there = sum(part.parameters for parts in blocks for part in parts.values())
    if goal > 0 and goal >= there:
        raise BudgetError(
            f"{goal:.0f} parameters would have to go from the heads and neurons of the blocks that stay, which hold "
            f"{there:.0f}: a block would be empty; lower the sparsity or remove more whole blocks (depth_share)"
        )
    return max(0.0, goal / there) if there else 0.0


def even_counts(share: float, blocks: Sequence[Mapping[str, Part]]) -> Counts:
    """Kept units when every block loses `share` of its units' parameters.

    Heads lose the nearest number to their share, at least one stays; neurons make up for the difference.

    Raises:
        BudgetError: a site would lose all of its units; names it.
    """
    kept: Counts = {}
    for parts in blocks:
        due = share * sum(part.parameters for part in parts.values())
        for name in (name for name, part in parts.items() if part.large):
            part = parts[name]
            gone = min(nearest(share * part.units), part.units - 1)
            kept[name], due = part.units - gone, due - gone * part.cost
        rest = {name: part for name, part in parts.items() if not part.large}
        left = due / sum(part.parameters for part in rest.values()) if rest else 0.0
        kept |= {name: part.units - max(0, nearest(left * part.units)) for name, part in rest.items()}
    for name, count in kept.items():
        if count < 1:
            raise BudgetError(f"'{name}' would lose all of its units; lower the sparsity or remove more whole blocks")
    return kept
