"""Task reports: the article's columns, groups, warnings, and a perplexity beside."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from secateur.core.errors import DataError, UnknownNameError
from secateur.measure.task_report import Kind, task_report

WIDTHS = (2.67, 2.4, 2.13, 1.87, 1.6, 1.33, 1.07)
LLAMA_3B = {
    "mmlu": (0.5605, 0.4333, 0.2909, 0.2307, 0.2587, 0.2555, 0.2589),
    "truthfulqa_mc2": (0.3919, 0.3767, 0.4302, 0.4390, 0.4484, 0.4391, 0.4574),
    "ifeval": (0.0943, 0.1312, 0.1220, 0.1534, 0.1645, 0.1627, 0.1331),
    "wikitext": (9.26, 11.88, 15.86, 23.35, 42.18, 74.83, 162.47),
}
LLAMA_1B = {
    "mmlu": (0.3111, 0.2511, 0.2661, 0.2610, 0.2689, 0.2606, 0.2554),
    "truthfulqa_mc2": (0.3772, 0.4026, 0.4153, 0.4252, 0.4298, 0.4314, 0.4661),
    "wikitext": (11.57, 17.50, 25.05, 38.58, 56.33, 117.04, 322.95),
}


def report(values=None, **more):
    return task_report(WIDTHS, values or LLAMA_3B, perplexities=["wikitext"], **more)


def test_the_articles_correlation_with_its_warning():
    found = report().correlate("mmlu", "truthfulqa_mc2")
    assert found.pearson == pytest.approx(-0.8644, abs=5e-5)
    assert found.p == pytest.approx(0.0121, abs=5e-5)
    assert found.spearman == pytest.approx(-0.607, abs=5e-4)
    assert found.n == 7
    assert "only 7 points" in found.warnings[0]
    assert all(word in str(found) for word in ("r = -0.8644", "p = 0.0121", "n = 7", "only 7 points"))
    smaller = report(LLAMA_1B).correlate("mmlu", "truthfulqa_mc2")
    assert (smaller.pearson, smaller.p) == pytest.approx((-0.676, 0.096), abs=6e-4)


def test_from_ten_points_on_there_is_no_warning():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=10), rng.normal(size=10)
    values = {"a": tuple(x), "b": tuple(y), "ppl": tuple(range(1, 11))}
    found = task_report(range(10), values, perplexities=["ppl"]).correlate("a", "b")
    assert found.warnings == ()
    assert (found.pearson, found.p) == pytest.approx(tuple(stats.pearsonr(x, y)))
    fewer = {name: column[:9] for name, column in values.items()}
    assert task_report(range(9), fewer, perplexities=["ppl"]).correlate("a", "b").warnings


def test_p_by_the_t_distribution():
    found = report().correlate("mmlu", "ifeval")
    t = found.pearson * math.sqrt(5 / (1 - found.pearson**2))
    assert found.p == pytest.approx(2 * stats.t.sf(abs(t), 5), rel=1e-6)


def test_changes_and_groups():
    made = report()
    assert made.task("mmlu").changes[1] == pytest.approx(0.4333 / 0.5605 - 1)
    assert made.group(Kind.FRAGILE) == ("mmlu", "wikitext")  # a perplexity that rises is a loss
    assert made.group(Kind.ROBUST) == ("truthfulqa_mc2", "ifeval")
    forced = report(kinds={"mmlu": Kind.ROBUST})
    assert "mmlu" in forced.group(Kind.ROBUST)


def test_a_table_always_shows_perplexity_first():
    text = report().to_markdown([("mmlu", "truthfulqa_mc2")])
    assert text.startswith("| width | wikitext |")
    assert "| 1.07 | 162.5 (+1654.5%) |" in text
    assert "r = -0.8644" in text
    assert "only 7 points" in text
    assert "does not make it a better model" in text
    with pytest.raises(DataError, match="needs a perplexity beside"):
        task_report(WIDTHS, {"mmlu": LLAMA_3B["mmlu"]}, perplexities=[])


def test_constant_columns_have_no_correlation():
    values = {"a": (1, 1, 1), "b": (1, 2, 3), "ppl": (1, 2, 3)}
    found = task_report(range(3), values, perplexities=["ppl"]).correlate("a", "b")
    assert math.isnan(found.pearson)
    assert math.isnan(found.p)
    assert found.to_json()["pearson"] is None
    json.dumps(found.to_json(), allow_nan=False)


def test_a_task_that_starts_at_zero_has_no_relative_change():
    made = task_report(range(2), {"a": (0, 0.5), "ppl": (3, 4)}, perplexities=["ppl"])
    assert math.isnan(made.task("a").changes[1])
    assert made.task("a").group is Kind.ROBUST


def test_bad_input_in_one_sentence():
    with pytest.raises(DataError, match="'mmlu' has 6 values for 7 widths"):
        report({**LLAMA_3B, "mmlu": LLAMA_3B["mmlu"][1:]})
    with pytest.raises(DataError, match="at least one width"):
        task_report([1.0], {"ppl": [3.0]}, perplexities=["ppl"])
    with pytest.raises(UnknownNameError, match="mmlu"):
        report().correlate("mmul", "ifeval")
    with pytest.raises(UnknownNameError):
        task_report(WIDTHS, LLAMA_3B, perplexities=["wikitexts"])
