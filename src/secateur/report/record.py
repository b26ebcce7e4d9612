"""What one pruning result is: plain data, checked on entry. The content of `report.json`."""

from __future__ import annotations

from math import isfinite, isnan
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    JsonValue,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    ValidationError,
    model_validator,
)

from secateur.core.errors import SecateurError
from secateur.core.tags import Speedup

# a ruined model has infinite or undefined perplexity; JSON knows neither, so they travel as text
Figure = Annotated[
    float,
    Field(strict=False),
    PlainSerializer(lambda value: value if isfinite(value) else str(value), when_used="json"),
]
Fraction = Annotated[FiniteFloat, Field(ge=0, le=1)]
Milliseconds = Annotated[FiniteFloat, Field(gt=0)]
Name = Annotated[str, Field(min_length=1)]


class ReportError(SecateurError):
    """A result's record is missing, unreadable or not of the expected form."""


class _Part(BaseModel):
    """Base of all parts: frozen, no conversion between types, unknown names refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelInfo(_Part):
    """Which model was pruned; `fingerprint` is a short digest of its parameters."""

    name: Name
    fingerprint: Name


class MethodInfo(_Part):
    """The method as the catalogue knows it: name, the paper's title and citation, the rule in one line."""

    name: Name
    title: str
    citation: str
    formula: str = ""


class BudgetInfo(_Part):
    """What was asked (in words) and which fraction of the units in the pruned sites went."""

    asked: Name
    sparsity: Fraction
    units: Name = "weights"


class DataInfo(_Part):
    """Calibration data: name, digest of all samples, how many."""

    name: Name
    digest: Name
    samples: PositiveInt


class Reproduction(_Part):
    """Everything needed to make the result again; `settings` are the method's."""

    command: Name
    python: str
    seed: int
    settings: dict[str, JsonValue] = {}
    versions: dict[str, str] = {}


class Measure(_Part):
    """A measured quality with its 95 % interval (low, high) and the number of samples, where known."""

    value: Figure
    interval: tuple[Figure, Figure] | None = None
    samples: PositiveInt | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.interval and not (isnan(self.value) or self.interval[0] <= self.value <= self.interval[1]):
            raise ValueError(f"the interval {self.interval} does not contain the value {self.value:g}")
        return self


class Quality(_Part):
    """The model's quality before pruning, right after it, and after recovery if there was one.

    Attributes:
        metric: e.g. "accuracy" or "perplexity".
        unit: "%" for percentages, empty for pure numbers.
        higher_is_better: whether more is better.
        data: what it was measured on.
    """

    metric: Name
    unit: str = ""
    higher_is_better: bool
    data: str = ""
    before: Measure
    pruned: Measure
    recovered: Measure | None = None

    @property
    def after(self) -> Measure:
        """The quality of the model that was saved."""
        return self.recovered or self.pruned

    def loss(self, measure: Measure) -> float:
        """How much worse than before, as a fraction of the value before; negative = better.

        Infinite where the measure is not a finite number or the value before is 0.
        """
        before, now = self.before.value, measure.value
        if not (isfinite(before) and isfinite(now)) or before == 0:
            return float("inf")
        worse = before - now if self.higher_is_better else now - before
        return worse / abs(before)

    def kept(self, measure: Measure) -> float:
        """Quality relative to the dense model, 1 = equal: now/before, or before/now where lower is better."""
        before, now = self.before.value, measure.value
        top, bottom = (now, before) if self.higher_is_better else (before, now)
        return max(top / bottom, 0.0) if isfinite(top) and isfinite(bottom) and bottom > 0 else 0.0


class Pair(_Part):
    """A count before and after."""

    before: PositiveInt
    after: NonNegativeInt

    @property
    def kept(self) -> float:
        """Fraction that is left."""
        return self.after / self.before


class Sizes(_Part):
    """Sizes before and after; `flops_note` says what one count is, e.g. the input's shape."""

    parameters: Pair
    nonzeros: Pair
    flops: Pair | None = None
    flops_note: str = ""
    weight_bytes: Pair
    file_bytes: Pair | None = None


class Evenness(_Part):
    """PQ index (p=0.5, q=1) of the weights that are not zero, before and after; 0 = all of equal size."""

    before: Fraction
    after: Fraction


