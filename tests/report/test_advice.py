"""Each rule speaks where it should and is silent where it should not."""

from __future__ import annotations

import math
from typing import Any

import pytest
import samples

from secateur.core.tags import Speedup
from secateur.report import Record, advise
from secateur.report.advice import RULES, came_back
from secateur.report.page import next_steps
from secateur.report.record import Latency, Measure, Quality, RecoveryInfo


def record(before: float = 10, pruned: float = 10.3, recovered: float | None = None, **update: Any) -> Record:
    """A quiet case (3 % loss, structured, no latency) from which single facts are changed."""
    quality = Quality(
        metric="perplexity",
        higher_is_better=False,
        before=Measure(value=before),
        pruned=Measure(value=pruned),
        recovered=None if recovered is None else Measure(value=recovered),
    )
    quiet = {
        "quality": quality,
        "structure": Speedup.STRUCTURED,
        "latency": None,
        "recovery": None if recovered is None else RecoveryInfo(name="finetune"),
        "sizes": samples.llama_depth().sizes,
    }
    return samples.llama_wanda().model_copy(update=quiet | update)


def timed(before: float, after: float) -> Latency:
    return Latency(rows=[samples.case(1, before, after, "x")], threads=1, dtype="float32", device="cpu")


def overlapping(high: float) -> Quality:
    before, pruned = Measure(value=10, interval=(9, 10.2)), Measure(value=10.3, interval=(high - 1, 11))
    return Quality(metric="perplexity", higher_is_better=False, before=before, pruned=pruned)


UNSTRUCTURED: dict[str, Any] = {"structure": Speedup.UNSTRUCTURED}
HOLLOW: dict[str, Any] = {"layers": [samples.layer("thin", 1000, 5), samples.layer("fat", 1000, 900)]}
CASES = [
    ("slower than the dense", record(latency=timed(10, 12)), record(latency=timed(12, 10))),
    ("add a recovery step", record(pruned=12), record(pruned=12, recovered=12)),
    ("even after recovery", record(pruned=20, recovered=12), record(pruned=20, recovered=10.3)),
    ("looked at no data", record(pruned=12, calibration=None, **UNSTRUCTURED), record(pruned=12, **UNSTRUCTURED)),
    ("4:8 for 2:4", record(pruned=12, structure=Speedup.SEMI_STRUCTURED), record(pruned=12, **UNSTRUCTURED)),
    ("several smaller steps", record(pruned=12), record(pruned=10.2)),
    ("brought no measured speed", record(latency=timed(10, 10), **UNSTRUCTURED), record(latency=timed(10, 10))),
    ("file is not smaller", record(sizes=samples.llama_wanda().sizes), record()),
    ("floor per layer", record(**HOLLOW), record()),
    ("intervals before and after overlap", record(quality=overlapping(10.1)), record(quality=overlapping(11.25))),
    ("room to remove more", record(pruned=10.05), record()),
]


@pytest.mark.parametrize(("says", "yes", "no"), CASES, ids=[says for says, _, _ in CASES])
def test_rule(says: str, yes: Record, no: Record) -> None:
    assert sum(says in sentence for sentence in advise(yes)) == 1
    assert not any(says in sentence for sentence in advise(no))


def test_every_rule_has_a_case() -> None:
    spoke = {rule for rule in RULES for _, yes, _ in CASES if rule(yes)}
    assert spoke == set(RULES)


def test_nothing_to_say_is_an_empty_list() -> None:
    assert advise(record()) == []


def test_figures_in_the_sentences() -> None:
    assert "20.0 % worse" in advise(record(pruned=12))[0]
    assert "no longer measurable" in advise(record(pruned=math.inf))[0]
    assert "batch 1 (1.20x)" in advise(record(latency=timed(10, 12)))[0]


@pytest.mark.parametrize(
    ("pruned", "recovered", "says"),
    [
        (20, 12, "80.0 % of the lost perplexity came back; 20.0 % of the dense"),
        (20, 9, "110.0 % of the lost perplexity came back; it is now 10.0 % better"),
        (12, 14, "Recovery made it worse: the loss grew from 20.0 % to 40.0 %"),
        (9, 9, "nothing to bring back"),
        (math.inf, 11, "made an unusable model usable; 10.0 % of the dense"),
        (math.inf, math.nan, "did not bring the perplexity back"),
    ],
)
def test_how_much_came_back(pruned: float, recovered: float, says: str) -> None:
    sentence = came_back(record(pruned=pruned, recovered=recovered))
    assert sentence is not None
    assert says in sentence


def test_no_recovery_no_sentence() -> None:
    assert came_back(record()) is None


def test_the_callers_advice_comes_first_and_nothing_twice() -> None:
    quiet = record(pruned=12)
    own = quiet.model_copy(update={"advice": ["Own words.", *advise(quiet)]})
    assert next_steps(own) == ["Own words.", *advise(quiet)]
