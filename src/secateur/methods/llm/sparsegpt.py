"""SparseGPT: one-shot pruning with weight update (Frantar, Alistarh 2023, ICML, arXiv 2301.00774).

Per layer min ||W X - What X||^2: columns from left to right, the error of every zeroed weight is
pushed onto the columns ahead through the Cholesky factor of the inverse Hessian. The mask of each
block of 128 columns is chosen from weights that already carry the compensation.

Kept weights change, so the result is not a mask on the original weights. Default: exactly
floor(sparsity * size) weights of a layer go, spread evenly over its column blocks; `reference` keeps
the official code's `<=` at rank int(size * sparsity), which prunes one more in each block. The
official code's `invert`, `prune_only`, `minlayer` and `maxlayer` are the include/exclude patterns.
Hessians are float32, factorised in float64 on CPU (the official code: float32). Convolutions work on
unfolded patches, which the official code leaves unfinished; grouped ones are refused.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.core import tags as t
from secateur.core.errors import BudgetError, NumericsError
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.select import keep_pattern, keep_top
from secateur.core.units import UnitKind
from secateur.recover.obs import InverseFactor, MaskRule, inverse_factor, sweep
from secateur.recover.quantise import minmax_grid
from secateur.stats.layerwise import Choice, layerwise
from secateur.stats.listeners import Hessian
from secateur.structure.layers import WeightLayer


class Compare(StrEnum):
    """Which weights of a block of columns compete with each other."""

    BLOCK = "block"
    ROW = "row"


class SparseGPTSettings(Settings):
    """SparseGPT's settings; defaults from the official code."""

    blocksize: int = Field(128, ge=1, description="columns whose mask is chosen together and updated lazily")
    percdamp: float = Field(0.01, gt=0, description="damping as a fraction of the Hessian's mean diagonal")
    compare: Compare = Field(
        Compare.BLOCK, description="weights compete over all rows of a block (official) or within each row of it"
    )
    true_sequential: bool = Field(
        False, description="decide projections one after the other, each seeing the pruned ones before it, in one pass"
    )
    wbits: int = Field(16, ge=2, le=16, description="below 16: also round kept weights to this many bits per weight")
    reference: bool = Field(False, description="the official code's count per block: one weight more")


def plan(task: Task, settings: SparseGPTSettings) -> Decision:
    """Walk the blocks; factorise each input's Hessian once; sweep every layer that reads it."""
    latest: list[tuple[Hessian, InverseFactor]] = []  # layers that share an input come one after the other

    def decide(layer: WeightLayer, stat: Hessian) -> Choice:
        W = layer.matrix
        if not latest or latest[0][0] is not stat:
            latest[:] = [(stat, _factorised(stat, layer.name, settings))]
        factor, warnings = latest[0][1], []
        if factor.damping > settings.percdamp:
            raised = f"the Hessian is singular, damping raised to {factor.damping:g}"
            warnings.append(f"layer '{layer.name}': {raised}")
        rule, ahead = mask_rule(task, settings, W, layer.name)
        quantise = minmax_grid(W, settings.wbits) if settings.wbits < 16 else None
        solved = sweep(W, factor, rule, width=settings.blocksize, lookahead=ahead, quantise=quantise)
        facts = {"error": solved.error, "damping": factor.damping}
        return Choice(solved.keep, solved.weight, facts=facts, warnings=warnings)

    return layerwise(task, Hessian, decide, one_pass=settings.true_sequential)


def _factorised(stat: Hessian, name: str, settings: SparseGPTSettings) -> InverseFactor:
    try:
        return inverse_factor(stat.value, settings.percdamp)
    except NumericsError as error:
        raise NumericsError(f"layer '{name}': {error}") from error


def mask_rule(task: Task, settings: SparseGPTSettings, W: Tensor, name: str) -> tuple[MaskRule, int | None]:
    """The rule that `obs.sweep` asks for masks, and how many columns it decides at once.

    Saliency of a weight is w^2 / U_ii^2 (equation 4's error on the remaining columns).
    """
    budget = task.budget.of(UnitKind.WEIGHT)
    columns = W.shape[1]
    if budget.pattern:
        pattern = budget.pattern
        if settings.blocksize % pattern.of:
            raise BudgetError(f"blocksize {settings.blocksize} is no multiple of {pattern.of}; change --set blocksize")
        keep_pattern(W[:1], pattern, name)  # refuses widths that do not divide

        def n_of_m(ahead: Tensor, diagonal: Tensor) -> Tensor:
            return keep_pattern(_saliency(ahead, diagonal), pattern, name)

        return n_of_m, pattern.of
    if settings.reference:
        return _reference_rule(budget.sparsity), None
    remove = W.numel() - budget.keep(W.numel())
    if settings.compare is Compare.ROW:
        return _even_share(columns - budget.keep(columns), columns, per_row=True), None
    return _even_share(remove, columns, per_row=False), None


def _saliency(W: Tensor, diagonal: Tensor) -> Tensor:
    return W.square() / diagonal.square()


def _even_share(remove: int, columns: int, per_row: bool) -> MaskRule:
    """Each block of columns loses its share; running totals are rounded down, so the sum is exact."""
    seen = done = 0

    def rule(ahead: Tensor, diagonal: Tensor) -> Tensor:
        nonlocal seen, done
        seen += ahead.shape[1]
        due = remove * seen // columns
        scores = _saliency(ahead, diagonal)
        scores = scores if per_row else scores.reshape(1, -1)
        keep = keep_top(scores, scores.shape[1] - (due - done))
        done = due
        return keep.view(ahead.shape)

    return rule


def _reference_rule(sparsity: float) -> MaskRule:
    def rule(ahead: Tensor, diagonal: Tensor) -> Tensor:
        scores = _saliency(ahead, diagonal)
        threshold = torch.sort(scores.flatten()).values[int(scores.numel() * sparsity)]
        return scores > threshold

    return rule


method = Method(
    name="sparsegpt",
    paper="B2",
    title="SparseGPT: massive language models can be accurately pruned in one-shot",
    citation="Frantar, Alistarh 2023, ICML, arXiv 2301.00774",
    formula="prune lowest w_ij^2 / U_jj^2, then W[:, j:] -= (w_j - q_j) / U_jj * U[j, j:], with H^-1 = U^T U",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED, t.Speedup.SEMI_STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LOSS_CHANGE, t.Criterion.ACTIVATION}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM, t.Domain.VIT, t.Domain.CNN}),
        fusion=frozenset({t.Fusion.QUANTIZATION}),
        post_training=True,
    ),
    settings=SparseGPTSettings,
    run=plan,
    streams=True,
    units=UnitKind.WEIGHT,
    exact=Group.SITE,
    needs_data=True,
    patterns=True,
    changes_weights=True,
)
