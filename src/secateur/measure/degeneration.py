"""How far written text degenerates: repeated n-grams, sentences alike, length. Pure functions.

As in Shrestha et al. 2026, "On the limits of layer pruning for generative reasoning in LLMs": Rep-n (Welleck et al.
2020) and BLEU-4 of each sentence against the other sentences of the same text (Zhu et al. 2018), smoothed by method 1
of Chen & Cherry 2014.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

EPSILON = 0.1  # of smoothing method 1: the numerator of a precision that is 0
ORDERS = (2, 3, 4)
SENTENCE = re.compile(r"(?<=[.!?])\s+|\n+")
WORD = re.compile(r"\w+|[^\w\s]")


@dataclass(frozen=True)
class Degeneration:
    """Means over texts; a figure that no text has is None.

    Attributes:
        rep: n -> Rep-n in percent, n = 2, 3, 4, over texts of n or more tokens.
        self_bleu: 0 to 1, over texts with two or more sentences.
        length: tokens.
        texts: how many there were.
    """

    rep: dict[int, float | None]
    self_bleu: float | None
    length: float
    texts: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        rep = {f"rep_{order}": value for order, value in self.rep.items()}
        return {**rep, "self_bleu": self.self_bleu, "length": self.length, "texts": self.texts}


def rep_n(tokens: Sequence[Any], order: int) -> float | None:
    """Repeated n-grams in percent, 100 * (1 - distinct / all); None for fewer than `order` tokens."""
    grams = _grams(tokens, order)
    return 100 * (1 - len(grams) / grams.total()) if grams else None


def sentences(text: str) -> list[list[str]]:
    """The words and signs of every sentence; a sentence ends with one of .!? and a space, or with its line."""
    return [words for part in SENTENCE.split(text) if (words := WORD.findall(part))]


def bleu(candidate: Sequence[str], references: Sequence[Sequence[str]], highest: int = 4) -> float:
    """BLEU with equal weights up to `highest`-grams, the closest reference's length, smoothing method 1; 0 to 1.

    Without one common word it is 0, smoothing or not.
    """
    precisions = []
    for order in range(1, highest + 1):
        mine = _grams(candidate, order)
        allowed: Counter[tuple[str, ...]] = Counter()
        for reference in references:
            allowed |= _grams(reference, order)  # the largest count of any reference
        common = (mine & allowed).total()
        if order == 1 and not common:
            return 0.0
        precisions.append((common or EPSILON) / max(1, mine.total()))
    length = len(candidate)
    closest = min((len(reference) for reference in references), key=lambda other: (abs(other - length), other))
    brevity = 1.0 if length > closest else math.exp(1 - closest / length)
    return brevity * math.exp(sum(map(math.log, precisions)) / highest)


def self_bleu(text: str) -> float | None:
    """Mean BLEU-4 of each sentence of 4 or more words against all other such sentences; None for fewer than two."""
    found = [words for words in sentences(text) if len(words) >= 4]
    if len(found) < 2:
        return None
    return _mean([bleu(words, found[:place] + found[place + 1 :]) for place, words in enumerate(found)])


def degeneration(texts: Sequence[str], tokens: Sequence[Sequence[Any]] | None = None) -> Degeneration:
    """All figures, averaged over texts.

    Args:
        texts: what was written.
        tokens: the same as token ids, for Rep-n and length; default: words and signs.
    """
    tokens = [WORD.findall(text) for text in texts] if tokens is None else tokens
    alike = [value for text in texts if (value := self_bleu(text)) is not None]
    repeated = {order: [v for one in tokens if (v := rep_n(one, order)) is not None] for order in ORDERS}
    return Degeneration(
        rep={order: _mean(values) if values else None for order, values in repeated.items()},
        self_bleu=_mean(alike) if alike else None,
        length=_mean([float(len(one)) for one in tokens]) if len(tokens) else 0.0,
        texts=len(texts),
    )


def _grams(tokens: Sequence[Any], order: int) -> Counter[tuple[Any, ...]]:
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
