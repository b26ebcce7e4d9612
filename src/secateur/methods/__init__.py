"""One file per published system, in rooms by what is removed. A method imports parts, never a method."""

import sys
from functools import cache
from types import ModuleType

from secateur.core import catalogue
from secateur.core.method import Method


@cache
def methods() -> dict[str, Method]:
    """The catalogue: name -> method, third parties' included."""
    return catalogue.collect(__name__)


class _Callable(ModuleType):
    """`secateur.methods()` is the catalogue, `secateur.methods.llm` a room: one name serves both.

    Importing a submodule always binds it in its package, so a function of that name would vanish.
    """

    def __call__(self) -> dict[str, Method]:
        return methods()


sys.modules[__name__].__class__ = _Callable
