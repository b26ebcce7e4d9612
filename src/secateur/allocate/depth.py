"""How many whole blocks a budget removes, and the decision that removes chosen ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from secateur.allocate.structured import Scope, Widths, choose_units
from secateur.core.budget import COSTS, Budget, Quantity
from secateur.core.errors import BudgetError
from secateur.core.method import Decision, Task
from secateur.core.units import Site, UnitKind
from secateur.structure.stacks import Stack


def blocks_to_remove(task: Task, stack: Stack, method: str, least: int = 1) -> int:
    """Blocks that the budget removes from a stack.

    Args:
        task: gives the budget.
        stack: the blocks.
        method: what the errors call the method.
        least: blocks that must stay.

    Raises:
        BudgetError: the sparsity removes none, or leaves fewer than `least` (gives the reachable fractions); the budget
            counts something else than blocks.
    """
    blocks = len(stack.blocks)
    budget = task.budget.of(UnitKind.BLOCK)
    if budget.pattern:
        raise BudgetError(f"{method} removes blocks; an N:M pattern does not apply to it")
    if budget.quantity in COSTS | {Quantity.PARAMETERS}:
        raise BudgetError(f"{method} removes whole blocks and takes no {budget}; give a share of the blocks")
    remove = blocks - max(budget.keep(blocks), budget.floor)
    most = blocks - least
    if (remove == 0 and budget.amount > 0) or remove > most:
        raise BudgetError(
            f"{budget} of {blocks} blocks in '{stack.name}' removes {remove}; "
            f"reachable: sparsity {1 / blocks:.4g} (1 block) to {most / blocks:.4g} ({most} blocks)"
        )
    return remove


def depth_decision(task: Task, stack: Stack, keep: Tensor, scores: Tensor, facts: dict[str, float]) -> Decision:
    """The decision to keep the blocks in `keep`, bool `[blocks]`; warns where the first or the last one goes.

    Raises:
        BudgetError: an excluded block would go.
    """
    gone = [index for index in range(len(keep)) if not keep[index]]
    protected = [stack.names[index] for index in gone if not task.wants(stack.names[index])]
    if protected:
        raise BudgetError(f"{len(gone)} of {len(keep)} blocks cannot go without the excluded '{protected[0]}'")
    decision = Decision(sites={stack.name: block_site(stack)}, masks={stack.name: keep})
    decision.facts[stack.name] = facts
    if task.keep_scores:
        decision.scores[stack.name] = scores
    decision.warnings = [
        f"block '{stack.names[index]}' is the {word} one; removing it is usually costly"
        for index, word in ((0, "first"), (len(keep) - 1, "last"))
        if index in gone
    ]
    return decision


def block_site(stack: Stack) -> Site:
    """The site of a list of blocks, each worth its own parameters."""
    cost = tuple(sum(p.numel() for p in block.parameters()) for block in stack.blocks)
    return Site(stack.name, UnitKind.BLOCK, (len(stack.blocks),), cost=cost)


def keep_without(
    scores: Mapping[str, Tensor], sites: Mapping[str, Site], remove: int, widths: Widths
) -> dict[str, Tensor]:
    """Keep-masks without the `remove` lowest units of one ranking over all sites; of equal ones the earlier goes.

    Where a site is at its least, the next lowest unit of another one goes.

    Args:
        scores: site -> `[units]`; infinite where a unit should stay as long as any other can go.
        sites: the same names.
        remove: units that go.
        widths: what each site keeps at least.
    """
    total = sum(site.units for site in sites.values())
    return choose_units(sites, scores, Budget(remove / total), replace(widths, scope=Scope.GLOBAL))
