"""Zeros that stay zero while a model is trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import PlanError
from secateur.core.plan import Plan
from secateur.core.units import UnitKind
from secateur.train.masking import Masks, unwrapped


class MaskKeeper:
    """Zeroes pruned weights and every optimiser state of theirs after each `optimizer.step()`.

    Works through the optimiser's own hook, so any training loop keeps its shape; momentum and weight
    decay cannot revive a weight. Detach with `close()` or use it as a context manager. Nothing is
    stored in the model: on resuming, make a new keeper from the plan.

    Args:
        model: may be compiled or wrapped for several processes.
        plan: what stays; or its masks alone, parameter name -> bool tensor, True = keep.
        optimizer: the one that trains the model.

    Example:
        with MaskKeeper(model, plan, optimizer):
            train(model, optimizer)

    Raises:
        PlanError: the model lacks a parameter of the plan, or its shape differs.
    """

    def __init__(self, model: nn.Module, plan: Plan | Mapping[str, Tensor], optimizer: torch.optim.Optimizer):
        parameters = dict(unwrapped(model).named_parameters())
        masks = weight_masks(plan) if isinstance(plan, Plan) else plan
        for name, keep in masks.items():
            if name not in parameters or parameters[name].shape != keep.shape:
                raise PlanError(f"the model has no parameter '{name}' of shape {list(keep.shape)} to keep masked")
        self.masks = Masks({name: parameters[name] for name in masks}, optimizer)
        for name, keep in masks.items():
            self.masks.set(name, keep)
        self._handle = optimizer.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.masks.enforce()

    def close(self) -> None:
        """Stop enforcing; what was removed is left at exactly +0."""
        self.masks.clean()
        self._handle.remove()

    def __enter__(self) -> MaskKeeper:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def weight_masks(plan: Plan) -> dict[str, Tensor]:
    """The masks of a plan that speak of single weights."""
    return {name: mask for name, mask in plan.masks.items() if plan.sites[name].kind is UnitKind.WEIGHT}
