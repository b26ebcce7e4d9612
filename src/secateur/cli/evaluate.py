"""`secateur evaluate`: what language models can do, side by side, by built-in tasks or by the evaluation harness."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.cli import show
from secateur.cli.progress import Bars
from secateur.core.errors import DataError, SettingsError
from secateur.io.data import open_data, split_generated
from secateur.io.models import OpenedModel, open_model, open_tokenizer
from secateur.measure.harness import HarnessResult, Score, changes, harness, harness_report
from secateur.measure.quality import perplexity
from secateur.measure.task_files import PREFIX, write_task
from secateur.measure.tasks import Abilities, How, LanguageTask, abilities, battery, cloze, relative
from secateur.zoo.text import corpus

QUESTIONS = 100  # of each built-in task
BATCH = 8  # sequences of a harness's task that run together


@dataclass(frozen=True)
class Asked:
    """What is to be evaluated; see the command's help for the meaning of each field."""

    models: Sequence[str]
    tasks: Sequence[str]
    include: Sequence[Path]
    limit: int | None
    batch: int | None
    shots: int | None
    data: str | None
    opening: Mapping[str, Any]
    seed: int


def evaluate(asked: Asked, json: bool) -> None:
    """Built-in tasks, or those of the harness where any are named."""
    _check(asked)
    if asked.tasks:
        _by_harness(asked, json)
    else:
        _by_abilities(asked, json)


def _check(asked: Asked) -> None:
    if asked.tasks and asked.shots is not None:
        raise SettingsError("--shots is for the built-in tasks; those of --tasks say in their files how many they take")
    if not asked.tasks and (asked.include or asked.batch is not None):
        raise SettingsError("--include-path and --batch go with --tasks")


def _by_abilities(asked: Asked, json: bool) -> None:
    tasks = built_in(asked.limit or QUESTIONS, asked.seed, asked.shots or 0)
    found: dict[str, Abilities] = {}
    with Bars() as progress:
        for name, opened, tokenizer in _each(asked):
            text = _text(asked, opened)
            found[name] = abilities(opened.model, tokenizer, tasks, text=text, seed=asked.seed, progress=progress)
    if json:
        first = next(iter(found.values()))
        models = {name: one.to_json() | {"retained": one.retained(first)} for name, one in found.items()}
        show.as_json({"data": asked.data, "shots": asked.shots or 0, "models": models})
    else:
        _print_abilities(found, asked)


def built_in(count: int, seed: int, shots: int) -> list[LanguageTask]:
    """All tasks that every machine has: those without a text, and words left out of Python's own help texts."""
    return [*battery(count, seed, shots), cloze(corpus(), count, seed)]


def _each(asked: Asked) -> Iterator[tuple[str, OpenedModel, Any]]:
    """One model after the other, so that only one is in memory."""
    for name in dict.fromkeys(asked.models):
        opened = open_model(name, **asked.opening)
        tokenizer = open_tokenizer(opened)
        if tokenizer is None:
            raise DataError(
                f"'{name}' has no tokenizer beside it, so it cannot be asked anything; give a folder with one"
            )
        yield name, opened, tokenizer


def _text(asked: Asked, opened: OpenedModel) -> Any:
    return open_data(split_generated(asked.data)[0], opened, asked.seed).evaluation if asked.data else None


def _print_abilities(found: Mapping[str, Abilities], asked: Asked) -> None:
    full = next(iter(found.values()))
    rows = []
    for task in full.results:
        cells = [_accuracy(one, full, task) for one in found.values()]
        rows.append([f"{task} ({full.results[task].task.how.value})", *cells])
    rows += _text_rows(found.values(), asked.data)
    asks = len(next(iter(full.results.values())).answers)
    note = f"accuracy in %, in brackets as a share of the first model's; {asks} questions of a kind, seed {asked.seed};"
    show.table("abilities", ["", *found], rows, f"{note} rep, self-BLEU and length of what was written by generation")
    written = [result for result in full.results.values() if result.task.how is How.GENERATION]
    if not any(result.accuracy for result in written) and not asked.shots:
        show.say("the first model answers nothing right by generation: show it the notation with --shots 3")


