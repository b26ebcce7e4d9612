"""Repair after removal: compensation in closed form, batch-norm statistics, fine-tuning under masks."""

from __future__ import annotations

from secateur.core.errors import SettingsError, UnknownNameError
from secateur.core.method import Settings
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


def in_words(text: str) -> tuple[Recovery, Settings]:
    """A recovery and its checked settings from `finetune:steps=300,lr=1e-3`.

    Raises:
        UnknownNameError, SettingsError: a wrong name or value.
    """
    name, _, rest = text.partition(":")
    words = [word for word in rest.split(",") if word]
    if strange := [word for word in words if "=" not in word]:
        raise SettingsError(f"recover takes settings as name=value, like finetune:steps=300, got '{strange[0]}'")
    recovery = find(name.strip())
    return recovery, recovery.configure({k.strip(): v.strip() for k, v in (word.split("=", 1) for word in words)})


__all__ = ["RECOVERIES", "Recovery", "Request", "find", "in_words"]
