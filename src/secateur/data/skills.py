"""Generated questions with known answers: brackets, arithmetic in steps, copying, labels; and cloze from any text.

All are drawn from a seed, need no network and are plain text, so that any tokenizer can read them. A worked line is
`prompt + answer`; the sign `>` ends the question.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from secateur.core.errors import DataError
from secateur.core.seeding import generator

ASK = ">"
PAIRS = {"(": ")", "[": "]", "{": "}"}
LARGEST = 19  # of all results, so that the facts of arithmetic are few enough for a small model
LABELS = {
    "animal": ("cat", "dog", "fox", "owl", "horse", "mouse", "goat", "bear"),
    "food": ("bread", "apple", "soup", "rice", "cake", "plum", "cheese", "egg"),
    "tool": ("hammer", "saw", "drill", "spoon", "knife", "rake", "pen", "axe"),
    "place": ("town", "lake", "hill", "beach", "farm", "shop", "park", "school"),
}
NAMES = ("tom", "ann", "kim", "joe", "eva", "max")
VERBS = ("saw", "liked", "found", "drew", "knew")
KINDS = ("old", "big", "red", "nice", "small", "odd")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
STEP = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclass(frozen=True)
class Question:
    """A prompt and the one right continuation; `options`, where there are any, hold it and wrong ones."""

    prompt: str
    answer: str
    options: tuple[str, ...] = ()


Draw = Callable[[torch.Generator], Question]


def questions(kind: str, draw: Draw, count: int, seed: int, *, distinct: bool = True) -> list[Question]:
    """`count` questions of one kind; the first ones are the same whatever the count.

    Args:
        kind: keeps the streams of different kinds apart.
        draw: one question from a generator.
        count: how many.
        seed: of all draws.
        distinct: draw again what was drawn before; gives up when nothing new comes for long.

    Raises:
        DataError: a count below 1, or there are fewer different questions.
    """
    if count < 1:
        raise DataError(f"{kind} needs 1 question or more, got {count}")
    rng, found, misses = generator(seed, "questions", kind), dict[Question, None](), 0
    made: list[Question] = []
    while len(made) < count:
        question = draw(rng)
        if distinct and question in found:
            misses += 1
            if misses > 1000 + 10 * count:
                raise DataError(f"only {len(made)} different questions of {kind} were found, {count} were asked for")
            continue
        found[question] = None
        made.append(question)
    return made


def _below(rng: torch.Generator, count: int) -> int:
    return int(torch.randint(count, (1,), generator=rng))


def _one(rng: torch.Generator, values: Sequence[str]) -> str:
    return values[_below(rng, len(values))]


def brackets(rng: torch.Generator, longest: int = 10, deepest: int = 4) -> Question:
    """A string of brackets that is not closed yet; the answer closes it."""
    text, due = _one(rng, list(PAIRS)), ""
    due = PAIRS[text]
    for _ in range(3 + _below(rng, longest - 3)):
        if due and (len(due) == deepest or _below(rng, 5) < 2):
            text, due = text + due[0], due[1:]
        else:
            opened = _one(rng, list(PAIRS))
            text, due = text + opened, PAIRS[opened] + due
    if not due:
        opened = _one(rng, list(PAIRS))
        text, due = text + opened, PAIRS[opened]
    return Question(text + ASK, due)


def unbalanced(text: str) -> bool:
    """Whether the brackets of a text do not close one another; other characters do not count."""
    due: list[str] = []
    for character in text:
        if character in PAIRS:
            due.append(PAIRS[character])
        elif character in PAIRS.values() and (not due or due.pop() != character):
            return True
    return bool(due)


def arithmetic(rng: torch.Generator, steps: int = 3) -> Question:
    """Single digits with `steps` operations from left to right; the answer writes every step out."""
    value = _below(rng, 10)
    prompt, answer = str(value), []
    for _ in range(steps):
        sign, digit, after = _next_step(rng, value)
        prompt += f"{sign}{digit}"
        answer.append(f"{value}{sign}{digit}={after}")
        value = after
    return Question(prompt + ASK, ";".join(answer))


def _next_step(rng: torch.Generator, value: int) -> tuple[str, int, int]:
    while True:
        sign, digit = _one(rng, "+-*"), _below(rng, 10)
        after = STEP[sign](value, digit)
        if 0 <= after <= LARGEST:
            return sign, digit, after


def last_result(rng: torch.Generator) -> Question:
    """Arithmetic written out up to the last result, of which the first digit is asked (ten options)."""
    whole = arithmetic(rng)
    shown, _, value = whole.answer.rpartition("=")
    return first_digit(f"{whole.prompt}{shown}=", int(value))


def first_digit(prompt: str, value: int) -> Question:
    """The question for a number's first digit; the sign of a negative one is given with the prompt."""
    return Question(prompt + "-" * (value < 0), str(abs(value))[0], tuple("0123456789"))


def copying(rng: torch.Generator, shortest: int = 3, longest: int = 7) -> Question:
    """A string of random letters that is to be repeated."""
    length = shortest + _below(rng, longest - shortest + 1)
    text = "".join(_one(rng, LETTERS) for _ in range(length))
    return Question(text + ASK, text)


def labels(rng: torch.Generator) -> Question:
    """A sentence about a thing; what the thing is (four options)."""
    label = _one(rng, tuple(LABELS))
    words = (_one(rng, NAMES), _one(rng, VERBS), "the", _one(rng, KINDS), _one(rng, LABELS[label]))
    return Question(" ".join(words) + ASK, label, tuple(LABELS))


def cloze(text: str, count: int, seed: int, *, context: int = 80, distractors: int = 3) -> list[Question]:
    """The next word of a text against words of the same length from elsewhere in it.

    Args:
        text: any text with spaces between its words.
        count: how many questions.
        seed: of the places and the distractors.
        context: characters before the word; they start with a word.
        distractors: wrong words to each right one.

    Raises:
        DataError: the text has too few words with as many others of their length.
    """
    words = list(re.finditer(r"(?<= )[A-Za-z]{3,}\b", text))
    alike: dict[int, list[str]] = defaultdict(list)
    for word in sorted({found.group() for found in words}):
        alike[len(word)].append(word)
    usable = [word for word in words if len(alike[len(word.group())]) > distractors and word.start() > context]
    if count < 1 or len(usable) < count:
        raise DataError(
            f"the text has {len(usable)} words that suit a cloze question, {count} were asked for; give more text, "
            f"1 question or more, or a shorter context than {context} characters"
        )
    rng = generator(seed, "questions", "cloze")
    made = []
    for place in torch.randperm(len(usable), generator=rng)[:count].tolist():
        right = usable[place].group()
        others = [other for other in alike[len(right)] if other != right]
        wrong = [others[index] for index in torch.randperm(len(others), generator=rng)[:distractors].tolist()]
        made.append(Question(_before(text, usable[place], context), f" {right}", _options([right, *wrong])))
    return made


def _before(text: str, word: re.Match[str], context: int) -> str:
    """At most `context` characters before a word, from the start of a word, without the space before it."""
    before = text[word.start() - 1 - context : word.start() - 1]
    return before[before.find(" ") + 1 :]


def _options(words: list[str]) -> tuple[str, ...]:
    return tuple(f" {word}" for word in sorted(words))
