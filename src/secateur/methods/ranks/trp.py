"""Trained Rank Pruning (Xu, Li, Zhang, Wen, Wang, Dai, Qi, Chen, Lin, Xiong 2018, IJCAI 2020, arXiv 2004.14566).

A network that is factorised after training loses much, since small errors in weights add up. Here weights become
low-rank while they are trained: before every m-th step each convolution's weight, seen as a matrix M = U S V^T, is
*replaced* by

    U_r S_r V_r^T,  r the fewest values with  sum_{j<=r} s_j^2 >= e sum_j s_j^2

and that step works on it, with lambda U_r V_r^T (a subgradient of lambda ||M||_*) added to the gradient; the other
m - 1 steps are plain, with all parameters free. In the end layers are split in two without any fine-tuning.
All convolutions are trained so but 1 x 1 and grouped ones and the first of the network. Schemes as in `svd`.

Defaults: e = 0.9 and lambda = 3e-4 are the official ones. m is 1 in the official program, 5 in the official script,
which is ours, and 20 in the paper. The official code counts batches anew in every epoch; here they are optimiser steps
of the whole training. Momentum goes on pointing along directions that were cut, as in the official code.
In the end weights are truncated once more; then values of at least 0.05 stay (the others are about 1e-7), or in the
decoupled scheme 85 % of the energy. Absolute values depend on the weight decay: every layer keeps rank 1 at least,
and a layer that loses more than 10 % of its energy is named. A sparsity above 0 or a budget decides instead.

`reference=true` does what the official code does besides: no last truncation; at sparsity 0 strided layers stay whole
in the channel and spatial schemes, and all others below full rank are split even where two layers are larger than
one. Not taken over: a value rule that keeps nothing, failing decompositions that pass silently, biases that make it
stop.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from secateur.core import tags as t
from secateur.core.method import Decision, Group, Method, Protocol, Settings, matches
from secateur.core.units import Scheme, UnitKind
from secateur.data.running import evaluating
from secateur.scores.spectrum import Rule, Spectrum, ranks
from secateur.shrink.rank_budget import RankBudget
from secateur.shrink.ranks import RankLayers, undecided
from secateur.train.part import Part
from secateur.train.sharding import local, parted_like
from secateur.train.sparsifier import Order, Sparsifier

MOST = 0.1  # of a layer's energy may go at the final cut before the user is told
ENTRIES = 20  # of the log, in a whole training


class TRPSettings(Settings):
    """Settings; see above for where the defaults come from."""

    scheme: Scheme = Field(Scheme.CHANNEL, description="how weights are matrices: channel, spatial or decoupled")
    every: int = Field(5, ge=1, description="m: optimiser steps from one truncation to the next")
    energy: float = Field(
        0.9, gt=0, le=1, description="e: share of the squared singular values that a truncation keeps"
    )
    nuclear: float = Field(3e-4, ge=0, description="lambda: weight of the nuclear norm at truncations; 0: none")
    truncate: bool = Field(
        True,
        description="false: only the nuclear norm acts, as a control, along what a truncation would keep (energy=1 and "
        "every=1: along all directions at every step, as the official program without truncation)",
    )
    first: bool = Field(False, description="the network's first convolution too")
    rule: Rule | None = Field(
        None, description="at sparsity 0, what stays in the end; default: value, decoupled energy"
    )
    amount: float | None = Field(None, gt=0, description="how much of it; default: 0.05 of value, 0.85 of energy")
    reference: bool = Field(False, description="the official end; at sparsity 0 strided layers stay whole")

    @property
    def ending(self) -> tuple[Rule, float]:
        """What stays in the end at sparsity 0."""
        rule = self.rule or (Rule.ENERGY if self.scheme is Scheme.DECOUPLED else Rule.VALUE)
        return rule, self.amount or (0.05 if rule is Rule.VALUE else 0.85)

    @model_validator(mode="after")
    def _possible(self) -> Self:
        rule, amount = self.ending
        rule.checked(amount)
        return self


class TrainedRanks(Part):
    """Truncates weights every few steps, and splits layers in the end.

    Attributes:
        layers: what is trained so.
        directions: layer -> U_r V_r^T of the last truncation, while its step is not yet done.
    """

    ready_at_end = True

    def __init__(self, settings: TRPSettings):
        self.settings = settings
        self.directions: dict[str, Tensor] = {}
        self.truncated_at = -1  # a resumed run must not truncate again what it finds truncated

    def start(self, run: Sparsifier) -> None:
        """Find the layers; refuse now what could not be met in the end.

        Raises:
            ModelError: there is no convolution to train so.
            BudgetError: out of reach; gives the reachable range.
        """
        order, spared = run.order, "" if self.settings.first else _first(run.model)

        def wants(name: str) -> bool:
            return matches(name, order.include, order.exclude) and name != f"{spared}.weight"

        self.layers = RankLayers.find(run.model, self.settings.scheme, wants, linear=False)
        if not undecided(order.budget):
            self._counts(run, self._spectra(run))

    def _spectra(self, run: Sparsifier) -> dict[str, Spectrum]:
        return {
            name: Spectrum.of(run.weight(f"{name}.weight"), layer.scheme, name)
            for name, layer in self.layers.layers.items()
        }

    def _near(self, spectra: Mapping[str, Spectrum]) -> dict[str, Spectrum]:
        """The spectra of truncated weights."""
        share = self.settings.energy
        return {name: found.cut(ranks(found.values, Rule.ENERGY, share)) for name, found in spectra.items()}

    # --- the training ---------------------------------------------------------------------------

    def before_batch(self, run: Sparsifier) -> None:
        """Every m-th time: write truncated weights, keep the subgradients for the backward pass to come."""
        if run.step % self.settings.every or run.step >= run.steps or run.step == self.truncated_at:
            return
        near = self._near(self._spectra(run))
        if self.settings.truncate:
            self._write(run, near)
        if self.settings.nuclear:
            dtypes = {name: run.masks.parameters[f"{name}.weight"].dtype for name in near}
            self.directions = {name: found.direction.to(dtypes[name]) for name, found in near.items()}
        self.truncated_at = run.step
        self._note(run, near)

    @torch.no_grad()
    def _write(self, run: Sparsifier, near: Mapping[str, Spectrum]) -> None:
        for name, found in near.items():
            weight = run.masks.parameters[f"{name}.weight"]
            local(weight).copy_(parted_like(found.weight.to(weight.dtype), weight))

    def _note(self, run: Sparsifier, near: Mapping[str, Spectrum]) -> None:
        """A line in the log at the first truncation of every twentieth of the training."""
        part = run.steps / ENTRIES
        if run.step == 0 or int(run.step / part) > int((run.step - self.settings.every) / part):
            found = {name: int((one.values > 0).sum(1).max()) for name, one in near.items()}
            run.log.append({"step": run.step, "what": "truncation", "density": self._share(found), "ranks": found})

    def _share(self, counts: Mapping[str, int]) -> float:
        layers = self.layers.layers
        return sum(counts[name] for name in layers) / sum(layer.full for layer in layers.values())

    @torch.no_grad()
    def after_backward(self, run: Sparsifier) -> None:
        """Add the nuclear norm's part to the gradients, at truncations only."""
        for name, direction in self.directions.items():
            gradient = run.masks.parameters[f"{name}.weight"].grad
            if gradient is not None:
                local(gradient).add_(parted_like(direction.to(gradient.dtype), gradient), alpha=self.settings.nuclear)

    def after_step(self, run: Sparsifier) -> None:
        """The next steps are plain ones."""
        self.directions = {}

    # --- the end --------------------------------------------------------------------------------

    def finish(self, run: Sparsifier) -> None:
        """One last truncation; note and warn of what the cut loses."""
        before = self._spectra(run)
        if self.settings.truncate and not self.settings.reference:
            self._write(run, self._near(before))
        after = self._spectra(run)
        counts = self._counts(run, after)
        run.log.append({"step": run.step, "what": "ranks", "density": self._share(counts), "ranks": dict(counts)})
        if not undecided(run.order.budget) and (missed := self._asked(run, after).missed(counts)):
            run.warn(missed)
        for name, found in before.items():
            whole = float(found.values.square().sum())
            lost = 1 - float(after[name].values[:, : counts[name]].square().sum()) / whole if whole else 0.0
            if lost > MOST + 1e-6:
                run.warn(
                    f"'{name}' loses {100 * lost:.1f} % of its energy at rank {counts[name]} in the end; lower "
                    "amount, the sparsity or the weight decay, or fine-tune"
                )

    def _asked(self, run: Sparsifier, spectra: Mapping[str, Spectrum]) -> RankBudget:
        with evaluating(run.model):
            return RankBudget.of(self.layers, spectra, run.order.budget, lambda: run.order.inputs(run.model))

    def _counts(self, run: Sparsifier, spectra: Mapping[str, Spectrum]) -> dict[str, int]:
        if not undecided(run.order.budget):
            return self._asked(run, spectra).counts(near=False)
        if not self.settings.reference:
            return self.layers.by_rule(spectra, *self.settings.ending)
        found = {name: one.rank(*self.settings.ending) for name, one in spectra.items()}
        decoupled = self.settings.scheme is Scheme.DECOUPLED
        whole = {n: one.full for n, one in self.layers.layers.items() if not (decoupled or _unit_stride(one.module))}
        return found | whole

    def decision(self, run: Sparsifier) -> Decision:
        """The layers as two, at the ranks that the weights of now have or the budget allows."""
        spectra = self._spectra(run)
        return self.layers.decision(spectra, self._counts(run, spectra), keep_scores=True)

    # --- resuming -------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The subgradients of a truncation whose step is still to come."""
        return {"directions": dict(self.directions), "truncated_at": self.truncated_at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.directions, self.truncated_at = dict(state["directions"]), state["truncated_at"]


def _first(model: nn.Module) -> str:
    """Name of the first convolution that is not 1 x 1; empty if there is none."""
    convolutions = ((n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d))
    return next((name for name, module in convolutions if module.kernel_size != (1, 1)), "")


def _unit_stride(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.stride == (1, 1)


def make_parts(order: Order, settings: TRPSettings) -> Sequence[Part]:
    """One part does it all."""
    return [TrainedRanks(settings)]


method = Method(
    name="trp",
    paper="37",
    title="Trained Rank Pruning for Efficient Deep Neural Networks",
    citation="Xu, Li, Zhang, Wen, Wang, Dai, Qi, Chen, Lin, Xiong 2020, IJCAI, arXiv 2004.14566",
    formula="every m steps W <- U_r S_r V_r^T (energy e), gradient + lambda U_r V_r^T; layers end as two",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.RANK}),
        granularity=frozenset({t.Granularity.RANK, t.Granularity.MATRIX}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_FREE,  # of the score: singular values
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN}),
        learn=frozenset({t.Learn.SPARSITY_REGULARIZATION}),
        fusion=frozenset({t.Fusion.TENSOR_DECOMPOSITION}),
        physical=True,
    ),
    settings=TRPSettings,
    parts=make_parts,
    units=UnitKind.RANK,
    exact=Group.COST,
)
