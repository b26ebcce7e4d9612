"""Data sets of the Hugging Face hub; used only when the user names one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from secateur.core.errors import DataError, MissingExtraError, SecateurError
from secateur.data.chat import TEXT, WANTED, Rows, is_readable
from secateur.data.dataset import Splits
from secateur.data.files import (
    EVALUATION_NAMES,
    FILE_KEYS,
    TEXT_SAMPLES,
    TRAINING_NAMES,
    Options,
    parse_spec,
    stored_bytes,
)
from secateur.data.images import IMAGE_COLUMNS, LABEL_COLUMNS, Encoded, ImageSource, image_splits
from secateur.data.text import SEPARATOR, Tokenizer, text_splits

HUB_KEYS: Mapping[str, Callable[[str], Any]] = {**FILE_KEYS, "config": str}
TEXT_LIMIT = 256  # evaluation windows where the user sets no limit: a split on the hub may be terabytes
# characters read per token wanted: four make a token of English, and most documents of web text are
# shorter than a window and rejected
CHARACTERS_PER_TOKEN = 16


def open_hub(spec: str, tokenizer: Tokenizer | None = None, seed: int = 0, options: Options | None = None) -> Splits:
    """Samples to calibrate on and to measure on, from a data set on the Hugging Face hub.

    A data set with a column `text`, or with conversations as in `open_file`, is streamed: only as much is downloaded as
    the windows need, from its start, and evaluation stops at 256 windows unless `limit` says otherwise. One with images
    and labels is downloaded whole. A data set without a split to measure on has a part held out.

    Args:
        spec: the id, with options after a question mark: `Salesforce/wikitext?config=wikitext-2-raw-v1`.
        tokenizer: needed for text.
        seed: of every draw.
        options: what holds where the spec says nothing; None for the defaults of `Options`.

    Raises:
        DataError: no network, an unknown id, or unsuitable columns.
        UnknownNameError: an option that does not exist.
        MissingExtraError: the `datasets` library is not installed.
    """
    name, options = parse_spec(spec, options or Options(), HUB_KEYS)
    try:
        import datasets
    except ImportError:
        raise MissingExtraError("datasets", "data", "opening a data set of the hub") from None
    with _failures_named(name):
        streams = datasets.load_dataset(name, options.config, streaming=True)
        train, test = _choose(name, list(streams))
        columns = _columns(streams[train])
        if is_readable(columns) and not set(IMAGE_COLUMNS).intersection(columns):
            return _text(name, streams[train], streams[test] if test else None, tokenizer, seed=seed, options=options)
        image, label = _pick(name, columns, IMAGE_COLUMNS), _pick(name, columns, LABEL_COLUMNS)
        sources = [
            _source(name, datasets.load_dataset(name, options.config, split=split), image, label)
            for split in (train, test)
            if split
        ]
        last = sources[1] if test else None
        return image_splits(sources[0], last, options.images, seed, samples=options.samples, limit=options.limit)


@contextlib.contextmanager
def _failures_named(name: str) -> Iterator[None]:
    """One sentence for whatever the library and the network may raise; the cause stays attached."""
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        raise DataError(
            f"cannot load '{name}' from the hub: {reason}; check the id and the network, or give a local file"
        ) from error


def _choose(name: str, splits: Sequence[str]) -> tuple[str, str | None]:
    """The split to calibrate on and the one to measure on, if there are two."""
    train = next((split for split in (*TRAINING_NAMES, *splits) if split in splits), None)
    if train is None:
        raise DataError(f"the hub data set '{name}' has no splits")
    return train, next((split for split in EVALUATION_NAMES if split in splits and split != train), None)


def _columns(stream: Any) -> list[str]:
    """Names of the columns; read off the first row where the data set does not declare them."""
    return list(stream.features if stream.features is not None else next(iter(stream), {}))


def _pick(name: str, columns: Collection[str], wanted: Sequence[str]) -> str:
    for column in wanted:
        if column in columns:
            return column
    raise DataError(
        f"the hub data set '{name}' has the columns {', '.join(columns)}; it needs '{TEXT}', or "
        f"{' or '.join(IMAGE_COLUMNS)} with {' or '.join(LABEL_COLUMNS)}, or {WANTED}"
    )


def _text(
    name: str, train: Any, test: Any | None, tokenizer: Tokenizer | None, *, seed: int, options: Options
) -> Splits:
    if tokenizer is None:
        raise DataError(f"'{name}' is text and needs a tokenizer; give a model folder that holds one")
    count, limit = options.samples or TEXT_SAMPLES, options.limit or TEXT_LIMIT
    window, read = options.length * CHARACTERS_PER_TOKEN, Rows(tokenizer, options.chat)
    return text_splits(
        name,
        _documents(name, train, read, count * window),
        tokenizer,
        length=options.length,
        count=count,
        seed=seed,
        evaluation_documents=None if test is None else _documents(name, test, read, limit * window),
        limit=limit,
    )


def _documents(name: str, stream: Iterable[Mapping[str, Any]], rows: Rows, characters: int) -> list[str]:
    """Texts from the start of a stream until they have so many characters together."""
    documents: list[str] = []
    read = 0
    for row in stream:
        text = rows.document(row, f"row {len(documents)} of the hub data set '{name}'")
        documents.append(text)
        read += len(text) + len(SEPARATOR)
        if read >= characters:
            break
    return documents


def _source(name: str, table: Any, image: str, label: str) -> ImageSource:
    import datasets

    classes = tuple(getattr(table.features[label], "names", None) or ())
    encoded = table.cast_column(image, datasets.Image(decode=False))
    return ImageSource(name, len(table), classes, partial(_read_rows, name, encoded, image, label))


def _read_rows(name: str, table: Any, image: str, label: str, rows: Sequence[int]) -> Iterator[Encoded]:
    for row, record in zip(rows, table.select(rows), strict=True):
        where = f"row {row} of the hub data set '{name}'"
        cell = record[image]
        # a data set made of image files keeps their bytes in the library's cache and gives the path
        if cell and cell["bytes"] is None and cell["path"]:
            cell = Path(cell["path"]).read_bytes()
        yield Encoded(where, stored_bytes(cell, where), record[label])