class Timing(_Part):
    """Median, 10th and 90th percentile in milliseconds; throughput in the row's unit."""

    median: Milliseconds
    p10: Milliseconds
    p90: Milliseconds
    throughput: Annotated[FiniteFloat, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if not self.p10 <= self.median <= self.p90:
            raise ValueError(f"p10 <= median <= p90 does not hold for {self.p10:g}, {self.median:g}, {self.p90:g}")
        return self


class LatencyRow(_Part):
    """One measured case, e.g. "batch 1", before and after; `unit` is the throughput's."""

    label: Name
    before: Timing
    after: Timing
    unit: str = "samples/s"

    @property
    def speedup(self) -> float:
        """Median before over median after; above 1 is faster."""
        return self.before.median / self.after.median

    @property
    def clear(self) -> bool:
        """Whether each median lies outside the other's p10 to p90."""
        a, b = self.before, self.after
        return not (a.p10 <= b.median <= a.p90 or b.p10 <= a.median <= b.p90)


class Latency(_Part):
    """Measured latency on one machine; `peak_memory` in bytes."""

    rows: Annotated[list[LatencyRow], Field(min_length=1)]
    threads: PositiveInt
    dtype: Name
    device: Name
    peak_memory: Pair | None = None


class Layer(_Part):
    """One site: how many units it had and kept; `facts` are the method's figures."""

    site: Name
    kind: Name
    units: PositiveInt
    kept: NonNegativeInt
    sparsity: Fraction
    shape: list[int] = []
    facts: dict[str, Figure] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.kept > self.units:
            raise ValueError(f"'{self.site}' keeps {self.kept} of {self.units} units")
        if abs(1 - self.kept / self.units - self.sparsity) > 1e-6:
            raise ValueError(f"'{self.site}' keeps {self.kept} of {self.units}, not sparsity {self.sparsity:g}")
        return self

    @classmethod
    def of_row(cls, row: dict[str, Any]) -> Layer:
        """From a row of `Plan.table()`: columns that every site has, the rest are facts."""
        own = {name: row[name] for name in ("site", "kind", "units", "kept", "sparsity")}
        facts = {name: float(value) for name, value in row.items() if name not in {*own, "shape"}}
        return cls(**own, shape=list(row.get("shape", [])), facts=facts)


class MachineRow(_Part):
    """One fact measured on this machine, e.g. a 90 % sparse layer at batch 1; speedup over dense."""

    label: Name
    batch: PositiveInt
    ms: Milliseconds
    speedup: Annotated[FiniteFloat, Field(gt=0)]


class Machine(_Part):
    """What sparsity brings on the user's own machine, measured, and said in sentences."""

    rows: list[MachineRow] = []
    sentences: list[str] = []


class RecoveryInfo(_Part):
    """The repair after pruning: its name, settings, and what there is to say about it."""

    name: Name
    settings: dict[str, JsonValue] = {}
    text: str = ""


class Record(_Part):
    """One pruning result.

    Attributes:
        structure: how the removed units lie: unstructured zeros, N:M, or really cut out.
        calibration: None for methods that look at no data.
        evenness: how uneven the weights were and those left are; None where there is no linear or convolution layer.
        warnings: sentences the reader must see, e.g. that unstructured zeros are not speed.
        advice: the caller's own sentences on what to try next; `advise` adds its rules.
    """

    format: Literal[1] = 1
    title: Name
    model: ModelInfo
    method: MethodInfo
    budget: BudgetInfo
    structure: Speedup
    quality: Quality
    sizes: Sizes
    layers: Annotated[list[Layer], Field(min_length=1)]
    reproduce: Reproduction
    calibration: DataInfo | None = None
    latency: Latency | None = None
    evenness: Evenness | None = None
    machine: Machine = Machine()
    recovery: RecoveryInfo | None = None
    warnings: list[str] = []
    advice: list[str] = []

    @model_validator(mode="after")
    def _recovered(self) -> Self:
        if (self.recovery is None) != (self.quality.recovered is None):
            raise ValueError("recovery and quality.recovered belong together: give both or neither")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Record:
        """Read a record's JSON file.

        Raises:
            ReportError: missing, or not a record; names the file and the field.
        """
        try:
            return cls.model_validate_json(Path(path).read_bytes())
        except OSError as error:
            raise ReportError(f"cannot read the result's record '{path}': {error.strerror}") from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the document"
            raise ReportError(
                f"'{path}' is not a result's record: {place}: {first['msg']}; make it again with `secateur prune`"
            ) from None
