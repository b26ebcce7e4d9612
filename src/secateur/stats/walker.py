"""The block walker: block by block, let statistics listen, let the method decide, go on.

Two ways to order the work inside a block:

* `observe` then `replace`: statistics of all layers from the block as it stands, decisions, and a
  second run of the changed block for the next inputs (the papers' way: two passes per block, one for
  the last).
* `sweep`: one pass in which every layer is decided just before it runs, so that its statistics
  already contain what was decided for the layers before it in the same block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import TracebackType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, ModelError
from secateur.core.method import Batch, Task
from secateur.data.running import device_of
from secateur.stats.catching import Call, WalkableStack, hidden_of, record_calls, run_safely, walkable_stacks
from secateur.stats.listeners import Statistic
from secateur.structure.layers import WeightLayer
from secateur.structure.sites import WeightLayers, weight_layers
from secateur.structure.stacks import Stack

S = TypeVar("S", bound=Statistic)


@dataclass
class _Listening(Generic[S]):
    """Hands each layer's input to its statistic; layers that read one tensor share a statistic."""

    factory: Callable[[int], S]
    stats: dict[str, S] = field(default_factory=dict)
    leader: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[Tensor, int, tuple[object, ...], str]] = field(default_factory=list)

    def next_batch(self) -> None:
        self.seen.clear()

    def take(self, layer: WeightLayer, x: Tensor, samples: int) -> S:
        """Update (or find already updated) the statistic of `layer` for its input `x`."""
        key = layer.input_key()
        version = 0 if x.is_inference() else x._version  # changes when the tensor is written in place
        for tensor, at, other_key, leader in self.seen:
            if tensor is x and at == version and key == other_key and self.leader.get(layer.name, leader) == leader:
                self.leader[layer.name] = leader
                self.stats[layer.name] = self.stats[leader]
                return self.stats[leader]
        leader = self.leader.setdefault(layer.name, layer.name)
        if leader != layer.name:
            raise ModelError(
                f"layer '{layer.name}' read the same tensor as '{leader}' in one batch and another in the next; "
                "give the calibration data as one batch"
            )
        stat = self.stats.setdefault(layer.name, self.factory(layer.site.matrix_shape[1]))
        stat.update(layer.input_matrix(x), samples)
        self.seen.append((x, version, key, layer.name))
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

        def heard(layer: WeightLayer, x: Tensor, samples: int) -> None:
            listening.take(layer, x, samples)

        with _hooked(self.layers, heard) as hooks:
            for call, batch in zip(self._calls, self._walk.batches, strict=True):
                listening.next_batch()
                hooks.samples = batch.samples
                self._run(call)
        return listening.complete(self.layers)

    def sweep(self, factory: Callable[[int], S], decide: Callable[[WeightLayer, S], None]) -> None:
        """One pass in which `decide(layer, statistic)` is called right before each layer runs.

        Needs the whole calibration data as one batch (`BlockWalk(one_batch=True)`), since a layer's
        statistic must be complete before any sample passes it.
        """
        listening = _Listening(factory)
        decided: set[str] = set()

        def heard(layer: WeightLayer, x: Tensor, samples: int) -> None:
            if layer.name not in decided:
                stat = listening.take(layer, x, samples)
                stat.check(layer.name)
                decided.add(layer.name)
                decide(layer, stat)

        (call,), (batch,) = self._calls, self._walk.batches
        with _hooked(self.layers, heard) as hooks:
            hooks.samples = batch.samples
            output = self._run(call)
        for name, layer in self.layers.items():
            if name not in decided:
                decide(layer, factory(layer.site.matrix_shape[1]))
        self._keep([output])

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


class _Hooks:
    samples = 0


class _hooked:  # noqa: N801 - reads as a verb in `with`
    """Call `heard(layer, input, samples)` before every layer while the block runs."""

    def __init__(self, layers: dict[str, WeightLayer], heard: Callable[[WeightLayer, Tensor, int], None]):
        self.layers, self.heard, self.state = layers, heard, _Hooks()
        self.handles: list[Any] = []

    def __enter__(self) -> _Hooks:
        for layer in self.layers.values():
            self.handles.append(layer.module.register_forward_pre_hook(self._hook(layer), with_kwargs=True))
        return self.state

    def _hook(self, layer: WeightLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self.heard(layer, x, self.state.samples)

        return hook

    def __exit__(self, *error: object) -> None:
        for handle in self.handles:
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
        one_batch: join all calibration batches, as `BlockVisit.sweep` needs.

    Raises:
        DataError: no data, or the model does not run on it.
    """

    def __init__(self, task: Task, *, one_batch: bool = False):
        if not task.batches:
            raise DataError("this method needs calibration data; give data=... (--data)")
        batches = [batch.to(device_of(task.model)) for batch in task.batches]
        self.task = task
        self.model = task.model
        self.batches: Sequence[Batch] = [join(batches)] if one_batch else batches
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


def join(batches: Sequence[Batch]) -> Batch:
    """All batches as one.

    Raises:
        DataError: samples differ in shape, or batches in their arguments.
    """

    def cat(items: list[Any]) -> Any:
        if all(isinstance(item, Tensor) for item in items):
            return torch.cat(items)
        if any(isinstance(item, Tensor) or item != items[0] for item in items):
            raise DataError("calibration batches must have the same arguments to be used in one pass")
        return items[0]

    if any(len(b.args) != len(batches[0].args) or b.kwargs.keys() != batches[0].kwargs.keys() for b in batches):
        raise DataError("calibration batches must have the same arguments to be used in one pass")
    try:
        args = tuple(cat([batch.args[i] for batch in batches]) for i in range(len(batches[0].args)))
        kwargs = {key: cat([batch.kwargs[key] for batch in batches]) for key in batches[0].kwargs}
    except RuntimeError as error:
        raise DataError(f"calibration samples must have one shape to be used in one pass: {error}") from error
    return Batch(args, kwargs)
