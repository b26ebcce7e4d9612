"""MAW's small-scale check: below chance's perplexity at small cuts, a sweep over widths, and its rule's own choice.

On the shipped Llama MAW is the worst of its rules by weights, as on other models trained from scratch; the article's
ranking of the rules belongs to Llama-3.2. What can be shown here is that it beats chance where little goes.
`abilities` is the article's protocol in small: two kinds of next byte over the widths, with perplexity beside. Which
of them falls faster is reported, not claimed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.method import Batch
from secateur.core.progress import Progress
from secateur.data.dataset import Dataset, Splits
from secateur.data.running import evaluating, logits
from secateur.lab.checks._language import blocks_plan, llama, pruned_perplexity
from secateur.lab.checks._llama_full import of_units
from secateur.lab.checks._structured import DRAWS, differing
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure import perplexity
from secateur.measure.task_report import TaskReport, task_report
from secateur.shrink.apply import masked

SHARES = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
LONG = 4  # letters of an identifier that stand before a byte, from which on it is one of exact knowledge
CLAIMS = {
    "tenth": Expectation("perplexity without 10 % of the neurons, as a fraction of random's mean", "< 1"),
    "fifth": Expectation("the same at 20 %", "< 1"),
    "sweep": Expectation(
        "smallest rise of perplexity from one width to the next, 0 to 60 %, as a factor (baseline: nothing removed)",
        "> 1",
        "baseline",
    ),
    "rule": Expectation(
        "neurons at 20 % that max + |min| and the largest absolute weight choose differently (baseline: the same rule)",
        "> 0",
        "baseline",
    ),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    model, data = llama(seed)
    found = sweep(model, data, "maw")
    plain: dict[str, Any] = {"kinds": "neuron", "multiple": 1}
    draws = {
        share: [
            pruned_perplexity(model, data, seed * DRAWS + draw, "group_random", sparsity=share, **plain)
            for draw in range(DRAWS)
        ]
        for share in (0.1, 0.2)
    }
    chance = {share: sum(values) / DRAWS for share, values in draws.items()}
    l2 = {share: pruned_perplexity(model, data, 0, "maw", sparsity=share, rule="l2") for share in chance}
    published, named = (blocks_plan(model, data, 0, "maw", sparsity=0.2, rule=rule) for rule in ("maw", "max_abs"))
    return {
        "tenth": Sample(found[1] / chance[0.1], l2[0.1] / chance[0.1], 1.0),
        "fifth": Sample(found[2] / chance[0.2], l2[0.2] / chance[0.2], 1.0),
        "sweep": Sample(min(after / before for before, after in pairwise(found)), 1.0, 1.0),
        "rule": Sample(differing(published, named), differing(published, published), 0.0),
    }


def sweep(model: nn.Module, data: Splits, method: str, shares: Sequence[float] = SHARES) -> list[float]:
    """Held-out perplexity at every share of the neurons removed."""
    return [pruned_perplexity(model, data, 0, method, sparsity=share) for share in shares]


def abilities(model: nn.Module, data: Splits, shares: Sequence[float] = SHARES) -> TaskReport:
    """Accuracy of the next byte inside long identifiers and at white space and punctuation, over the widths."""
    kinds = kinds_of_bytes(data.evaluation.inputs)
    columns: dict[str, list[float]] = {"perplexity": [], **{name: [] for name in kinds}}
    for share in shares:
        with masked(model, blocks_plan(model, data, 0, "maw", sparsity=share)):
            columns["perplexity"].append(perplexity(model, data.evaluation).value)
            right = right_bytes(model, data.evaluation)
        for name, places in kinds.items():
            columns[name].append(float(right[places].float().mean()))
    return task_report([f"-{share:.0%}" for share in shares], columns, perplexities=["perplexity"])


def right_bytes(model: nn.Module, data: Dataset) -> Tensor:
    """Whether the likeliest next byte is the right one, bool `[windows, length - 1]`."""
    with evaluating(model):
        found = [logits(model, Batch((part,)))[:, :-1].argmax(-1) for part in torch.split(data.inputs, 16)]
    return torch.cat(found) == data.inputs[:, 1:]


def kinds_of_bytes(windows: Tensor) -> dict[str, Tensor]:
    """Masks over the bytes to predict, bool `[windows, length - 1]`: inside long names, and form."""
    names, form = (torch.zeros(windows.shape, dtype=torch.bool) for _ in range(2))
    for row, window in enumerate(windows.tolist()):
        text = "".join(map(chr, window))
        for match in re.finditer(rf"\w{{{LONG + 1},}}", text):
            names[row, match.start() + LONG : match.end()] = True
        for match in re.finditer(r"[^\w]", text):
            form[row, match.start()] = True
    return {"inside long names": names[:, 1:], "white space and punctuation": form[:, 1:]}


check = Check(CLAIMS, run, of_units("maw"))