def _text_rows(found: Collection[Abilities], data: str | None) -> list[list[str]]:
    """Degeneration of what each model wrote, and its perplexity where there is a text."""
    written = [one.degeneration for one in found]
    figures: dict[str, list[float | None]] = {
        f"rep-{order} (%)": [one.rep[order] for one in written] for order in written[0].rep
    }
    figures["self-BLEU"] = [one.self_bleu for one in written]
    figures["mean length"] = [one.length for one in written]
    if data:
        figures[f"perplexity, {data}"] = [one.perplexity.value if one.perplexity else None for one in found]
    return [[name, *(show.figure(value) for value in values)] for name, values in figures.items()]


def _accuracy(one: Abilities, full: Abilities, task: str) -> str:
    shown = f"{100 * one.results[task].accuracy:.1f}"
    return shown if one is full else f"{shown} ({relative(one.results[task], full.results[task]):.1%})"


def _by_harness(asked: Asked, json: bool) -> None:
    found: dict[str, HarnessResult] = {}
    measured: list[float] = []
    with _own_tasks(asked) as folders, Bars() as progress:
        for name, opened, tokenizer in _each(asked):
            found[name] = harness(
                opened.model,
                asked.tasks,
                tokenizer=tokenizer,
                limit=asked.limit,
                batch_size=asked.batch or BATCH,
                include_path=folders,
                seed=asked.seed,
            )
            text = _text(asked, opened)
            measured += [perplexity(opened.model, text, progress=progress).value] if text is not None else []
    if json:
        models = {name: one.to_json() for name, one in found.items()}
        figures = dict(zip(found, map(_word, measured), strict=True)) if measured else None
        document = {"data": asked.data, "models": models, "perplexity": figures}
        show.as_json(document | {"changes": changes(found), "groups": _groups(found, measured)})
    else:
        _print_harness(found, measured, asked)


def _word(value: float) -> float | str:
    """What JSON lacks as a word."""
    return value if abs(value) < float("inf") else str(value)


@contextlib.contextmanager
def _own_tasks(asked: Asked) -> Iterator[list[Path]]:
    """The folders with task files; built-in tasks that are named get one for as long as the command runs."""
    wanted = [name for name in asked.tasks if name.startswith(PREFIX)]
    if not wanted:
        yield list(asked.include)
        return
    with tempfile.TemporaryDirectory(prefix="secateur-tasks-") as folder:
        for task in built_in(asked.limit or QUESTIONS, asked.seed, 0):
            write_task(task, folder)
        yield [Path(folder), *asked.include]


def _print_harness(found: Mapping[str, HarnessResult], measured: Sequence[float], asked: Asked) -> None:
    more, rows = changes(found), []
    for score in next(iter(found.values())).scores:
        same = [one.score(score.name) for one in found.values()]
        cells = [_score(one, change) for one, change in zip(same, [None, *more[score.name][1:]], strict=True)]
        rows.append([score.task, score.metric, show.figure(score.samples), *cells])
    if measured:
        rows.append([f"perplexity, {asked.data}", "", "-", *(f"{value:.4g}" for value in measured)])
    note = "± standard error; in brackets the relative change against the first model"
    show.table("evaluation harness", ["task", "metric", "documents", *found], rows, note)
    for name, group in _groups(found, measured).items():
        show.say(f"{name}: {group}")


def _score(score: Score, change: float | None) -> str:
    about = "" if score.error is None else f" ± {score.error:.2g}"
    return f"{score.value:.4g}{about}" + ("" if change is None else f" ({change:+.1%})")


def _groups(found: Mapping[str, HarnessResult], measured: Sequence[float]) -> dict[str, str]:
    """Score -> fragile or robust; nothing without a second model or without a perplexity to stand beside."""
    scores = next(iter(found.values())).scores
    if len(found) < 2 or not (measured or any(not score.higher_is_better for score in scores)):
        return {}
    return {one.name: one.group.value for one in harness_report(found, measured).tasks if not one.perplexity}
