"""Nested plain data with tensors in it: a walk, and as safetensors and JSON, as training state is kept. No pickle."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.errors import PlanError
from secateur.core.files import read_json, whole_folder

TENSOR, PAIRS, TUPLE = "__tensor__", "__pairs__", "__tuple__"


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """The tensors in mappings, lists and tuples, such as a model's inputs or outputs, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (Mapping, list, tuple)):
        for one in tree.values() if isinstance(tree, Mapping) else tree:
            yield from tensors_in(one)


def flatten(tree: Any) -> tuple[Any, dict[str, Tensor]]:
    """Plain JSON data with references, and the tensors they refer to.

    Raises:
        TypeError: something that is no tensor, number, string, None, list, tuple or dict.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any) -> Any:
        if isinstance(node, Tensor):
            key = f"t{len(tensors)}"
            tensors[key] = node.detach().cpu().contiguous().clone()
            return {TENSOR: key}
        if isinstance(node, dict):
            return {PAIRS: [[walk(key), walk(value)] for key, value in node.items()]}
        if isinstance(node, tuple):
            return {TUPLE: [walk(item) for item in node]}
        if isinstance(node, list):
            return [walk(item) for item in node]
        if node is None or isinstance(node, (bool, int, float, str)):
            return node
        raise TypeError(f"cannot store a {type(node).__name__} in training state")

    return walk(tree), tensors


def rebuild(data: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(data, list):
        return [rebuild(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if TENSOR in data:
        return tensors[data[TENSOR]]
    if TUPLE in data:
        return tuple(rebuild(item, tensors) for item in data[TUPLE])
    return {rebuild(key, tensors): rebuild(value, tensors) for key, value in data[PAIRS]}


def save_tree(tree: Any, folder: Path) -> None:
    """Write a folder that appears whole or not at all; an older one is replaced."""
    data, tensors = flatten(tree)
    with whole_folder(folder, force=True) as temporary:
        save_file(tensors or {"none": torch.zeros(0)}, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(data, sort_keys=False) + "\n", encoding="utf-8")


def load_tree(folder: Path) -> Any:
    """Read what `save_tree` wrote.

    Raises:
        PlanError: missing or damaged; names the file.
    """
    data = read_json(folder / "state.json")
    try:
        return rebuild(data, load_file(folder / "state.safetensors"))
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise PlanError(f"'{folder / 'state.safetensors'}' is missing or damaged: {error}") from error
