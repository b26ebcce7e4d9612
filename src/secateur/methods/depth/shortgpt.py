"""ShortGPT: remove whole blocks by block influence (Men et al. 2024, arXiv 2403.03853).

BI_l = 1 - mean over tokens of cos(h_l, h_l+1), the hidden state before and after block l of the dense
model; the n lowest go in one shot, n = floor(sparsity * blocks), and the rest is renumbered. The
`angular` variant (Gromov et al. 2024, arXiv 2403.17887) takes the n consecutive blocks with the
smallest arccos(cos) / pi between the states before and after the run, at the last token; the two give
other orders. ShortGPT's `gen` variant, which only skips blocks while reading the prompt, is a run-time
matter and not here. The first and last block are in none of the official lists: choosing one warns.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.core import tags as t
from secateur.core.errors import BudgetError, ModelError, NumericsError
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.select import keep_top
from secateur.core.units import Site, UnitKind
from secateur.scores.blocks import angular, cosine
from secateur.stats.walker import BlockWalk
from secateur.structure.stacks import Stack, main_stack


class Metric(StrEnum):
    """How similar two hidden states are."""

    COSINE = "cosine"
    ANGULAR = "angular"


class ShortGPTSettings(Settings):
    """ShortGPT's settings."""

    metric: Metric = Field(
        Metric.COSINE,
        description="cosine: block influence over all tokens (ShortGPT); angular: one run of blocks, last token",
    )


def plan(task: Task, settings: ShortGPTSettings) -> Decision:
    """Measure every block on the dense model, remove the least influential."""
    stack = main_stack(task.model)
    remove = how_many(task, stack)
    influence, states = influences(task, stack)
    site = Site(stack.name, UnitKind.BLOCK, (len(stack.blocks),), cost=_costs(stack))
    free = torch.tensor([task.wants(name) for name in stack.names])
    if settings.metric is Metric.COSINE:
        scores = torch.where(free, influence, torch.full_like(influence, torch.inf))
        keep = keep_top(scores, len(scores) - remove)
    else:
        keep = smallest_run(states, remove, free)
    gone = [index for index in range(len(keep)) if not keep[index]]
    protected = [stack.names[index] for index in gone if not free[index]]
    if protected:
        raise BudgetError(f"{remove} of {len(keep)} blocks cannot go without the excluded '{protected[0]}'")
    decision = Decision(sites={stack.name: site}, masks={stack.name: keep})
    decision.facts[stack.name] = {f"influence_{i}": round(float(value), 6) for i, value in enumerate(influence)}
    if task.keep_scores:
        decision.scores[stack.name] = influence
    decision.warnings = [
        f"block '{stack.names[index]}' is the {word} one; removing it is usually costly"
        for index, word in ((0, "first"), (len(keep) - 1, "last"))
        if index in gone
    ]
    return decision


def how_many(task: Task, stack: Stack) -> int:
    """Blocks to remove.

    Raises:
        BudgetError: the sparsity removes none or all; gives the reachable fractions.
    """
    blocks = len(stack.blocks)
    budget = task.budget.of(UnitKind.BLOCK)
    if budget.pattern:
        raise BudgetError("shortgpt removes blocks; an N:M pattern does not apply to it")
    remove = blocks - max(budget.keep(blocks), budget.floor)
    if (remove == 0 and budget.amount > 0) or remove >= blocks:
        raise BudgetError(
            f"{budget} of {blocks} blocks in '{stack.name}' removes {remove}; "
            f"reachable: sparsity {1 / blocks:.4g} (1 block) to {(blocks - 1) / blocks:.4g} ({blocks - 1} blocks)"
        )
    return remove


def influences(task: Task, stack: Stack) -> tuple[Tensor, Tensor]:
    """Block influence `[blocks]` and the last token's states `[blocks + 1, samples, features]`."""
    influence: list[Tensor] = []
    states: list[Tensor] = []
    with BlockWalk(task) as walk:
        for visit in walk:
            if visit.stack.name != stack.name:
                continue
            values, entering, leaving = [], [], []
            for before, after in visit.flow():
                if before.dim() != 3:
                    raise ModelError(
                        f"block '{visit.name}' passes on a state of shape {list(before.shape)}; block influence is "
                        "defined for [samples, tokens, features], as in transformers"
                    )
                if before.shape != after.shape:
                    raise ModelError(
                        f"block '{visit.name}' turns {list(before.shape)} into {list(after.shape)}; "
                        "blocks that change the shape cannot be removed"
                    )
                if not (torch.isfinite(before).all() and torch.isfinite(after).all()):
                    raise NumericsError(f"block '{visit.name}' gets or returns NaN or infinity on the calibration data")
                values.append(cosine(before, after))
                entering.append(before[:, -1])
                leaving.append(after[:, -1])
            if not states:
                states.append(torch.cat(entering))
            states.append(torch.cat(leaving))
            influence.append(1 - torch.cat(values).mean())
    return torch.stack(influence).cpu(), torch.stack(states)


def smallest_run(states: Tensor, length: int, free: Tensor) -> Tensor:
    """Keep-mask without the `length` consecutive blocks that turn the last token least.

    Runs of `free` blocks come first; only if there is none may a run hold others.
    """
    blocks = len(states) - 1
    keep = torch.ones(blocks, dtype=torch.bool)
    if length:
        distance = [angular(states[i], states[i + length]).mean().item() for i in range(blocks - length + 1)]
        start = min(range(len(distance)), key=lambda i: (not bool(free[i : i + length].all()), distance[i]))
        keep[start : start + length] = False
    return keep


def _costs(stack: Stack) -> tuple[int, ...]:
    return tuple(sum(p.numel() for p in block.parameters()) for block in stack.blocks)


method = Method(
    name="shortgpt",
    paper="B3",
    title="ShortGPT: layers in large language models are more redundant than you expect",
    citation="Men, Xu, Zhang, Wang, Lin, Lu, Han, Chen 2024, arXiv 2403.03853",
    formula="BI_l = 1 - mean cos(h_l, h_l+1), lowest blocks go",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.SIMILARITY}),
        granularity=frozenset({t.Granularity.LAYER, t.Granularity.BLOCK}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM, t.Domain.VIT, t.Domain.BERT}),
        physical=True,
        post_training=True,
    ),
    settings=ShortGPTSettings,
    run=plan,
    units=UnitKind.BLOCK,
    exact=Group.SITE,
    needs_data=True,
)
