"""LLM-Pruner (Ma, Fang, Wang 2023, NeurIPS, arXiv 2305.11627): coupled heads and neurons by first-order Taylor.

Groups are those of the structure engine: an attention head with its rows of q, k, v and its columns of o
(whole key/value groups where queries share them), a neuron with its gate and up rows and its down column.
A weight's salience is `param_first` w g, `param_second` w^2 a, or `param_mix` w g - w^2 a / 2, with g the
gradient of the mean loss of all sequences as one batch and a = mean over sequences of the squared gradient
of each. Element form: absolute values, then summed over the rest of the row or column; `vectorize` sums
first. The numbers of a group's matrices are combined by `combine`. From every group the share
`sparsity` goes, in the blocks [first, last) only: the first and last blocks are the dearest (default: all
but the first tenth and the last sixteenth, as the paper's blocks 4-29 of 32).

The published code folds the longer query vector onto the keys by modulo where queries share keys, which
mixes heads; here query head h belongs to key/value head h // repeats. Recovery by LoRA is the caller's.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core import tags as t
from secateur.core.method import Decision, Group, Method, Protocol, Task
from secateur.core.units import Site, UnitKind
from secateur.scores.groups import Combine, group_scores
from secateur.scores.saliences import Reduce, Salience, along, weight_saliences
from secateur.shrink.structured import StructuredSettings, View, decide, weight_places
from secateur.structure.stacks import block_of, blocks_between, main_stack


class LLMPrunerSettings(StructuredSettings):
    """LLM-Pruner's settings."""

    salience: Salience = Field(Salience.FIRST, description="param_first, param_second or param_mix")
    reduce: Reduce = Field(Reduce.ELEMENT, description="absolute values first (element) or sums first (vectorize)")
    combine: Combine = Field(Combine.SUM, description="how a group's matrices become one score")
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")
    first: int | None = Field(None, ge=0, description="first block to prune, 0-based; default: a tenth of the blocks")
    last: int | None = Field(None, ge=1, description="block to stop before; default: all but a sixteenth")


def saliences(view: View, settings: LLMPrunerSettings) -> dict[str, Tensor]:
    """One score per head and neuron."""
    chosen, task = weight_places(view), view.task
    names = sorted({name for name, _ in chosen})
    terms = weight_saliences(view.model, task.batches, names, settings.salience, task.progress)
    return group_scores(view.sites, along(terms, chosen, settings.reduce), settings.combine)


def in_blocks(model: nn.Module, settings: LLMPrunerSettings) -> list[str]:
    """The names of the blocks that are pruned.

    Raises:
        BudgetError: the range holds no block.
    """
    stack = main_stack(model)
    count = len(stack.blocks)
    first = round(count / 10) if settings.first is None else settings.first
    last = count - round(count / 16) if settings.last is None else settings.last
    return blocks_between(stack, first, last)


def plan(task: Task, settings: LLMPrunerSettings) -> Decision:
    """Gradients of a few sequences, one score per coupled group, the same share from each."""
    blocks = in_blocks(task.model, settings)

    def inside(site: Site) -> bool:
        return block_of(site, blocks) is not None

    with torch.no_grad():
        return decide(task, settings, lambda view: saliences(view, settings), inside)


method = Method(
    name="llm_pruner",
    paper="B3",
    title="LLM-Pruner: on the structural pruning of large language models",
    citation="Ma, Fang, Wang 2023, NeurIPS, arXiv 2305.11627",
    formula="S_g = sum over the group's matrices of sum |w * dL/dw|, lowest heads and neurons of every block go",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LOSS_CHANGE, t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.HEAD, t.Granularity.NEURON}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.LLM}),
        physical=True,
        post_training=True,
    ),
    settings=LLMPrunerSettings,
    run=plan,
    units=UnitKind.HEAD,
    exact=Group.SITE,
    needs_data=True,
    needs_labels=False,
    structured=True,
)
