"""Files and folders that hold data: text, JSON lines, parquet tables and folders of images."""

from __future__ import annotations

import contextlib
import json
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.core.errors import DataError, MissingExtraError, UnknownNameError
from secateur.data.chat import FIELDS, TEXT, WANTED, Rows, is_readable
from secateur.data.dataset import Splits
from secateur.data.images import IMAGE_COLUMNS, LABEL_COLUMNS, Encoded, ImageOptions, ImageSource, image_splits
from secateur.data.text import Tokenizer, text_splits

if TYPE_CHECKING:
    import pyarrow.parquet as pq

TEXT_SAMPLES = 128  # calibration windows, as in Wanda and SparseGPT
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg")
FILE_SUFFIXES = (".parquet", ".jsonl", ".txt")
TRAINING_NAMES = ("train", "validation", "valid", "val")  # the first that is there calibrates
EVALUATION_NAMES = ("test", "validation", "valid", "val")  # the first other one is measured on


@dataclass(frozen=True)
class Options:
    """How a data source is read.

    Attributes:
        length: tokens per window of text.
        samples: at most so many calibration samples; None for 128 windows of text, or all images.
        limit: at most so many images from each file, or evaluation windows of text; None for all.
        images: how images become numbers.
        config: which configuration of a hub data set.
        chat: rows of text are put into the tokenizer's chat template, see `Rows`.
    """

    length: int = 128
    samples: int | None = None
    limit: int | None = None
    images: ImageOptions = field(default_factory=ImageOptions)
    config: str | None = None
    chat: bool = False

    def __post_init__(self) -> None:
        for name in ("length", "samples", "limit"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise DataError(f"data option '{name}' must be 1 or more, got {value}")


def _floats(text: str) -> tuple[float, ...]:
    return tuple(float(part) for part in text.split(","))


def _switch(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError(text)
    return text == "1"


IMAGE_KEYS: Mapping[str, Callable[[str], Any]] = {"size": int, "channels": int, "mean": _floats, "std": _floats}
FILE_KEYS: Mapping[str, Callable[[str], Any]] = {
    "length": int,
    "samples": int,
    "limit": int,
    "chat": _switch,
    **IMAGE_KEYS,
}


def parse_spec(
    spec: str, defaults: Options, known: Mapping[str, Callable[[str], Any]] = FILE_KEYS
) -> tuple[str, Options]:
    """Take `path?key=value&key=value` apart; keys that are not given keep their defaults.

    Raises:
        UnknownNameError: a key that does not exist.
        DataError: a value of the wrong form.
    """
    path, _, query = spec.partition("?")
    values: dict[str, Any] = {}
    for part in filter(None, query.split("&")):
        key, _, text = part.partition("=")
        if key not in known:
            raise UnknownNameError("data option", key, known)
        try:
            values[key] = known[key](text)
        except ValueError:
            form = "0 or 1" if known[key] is _switch else "a number"
            raise DataError(f"data option '{key}' of '{path}' cannot be '{text}'; give {form}") from None
    images = {key: values.pop(key) for key in IMAGE_KEYS if key in values}
    return path, replace(defaults, images=replace(defaults.images, **images), **values)


def open_file(spec: str, tokenizer: Tokenizer | None = None, seed: int = 0, options: Options | None = None) -> Splits:
    """Samples to calibrate on and to measure on, from a file or a folder.

    A folder with two of `train`, `validation` (`valid`, `val`) and `test` inside, as files of one kind
    or as folders of images, gives both; otherwise a part of the file or folder is held out. Rows of .jsonl and
    .parquet files hold a `text`, or a conversation, which is written in the tokenizer's chat template (a plain frame
    where it has none): `messages`, `prompt` with `response` or `completion`, `instruction` with `output`, or
    `question` with `answer`. With `chat=1` a conversation comes before `text`, and a lone text is a user's message.

    Args:
        spec: the path, with options after a question mark if wanted: `images.parquet?size=32&limit=2000`.
        tokenizer: needed for text; its chat template is used for conversations.
        seed: of every draw.
        options: what holds where the spec says nothing; None for the defaults of `Options`.

    Raises:
        DataError: missing, unreadable or unsuitable data; names the file and the row.
        UnknownNameError: an option that does not exist.
        MissingExtraError: pyarrow or Pillow is not installed.
    """
    name, options = spec, options or Options()
    if not Path(spec).exists():
        name, options = parse_spec(spec, options)
    path = Path(name)
    if not path.exists():
        raise DataError(f"'{name}' does not exist; give a .txt, .jsonl or .parquet file, or a folder")
    train, test = _parts(path)
    if train.is_dir() or (train.suffix.lower() == ".parquet" and _parquet_holds_images(train)):
        sources = [image_source(part, name) for part in (train, test) if part]
        images = options.images
        return image_splits(
            sources[0], sources[1] if test else None, images, seed, samples=options.samples, limit=options.limit
        )
    if tokenizer is None:
        raise DataError(f"'{name}' is text and needs a tokenizer; give a model folder that holds one")
    rows = Rows(tokenizer, options.chat)
    return text_splits(
        name,
        read_documents(train, rows),
        tokenizer,
        length=options.length,
        count=options.samples or TEXT_SAMPLES,
        seed=seed,
        evaluation_documents=read_documents(test, rows) if test else None,
        limit=options.limit,
    )


def _parts(path: Path) -> tuple[Path, Path | None]:
    """The training and the evaluation part in a folder; the path itself where it is not such a folder."""
    if path.is_dir():
        for suffix in (*FILE_SUFFIXES, ""):
            trains, tests = (
                [part for name in names if (part := path / f"{name}{suffix}").exists()]
                for names in (TRAINING_NAMES, EVALUATION_NAMES)
            )
            if trains and (others := [part for part in tests if part != trains[0]]):
                return trains[0], others[0]
            if trains and trains[0].is_file():
                return trains[0], None
    return path, None


def read_documents(path: Path, rows: Rows | None = None) -> list[str]:
    """The texts in a file: a .txt is one, a .jsonl has one a line and a .parquet one a row, as `Rows` says.

    Raises:
        DataError: missing or unreadable, another kind of file, or a bad line or row; says which.
        MissingExtraError: pyarrow is not installed.
    """
    rows = rows or Rows()
    readers = {".txt": _read_plain, ".jsonl": _read_json_lines, ".parquet": _read_table}
    if path.suffix.lower() not in readers:
        raise DataError(f"'{path}' is of no known kind; give a .txt, .jsonl or .parquet file, or a folder of images")
    try:
        return list(readers[path.suffix.lower()](path, rows))
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from error


def _read_plain(path: Path, rows: Rows) -> Iterator[str]:
    if rows.chat:
        raise DataError(f"'{path}' is plain text without messages; chat=1 is for rows of .jsonl and .parquet files")
    try:
        yield path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"'{path}' is not UTF-8 text: bad byte at position {error.start}") from error


def _read_json_lines(path: Path, rows: Rows) -> Iterator[str]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            where = f"'{path}' line {number}"
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where} is not JSON: {error}") from error
            yield rows.document(record if isinstance(record, dict) else {}, where)


