"""Demand 3: an honest speed figure with the result, and a warning where zeros will not be faster."""

import html
import json
from functools import partial

import pytest
from cli_runs import good

from secateur.lab import prune
from secateur.measure import Layout, probe_machine

LM = ["lm", "--data", "text.txt"]
NET = ["cli_runs:net", "--data", "images"]
RESULTS = {
    "unstructured": [*LM, "--method", "wanda", "--sparsity", "0.5"],
    "unstructured images": [*NET, "--method", "global-magnitude", "--sparsity", "0.8"],
    "n:m": [*LM, "--method", "wanda", "--pattern", "2:4"],
    "blocks": [*LM, "--method", "shortgpt", "--sparsity", "0.5"],
}


@pytest.fixture
def result(place, request):
    """(name, record, page, stderr) of one result."""
    out = request.param.replace(":", "-").replace(" ", "-")
    done = good("prune", *RESULTS[request.param], "--out", out, "--force")
    record = json.loads((place / out / "secateur" / "report.json").read_text())
    return request.param, record, (place / out / "report.html").read_text(), done.err


@pytest.mark.parametrize("result", RESULTS, indirect=True)
def test_every_report_holds_measured_latency_and_the_warning_only_where_it_is_true(result):
    name, record, page, said = result
    rows = {row["label"]: row for row in record["latency"]["rows"]}
    assert list(rows) == ["batch 1", "batch 16"]
    for row in rows.values():
        for side in ("before", "after"):
            time = row[side]
            assert 0 < time["p10"] <= time["median"] <= time["p90"]
            assert time["throughput"] == pytest.approx(int(row["label"].split()[1]) / time["median"] * 1e3, rel=1e-6)
    assert record["latency"]["threads"] >= 1
    assert record["latency"]["dtype"] == "float32"
    structured = name == "blocks"
    marks = ["Zeros alone" in text for text in (" ".join(record["warnings"]), page, said)]
    assert marks == [not structured] * 3
    assert record["structure"] == {"blocks": "structured", "n:m": "semi_structured"}.get(name, "unstructured")


@pytest.mark.parametrize("result", RESULTS, indirect=True)
def test_dense_costs_are_not_reported_as_saved(result):
    name, record, _, _ = result
    sizes = record["sizes"]
    for key in ("parameters", "flops", "weight_bytes"):
        smaller = sizes[key]["after"] < sizes[key]["before"]
        assert smaller == (name == "blocks"), key
    assert sizes["nonzeros"]["after"] < sizes["nonzeros"]["before"]
    if name == "blocks":  # two of four equal blocks
        import secateur as sc

        dense = sc.load("lm")
        block = sum(p.numel() for p in dense.model.layers[0].parameters())
        assert sizes["parameters"]["before"] - sizes["parameters"]["after"] == 2 * block


def test_what_zeros_bring_here_is_measured_and_said(place, monkeypatch):
    monkeypatch.setattr(prune, "probe_machine", partial(probe_machine, 0.02))
    found = good("prune", *RESULTS["unstructured"], "--out", "probed", "--json").json["record"]["machine"]
    assert {(row["label"], row["batch"]) for row in found["rows"]} >= {
        (layout.value, batch) for layout in (Layout.DENSE, Layout.CSR_90, Layout.ROWS) for batch in (1, 16)
    }
    assert len({row["ms"] for row in found["rows"]}) > 3
    page = (place / "probed" / "report.html").read_text()
    assert found["sentences"]
    assert all(html.escape(sentence) in page for sentence in found["sentences"])
