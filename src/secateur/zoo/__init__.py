"""Small trained models and their data, shipped with the library: they need no network on any machine.

`import secateur.zoo` itself does not import torch; the functions that need it load on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from secateur.zoo.catalogue import Recipe, ZooModel, ZooTask, card, data_names, folder, get, names

if TYPE_CHECKING:
    from secateur.zoo.builder import build
    from secateur.zoo.grading import quality
    from secateur.zoo.loading import load_model
    from secateur.zoo.sources import data_digest, load_data

__all__ = [
    "Recipe",
    "ZooModel",
    "ZooTask",
    "build",
    "card",
    "data_digest",
    "data_names",
    "folder",
    "get",
    "load_data",
    "load_model",
    "names",
    "quality",
]

_HOMES = {
    "build": "builder",
    "data_digest": "sources",
    "load_data": "sources",
    "load_model": "loading",
    "quality": "grading",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
