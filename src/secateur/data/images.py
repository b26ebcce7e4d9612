"""Labelled images from parquet files and folders, as float tensors of one size."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from secateur.core.errors import DataError, MissingExtraError
from secateur.core.seeding import generator
from secateur.data.dataset import DataKind, Dataset, Splits

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
GREY_MODES = ("1", "L", "LA")
HELD_OUT = 5  # one image in five of a source without its own evaluation images is kept for evaluation
# the division and the images measured on stay the same for every seed, so that runs with different
# seeds can be compared and none calibrates on what another one measures
FIXED_SEED = 0


@dataclass(frozen=True)
class ImageOptions:
    """How images become numbers: `(pixel / 255 - mean) / std`.

    Attributes:
        size: height and width to resize to (bilinear, the aspect is not kept); None keeps the images as they are.
        channels: 1 (grey) or 3 (colour); None takes what the first image has.
        mean, std: one number, or one per channel; empty for 0 and 1.
    """

    size: int | None = None
    channels: int | None = None
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise DataError(f"the image size must be 1 pixel or more, got {self.size}")
        if self.channels not in (None, 1, 3):
            raise DataError(f"images have 1 or 3 channels, got channels={self.channels}")
        if not all(map(isfinite, self.mean)):
            raise DataError(f"the mean of images must be finite, got {', '.join(map(str, self.mean))}")
        if not all(isfinite(value) and value > 0 for value in self.std):
            raise DataError(f"the std of images must be above 0, got {', '.join(map(str, self.std))}")


class Encoded(NamedTuple):
    """One image as it is stored."""

    where: str  # what an error calls it
    content: bytes
    label: Any


@dataclass(frozen=True)
class ImageSource:
    """Labelled images that are read only when asked for.

    Attributes:
        name: what the user calls it.
        count: how many images there are.
        classes: names of the classes, empty if unknown.
        read: gives the images of ascending row numbers.
    """

    name: str
    count: int
    classes: tuple[str, ...]
    read: Callable[[Sequence[int]], Iterator[Encoded]]


def image_splits(
    train: ImageSource,
    test: ImageSource | None,
    options: ImageOptions,
    seed: int,
    *,
    samples: int | None = None,
    limit: int | None = None,
) -> Splits:
    """Calibration images from `train`, evaluation images from `test`; only the images used are decoded.

    Without `test`, a fifth of `train` is held out. Which fifth, and which images are measured on, does
    not depend on the seed; which of the others calibrate, and in which order, does.

    Args:
        train: where the calibration images come from.
        test: where the evaluation images come from.
        options: how images become numbers.
        seed: of the draw of the calibration images.
        samples: at most so many calibration images.
        limit: at most so many images from each source.

    Raises:
        DataError: no or too few images, an unreadable one, sizes or labels that do not fit.
    """
    shares = limit, limit
    if test is None:
        first, second = _divide(train, limit)
        if limit is not None:
            shares = limit - max(1, limit // HELD_OUT), max(1, limit // HELD_OUT)
        test = train
    else:
        if test.classes != train.classes:
            raise DataError(f"'{test.name}' and '{train.name}' do not name the same classes")
        first, second = torch.arange(train.count), torch.arange(test.count)
    wanted = min((share for share in (samples, shares[0]) if share is not None), default=None)
    order = torch.randperm(len(first), generator=generator(seed, "calibration"))
    calibration = load_images(train, first[order][:wanted], options)
    if shares[1] is not None and shares[1] < len(second):
        second = second[torch.randperm(len(second), generator=generator(FIXED_SEED, "evaluation"))[: shares[1]]]
    return Splits(calibration, load_images(test, second, options, like=calibration))


def _divide(source: ImageSource, limit: int | None) -> tuple[Tensor, Tensor]:
    if source.count < 2 or (limit is not None and limit < 2):
        raise DataError(
            f"'{source.name}' gives {min(source.count, limit or source.count)} image(s), but one is needed to "
            "calibrate and another to measure; give more images or a higher limit"
        )
    order = torch.randperm(source.count, generator=generator(FIXED_SEED, "split"))
    held = max(1, source.count // HELD_OUT)
    return order[held:], order[:held].sort().values


def load_images(source: ImageSource, rows: Tensor, options: ImageOptions, like: Dataset | None = None) -> Dataset:
    """The images at `rows` of a source, in that order.

    Args:
        source: where they come from.
        rows: int64 `[samples]`.
        options: how images become numbers.
        like: images that these must agree with in channels and size.

    Raises:
        DataError: none asked for, an image cannot be read, or sizes differ; names the first such image.
    """
    if not len(rows):
        raise DataError(f"'{source.name}' holds no images")
    ascending, places = rows.sort()
    pixels, labels = _decode_all(source, ascending.tolist(), options, like)
    back = places.argsort()
    return Dataset(source.name, DataKind.IMAGE, scale(pixels[back], options), labels[back], source.classes)


def _decode_all(
    source: ImageSource, rows: list[int], options: ImageOptions, like: Dataset | None
) -> tuple[Tensor, Tensor]:
    """uint8 `[samples, height, width, channels]` and int64 `[samples]`."""
    pixels: list[npt.NDArray[np.uint8]] = []
    labels: list[int] = []
    channels, size = (None, None) if like is None else (like.inputs.shape[1], tuple(like.inputs.shape[2:]))
    for item in source.read(rows):
        image = _decode(item, options, channels)
        channels, size = image.shape[2], size or image.shape[:2]
        if image.shape[:2] != size:
            raise DataError(
                f"{item.where} has {image.shape[0]}x{image.shape[1]} pixels, the images before it "
                f"{size[0]}x{size[1]}; give a size to resize all to, for example ?size={min(size)}"
            )
        pixels.append(image)
        labels.append(_class_index(item, source.classes))
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels, dtype=torch.int64)


def _decode(item: Encoded, options: ImageOptions, channels: int | None) -> npt.NDArray[np.uint8]:
    """One image as `[height, width, channels]`; `channels` is what the images before it had."""
    try:
        from PIL import Image, UnidentifiedImageError
    except ImportError:
        raise MissingExtraError("pillow", "data", "reading images") from None
    try:
        with Image.open(io.BytesIO(item.content)) as image:
            stored = _stored_channels(image.mode, item.where)
            channels = channels or options.channels or stored
            if channels < stored and options.channels is None:
                raise DataError(
                    f"{item.where} is in colour, the images before it are grey; give channels=1 or channels=3"
                )
            converted = image.convert("L" if channels == 1 else "RGB")
    # what Pillow's decoders raise on damaged bytes
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ) as error:
        why = "of no format that Pillow knows" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{item.where} is not a readable image: {why}") from error
    if options.size is not None and converted.size != (options.size, options.size):
        converted = converted.resize((options.size, options.size), Image.Resampling.BILINEAR)
    pixels = np.asarray(converted, dtype=np.uint8)
    return pixels[:, :, None] if channels == 1 else pixels


def _stored_channels(mode: str, where: str) -> int:
    if mode[0] in "IF":
        raise DataError(f"{where} has more than 8 bits per channel; convert it to an 8-bit image")
    return 1 if mode in GREY_MODES else 3


def _class_index(item: Encoded, classes: Sequence[str]) -> int:
    label = item.label
    if isinstance(label, bool) or not isinstance(label, int):
        raise DataError(f"{item.where} has the label {label!r}; labels must be class indices (integers)")
    if label < 0 or (classes and label >= len(classes)):
        known = f"0 to {len(classes) - 1}" if classes else "0 and above"
        raise DataError(f"{item.where} has the label {label}; class indices here are {known}")
    return label


def scale(pixels: Tensor, options: ImageOptions) -> Tensor:
    """float32 `[samples, channels, height, width]` from uint8 `[samples, height, width, channels]`.

    Raises:
        DataError: mean or std has neither one value nor one per channel.
    """
    images = pixels.permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    for name, values in (("mean", options.mean), ("std", options.std)):
        if len(values) not in (0, 1, images.shape[1]):
            raise DataError(f"{name} has {len(values)} values but the images have {images.shape[1]} channel(s)")
    if options.mean:
        images.sub_(torch.tensor(options.mean).view(1, -1, 1, 1))
    if options.std:
        images.div_(torch.tensor(options.std).view(1, -1, 1, 1))
    return images
