"""DATA: a zoo data set, a file or folder, or a hub data set id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from secateur import zoo
from secateur.core.errors import UnknownNameError
from secateur.data.dataset import Splits
from secateur.data.files import Options, open_file
from secateur.data.hub import open_hub
from secateur.data.images import ImageOptions
from secateur.data.running import dtype_of
from secateur.io.models import HUB_ID, OpenedModel, open_tokenizer
from secateur.shrink.folder import read_config

PREPROCESSOR = "preprocessor_config.json"
LONGEST = 2048


def open_data(spec: str, model: OpenedModel, seed: int = 0, samples: int | None = None) -> Splits:
    """Calibration and evaluation samples for a model; images in the model's dtype.

    Args:
        spec: `zoo:pydoc`, a path (`photos/`, `text.txt?length=256`, `test.parquet?limit=2000`), or
            `owner/name` on the hub.
        model: gives the tokenizer, the length of a window, and the normalisation of images.
        seed: of the draw.
        samples: number of calibration samples; default: what the source suggests.

    Raises:
        UnknownNameError: no such data set or option.
        DataError: it cannot be read, or does not suffice.
    """
    found = _open(spec, model, seed, samples)
    dtype = getattr(torch, dtype_of(model.model), torch.float32)
    return Splits(found.calibration.to(dtype), found.evaluation.to(dtype))


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
