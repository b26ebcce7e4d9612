"""SliceGPT (Ashkboos, Croci, do Nascimento, Hoefler, Hensman 2024, ICLR, arXiv 2401.15024): a narrower residual stream.

Scale and shift of every norm go into the layers that read it (for layer norms also the mean into the layers
that write), which leaves x / sqrt(sum x^2 / d + eps) with d the original width for ever. Such a norm commutes with
any orthogonal Q, so each stretch of the stream between two additions may have its own basis: with Q, Q' and Q''
around attention and MLP of a block,
    W_q,k,v <- W Q,   W_o <- Q'^T W,   W_gate,up <- W Q',   W_down <- Q''^T W,
    h <- h Q^T Q' + attn(norm(h)),   h <- h Q'^T Q'' + mlp(norm(h)).
Q are the principal axes of the stream (eigenvectors of sum x^T x in float64, damped by 0.01 of the mean diagonal,
padding left out), found block by block on what the blocks that were already sliced give; the last d - D axes go,
D = d - floor(s d), rounded down to a multiple of 8. The end of the last block keeps all d axes unless `slice_head`.
Two D x D shortcuts per block come on top and a tied head gets values of its own: what is saved is counted, not s.

The blocks are walked in their own basis with the state projected on the axes kept: the sliced model on the same
inputs, up to rounding. The published code subtracts the mean from the embeddings of RMS-norm models as well, sets
eps to 1e-5 and forms shortcuts in the model's dtype; here only layer-norm models lose the mean, eps stays, and
shortcuts are float64 products. Its `final_orientation` (random by default in the scripts) turns the D axes kept
among themselves and changes no output; `axes=random` is another matter: chance instead of PCA, the control.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor

from secateur.allocate.structured import target_of
from secateur.core import tags as t
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.core.journal import Notes
from secateur.core.method import Batch, Decision, Group, Method, Protocol, Settings, Task
from secateur.core.units import UnitKind
from secateur.data.batches import forward
from secateur.data.running import device_of
from secateur.shrink.narrow import Narrow, shortcut_name
from secateur.shrink.rotate import Weights, reading, rebuild_, table, writing
from secateur.shrink.verify import difference
from secateur.stats.principal import Axes, Project, Scatter, between, entering, projection, random_axes
from secateur.stats.residual import Branch
from secateur.stats.walker import BlockVisit, each_block

SECTION = "slicegpt"
VERIFIED = {torch.float64: 1e-4, torch.float32: 1e-3}  # relative: a rotated model rounds elsewhere
VERIFIED_HALF = 0.2


class Choice(StrEnum):
    """Principal or random."""

    PCA = "pca"
    RANDOM = "random"


class SliceGPTSettings(Settings):
    """SliceGPT's settings."""

    axes: Choice = Field(Choice.PCA, description="pca: the stream's principal axes; random: any axes, as a control")
    orientation: Choice = Field(
        Choice.PCA, description="random: turn the kept axes among themselves, as the released scripts do; same outputs"
    )
    multiple: int = Field(8, ge=1, description="round the kept width down to a multiple of this")
    slice_head: bool = Field(False, description="also slice what the last block gives and the head reads")


