"""Variants of matrices at several levels of sparsity, from which a search puts candidates together (a supernet).

Only columns that stay are kept. In memory, or in a folder with one safetensors file for each matrix and level, so
that what is larger than memory can be searched and a killed run finds what it had.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from secateur.core.errors import OutputError, PlanError

HEADER = 256  # bytes that a file needs besides its numbers, about
INDEX = torch.int32


@dataclass(frozen=True)
class Variant:
    """A matrix `[outputs, inputs]` of which `kept` columns stay, `itemsize` bytes each number."""

    outputs: int
    kept: int
    itemsize: int

    @property
    def bytes(self) -> int:
        """What it takes in a bank."""
        return self.kept * (self.outputs * self.itemsize + INDEX.itemsize) + HEADER


def bank_bytes(variants: Iterable[Variant]) -> int:
    """What a bank will take, known before anything is computed."""
    return sum(variant.bytes for variant in variants)


def in_words(size: int) -> str:
    """Bytes for people, e.g. `12.5 MiB`."""
    amount, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if amount < 1024:
            break
        amount, unit = amount / 1024, larger
    return f"{amount:.4g} {unit}"


class LevelBank:
    """Matrices by name and level.

    Args:
        folder: where the files go, made if it is not there; None keeps everything in memory.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._held: dict[tuple[str, int], dict[str, Tensor]] = {}

    def require(self, needed: int) -> None:
        """Refuse before the work begins what will not fit.

        Raises:
            OutputError: the disk has less than `needed` bytes free besides what the bank has already.
        """
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free + self.bytes
        if needed > free:
            raise OutputError(
                f"the supernet needs {in_words(needed)} in '{self.folder}', and {in_words(free)} are free; make room, "
                "work in a folder on another disk, or take fewer levels"
            )

    @property
    def bytes(self) -> int:
        """What the bank takes now."""
        if self.folder is not None:
            return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))
        return sum(tensor.nbytes for held in self._held.values() for tensor in held.values())

    def write(self, name: str, level: int, weight: Tensor, columns: Tensor) -> None:
        """Keep one variant.

        Args:
            name: of the matrix.
            level: any integer.
            weight: `[O, I]`, zero outside `columns`; its dtype is kept.
            columns: int64 `[kept]`.
        """
        held = {"values": weight[:, columns].cpu().contiguous(), "columns": columns.cpu().to(INDEX)}
        if self.folder is None:
            self._held[name, level] = held
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self._path(name, level)
        temporary = path.with_suffix(".tmp")
        save_file(held, temporary, {"inputs": str(weight.shape[1])})
        os.replace(temporary, path)

    def read(self, name: str, level: int, inputs: int) -> Tensor:
        """One variant as `[O, inputs]`, on the CPU.

        Raises:
            PlanError: it is missing or damaged.
        """
        held = self._held.get((name, level)) if self.folder is None else self._loaded(name, level)
        if held is None:
            raise PlanError(f"the bank holds no level {level} of '{name}'")
        values = held["values"]
        weight = torch.zeros(len(values), inputs, dtype=values.dtype)
        return weight.index_copy_(1, held["columns"].long(), values)

    def drop(self) -> None:
        """Forget everything and remove the folder."""
        self._held.clear()
        if self.folder is not None and self.folder.exists():
            shutil.rmtree(self.folder)

    def _path(self, name: str, level: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}@{level:+d}.safetensors"

    def _loaded(self, name: str, level: int) -> dict[str, Tensor]:
        path = self._path(name, level)
        try:
            found: dict[str, Tensor] = load_file(path)
        except (OSError, SafetensorError) as error:
            raise PlanError(
                f"'{path}' is missing or damaged: {error}; delete the work folder and start again"
            ) from error
        return found