def _read_table(path: Path, rows: Rows) -> Iterator[str]:
    with open_parquet(path) as file:
        columns = [name for name in FIELDS if name in file.schema_arrow.names]
        if not is_readable(columns):
            raise _no_column(path, file)
        row = 0
        for batch in file.iter_batches(columns=columns):
            for record in batch.to_pylist():
                yield rows.document(record, f"'{path}' row {row}")
                row += 1


@contextlib.contextmanager
def open_parquet(path: Path) -> Iterator[pq.ParquetFile]:
    """A parquet file; whatever goes wrong while reading it becomes one sentence.

    Raises:
        DataError: damaged, or not a parquet file.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtraError("pyarrow", "data", "reading parquet files") from None
    try:
        with pq.ParquetFile(path) as file:
            yield file
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"'{path}' is not a readable parquet file: {str(error).splitlines()[0]}") from error


def _no_column(path: Path, file: pq.ParquetFile) -> DataError:
    return DataError(
        f"'{path}' has the columns {', '.join(file.schema_arrow.names)}; it needs '{TEXT}', "
        f"or {' or '.join(IMAGE_COLUMNS)} with {', '.join(LABEL_COLUMNS[:-1])} or {LABEL_COLUMNS[-1]}, or {WANTED}"
    )


def _parquet_holds_images(path: Path) -> bool:
    with open_parquet(path) as file:
        names = set(file.schema_arrow.names)
        if not names.intersection(IMAGE_COLUMNS) and not is_readable(names):
            raise _no_column(path, file)
        return bool(names.intersection(IMAGE_COLUMNS))


def image_source(path: Path, name: str) -> ImageSource:
    """The images of a parquet file, or of a folder with one sub-folder per class.

    Raises:
        DataError: nothing usable there; says what is missing.
        MissingExtraError: pyarrow is not installed.
    """
    try:
        return _folder_source(path, name) if path.is_dir() else _parquet_source(path, name)
    except OSError as error:
        raise DataError(f"cannot read '{path}': {error.strerror}") from error


def _folder_source(path: Path, name: str) -> ImageSource:
    classes = tuple(sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name[0] != "."))
    files: list[tuple[Path, int]] = []
    for label, folder in enumerate(classes):
        found = sorted(file for file in (path / folder).iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"'{path / folder}' holds no image; each sub-folder is a class of .png or .jpg images")
        files += [(file, label) for file in found]
    if not files:
        raise DataError(f"'{path}' has no sub-folders; an image folder has one per class, with .png or .jpg images")

    def read(rows: Sequence[int]) -> Iterator[Encoded]:
        for file, label in (files[row] for row in rows):
            try:
                content = file.read_bytes()
            except OSError as error:
                raise DataError(f"cannot read '{file}': {error.strerror}") from error
            yield Encoded(f"'{file}'", content, label)

    return ImageSource(name, len(files), classes, read)


def _parquet_source(path: Path, name: str) -> ImageSource:
    with open_parquet(path) as file:
        image, label = (
            next((column for column in columns if column in file.schema_arrow.names), None)
            for columns in (IMAGE_COLUMNS, LABEL_COLUMNS)
        )
        if image is None or label is None:
            raise _no_column(path, file)
        classes = _class_names(path, file.schema_arrow.metadata or {}, label)
        return ImageSource(name, file.metadata.num_rows, classes, partial(_read_rows, path, image, label))


def _class_names(path: Path, metadata: Mapping[bytes, bytes], label: str) -> tuple[str, ...]:
    """The names that the `datasets` library writes beside the schema; empty if there are none."""
    try:
        node = json.loads(metadata.get(b"huggingface", b"{}"))
    except ValueError as error:
        raise DataError(f"'{path}' has schema metadata 'huggingface' that is not JSON: {error}") from error
    for key in ("info", "features", label, "names"):
        node = node.get(key) if isinstance(node, dict) else None
    return tuple(map(str, node)) if isinstance(node, list) else ()


def _read_rows(path: Path, image: str, label: str, rows: Sequence[int]) -> Iterator[Encoded]:
    """Ascending rows; one row group is in memory at a time, and groups without a wanted row are skipped."""
    start = 0
    with open_parquet(path) as file:
        for group in range(file.num_row_groups):
            end = start + file.metadata.row_group(group).num_rows
            wanted = rows[bisect_left(rows, start) : bisect_left(rows, end)]
            if wanted:
                table = file.read_row_group(group, columns=[image, label]).take([row - start for row in wanted])
                for row, cell, value in zip(wanted, table[image].to_pylist(), table[label].to_pylist(), strict=True):
                    where = f"'{path}' row {row}"
                    yield Encoded(where, stored_bytes(cell, where), value)
            start = end


def stored_bytes(cell: Any, where: str) -> bytes:
    """The encoded image in a table's cell: bytes, or a record with `bytes` as on the hub.

    Raises:
        DataError: there are none.
    """
    content = cell.get("bytes") if isinstance(cell, dict) else cell
    if not isinstance(content, bytes):
        raise DataError(f"{where} does not hold the bytes of an image")
    return content
