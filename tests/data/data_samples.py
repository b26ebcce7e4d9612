"""Small inputs that the tests of this folder share."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


class Characters:
    """A tokenizer of one token per character; remembers how much it was given."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, text: str, *, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        assert not add_special_tokens
        assert not kwargs  # only a transformers tokenizer knows `verbose`
        self.seen.append(text)
        return [ord(character) for character in text]


class Warns(Characters):
    """Like a transformers tokenizer: warns of long text unless told to be quiet."""

    model_max_length = 4

    def encode(self, text: str, *, add_special_tokens: bool = True, **kwargs: Any) -> list[int]:
        assert kwargs == {"verbose": False}
        return super().encode(text, add_special_tokens=add_special_tokens)


def numbered(count: int, start: int = 0x4E00) -> str:
    """Text without spaces whose characters are all different."""
    return "".join(chr(start + i) for i in range(count))


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def colour(value: int, height: int = 4, width: int = 4) -> bytes:
    """A PNG whose red is `value`, green 255 - value, blue 7."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[:] = value, 255 - value, 7
    return encoded(pixels)


def grey(value: int, height: int = 4, width: int = 4) -> bytes:
    return encoded(np.full((height, width), value, dtype=np.uint8))


def write_parquet(
    path: Path,
    images: list[Any],
    labels: list[Any],
    columns: tuple[str, str] = ("image", "label"),
    classes: list[str] | None = None,
    group: int = 3,
) -> Path:
    """A table as on the hub: images as {bytes, path}, in row groups of `group`."""
    cells = [{"bytes": item, "path": None} if isinstance(item, bytes) else item for item in images]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({columns[0]: pa.array(cells, kind), columns[1]: labels})
    if classes is not None:
        features = {columns[1]: {"names": classes, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=group)
    return path
