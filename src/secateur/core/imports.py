"""Code that the user names: `module.path:name`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any

from secateur.core.errors import ModelError, UnknownNameError


def imported(path: str, what: str = "factory") -> Callable[..., Any]:
    """The callable that `module.path:name` names; the current folder is searched too, as by `python -m`.

    Args:
        path: where it is.
        what: it is, in one word for errors.

    Raises:
        ModelError: the module cannot be imported.
        UnknownNameError: it has no such callable; gives the nearest names.
    """
    module_name, colon, name = path.partition(":")
    if not (colon and module_name and name):
        raise ModelError(f"'{path}' is not of the form module.path:{what}")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        # the user's own module runs here and may fail in any way
        reason = f"{type(error).__name__}: {error}"
        raise ModelError(f"cannot import '{module_name}' of the {what} '{path}': {reason}") from error
    found = getattr(module, name, None)
    if not callable(found):
        known = [other for other, value in vars(module).items() if callable(value)]
        raise UnknownNameError(f"{what} in {module_name}", name, known)
    result: Callable[..., Any] = found
    return result
