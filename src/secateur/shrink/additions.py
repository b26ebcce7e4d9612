"""What a pruned model has that the dense one had not: shortcuts, routers, thinner layers for one, by-passes.

A plan lists its additions as plain data; `attach` puts them into a fresh model, whose values are loaded then, and
`additions_of` reads them from a model. This file and those that it imports need torch alone, because saved folders
carry copies of them for users of `trust_remote_code`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from secateur.shrink.bypass import attach_bypass, bypasses_in
from secateur.shrink.factorised import attach_factors, factors_in
from secateur.shrink.routers import attach_experts, routers_in
from secateur.shrink.shortcuts import attach_norm, attach_shortcut, shortcuts_in, untie

Undo = Callable[[], None]

MAKERS: Mapping[str, Callable[[nn.Module, dict[str, Any]], list[Undo]]] = {
    "norm": attach_norm,
    "shortcut": attach_shortcut,
    "untied": untie,
    "experts": attach_experts,
    "factorised": attach_factors,
    "bypass": attach_bypass,
}


def attach(model: nn.Module, additions: Iterable[dict[str, Any]]) -> Undo:
    """Put additions into a model, in place; parameters that come with them are still to get their values.

    Args:
        model: the plain model.
        additions: what the functions of `MAKERS` take; `kind` says which.

    Returns:
        A function that takes everything out again.

    Raises:
        AttributeError: the model has no module or parameter of such a name.
    """
    undo: list[Undo] = []

    def put_back() -> None:
        for one in reversed(undo):
            one()

    try:
        for addition in additions:
            undo += MAKERS[addition["kind"]](model, addition)
    except BaseException:
        put_back()
        raise
    return put_back


def additions_of(model: nn.Module) -> list[dict[str, Any]]:
    """The additions that a model has, as `attach` wants them, under the names of now."""
    return [*routers_in(model), *shortcuts_in(model), *factors_in(model), *bypasses_in(model)]
