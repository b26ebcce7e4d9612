"""Zeros that stay zero while a model is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import PlanError
from secateur.core.plan import Plan
from secateur.core.units import UnitKind


class MaskKeeper:
    """Zeroes pruned weights and every optimiser state of theirs after each `optimizer.step()`.

    Works through the optimiser's own hook, so any training loop keeps its shape; momentum and weight
    decay cannot revive a weight. Detach with `close()` or use it as a context manager. Nothing is
    stored in the model: on resuming, make a new keeper from the plan.

    Example:
        with MaskKeeper(model, plan, optimizer):
            train(model, optimizer)

    Raises:
        PlanError: the model lacks a parameter of the plan, or its shape differs.
    """

    def __init__(self, model: nn.Module, plan: Plan, optimizer: torch.optim.Optimizer):
        parameters = dict(model.named_parameters())
        self.removed: list[tuple[nn.Parameter, Tensor]] = []
        for name, site in plan.sites.items():
            if site.kind is not UnitKind.WEIGHT:
                continue
            if name not in parameters or tuple(parameters[name].shape) != site.shape:
                raise PlanError(f"the model has no parameter '{name}' of shape {list(site.shape)} to keep masked")
            self.removed.append((parameters[name], ~plan.masks[name].to(parameters[name].device)))
        self.optimizer = optimizer
        self._handle = optimizer.register_step_post_hook(self._after_step)
        self.enforce()

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.enforce()

    @torch.no_grad()
    def enforce(self) -> None:
        """Zero the pruned entries of weights and of every state tensor of the same shape."""
        for parameter, removed in self.removed:
            parameter.masked_fill_(removed, 0)
            for state in self.optimizer.state.get(parameter, {}).values():
                if isinstance(state, Tensor) and state.shape == parameter.shape:
                    state.masked_fill_(removed, 0)

    def close(self) -> None:
        """Stop enforcing."""
        self._handle.remove()

    def __enter__(self) -> MaskKeeper:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
