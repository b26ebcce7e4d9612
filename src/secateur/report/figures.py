"""Numbers as people read them, and what a change means: how much, and for better or worse."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from math import isfinite, isnan

from secateur.report.record import Evenness, LatencyRow, Measure, Pair, Quality

MINUS = "\N{MINUS SIGN}"
DASH = "\N{EN DASH}"
COUNTS = ("", " k", " M", " B", " T")
OPERATIONS = ("", " k", " M", " G", " T", " P")
BYTES = (" B", " kB", " MB", " GB", " TB")


class Verdict(StrEnum):
    """What a change means to the user."""

    GOOD = "good"
    BAD = "bad"
    SAME = "same"


@dataclass(frozen=True)
class Change:
    """A change in figures and in a word, so that colour is never needed to read it."""

    figure: str
    word: str
    verdict: Verdict

    @property
    def sign(self) -> str:
        """A mark that differs in shape for each verdict."""
        return {Verdict.GOOD: "\N{CHECK MARK}", Verdict.BAD: "!", Verdict.SAME: "="}[self.verdict]


UNCHANGED = Change("", "unchanged", Verdict.SAME)
ALMOST = Change("", "almost unchanged", Verdict.SAME)
NEGLIGIBLE = 5e-4  # relative change of a size that prints as 0.0 %


def digits(value: float, significant: int = 3) -> str:
    """`significant` digits without an exponent; whole part never shortened: 0.412, 12.3, 1,234."""
    if not isfinite(value):
        return "undefined" if isnan(value) else ("infinite" if value > 0 else MINUS + "infinite")
    if value == 0:
        return "0"
    rounded = float(f"{abs(value):.{significant}g}")  # 9.999 becomes 10.0, not 10.00
    whole = len(str(int(rounded))) if rounded >= 1 else 0
    places = max(significant - whole, 0) if rounded >= 0.001 else 6
    return f"{value:,.{places}f}".replace("-", MINUS)


def short(count: float, units: tuple[str, ...] = COUNTS) -> str:
    """Three digits and a decimal unit (k = 1,000); below 10,000 plain counts are written out."""
    if count < (10_000 if units is COUNTS else 1_000):
        return f"{count:,.0f}{units[0]}"
    index = 0
    while count >= 999.5 and index < len(units) - 1:
        count, index = count / 1000, index + 1
    return f"{digits(count)}{units[index]}"


def milliseconds(value: float) -> str:
    """Three digits in us, ms or s."""
    if value < 0.1:
        return f"{digits(value * 1000)} \N{GREEK SMALL LETTER MU}s"
    return f"{digits(value)} ms" if value < 1000 else f"{digits(value / 1000)} s"


def percent(fraction: float) -> str:
    """One decimal; two close to 0 and to 1, where they matter."""
    places = 2 if 0 < fraction < 0.001 or 0.995 < fraction < 1 else 1
    return f"{100 * fraction:.{places}f} %"


def signed(value: float, places: int = 1) -> str:
    """With its sign, minus as a real minus."""
    return f"{value:+,.{places}f}".replace("-", MINUS)


def plural(kind: str) -> str:
    """Kinds of unit as words: `kv_group` is "kv groups"."""
    return kind.replace("_", " ") + "s"


def times(factor: float) -> str:
    """A factor, e.g. 2.00x."""
    return f"{digits(factor)}x"


def measured(quality: Quality, measure: Measure) -> str:
    """A quality with its unit."""
    value = measure.value
    text = short(value) if isfinite(value) and abs(value) >= 10_000 else digits(value, 4)
    return f"{text} {quality.unit}".rstrip() if isfinite(value) else text


def interval(measure: Measure) -> str:
    """The 95 % interval, or nothing."""
    if measure.interval is None:
        return ""
    low, high = (digits(end, 4) for end in measure.interval)
    return f"{low} to {high}"


def size_change(pair: Pair) -> Change:
    """Smaller is better; a few bytes more or less, e.g. of a file's header, are no change."""
    if abs(pair.kept - 1) < NEGLIGIBLE:
        return UNCHANGED if pair.after == pair.before else ALMOST
    figure = f"{signed(100 * (pair.kept - 1))} %"
    if pair.after > pair.before:
        return Change(figure, f"{times(pair.kept)} as large", Verdict.BAD)
    word = f"{times(1 / pair.kept)} smaller" if pair.after else "nothing left"
    return Change(figure, word, Verdict.GOOD)


def evenness_change(found: Evenness) -> Change:
    """A lower index leaves less to prune, a higher one more (Diao et al. 2023); neither is good or bad by itself."""
    difference = found.after - found.before
    if abs(difference) < NEGLIGIBLE:
        return UNCHANGED
    return Change(signed(difference, 3), "less even" if difference > 0 else "more even", Verdict.SAME)


def latency_change(row: LatencyRow) -> Change:
    """Faster is better; a difference within the spread of the two measurements is none."""
    figure = f"{signed(100 * (1 / row.speedup - 1))} %"
    if not row.clear:
        return Change(figure, "within the spread", Verdict.SAME)
    if row.speedup > 1:
        return Change(figure, f"{times(row.speedup)} faster", Verdict.GOOD)
    return Change(figure, f"{times(1 / row.speedup)} slower", Verdict.BAD)


def quality_change(quality: Quality, measure: Measure) -> Change:
    """Percentages change by points, everything else by per cent."""
    loss = quality.loss(measure)
    if not isfinite(loss):
        return Change("", "not measurable", Verdict.BAD)
    difference = measure.value - quality.before.value
    figure = f"{signed(difference, 2)} points" if quality.unit == "%" else _relative(difference / quality.before.value)
    if abs(loss) < 5e-5:
        return UNCHANGED
    return Change(figure, "worse" if loss > 0 else "better", Verdict.BAD if loss > 0 else Verdict.GOOD)


def _relative(change: float) -> str:
    return f"{signed(100 * change)} %" if abs(change) < 10 else f"{times(1 + change)} the value"
