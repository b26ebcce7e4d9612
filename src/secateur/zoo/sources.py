"""The zoo's data sets by name."""

from __future__ import annotations

from secateur.core.errors import DataError
from secateur.core.fingerprint import data_digest as digest_of
from secateur.data.dataset import Splits
from secateur.zoo.catalogue import data_name
from secateur.zoo.digits import digits
from secateur.zoo.skills import skills
from secateur.zoo.text import corpus, pydoc, tokens


def load_data(name: str, seed: int = 0, samples: int | None = None, length: int | None = None) -> Splits:
    """Calibration and evaluation data of `digits`, `pydoc` or `skills`, with or without `zoo:` before the name.

    Args:
        name: the data set.
        seed: for the draw of the calibration samples; the evaluation data are always the same.
        samples: number of calibration images (default: all 1,347) or windows (default: 64).
        length: tokens in a window (default: 96); text only.

    Raises:
        UnknownNameError: gives the nearest names.
        DataError: `samples` or `length` is not possible.
    """
    name = data_name(name)
    if samples is not None and samples < 1:
        raise DataError(f"'zoo:{name}' needs at least 1 calibration sample, got {samples}")
    if name == "pydoc":
        return pydoc(seed, samples, length)
    if name == "skills":
        return skills(seed, samples, length)
    if length is not None:
        raise DataError(f"'zoo:{name}' holds images; length={length} is for text, leave it out")
    return digits(seed, samples)


def data_digest(name: str) -> str:
    """A hash of the whole data set: for text all characters, otherwise both splits in order.

    Raises:
        UnknownNameError: gives the nearest names.
    """
    if data_name(name) == "pydoc":
        return digest_of([tokens(corpus())])
    splits = load_data(name)
    parts = (next(part.batches(len(part))) for part in (splits.calibration, splits.evaluation))
    return digest_of(tensor for part in parts for tensor in part.tensors)
