"""A Hugging Face folder's weights under the names of the model's parameters, read when they are asked for.

Most checkpoints name tensors as the model does; some differ by a prefix, and mixtures of experts are stored expert
by expert and fused when they are loaded. transformers' own tables of such conversions are asked where names differ.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError, NumericsError
from secateur.core.select import all_finite
from secateur.core.shards import Entry, entries_of, read_rows, read_tensor
from secateur.shrink.folder import check_weights


@dataclass
class _Recipe:
    """How a parameter is made: the stored tensors, and transformers' conversion where one applies."""

    sources: list[tuple[str, str | None]] = field(default_factory=list)
    converter: Any = None
    key: str = ""


class Checkpoint:
    """The stored weights of a model.

    Args:
        folder: a Hugging Face folder with safetensors.
        model: of the folder's class, weights not needed.

    Raises:
        ModelError: damaged or missing shards, or a parameter that nothing stored can make.
    """

    def __init__(self, folder: Path, model: nn.Module):
        self.folder, self.model = folder, model
        self.entries: dict[str, Entry] = dict(entries_of(check_weights(folder)))
        self._own: dict[str, Tensor] = dict(model.state_dict())
        self._aliases = _aliases(model)
        self._recipes = self._direct()
        missing = self._missing()
        if missing:
            self._convert()
            missing = self._missing()
        if missing:
            raise ModelError(f"'{folder}' lacks the tensor '{missing[0]}' that {type(model).__name__} needs")
        self._check_shapes()

    def _direct(self) -> dict[str, _Recipe]:
        prefix = f"{getattr(self.model, 'base_model_prefix', '')}."
        found = {}
        for name in self._own:
            for stored in (name, name.removeprefix(prefix), f"{prefix}{name}"):
                if stored in self.entries:
                    found[name] = _Recipe([(stored, None)])
                    break
        return found

    def _missing(self) -> list[str]:
        return [name for name in self._own if not any(other in self._recipes for other in self._aliases[name])]

    def _convert(self) -> None:
        """Ask transformers what stored names become."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

        mapping = get_model_conversion_mapping(self.model)
        renamings = [one for one in mapping if isinstance(one, WeightRenaming)]
        converters = [one for one in mapping if isinstance(one, WeightConverter)]
        by_pattern = {pattern: one for one in converters for pattern in one.source_patterns}
        prefix = getattr(self.model, "base_model_prefix", None)
        recipes: dict[str, _Recipe] = defaultdict(_Recipe)
        for stored in sorted(self.entries, key=dot_natural_key):
            name, pattern = rename_source_key(stored, renamings, converters, prefix, self._own)
            recipe = recipes[name]
            recipe.sources.append((stored, pattern))
            if pattern is not None:
                recipe.converter, recipe.key = by_pattern[pattern], name
        for name, recipe in recipes.items():
            if name in self._own:
                self._recipes[name] = recipe

    def _check_shapes(self) -> None:
        for name, recipe in self._recipes.items():
            stored = recipe.sources[0][0]
            shape = self.entries[stored].shape
            if recipe.converter is None and shape != tuple(self._own[name].shape):
                raise ModelError(
                    f"'{self.folder}' holds '{stored}' as {list(shape)}, its config needs {list(self._own[name].shape)}"
                )

    def _recipe(self, name: str) -> _Recipe:
        return next(self._recipes[other] for other in self._aliases[name] if other in self._recipes)

    def read(self, name: str) -> Tensor:
        """A parameter or stored buffer by the model's name, as stored.

        Raises:
            NumericsError: NaN or infinity among the weights; names the tensor.
        """
        recipe = self._recipe(name)
        plain = recipe.converter is None
        value = read_tensor(self.entries[recipe.sources[0][0]]) if plain else self._converted(recipe)
        if value.is_floating_point() and not all_finite(value):
            raise NumericsError(
                f"'{name}' in '{self.folder}' holds NaN or infinity; repair the model before pruning it"
            )
        return value

    def _converted(self, recipe: _Recipe) -> Tensor:
        converter = copy.deepcopy(recipe.converter)
        for stored, pattern in recipe.sources:
            converter.add_tensor(recipe.key, stored, pattern, read_tensor(self.entries[stored]))
        made: Any = converter.convert(recipe.key, model=self.model, config=self.model.config)
        value = made[recipe.key]
        found: Tensor = value[0] if isinstance(value, list) else value
        return found

    def rows(self, name: str, rows: Tensor) -> Tensor | None:
        """Some rows of a parameter; None where it has to be read as a whole."""
        recipe = self._recipe(name)
        return None if recipe.converter is not None else read_rows(self.entries[recipe.sources[0][0]], rows)

    def stored_dtype(self, name: str) -> torch.dtype:
        """The dtype that one of the model's tensors is stored in; the usual one for tensors that are not stored."""
        known = next((self._recipes[other] for other in self._aliases.get(name, ()) if other in self._recipes), None)
        return self.dtype if known is None else self.entries[known.sources[0][0]].dtype

    def has(self, name: str) -> bool:
        """Whether the model's tensor of that name is stored, under its own or a tied name."""
        return name in self._own

    def stored(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors by the model's names under the names that a checkpoint of this kind gives them."""
        from transformers.core_model_loading import revert_weight_conversion

        found: dict[str, Tensor] = revert_weight_conversion(self.model, tensors)
        return found

    @cached_property
    def dtype(self) -> torch.dtype:
        """The most common floating-point dtype."""
        sizes: dict[torch.dtype, int] = defaultdict(int)
        for entry in self.entries.values():
            sizes[entry.dtype] += entry.bytes
        floats = {dtype: size for dtype, size in sizes.items() if dtype.is_floating_point}
        return max(floats, key=floats.__getitem__) if floats else torch.float32

    @property
    def bytes(self) -> int:
        """Of all stored tensors."""
        return sum(entry.bytes for entry in self.entries.values())

    def size(self, name: str) -> int:
        """Bytes of one of the model's tensors."""
        return sum(self.entries[stored].bytes for stored, _ in self._recipe(name).sources)


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Name -> all names of the same tensor, itself first."""
    groups: dict[int, list[str]] = defaultdict(list)
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for name, tensor in tensors.items():
        groups[id(tensor)].append(name)
    return {name: [name, *(one for one in groups[id(tensor)] if one != name)] for name, tensor in tensors.items()}
