"""Tasks that show which abilities a removal costs: built in, offline, for any causal language model and tokenizer.

Tasks of choice compare likelihoods of given options; tasks of generation let the model write and compare the whole
answer. Pruned models keep the first longer than the second (Shrestha et al. 2026, "On the limits of layer pruning
for generative reasoning in LLMs"), so `abilities` refuses to report without a task of generation, and always gives
text degeneration beside it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, SettingsError
from secateur.core.method import Batch
from secateur.core.progress import Progress, Silent
from secateur.data import skills
from secateur.data.dataset import Dataset
from secateur.data.generation import Response, Sampling, respond, stop_ids
from secateur.data.running import device_of, evaluating, logits
from secateur.data.skills import Question
from secateur.measure.degeneration import Degeneration, degeneration
from secateur.measure.quality import Metric, Quality, perplexity
from secateur.measure.statistics import Interval, quality_interval

END = "\n"  # ends a worked example, and an answer of a model without a stop token


class How(StrEnum):
    """How a task is answered."""

    GENERATION = "generation"
    CHOICE = "choice"


@dataclass(frozen=True)
class LanguageTask:
    """Questions of one kind.

    Attributes:
        name: of the ability.
        how: by generation, judged by exact match; or by the likelihood of options.
        questions: prompts with answers, and options for tasks of choice.
        examples: worked questions that stand before every prompt.
        sampling: of the generation.
    """

    name: str
    how: How
    questions: tuple[Question, ...]
    examples: tuple[Question, ...] = ()
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if not self.questions:
            raise DataError(f"task '{self.name}' has no questions")
        odd = next((q for q in self.questions if self.how is How.CHOICE and q.answer not in q.options), None)
        if odd is not None:
            raise DataError(f"task '{self.name}': the answer '{odd.answer}' to '{odd.prompt}' is not among its options")

    @property
    def frame(self) -> str:
        """What stands before every prompt."""
        return "".join(f"{example.prompt}{example.answer}{END}" for example in self.examples)


@dataclass(frozen=True)
class TaskResult:
    """A model's answers to a task.

    Attributes:
        task: the questions.
        quality: accuracy, with 1 or 0 for every question.
        answers: what it wrote or chose.
        responses: token ids of what it wrote; empty for tasks of choice.
        margins: tasks of choice: log-probability of the right option, `[questions]`; otherwise empty.
    """

    task: LanguageTask
    quality: Quality
    answers: tuple[str, ...]
    responses: tuple[Response, ...] = ()
    margins: Tensor = field(default_factory=lambda: torch.empty(0))

    @property
    def accuracy(self) -> float:
        """Share of right answers."""
        return self.quality.value

    @property
    def interval(self) -> Interval | None:
        """Bootstrap interval of the accuracy over the questions."""
        return quality_interval(self.quality)


def _generated(name: str, draw: skills.Draw, numbers: tuple[int, int, int], limit: int) -> LanguageTask:
    return LanguageTask(name, How.GENERATION, *_drawn(name, draw, *numbers), Sampling(limit=limit))


def _chosen(name: str, draw: skills.Draw, numbers: tuple[int, int, int]) -> LanguageTask:
    return LanguageTask(name, How.CHOICE, *_drawn(name, draw, *numbers))


def _drawn(
    name: str, draw: skills.Draw, count: int, seed: int, shots: int
) -> tuple[tuple[Question, ...], tuple[Question, ...]]:
    """Questions to ask, and worked ones from a stream of their own."""
    worked = skills.questions(f"{name}, worked", draw, shots, seed) if shots else []
    return tuple(skills.questions(name, draw, count, seed)), tuple(worked)


def brackets(count: int = 100, seed: int = 0, shots: int = 0) -> LanguageTask:
    """Close a nested string of brackets; by generation.

    Args:
        count: questions.
        seed: of the questions.
        shots: worked examples before each; a model that never saw the notation needs a few.
    """
    return _generated("brackets", skills.brackets, (count, seed, shots), limit=16)


def arithmetic(count: int = 100, seed: int = 0, shots: int = 0) -> LanguageTask:
    """Three operations on digits from left to right, every step written out; by generation. As `brackets`."""
    return _generated("arithmetic", skills.arithmetic, (count, seed, shots), limit=40)


def copying(count: int = 100, seed: int = 0, shots: int = 0) -> LanguageTask:
    """Repeat a random string; by generation. As `brackets`."""
    return _generated("copying", skills.copying, (count, seed, shots), limit=16)


def digits(count: int = 200, seed: int = 0, shots: int = 0) -> LanguageTask:
    """The next digit of arithmetic, among ten: the paper's arithmetic probe. As `brackets`, but by choice.

    The paper asks for the result alone behind a prefix of three examples; here the earlier steps are written out.
    """
    return _chosen("digits", skills.last_result, (count, seed, shots))


def labels(count: int = 100, seed: int = 0, shots: int = 0) -> LanguageTask:
    """What kind of thing a sentence is about, among four labels; by choice. As `brackets`."""
    return _chosen("labels", skills.labels, (count, seed, shots))


def cloze(text: str, count: int = 100, seed: int = 0, context: int = 80) -> LanguageTask:
    """The next word of any text among four of one length; by choice.

    Raises:
        DataError: too few words.
    """
    return LanguageTask("cloze", How.CHOICE, tuple(skills.cloze(text, count, seed, context=context)))


def run_task(
    model: nn.Module,
    tokenizer: Any,
    task: LanguageTask,
    *,
    seed: int = 0,
    batch: int = 64,
    progress: Progress | None = None,
) -> TaskResult:
    """Let a model do a task.

    Args:
        model: causal language model.
        tokenizer: its tokenizer; bytes and characters will do.
        task: the questions.
        seed: of sampled generation.
        batch: sequences that run together.
        progress: receives one step for each question.

    Raises:
        DataError: a prompt is empty or too long for the model.
        NumericsError: the model gives NaN.
    """
    if task.how is How.GENERATION:
        return _write(model, tokenizer, task, seed=seed, batch=batch, progress=progress)
    return _choose(model, tokenizer, task, batch, progress)


def encoded(tokenizer: Any, text: str) -> list[int]:
    """Ids of a prompt, a first token included where the tokenizer puts one, without an end token."""
    ids: list[int] = list(tokenizer(text)["input_ids"])
    end = getattr(tokenizer, "eos_token_id", None)
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids[:-1] if ids and ids[-1] == end and len(ids) > len(plain) else ids


def _write(
    model: nn.Module, tokenizer: Any, task: LanguageTask, *, seed: int, batch: int, progress: Progress | None
) -> TaskResult:
    prompts = [encoded(tokenizer, task.frame + question.prompt) for question in task.questions]
    stop = stop_ids(model, tokenizer)
    responses = respond(model, prompts, task.sampling, stop=stop, seed=seed, batch=batch, progress=progress)
    answers = [tokenizer.decode(list(response.written)).partition(END)[0] for response in responses]
    right = [
        answer.strip() == question.answer.strip() for answer, question in zip(answers, task.questions, strict=True)
    ]
    return TaskResult(task, _accuracy(torch.tensor(right)), tuple(answers), tuple(responses))


def _choose(model: nn.Module, tokenizer: Any, task: LanguageTask, batch: int, progress: Progress | None) -> TaskResult:
    rows, places = _options(tokenizer, task)
    likelihoods = _log_likelihoods(model, rows, batch, progress)
    chosen, margins, broken = [], [], []
    for question, place in zip(task.questions, places, strict=True):
        of_options = likelihoods[place : place + len(question.options)]
        chosen.append(question.options[int(of_options.argmax())])
        margins.append(of_options[question.options.index(question.answer)])
        broken.append(bool(of_options.isnan().any()))
    right = torch.tensor([answer == q.answer for answer, q in zip(chosen, task.questions, strict=True)])
    return TaskResult(task, _accuracy(right, torch.tensor(broken)), tuple(chosen), margins=torch.stack(margins))


def _accuracy(right: Tensor, broken: Tensor | None = None) -> Quality:
    values = right.double()
    if broken is not None:
        values = values.masked_fill(broken, torch.nan)
    return Quality(Metric.ACCURACY, float(values.mean()), values)


def _options(tokenizer: Any, task: LanguageTask) -> tuple[list[tuple[list[int], int]], list[int]]:
    """(ids, length of the prompt) for every option of every question, and where a question's options start."""
    rows: list[tuple[list[int], int]] = []
    places = []
    for question in task.questions:
        before = encoded(tokenizer, task.frame + question.prompt)
        places.append(len(rows))
        for option in question.options:
            whole = encoded(tokenizer, task.frame + question.prompt + option)
            if len(whole) <= len(before):
                raise DataError(
                    f"task '{task.name}': the option '{option}' has no token of its own with this tokenizer"
                )
            rows.append((whole, len(before)))
    return rows, places


