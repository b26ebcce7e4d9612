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

from secateur.allocate.depth import blocks_to_remove, depth_decision
from secateur.core import tags as t
from secateur.core.journal import Notes
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.select import keep_top
from secateur.core.units import UnitKind
from secateur.scores.blocks import angular, cosine
from secateur.stats.depth import block_flow
from secateur.stats.walker import BlockVisit, each_block
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
    remove = blocks_to_remove(task, stack, "shortgpt")
    influence, states = influences(task, stack)
    free = torch.tensor([task.wants(name) for name in stack.names])
    if settings.metric is Metric.COSINE:
        scores = torch.where(free, influence, torch.full_like(influence, torch.inf))
        keep = keep_top(scores, len(scores) - remove)
    else:
        keep = smallest_run(states, remove, free)
    facts = {f"influence_{i}": round(float(value), 6) for i, value in enumerate(influence)}
    return depth_decision(task, stack, keep, influence, facts)


def influences(task: Task, stack: Stack) -> tuple[Tensor, Tensor]:
    """Block influence `[blocks]` and the last token's states `[blocks + 1, samples, features]`."""

    def measure(visit: BlockVisit) -> Notes:
        if visit.stack.name != stack.name:
            return Notes()
        values, entering, leaving = [], [], []
        for before, after in block_flow(visit):
            values.append(cosine(before, after))
            entering.append(before[:, -1])
            leaving.append(after[:, -1])
        states = {"entering": torch.cat(entering)} if visit.index == 0 else {}
        return Notes({"influence": 1 - torch.cat(values).mean(), "leaving": torch.cat(leaving), **states})

    section = each_block(task, "block-influence", measure)
    found = [section[name].tensors for name in stack.names]
    influence = torch.stack([tensors["influence"] for tensors in found]).cpu()
    return influence, torch.stack([found[0]["entering"], *(tensors["leaving"] for tensors in found)])


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
    streams=True,
    units=UnitKind.BLOCK,
    exact=Group.SITE,
    needs_data=True,
)
