"""GBLM-Pruner: gradients of single samples beside activations (Das, Sun, Ma, Shen 2023, arXiv 2311.04902).

S_ij = |W_ij| * ||X_j||_2 + |W_ij| * ||alpha * g_ij||_p, the p-norm taken over samples: g_ij is the gradient of one
sequence's mean next-token loss, dense model, so that signs do not cancel as they would in the gradient of their sum. In
the loss's expansion g dw + dw H dw / 2 the first-order term of one sample is not zero, although that of all is nearly.
From every output row the floor(inputs * sparsity) lowest go, block by block as in Wanda: activations come from the
pruned blocks before, gradients from the dense model once. Defaults from the official code (alpha = 100, p = 1).

The norm is a sum over samples, the activation term a mean: how they balance depends on the number of sequences, 128 in
the paper; `normalise` keeps the published balance. The official code stores the 1-norm in float16, where it overflows,
and stops at a gradient of zeros; here everything is float32, and such a layer goes by its activations alone. Padding
has no part in the loss. One more float32 tensor per pruned weight is held (on disk where the run has a work folder).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.rows import choose_in_layer
from secateur.core import tags as t
from secateur.core.distributed import share, total_count
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.units import UnitKind
from secateur.data.batches import split_batch
from secateur.scores import weights as score
from secateur.stats.backward import Aggregate, GradientSums, gradient_walk
from secateur.stats.layerwise import Choice, layerwise
from secateur.stats.listeners import SecondMoment
from secateur.structure.layers import WeightLayer

TINY = 1e-8  # the official code's, where gradients divide
BALANCE = (0.01, 100.0)  # outside of which one of the two terms does nothing
PAPER_SAMPLES = 128


class Mode(StrEnum):
    """Which terms the score has."""

    GBLM = "gblm"
    GRADIENT = "gradient"


class Normalise(StrEnum):
    """Whether the gradient's norm grows with the number of samples."""

    NONE = "none"
    PAPER128 = "paper128"


class GBLMSettings(Settings):
    """GBLM-Pruner's settings; defaults from the official code."""

    p: int = Field(1, ge=1, le=2, description="norm over samples: 1 = sum |g|, 2 = sqrt(sum g^2)")
    alpha: float = Field(100.0, gt=0, description="factor of the gradients inside the norm")
    mode: Mode = Field(Mode.GBLM, description="both terms (gblm), or the gradient's alone (gradient)")
    inverse: bool = Field(False, description="ablation: divide by the gradient's norm instead")
    normalise: Normalise = Field(
        Normalise.NONE,
        description="paper128: balance the terms as with the paper's 128 sequences, whatever their number",
    )
    samples: int = Field(0, ge=0, description="calibration sequences that gradients are taken of; 0 = all")
    variant: bool = Field(False, description="rows get their own sparsity by cumulative score, as in Wanda's variant")


def plan(task: Task, settings: GBLMSettings) -> Decision:
    """Gradients of the dense model, then Wanda's walk with the gradient's term beside the activations'."""
    norms = gradient_norms(task, settings)
    budget = task.budget.of(UnitKind.WEIGHT)

    def decide(layer: WeightLayer, stat: SecondMoment) -> Choice:
        W = layer.matrix
        # no table: one of several experts in one tensor; said below as for any layer without a gradient
        G = norms[layer.name].to(W.device) if layer.name in norms else torch.zeros_like(W, dtype=torch.float32)
        terms = Terms(W, stat.value, G)
        scores, warnings = terms.scores(settings, layer.name)
        keep = choose_in_layer(scores, budget, layer.name, variant=settings.variant)
        if keep.all() and budget.amount > 0:
            warnings.append(f"layer '{layer.name}' has too few inputs for this sparsity: nothing was pruned")
        return Choice(keep, scores=scores, facts=terms.facts(), warnings=warnings)

    decision = layerwise(task, SecondMoment, decide)
    if settings.mode is Mode.GBLM:
        decision.warnings += unbalanced(decision.facts)
    return decision


