"""SynFlow: pruning without data (Tanaka, Kunin, Yamins, Ganguli 2020, NeurIPS, arXiv 2006.05467).

Before training: R = 1^T (prod_l |W_l|) 1, the output for an input of ones with absolute weights,
S = |dR/dw * w|. One ranking over all layers in 100 rounds, round k keeping the share density ** (k / 100), with new
scores each time. Because every layer's scores add up to R, a layer that shrinks gets larger scores per
weight: no layer is emptied before the budget forces it.

The official code lets biases and running statistics take part by their absolute values (`reference`); the
paper's R has none, and neither has the default: biases 0, norms by their gains only. Needed are inputs of the
right shape, not data; of token ids the embeddings become 1. The theory asks for ReLU-like activations; where
others saturate, or where attention is uniform, weights have no flow and a warning says so.
"""

from __future__ import annotations

from pydantic import Field

from secateur.allocate.spread import choose_in_rounds
from secateur.core import tags as t
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.units import UnitKind
from secateur.data.example import example_for
from secateur.scores.flow import SYNFLOW_ROUNDS, synaptic_flow
from secateur.structure.sites import weight_layers


class SynflowSettings(Settings):
    """Settings of SynFlow."""

    rounds: int = Field(SYNFLOW_ROUNDS, ge=1, description="rounds of pruning; 1 is one-shot")
    reference: bool = Field(False, description="as the official code: biases and running statistics take part")

    @property
    def uses_example(self) -> bool:
        """The shape of the inputs is all it needs."""
        return True


def plan(task: Task, settings: SynflowSettings) -> Decision:
    """Score, cut a little, score again."""
    found = weight_layers(task.model, task.wants)
    example = example_for(task.model, task.example)
    score = synaptic_flow(task.model, example, list(found.layers), settings.reference)
    budget = task.budget.of(UnitKind.WEIGHT)
    masks, scores = choose_in_rounds(score, found.sites, budget, settings.rounds, task.progress)
    decision = Decision(sites=found.sites, masks=masks, scores=dict(scores) if task.keep_scores else {})
    decision.warnings = [f"'{name}' was not pruned: it {why}" for name, why in found.skipped.items()]
    silent = [name for name, value in scores.items() if not value.any()]
    decision.warnings += [f"no synaptic flow reaches layer '{name}': its weights went first" for name in silent]
    return decision


method = Method(
    name="synflow",
    paper="42",
    title="Pruning neural networks without any data by iteratively conserving synaptic flow",
    citation="Tanaka, Kunin, Yamins, Ganguli 2020, NeurIPS, arXiv 2006.05467",
    formula="S = |dR/dw * w|, R = 1^T (prod |W_l|) 1, lowest over all layers together, in 100 rounds",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.BEFORE_TRAINING}),
        criterion=frozenset({t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.SCRATCH,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
    ),
    settings=SynflowSettings,
    run=plan,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
)
