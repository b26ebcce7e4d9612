"""Charts: the geometry is the number, and every number is there as text."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st

from secateur.report import bars
from secateur.report.markup import Html, element, join
from secateur.report.record import Measure, Quality
from secateur.report.scatter import LINE, axes, free_line, scatter


def parsed(markup: str) -> ET.Element:
    """Charts are well-formed XML as well."""
    return ET.fromstring(f"<root>{markup}</root>")


def rects(markup: str, style: str) -> list[ET.Element]:
    return [item for item in parsed(markup).iter("rect") if item.get("class") == style]


def widths(markup: str, style: str) -> list[float]:
    return [float(item.get("width", "nan")) for item in rects(markup, style)]


def test_markup_escapes_everything_that_is_not_markup() -> None:
    made = element("b", {"title": '"<&'}, "<i>", Html("<u>x</u>"))
    assert made == '<b title="&quot;&lt;&amp;">&lt;i&gt;<u>x</u></b>'
    assert join([made, made]) == made + made


@given(st.floats(0, 1e6), st.floats(0.01, 1e6))
def test_a_bar_is_as_long_as_its_value(value: float, top: float) -> None:
    (width,) = widths(bars.track(value, top, "after", "label"), "after")
    assert width == pytest.approx(min(100 * value / top, 100), abs=0.006)


@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_a_bar_of_no_number_is_still_a_chart(value: float) -> None:
    (width,) = widths(bars.track(value, 10, "after", "label"), "after")
    assert width == (100 if value == math.inf else 0)


def test_quality_bars_start_at_zero_and_print_their_values() -> None:
    markup = bars.quality_bars(samples.digits_resnet().quality)
    assert [widths(markup, style) for style in ("before", "middle", "after")] == [[98.89], [81.39], [98.06]]
    text = "".join(parsed(markup).itertext())
    assert all(value in text for value in ("98.89 %", "81.39 %", "98.06 %", "96.39 to 99.17"))
    assert [item.get("aria-label") is not None for item in parsed(markup).iter("svg")] == [True] * 3


def test_without_recovery_the_pruned_bar_is_the_result() -> None:
    markup = bars.quality_bars(samples.llama_wanda().quality)
    before, after = widths(markup, "before")[0], widths(markup, "after")[0]
    assert after / before == pytest.approx(10.87 / 9.412, rel=1e-3)
    assert not rects(markup, "middle")


def test_a_value_that_dwarfs_the_others_is_cut_and_says_its_number() -> None:
    quality = Quality(
        metric="perplexity",
        higher_is_better=False,
        before=Measure(value=10),
        pruned=Measure(value=50_000),
        recovered=Measure(value=12),
    )
    markup = bars.quality_bars(quality)
    assert widths(markup, "middle") == [100]
    assert widths(markup, "before")[0] == pytest.approx(100 * 10 / (12 * 1.02), abs=0.01)
    assert "50.0 k" in markup
    assert [item.get("class") for item in parsed(markup).iter("path")] == ["break"]


def test_latency_bars_share_the_scale_of_their_pair() -> None:
    latency = samples.llama_depth().latency
    assert latency is not None
    markup = bars.latency_bars(latency)
    for before, after, case in zip(widths(markup, "before"), widths(markup, "after"), latency.rows, strict=True):
        assert before / after == pytest.approx(case.speedup, rel=1e-3)
    text = "".join(parsed(markup).itertext())
    assert "3.42 ms" in text
    assert "1.28x faster" in text


@pytest.mark.parametrize("count", [1, 4, 16, 17, 60, 300])
def test_every_layer_is_drawn_and_named(count: int) -> None:
    layers = samples.many_layers(count).layers
    markup = bars.layer_chart(layers)
    drawn = rects(markup, "kept")
    assert len(drawn) == count
    sizes = [float(item.get("width" if count <= bars.FEW_LAYERS else "height", "nan")) for item in drawn]
    assert sizes == pytest.approx([100 * layer.kept / layer.units for layer in layers], abs=0.006)
    assert all(layer.site in markup for layer in layers)


@pytest.mark.parametrize("count", [17, 300])
def test_columns_stand_in_order_and_fill_the_picture(count: int) -> None:
    chart = parsed(bars.layer_columns(samples.many_layers(count).layers)).find(".//svg")
    assert chart is not None
    assert chart.get("viewBox") == f"0 0 {count} 100"
    places = [float(item.get("x", "nan")) for item in chart.iter("rect") if item.get("class") == "kept"]
    assert places == pytest.approx([index + places[0] for index in range(count)], abs=0.006)


def test_scatter_places_results_by_their_numbers() -> None:
    records = [samples.llama_wanda(), samples.llama_depth(), samples.digits_resnet()]
    scale = axes(records)
    chart = parsed(scatter(records))
    marks = [item for item in chart.iter("circle") if item.get("class") == "after"]
    expected = [(scale.x(r.sizes.nonzeros.kept), scale.y(r.quality.kept(r.quality.after))) for r in records]
    found = [(float(item.get("cx", "nan")), float(item.get("cy", "nan"))) for item in marks]
    assert [value for pair in found for value in pair] == pytest.approx(
        [value for pair in expected for value in pair], abs=0.006
    )
    assert [item.get("class") for item in chart.iter("circle")].count("hollow") == 2
    labels = [item.text for item in chart.iter("text") if item.get("class") == "label"]
    assert labels == ["1  wanda", "2  shortgpt", "3  global_magnitude"]
    assert scale.bottom <= min(r.quality.kept(r.quality.pruned) for r in records)


def test_scatter_survives_a_ruined_model_and_one_better_than_dense() -> None:
    ruined = samples.llama_wanda()
    quality = ruined.quality.model_copy(update={"pruned": Measure(value=math.inf)})
    better = ruined.quality.model_copy(update={"pruned": Measure(value=8.0)})
    records = [ruined.model_copy(update={"quality": q}) for q in (quality, better)]
    scale = axes(records)
    assert (scale.bottom, scale.top >= 9.412 / 8) == (0, True)
    assert not re.search(r"nan|inf\b", scatter(records))


@given(st.lists(st.tuples(st.floats(0, 300), st.floats(0, 300)), max_size=12))
def test_labels_never_overlap(points: list[tuple[float, float]]) -> None:
    placed: list[tuple[float, float, float]] = []
    for start, y in points:
        placed.append((start, free_line(y, start, 80, placed), 80))
        assert placed[-1][1] >= y
    for index, (left, y, _) in enumerate(placed):
        for other, z, _ in placed[:index]:
            assert abs(left - other) >= 80 or abs(y - z) >= LINE - 1e-6
