"""`zoo:skills`: lines with a question and its answer, generated: labels, arithmetic in steps, brackets, copying."""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.seeding import generator
from secateur.data import skills as kinds
from secateur.data.dataset import DataKind, Dataset, Splits
from secateur.zoo.text import CALIBRATION, EVALUATION, WINDOW, tokens

NAME = "zoo:skills"
END = "\n"  # of a line; the end token of the model that is trained on them
MIXTURE = (kinds.arithmetic,) * 8 + (kinds.brackets,) * 5 + (kinds.copying,) * 3 + (kinds.labels,) * 4


def skill_line(rng: torch.Generator) -> str:
    """A question, its answer and the line's end; 40 % arithmetic, 25 % brackets, 15 % copying, 20 % labels."""
    question = MIXTURE[int(torch.randint(len(MIXTURE), (1,), generator=rng))](rng)
    return f"{question.prompt}{question.answer}{END}"


def skill_windows(count: int, length: int, rng: torch.Generator) -> Tensor:
    """`count` windows `[count, length]`, each filled with lines from its start; the last line is cut off."""
    windows = []
    for _ in range(count):
        text = ""
        while len(text) < length:
            text += skill_line(rng)
        windows.append(tokens(text[:length]))
    return torch.stack(windows)


def skills(seed: int = 0, samples: int | None = None, length: int | None = None) -> Splits:
    """Windows of `length` (default 96) tokens: 64, or `samples`, drawn by `seed`, and 160 that are always the same.

    There are few enough different questions that some of the evaluation occur in training.

    Raises:
        DataError: a window has no next token.
    """
    length = WINDOW if length is None else length
    if length < 2:
        raise DataError(f"windows of '{NAME}' can hold 2 tokens or more, got length={length}")
    count = CALIBRATION if samples is None else samples
    drawn = skill_windows(count, length, generator(seed, NAME))
    fixed = skill_windows(EVALUATION, length, generator(0, NAME, "evaluation"))
    return Splits(Dataset(NAME, DataKind.TEXT, drawn), Dataset(NAME, DataKind.TEXT, fixed))
