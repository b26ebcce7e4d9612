"""`zoo:pydoc`: the help texts that come with Python, as ASCII characters; the first 90 % are for training."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.seeding import generator
from secateur.data.dataset import DataKind, Dataset, Splits

NAME = "zoo:pydoc"
WINDOW = 96  # characters
CALIBRATION, EVALUATION = 64, 160  # windows


def corpus() -> str:
    """All topics of `pydoc_data.topics` in the order of their names, with a blank line between them.

    Characters outside ASCII are left out. The text differs between versions of Python.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    return text.encode("ascii", "ignore").decode("ascii")


def _cut(text: str) -> int:
    return len(text) * 9 // 10


def training_text() -> str:
    """The first 90 % of the characters."""
    text = corpus()
    return text[: _cut(text)]


def held_out_text() -> str:
    """The last 10 % of the characters."""
    text = corpus()
    return text[_cut(text) :]


def tokens(text: str) -> Tensor:
    """ASCII text as int64 `[characters]`, the id of a character being its code."""
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8).long()


def random_windows(stream: Tensor, count: int, length: int, rng: torch.Generator) -> Tensor:
    """`count` windows `[count, length]` that start anywhere in `stream`, repetition possible."""
    starts = torch.randint(len(stream) - length + 1, (count,), generator=rng)
    return stream[starts[:, None] + torch.arange(length)]


def pydoc(seed: int = 0, samples: int | None = None, length: int | None = None) -> Splits:
    """Windows of `length` (default 96) tokens.

    Calibration: 64, or `samples`, random windows of the training text. Evaluation: the first 160
    windows of the held-out text, without overlap; fewer where the text ends before.

    Raises:
        DataError: the held-out text is shorter than one window, or a window has no next token.
    """
    length = WINDOW if length is None else length
    train, test = tokens(training_text()), tokens(held_out_text())
    if not 2 <= length <= len(test):
        raise DataError(f"windows of '{NAME}' can hold 2 to {len(test)} tokens, got length={length}")
    count = min(EVALUATION, len(test) // length)
    drawn = random_windows(train, CALIBRATION if samples is None else samples, length, generator(seed, NAME))
    return Splits(
        Dataset(NAME, DataKind.TEXT, drawn),
        Dataset(NAME, DataKind.TEXT, test[: count * length].view(count, length)),
    )
