"""Integers that remember where they come from, so that sizes in a model's code can follow a cut.

During the observed run, integer attributes of modules and sizes of tensors are `Number`s: they are
ordinary integers for Python and torch, and carry the expression that made them. When units go, the
expression says whether the code will compute the new size by itself, or which attribute must change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from secateur.structure.dims import Axis, Dim, count


@dataclass(frozen=True, eq=False)
class Slot:
    """An integer attribute of an object, or one item of an attribute that is a sequence."""

    owner: Any
    name: str
    index: int | None
    value: int
    where: str
    key: int = field(init=False)  # two reads of one attribute are one slot

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", hash((id(self.owner), self.name, self.index)))

    def __str__(self) -> str:
        item = "" if self.index is None else f"[{self.index}]"
        return f"{self.where}.{self.name}{item}"


@dataclass(frozen=True, eq=False)
class Operation:
    """Two expressions combined."""

    symbol: str
    left: Expression
    right: Expression


@dataclass(frozen=True, eq=False)
class Extent:
    """The size of a tensor's dimension."""

    dim: Dim


Expression = int | Slot | Extent | Operation

OPERATIONS: dict[str, Callable[[int, int], int]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b if b else 0,
    "%": lambda a, b: a % b if b else 0,
    "==": lambda a, b: a == b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
}


