"""Removing whole blocks: the list, the config's counts and per-layer lists, cache and layer indices."""

from __future__ import annotations

import contextlib
import copy
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from secateur.core.errors import PlanError
from secateur.core.plan import Plan
from secateur.core.units import UnitKind

INDEX = re.compile(r"layer_(idx|id|index|number)$")
COUNT = re.compile(r"^(num_|n_)?(encoder_|decoder_)?(hidden_)?layers?$")
DEPTHS = "depths"  # of networks in stages (ResNet, ConvNeXt): blocks in each
PER_LAYER = re.compile(r"layer")

Undo = Callable[[], None]


def remove_blocks_(model: nn.Module, stack: str, keep: Sequence[bool]) -> Undo:
    """Take the blocks with `keep[i] == False` out of the module list named `stack`, in place.

    The list is replaced by a copy of it with the kept blocks: numbered ones are numbered anew, others keep their
    names. Layer indices inside the kept blocks (key/value cache slots) are renumbered; the owning
    transformers config, where there is one, gets the new number of layers, or of blocks in that stage, and its
    per-layer lists (attention kinds and the like) lose the same entries.

    Returns:
        A function that puts everything back.

    Raises:
        PlanError: no such list, or it has another number of blocks.
    """
    parent_name, _, leaf = stack.rpartition(".")
    blocks = blocks_of(model, stack, len(keep))
    kept = [index for index, stays in enumerate(keep) if stays]
    changes: list[tuple[Any, str, Any]] = [(model.get_submodule(parent_name), leaf, _thinned(blocks, keep))]
    for new, old in enumerate(kept):
        changes += _renumbered(blocks[old], old, new)
    changes += _config_changes(model, stack, keep)
    return _set_all(changes)


@contextlib.contextmanager
def without_blocks(model: nn.Module, stack: str, keep: Sequence[bool]) -> Iterator[None]:
    """The model without the blocks with `keep[i] == False` inside the block; as it was afterwards.

    Raises:
        PlanError: as `remove_blocks_`.
    """
    undo = remove_blocks_(model, stack, keep)
    try:
        yield
    finally:
        undo()


def blocks_of(model: nn.Module, stack: str, count: int) -> nn.ModuleList | nn.Sequential:
    """The module list of that name.

    Raises:
        PlanError: no such list, or it does not have `count` blocks.
    """
    try:
        blocks = model.get_submodule(stack)
    except AttributeError:
        raise PlanError(f"the model has no list of blocks named '{stack}'") from None
    if not isinstance(blocks, (nn.ModuleList, nn.Sequential)) or len(blocks) != count:
        found = len(blocks) if isinstance(blocks, (nn.ModuleList, nn.Sequential)) else "no"
        raise PlanError(f"'{stack}' has {found} blocks, the plan was made for {count}; was it applied already?")
    return blocks


def _thinned(blocks: nn.ModuleList | nn.Sequential, keep: Sequence[bool]) -> nn.Module:
    """The same list without some blocks; a copy, because a subclass may have a constructor of its own."""
    names = places(list(blocks._modules), keep)
    container = copy.copy(blocks)
    container._modules = {new: blocks._modules[old] for old, new in names.items() if new is not None}
    return container


def places(leaves: Sequence[str], keep: Sequence[bool]) -> dict[str, str | None]:
    """What each member of a list is called there -> once only those of `keep` are left; None if it goes."""
    numbered = list(leaves) == [str(index) for index in range(len(leaves))]
    numbers = itertools.count()
    return {
        leaf: (str(next(numbers)) if numbered else leaf) if stays else None
        for leaf, stays in zip(leaves, keep, strict=True)
    }


def _renumbered(block: nn.Module, old: int, new: int) -> Iterator[tuple[Any, str, Any]]:
    for module in block.modules():
        for name, value in vars(module).items():
            # some count layers from 1: keep the offset
            if INDEX.search(name) and isinstance(value, int) and not isinstance(value, bool):
                yield module, name, value - old + new


def _config_changes(model: nn.Module, stack: str, keep: Sequence[bool]) -> Iterator[tuple[Any, str, Any]]:
    for config in _configs_around(model, stack):
        yield from _changes_in(config, stack, keep)


def _changes_in(config: Any, stack: str, keep: Sequence[bool]) -> Iterator[tuple[Any, str, Any]]:
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    counts = [name for name, value in fields.items() if COUNT.match(name) and value == len(keep)]
    side = "decoder" if "decoder" in stack else "encoder" if "encoder" in stack else ""
    own = [name for name in counts if side and side in name]
    neutral = [name for name in counts if "encoder" not in name and "decoder" not in name]
    for name in own or neutral:
        yield config, name, sum(keep)
    stage = next((int(part) for part in reversed(stack.split(".")) if part.isdecimal()), -1)
    depths = list(fields.get(DEPTHS) or [])
    if stage >= 0 and depths[stage : stage + 1] == [len(keep)]:
        yield config, DEPTHS, [*depths[:stage], sum(keep), *depths[stage + 1 :]]
    for name, value in fields.items():
        if PER_LAYER.search(name) and isinstance(value, (list, tuple)) and len(value) == len(keep):
            yield config, name, type(value)(item for item, stays in zip(value, keep, strict=True) if stays)


def _configs_around(model: nn.Module, stack: str) -> list[Any]:
    """The distinct configs of the modules around the stack; some models give their parts copies."""
    parts = stack.split(".")[:-1]
    around = [model.get_submodule(".".join(parts[:end])) for end in range(len(parts) + 1)]
    found = {id(module.config): module.config for module in around if hasattr(module, "config")}
    return [config for config in found.values() if hasattr(config, "to_dict")]


def renumbered(name: str, plan: Plan, leaves: Mapping[str, Sequence[str]] | None = None) -> str | None:
    """The name that a module or tensor of the dense model has once a plan's blocks are gone; None if it goes too.

    Args:
        name: qualified name in the dense model.
        plan: which blocks go.
        leaves: list of blocks -> what these are called in it; lists that are not named are numbered.
    """
    for stack, mask in plan.masks.items():
        if plan.sites[stack].kind is UnitKind.BLOCK and name.startswith(f"{stack}."):
            own = (leaves or {}).get(stack) or [str(index) for index in range(len(mask))]
            leaf, dot, rest = name.removeprefix(f"{stack}.").partition(".")
            now = places(own, kept_list(mask)).get(leaf, leaf)
            return None if now is None else f"{stack}.{now}{dot}{rest}"
    return name


def _set_all(changes: list[tuple[Any, str, Any]]) -> Undo:
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    for owner, name, value in changes:
        setattr(owner, name, value)

    def undo() -> None:
        for owner, name, value in reversed(before):
            setattr(owner, name, value)

    return undo


def kept_list(mask: torch.Tensor) -> list[bool]:
    """A block mask as plain booleans."""
    return [bool(stays) for stays in mask]