@dataclass(frozen=True)
class _Norms(Mapping[str, Tensor]):
    """Layer -> ||alpha * g||_p over samples, `[O, I]`, made when it is asked for."""

    sums: Mapping[str, Tensor]
    p: int
    factor: float

    def __getitem__(self, name: str) -> Tensor:
        value = self.sums[name]
        return self.factor * (value if self.p == 1 else value.sqrt())

    def __iter__(self) -> Iterator[str]:
        return iter(self.sums)

    def __len__(self) -> int:
        return len(self.sums)


def gradient_norms(task: Task, settings: GBLMSettings) -> _Norms:
    """One backward pass through the dense model for every sample."""
    chosen = [one for batch in task.batches for one in split_batch(batch)]
    if settings.samples:
        chosen = chosen[: _own_part(settings.samples)]
    kind = Aggregate.ABSOLUTE if settings.p == 1 else Aggregate.SQUARES
    section = gradient_walk(
        replace(task, batches=chosen), "gradients", lambda layer: GradientSums(layer.site.matrix_shape, [kind])
    )
    factor = settings.alpha
    if settings.normalise is Normalise.PAPER128:
        factor *= (PAPER_SAMPLES / total_count(len(chosen))) ** (1 / settings.p)
    return _Norms(section.tensors(kind.value), settings.p, factor)


def _own_part(samples: int) -> int:
    """How many of the job's samples are this process's."""
    rank, processes = share()
    return samples * (rank + 1) // processes - samples * rank // processes


@dataclass(frozen=True)
class Terms:
    """What one layer's score is made of.

    Attributes:
        W: weight `[O, I]`.
        moment: mean square of every input `[I]`.
        G: norm of the gradients over samples `[O, I]`.
    """

    W: Tensor
    moment: Tensor
    G: Tensor

    def scores(self, settings: GBLMSettings, name: str) -> tuple[Tensor, list[str]]:
        """`[O, I]` float32, and what is to be said about it."""
        activation = score.wanda(self.W, self.moment)
        if not self.G.any():
            if self.moment.any():
                return activation, [f"layer '{name}' has no gradient on this data: pruned by its activations alone"]
            return score.magnitude(self.W), [f"layer '{name}' saw neither input nor gradient: pruned by magnitude"]
        weight = score.magnitude(self.W)
        first = activation if settings.mode is Mode.GBLM else weight
        if settings.inverse:
            return first * (1 / (self.G + TINY)), []
        gradient = weight * self.G
        return activation + gradient if settings.mode is Mode.GBLM else gradient, []

    def facts(self) -> dict[str, float]:
        """The gradient's term over the activation's: their median over the weights whose input is not always zero."""
        alive = self.moment > 0
        if not alive.any() or not self.G.any():
            return {}
        return {"gradient_to_activation": (self.G[:, alive] / self.moment[alive].sqrt()).median().item()}


def unbalanced(facts: Mapping[str, Mapping[str, float]]) -> list[str]:
    """A sentence for each of the terms that outweighs the other so far that it alone decides."""
    ratios = {name: values["gradient_to_activation"] for name, values in facts.items() if values}
    low, high = BALANCE
    sides = {
        f"below {low:g}, so that activations alone decide; raise alpha": [n for n, r in ratios.items() if r < low],
        f"above {high:g}, so that gradients alone decide; lower alpha": [n for n, r in ratios.items() if r > high],
    }
    return [
        f"the gradient term is {side} (median ratio {ratios[names[0]]:.3g} in '{names[0]}', {len(names)} of "
        f"{len(ratios)} layers)"
        for side, names in sides.items()
        if names
    ]


method = Method(
    name="gblm",
    paper="08",
    title="Beyond Size: How Gradients Shape Pruning Decisions in Large Language Models",
    citation="Das, Sun, Ma, Shen 2023, arXiv 2311.04902",
    formula="S_ij = |W_ij| * (||X_j||_2 + ||alpha * g_ij||_p over samples), lowest per output row",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED, t.Speedup.SEMI_STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.SENSITIVITY_SALIENCY, t.Criterion.ACTIVATION, t.Criterion.LOSS_CHANGE}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.LLM, t.Domain.VIT}),
        post_training=True,
    ),
    settings=GBLMSettings,
    run=plan,
    streams=True,
    units=UnitKind.WEIGHT,
    exact=Group.ROW,
    needs_data=True,
    patterns=True,
)
