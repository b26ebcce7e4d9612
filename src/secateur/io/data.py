"""DATA: a zoo data set, a file or folder, a hub data set id; or what the model itself writes behind their text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from secateur import zoo
from secateur.core.errors import DataError, SettingsError, UnknownNameError
from secateur.data.dataset import DataKind, Dataset, Splits
from secateur.data.files import Options, open_file
from secateur.data.generation import generated_windows
from secateur.data.hub import open_hub
from secateur.data.images import ImageOptions
from secateur.data.running import device_of, dtype_of
from secateur.io.labels import as_the_head_has_them
from secateur.io.models import HUB_ID, OpenedModel, open_tokenizer
from secateur.shrink.folder import read_config

PREPROCESSOR = "preprocessor_config.json"
LONGEST = 2048
GENERATED = "generated"


def open_data(spec: str, model: OpenedModel, seed: int = 0, samples: int | None = None) -> Splits:
    """Calibration and evaluation samples for a model; images in the model's dtype.

    Args:
        spec: `zoo:pydoc`, a path (`photos/`, `text.txt?length=256`, `test.parquet?limit=2000`), or
            `owner/name` on the hub. With `generated=K`, as in `text.txt?generated=8`, the model writes the calibration
            windows itself, each from the first K tokens of one of the text's (temperature 0.9, top-p 0.95, by `seed`);
            it is measured on the text. Conversations: see `data.files.open_file`.
        model: gives the tokenizer, the length of a window, and the normalisation of images.
        seed: of the draw.
        samples: number of calibration samples; default: what the source suggests.

    Raises:
        UnknownNameError: no such data set or option.
        DataError: it cannot be read, or does not suffice.
        SettingsError: `generated` and a model without weights.
    """
    spec, start = split_generated(spec)
    found = _open(spec, model, seed, samples)
    if start is not None:
        found = Splits(_written(found.calibration, model, start, seed), found.evaluation)
    dtype = getattr(torch, dtype_of(model.model), torch.float32)
    named = (as_the_head_has_them(part, model.model) for part in (found.calibration, found.evaluation))
    return Splits(*(part.to(dtype) for part in named))


def split_generated(spec: str) -> tuple[str, int | None]:
    """A DATA argument without its option `generated`, and that option's value.

    Raises:
        DataError: it is no number of tokens.
    """
    path, mark, query = spec.partition("?")
    parts = query.split("&")
    values = [part.partition("=")[2] for part in parts if part.partition("=")[0] == GENERATED]
    if not values or Path(spec).exists():
        return spec, None
    if not values[-1].isdecimal() or int(values[-1]) < 1:
        raise DataError(
            f"data option '{GENERATED}' of '{path}' cannot be '{values[-1]}'; give how many tokens of the text start "
            "each window, 1 or more"
        )
    rest = "&".join(part for part in parts if part.partition("=")[0] != GENERATED)
    return f"{path}{mark}{rest}" if rest else path, int(values[-1])


def _written(text: Dataset, model: OpenedModel, start: int, seed: int) -> Dataset:
    """As many windows as `text` has, written by the model from the first `start` tokens of each."""
    if text.kind is not DataKind.TEXT:
        raise DataError(f"'{text.name}' holds images; {GENERATED}={start} is for text, leave it out")
    if device_of(model.model).type == "meta":
        raise SettingsError(
            f"{GENERATED}={start} lets the model write the calibration data, for which its weights must be in memory; "
            "leave it out, or do without --stream"
        )
    length = text.inputs.shape[1]
    if start >= length:
        raise DataError(f"'{text.name}' has windows of {length} tokens; {GENERATED}={start} leaves nothing to write")
    made = generated_windows(model.model, len(text), length, seed=seed, start=text.inputs[:, :start])
    return replace(made, name=f"{text.name}, gone on with by the model after {start} tokens")


def _open(spec: str, model: OpenedModel, seed: int, samples: int | None) -> Splits:
    if spec.startswith("zoo:"):
        return zoo.load_data(spec, seed=seed, samples=samples)
    path = spec.partition("?")[0]
    options = Options(length=_window(model), samples=samples, images=_image_options(model.folder))
    if Path(path).exists() or spec.startswith((".", "/")) or "." in Path(path).suffix:
        return open_file(spec, open_tokenizer(model), seed, options)
    if HUB_ID.match(path):
        return open_hub(spec, open_tokenizer(model), seed, options)
    raise UnknownNameError("data set", spec, [f"zoo:{name}" for name in zoo.data_names()])


def _window(model: OpenedModel) -> int:
    """Tokens per window: the model's context length, at most 2048."""
    config: Any = getattr(model.model, "config", None)
    found = getattr(config, "max_position_embeddings", None)
    return min(found, LONGEST) if isinstance(found, int) and found > 1 else Options().length


def _image_options(folder: Path | None) -> ImageOptions:
    """Size and normalisation from the model's preprocessor file; none without one."""
    if folder is None or not (folder / PREPROCESSOR).exists():
        return ImageOptions()
    found = read_config(folder, PREPROCESSOR)
    size = found.get("size")
    if isinstance(size, dict):
        size = size.get("height") or size.get("shortest_edge")
    normalise = found.get("do_normalize", False)
    return ImageOptions(
        size=size if isinstance(size, int) else None,
        mean=tuple(found["image_mean"]) if normalise and found.get("image_mean") else (),
        std=tuple(found["image_std"]) if normalise and found.get("image_std") else (),
    )
