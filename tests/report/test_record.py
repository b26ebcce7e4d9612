"""The record refuses what cannot be true and survives a trip through JSON."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import samples
import torch
from pydantic import ValidationError

from secateur.core.plan import Plan
from secateur.core.units import Site, UnitKind
from secateur.report import Record, ReportError
from secateur.report.record import Layer, Measure, Pair, Quality, Timing


def changed(path: str, value: Any) -> str:
    """The sample's JSON with one place, e.g. `quality.before`, replaced."""
    document = json.loads(samples.digits_resnet().model_dump_json())
    *way, last = path.split(".")
    place = document
    for step in way:
        place = place[int(step)] if isinstance(place, list) else place[step]
    place[last] = value
    return json.dumps(document)


@pytest.mark.parametrize("make", [samples.digits_resnet, samples.llama_wanda, samples.llama_depth, samples.many_layers])
def test_a_record_survives_json(make: Any) -> None:
    record = make()
    assert Record.model_validate_json(record.model_dump_json()) == record
    # the way the command line writes it: plain data through the standard library
    assert Record.model_validate_json(json.dumps(record.model_dump(mode="json"), allow_nan=False)) == record


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_ruined_model_can_be_recorded(value: float) -> None:
    text = json.dumps(Measure(value=value).model_dump(mode="json"), allow_nan=False)
    back = Measure.model_validate_json(text).value
    assert back == value or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("colour", "red", "colour"),
        ("title", "", "title"),
        ("format", 2, "format"),
        ("budget.sparsity", 1.2, "budget.sparsity"),
        ("structure", "sparse", "structure"),
        ("layers", [], "layers"),
        ("layers.0.kept", 999_999, "layers.0"),
        ("layers.0.sparsity", 0.1, "layers.0"),
        ("reproduce.seed", "0", "reproduce.seed"),
        ("sizes.nonzeros", {"before": 0, "after": 0}, "sizes.nonzeros.before"),
        ("latency.rows.0.before", {"median": 2.0, "p10": 2.5, "p90": 3.0}, "latency.rows.0.before"),
        ("quality.before", {"value": 99.0, "interval": [10.0, 20.0]}, "quality.before"),
        ("recovery", None, "recovery"),
        ("evenness", {"before": 0.1, "after": 1.5}, "evenness.after"),
    ],
)
def test_a_false_record_is_refused_and_the_field_named(tmp_path: Path, path: str, value: Any, says: str) -> None:
    file = tmp_path / "report.json"
    file.write_text(changed(path, value))
    with pytest.raises(ReportError) as caught:
        Record.load(file)
    assert says in str(caught.value)
    assert str(file) in str(caught.value)


def test_load_reads_what_was_written_and_names_a_missing_file(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    file.write_text(samples.digits_resnet().model_dump_json())
    assert Record.load(file) == samples.digits_resnet()
    with pytest.raises(ReportError, match=r"missing\.json"):
        Record.load(tmp_path / "missing.json")
    file.write_text(file.read_text()[:100])
    with pytest.raises(ReportError, match=r"report\.json"):
        Record.load(file)


def test_records_are_frozen() -> None:
    with pytest.raises(ValidationError):
        samples.digits_resnet().title = "other"  # type: ignore[misc]


def test_a_row_of_a_plans_table_becomes_a_layer() -> None:
    mask = torch.tensor([[True, False, True, False], [True, True, True, False]])
    site = Site(name="fc.weight", kind=UnitKind.WEIGHT, shape=(2, 4))
    plan = Plan(sites={"fc.weight": site}, masks={"fc.weight": mask}, facts={"fc.weight": {"error": 0.25}})
    layer = Layer.of_row(plan.table()[0])
    assert (layer.kept, layer.units, layer.sparsity, layer.shape) == (5, 8, 0.375, [2, 4])
    assert layer.facts == {"error": 0.25}


def quality(before: float, pruned: float, higher: bool) -> Quality:
    return Quality(metric="m", higher_is_better=higher, before=Measure(value=before), pruned=Measure(value=pruned))


@pytest.mark.parametrize(
    ("before", "after", "higher", "loss", "kept"),
    [
        (80.0, 60.0, True, 0.25, 0.75),
        (80.0, 88.0, True, -0.1, 1.1),
        (10.0, 12.5, False, 0.25, 0.8),
        (10.0, 8.0, False, -0.2, 1.25),
        (10.0, math.inf, False, math.inf, 0.0),
        (10.0, math.nan, False, math.inf, 0.0),
        (0.0, 0.5, True, math.inf, 0.0),
    ],
)
def test_loss_and_kept_quality(before: float, after: float, higher: bool, loss: float, kept: float) -> None:
    found = quality(before, after, higher)
    assert found.loss(found.after) == pytest.approx(loss)
    assert found.kept(found.after) == pytest.approx(kept)


def test_the_saved_models_quality_is_the_recovered_one() -> None:
    assert samples.digits_resnet().quality.after.value == 98.06
    assert samples.llama_wanda().quality.after.value == 10.87


def test_a_latency_difference_within_the_spread_is_not_clear() -> None:
    assert not samples.case(1, 10.0, 10.3, "x", spread=0.05).clear
    assert samples.case(1, 10.0, 13.0, "x", spread=0.05).clear
    assert samples.case(1, 10.0, 8.0, "x").speedup == 1.25
    with pytest.raises(ValidationError):
        Timing(median=0.0, p10=0.0, p90=0.0)
    assert Pair(before=8, after=2).kept == 0.25
