"""Gradients of every single sample's loss with respect to weights, block by block from the last to the first.

The loss is that of `data.batches.task_loss` on one sample. A walk keeps the states that enter every block, runs what
comes after the blocks with autograd, and then goes backwards: a block is run again with gradients on, sample by
sample, and hands the gradient of the state that enters it to the block before. So in memory are one block, its
gradients, and the states and gradients of states of one block; the states of the others are where the journal
keeps them. A killed walk goes on at the block where it stopped.

Models whose blocks are no single chain are differentiated as a whole.
"""

from __future__ import annotations

import contextlib
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.core.distributed import total
from secateur.core.errors import ModelError, NumericsError
from secateur.core.journal import Notes, Section
from secateur.core.method import Batch, Task
from secateur.core.progress import track
from secateur.core.select import all_finite
from secateur.data.batches import logits_of, loss_of, split_batch
from secateur.stats.catching import Call, WalkableStack, hidden_of, record_calls, run_safely
from secateur.stats.walker import BlockWalk
from secateur.structure.layers import WeightLayer, to_matrix

WHOLE = "model"  # the only step of a walk that cannot go block by block
HALF_SCALE = 1024.0  # by which a float16 model's loss is multiplied, or small gradients become zero


class Accumulator(Protocol):
    """Takes in the gradients of one layer, sample by sample."""

    def update(self, gradient: Tensor) -> None:
        """Take in one sample's gradient `[O, I]`, float32."""

    def result(self) -> dict[str, Tensor]:
        """Name -> tensor over the samples of all processes."""


class Aggregate(StrEnum):
    """How the gradients of samples become one tensor."""

    ABSOLUTE = "absolute"  # sum |g|
    SQUARES = "squares"  # sum g^2
    SUM = "sum"  # sum g: signs cancel


AGGREGATES: dict[Aggregate, Callable[[Tensor], Tensor]] = {
    Aggregate.ABSOLUTE: torch.abs,
    Aggregate.SQUARES: torch.square,
    Aggregate.SUM: lambda gradient: gradient,
}


class GradientSums:
    """Sums over samples, not divided by their number; float32, zero for a layer that no sample reached."""

    def __init__(self, shape: tuple[int, ...], kinds: Collection[Aggregate]):
        self.sums = {kind: torch.zeros(shape) for kind in kinds}

    def update(self, gradient: Tensor) -> None:
        """Take in one sample's gradient."""
        for kind, value in self.sums.items():
            self.sums[kind] = value.to(gradient.device).add_(AGGREGATES[kind](gradient))

    def result(self) -> dict[str, Tensor]:
        """Aggregate -> `[O, I]`."""
        return {kind.value: total(value) for kind, value in self.sums.items()}


def gradient_walk(task: Task, name: str, accumulate: Callable[[WeightLayer], Accumulator]) -> Section:
    """Show every sample's gradient of every prunable layer in the blocks to the layer's accumulator.

    Args:
        task: model (in eval mode), data, patterns, journal.
        name: of the journal's section.
        accumulate: makes a layer's accumulator.

    Returns:
        Step -> notes with tensors `RESULT/LAYER`, `[O, I]` on the CPU: `section.tensors("absolute")[layer.name]`.

    Raises:
        DataError: no data, no labels, or the model does not run on the data.
        ModelError: a layer is quantised; a model that is streamed is no chain of blocks.
        NumericsError: a gradient is NaN or infinite; names the layer.
    """
    section = task.journal.section(name)
    if WHOLE in section:
        return section
    singles = [one for batch in task.batches for one in split_batch(batch)]
    walk = BlockWalk(replace(task, batches=singles))
    for layer in walk.found.layers.values():
        _refuse_quantised(layer)
    with torch.no_grad():
        if reason := _no_chain(task.model, walk.stacks, walk.found.layers):
            chain = None
        else:
            chain = _Chain(walk, section, task.journal.section(f"{name}-states"))
            reason = chain.bypassed() if chain.left else ""
        if chain is not None and not reason:
            chain.walk(accumulate)
        elif task.residency is not None:
            raise ModelError(f"gradients of a streamed model need one chain of blocks, but {reason}; load it whole")
        else:
            section.write(WHOLE, _at_once(walk, accumulate))
    return section


