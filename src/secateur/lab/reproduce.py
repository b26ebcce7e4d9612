"""Reproduction: a method's small-scale check over several seeds, with its baseline and a random control."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from math import isnan
from typing import Any

from secateur.core.errors import UnknownNameError
from secateur.core.progress import Progress, Silent, track
from secateur.measure import interval

COMPARISONS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt, "==": operator.eq}


@dataclass(frozen=True)
class Sample:
    """One claim's quantity under one seed, for the method, its baseline and random pruning."""

    value: float
    baseline: float
    random: float


@dataclass(frozen=True)
class Expectation:
    """What a claim says before it is measured.

    Attributes:
        quantity: what is measured, in words with its unit.
        threshold: e.g. `<= 0.97`; the mean over seeds must meet it.
        control: `baseline`, `random` or `both`: what must NOT meet it, or the check shows nothing.
    """

    quantity: str
    threshold: str
    control: str = "random"

    def met_by(self, value: float) -> bool:
        """Whether a value meets the threshold."""
        word, _, number = self.threshold.partition(" ")
        return bool(COMPARISONS[word](value, float(number)))


@dataclass(frozen=True)
class Check:
    """A method's small-scale check.

    Attributes:
        claims: name -> expectation.
        run: seed -> claim name -> sample.
    """

    claims: Mapping[str, Expectation]
    run: Callable[[int, Progress], Mapping[str, Sample]]


@dataclass(frozen=True)
class Claim:
    """A measured claim: means over the seeds, and whether it shows.

    `passed` needs the method's mean to meet the threshold and the control's mean not to.
    """

    quantity: str
    value: float
    baseline: float
    random_control: float
    interval: tuple[float, float] | None
    threshold: str
    control: str
    seeds: list[int]
    values: list[float]
    passed: bool


@dataclass(frozen=True)
class Report:
    """All claims of one method."""

    name: str
    passed: bool
    claims: list[Claim]

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def find_check(name: str) -> Check:
    """The check in `lab/checks/NAME.py`.

    Raises:
        UnknownNameError: the method has no check.
    """
    try:
        module = importlib.import_module(f"secateur.lab.checks.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"secateur.lab.checks.{name}":
            raise
        raise UnknownNameError("reproduction", name, known_checks()) from None
    found: Check = module.check
    return found


def known_checks() -> list[str]:
    """Names of all checks."""
    import pkgutil

    from secateur.lab import checks

    return sorted(info.name for info in pkgutil.iter_modules(checks.__path__) if not info.name.startswith("_"))


def run_check(name: str, seeds: int = 3, progress: Progress | None = None) -> Report:
    """Run a method's check with seeds 0, 1, ...

    Raises:
        UnknownNameError: no such check.
    """
    check, progress = find_check(name), progress or Silent()
    numbers = list(range(seeds))
    samples = [check.run(seed, progress) for seed in track(numbers, progress, f"seeds of {name}")]
    claims = [
        _judged(expectation, numbers, [of_seed[key] for of_seed in samples])
        for key, expectation in check.claims.items()
    ]
    return Report(name, all(claim.passed for claim in claims), claims)


def _judged(expectation: Expectation, seeds: list[int], samples: list[Sample]) -> Claim:
    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    values = [sample.value for sample in samples]
    controls = {"baseline": mean([s.baseline for s in samples]), "random": mean([s.random for s in samples])}
    must_fail = controls if expectation.control == "both" else {expectation.control: controls[expectation.control]}
    ends = interval(values)
    defined = not any(map(isnan, must_fail.values()))  # a control without a value has not failed
    return Claim(
        quantity=expectation.quantity,
        value=mean(values),
        baseline=controls["baseline"],
        random_control=controls["random"],
        interval=(ends.low, ends.high) if ends else None,
        threshold=expectation.threshold,
        control=expectation.control,
        seeds=seeds,
        values=values,
        passed=expectation.met_by(mean(values)) and defined and not any(map(expectation.met_by, must_fail.values())),
    )
