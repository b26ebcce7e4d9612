"""Models under EleutherAI's lm-evaluation-harness, before and after pruning: `pip install 'secateur[eval]'`.

Models are loaded by `secateur.load` and handed over as objects, so folders with uneven widths are evaluated as all
others are. Tasks from `include_path` run without network; only where the user names a task that is not there, one
of the harness's own, may it fetch that task's data.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any

from torch import nn

from secateur.core.errors import DataError, MissingExtraError, ModelError, SettingsError, UnknownNameError
from secateur.core.seeding import seeded
from secateur.data.running import evaluating
from secateur.measure.task_report import TaskReport, task_report
from secateur.shrink.load import load

BOOTSTRAP = 1000  # resamples for standard errors of metrics that are no means
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE")
ERROR = "_stderr"


@dataclass(frozen=True)
class Score:
    """One metric of one task.

    Attributes:
        task: its name in the harness.
        metric: with the filter behind a comma where it has one.
        value: of the metric.
        error: its standard error, if the harness knows it.
        samples: documents that were asked.
        higher_is_better: which way is better.
    """

    task: str
    metric: str
    value: float
    error: float | None
    samples: int | None
    higher_is_better: bool

    @property
    def name(self) -> str:
        """Task and metric."""
        return f"{self.task} {self.metric}"


@dataclass(frozen=True)
class HarnessResult:
    """A model's scores.

    Attributes:
        scores: of the tasks that were named; a group's parts are in `parts`.
        parts: of the tasks inside named groups.
        versions: task -> the version of its definition.
    """

    scores: tuple[Score, ...]
    parts: tuple[Score, ...]
    versions: Mapping[str, Any]

    def score(self, name: str) -> Score:
        """The score of `TASK METRIC`.

        Raises:
            UnknownNameError: there is none.
        """
        found = {score.name: score for score in (*self.scores, *self.parts)}
        if name not in found:
            raise UnknownNameError("score", name, found)
        return found[name]

    def to_json(self) -> dict[str, Any]:
        """Plain data; what JSON lacks is the word nan or inf."""
        return {
            "scores": [_plain(score) for score in self.scores],
            "parts": [_plain(score) for score in self.parts],
            "versions": {name: str(version) for name, version in self.versions.items()},
        }


def _plain(score: Score) -> dict[str, Any]:
    figures = {"value": score.value, "error": score.error}
    return asdict(score) | {k: v if v is None or isfinite(v) else str(v) for k, v in figures.items()}


def harness(
    model: str | Path | nn.Module,
    tasks: Sequence[str],
    *,
    tokenizer: Any = None,
    limit: int | None = None,
    batch_size: int = 8,
    include_path: str | Path | Sequence[str | Path] | None = None,
    seed: int = 0,
) -> HarnessResult:
    """Evaluate a causal language model on tasks of the lm-evaluation-harness.

    Args:
        model: a local folder, also one with uneven widths, or a transformers model.
        tasks: names of tasks, groups or tags.
        tokenizer: the model's; default: the one in the folder.
        limit: at most so many documents of each task, for trying things out.
        batch_size: sequences that run together.
        include_path: folders with further tasks as YAML, searched first; see `write_task`.
        seed: of few-shot examples and sampling; global random states are put back.

    Raises:
        MissingExtraError: lm-eval is not installed.
        ModelError: the folder cannot be loaded, or the model is no transformers model.
        DataError: there is no tokenizer, or a task's data cannot be had.
        UnknownNameError: no such task.
        SettingsError: no task, or a limit or batch size below 1.
    """
    if not tasks or min(batch_size, 1 if limit is None else limit) < 1:
        raise SettingsError(f"give a task or more, with limit and batch_size 1 or more; got {limit} and {batch_size}")
    library = _library()
    opened, tokenizer = _opened(model, tokenizer)
    with _quiet(), seeded(seed), evaluating(opened):
        manager, own = _manager(library, tasks, include_path)
        wrapped = library["HFLM"](pretrained=opened, tokenizer=tokenizer, batch_size=batch_size)
        with _no_network(own), _failures_named(tasks, own):
            found = library["simple_evaluate"](
                model=wrapped,
                tasks=list(tasks),
                batch_size=batch_size,
                limit=limit,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=BOOTSTRAP,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
    return read_results(found, tasks)


def _library() -> dict[str, Any]:
    """What is used of lm-eval, all of it public."""
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise MissingExtraError("lm-eval", "eval", "evaluating on tasks of the lm-evaluation-harness") from error
    return {"simple_evaluate": simple_evaluate, "HFLM": HFLM, "TaskManager": TaskManager}


def _opened(model: str | Path | nn.Module, tokenizer: Any) -> tuple[nn.Module, Any]:
    """The model, and a copy of its tokenizer that can pad."""
    if isinstance(model, (str, Path)):
        folder, model = Path(model), load(model)
        tokenizer = tokenizer or _tokenizer(folder)
    if not hasattr(model, "config") or not hasattr(model, "generate"):
        raise ModelError(f"{type(model).__name__} is no transformers model with generate(), which the harness needs")
    if tokenizer is None:
        raise DataError("the harness needs the model's tokenizer: tokenizer=..., or a folder that holds one")
    tokenizer = copy.deepcopy(tokenizer)
    if getattr(tokenizer, "pad_token_id", None) is None:  # or one would be added, which the model has no embedding for
        end = getattr(tokenizer, "eos_token", None)
        tokenizer.pad_token = end if end is not None else tokenizer.convert_ids_to_tokens(0)
    return model, tokenizer


def _tokenizer(folder: Path) -> Any:
    if not any(folder.glob("tokenizer*")):
        raise DataError(f"'{folder}' holds no tokenizer, which tasks need; give tokenizer=...")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True)


def _manager(
    library: Mapping[str, Any], tasks: Sequence[str], include_path: str | Path | Sequence[str | Path] | None
) -> tuple[Any, bool]:
    """The tasks that can be named, and whether all that are wanted are the user's own."""
    paths = [include_path] if isinstance(include_path, (str, Path)) else list(include_path or ())
    for path in paths:
        if not Path(path).is_dir():
            raise DataError(f"include_path '{path}' is no folder; give one with task files in YAML")
    own = library["TaskManager"](include_path=[str(path) for path in paths] or None, include_defaults=False)
    if set(tasks) <= set(own.all_tasks):
        return own, True
    everything = library["TaskManager"](include_path=[str(path) for path in paths] or None)
    for name in tasks:
        if name not in everything.all_tasks:
            near = difflib.get_close_matches(name, everything.all_tasks, n=3, cutoff=0.4)
            raise UnknownNameError("task", name, near or own.all_tasks)
    return everything, False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Only errors of the harness are shown inside the block."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _no_network(wanted: bool) -> Iterator[None]:
    """Inside the block the hub's libraries refuse to connect, whenever they were imported; as it was if not wanted."""
    if not wanted:
        yield
        return
    import datasets
    from huggingface_hub import constants

    places = [(place, name) for place in (datasets.config, constants) for name in OFFLINE if hasattr(place, name)]
    before = [getattr(place, name) for place, name in places]
    environment = {name: os.environ.get(name) for name in OFFLINE}
    for place, name in places:
        setattr(place, name, True)
    os.environ.update(dict.fromkeys(OFFLINE, "1"))
    try:
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            setattr(place, name, value)
        for name, value in environment.items():
            os.environ.pop(name, None)
            os.environ.update({} if value is None else {name: value})


