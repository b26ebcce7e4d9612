"""Shipped models with their trained weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from secateur.core.errors import ModelError
from secateur.zoo.catalogue import WEIGHTS, ZooModel, ZooTask, folder, get


def make(entry: ZooModel) -> nn.Module:
    """The model untrained, from the entry's factory; draws from torch's global generator."""
    module, _, function = entry.factory.partition(":")
    model: nn.Module = getattr(import_module(module), function)()
    return model


def load_model(name: str) -> nn.Module:
    """A shipped model in eval mode, float32 on the CPU.

    Raises:
        UnknownNameError: gives the nearest names.
        ModelError: the shipped files are missing or damaged.
    """
    return load_from(get(name), folder(name))


def load_from(entry: ZooModel, path: Path) -> nn.Module:
    """The model whose files are in `path`, a shipped folder or one that `build` wrote.

    Raises:
        ModelError: a file is missing or damaged.
    """
    try:
        model = _from_pretrained(entry, path) if entry.pretrained else _from_weights(entry, path)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(
            f"the files of 'zoo:{entry.name}' in '{path}' are missing or damaged ({error}); install secateur again"
        ) from error
    return model.eval()


def _from_weights(entry: ZooModel, path: Path) -> nn.Module:
    model = make(entry)
    model.load_state_dict(load_file(path / WEIGHTS))
    return model


def _from_pretrained(entry: ZooModel, path: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM, AutoModelForImageClassification

    auto = AutoModelForCausalLM if entry.task is ZooTask.LANGUAGE else AutoModelForImageClassification
    with no_bars():
        model: nn.Module = auto.from_pretrained(path, local_files_only=True, dtype=torch.float32)
    return model


@contextlib.contextmanager
def no_bars() -> Iterator[None]:
    """Keep transformers from drawing its bars: the library reports progress only to who asked."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