@dataclass(frozen=True)
class Slicing:
    """One run.

    Attributes:
        task, settings: what was asked for.
        narrow: the dense model and its stream.
        width: D, features kept.
    """

    task: Task
    settings: SliceGPTSettings
    narrow: Narrow
    width: int

    def slice_block(self, visit: BlockVisit) -> Notes:
        """Axes after attention and after the MLP, and the block's weights between them."""
        stream, width = self.narrow.stream, self.width
        if visit.stack.name != stream.stack.name:
            return Notes()
        last = visit.index == len(stream.branches) - 1
        first, second = stream.branches[visit.index]
        norm, host = (self.task.model.get_submodule(name) for name in (first.norm, first.host))
        entered = self._entered(visit)
        with entering(visit.module, self._project(entered)):
            middle = self._axes((run.inputs[second.norm] for run in visit.capture([second.norm])), visit.name, "middle")
            with between(norm, host, self._project(middle.basis)):
                left = self._axes((after for _, after in visit.flow()), visit.name, "left")
        bases = [
            entered[:, :width],
            middle.basis[:, :width],
            left.basis[:, : self.narrow.end(width) if last else width],
        ]
        notes = Notes({"entered": entered, "middle": middle.basis, "left": left.basis})
        for branch, before, after in zip((first, second), bases[:-1], bases[1:], strict=True):
            notes.tensors |= {f"weight/{name}": value for name, value in self._branch(branch, before, after).items()}
        notes.facts = {visit.name: {"middle": middle.share(width), "left": left.share(width)}}
        return notes

    def _entered(self, visit: BlockVisit) -> Tensor:
        """The basis in which the state comes in: of the embeddings, or as the block before gives it."""
        if visit.index:
            return self.task.journal.section(SECTION).tensor(visit.stack.block_name(visit.index - 1), "left")
        return self._axes((run.before for run in visit.capture()), visit.name, "entered").basis

    def _axes(self, states: Iterable[Tensor], *place: str) -> Axes:
        narrow, width = self.narrow, self.width
        scatter = Scatter(narrow.stream.width, narrow.centre)
        for batch, state in zip(self.task.batches, states, strict=True):
            scatter.add(state, batch.kwargs.get("attention_mask"))
        if self.settings.axes is Choice.RANDOM:
            found = random_axes(narrow.stream.width, self.task.rng("axes", *place), narrow.centre)
            found = Axes(found.basis, (found.basis * (scatter.matrix.cpu() @ found.basis)).sum(0))
        else:
            found = scatter.axes()
        if self.settings.orientation is Choice.RANDOM:
            turn = torch.randn(width, width, generator=self.task.rng("orientation", *place), dtype=torch.float64)
            kept = found.basis[:, :width] @ torch.linalg.qr(turn)[0].to(found.basis.device)
            found = Axes(torch.cat([kept, found.basis[:, width:]], 1), found.energy)
        return found

    def _project(self, basis: Tensor) -> Project:
        return projection(basis[:, : self.width], self.narrow.centre)

    def _branch(self, branch: Branch, before: Tensor, after: Tensor) -> Weights:
        """The weights of one branch that reads in the basis `before` and writes `after`, and its shortcut."""
        model = self.task.model
        found: Weights = {}
        for name in branch.readers:
            found |= reading(name, model.get_submodule(name), self.narrow.forms[branch.norm], before)
        found |= writing(branch.writer, model.get_submodule(branch.writer), after, self.narrow.centre)
        dtype = found[f"{branch.writer}.weight"].dtype
        return found | {shortcut_name(branch): (before.T @ after).to(dtype)}

    def outside(self, first: Tensor, last: Tensor) -> Weights:
        """Embedding tables in the first basis and heads in the last one."""
        model, narrow, stream = self.task.model, self.narrow, self.narrow.stream
        found: Weights = {}
        for name in stream.tables:
            found |= table(name, model.get_submodule(name), first[:, : self.width], narrow.centre)
        for name in stream.heads:
            basis = last[:, : narrow.end(self.width)]
            found |= reading(name, model.get_submodule(name), narrow.forms[stream.norm], basis)
        return found

    def decision(self, weights: Weights) -> Decision:
        """Everything at its new size; the mask says how many axes stay."""
        site, narrow = self.narrow.site(), self.narrow
        count, dense = narrow.parameters(self.width), sum(p.numel() for p in self.task.model.parameters())
        return Decision(
            sites={site.name: site},
            masks={site.name: torch.arange(site.units) < self.width},
            weights=weights,
            facts={site.name: {"parameters": count, "parameters_kept": round(count / dense, 6)}},
            warnings=[f"'{name}' was tied to the embeddings and got values of its own" for name in narrow.tied],
            additions=narrow.additions(self.width),
        )

    def verify(self, decision: Decision, batch: Batch) -> None:
        """The sliced model must give what the dense one gives when its stream is confined to the axes kept.

        Raises:
            ModelError: it does not: something else than the layers found reads or writes the stream.
        """
        model, batch = self.task.model, batch.to(device_of(self.task.model))
        with self._confined():
            expected = forward(model, batch)
        undo, _ = rebuild_(model, decision.weights, decision.additions)
        try:
            gap = difference(expected, forward(model, batch))
        except RuntimeError as error:  # the model's own code, with widths that it did not expect
            advice = "" if self.settings.slice_head else "; try slice_head=true (--set slice_head=true)"
            reason = str(error).splitlines()[0]
            raise ModelError(
                f"{type(model).__name__} does not run with a stream of {self.width} features ({reason}){advice}"
            ) from error
        finally:
            undo()
        if not gap <= VERIFIED.get(expected.dtype, VERIFIED_HALF):
            raise ModelError(
                f"{type(model).__name__} cannot be sliced: its blocks use the stream in a way that was not recognised "
                f"(largest difference {gap:.3g} to the dense model on the same axes)"
            )

    @contextlib.contextmanager
    def _confined(self) -> Iterator[None]:
        stream, notes = self.narrow.stream, self.task.journal.section(SECTION)
        with contextlib.ExitStack() as stack:
            for name, block, (first, _) in zip(stream.stack.names, stream.stack.blocks, stream.branches, strict=True):
                norm, host = (self.task.model.get_submodule(part) for part in (first.norm, first.host))
                stack.enter_context(entering(block, self._project(notes.tensor(name, "entered"))))
                stack.enter_context(between(norm, host, self._project(notes.tensor(name, "middle"))))
            if self.settings.slice_head:
                end = self._project(notes.tensor(stream.stack.names[-1], "left"))
                stack.enter_context(entering(self.task.model.get_submodule(stream.norm), end))
            yield