def _refuse_quantised(layer: WeightLayer) -> None:
    weight = layer.module.weight
    if isinstance(weight, Tensor) and not weight.is_floating_point():
        raise ModelError(
            f"layer '{layer.name}' holds {str(weight.dtype).removeprefix('torch.')} weights, which have no gradient; "
            f"prune the model before it is quantised, or exclude the layer (--exclude '{layer.name}')"
        )


def _no_chain(model: nn.Module, stacks: Sequence[WalkableStack], layers: Mapping[str, WeightLayer]) -> str:
    """Why gradients cannot be taken block by block; empty if they can."""
    if len(stacks) > 1:
        return f"the model has {len(stacks)} stacks of blocks"
    stack = stacks[0].stack
    if not stack.name:
        return "the model has no stack of blocks"
    if not stacks[0].stand_ins_suffice:
        return f"the blocks of '{stack.name}' hand on more than one hidden state"
    users = defaultdict(set)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        inside = name.startswith(f"{stack.name}.")
        users[id(parameter)].add(name.removeprefix(f"{stack.name}.").partition(".")[0] if inside else "")
    shared = [name for name, layer in layers.items() if len(users[id(layer.module.weight)]) > 1]
    return f"the weight '{shared[0]}' is used in several places" if shared else ""


def _at_once(walk: BlockWalk, accumulate: Callable[[WeightLayer], Accumulator]) -> Notes:
    """The same by autograd through the whole model."""
    layers = walk.found.layers
    sums = {name: accumulate(layer) for name, layer in layers.items()}
    weights = [_weight(layer) for layer in layers.values()]
    scale = _loss_scale(weights)
    with _differentiable(weights), torch.enable_grad():
        for one in track(walk.batches, walk.task.progress, "gradients"):
            loss = loss_of(logits_of(run_safely(walk.model, one)), one)
            found = torch.autograd.grad(loss, weights, loss.new_tensor(scale), allow_unused=True)
            _hand_out(layers, sums, found, scale)
    return _noted(sums)


@dataclass
class _States:
    """Tensors for every sample before each block: in the journal's folder, or in memory where it has none."""

    section: Section
    memory: dict[str, Sequence[Tensor]] = field(default_factory=dict)

    def put(self, name: str, tensors: Sequence[Tensor]) -> None:
        kept = self.section.keep_state(name, tensors)
        if self.section.folder is None:
            self.memory[name] = kept

    def get(self, name: str) -> Sequence[Tensor] | None:
        return self.memory[name] if name in self.memory else self.section.state(name)

    def drop(self, name: str) -> None:
        self.memory.pop(name, None)
        self.section.drop_state(name)


