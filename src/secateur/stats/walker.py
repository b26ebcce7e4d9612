"""The block walker: block by block, let statistics listen, let the method decide, go on.

Two ways to order the work inside a block:

* `observe` then `replace`: statistics of all layers from the block as it stands, decisions, and a
  second run of the changed block for the next inputs (the papers' way: two passes per block, one for
  the last).
* `sweep`: one pass in which every layer is decided just before it runs, so that its statistics
  already contain what was decided for the layers before it in the same block.

`each_block` keeps what is found for every block in the task's journal, so that a killed run goes on at the
block where it stopped. Weights may be elsewhere between visits (`Task.residency`): a method that touches them
only during a visit works on models larger than memory.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from secateur.core.distributed import least
from secateur.core.errors import DataError, ModelError
from secateur.core.journal import Notes, Section
from secateur.core.method import Batch, Task
from secateur.core.units import Site
from secateur.data.running import device_of
from secateur.stats.catching import (
    Call,
    WalkableStack,
    hidden_of,
    record_calls,
    run_safely,
    streamed_stack,
    walkable_stacks,
)
from secateur.stats.listeners import Statistic
from secateur.stats.lockstep import current, lockstep, wait
from secateur.structure.fused import FusedPart, fused_sites, hearing, one_by_one, parts_of
from secateur.structure.layers import WeightLayer
from secateur.structure.sites import WeightLayers, weight_layers
from secateur.structure.stacks import Stack, find_stacks, main_stack

S = TypeVar("S", bound=Statistic)


class _AllHeardError(Exception):
    """Ends a run through a block whose output nobody wants, once all layers have shown their inputs."""


@dataclass
class _InBatch:
    """What is known of the batch that is running: its size, and the inputs seen and who saw them first."""

    samples: int
    first: bool = False
    seen: list[tuple[Tensor, int, tuple[object, ...], str]] = field(default_factory=list)
    heard: set[str] = field(default_factory=set)


@dataclass
class _Listening(Generic[S]):
    """Hands each layer's input to its statistic; layers that read one tensor share a statistic."""

    factory: Callable[[int], S]
    stats: dict[str, S] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)

    def take(self, layer: WeightLayer, x: Tensor, batch: _InBatch) -> S:
        """Update (or find already updated) the statistic of `layer` for its input `x`."""
        key = layer.input_key()
        version = 0 if x.is_inference() else x._version  # changes when the tensor is written in place
        for tensor, at, other_key, leader in batch.seen:
            if tensor is x and at == version and key == other_key and self.leader.get(layer.name, leader) == leader:
                self.leader[layer.name] = leader
                self.stats[layer.name] = self.stats[leader]
                return self.stats[leader]
        leader = self.leader.setdefault(layer.name, layer.name)
        if leader != layer.name:
            raise ModelError(
                f"layer '{layer.name}' read the same tensor as '{leader}' in one batch and another in the next; "
                f"exclude one of them"
            )
        stat = self.stats.setdefault(layer.name, self.factory(layer.site.matrix_shape[1]))
        stat.update(layer.input_matrix(x), batch.samples)
        batch.seen.append((x, version, key, layer.name))
        return stat

    def complete(self, layers: dict[str, WeightLayer]) -> dict[str, S]:
        """A statistic for every layer; the ones that never ran get an empty one. Checks for NaN."""
        reduced: set[int] = set()
        for name, layer in layers.items():
            self.finish(name, layer, reduced)
        return {name: self.stats[name] for name in layers}

    def finish(self, name: str, layer: WeightLayer, reduced: set[int]) -> S:
        """The layer's statistic over the data of all processes, each shared one summed up once; checks for NaN."""
        stat = self.stats.setdefault(name, self.factory(layer.site.matrix_shape[1]))
        if id(stat) not in reduced:
            stat.reduce()
            reduced.add(id(stat))
        stat.check(name)
        return stat


