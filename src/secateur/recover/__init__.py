"""Repair after removal: compensation in closed form, batch-norm statistics, fine-tuning under masks."""

from __future__ import annotations

from secateur.core.errors import UnknownNameError
from secateur.recover.batchnorm import recovery as _batchnorm
from secateur.recover.finetune import recovery as _finetune
from secateur.recover.recovery import Recovery, Request
from secateur.recover.self_generated import recovery as _self_generated

RECOVERIES: dict[str, Recovery] = {entry.name: entry for entry in (_batchnorm, _finetune, _self_generated)}


def find(name: str) -> Recovery:
    """The recovery of that name.

    Raises:
        UnknownNameError: gives the nearest names.
    """
    if name not in RECOVERIES:
        raise UnknownNameError("recovery", name, RECOVERIES)
    return RECOVERIES[name]


__all__ = ["RECOVERIES", "Recovery", "Request", "find"]