class Number(int):
    """An integer with the expression that made it."""

    how: Expression

    @classmethod
    def made(cls, value: int, how: Expression) -> Number:
        """A number with a history."""
        number = cls(value)
        number.how = how
        return number

    def __add__(self, other: Any) -> Any:
        return _combined("+", self, other)

    def __radd__(self, other: Any) -> Any:
        return _combined("+", other, self)

    def __sub__(self, other: Any) -> Any:
        return _combined("-", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _combined("-", other, self)

    def __mul__(self, other: Any) -> Any:
        return _combined("*", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _combined("*", other, self)

    def __floordiv__(self, other: Any) -> Any:
        return _combined("//", self, other)

    def __rfloordiv__(self, other: Any) -> Any:
        return _combined("//", other, self)

    def __mod__(self, other: Any) -> Any:
        return _combined("%", self, other)

    def __neg__(self) -> Any:
        return _combined("-", 0, self)

    def __divmod__(self, other: Any) -> Any:
        return self // other, self % other

    def __eq__(self, other: object) -> bool:
        return _compared("==", self, other, int.__eq__(self, other))

    def __ne__(self, other: object) -> bool:
        return not self.__eq__(other)

    def __lt__(self, other: Any) -> bool:
        return _compared("<", self, other, int.__lt__(self, other))

    def __le__(self, other: Any) -> bool:
        return _compared("<=", self, other, int.__le__(self, other))

    def __gt__(self, other: Any) -> bool:
        return _compared("<", other, self, int.__gt__(self, other))

    def __ge__(self, other: Any) -> bool:
        return _compared("<=", other, self, int.__ge__(self, other))

    __hash__ = int.__hash__

    def __bool__(self) -> bool:
        return not self.__eq__(0)

    def __pow__(self, other: Any, modulo: Any = None) -> Any:
        return _counted(self) ** other

    def __truediv__(self, other: Any) -> Any:
        return _counted(self) / other

    def __rtruediv__(self, other: Any) -> Any:
        return other / _counted(self)

    def __rpow__(self, other: Any, modulo: Any = None) -> Any:
        return other ** _counted(self)

    def __rmod__(self, other: Any) -> Any:
        return _combined("%", other, self)

    def __rdivmod__(self, other: Any) -> Any:
        return other // self, other % self

    def __abs__(self) -> Any:
        return self if int.__ge__(self, 0) else -self

    def __float__(self) -> float:
        return float(_counted(self))

    def __int__(self) -> int:
        return _counted(self)

    def __round__(self, digits: Any = None) -> int:
        return _counted(self)

    def __rshift__(self, other: Any) -> Any:
        return _counted(self) >> other

    def __lshift__(self, other: Any) -> Any:
        return _counted(self) << other

    def __and__(self, other: Any) -> Any:
        return _counted(self) & other

    def __or__(self, other: Any) -> Any:
        return _counted(self) | other

    def __deepcopy__(self, memo: Any) -> int:
        return plain(self)

    def __reduce__(self) -> Any:
        return int, (plain(self),)


observers: list[Callable[[Expression, int], None]] = []
"""Who is told that an expression must keep its value. One entry while a run is observed."""


def _compared(symbol: str, left: Any, right: Any, result: Any) -> bool:
    """A branch that the code takes: the comparison must come out the same after a cut."""
    if isinstance(left, int) and isinstance(right, int) and result is not NotImplemented:
        for observer in observers:
            observer(Operation(symbol, how(left), how(right)), int(result))
    return result  # type: ignore[no-any-return]


def _counted(number: Number) -> int:
    """The size is used as a quantity, e.g. in 1 / sqrt(width)."""
    for observer in observers:
        observer(number.how, plain(number))
    return plain(number)


def plain(number: int) -> int:
    """The bare integer, without anybody being told."""
    return int.__add__(number, 0)


def how(number: int) -> Expression:
    """The expression of a number; a plain integer is its own."""
    return number.how if isinstance(number, Number) else number


def _combined(symbol: str, left: Any, right: Any) -> Any:
    if not (isinstance(left, int) and isinstance(right, int)):
        if not (isinstance(left, (int, float)) and isinstance(right, (int, float))):
            return NotImplemented
        for side in (left, right):
            if isinstance(side, Number):
                _counted(side)
        a, b = (plain(side) if isinstance(side, int) else side for side in (left, right))
        return {"+": a + b, "-": a - b, "*": a * b}.get(symbol, NotImplemented)
    if symbol in ("//", "%") and not right:
        raise ZeroDivisionError("integer division or modulo by zero")
    return Number.made(OPERATIONS[symbol](plain(left), plain(right)), Operation(symbol, how(left), how(right)))


def evaluate(expression: Expression, kept: Mapping[Axis, int], slots: Mapping[int, int]) -> int:
    """The value after a cut.

    Args:
        expression: what the code computes.
        kept: axis -> units that stay.
        slots: id of a slot's owner and name (see `Slot.key`) -> its new value.
    """
    if isinstance(expression, int):
        return plain(expression)
    if isinstance(expression, Slot):
        return slots.get(expression.key, expression.value)
    if isinstance(expression, Extent):
        return count(expression.dim, kept)
    left, right = (evaluate(side, kept, slots) for side in (expression.left, expression.right))
    return OPERATIONS[expression.symbol](left, right)


def slots_in(expression: Expression) -> Iterator[Slot]:
    """The attributes that an expression reads."""
    if isinstance(expression, Slot):
        yield expression
    elif isinstance(expression, Operation):
        yield from slots_in(expression.left)
        yield from slots_in(expression.right)


def extents_in(expression: Expression) -> Iterator[Dim]:
    """The tensor sizes that an expression reads."""
    if isinstance(expression, Extent):
        yield expression.dim
    elif isinstance(expression, Operation):
        yield from extents_in(expression.left)
        yield from extents_in(expression.right)


def solve(
    expression: Expression, value: int, kept: Mapping[Axis, int], slots: Mapping[int, int]
) -> tuple[Slot, int] | None:
    """The one attribute, and its new value, that makes the expression `value`.

    None where the expression reads no attribute, more than one that is still open, or no integer fits.
    """
    open_slots = {slot.key for slot in slots_in(expression) if slot.key not in slots}
    if len(open_slots) != 1:
        return None
    while isinstance(expression, Operation):
        left_open = any(slot.key in open_slots for slot in slots_in(expression.left))
        if left_open and any(slot.key in open_slots for slot in slots_in(expression.right)):
            return None
        other = evaluate(expression.right if left_open else expression.left, kept, slots)
        found = _inverse(expression.symbol, value, other, left_open)
        if found is None:
            return None
        value, expression = found, expression.left if left_open else expression.right
    return (expression, value) if isinstance(expression, Slot) else None


def _inverse(symbol: str, value: int, other: int, left_open: bool) -> int | None:
    """The x in `x symbol other = value`, or in `other symbol x = value`; None if no integer fits."""
    quotient = other // value if value else 0
    found: dict[str, int | None] = {
        "+": value - other,
        "-": value + other if left_open else other - value,
        "*": value // other if other and value % other == 0 else None,
        "==": other if value else None,
        "//": value * other if left_open else quotient if quotient and other // quotient == value else None,
    }
    return found.get(symbol)