def kept_width(budget: Budget, narrow: Narrow, multiple: int) -> int:
    """D: the largest multiple within the budget; the whole width where nothing is asked to go.

    Raises:
        BudgetError: out of reach, or in something that is not counted here.
    """
    full, budget = narrow.stream.width, budget.of(UnitKind.EMBEDDING)
    if budget.quantity in (Quantity.SPARSITY, Quantity.DENSITY, Quantity.UNITS):
        kept = budget.keep(full)
        width = full if kept == full else kept - kept % multiple
    elif budget.quantity is Quantity.PARAMETERS:
        target = target_of(budget, sum(p.numel() for p in narrow.model.parameters()))
        fitting = [width for width in range(multiple, full + 1, multiple) if narrow.parameters(width) <= target]
        width = max(fitting, default=0)
    else:
        raise BudgetError(f"slicegpt meets a sparsity (share of the width) or a budget in parameters, not {budget}")
    if width < max(1, budget.floor):
        least = narrow.parameters(multiple)
        raise BudgetError(
            f"{budget} leaves {width} of {full} features; at least {max(multiple, budget.floor)} must stay, with "
            f"which the model has {least:,} parameters, shortcuts included"
        )
    return width


def plan(task: Task, settings: SliceGPTSettings) -> Decision:
    """Find the axes block by block, rotate, slice, and compare with the dense model confined to the same axes."""
    if task.residency is not None:
        raise SettingsError(
            "slicegpt gives all layers new shapes and needs the whole model in memory, not a stream of it"
        )
    assert task.example is not None  # structured methods get one
    narrow = Narrow.find(task.model, task.example, settings.slice_head)
    excluded = [place.parameter for place in narrow.site().occurrences if not _allowed(task, place.parameter)]
    if excluded:
        raise SettingsError(f"slicing changes all layers at the residual stream, so '{excluded[0]}' cannot be excluded")
    run = Slicing(task, settings, narrow, kept_width(task.budget, narrow, settings.multiple))
    section = each_block(task, SECTION, run.slice_block)
    names = narrow.stream.stack.names
    outside = run.outside(section.tensor(names[0], "entered"), section.tensor(names[-1], "left"))
    decision = run.decision({**section.tensors("weight"), **outside})
    least = min(share for name, shares in section.facts().items() if name in names for share in shares.values())
    decision.facts[next(iter(decision.sites))]["energy_kept"] = round(least, 6)
    run.verify(decision, task.example)
    return decision


def _allowed(task: Task, parameter: str) -> bool:
    return replace(task, include=("*",)).wants(parameter)


method = Method(
    name="slicegpt",
    paper="B3",
    title="SliceGPT: compress large language models by deleting rows and columns",
    citation="Ashkboos, Croci, do Nascimento, Hoefler, Hensman 2024, ICLR, arXiv 2401.15024",
    formula="h <- h Q, Q the principal axes of each stretch of the residual stream; the last d - D axes go",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.ACTIVATION, t.Criterion.RANK}),
        granularity=frozenset({t.Granularity.EMBEDDING}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.LLM}),
        fusion=frozenset({t.Fusion.TENSOR_DECOMPOSITION}),
        physical=True,
        post_training=True,
    ),
    settings=SliceGPTSettings,
    run=plan,
    units=UnitKind.EMBEDDING,
    exact=Group.SITE,
    needs_data=True,
    changes_weights=True,
    structured=True,
)
