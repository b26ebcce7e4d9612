"""Windows of tokens from documents: random ones to calibrate on, consecutive ones to measure on."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from secateur.core.errors import DataError
from secateur.core.seeding import generator
from secateur.data.dataset import DataKind, Dataset, Splits

SEPARATOR = "\n\n"
PIECE = 16_384  # characters given to the tokenizer at once: its time grows faster than the text
HELD_OUT = 10  # one part in ten of a text without its own evaluation text is kept for evaluation
PACK_SPAN = 32  # characters joined per calibration token wanted, so that a huge corpus is not tokenised whole


class Tokenizer(Protocol):
    """Anything that turns text into token ids, such as a transformers tokenizer."""

    def encode(self, text: str, *, add_special_tokens: bool = ..., **kwargs: Any) -> list[int]:
        """The ids of `text`."""
        ...


class Windows(NamedTuple):
    """Token ids int64 `[windows, length]`, and whether documents had to be joined to get them."""

    tokens: Tensor
    packed: bool


def tokenize(text: str, tokenizer: Tokenizer, enough: int | None = None) -> Tensor:
    """Token ids int64 `[tokens]` of `text`, without special tokens.

    Long text is tokenised in pieces that end with a word where they can. With `enough`,
    later pieces are left out once that many tokens are there.
    """
    # a transformers tokenizer warns about text longer than its model's context, which is no fault here
    quiet = {"verbose": False} if hasattr(tokenizer, "model_max_length") else {}
    ids: list[int] = []
    for piece in _pieces(text):
        ids.extend(tokenizer.encode(piece, add_special_tokens=False, **quiet))
        if enough is not None and len(ids) >= enough:
            del ids[enough:]
            break
    return torch.tensor(ids, dtype=torch.int64)


def _pieces(text: str) -> Iterator[str]:
    start = 0
    while len(text) - start > PIECE:
        end = _cut_before(text, start + PIECE // 2, start + PIECE)
        yield text[start:end]
        start = end
    if start < len(text):
        yield text[start:]


def _cut_before(text: str, low: int, high: int) -> int:
    """The last place in `low..high` where a word ends, or `high` if there is none.

    Between a word and the space after it the usual pre-tokenizers cut too, so tokens stay the same there.
    """
    ends = [match.end() for match in re.finditer(r"\w(?=\s)", text[low : high + 1])]
    return low + ends[-1] if ends else high


def calibration_windows(
    documents: Sequence[str], tokenizer: Tokenizer, length: int, count: int, seed: int, *, name: str = "the text"
) -> Windows:
    """`count` random windows of `length` tokens, int64 `[count, length]`.

    A document is drawn at random, rejected unless it has more than `length` tokens, then a window is
    cut at random (Sun et al. 2023, Wanda, section 4). Documents may be drawn again. Where no document
    is long enough, all are joined by two newlines and the windows are cut from that.

    Args:
        documents: the texts.
        tokenizer: turns text into ids.
        length: tokens per window.
        count: how many windows.
        seed: of all draws.
        name: what the error calls the text.

    Raises:
        DataError: even joined, the text is shorter than one window.
    """
    rng = generator(seed, "calibration")
    candidates = [i for i, text in enumerate(documents) if _may_exceed(text, length)]
    tokenized: dict[int, Tensor] = {}
    windows: list[Tensor] = []
    while candidates and len(windows) < count:
        place = _draw(len(candidates), rng)
        index = candidates[place]
        if index not in tokenized:
            tokenized[index] = tokenize(documents[index], tokenizer)
        if len(tokenized[index]) > length:
            windows.append(_random_window(tokenized[index], length, rng))
        else:  # rejected for good: drawing it again could not change that
            del tokenized[index]
            candidates[place] = candidates[-1]
            candidates.pop()
    if windows:
        return Windows(torch.stack(windows), packed=False)
    return Windows(_packed_windows(documents, tokenizer, length, count, rng=rng, name=name), packed=len(documents) > 1)


def _may_exceed(text: str, length: int) -> bool:
    """Whether `text` can have more than `length` tokens, taking a token to be at least one byte."""
    return len(text) > length or len(text.encode(errors="surrogatepass")) > length


def _packed_windows(
    documents: Sequence[str], tokenizer: Tokenizer, length: int, count: int, *, rng: torch.Generator, name: str
) -> Tensor:
    text = SEPARATOR.join(documents)
    span = PACK_SPAN * length * count
    start = _draw(max(1, len(text) - span + 1), rng)
    tokens = tokenize(text[start : start + span], tokenizer)
    _require(len(tokens), length, name)
    return torch.stack([_random_window(tokens, length, rng) for _ in range(count)])


def _random_window(tokens: Tensor, length: int, rng: torch.Generator) -> Tensor:
    start = _draw(len(tokens) - length + 1, rng)
    return tokens[start : start + length]


def _draw(below: int, rng: torch.Generator) -> int:
    return int(torch.randint(below, (1,), generator=rng))


def _require(tokens: int, length: int, name: str) -> None:
    if tokens < length:
        raise DataError(
            f"{name} holds {tokens} tokens but one window needs {length}; give more text or a smaller length"
        )


def evaluation_windows(tokens: Tensor, length: int, limit: int | None = None, name: str = "the text") -> Tensor:
    """Consecutive windows that do not overlap, int64 `[windows, length]`; an incomplete last one is dropped.

    Args:
        tokens: ids int64 `[tokens]`.
        length: tokens per window.
        limit: at most so many windows, from the start of the text.
        name: what the error calls the text.

    Raises:
        DataError: there are fewer tokens than one window needs.
    """
    _require(len(tokens), length, name)
    windows = len(tokens) // length
    if limit is not None:
        windows = min(windows, limit)
    return tokens[: windows * length].view(windows, length)


def text_splits(
    name: str,
    documents: Sequence[str],
    tokenizer: Tokenizer,
    *,
    length: int,
    count: int,
    seed: int,
    evaluation_documents: Sequence[str] | None = None,
    limit: int | None = None,
) -> Splits:
    """Calibration and evaluation windows of a text.

    Without `evaluation_documents` the last tenth of the text, and at least one window of it, is held out
    for evaluation; the calibration windows come from the rest, so the two never overlap. That
    division does not depend on the seed. A calibration set whose documents were too short, and therefore joined, or
    whose windows are not all different because the text is short, says so in its name.

    Args:
        name: what the user calls the text.
        documents: the texts.
        tokenizer: turns text into ids.
        length: tokens per window.
        count: how many calibration windows.
        seed: of the calibration windows.
        evaluation_documents: a text of its own to measure on; joined by two newlines.
        limit: at most so many evaluation windows.

    Raises:
        DataError: too little text for one window of each, or a length or count that makes no sense.
    """
    if length < 2 or count < 1 or (limit is not None and limit < 1):
        raise DataError(
            f"'{name}': windows need a length of 2 tokens or more and a count of 1 or more, "
            f"got length {length}, count {count}, limit {limit}"
        )
    if evaluation_documents is None:
        documents, evaluation_documents = hold_out(documents, tokenizer, length, f"'{name}'")
    drawn = calibration_windows(documents, tokenizer, length, count, seed, name=f"the calibration text of '{name}'")
    enough = None if limit is None else limit * length
    tokens = tokenize(SEPARATOR.join(evaluation_documents), tokenizer, enough)
    measured = evaluation_windows(tokens, length, limit, f"the evaluation text of '{name}'")
    return Splits(
        Dataset(f"{name}{_reservations(drawn)}", DataKind.TEXT, drawn.tokens),
        Dataset(name, DataKind.TEXT, measured),
    )


def _reservations(drawn: Windows) -> str:
    """What a reader of reports must know of calibration windows, in brackets behind the name of the text."""
    distinct, count = len(torch.unique(drawn.tokens, dim=0)), len(drawn.tokens)
    said = ["short documents joined"] * drawn.packed
    said += [f"{distinct} different windows of {count}"] * (distinct < count)
    return f" ({'; '.join(said)})" if said else ""


def hold_out(
    documents: Sequence[str], tokenizer: Tokenizer, length: int, name: str = "the text"
) -> tuple[list[str], list[str]]:
    """Split texts in (the rest, the last tenth); the last part has at least `length` tokens.

    Raises:
        DataError: no part of the text beside the rest is long enough.
    """
    total = sum(map(len, documents))
    wanted = -(-total // HELD_OUT)
    while wanted < total:
        rest, held = _split_characters(documents, wanted)
        tokens = len(tokenize(SEPARATOR.join(held), tokenizer, enough=length))
        if tokens >= length:
            return rest, held
        # in proportion, but never past half of what is left: the end may be thinner than the rest
        wanted = min(-(-wanted * length // max(tokens, 1)), wanted + -(-(total - wanted) // 2))
    tokens = len(tokenize(SEPARATOR.join(documents), tokenizer))
    raise DataError(
        f"{name} holds {tokens} tokens but one window to calibrate and one to measure need {2 * length}; "
        "give more text or a smaller length"
    )


def _split_characters(documents: Sequence[str], wanted: int) -> tuple[list[str], list[str]]:
    """The last `wanted` characters, or a few more so that no word is torn, and what is before them."""
    first = len(documents)
    while first and wanted > 0:
        first -= 1
        wanted -= len(documents[first])
    if wanted >= 0:
        return list(documents[:first]), list(documents[first:])
    document = documents[first]
    cut = _cut_before(document, max(0, -wanted - 200), -wanted)
    return [*documents[:first], *filter(None, [document[:cut]])], [document[cut:], *documents[first + 1 :]]
