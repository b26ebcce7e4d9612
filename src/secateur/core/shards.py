"""safetensors files, one tensor at a time: read into memory of their own, written as they come.

A file is an 8-byte length, a JSON header and the tensors' bytes. Reading goes by plain reads instead of a memory
map, so that what has been used can really be given back; writing holds one tensor at a time.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from secateur.core.errors import ModelError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000  # bytes, as in the safetensors library


@dataclass(frozen=True)
class Entry:
    """Where a tensor stands.

    Attributes:
        file: the shard.
        dtype, shape: of the tensor.
        start: offset of its first byte in the file.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def bytes(self) -> int:
        """Its size."""
        return prod(self.shape) * self.dtype.itemsize


def read_header(file: Path) -> dict[str, Entry]:
    """Name -> entry of one safetensors file.

    Raises:
        ModelError: missing, truncated or corrupt; names the file.
    """
    try:
        with file.open("rb") as stream:
            head = stream.read(8)
            length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= length <= LONGEST_HEADER:
                raise ValueError("it has no header")
            header = json.loads(stream.read(length))
        found = {
            name: Entry(file, DTYPES[entry["dtype"]], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
            for name, entry in header.items()
            if name != "__metadata__"
        }
        end = max((entry.start + entry.bytes for entry in found.values()), default=0)
        if file.stat().st_size < end:
            raise ValueError(f"it ends at byte {file.stat().st_size} instead of {end}")
    except FileNotFoundError:
        raise ModelError(f"weight file '{file}' is missing") from None
    except KeyError as error:
        raise ModelError(f"weight file '{file}' holds a tensor of a dtype that is not supported: {error}") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelError(f"weight file '{file}' is truncated or corrupt ({error}); fetch it again") from error
    return found


def read_tensor(entry: Entry) -> Tensor:
    """A tensor of its own memory.

    Raises:
        ModelError: the file is shorter than its header says.
    """
    value = torch.empty(entry.shape, dtype=entry.dtype)
    _fill(value, entry, 0)
    return value


def read_rows(entry: Entry, rows: Tensor) -> Tensor:
    """Rows of a tensor, `[len(rows), ...]`, without reading the others.

    Args:
        entry: of a tensor with at least one dimension.
        rows: int64 indices along its first dimension, ascending.
    """
    value = torch.empty((len(rows), *entry.shape[1:]), dtype=entry.dtype)
    size = entry.bytes // max(1, entry.shape[0])
    with entry.file.open("rb", buffering=0) as stream:
        for place, row in enumerate(rows.tolist()):
            _read_into(stream, value[place], entry, row * size)
    return value


def _fill(value: Tensor, entry: Entry, offset: int) -> None:
    with entry.file.open("rb", buffering=0) as stream:
        _read_into(stream, value, entry, offset)


def _read_into(stream: Any, value: Tensor, entry: Entry, offset: int) -> None:
    wanted = memory(value)
    stream.seek(entry.start + offset)
    done = 0
    while done < len(wanted):
        count = stream.readinto(wanted[done:])
        if not count:
            raise ModelError(f"weight file '{entry.file}' is shorter than its header says; fetch it again")
        done += count


def memory(value: Tensor) -> Any:
    """The bytes of a contiguous CPU tensor, for files to read into and write from."""
    if not value.numel():
        return memoryview(b"")
    return memoryview(value.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_shard(
    file: Path, shapes: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], tensors: Iterable[tuple[str, Tensor]]
) -> int:
    """Write a safetensors file whose tensors are made one after the other; it gets its name when it is whole.

    Args:
        file: where to.
        shapes: name -> dtype and shape of everything that will come.
        tensors: the tensors, in any order.

    Returns:
        The bytes of the tensors.

    Raises:
        ValueError: what came is not what was promised.
    """
    offsets, at = {}, 0
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for name in sorted(shapes, key=lambda one: (-shapes[one][0].itemsize, one)):  # keeps tensors aligned
        dtype, shape = shapes[name]
        size = prod(shape) * dtype.itemsize
        header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}
        offsets[name], at = at, at + size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = file.with_name(file.name + ".tmp")
    with temporary.open("wb", buffering=0) as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        start = stream.tell()
        for name, tensor in tensors:
            value = tensor.detach().cpu().contiguous()
            if (value.dtype, tuple(value.shape)) != shapes[name]:
                raise ValueError(f"'{name}' is {value.dtype} {list(value.shape)}, promised was {shapes[name]}")
            stream.seek(start + offsets.pop(name))
            _write_all(stream, memory(value))
        if offsets:
            raise ValueError(f"'{min(offsets)}' did not come")
    os.replace(temporary, file)
    return at


def _write_all(stream: Any, content: Any) -> None:
    done = 0
    while done < len(content):
        done += stream.write(content[done:])


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """What `write_shard` wants to know of tensors that are there."""
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def entries_of(files: Iterable[Path]) -> Iterator[tuple[str, Entry]]:
    """All tensors of several files."""
    for file in files:
        yield from read_header(file).items()
