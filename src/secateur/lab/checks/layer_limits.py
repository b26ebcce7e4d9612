"""The small-scale check of layer removal: labels outlive calculation, and answers of the full model bring it back.

On the shipped Llama of 8 layers, which labels sentences and calculates step by step without errors. That labels
survive better holds for every way of taking layers, random ones included, so the control of that claim is the model
with nothing removed; random removal is the control of what selectors and recovery bring. Both recoveries are judged by
the result at the end of the answer, so that the ground truth's other style (no steps) is not what costs it. Learning
to answer without steps leaves the model worse than no tuning does (by 14 points, and 5 times as far from the full
model), so 5 points above ground truth, and a lower divergence, would show nothing: the thresholds are where no tuning
fails.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur import api, zoo
from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.data import skills
from secateur.data.batches import forward
from secateur.data.dataset import Dataset
from secateur.data.generation import Sampling, stop_ids
from secateur.lab.checks._llama_full import of_blocks
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import tasks
from secateur.measure.quality import mean_loss
from secateur.recover.self_generated import LoRA, exchange_of, self_generated, tune, usable
from secateur.shrink.depth import remove_blocks_

NAME, STACK, LAYERS = "skills-llama", "model.layers", 8
SELECTORS = ("reverse", "cosine", "iterative")
QUESTIONS, WINDOWS, DRAWS = 60, 24, 4  # DRAWS: of random layers, under each seed
POOL = ((skills.arithmetic, 480), (skills.brackets, 300), (skills.copying, 180), (skills.labels, 240))
TUNING = LoRA(steps=300, rank=16)
CLAIMS = {
    "gap": Expectation(
        "2 of 8 layers gone (mean of 3 selectors): share kept of label accuracy minus that of step-by-step exact "
        "match, points; baseline: nothing removed",
        ">= 20",
        "baseline",
    ),
    "brackets": Expectation(
        "3 layers gone: brackets left unbalanced, points above the full model; baseline: nothing removed",
        ">= 5",
        "baseline",
    ),
    "selectors": Expectation(
        "loss in nats that 2 layers chosen by cosine or greedily cost, as a share of random ones'; baseline: the "
        "first 2 layers",
        "<= 0.4",
        "both",
    ),
    "results": Expectation(
        "2 layers gone, 300 steps of LoRA on answers of the full model: right results, points above tuning on ground "
        "truth without steps; baseline: not tuned; random: random layers, not tuned",
        ">= 40",
        "both",
    ),
    "labels": Expectation("the same: label accuracy as a share of the full model's, percent", ">= 90", "both"),
    "kl": Expectation(
        "the same: KL to the full model as a share of the smaller of that with ground truth and that without tuning",
        "<= 0.8",
        "both",
    ),
}


@dataclass(frozen=True)
class Bench:
    """The full model and what every smaller one is measured with."""

    full: nn.Module
    tokenizer: Any
    labels: tasks.LanguageTask
    arithmetic: tasks.LanguageTask
    brackets: tasks.LanguageTask
    held_out: Dataset

    def label_share(self, model: nn.Module) -> float:
        """Label accuracy as a share of the full model's, percent."""
        return 100 * tasks.relative(self._done(model, self.labels), self._done(self.full, self.labels))

    def exact_share(self, model: nn.Module) -> float:
        """Exact match of worked-out arithmetic as a share of the full model's, percent."""
        return 100 * tasks.relative(self._done(model, self.arithmetic), self._done(self.full, self.arithmetic))

    def results(self, model: nn.Module) -> float:
        """Percent of arithmetic whose last number is right, however the answer is written."""
        answers = self._done(model, self.arithmetic).answers
        pairs = zip(answers, self.arithmetic.questions, strict=True)
        return 100 * sum(_result(answer) == _result(question.answer) for answer, question in pairs) / len(answers)

    def unbalanced(self, model: nn.Module) -> float:
        """Percent of brackets left unbalanced."""
        return 100 * tasks.unbalanced(self._done(model, self.brackets))

    def lost(self, model: nn.Module) -> float:
        """Loss above the full model's, nats a token."""
        return mean_loss(model, self.held_out, 32) - mean_loss(self.full, self.held_out, 32)

    @torch.no_grad()
    def kl(self, model: nn.Module) -> float:
        """Mean KL divergence from the full model, nats a token."""
        (batch,) = self.held_out.batches(len(self.held_out))
        p, q = (forward(net, batch).double().log_softmax(-1) for net in (self.full, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    def _done(self, model: nn.Module, task: tasks.LanguageTask) -> tasks.TaskResult:
        return tasks.run_task(model, self.tokenizer, task)


def _result(answer: str) -> str:
    return answer.rpartition("=")[2].strip()


def bench(seed: int) -> Bench:
    """Questions drawn by `seed`; the windows are always the same."""
    from transformers import AutoTokenizer

    return Bench(
        zoo.load_model(NAME),
        AutoTokenizer.from_pretrained(zoo.folder(NAME)),
        tasks.labels(QUESTIONS, seed),
        tasks.arithmetic(QUESTIONS, seed),
        tasks.brackets(QUESTIONS, seed),
        zoo.load_data("skills").evaluation.take(torch.arange(WINDOWS)),
    )


def chosen(full: nn.Module, selector: str, count: int, seed: int) -> tuple[int, ...]:
    """The layers that a selector takes."""
    data = zoo.load_data("skills", seed=seed, samples=WINDOWS).calibration
    plan = api.plan(full, "layer_limits", count / LAYERS, data=data, seed=seed, selector=selector)
    return tuple((~plan.masks[STACK]).nonzero().flatten().tolist())


def keeping(gone: Sequence[int]) -> list[bool]:
    """The keep-list without these layers."""
    return [index not in gone for index in range(LAYERS)]


def random_layers(count: int, seed: int) -> list[tuple[int, ...]]:
    """Several draws of so many layers."""
    rng = generator(seed, "random layers")
    return [tuple(sorted(torch.randperm(LAYERS, generator=rng)[:count].tolist())) for _ in range(DRAWS)]


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    found = bench(seed)
    return {**_removed(found, seed), **_recovered(found, seed, progress)}


def _removed(found: Bench, seed: int) -> dict[str, Sample]:
    gaps, losses = {}, {}
    pairs = {selector: chosen(found.full, selector, 2, seed) for selector in SELECTORS}
    drawn = random_layers(2, seed)
    for gone in {*pairs.values(), *drawn, (0, 1)}:
        less = _without(found.full, gone)
        gaps[gone] = found.label_share(less) - found.exact_share(less)
        losses[gone] = found.lost(less)
    at_random = _mean([losses[gone] for gone in drawn])
    clever = _mean([losses[pairs[selector]] for selector in ("cosine", "iterative")])
    full_errors = found.unbalanced(found.full)
    three = [
        _without(found.full, gone) for gone in (chosen(found.full, "cosine", 3, seed), *random_layers(3, seed)[:1])
    ]
    errors = [found.unbalanced(less) - full_errors for less in three]
    return {
        "gap": Sample(_mean([gaps[gone] for gone in pairs.values()]), 0.0, _mean([gaps[gone] for gone in drawn])),
        "brackets": Sample(errors[0], 0.0, errors[1]),
        "selectors": Sample(clever / at_random, losses[0, 1] / at_random, 1.0),
    }


def _recovered(found: Bench, seed: int, progress: Progress) -> dict[str, Sample]:
    pruned = _without(found.full, chosen(found.full, "cosine", 2, seed))
    by_itself, by_truth = copy.deepcopy(pruned), copy.deepcopy(pruned)
    prompts = [question for kind, count in POOL for question in _pool(found, kind, count, seed)]
    sampling = Sampling(temperature=0.9, top_p=0.95, limit=48)
    answers = self_generated(
        found.full, found.tokenizer, [q.prompt for q in prompts], sampling, frame="{}", seed=seed, progress=progress
    )
    stop = stop_ids(found.full)
    truth = [exchange_of(found.tokenizer, q.prompt, _result(q.answer), stop, "{}") for q in prompts]
    tune(by_itself, usable(answers), TUNING, seed=seed, progress=progress)
    tune(by_truth, truth, TUNING, seed=seed, progress=progress)
    at_random = [_without(found.full, gone) for gone in random_layers(2, seed)]
    base, untuned = found.results(by_truth), found.kl(pruned)
    least = min(found.kl(by_truth), untuned)
    return {
        "results": Sample(
            found.results(by_itself) - base,
            found.results(pruned) - base,
            _mean([found.results(less) for less in at_random]) - base,
        ),
        "labels": Sample(
            found.label_share(by_itself),
            found.label_share(pruned),
            _mean([found.label_share(less) for less in at_random]),
        ),
        "kl": Sample(
            found.kl(by_itself) / least, untuned / least, _mean([found.kl(less) for less in at_random]) / least
        ),
    }


def _pool(found: Bench, kind: skills.Draw, count: int, seed: int) -> list[skills.Question]:
    """Questions to learn from, none of which is asked."""
    asked = {q.prompt for task in (found.labels, found.arithmetic, found.brackets) for q in task.questions}
    drawn = skills.questions("pool", kind, count, seed)
    return [question for question in drawn if question.prompt not in asked]


def _without(full: nn.Module, gone: Sequence[int]) -> nn.Module:
    """A copy without these layers."""
    less = copy.deepcopy(full)
    remove_blocks_(less, STACK, keeping(gone))
    return less


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


check = Check(CLAIMS, run, of_blocks("layer_limits", "iterative"))