def _log_likelihoods(
    model: nn.Module, rows: Sequence[tuple[list[int], int]], batch: int, progress: Progress | None
) -> Tensor:
    """Sum of the log-probabilities of the tokens behind the prompt, float64 `[rows]`; equal lengths run together."""
    of_length: dict[int, list[int]] = defaultdict(list)
    for place, (ids, _) in enumerate(rows):
        of_length[len(ids)].append(place)
    found = torch.empty(len(rows), dtype=torch.float64)
    progress = progress or Silent()
    progress.start("likelihoods", len(rows))
    try:
        with evaluating(model):
            for places in of_length.values():
                for start in range(0, len(places), batch):
                    part = places[start : start + batch]
                    found[part] = _of_batch(model, [rows[place] for place in part])
                    progress.advance(len(part))
    finally:
        progress.finish()
    return found


def _of_batch(model: nn.Module, rows: Sequence[tuple[list[int], int]]) -> Tensor:
    tokens = torch.tensor([ids for ids, _ in rows])
    moved = tokens.to(device_of(model))
    given = logits(model, Batch((tokens,)))[:, :-1].double().log_softmax(-1)
    taken = given.gather(-1, moved[:, 1:, None])[..., 0]
    before = torch.tensor([length for _, length in rows], device=taken.device)
    behind = torch.arange(1, tokens.shape[1], device=taken.device) >= before[:, None]
    return (taken * behind).sum(-1).cpu()


