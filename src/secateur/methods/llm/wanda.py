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

from secateur.allocate.rows import Compare, choose_in_layer
from secateur.core import tags as t
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.units import UnitKind
from secateur.scores import weights as score
from secateur.stats.layerwise import Choice, layerwise
from secateur.stats.listeners import SecondMoment
from secateur.structure.layers import WeightLayer


class Sequencing(StrEnum):
    """From which state of its block a layer's statistics are taken."""

    BLOCK = "block"
    PROJECTION = "projection"


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
    budget = task.budget.of(UnitKind.WEIGHT)

    def decide(layer: WeightLayer, stat: SecondMoment) -> Choice:
        W, moment, warnings = layer.matrix, stat.value, []
        if not moment.any():
            warnings.append(f"layer '{layer.name}' saw no calibration input but zeros: pruned by magnitude")
            moment = torch.ones_like(moment)
        scores = score.wanda(W, moment)
        keep = choose_in_layer(scores, budget, layer.name, compare=settings.compare, variant=settings.variant)
        if keep.all() and task.budget.amount > 0:
            warnings.append(f"layer '{layer.name}' has too few inputs for this sparsity: nothing was pruned")
        return Choice(keep, scores=scores, warnings=warnings)

    one_pass = settings.sequencing is Sequencing.PROJECTION
    return layerwise(task, SecondMoment, decide, one_pass=one_pass, dense=settings.dense_chain)


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
    streams=True,
    units=UnitKind.WEIGHT,
    exact=Group.ROW,
    needs_data=True,
    patterns=True,
)