@contextlib.contextmanager
def _failures_named(tasks: Sequence[str], own: bool) -> Iterator[None]:
    """One sentence where a task's files or data cannot be had; other errors are bugs and stay as they are."""
    from datasets.exceptions import DatasetsError

    try:
        yield
    except (OSError, DatasetsError) as error:
        reason = (str(error).splitlines() or [""])[0].rstrip(".") or type(error).__name__
        what = "tasks from include_path run without network" if own else "check the network"
        raise DataError(f"the data of {', '.join(tasks)} cannot be had: {reason}; {what}") from error


def read_results(found: Mapping[str, Any], tasks: Sequence[str]) -> HarnessResult:
    """The scores in what the harness's `simple_evaluate` returns.

    Raises:
        DataError: nothing was measured.
    """
    scores = {name: tuple(_scores(name, found)) for name in found.get("results", {})}
    if not any(scores.values()):
        raise DataError(f"the harness gave no score for {', '.join(tasks)}")
    inside = _inside(tasks, found.get("group_subtasks", {}))
    return HarnessResult(
        scores=tuple(one for name, all_of in scores.items() if name in tasks or name not in inside for one in all_of),
        parts=tuple(one for name, all_of in scores.items() if name in inside and name not in tasks for one in all_of),
        versions=dict(found.get("versions", {})),
    )


def _inside(tasks: Sequence[str], subtasks: Mapping[str, Sequence[str]]) -> set[str]:
    """Everything below the named groups."""
    found: set[str] = set()
    waiting = [below for name in tasks for below in subtasks.get(name, ())]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += subtasks.get(name, ())
    return found


def _scores(task: str, found: Mapping[str, Any]) -> Iterator[Score]:
    values = found["results"][task]
    better = found.get("higher_is_better", {}).get(task) or {}
    samples = (found.get("n-samples", {}).get(task) or {}).get("effective")
    for key, value in values.items():
        metric, _, way = key.partition(",")
        if metric.endswith(ERROR) or isinstance(value, bool) or not isinstance(value, (int, float)) or not way:
            continue
        error = values.get(f"{metric}{ERROR},{way}")
        yield Score(
            task,
            metric if way == "none" else key,
            float(value),
            float(error) if isinstance(error, (int, float)) else None,
            samples,
            better.get(metric) is not False,
        )


def changes(found: Mapping[str, HarnessResult]) -> dict[str, list[float | None]]:
    """`TASK METRIC` -> relative change of every model against the first, 0.1 = 10 % more; None where it is not defined.

    Raises:
        UnknownNameError: a model lacks a score of the first.
    """
    first, *_ = found.values()
    columns = {score.name: [one.score(score.name).value for one in found.values()] for score in first.scores}
    return {name: [_change(values[0], value) for value in values] for name, values in columns.items()}


def _change(first: float, value: float) -> float | None:
    return (value - first) / abs(first) if first and isfinite(first) and isfinite(value) else None


def harness_report(found: Mapping[str, HarnessResult], perplexity: Sequence[float] = ()) -> TaskReport:
    """Which tasks a removal costs: fragile and robust ones, see `task_report`.

    Args:
        found: what each model is called -> its scores, the unpruned model first.
        perplexity: of the same models on a text. Metrics of which lower is better count as perplexities too.

    Raises:
        DataError: no perplexity at all, or less than two models.
    """
    first, *_ = found.values()
    values = {score.name: [one.score(score.name).value for one in found.values()] for score in first.scores}
    lower = [score.name for score in first.scores if not score.higher_is_better]
    if perplexity:
        values = {"perplexity": list(perplexity), **values}
        lower.append("perplexity")
    return task_report(list(found), values, lower)
