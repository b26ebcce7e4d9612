"""What long work has found so far, step by step: in memory, or in a folder so that a killed run goes on.

A walk over a model's blocks writes notes for each block. A step's notes appear whole or not at all; a run that
starts again with the same folder skips the steps that have theirs.
"""

from __future__ import annotations

import json
import os
from collections import ChainMap
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from secateur.core.errors import PlanError
from secateur.core.masks import pack, unpack

NOTES, STATE, DONE = ".safetensors", ".state", ".json"


@dataclass
class Notes:
    """What was found out in one step.

    Attributes:
        tensors: by name; masks (bool) take one bit per entry on disk.
        facts: name -> figures.
        warnings: sentences for the user.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, dict[str, float]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


class Journal:
    """Sections of notes, by name."""

    def __init__(self, folder: Path | None = None, *, spill: bool = False):
        """In memory without a folder; `spill` leaves states between steps on disk instead of in memory as well."""
        self.folder, self.spill = folder, spill
        self._sections: dict[str, Section] = {}

    def section(self, name: str) -> Section:
        """The section of that name; the same one for the same name."""
        if name not in self._sections:
            folder = None if self.folder is None else self.folder / name
            self._sections[name] = Section(folder, self.spill)
        return self._sections[name]


class Section(Mapping[str, Notes]):
    """Step name -> notes, in the order of writing; read from disk when they are asked for."""

    def __init__(self, folder: Path | None, spill: bool = False):
        self.folder, self.spill = folder, spill
        self._notes: dict[str, Notes] = {}
        self._files: dict[str, Path] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            for path in sorted(folder.glob(f"*{NOTES}")):  # numbered in the order of writing
                self._files[path.name.partition("-")[2].removesuffix(NOTES)] = path

    def __getitem__(self, name: str) -> Notes:
        if self.folder is None:
            return self._notes[name]
        return _read(self._files[name])

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._notes if self.folder is None else self._files))

    def __len__(self) -> int:
        return len(self._notes if self.folder is None else self._files)

    def write(self, name: str, notes: Notes) -> None:
        """Keep the notes of one step."""
        if self.folder is None:
            self._notes[name] = notes
            return
        path = self._files.get(name, self.folder / f"{len(self._files):06d}-{name}{NOTES}")
        _write(path, notes)
        self._files[name] = path

    def names_of(self, name: str) -> list[str]:
        """The names of one step's tensors."""
        if self.folder is None:
            return list(self._notes[name].tensors)
        with _opened(self._files[name]) as file:
            return list(file.keys())

    def tensor(self, name: str, key: str) -> Tensor:
        """One tensor of one step."""
        if self.folder is None:
            return self._notes[name].tensors[key]
        path = self._files[name]
        with _opened(path) as file:
            return _unpacked(file.get_tensor(key), key, _about(file, path))

    def keep_state(self, name: str, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Keep what the step `name` starts from; what to go on with in this run, from disk if states are spilled."""
        if self.folder is None:
            return tensors
        kept = write_tensors(self.folder / f"{name}{STATE}", tensors)
        return kept if self.spill else tensors

    def state(self, name: str) -> Sequence[Tensor] | None:
        """What `keep_state` kept for the step; None if there is nothing."""
        if self.folder is None or not (self.folder / f"{name}{STATE}{DONE}").exists():
            return None
        kept = StoredTensors(self.folder / f"{name}{STATE}")
        return kept if self.spill else list(kept)

    def drop_state(self, name: str) -> None:
        """What the step started from is not needed any more."""
        if self.folder is not None:
            for suffix in (f"{STATE}{DONE}", STATE):
                (self.folder / f"{name}{suffix}").unlink(missing_ok=True)

    def warnings(self) -> list[str]:
        """All sentences, in order."""
        return [sentence for notes in self.values() for sentence in notes.warnings]

    def facts(self) -> dict[str, dict[str, float]]:
        """All figures."""
        return {name: values for notes in self.values() for name, values in notes.facts.items()}

    def tensors(self, group: str) -> Mapping[str, Tensor]:
        """The tensors named `group/...` of all steps, by the rest of their names, read when they are asked for."""
        return _Group(self, group)


def overlaid(found: Mapping[str, Tensor]) -> MutableMapping[str, Tensor]:
    """Tensors that are read when they are asked for, and room for others beside them."""
    return ChainMap({}, cast("MutableMapping[str, Tensor]", found))  # only the first of a chain's maps is written to


class _Group(Mapping[str, Tensor]):
    def __init__(self, section: Section, group: str):
        self.section, self.prefix = section, f"{group}/"
        self._step = {
            name.removeprefix(self.prefix): step
            for step in section
            for name in section.names_of(step)
            if name.startswith(self.prefix)
        }

    def __getitem__(self, name: str) -> Tensor:
        return self.section.tensor(self._step[name], f"{self.prefix}{name}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._step)

    def __len__(self) -> int:
        return len(self._step)


def _write(path: Path, notes: Notes) -> None:
    shapes = {name: list(value.shape) for name, value in notes.tensors.items() if value.dtype == torch.bool}
    tensors = {
        name: pack(value) if name in shapes else value.detach().cpu().contiguous()
        for name, value in notes.tensors.items()
    }
    about = {"masks": shapes, "facts": notes.facts, "warnings": notes.warnings}
    temporary = path.with_suffix(".tmp")
    save_file(tensors, temporary, {"notes": json.dumps(about, sort_keys=True)})
    os.replace(temporary, path)


def _read(path: Path) -> Notes:
    with _opened(path) as file:
        about = _about(file, path)
        tensors = {name: _unpacked(file.get_tensor(name), name, about) for name in sorted(file.keys())}
    return Notes(tensors, about["facts"], about["warnings"])


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise PlanError(f"'{path}' is missing or damaged: {error}; delete the folder and start again") from error


def _about(file: Any, path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(file.metadata()["notes"])
    except (KeyError, TypeError, ValueError) as error:
        raise PlanError(f"'{path}' holds no notes; delete the folder and start again") from error
    return found


def _unpacked(value: Tensor, name: str, about: Mapping[str, Any]) -> Tensor:
    shape = about["masks"].get(name)
    return value if shape is None else unpack(value, tuple(shape), name)


class StoredTensors(Sequence[Tensor]):
    """Tensors one after the other in a file, read one at a time."""

    def __init__(self, path: Path):
        self.path = path
        self.entries = json.loads(path.with_name(path.name + DONE).read_text(encoding="utf-8"))

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        entry = self.entries[index]
        value = torch.empty(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        if value.numel():
            with self.path.open("rb", buffering=0) as file:
                file.seek(entry["offset"])
                found = file.readinto(_bytes_of(value))
            if found != value.numel() * value.element_size():
                raise PlanError(f"'{self.path}' is shorter than it says; delete the folder and start again")
        return value


def _bytes_of(value: Tensor) -> Any:
    """A contiguous tensor's memory, for files to read into and write from."""
    return memoryview(value.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_tensors(path: Path, tensors: Sequence[Tensor]) -> StoredTensors:
    """Write tensors to a file, with a list of contents beside it that appears last."""
    entries, offset = [], 0
    with path.open("wb") as file:
        for tensor in tensors:
            value = tensor.detach().cpu().contiguous()
            entries.append({"shape": list(value.shape), "dtype": str(value.dtype)[6:], "offset": offset})
            if value.numel():
                offset += file.write(_bytes_of(value))
    done = path.with_name(path.name + DONE)
    temporary = done.with_name(done.name + ".tmp")
    temporary.write_text(json.dumps(entries), encoding="utf-8")
    os.replace(temporary, done)
    return StoredTensors(path)
