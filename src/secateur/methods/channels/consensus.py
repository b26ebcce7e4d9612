"""A consensus sub-network learned in one training (Zhi, Babbar, Liu, Sun, Silavong, Shi, Moran 2023).

Every residual block gets a small gate that looks at the block's input and decides per sample:

    p = sigmoid(W2 relu(W1 pool(x))),  g = 1[p > 1/2] with dg/dp := 1,  y = g F(x) + (1 - g) x
    L = L_task + activation L_act + ramp(t) polarisation L_pol,  gbar = mean of g over the batch
    L_act = sum_l w_l gbar_l  or  (sum_l w_l gbar_l - target)^2,  L_pol = mean_l gbar_l (1 - gbar_l)

L_act closes gates, L_pol makes all samples agree; when they do, each gate is a constant: block l stays iff its mean
gate exceeds 1/2, the others go from their list (the identity remains), and so do all gates. With `mode=channel` the
gate has one output for each channel between two layers of the block, g multiplies that channel where the next layer
reads it (after norm and ReLU), and closed channels are cut out; every layer keeps one at least.

RECONSTRUCTED: there is no official code and the tables of the paper's versions differ. The gate's shape, its
start (open: last bias +1.5) and the weights are ours. L_pol rises linearly from 0: at a constant weight it holds
every gate open that starts open, and nothing is pruned.

Sparsity 0 leaves the amount to the weight `activation`, as in the paper; a sparsity above 0 is the share of gates (or
of what they cost) that L_act aims to close. The consensus decides, so it is aimed at, not met exactly; what was
reached is in the plan. During training everything is computed: only the static network is faster.
Gates have blocks of convolutions whose shortcut is the identity and that stand in a list inside the model. They form
the optimiser's last group, without weight decay: make learning rate schedulers after attaching.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core import tags as t
from secateur.core.distributed import agreed
from secateur.core.errors import BudgetError, DataError, ModelError
from secateur.core.method import Batch, Decision, Group, Method, Protocol, Settings, matches
from secateur.core.units import Site, UnitKind
from secateur.data.batches import forward
from secateur.data.running import evaluating
from secateur.gates.polarisation import activation_loss, agreement_loss, consensus
from secateur.gates.pooled import PooledGate
from secateur.structure.analysis import Structure, analyse
from secateur.train.extra import Extra
from secateur.train.gated import (
    Costs,
    Gated,
    block_channels,
    cost_of_block,
    cost_of_channel,
    gateable,
    inner_channels,
    out_dim,
)
from secateur.train.part import Part
from secateur.train.sparsifier import Order, Sparsifier

SMALLEST_BATCH = 16  # agreement within fewer samples says little; within one it is always complete
DISSENT = 0.05  # share of samples against the majority above which there is no consensus


class Mode(StrEnum):
    """What a gate opens: its block, or the channels inside of it."""

    LAYER = "layer"
    CHANNEL = "channel"


class ConsensusSettings(Settings):
    """Settings; reconstructed where the paper is silent."""

    mode: Mode = Field(Mode.LAYER, description="remove whole blocks (layer) or channels inside of them (channel)")
    blocks: tuple[str, ...] = Field(("*",), description="shell patterns over the names of blocks that get gates")
    hidden: int = Field(16, ge=1, description="hidden units of a gate")
    bias: float = Field(1.5, description="last bias of a gate at the start; positive = open")
    activation: float | None = Field(
        None,
        ge=0,
        description="weight of the open gates in the loss; default 0.3, of channels 3, towards a sparsity 10",
    )
    polarisation: float | None = Field(
        None,
        ge=0,
        description="weight of the disagreement in the end; default 10/3 of activation, towards a sparsity 1 of it",
    )
    ramp: bool = Field(True, description="raise that weight linearly from 0; constant keeps all gates open")
    costs: Costs = Field(Costs.EQUAL, description="all gates alike, or by the parameters or FLOPs behind them")
    tail: float = Field(0.1, gt=0, le=1, description="share of the training, at its end, whose gates decide")

    def weights(self, aims: bool) -> tuple[float, float]:
        """Of the activation and of the full agreement loss; `aims`: whether a share of open gates is aimed at.

        Both losses are means over gates, so one gate of many channels feels little of them; and the pull towards an
        aim vanishes near it.
        """
        plain = 10.0 if aims else 3.0 if self.mode is Mode.CHANNEL else 0.3
        activation = plain if self.activation is None else self.activation
        ratio = 1.0 if aims else 10 / 3
        return activation, activation * ratio if self.polarisation is None else self.polarisation


def find_gated(model: nn.Module, structure: Structure, order: Order, settings: ConsensusSettings) -> list[Gated]:
    """Everything that gets a gate.

    Raises:
        ModelError: there is nothing.
    """
    blocks = [
        name
        for name in gateable(model, structure)
        if matches(name, settings.blocks) and matches(name, order.include, order.exclude)
    ]
    if settings.mode is Mode.LAYER:
        found = [Gated(name, name, cost=cost_of_block(model, structure, name, settings.costs)) for name in blocks]
    else:
        found = [
            Gated(site, block, structure.sites[site].units, readers, cost_of_channel(structure, site, settings.costs))
            for block in blocks
            for site, readers in inner_channels(model, structure, block).items()
            if all(matches(place.parameter, ("*",), order.exclude) for place in structure.sites[site].occurrences)
        ]
    if not found:
        raise ModelError(
            f"no block of {type(model).__name__} matches {', '.join(settings.blocks)} and adds convolutions to its "
            "unchanged input; gates need residual blocks of one shape in an nn.Sequential or nn.ModuleList inside the "
            "model" + (", with channels between their layers" if settings.mode is Mode.CHANNEL else "")
        )
    return found


# --- the training -----------------------------------------------------------------------------------


class ConsensusGates(Part):
    """Gates while the network trains, their penalty, and the consensus at the end.

    Attributes:
        gated: what has a gate, in the model's order.
        open: gates of the last batch, name -> `[samples, units]`.
    """

    has_penalty = True
    ready_at_end = True

    def __init__(self, settings: ConsensusSettings):
        self.settings = settings
        self.open: dict[str, Tensor] = {}
        self.hung: list[Callable[[], None]] = []

    def start(self, run: Sparsifier) -> None:
        """Find the blocks, hang gates on them, give their parameters to the optimiser."""
        structure = analyse(run.model, run.order.inputs(run.model))
        self.gated = find_gated(run.model, structure, run.order, self.settings)
        self.sites = {one.name: structure.sites[one.name] for one in self.gated if one.readers}
        self.least = {name: structure.minimums.get(name, 1) for name in self.sites}
        self.target = _target(run.order, self.gated)
        equal = self.settings.costs is Costs.EQUAL
        self.costs = None if equal else torch.tensor([one.cost for one in self.gated for _ in range(one.units)])
        self.counts, self.samples = torch.zeros(sum(one.units for one in self.gated), dtype=torch.float64), 0
        self.gates = {one.name: self._gate(run, one) for one in self.gated}
        self.extra = Extra(run.optimizer, [p for gate in self.gates.values() for p in gate.parameters()], run.model)
        self.hung = [self.extra.leave, *(handle.remove for one in self.gated for handle in self._hang(run.model, one))]

    def _gate(self, run: Sparsifier, one: Gated) -> PooledGate:
        block, own = run.model.get_submodule(one.block), self.settings
        first = next(block.parameters())
        gate = PooledGate(block_channels(block), one.units, own.hidden, own.bias, run.rng("gate", one.name))
        return gate.to(first.device, first.dtype)

    def _hang(self, model: nn.Module, one: Gated) -> list[Any]:
        block = model.get_submodule(one.block)
        if not one.readers:
            return [block.register_forward_hook(self._skipping(one.name))]
        readers = [model.get_submodule(name) for name in one.readers]
        return [
            block.register_forward_pre_hook(self._looking(one.name)),
            *(reader.register_forward_pre_hook(self._closing(one.name)) for reader in readers),
        ]

    def _skipping(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
        def hook(block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            self.open[name] = self.gates[name](args[0])
            g = self.open[name].view(-1, 1, 1, 1).to(output.dtype)
            return g * output + (1 - g) * args[0]

        return hook

    def _looking(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(block: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.open[name] = self.gates[name](args[0])

        return hook

    def _closing(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            g = self.open[name].to(args[0].dtype)
            return (args[0] * g.view(*g.shape, *[1] * (args[0].dim() - 2)), *args[1:])

        return hook

    def penalty(self, run: Sparsifier) -> Tensor:
        """The terms for open gates and for disagreement, of the batch just run.

        Raises:
            DataError: fewer than 16 samples.
            ModelError: a gated block did not run.
        """
        gates = self._batch()
        if len(gates) < SMALLEST_BATCH:
            raise DataError(
                f"{run.order.method} compares the samples of a batch and got {len(gates)}; "
                f"use batches of {SMALLEST_BATCH} or more (drop an incomplete last one)"
            )
        if run.steps - max(1, round(self.settings.tail * run.steps)) <= run.step < run.steps:
            self.counts += gates.detach().double().sum(0).cpu()
            self.samples += len(gates)
        activation, polarisation = self.settings.weights(self.target is not None)
        if self.settings.ramp:
            polarisation *= min(1.0, run.step / max(1, run.steps - 1))
        return activation * activation_loss(gates, self.costs, self.target) + polarisation * agreement_loss(gates)

    def _batch(self) -> Tensor:
        """`[samples, units of all gates]` of the last batch, which is then forgotten."""
        missing = [one.block for one in self.gated if one.name not in self.open]
        if missing:
            raise ModelError(f"the block '{missing[0]}' did not run in this batch; leave it out of `blocks`")
        gates = torch.cat([self.open[one.name] for one in self.gated], 1)
        self.open = {}
        return gates

    def before_step(self, run: Sparsifier) -> None:
        """Every process takes the same step."""
        self.extra.average()

    def gates_on(self, model: nn.Module, batches: Iterable[Batch]) -> Tensor:
        """`[samples, units of all gates]` in eval mode, before `finish`."""
        found = []
        with evaluating(model):
            for batch in batches:
                forward(model, batch)
                found.append(self._batch())
        return torch.cat(found)

    # --- the end, resuming ----------------------------------------------------------------------

    def finish(self, run: Sparsifier) -> None:
        """Take the gates off.

        Raises:
            BudgetError: training stopped too early.
        """
        if run.step < run.steps:
            raise BudgetError(
                f"training stopped after {run.step} of {run.steps} steps, before the gates had to agree; train on, "
                "or plan with fewer steps"
            )
        self.counts, self.samples = agreed((self.counts, self.samples))
        self._report(run)
        for one in self.gated:
            self._silence(run, one)

    def close(self, run: Sparsifier) -> None:
        """Gates come off."""
        for undo in self.hung:
            undo()

    @torch.no_grad()
    def _silence(self, run: Sparsifier, one: Gated) -> None:
        """A closed channel that stays only because one must: nothing reads it, as in the gated network."""
        if not one.readers:
            return
        idle = self._stay(run, one.name) & ~consensus(self.rates[one.name]).mask
        parameters = dict(run.model.named_parameters())
        for place in self.sites[one.name].occurrences if bool(idle.any()) else ():
            if out_dim(run.model, place.parameter) == 1 - place.dim:
                weight = parameters[place.parameter]
                weight.index_fill_(place.dim, idle.nonzero().flatten().to(weight.device), 0.0)

    def _stay(self, run: Sparsifier, name: str) -> Tensor:
        """The channels of a site that stay: those with a majority, and one at least."""
        rate = self.rates[name]
        return consensus(rate, min(len(rate), max(self.least[name], run.order.budget.floor))).mask

    @property
    def rates(self) -> dict[str, Tensor]:
        """Name -> `[units]`, the mean gates over the last part of the training; all open before it."""
        means = self.counts / self.samples if self.samples else torch.ones_like(self.counts)
        return dict(zip(self._names, torch.split(means, [one.units for one in self.gated]), strict=True))

    @property
    def _names(self) -> list[str]:
        return [one.name for one in self.gated]

    def _report(self, run: Sparsifier) -> None:
        rates, kept = self.rates, sum(int(consensus(rate).mask.sum()) for rate in self.rates.values())
        dissent = {name: float(torch.minimum(rate, 1 - rate).max()) for name, rate in rates.items()}
        worst = max(dissent, key=lambda name: dissent[name])
        if dissent[worst] > DISSENT:
            run.warn(
                f"no consensus: a gate of '{worst}' contradicted its majority for {100 * dissent[worst]:.1f} % of the "
                "samples, so the static network is another one than was trained; raise polarisation or fine-tune"
            )
        if kept in (0, len(self.counts)):
            change = "lower" if kept == 0 else "raise"
            run.warn(f"{kept} of {len(self.counts)} gates are open in the end; {change} activation for another amount")
        run.log.append({"step": run.step, "what": "consensus", "density": kept / len(self.counts)})

    def decision(self, run: Sparsifier) -> Decision:
        """Units whose mean gate exceeds 1/2 stay."""
        return self._channels(run) if self.sites else self._blocks(run)

    def _blocks(self, run: Sparsifier) -> Decision:
        """One site for every list of blocks."""
        found, rates = Decision(), {name: float(rate) for name, rate in self.rates.items()}
        for stack in dict.fromkeys(name.rpartition(".")[0] for name in rates):
            members = [f"{stack}.{leaf}" for leaf, _ in run.model.get_submodule(stack).named_children()]
            mine = {index: rates[name] for index, name in enumerate(members) if name in rates}
            least = max(0, run.order.budget.floor - (len(members) - len(mine)))
            stays = torch.ones(len(members), dtype=torch.bool)
            stays[list(mine)] = consensus(torch.tensor(list(mine.values())), min(least, len(mine))).mask
            found.sites[stack], found.masks[stack] = Site(stack, UnitKind.BLOCK, (len(members),)), stays
            found.facts[stack] = {f"open_{index}": round(u, 6) for index, u in mine.items()}
            found.facts[stack]["agreement"] = round(sum(max(u, 1 - u) for u in mine.values()) / len(mine), 6)
        return found

    def _channels(self, run: Sparsifier) -> Decision:
        """One site for the channels between two layers."""
        found = Decision(sites=dict(self.sites))
        for name, rate in self.rates.items():
            found.masks[name] = self._stay(run, name)
            kept, wanted = int(found.masks[name].sum()), int((rate > 0.5).sum())
            if kept > wanted:
                found.warnings.append(f"'{name}' was held at {kept} of {len(rate)} channels, {wanted} gates were open")
            agreement = torch.maximum(rate, 1 - rate).mean()
            found.facts[name] = {"open": round(float(rate.mean()), 6), "agreement": round(float(agreement), 6)}
        return found

    def state_dict(self) -> dict[str, Any]:
        """Gates, what the optimiser knows of them, the means so far."""
        return {"extra": self.extra.state_dict(), "counts": self.counts.clone(), "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.extra.load_state_dict(state["extra"])
        self.counts, self.samples = state["counts"].clone(), state["samples"]


def _target(order: Order, gated: Sequence[Gated]) -> float | None:
    """The open share to aim for; None leaves it to the weights."""
    budget, units = order.budget, sum(one.units for one in gated)
    keep = budget.of(UnitKind.CHANNEL if gated[0].readers else UnitKind.BLOCK).keep(units)
    if keep == 0:
        raise BudgetError(f"{order.method} cannot aim to close all gates; let one stay, or give sparsity 0 for no aim")
    return None if keep == units else keep / units


def make_parts(order: Order, settings: ConsensusSettings) -> Sequence[Part]:
    """One part does it all."""
    return [ConsensusGates(settings)]


method = Method(
    name="consensus",
    paper="03",
    title="Learning a consensus sub-network with polarization regularization and one pass training",
    citation="Zhi, Babbar, Liu, Sun, Silavong, Shi, Moran 2023, arXiv 2302.10798",
    formula="y = g F(x) + (1 - g) x; loss + a mean(gbar) + p mean(gbar (1 - gbar)), gbar = mean g; gbar > 1/2 stay",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.LEARNED}),
        granularity=frozenset({t.Granularity.LAYER, t.Granularity.BLOCK, t.Granularity.CHANNEL}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.LEARNED,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN}),
        learn=frozenset({t.Learn.SPARSITY_REGULARIZATION}),
        physical=True,
    ),
    settings=ConsensusSettings,
    parts=make_parts,
    units=UnitKind.BLOCK,
    exact=Group.AIM,
)
