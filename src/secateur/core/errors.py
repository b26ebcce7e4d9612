"""Every error a user can cause: one sentence that says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class SecateurError(Exception):
    """Base of all errors that are the input's fault; the command line turns them into exit code 2."""


class UnknownNameError(SecateurError):
    """A method, model, data set, setting or tag that does not exist."""

    def __init__(self, what: str, name: str, known: Iterable[str]):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        super().__init__(f"unknown {what} '{name}'; {hint}")


class BudgetError(SecateurError):
    """A budget that is malformed or cannot be met; the message gives the reachable range."""


class SettingsError(SecateurError):
    """A method's setting has a wrong name, type or value."""


class ModelError(SecateurError):
    """The model cannot be loaded, run or pruned as asked; the message names the layer."""


class NumericsError(SecateurError):
    """NaN or infinity in weights, activations or gradients; the message names the layer."""


class DataError(SecateurError):
    """Calibration or evaluation data is missing, unreadable or of the wrong shape."""


class PlanError(SecateurError):
    """A plan is corrupt or belongs to another model."""


class OutputError(SecateurError):
    """The result cannot be written: folder exists, disk full, reload differs."""


class MissingExtraError(SecateurError):
    """An optional dependency is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package '{package}': pip install 'secateur[{extra}]'")
