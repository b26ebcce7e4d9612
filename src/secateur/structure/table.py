"""The table of rules: what each operator does to the axes of its tensors. Users add theirs in a call.

An operator rule is keyed by its ATen name without overload and without the underscore of its
in-place form (`add` serves `add_`); it sees the executed call and sets the dimensions of the result.
A function rule is keyed by a Python-level function and also makes the result, where one function
says more than the many operators it is made of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from secateur.structure.traced import Expression

if TYPE_CHECKING:
    from secateur.structure.observe import Observer


@dataclass
class Call:
    """One executed operator or function.

    Attributes:
        name: its name, e.g. `aten::add`.
        args, kwargs: as called.
        out: the result; None for a function rule that is to make it.
        sizes: for functions that take sizes, the expressions of these, None where free.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    out: Any = None
    sizes: list[Expression | None] | None = None

    def get(self, position: int, name: str = "", default: Any = None) -> Any:
        """An argument by position or keyword."""
        if position < len(self.args):
            return self.args[position]
        return self.kwargs.get(name, default)

    @property
    def tensors(self) -> list[Tensor]:
        """All tensor arguments in order, those in lists too."""
        found: list[Tensor] = []
        for item in (*self.args, *self.kwargs.values()):
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, (list, tuple)):
                found += [inner for inner in item if isinstance(inner, Tensor)]
        return found


Rule = Callable[["Observer", Call], None]

OPERATORS: dict[str, Rule] = {}
FUNCTIONS: dict[Callable[..., Any], Rule] = {}


def operator(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ATen operators (`add`) or those of other libraries (`torchvision::roi_align`)."""

    def register(rule: Rule) -> Rule:
        for name in names:
            OPERATORS[name if "::" in name else f"aten::{name}"] = rule
        return rule

    return register


def function(*functions: Callable[..., Any]) -> Callable[[Rule], Rule]:
    """Register a rule for Python-level functions; it makes the result with `Observer.make`."""

    def register(rule: Rule) -> Rule:
        for one in functions:
            FUNCTIONS[one] = rule
        return rule

    return register