class _Chain:
    """One stack of blocks that hand one hidden state on."""

    def __init__(self, walk: BlockWalk, section: Section, states: Section):
        self.task, self.model, self.batches = walk.task, walk.model, walk.batches
        self.device, self.layers = walk.device, walk.found.layers
        self.walkable = walk.stacks[0]
        self.blocks, self.names = self.walkable.stack.blocks, self.walkable.stack.names
        self.section = section
        self.entering, self.upstream = _States(states), _States(section)

    @property
    def left(self) -> list[int]:
        """The blocks without notes, last one first, down to the first that has layers to prune."""
        lowest = min(index for index, name in enumerate(self.names) if self._inside_of(name))
        return [index for index in reversed(range(lowest, len(self.names))) if self.names[index] not in self.section]

    @cached_property
    def _recorded(self) -> tuple[list[list[Call]], list[Tensor]]:
        """For every sample the call of every block without its state, and the state that enters the first."""
        with self._outside():
            calls = record_calls(self.model, self.walkable, self.batches)
        first = [of_sample[0].hidden for of_sample in calls]
        return [[call.with_hidden(torch.empty(0)) for call in of_sample] for of_sample in calls], first

    def bypassed(self) -> str:
        """Why the last block's state is not all that the loss sees of the blocks; empty if it is."""
        state = self._recorded[1][0]
        with self._outside():
            found = self._head(self.batches[0], state)
        if found[-1] is None:
            return f"the loss does not depend on the last block, '{self.names[-1]}'"
        early = [name for name, gradient in zip(self.names[:-1], found[:-1], strict=True) if gradient is not None]
        return f"the state after '{early[0]}' is also read outside the blocks" if early else ""

    def walk(self, accumulate: Callable[[WeightLayer], Accumulator]) -> None:
        """To the loss and back, from where it stopped."""
        left = self.left
        for name in self.section:  # what a kill may have left
            self._drop(name)
        if not left:
            return
        if left[0] == len(self.names) - 1 and self.upstream.get(self.names[-1]) is None:
            self.upstream.put(self.names[-1], self._after_the_blocks(self._forward()))
        for index in track(left, self.task.progress, "gradients"):
            with self._inside(index):
                notes, passed = self._backward(index, accumulate)
            if index != left[-1]:
                self.upstream.put(self.names[index - 1], passed)
            self.section.write(self.names[index], notes)
            self._drop(self.names[index])

    def _drop(self, name: str) -> None:
        self.upstream.drop(name)
        self.entering.drop(name)

    def _inside_of(self, block: str) -> dict[str, WeightLayer]:
        return {name: layer for name, layer in self.layers.items() if name.startswith(f"{block}.")}

    def _inside(self, index: int) -> contextlib.AbstractContextManager[None]:
        residency = self.task.residency
        return contextlib.nullcontext() if residency is None else residency.inside(self.names[index])

    def _outside(self) -> contextlib.AbstractContextManager[None]:
        residency = self.task.residency
        return contextlib.nullcontext() if residency is None else residency.outside(self.names)

    def _run(self, index: int, sample: int, hidden: Tensor) -> Tensor:
        call = self._recorded[0][sample][index].with_hidden(hidden)
        found = hidden_of(self.blocks[index](*call.args, **call.kwargs))
        if found is None:
            raise ModelError(f"block '{self.names[index]}' returns no hidden state")
        return found

    def _forward(self) -> Sequence[Tensor]:
        """Keep what enters every block; what the last one gives."""
        kept = ((index, self.entering.get(self.names[index])) for index in reversed(range(len(self.names))))
        start, states = next(((index, found) for index, found in kept if found is not None), (0, None))
        if states is None:
            states = self._recorded[1]
            self.entering.put(self.names[0], states)
        for index in track(range(start, len(self.names)), self.task.progress, "states"):
            with self._inside(index):
                states = [self._run(index, n, hidden.to(self.device)) for n, hidden in enumerate(states)]
            if index + 1 < len(self.names):
                self.entering.put(self.names[index + 1], states)
        return states

    def _after_the_blocks(self, states: Sequence[Tensor]) -> list[Tensor]:
        """dL/dstate after the last block, for every sample."""
        passed = []
        with self._outside():
            for batch, hidden in zip(self.batches, states, strict=True):
                found = self._head(batch, hidden.to(self.device))[-1]
                if found is None:
                    raise ModelError(f"the loss does not depend on the last block, '{self.names[-1]}'")
                passed.append(found)
        return passed

    def _head(self, batch: Batch, hidden: Tensor) -> list[Tensor | None]:
        """dL/dstate after each block, if all blocks gave `hidden` and hung together only through what is outside."""
        leaves = [hidden.detach().requires_grad_() for _ in self.blocks]
        scale = _loss_scale([hidden])
        with _giving(self.walkable, leaves), torch.enable_grad():
            loss = loss_of(logits_of(run_safely(self.model, batch)), batch)
        if not loss.requires_grad:
            return [None] * len(leaves)
        found = torch.autograd.grad(loss, leaves, loss.new_tensor(scale), allow_unused=True)
        return [None if gradient is None else gradient.float() / scale for gradient in found]

    def _backward(self, index: int, accumulate: Callable[[WeightLayer], Accumulator]) -> tuple[Notes, list[Tensor]]:
        """One block: notes of its layers, and what is passed on to the block before."""
        layers = self._inside_of(self.names[index])
        entering, upstream = self.entering.get(self.names[index]), self.upstream.get(self.names[index])
        if entering is None or upstream is None:
            raise ModelError(f"what enters block '{self.names[index]}' is not there; delete the work folder")
        sums = {name: accumulate(layer) for name, layer in layers.items()}
        weights, passed = [_weight(layer) for layer in layers.values()], []
        with _differentiable(weights), torch.enable_grad():
            for sample, (hidden, gradient) in enumerate(zip(entering, upstream, strict=True)):
                leaf = hidden.to(self.device).detach().requires_grad_()
                output = self._run(index, sample, leaf.clone())  # some blocks write into their input
                scale = _state_scale(gradient, output.dtype)
                given = (gradient.to(self.device) * scale).to(output.dtype)
                below, *found = torch.autograd.grad(output, [leaf, *weights], given, allow_unused=True)
                _hand_out(layers, sums, found, scale)
                passed.append(torch.zeros_like(leaf, dtype=torch.float32) if below is None else below.float() / scale)
        return _noted(sums), passed


