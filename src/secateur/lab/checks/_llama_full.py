"""A trained Llama of 5.5 M parameters on WikiText-2: every one-shot method beside its baseline and a random control.

The same runs as in the table of `docs/evidence/llama-5m-english.yaml`, one method at a time: calibration of 64 windows
of 256 tokens from the validation text, drawn by the seed; perplexity on 120 windows of the test text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from secateur.core.errors import ModelError
from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.lab.compare import Bench, Comparison, Rows
from secateur.lab.reproduce import Expectation, FullCheck, Sample, folder_of
from secateur.train.study import Ledger

CONDITIONS = (
    "Llama of 5.5 M parameters trained on WikiText-2; 64 calibration windows of 256 tokens of the validation text, "
    "drawn by the seed; perplexity on 120 windows of the test text, nothing trained after pruning. Shares of blocks "
    "are shares of the parameters inside the blocks."
)


@dataclass(frozen=True)
class Rival:
    """What a method is compared with.

    Attributes:
        method: its name.
        settings: other than the defaults.
        drawn: those that depend on the seed and the amount.
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    drawn: Callable[[int, float | str], Mapping[str, Any]] | None = None

    def of(self, seed: int, amount: float | str) -> dict[str, Any]:
        """The settings under one seed."""
        return {**self.settings, **({} if self.drawn is None else self.drawn(seed, amount))}


MAGNITUDE = Rival("global_magnitude", {"spread": "uniform"})
NORM, UNITS = Rival("channel_norm"), Rival("group_random")
SPARSITIES = (("sparsity", 0.5), ("sparsity", 0.7), ("pattern", "2:4"))
SHARES = (("blocks", 0.2), ("blocks", 0.4))
FEW_STEPS: Mapping[str, Any] = {
    "iterations": 2,
    "generations": 8,
    "offspring": 16,
    "tokens": "512,4096",
    "survivors": "4,1",
}  # a small one: the published search is 4 iterations of 50 generations with 128 offspring
BLOCKS = 6
DEPTHS = (("sparsity", 0.17), ("sparsity", 0.34))  # one and two of six blocks


def comparison() -> Comparison:
    """The common conditions.

    Raises:
        DataError: SECATEUR_MODELS or SECATEUR_DATA does not name the model or the text.
    """
    return Comparison(
        model=str(folder_of("SECATEUR_MODELS", "llama-5m-english")),
        data=f"{folder_of('SECATEUR_DATA', 'wikitext2')}?length=256&limit=120",
        samples=64,
        dtype="float32",
        include=("model.layers*",),
        speed=False,
        rows=(),
    )


def beside(
    method: Rival,
    baseline: Rival,
    control: Rival,
    budgets: tuple[tuple[str, float | str], ...],
    include: tuple[str, ...] | None = None,
) -> FullCheck:
    """Claims that the method's perplexity is below the baseline's and the control's at every budget."""
    claims = {
        f"{kind}-{amount}": Expectation(f"perplexity relative to {baseline.method} at {kind} {amount}", "< 1", "both")
        for kind, amount in budgets
    }

    def run(seed: int, progress: Progress, ledger: Ledger) -> dict[str, Sample]:
        bench = Bench(comparison(), ledger, progress)

        def value(rival: Rival, kind: str, amount: float | str) -> float:
            rows = Rows(methods=(rival.method,), settings=rival.of(seed, amount), include=include)
            found = bench.result(rows, rival.method, kind, amount, seed)
            if found.get("error"):
                raise ModelError(f"{rival.method} at {kind} {amount}: {found['error']}")
            return float(found["value"])

        samples = {}
        for kind, amount in budgets:
            beaten = value(baseline, kind, amount)
            own, by_chance = value(method, kind, amount), value(control, kind, amount)
            samples[f"{kind}-{amount}"] = Sample(own / beaten, 1.0, by_chance / beaten)
        return samples

    return FullCheck(claims, run, CONDITIONS)


def of_weights(method: str) -> FullCheck:
    """A method on single weights beside magnitude per layer and random weights."""
    return beside(Rival(method), MAGNITUDE, Rival("random"), SPARSITIES)


def of_units(method: str, include: tuple[str, ...] | None = None, **settings: Any) -> FullCheck:
    """A method on heads, neurons or widths beside the L2 norm of units and random units."""
    return beside(Rival(method, settings), NORM, UNITS, SHARES, include)


def of_blocks(method: str, **settings: Any) -> FullCheck:
    """A method on whole blocks beside removing the last ones; the control are blocks drawn at random."""
    last = Rival("layer_limits", {"selector": "reverse"})
    return beside(Rival(method, settings), last, Rival("layer_limits", {"selector": "given"}, _any_blocks), DEPTHS)


def _any_blocks(seed: int, amount: float | str) -> Mapping[str, Any]:
    order = torch.randperm(BLOCKS, generator=generator(seed, "random-blocks")).tolist()
    return {"layers": tuple(order[: int(float(amount) * BLOCKS)])}
