"""The block walker: block by block, let statistics listen, let the method decide, go on.

Two ways to order the work inside a block:

* `observe` then `replace`: statistics of all layers from the block as it stands, decisions, and a
  second run of the changed block for the next inputs (the papers' way: two passes per block, one for
  the last).
* `sweep`: one pass in which every layer is decided just before it runs, so that its statistics
  already contain what was decided for the layers before it in the same block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass, field
from functools import cached_property, partial
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, ModelError
from secateur.core.method import Batch, Task
from secateur.data.running import device_of
from secateur.stats.catching import Call, WalkableStack, hidden_of, record_calls, run_safely, walkable_stacks
from secateur.stats.listeners import Statistic
from secateur.stats.lockstep import current, lockstep, wait
from secateur.structure.layers import WeightLayer
from secateur.structure.sites import WeightLayers, weight_layers
from secateur.structure.stacks import Stack

S = TypeVar("S", bound=Statistic)


@dataclass
class _InBatch:
    """What is known of the batch that is running: its size, and the inputs seen and who saw them first."""

    samples: int
    seen: list[tuple[Tensor, int, tuple[object, ...], str]] = field(default_factory=list)


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
        for name, layer in layers.items():
            self.stats.setdefault(name, self.factory(layer.site.matrix_shape[1])).check(name)
        return {name: self.stats[name] for name in layers}


class BlockVisit:
    """One block during a walk.

    Attributes:
        stack, index, name: which block.
        module: the block.
    """

    def __init__(
        self,
        walk: BlockWalk,
        stack: Stack,
        index: int,
        calls: list[Call],
    ):
        self.stack, self.index, self.name = stack, index, stack.block_name(index)
        self.module = stack.blocks[index]
        self._walk = walk
        self._calls = calls
        self._outputs: list[Tensor] | None = None

    @cached_property
    def layers(self) -> dict[str, WeightLayer]:
        """The block's prunable layers by parameter name, in module order."""
        prefix = f"{self.name}." if self.name else ""
        return {name: layer for name, layer in self._walk.found.layers.items() if name.startswith(prefix)}

    def observe(self, factory: Callable[[int], S]) -> dict[str, S]:
        """One pass over the data through the block as it stands; a statistic per layer.

        Raises:
            NumericsError: NaN or infinity among a layer's inputs.
        """
        listening = _Listening(factory)

        def never(points: Set[str]) -> str:
            raise AssertionError(points)

        def run(call: Call) -> None:
            self._run(call)  # the output is not needed: the block is still to change

        self._listen(listening.take, run, never)
        return listening.complete(self.layers)

    def sweep(self, factory: Callable[[int], S], decide: Callable[[WeightLayer, S], None]) -> None:
        """One pass in which `decide(layer, statistic)` is called right before each layer runs.

        The batches run in lockstep: each stops before a layer until all have brought their inputs.
        Where they stop before different layers (experts), the first in module order is decided first.
        """
        listening = _Listening(factory)
        decided: set[str] = set()
        order = {name: index for index, name in enumerate(self.layers)}

        def heard(layer: WeightLayer, x: Tensor, batch: _InBatch) -> None:
            if layer.name not in decided:
                listening.take(layer, x, batch)
                wait(layer.name)

        def release(points: Set[str]) -> str:
            name = min(points, key=order.__getitem__)
            listening.stats[name].check(name)
            decided.add(name)
            decide(self.layers[name], listening.stats[name])
            return name

        outputs = self._listen(heard, self._run, release)
        for name, layer in self.layers.items():
            if name not in decided:
                decide(layer, factory(layer.site.matrix_shape[1]))
        self._keep(outputs)

    def _listen(
        self,
        heard: Callable[[WeightLayer, Tensor, _InBatch], object],
        run: Callable[[Call], Any],
        release: Callable[[Set[str]], str],
    ) -> list[Any]:
        """Run all batches in lockstep with `heard` called before every layer; what `run` returned for each."""
        batches = {}  # of the run that is going on

        def started(call: Call, batch: Batch) -> Any:
            batches[current()] = _InBatch(batch.samples)
            return run(call)

        runs = [partial(started, call, batch) for call, batch in zip(self._calls, self._walk.batches, strict=True)]
        with _hooked(self.layers, lambda layer, x: heard(layer, x, batches[current()])):
            return lockstep(runs, release)

    def replace(self, layer: WeightLayer, matrix: Tensor) -> None:
        """Give a layer another weight `[O, I]` for the rest of the walk."""
        self._walk.substitute(layer, matrix)
        self._outputs = None

    def flow(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the block and yield its hidden state before and after, batch by batch."""
        outputs = []
        for call in self._calls:
            outputs.append(self._hidden(self._run(call)))
            yield call.hidden, outputs[-1]
        self._outputs = outputs

    def outputs(self) -> list[Tensor]:
        """The hidden states after the block as it stands now; run if that has not happened yet."""
        if self._outputs is None:
            self._keep([self._run(call) for call in self._calls])
        assert self._outputs is not None
        return self._outputs

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

    Raises:
        DataError: no data, or the model does not run on it.
    """

    def __init__(self, task: Task, *, dense: bool = False):
        if not task.batches:
            raise DataError("this method needs calibration data; give data=... (--data)")
        self.task = task
        self.model = task.model
        self.dense = dense
        self.batches = [batch.to(device_of(task.model)) for batch in task.batches]
        with torch.no_grad():
            self.stacks = walkable_stacks(task.model, self.batches[0])
        self._undo: list[tuple[nn.Module, Tensor]] = []
        self._no_grad = torch.no_grad()

    @cached_property
    def found(self) -> WeightLayers:
        """The prunable layers inside the blocks, and the reasons for the rest."""
        names = [name for walkable in self.stacks for name in walkable.stack.names]
        return weight_layers(self.model, self.task.wants, within=names)

    def __enter__(self) -> BlockWalk:
        self._no_grad.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()
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
        recorded = record_calls(self.model, walkable, self.batches)
        hidden: list[Tensor] | None = None
        for index in range(len(stack.blocks)):
            calls = [of_batch[index] for of_batch in recorded]
            if hidden is not None:
                calls = [call.with_hidden(h) for call, h in zip(calls, hidden, strict=True)]
            visit = BlockVisit(self, stack, index, calls)
            yield visit
            if self.dense:
                visit.forget()
                self._restore()
            hidden = visit.outputs() if index + 1 < len(stack.blocks) else None
            if stack.name:
                for of_batch in recorded:  # free the activations
                    of_batch[index] = of_batch[index].with_hidden(torch.empty(0))
            if last_stack:
                # later stacks must still see this one pruned; after the last nobody runs it again
                self._restore()
            self.task.progress.advance()

    def substitute(self, layer: WeightLayer, matrix: Tensor) -> None:
        """Swap a layer's weight until the walk restores it."""
        parameter = layer.module.weight
        assert isinstance(parameter, Tensor)
        self._undo.append((layer.module, parameter.data))
        parameter.data = layer.to_site(matrix).to(parameter.dtype)

    def _restore(self) -> None:
        while self._undo:
            module, data = self._undo.pop()
            module.weight.data = data


def layerwise(
    task: Task,
    factory: Callable[[int], S],
    decide: Callable[[BlockVisit, WeightLayer, S], None],
    *,
    one_pass: bool = False,
    dense: bool = False,
) -> list[str]:
    """Walk the model and decide every layer of every block once; the plan of most layer-wise methods.

    Args:
        task: model, data, patterns.
        factory: makes a layer's statistic from its number of inputs.
        decide: chooses a layer's weights, and hands them on by `BlockVisit.replace`.
        one_pass: `BlockVisit.sweep` instead of `BlockVisit.observe`.
        dense: feed blocks from dense ones.

    Returns:
        Sentences about weights in the blocks that no layer of the walk uses.
    """
    with BlockWalk(task, dense=dense) as walk:
        for visit in walk:
            if one_pass:
                visit.sweep(factory, partial(decide, visit))
            else:
                stats = visit.observe(factory)
                for name, layer in visit.layers.items():
                    decide(visit, layer, stats[name])
        return [f"'{name}' was not pruned: it {why}" for name, why in walk.found.skipped.items()]