def _weight(layer: WeightLayer) -> Tensor:
    weight = layer.module.weight
    assert isinstance(weight, Tensor)
    return weight


def _loss_scale(tensors: Sequence[Tensor]) -> float:
    return HALF_SCALE if any(tensor.dtype is torch.float16 for tensor in tensors) else 1.0


def _state_scale(gradient: Tensor, dtype: torch.dtype) -> float:
    """The power of two that brings a float16 block's gradient near 1; 1 in wider ranges, which need none."""
    largest = gradient.abs().max().item() if dtype is torch.float16 else 1.0
    return 2.0 ** -math.floor(math.log2(largest)) if largest > 0 and math.isfinite(largest) else 1.0


def _hand_out(
    layers: Mapping[str, WeightLayer],
    sums: Mapping[str, Accumulator],
    gradients: Sequence[Tensor | None],
    scale: float,
) -> None:
    for (name, layer), gradient in zip(layers.items(), gradients, strict=True):
        if gradient is not None:  # an expert that this sample does not use has none
            sums[name].update(to_matrix(gradient, layer.site.layout).float() / scale)


def _noted(sums: Mapping[str, Accumulator]) -> Notes:
    notes = Notes()
    for name, accumulator in sums.items():
        for kind, value in accumulator.result().items():
            if not all_finite(value):
                raise NumericsError(f"the gradient of layer '{name}' is NaN or infinite on the calibration data")
            notes.tensors[f"{kind}/{name}"] = value.cpu()
    return notes


@contextlib.contextmanager
def _differentiable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Gradients can be taken with respect to the weights inside the block, frozen ones included."""
    flags = [weight.requires_grad for weight in weights]
    try:
        for weight in weights:
            weight.requires_grad_(True)
        yield
    finally:
        for weight, flag in zip(weights, flags, strict=True):
            weight.requires_grad_(flag)


@contextlib.contextmanager
def _giving(walkable: WalkableStack, states: Sequence[Tensor]) -> Iterator[None]:
    """Blocks give these states instead of what they would compute."""

    def stand_in(like: Any, state: Tensor) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            given = state.clone()  # some models write into it
            return given if isinstance(like, Tensor) else type(like)((given, *like[1:]))

        return forward

    blocks = walkable.stack.blocks
    own = [block.__dict__.get("forward") for block in blocks]
    try:
        for block, like, state in zip(blocks, walkable.outputs, states, strict=True):
            block.forward = stand_in(like, state)
        yield
    finally:
        for block, forward in zip(blocks, own, strict=True):
            block.__dict__.pop("forward", None)
            if forward is not None:
                block.forward = forward
