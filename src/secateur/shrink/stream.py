"""Saving a model that is larger than memory: from the source's shards to new ones, a block at a time.

The model is the skeleton (parameters on the meta device), cut like any model, so that names, shapes and the
config are those of the result; every tensor is then made from its stored original when its shard is written.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.budget import Pattern
from secateur.core.errors import ModelError
from secateur.core.files import write_json
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent, track
from secateur.core.shards import shapes_of, write_shard
from secateur.core.units import UnitKind
from secateur.shrink.biases import add_biases_, given_biases
from secateur.shrink.checkpoint import Checkpoint
from secateur.shrink.cut import install, make_cut, removed_indices, smaller, structured
from secateur.shrink.depth import kept_list, remove_blocks_
from secateur.shrink.folder import INDEX, WEIGHTS
from secateur.shrink.pattern import check_pattern, pattern_of
from secateur.shrink.save import save
from secateur.structure.analysis import Structure
from secateur.structure.stacks import main_stack


@dataclass(frozen=True)
class Writer:
    """Makes the result's tensors out of the stored ones.

    Attributes:
        checkpoint: of the dense model.
        plan: masks and structured sites; read site by site.
        weights: new values at the dense model's size, by parameter.
    """

    checkpoint: Checkpoint
    plan: Plan
    weights: Mapping[str, Tensor]

    @functools.cached_property
    def removed(self) -> dict[str, dict[int, Tensor]]:
        """Parameter -> dimension -> indices that go."""
        return removed_indices(self.plan)

    @functools.cached_property
    def pattern(self) -> Pattern | None:
        """The N:M pattern that was asked for."""
        return pattern_of(self.plan)

    def tensor(self, name: str) -> Tensor:
        """One of the dense model's tensors as it is in the result."""
        given = self.weights.get(name)
        value = self.checkpoint.read(name) if given is None else given.to(self.checkpoint.stored_dtype(name))
        site = self.plan.sites.get(name)
        if site is not None and site.kind is UnitKind.WEIGHT:
            value = value.masked_fill_(~self.plan.masks[name], 0)
            if self.pattern is not None:
                check_pattern(self.plan, self.pattern, name, value)
        return smaller(value, self.removed.get(name, {}))


def cut_skeleton(model: nn.Module, plan: Plan, structure: Structure | None) -> dict[str, str]:
    """Give a skeleton the result's shapes, attributes and number of blocks, in place.

    Returns:
        Name of every stored tensor of the result -> its name in the dense model.
    """
    add_biases_(model, given_biases(plan))
    if structured(plan):
        assert structure is not None
        cut = make_cut(model, plan, structure)
        plan.attributes = tuple(change.to_json() for change in cut.attributes)
        install(model, cut)
    names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    for name, site in plan.sites.items():
        if site.kind is UnitKind.BLOCK and not bool(plan.masks[name].all()):
            remove_blocks_(model, name, kept_list(plan.masks[name]))
    stored = model.state_dict().keys()
    now = (*model.named_parameters(), *model.named_buffers())  # tied ones once
    return {name: names[id(tensor)] for name, tensor in now if name in stored}


def save_streamed(
    model: Any,
    folder: Path,
    plan: Plan,
    writer: Writer,
    *,
    structure: Structure | None = None,
    source: Path,
    force: bool = False,
    progress: Progress | None = None,
    **more: Any,
) -> Path:
    """Write the folder of a model whose weights are not in memory; everything beside the weights is as in `save`.

    Args:
        model: the skeleton; it is cut.
        folder: where to.
        plan: what was decided.
        writer: makes the tensors.
        structure: of the dense model, for plans that cut units.
        source: the dense model's folder.
        force: replace an existing folder.
        progress: told of every shard.
        **more: as for `save`.
    """
    origins = cut_skeleton(model, plan, structure)
    model.save_pretrained = functools.partial(_write_weights, model, writer, origins, progress or Silent())
    try:
        return save(model, folder, plan, source=source, verify=False, force=force, **more)
    finally:
        del model.save_pretrained


def _write_weights(
    model: Any, writer: Writer, origins: Mapping[str, str], progress: Progress, folder: str | Path
) -> None:
    """What `save_pretrained` does for a model in memory: config, and one shard per block and one for the rest."""
    folder = Path(folder)
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.architectures = [type(model).__name__]
    config.dtype = writer.checkpoint.dtype
    config.save_pretrained(folder)
    stack = main_stack(model)
    prefixes = [f"{name}." for name in stack.names]
    parts = [[name for name in origins if name.startswith(prefix)] for prefix in prefixes]
    rest = [name for name in origins if not name.startswith(tuple(prefixes))]
    files = [f"model-{i:05d}-of-{len(parts) + 1:05d}.safetensors" for i in range(1, len(parts) + 2)]
    weight_map: dict[str, str] = {}
    total = 0
    for names, file in track(list(zip(parts, files, strict=False)), progress, "writing"):
        tensors = writer.checkpoint.stored({name: writer.tensor(origins[name]) for name in names})
        total += write_shard(folder / file, shapes_of(tensors), iter(tensors.items()))
        weight_map |= dict.fromkeys(tensors, file)
    total += _write_rest(writer, {name: origins[name] for name in rest}, model, folder / files[-1], weight_map)
    if len(files) == 1:
        (folder / files[0]).rename(folder / WEIGHTS)
        return
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _write_rest(
    writer: Writer, origins: Mapping[str, str], model: nn.Module, file: Path, weight_map: dict[str, str]
) -> int:
    """The tensors outside the blocks, one at a time: embeddings may be larger than a block."""
    state = model.state_dict()
    renamed = {name: next(iter(writer.checkpoint.stored({name: torch.empty(0, device="meta")}))) for name in origins}
    shapes = {
        renamed[name]: (writer.checkpoint.stored_dtype(origin), tuple(state[name].shape))
        for name, origin in origins.items()
    }

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, origin in origins.items():
            yield renamed[name], writer.tensor(origin)

    weight_map |= dict.fromkeys(shapes, file.name)
    return write_shard(file, shapes, tensors())


def check_space(folder: Path, wanted: int) -> None:
    """Refuse before any work what the disk cannot hold.

    Raises:
        ModelError: says how much is missing.
    """
    import shutil

    parent = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    free = shutil.disk_usage(parent).free
    if free < wanted:
        raise ModelError(
            f"'{parent}' has {free / 2**30:.1f} GiB free and the result needs about {wanted / 2**30:.1f} GiB; "
            "free some space or choose another --out"
        )