@dataclass(frozen=True)
class Captured:
    """One batch's run through a block.

    Attributes:
        before, after: the hidden state that entered and left, `[samples, tokens, features]`.
        inputs, outputs: module name -> its first input tensor and its (first) output tensor.
        samples: sequences in the batch.
    """

    before: Tensor
    after: Tensor
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    samples: int


class BlockVisit:
    """One block during a walk.

    Attributes:
        stack, index, name: which block.
        module: the block.
        notes: what `each_block` will keep.
    """

    def __init__(self, walk: BlockWalk, stack: Stack, index: int, flow: _Flow):
        self.stack, self.index, self.name = stack, index, stack.block_name(index)
        self.module = stack.blocks[index]
        self.notes = Notes()
        self._walk, self._flow = walk, flow
        self._outputs: list[Tensor] | None = None
        self._last = bool(stack.name) and index == len(stack.blocks) - 1

    @cached_property
    def layers(self) -> dict[str, WeightLayer]:
        """The block's prunable layers by parameter name, in module order."""
        prefix = f"{self.name}." if self.name else ""
        return {name: layer for name, layer in self._walk.found.layers.items() if name.startswith(prefix)}

    @cached_property
    def parts(self) -> dict[str, FusedPart]:
        """The matrices of experts that share a tensor, by names like `model.layers.0.mlp.experts.down_proj[3]`.

        Expert by expert, as they are run.
        """
        prefix = f"{self.name}." if self.name else ""
        sites = [site for name, site in self._walk.fused.items() if name.startswith(prefix)]
        found = [part for site in sites for part in parts_of(self._walk.model, site)]
        found.sort(key=lambda part: (part.parameter.rpartition(".")[0], part.index))
        return {part.name: part for part in found}

    def tensor(self, name: str) -> Tensor:
        """A parameter or buffer of this block by its qualified name, detached, on the device it is run on."""
        local = name.removeprefix(f"{self.name}.")
        owner, _, leaf = local.rpartition(".")
        value: Tensor = getattr(self.module.get_submodule(owner), leaf)
        return value.detach()

    def observe(self, factory: Callable[[int], S], only: Collection[str] | None = None) -> dict[str, S]:
        """One pass over the data through the block as it stands; a statistic per layer.

        Args:
            factory: makes a layer's statistic from its number of inputs.
            only: names of the layers, or of experts' matrices in `parts`, to listen to; default all layers.

        Raises:
            NumericsError: NaN or infinity among a layer's inputs.
        """
        known = self.layers if only is None else {**self.layers, **self.parts}
        layers = {name: layer for name, layer in known.items() if only is None or name in only}
        listening = _Listening(factory)
        order: list[str] = []  # of the first batch

        def never(points: Set[str]) -> str:
            raise AssertionError(points)

        def heard(layer: WeightLayer, x: Tensor, batch: _InBatch) -> None:
            listening.take(layer, x, batch)
            batch.heard.add(layer.name)
            if batch.first:
                order.append(layer.name)
            elif self.stack.name and len(order) == len(layers) == len(batch.heard):
                raise _AllHeardError  # every layer runs once, and all have: the rest would be for nothing

        def run(call: Call) -> None:
            with contextlib.suppress(_AllHeardError):
                self._run(call)  # the output is not needed: the block is still to change

        self._listen(layers, heard, run, never)
        return listening.complete(layers)

    def sweep(
        self, factory: Callable[[int], S], decide: Callable[[WeightLayer, S], None], experts: bool = False
    ) -> list[FusedPart]:
        """One pass in which `decide(layer, statistic)` is called right before each layer runs.

        The batches run in lockstep: each stops before a layer until all have brought their inputs.
        Where they stop before different layers (experts), the first in module order is decided first.

        Args:
            factory: makes a layer's statistic from its number of inputs.
            decide: may replace the layer's weight.
            experts: the matrices in `parts` too.

        Returns:
            Experts' matrices that never ran, undecided; layers that never ran were decided last.
        """
        listening = _Listening(factory)
        decided: set[str] = set()
        reduced: set[int] = set()
        layers: dict[str, WeightLayer] = {**self.layers, **(self.parts if experts else {})}
        order = {name: index for index, name in enumerate(layers)}

        def heard(layer: WeightLayer, x: Tensor, batch: _InBatch) -> None:
            if layer.name not in decided:
                listening.take(layer, x, batch)
                wait(layer.name)
            if self._last and len(decided) == len(layers):
                raise _AllHeardError  # nobody wants what the last block gives

        def release(points: Set[str]) -> str:
            name = min(points, key=order.__getitem__)
            stat = listening.finish(name, layers[name], reduced)
            decided.add(name)
            decide(layers[name], stat)
            return name

        def run(call: Call) -> Any:
            with contextlib.suppress(_AllHeardError):
                return self._run(call)

        outputs = self._listen(layers, heard, run, release)
        for name, layer in self.layers.items():
            if name not in decided:
                decide(layer, factory(layer.site.matrix_shape[1]))
        if not self._last:
            self._keep(outputs)
        return [part for name, part in self.parts.items() if name not in decided]

    def _listen(
        self,
        layers: dict[str, WeightLayer],
        heard: Callable[[WeightLayer, Tensor, _InBatch], object],
        run: Callable[[Call], Any],
        release: Callable[[Set[str]], str],
    ) -> list[Any]:
        """Run all batches in lockstep with `heard` called before every layer; what `run` returned for each."""
        batches = {}  # of the run that is going on

        def started(index: int, batch: Batch) -> Any:
            batches[current()] = _InBatch(batch.samples, first=index == 0)
            try:
                return run(self._flow.call(index))
            finally:
                del batches[current()]  # it holds every input that was seen

        def arrived(layer: WeightLayer, x: Tensor) -> None:
            heard(layer, x, batches[current()])

        runs = [partial(started, index, batch) for index, batch in enumerate(self._walk.batches)]
        plain = {name: layer for name, layer in layers.items() if not isinstance(layer, FusedPart)}
        parts = [layer for layer in layers.values() if isinstance(layer, FusedPart)]
        with _hooked(plain, arrived), hearing(parts, arrived):
            return lockstep(runs, release)

    def capture(self, modules: Sequence[str] = (), *, dense: bool = False) -> Iterator[Captured]:
        """Run the block as it stands, batch by batch, and show what goes in and out of it and of its parts.

        Args:
            modules: qualified names of modules inside the block, e.g. `model.layers.0.mlp.down_proj`.
            dense: on the states of the unpruned chain, for walks with `twin`.
        """
        flow = self._flow if not dense else self._walk.dense_flow(self)
        inside = {name: self.module.get_submodule(name.removeprefix(f"{self.name}.")) for name in modules}
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        with _watched(inside, inputs, outputs):
            for index, batch in enumerate(self._walk.batches):
                call = flow.call(index)
                after = self._hidden(self._run(call))
                yield Captured(call.hidden, after, dict(inputs), dict(outputs), batch.samples)

    def replace(self, layer: WeightLayer, matrix: Tensor) -> None:
        """Give a layer another weight `[O, I]` for the rest of the walk."""
        self._walk.substitute(layer, matrix)
        self._outputs = None

    def flow(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the block and yield its hidden state before and after, batch by batch."""
        outputs = []
        for index in range(len(self._walk.batches)):
            call = self._flow.call(index)
            outputs.append(self._hidden(self._run(call)))
            yield call.hidden, outputs[-1]
        self._outputs = outputs

    def outputs(self, leave: bool = False) -> list[Tensor]:
        """The hidden states after the block as it stands now; run if that has not happened yet.

        Args:
            leave: the block is not run again, so that the states before it can be dropped one by one.
        """
        if self._outputs is None:
            outputs = []
            for index in range(len(self._walk.batches)):
                outputs.append(self._run(self._flow.call(index)))
                if leave:
                    self._flow.used(index)
            self._keep(outputs)
        assert self._outputs is not None
        return self._outputs

    def outputs_from(self, flow: _Flow) -> list[Tensor]:
        """The hidden states after the block as it stands, on the states of another chain."""
        return [self._hidden(self._run(flow.call(index))) for index in range(len(self._walk.batches))]

    def forget(self) -> None:
        """Drop what the block gave: its weights are about to change back."""
        self._outputs = None

    def _keep(self, outputs: list[Any]) -> None:
        # a model taken as one block has no next block to feed
        self._outputs = [self._hidden(output) for output in outputs] if self.stack.name else []

    def _hidden(self, output: Any) -> Tensor:
        hidden = hidden_of(output)
        if hidden is None:
            raise ModelError(f"block '{self.name}' returns no hidden state")
        return hidden

    def _run(self, call: Call) -> Any:
        if not self.stack.name:
            return run_safely(self.module, Batch(call.args, call.kwargs))
        return self.module(*call.args, **call.kwargs)


@dataclass
class _Flow:
    """What a block is called with: one call per batch, and the hidden states, perhaps on disk, that go in."""

    calls: list[Call]
    hidden: Sequence[Tensor] | None  # None: the calls have them
    device: torch.device

    def call(self, index: int) -> Call:
        """One batch's call."""
        if self.hidden is None:
            return self.calls[index]
        return self.calls[index].with_hidden(self.hidden[index].to(self.device))

    def used(self, index: int) -> None:
        """One batch's state is needed no more."""
        if isinstance(self.hidden, list):
            self.hidden[index] = torch.empty(0)


@contextlib.contextmanager
def _watched(modules: Mapping[str, nn.Module], inputs: dict[str, Tensor], outputs: dict[str, Tensor]) -> Iterator[None]:
    """Keep the last input and output of some modules."""

    def hook_of(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            inputs[name] = args[0] if args else next(iter(kwargs.values()))
            found = hidden_of(output)
            if found is not None:
                outputs[name] = found

        return hook

    handles = [module.register_forward_hook(hook_of(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _hooked(layers: dict[str, WeightLayer], heard: Callable[[WeightLayer, Tensor], object]) -> Iterator[None]:
    """Call `heard(layer, input)` before every layer inside the block."""

    def hook_of(layer: WeightLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            heard(layer, args[0] if args else next(iter(kwargs.values())))

        return hook

    handles = [layer.module.register_forward_pre_hook(hook_of(layer), with_kwargs=True) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class BlockWalk:
    """A walk over all blocks of a model; the model's weights are put back when it ends.

    Example:
        with BlockWalk(task) as walk:
            for visit in walk:
                stats = visit.observe(SecondMoment)
                for name, layer in visit.layers.items():
                    visit.replace(layer, layer.matrix * mask)

    Args:
        task: gives the model, the data and the patterns of layers to leave out.
        dense: feed every block from the blocks before it as they were, not as they were replaced.
        twin: besides the chain of replaced blocks follow the dense one, for `BlockVisit.capture(dense=True)`.
        still: look at weights only; nothing is run and no data is needed.
        section: where `BlockVisit.notes` are kept; blocks that have theirs are not visited again.

    Raises:
        DataError: no data, or the model does not run on it.
    """

    def __init__(
        self,
        task: Task,
        *,
        dense: bool = False,
        twin: bool = False,
        still: bool = False,
        section: Section | None = None,
    ):
        if not task.batches and not still:
            raise DataError("this method needs calibration data; give data=... (--data)")
        self.task = task
        self.model = task.model
        self.dense, self.twin, self.still = dense, twin and not dense, still
        self.section = Section(None) if section is None else section
        self.device = task.residency.device if task.residency is not None else device_of(task.model)
        self.batches = [] if still else [batch.to(self.device) for batch in task.batches]
        with torch.no_grad():
            self.stacks = self._stacks()
        self._undo: list[tuple[Tensor, Tensor]] = []
        self._no_grad = torch.no_grad()
        self._dense: dict[int, _Flow] = {}

    def _stacks(self) -> list[WalkableStack]:
        if self.still:
            stacks = [main_stack(self.model)] if self.task.residency is not None else find_stacks(self.model)
            return [WalkableStack(stack, ()) for stack in stacks or [Stack("", (self.model,))]]
        if self.task.residency is not None:
            return [streamed_stack(self.model, self.batches[0], self.task.residency)]
        return walkable_stacks(self.model, self.batches[0])

    @cached_property
    def found(self) -> WeightLayers:
        """The prunable layers inside the blocks, and the reasons for the rest."""
        names = [name for walkable in self.stacks for name in walkable.stack.names]
        return weight_layers(self.model, self.task.wants, within=names, needed=not self.fused)

    @cached_property
    def fused(self) -> dict[str, Site]:
        """The tensors inside the blocks that hold a matrix for each of several experts."""
        names = [name for walkable in self.stacks for name in walkable.stack.names]
        return fused_sites(self.model, self.task.wants, names)

    def __enter__(self) -> BlockWalk:
        self._no_grad.__enter__()
        self._loops = one_by_one(self.model)
        self._loops.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
        self._loops.__exit__(None, None, None)
        self._no_grad.__exit__(kind, error, trace)

    def __iter__(self) -> Iterator[BlockVisit]:
        self.task.progress.start("blocks", sum(len(walkable.stack.blocks) for walkable in self.stacks))
        try:
            for walkable in self.stacks:
                yield from self._walk(walkable, last_stack=walkable is self.stacks[-1])
        finally:
            self.task.progress.finish()

    def _walk(self, walkable: WalkableStack, last_stack: bool) -> Iterator[BlockVisit]:
        stack = walkable.stack
        first = self._first(stack)
        if first:
            self.task.progress.advance(first)
        if first == len(stack.blocks):
            return
        calls, hidden, dense = self._start(walkable, first)
        for index in range(first, len(stack.blocks)):
            with self._inside(stack.block_name(index)):
                flow = _Flow([of_batch[index] for of_batch in calls], hidden, self.device)
                visit = BlockVisit(self, stack, index, flow)
                if self.twin:
                    self._dense = {index: replace(flow, hidden=dense)}
                yield visit
                hidden, dense = self._passed_on(visit)
                if last_stack or self.task.residency is not None:
                    # later stacks must still see this one pruned; after the last nobody runs it again
                    self._restore()
            self.section.write(visit.name, visit.notes)
            if index:  # another process may still be at the block before: it may have to be done again
                for prefix in ("", "dense-"):
                    self.section.drop_state(f"{prefix}{stack.block_name(index - 1)}")
            self.task.progress.advance()

    def _passed_on(self, visit: BlockVisit) -> tuple[Sequence[Tensor] | None, Sequence[Tensor] | None]:
        """The states that enter the next block: of the chain that the walk follows, and of the dense one beside it."""
        following = visit.index + 1
        if self.still or following == len(visit.stack.blocks):
            return None, None
        dense = self._kept(visit.stack, following, self._dense_outputs(visit), "dense-") if self.twin else None
        if self.dense:
            visit.forget()
            self._restore()
        return self._kept(visit.stack, following, visit.outputs(leave=True)), dense

    def _first(self, stack: Stack) -> int:
        """The first block without notes; of several processes, the one that is furthest behind says it."""
        own = next((i for i, name in enumerate(stack.names) if name not in self.section), len(stack.blocks))
        return least(own)

    def _start(
        self, walkable: WalkableStack, first: int
    ) -> tuple[list[list[Call]], Sequence[Tensor] | None, Sequence[Tensor] | None]:
        """How every block is called in every batch, and the states that enter the first block to visit."""
        stack = walkable.stack
        if self.still:
            return [], None, None
        with self._outside(stack.names):
            calls = record_calls(self.model, walkable, self.batches)
        if not stack.name:
            return calls, None, None
        name = stack.block_name(first)
        if first:
            hidden = self.section.state(name)
            dense = self.section.state(f"dense-{name}") if self.twin else None
            if hidden is None or (self.twin and dense is None):
                raise DataError(
                    f"the notes of '{stack.block_name(first - 1)}' are there but not the states that it passed on; "
                    "delete the work folder and start again"
                )
        else:
            hidden = self._kept(stack, 0, [of_batch[0].hidden for of_batch in calls])
            dense = hidden if self.twin else None
        for of_batch in calls:  # the states are passed on apart from the calls
            of_batch[:] = [call.with_hidden(torch.empty(0)) for call in of_batch]
        return calls, hidden, dense

    def _kept(self, stack: Stack, index: int, hidden: Sequence[Tensor], prefix: str = "") -> Sequence[Tensor]:
        return self.section.keep_state(f"{prefix}{stack.block_name(index)}", hidden)

    def dense_flow(self, visit: BlockVisit) -> _Flow:
        """What the block is called with in the unpruned chain."""
        if not self.twin:
            raise AssertionError("capture(dense=True) needs a walk with twin=True")
        return self._dense[visit.index]

    def _dense_outputs(self, visit: BlockVisit) -> list[Tensor]:
        """What the block gives in the unpruned chain, with its own weights."""
        replaced = [(parameter, parameter.data) for parameter, _ in self._undo]
        for parameter, data in reversed(self._undo):
            parameter.data = data
        try:
            return visit.outputs_from(self._dense[visit.index])
        finally:
            for parameter, data in replaced:
                parameter.data = data

    def _inside(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.task.residency is None else self.task.residency.inside(name)

    def _outside(self, names: Sequence[str]) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self.task.residency is None else self.task.residency.outside(names)

    def substitute(self, layer: WeightLayer, matrix: Tensor) -> None:
        """Swap a layer's weight until the walk restores it."""
        if isinstance(layer, FusedPart):
            self._substitute_part(layer, matrix)
            return
        parameter = layer.module.weight
        assert isinstance(parameter, Tensor)
        self._remember(parameter)
        parameter.data = layer.to_site(matrix).to(parameter.dtype)

    def _substitute_part(self, part: FusedPart, matrix: Tensor) -> None:
        whole = part.whole
        if self._needs_originals and all(parameter is not whole for parameter, _ in self._undo):
            self._remember(whole)
            whole.data = whole.data.clone()
        whole.data[part.index] = matrix.to(whole.dtype)

    @property
    def _needs_originals(self) -> bool:
        """Whether weights are needed as they were: not where they are dropped after the visit anyway."""
        return self.task.residency is None or self.dense or self.twin

    def _remember(self, parameter: Tensor) -> None:
        if self._needs_originals:
            self._undo.append((parameter, parameter.data))

    def _restore(self) -> None:
        while self._undo:
            parameter, data = self._undo.pop()
            parameter.data = data


def each_block(
    task: Task,
    name: str,
    work: Callable[[BlockVisit], Notes],
    *,
    dense: bool = False,
    twin: bool = False,
    still: bool = False,
) -> Section:
    """Visit every block once and keep what `work` notes of it; a run that was killed goes on where it stopped.

    Args:
        task: model, data, journal.
        name: of the journal's section; one per walk of a method.
        work: looks at a block, may replace weights, and returns what is to be kept.
        dense: as for `BlockWalk`.
        twin: as for `BlockWalk`.
        still: as for `BlockWalk`.

    Returns:
        Block name -> notes.
    """
    section = task.journal.section(name)
    with BlockWalk(task, dense=dense, twin=twin, still=still, section=section) as walk:
        for visit in walk:
            visit.notes = work(visit)
    return section
