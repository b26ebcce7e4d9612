"""Wanda: weights times activations (Sun, Liu, Bair, Kolter 2023, ICLR 2024, arXiv 2306.11695).

Score S_ij = |W_ij| * ||X_j||_2; in every output row the floor(inputs * sparsity) lowest go, ties to
the lower column. Block by block: statistics from the still dense block fed by the pruned blocks
before it. Defaults follow the paper (128 sequences there; here as many as the data gives).

Only linear and convolution weights inside the repeated blocks are pruned; embedding, head and patch
embedding are not. A model without repeated blocks is taken as one block. The official code reads
"2:4" as 2 *pruned* of 4; here a pattern names what is *kept*. The official image-classifier branch
feeds blocks from dense ones (`dense_chain`); by default pruned blocks feed the next one everywhere, as
in the paper.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.core import tags as t
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.select import keep_pattern, keep_top
from secateur.core.units import UnitKind
from secateur.scores import weights as score
from secateur.stats.listeners import SecondMoment
from secateur.stats.walker import Choice, layerwise
from secateur.structure.layers import WeightLayer


class Sequencing(StrEnum):
    """From which state of its block a layer's statistics are taken."""

    BLOCK = "block"
    PROJECTION = "projection"


class Compare(StrEnum):
    """Which weights compete with each other."""

    ROW = "row"
    LAYER = "layer"


class WandaSettings(Settings):
    """Wanda's settings; defaults from the paper."""

    compare: Compare = Field(Compare.ROW, description="weights compete per output row (paper) or per layer")
    sequencing: Sequencing = Field(
        Sequencing.BLOCK,
        description="statistics from the dense block, two passes (paper), or from the layers already pruned, one pass",
    )
    dense_chain: bool = Field(
        False, description="feed blocks from the dense blocks before them (the official image-classifier branch)"
    )
    variant: bool = Field(False, description="rows get their own sparsity by cumulative score, alpha bisected")


def plan(task: Task, settings: WandaSettings) -> Decision:
    """Walk the blocks, score, choose per row, write zeros, go on with the pruned block."""

    def decide(layer: WeightLayer, stat: SecondMoment) -> Choice:
        W, moment, warnings = layer.matrix, stat.value, []
        if not moment.any():
            warnings.append(f"layer '{layer.name}' saw no calibration input but zeros: pruned by magnitude")
            moment = torch.ones_like(moment)
        scores = score.wanda(W, moment)
        keep = choose(scores, task, settings, layer.name)
        if keep.all() and task.budget.amount > 0:
            warnings.append(f"layer '{layer.name}' has too few inputs for this sparsity: nothing was pruned")
        return Choice(keep, scores=scores, warnings=warnings)

    one_pass = settings.sequencing is Sequencing.PROJECTION
    return layerwise(task, SecondMoment, decide, one_pass=one_pass, dense=settings.dense_chain)


def choose(scores: Tensor, task: Task, settings: WandaSettings, name: str) -> Tensor:
    """Keep-mask `[out, in]` from the scores, by pattern, by row, by layer or by the variant's rule."""
    budget = task.budget.of(UnitKind.WEIGHT)
    rows, columns = scores.shape
    if budget.pattern:
        return keep_pattern(scores, budget.pattern, name)
    if settings.variant:
        return variant(scores, 1 - budget.keep(scores.numel()) / scores.numel())
    if settings.compare is Compare.LAYER:
        return keep_top(scores.reshape(-1), budget.keep(scores.numel())).view(rows, columns)
    return keep_top(scores, max(budget.keep(columns), min(budget.floor, columns)))


def variant(scores: Tensor, sparsity: float) -> Tensor:
    """Wanda's variant: a row loses its lowest scores up to a share alpha of the row's total score.

    alpha starts at 0.4 and is bisected within [0, 0.8] until the layer's sparsity is within 0.001 of
    the target or the interval is shorter than 0.001 (the official code's constants).
    """
    if sparsity == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    ordered = scores.sort(dim=1, stable=True).values
    cumulative = ordered.cumsum(1)
    low, high, alpha = 0.0, 0.8, 0.4
    while True:
        reached = (cumulative <= alpha * cumulative[:, -1:]).sum(1, keepdim=True)
        threshold = ordered.gather(1, (reached - 1).clamp(min=0))
        keep = scores > threshold
        found = 1 - keep.float().mean().item()
        if abs(found - sparsity) <= 1e-3 or high - low < 1e-3:
            return keep
        low, high = (alpha, high) if found < sparsity else (low, alpha)
        alpha = (low + high) / 2


method = Method(
    name="wanda",
    paper="B1",
    title="A simple and effective pruning approach for large language models",
    citation="Sun, Liu, Bair, Kolter 2023, ICLR 2024, arXiv 2306.11695",
    formula="S_ij = |W_ij| * ||X_j||_2, lowest per output row",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED, t.Speedup.SEMI_STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.SENSITIVITY_SALIENCY, t.Criterion.ACTIVATION}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM, t.Domain.VIT, t.Domain.CNN}),
        post_training=True,
    ),
    settings=WandaSettings,
    run=plan,
    units=UnitKind.WEIGHT,
    exact=Group.ROW,
    needs_data=True,
    patterns=True,
)
