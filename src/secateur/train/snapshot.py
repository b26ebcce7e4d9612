"""Snapshots of a training: weights, optimiser, scheduler, masks, random states and data position, keyed by step."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core.errors import PlanError
from secateur.core.trees import load_tree, save_tree
from secateur.train.masking import unwrapped


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers, batch-norm statistics included: training on does not change them."""
    return {name: value.detach().clone() for name, value in unwrapped(model).state_dict().items()}


def put_back(model: nn.Module, state: dict[str, Tensor]) -> None:
    """Set all parameters and buffers, in place, to copied values."""
    unwrapped(model).load_state_dict(state)


@dataclass
class Snapshot:
    """Everything that training needs to go on from one step.

    Attributes:
        step: optimiser steps done.
        model: all parameters and buffers.
        others: states of the optimiser, scheduler, sparsifier or anything else with a `state_dict`.
        randomness: states of Python's, NumPy's and torch's generators.
        position: where the data stream is, in the caller's terms.
    """

    step: int
    model: dict[str, Tensor]
    others: dict[str, Any] = field(default_factory=dict)
    randomness: dict[str, Any] = field(default_factory=dict)
    position: Any = None

    @classmethod
    def take(cls, model: nn.Module, step: int, position: Any = None, **others: Any) -> Snapshot:
        """A copy of the present state; `others` are objects with a `state_dict`."""
        states = {name: copy.deepcopy(thing.state_dict()) for name, thing in others.items()}
        return cls(step, model_state(model), states, random_state(), position)

    def restore(self, model: nn.Module, **others: Any) -> None:
        """Set everything back. What `others` does not name stays as it is.

        Raises:
            PlanError: the snapshot holds no state of that name.
        """
        put_back(model, self.model)
        for name, thing in others.items():
            if name not in self.others:
                raise PlanError(f"the snapshot of step {self.step} holds no state of the {name}")
            thing.load_state_dict(copy.deepcopy(self.others[name]))
        set_random_state(self.randomness)

    def save(self, folder: Path) -> None:
        """Write a folder of safetensors and JSON that appears whole or not at all."""
        save_tree({key: getattr(self, key) for key in self.__dataclass_fields__}, folder)

    @classmethod
    def load(cls, folder: Path) -> Snapshot:
        """Read a snapshot's folder.

        Raises:
            PlanError: missing, damaged, or no snapshot.
        """
        found = load_tree(folder)
        if not isinstance(found, dict) or found.keys() != cls.__dataclass_fields__.keys():
            raise PlanError(f"'{folder}' is no snapshot of a training")
        return cls(**found)


class Store:
    """Snapshots by step, in a folder or in memory."""

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._held: dict[int, Snapshot] = {}

    def put(self, snapshot: Snapshot) -> None:
        """Keep a snapshot under its step."""
        if self.folder is None:
            self._held[snapshot.step] = snapshot
        else:
            snapshot.save(self.folder / f"step-{snapshot.step}")

    def get(self, step: int) -> Snapshot:
        """The snapshot of a step.

        Raises:
            PlanError: there is none; lists the steps there are.
        """
        if step not in self:
            raise PlanError(f"no snapshot of step {step}; there are {sorted(self)}")
        return self._held[step] if self.folder is None else Snapshot.load(self.folder / f"step-{step}")

    def __iter__(self) -> Iterator[int]:
        if self.folder is None:
            return iter(self._held)
        return (int(path.name.removeprefix("step-")) for path in self.folder.glob("step-*"))

    def __contains__(self, step: int) -> bool:
        return step in set(iter(self))


def random_state() -> dict[str, Any]:
    """States of Python's, NumPy's and torch's generators as plain data."""
    kind, keys, place, has, cached = np.random.get_state(legacy=True)
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), place, has, cached),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The inverse of `random_state`."""
    random.setstate(state["python"])
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
