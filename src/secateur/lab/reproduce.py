"""Reproduction: a method's check over several seeds, with its baseline and a random control.

The small-scale check runs anywhere in minutes; some methods have one at the paper's own scale too, which needs data
that is not shipped: SECATEUR_DATA names a folder that holds `mnist` and `cifar10`, SECATEUR_MODELS one with trained
networks.
"""

from __future__ import annotations

import importlib
import operator
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from enum import StrEnum
from math import isnan
from pathlib import Path
from typing import Any

from secateur.core.errors import DataError, SettingsError, UnknownNameError
from secateur.core.progress import Progress, Silent, track
from secateur.measure import interval
from secateur.train.study import Ledger

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


class Scale(StrEnum):
    """How large."""

    SMALL = "small"
    FULL = "full"


@dataclass(frozen=True)
class FullCheck:
    """A method's check at the paper's scale, or the nearest that a small machine can do.

    Attributes:
        claims: name -> expectation.
        run: seed, progress, ledger -> claim name -> sample. What is expensive goes through `ledger.once`, under
            a name with the seed in it; several methods' checks may share it.
        conditions: model, data and training, in a few sentences.
    """

    claims: Mapping[str, Expectation]
    run: Callable[[int, Progress, Ledger], Mapping[str, Sample]]
    conditions: str


@dataclass(frozen=True)
class Check:
    """A method's small-scale check.

    Attributes:
        claims: name -> expectation.
        run: seed -> claim name -> sample.
        full: the check at full scale, where there is one.
    """

    claims: Mapping[str, Expectation]
    run: Callable[[int, Progress], Mapping[str, Sample]]
    full: FullCheck | None = None


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
    """All claims of one method. `conditions` is empty at small scale: its file says them."""

    name: str
    passed: bool
    claims: list[Claim]
    scale: Scale = Scale.SMALL
    conditions: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    def to_markdown(self) -> str:
        """A page: the conditions, and a table with every claim's interval."""
        seeds = ", ".join(map(str, self.claims[0].seeds)) if self.claims else ""
        verdict = "every claim shows" if self.passed else "not every claim shows"
        lines = [f"# {self.name}, {self.scale} scale: {verdict}", ""]
        lines += [self.conditions, ""] if self.conditions else []
        lines += [
            f"Seeds {seeds}; mean, Student's t interval (95 %) over the seeds, the same quantity for the baseline and "
            "for the random control. A claim shows when the mean meets the threshold and the control's does not.",
            "",
            "| claim | mean | 95 % interval | baseline | random | threshold | control | shows |",
            "|---|---|---|---|---|---|---|---|",
        ]
        return "\n".join([*lines, *map(_markdown_row, self.claims)]) + "\n"


def _markdown_row(claim: Claim) -> str:
    ends = f"{claim.interval[0]:.4g} to {claim.interval[1]:.4g}" if claim.interval else "-"
    cells = [claim.quantity, f"{claim.value:.4g}", ends, f"{claim.baseline:.4g}", f"{claim.random_control:.4g}"]
    return f"| {' | '.join([*cells, claim.threshold, claim.control, 'yes' if claim.passed else '**no**'])} |"


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


def run_check(
    name: str,
    seeds: int = 3,
    progress: Progress | None = None,
    *,
    scale: Scale = Scale.SMALL,
    folder: Path | None = None,
) -> Report:
    """Run a method's check with seeds 0, 1, ...

    Args:
        name: the method.
        seeds: how many.
        progress: where to report.
        scale: small or full.
        folder: of the full scale's expensive results, so that a killed run goes on; in memory only without one.

    Raises:
        UnknownNameError: no such check.
        SettingsError: it has none at full scale, or the folder's results are of other conditions.
        DataError: the full scale's data are not there.
    """
    check, progress = find_check(name), progress or Silent()
    numbers = list(range(seeds))
    claims, run, conditions = _at_scale(name, check, scale, folder)
    samples = [run(seed, progress) for seed in track(numbers, progress, f"seeds of {name}")]
    judged = [
        _judged(expectation, numbers, [of_seed[key] for of_seed in samples]) for key, expectation in claims.items()
    ]
    return Report(name, all(claim.passed for claim in judged), judged, scale, conditions)


def _at_scale(
    name: str, check: Check, scale: Scale, folder: Path | None
) -> tuple[Mapping[str, Expectation], Callable[[int, Progress], Mapping[str, Sample]], str]:
    if scale is Scale.SMALL:
        return check.claims, check.run, ""
    if check.full is None:
        large = [other for other in known_checks() if find_check(other).full is not None]
        raise SettingsError(f"'{name}' has no check at full scale; these have one: {', '.join(large)}")
    full, ledger = check.full, Ledger(folder, {"conditions": check.full.conditions})
    return full.claims, lambda seed, progress: full.run(seed, progress, ledger), full.conditions


def folder_of(variable: str, name: str) -> Path:
    """The folder or file `name` in what an environment variable names.

    Raises:
        DataError: there is none.
    """
    root = os.environ.get(variable, "")
    if not root or not (Path(root) / name).exists():
        raise DataError(f"{variable}='{root}' names no folder with '{name}' inside; set it to the folder that holds it")
    return Path(root) / name


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