def unbalanced(result: TaskResult) -> float:
    """Share of the questions whose brackets the answer leaves unbalanced, whether it is the right one or not."""
    pairs = zip(result.task.questions, result.answers, strict=True)
    return sum(skills.unbalanced(question.prompt + answer) for question, answer in pairs) / len(result.answers)


def battery(count: int = 100, seed: int = 0, shots: int = 0) -> list[LanguageTask]:
    """The tasks that need no text: labels, digits, copying, brackets, arithmetic. As `brackets`."""
    return [make(count, seed, shots) for make in (labels, digits, copying, brackets, arithmetic)]


@dataclass(frozen=True)
class Abilities:
    """What a model can do: at least one task of generation, and how far what it writes there degenerates.

    Attributes:
        results: by task.
        degeneration: of everything written in the tasks of generation.
        perplexity: on a text, where one was given.
    """

    results: dict[str, TaskResult]
    degeneration: Degeneration
    perplexity: Quality | None = None

    def retained(self, full: Abilities) -> dict[str, float]:
        """Accuracy as a share of the full model's, by task; 0 where the full model gets nothing right."""
        return {name: relative(result, full.results[name]) for name, result in self.results.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "tasks": {name: _task_json(result) for name, result in self.results.items()},
            "degeneration": self.degeneration.to_json(),
            "perplexity": self.perplexity.to_json() if self.perplexity else None,
        }

    def table(self, full: Abilities | None = None) -> str:
        """Lines for people: every task, then degeneration, then perplexity; beside the full model's if given."""
        rows = [_row(name, result, full) for name, result in self.results.items()]
        repeats = [(f"rep-{n} (%)", value, _of(full, n)) for n, value in self.degeneration.rep.items()]
        written = full.degeneration if full else None
        repeats.append(("self-BLEU", self.degeneration.self_bleu, written.self_bleu if written else None))
        repeats.append(("mean length", self.degeneration.length, written.length if written else None))
        rows += [_figure(*repeat) for repeat in repeats]
        if self.perplexity:
            before = full.perplexity.value if full and full.perplexity else None
            rows.append(_figure("perplexity", self.perplexity.value, before))
        return "\n".join(rows)

    def __str__(self) -> str:
        return self.table()


