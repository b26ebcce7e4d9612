"""Numbers as text: hand-computed cases and properties."""

from __future__ import annotations

import math

import pytest
import samples
from hypothesis import given
from hypothesis import strategies as st

from secateur.report import figures as f
from secateur.report.headline import cards, comparison
from secateur.report.record import Evenness, Measure, Pair, Quality

M = "\N{MINUS SIGN}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (f.digits(0.4123), "0.412"),
        (f.digits(12.34), "12.3"),
        (f.digits(1234.5), "1,234"),
        (f.digits(-2.5), f"{M}2.50"),
        (f.digits(0.000123), "0.000123"),
        (f.digits(0), "0"),
        (f.digits(9.999), "10.0"),
        (f.digits(0.9999), "1.00"),
        (f.digits(math.inf), "infinite"),
        (f.digits(-math.inf), f"{M}infinite"),
        (f.digits(math.nan), "undefined"),
        (f.short(9999), "9,999"),
        (f.short(173_706), "174 k"),
        (f.short(999_900), "1.00 M"),
        (f.short(6_738_415_616), "6.74 B"),
        (f.short(13_476_831_232, f.BYTES), "13.5 GB"),
        (f.short(512, f.BYTES), "512 B"),
        (f.short(2_000_000_000, f.OPERATIONS), "2.00 G"),
        (f.milliseconds(0.05), "50.0 \N{GREEK SMALL LETTER MU}s"),
        (f.milliseconds(0.612), "0.612 ms"),
        (f.milliseconds(2500), "2.50 s"),
        (f.percent(0.5), "50.0 %"),
        (f.percent(0.9991), "99.91 %"),
        (f.percent(1.0), "100.0 %"),
        (f.times(2), "2.00x"),
        (f.plural("kv_group"), "kv groups"),
    ],
)
def test_formats(text: str, expected: str) -> None:
    assert text == expected


@given(st.integers(0, 10**14))
def test_short_counts_stay_within_half_a_last_digit(count: int) -> None:
    number, _, unit = f.short(count).partition(" ")
    factor = {"": 1, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}[unit]
    assert float(number.replace(",", "")) * factor == pytest.approx(count, rel=0.00501, abs=0.5)


@pytest.mark.parametrize(
    ("before", "after", "figure", "word", "verdict"),
    [
        (100, 50, f"{M}50.0 %", "2.00x smaller", "good"),
        (100, 125, "+25.0 %", "1.25x as large", "bad"),
        (100, 100, "", "unchanged", "same"),
        (699_348, 699_420, "", "almost unchanged", "same"),
        (100, 0, f"{M}100.0 %", "nothing left", "good"),
    ],
)
def test_size_changes(before: int, after: int, figure: str, word: str, verdict: str) -> None:
    change = f.size_change(Pair(before=before, after=after))
    assert (change.figure, change.word, change.verdict) == (figure, word, verdict)


def test_latency_changes() -> None:
    faster, slower, same = (f.latency_change(samples.case(1, 10, after, "x", 0.02)) for after in (5, 20, 10.1))
    assert (faster.figure, faster.word, faster.verdict) == (f"{M}50.0 %", "2.00x faster", "good")
    assert (slower.figure, slower.word, slower.verdict) == ("+100.0 %", "2.00x slower", "bad")
    assert (same.word, same.verdict) == ("within the spread", "same")


@pytest.mark.parametrize(
    ("unit", "higher", "before", "after", "figure", "word"),
    [
        ("%", True, 98.89, 98.06, f"{M}0.83 points", "worse"),
        ("%", True, 90.0, 91.0, "+1.00 points", "better"),
        ("", False, 10.0, 11.0, "+10.0 %", "worse"),
        ("", False, 10.0, 9.0, f"{M}10.0 %", "better"),
        ("", False, 10.0, 500.0, "50.0x the value", "worse"),
        ("", False, 10.0, 10.0, "", "unchanged"),
        ("", False, 10.0, math.nan, "", "not measurable"),
    ],
)
def test_quality_changes(unit: str, higher: bool, before: float, after: float, figure: str, word: str) -> None:
    quality = Quality(
        metric="m", unit=unit, higher_is_better=higher, before=Measure(value=before), pruned=Measure(value=after)
    )
    change = f.quality_change(quality, quality.after)
    assert (change.figure, change.word) == (figure, word)


@pytest.mark.parametrize(
    ("before", "after", "figure", "word"),
    [
        (0.152, 0.033, f"{M}0.119", "more even"),
        (0.033, 0.152, "+0.119", "less even"),
        (0.1520, 0.1523, "", "unchanged"),
    ],
)
def test_evenness_changes_are_neither_good_nor_bad(before: float, after: float, figure: str, word: str) -> None:
    change = f.evenness_change(Evenness(before=before, after=after))
    assert (change.figure, change.word, change.verdict) == (figure, word, "same")


def test_verdicts_differ_without_colour() -> None:
    assert len({f.Change("", "", verdict).sign for verdict in f.Verdict}) == len(f.Verdict)


def test_headline_cards() -> None:
    found = {card.name: card for card in cards(samples.digits_resnet())}
    assert list(found) == [
        "Accuracy", "Parameters", "Non-zero parameters", "FLOPs", "Latency, batch 1", "File on disk",
        "PQ index of kept weights",
    ]  # fmt: skip
    assert (found["Accuracy"].before, found["Accuracy"].after) == ("98.89 %", "98.06 %")
    assert found["Non-zero parameters"].exact == "173,706 to 19,551"


def test_what_was_not_measured_has_no_card() -> None:
    record = samples.digits_resnet()
    sizes = record.sizes.model_copy(update={"flops": None, "file_bytes": None})
    bare = record.model_copy(update={"latency": None, "sizes": sizes, "evenness": None})
    assert [card.name for card in cards(bare)] == ["Accuracy", "Parameters", "Non-zero parameters"]
    assert set(comparison([bare])[0]) == {"quality", "nonzeros"}
