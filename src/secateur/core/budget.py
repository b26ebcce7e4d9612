"""How much may stay. Counts are exact integers: fractions are read as what the user typed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from fractions import Fraction
from math import floor, isfinite
from typing import Any

from secateur.core.errors import BudgetError, UnknownNameError
from secateur.core.units import UnitKind


class Quantity(StrEnum):
    """What a budget counts."""

    SPARSITY = "sparsity"  # fraction of the units removed
    DENSITY = "density"  # fraction of the units kept
    UNITS = "units"  # number of units kept
    PARAMETERS = "parameters"  # parameters kept: of the whole model for structured methods, in the sites otherwise
    FLOPS = "flops"  # FLOPs of the whole model on one sample; structured methods
    BYTES = "bytes"  # bytes of the saved weights; structured methods
    MILLISECONDS = "milliseconds"  # measured latency; structured methods


def _exact(amount: float) -> Fraction:
    """The decimal that the number prints as; a short fraction where that is one up to rounding errors."""
    return Fraction(str(amount)).limit_denominator(10**9)


COSTS = {Quantity.FLOPS, Quantity.BYTES, Quantity.MILLISECONDS}
COUNTED = {Quantity.SPARSITY, Quantity.DENSITY, Quantity.UNITS, Quantity.PARAMETERS}


@dataclass(frozen=True)
class Pattern:
    """N:M sparsity: of every `of` consecutive inputs of a row, `keep` stay (2:4 keeps 2 of 4)."""

    keep: int
    of: int

    def __post_init__(self) -> None:
        if not 0 < self.keep < self.of:
            raise BudgetError(
                f"pattern {self.keep}:{self.of} is not possible; give KEEP:OF with 0 < KEEP < OF, for example 2:4"
            )

    @classmethod
    def parse(cls, text: str) -> Pattern:
        """Read `"2:4"` as keep 2 of 4."""
        keep, colon, of = text.partition(":")
        if not (colon and keep.strip().isdecimal() and of.strip().isdecimal()):
            raise BudgetError(f"pattern '{text}' is not of the form KEEP:OF, for example 2:4")
        return cls(int(keep), int(of))

    def __str__(self) -> str:
        return f"{self.keep}:{self.of}"


@dataclass(frozen=True)
class Budget:
    """An amount of something that may stay (or, for sparsity, must go).

    Attributes:
        amount: the number, in the unit that `quantity` says.
        quantity: what is counted.
        floor: every site keeps at least `min(floor, its units)` units.
        pattern: N:M; fixes the sparsity of every row.
        per_kind: other amounts for single kinds of unit, e.g. heads 0.25 and neurons 0.5.
    """

    amount: float
    quantity: Quantity = Quantity.SPARSITY
    floor: int = 0
    pattern: Pattern | None = None
    per_kind: tuple[tuple[UnitKind, float], ...] = ()

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "quantity", Quantity(self.quantity))  # a plain string would skip the checks
        except ValueError:
            raise UnknownNameError("quantity of a budget", str(self.quantity), Quantity) from None
        for amount in (self.amount, *(a for _, a in self.per_kind)):
            self._check(amount)
        if self.floor < 0:
            raise BudgetError(f"floor must be 0 or more units per site, got {self.floor}")

    def _check(self, amount: float) -> None:
        if not isfinite(amount):
            raise BudgetError(f"{self.quantity} must be a finite number, got {amount}")
        if self.quantity is Quantity.SPARSITY and not 0 <= amount < 1:
            raise BudgetError(f"sparsity must be in [0, 1), got {amount:g}; 0.5 removes half of the units")
        if self.quantity is Quantity.DENSITY and not 0 < amount <= 1:
            raise BudgetError(f"density must be in (0, 1], got {amount:g}")
        if self.quantity in COSTS and not amount > 0:
            raise BudgetError(
                f"{self.quantity} must be above 0, got {amount:g}: up to 1 it is the share kept, above 1 an amount"
            )
        if amount < 0:
            raise BudgetError(f"{self.quantity} must not be negative, got {amount:g}")

    @classmethod
    def nm(cls, pattern: Pattern | str) -> Budget:
        """The budget of an N:M pattern."""
        pattern = Pattern.parse(pattern) if isinstance(pattern, str) else pattern
        return cls(1 - pattern.keep / pattern.of, pattern=pattern)

    def of(self, kind: UnitKind) -> Budget:
        """This budget for units of one kind."""
        for name, amount in self.per_kind:
            if name is kind:
                return replace(self, amount=amount, per_kind=())
        return replace(self, per_kind=())

    @property
    def removes(self) -> bool:
        """Whether it asks that anything goes; sparsity 0 and a share of 1 do not."""
        return self.amount > 0 if self.quantity is Quantity.SPARSITY else self.amount != 1

    @property
    def sparsity(self) -> float:
        """The fraction asked to go.

        Raises:
            BudgetError: the budget is a count, no fraction.
        """
        if self.quantity is Quantity.SPARSITY:
            return self.amount
        if self.quantity is Quantity.DENSITY:
            return 1 - self.amount
        raise BudgetError(f"a budget in {self.quantity} is a total, not a fraction; give a sparsity or a density here")

    def keep(self, units: int, cost: int = 1) -> int:
        """How many of `units` units stay, each worth `cost` parameters.

        Sparsity s removes floor(s * units), the rule of Wanda and of global magnitude. s is read as
        the fraction that was meant: 0.29 of 100 is 29 and not 28, 1 / 3 of 300 is 100 and not 99.

        Raises:
            BudgetError: the amount is out of reach, or the quantity needs a cost model.
        """
        match self.quantity:
            case Quantity.SPARSITY:
                return units - floor(_exact(self.amount) * units)
            case Quantity.DENSITY:
                return floor(_exact(self.amount) * units)
            case Quantity.UNITS:
                kept = int(self.amount)
            case Quantity.PARAMETERS:
                kept = int(self.amount) // cost
            case _:
                raise BudgetError(
                    f"a budget in {self.quantity} needs a method with a cost model; this method takes "
                    f"{', '.join(sorted(COUNTED))}"
                )
        if kept > units:
            raise BudgetError(f"cannot keep {kept} of {units} units; the reachable range is 0 to {units}")
        return kept

    def __str__(self) -> str:
        pattern = f" as {self.pattern} (keep {self.pattern.keep} of {self.pattern.of})" if self.pattern else ""
        return f"{self.quantity} {self.amount:g}{pattern}"

    def to_json(self) -> dict[str, Any]:
        """Plain data for `plan.json`."""
        return {
            "amount": self.amount,
            "quantity": self.quantity.value,
            "floor": self.floor,
            "pattern": str(self.pattern) if self.pattern else None,
            "per_kind": {kind.value: amount for kind, amount in self.per_kind},
        }