def _of(full: Abilities | None, order: int) -> float | None:
    return full.degeneration.rep[order] if full else None


def _row(name: str, result: TaskResult, full: Abilities | None) -> str:
    ends = result.interval
    about = f" ({100 * ends.low:.1f} to {100 * ends.high:.1f})" if ends else ""
    kept = f", {100 * relative(result, full.results[name]):.1f} % of the full model" if full else ""
    return f"{name + ' (' + result.task.how.value + ')':24} {100 * result.accuracy:6.1f} %{about}{kept}"


def _figure(name: str, value: float | None, before: float | None) -> str:
    shown = "     -" if value is None else f"{value:8.3f}"
    return f"{name:24} {shown}" + (f" (full model {before:.3f})" if before is not None else "")


def _task_json(result: TaskResult) -> dict[str, Any]:
    ends = result.interval
    return {
        "how": result.task.how.value,
        "interval": ends.to_json() if ends else None,
        **result.quality.to_json(),
    }


def relative(result: TaskResult, full: TaskResult) -> float:
    """Accuracy as a share of the full model's on the same questions; 0 where that is 0."""
    return result.accuracy / full.accuracy if full.accuracy else 0.0


def abilities(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[LanguageTask] | None = None,
    *,
    text: Dataset | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Abilities:
    """Let a model do several tasks, and measure the text it writes.

    Args:
        model: causal language model.
        tokenizer: its tokenizer.
        tasks: default: `battery()`.
        text: windows of tokens to measure perplexity on.
        seed: of sampled generation.
        progress: where to report.

    Raises:
        SettingsError: no task of generation: likelihoods alone do not show what a removal costs.
        DataError, NumericsError: as `run_task`.
    """
    tasks = battery() if tasks is None else tasks
    if not any(task.how is How.GENERATION for task in tasks):
        raise SettingsError(
            "all tasks are tasks of choice, which a pruned model can keep while it loses generation; add one of "
            "generation, e.g. tasks.arithmetic()"
        )
    results = {task.name: run_task(model, tokenizer, task, seed=seed, progress=progress) for task in tasks}
    written = [result for result in results.values() if result.task.how is How.GENERATION]
    return Abilities(
        results,
        degeneration(
            [tokenizer.decode(list(one.written)) for result in written for one in result.responses],
            [one.written for result in written for one in result.responses],
        ),
        perplexity(model, text, progress=progress) if text is not None else None,
    )


def task_fitness(
    model: nn.Module, tokenizer: Any, tasks: Sequence[LanguageTask], seed: int = 0
) -> Callable[[nn.Module], float]:
    """A fitness for greedy layer removal: mean accuracy over tasks, each as a share of the full model's.

    Args:
        model: the full model, measured at once.
        tokenizer: its tokenizer.
        tasks: with questions that are not those reported on.
        seed: of sampled generation, the same for all candidates.
    """
    full = [run_task(model, tokenizer, task, seed=seed) for task in tasks]

    def fitness(candidate: nn.Module) -> float:
        found = [relative(run_task(candidate, tokenizer, one.task, seed=seed), one) for one in full]
        return sum(found) / len(found)

    return fitness
