"""Masks on live parameters: zeros in weights and in every optimiser state of theirs."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError, PlanError
from secateur.core.select import count_true, places
from secateur.train.sharding import is_sharded, local, parted_like, whole


def unwrapped(model: nn.Module) -> nn.Module:
    """The module inside data-parallel and compiled wrappers: its parameter names are the plain ones."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


def plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimiser inside the wrappers of accelerate and Lightning: its hooks fire on every real step."""
    inner = getattr(optimizer, "optimizer", None)
    return plain(inner) if isinstance(inner, torch.optim.Optimizer) else optimizer


class Masks:
    """Which entries of which parameters are removed, and the hand that keeps them zero.

    One byte per weight beside the weights themselves. Parameters may be sharded over processes.

    Args:
        parameters: name -> live parameter.
        optimizer: whose state goes with them; None where there is none.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer | None = None):
        self.parameters = dict(parameters)
        self.optimizer = optimizer
        self.writes = True  # False while a resumed run is set up: weights are as they should be already
        self.removed: dict[str, Tensor] = {
            name: torch.zeros_like(local(p.detach()), dtype=torch.bool) for name, p in self.parameters.items()
        }
        self.kept = {name: p.numel() for name, p in self.parameters.items()}

    def set(self, name: str, keep: Tensor) -> None:
        """A new mask (whole, True = keep) for one parameter; what it removes is zeroed at once.

        Raises:
            PlanError: no such parameter, or another shape.
        """
        parameter = self.parameters.get(name)
        if parameter is None or parameter.shape != keep.shape:
            raise PlanError(f"the model has no parameter '{name}' of shape {list(keep.shape)} to keep masked")
        self.kept[name] = count_true(keep)
        removed = parted_like(~keep, parameter)
        gone = places(removed & ~self.removed[name])
        self.removed[name] = removed
        if self.writes:
            for tensor in (parameter.detach(), *self.states(parameter)):
                self._zero(local(tensor), gone)

    @staticmethod
    def _zero(tensor: Tensor, gone: Tensor) -> None:
        if tensor.is_contiguous():
            tensor.view(-1).index_fill_(0, gone, 0)
        else:
            tensor[torch.unravel_index(gone, tensor.shape)] = 0

    def get(self, name: str) -> Tensor:
        """One mask, whole, True = keep."""
        parameter = self.parameters[name]
        if not is_sharded(parameter):
            return ~self.removed[name]
        from torch.distributed.tensor import DTensor

        assert isinstance(parameter, DTensor)
        parted = DTensor.from_local(
            self.removed[name].to(torch.uint8),
            parameter.device_mesh,
            parameter.placements,
            shape=parameter.shape,
            stride=parameter.stride(),
        )
        return ~whole(parted).bool()

    def all(self) -> dict[str, Tensor]:
        """Every mask, whole, True = keep."""
        return {name: self.get(name) for name in self.parameters}

    def enforce(self) -> None:
        """Zero the removed entries of weights and of every state tensor of the same shape."""
        for name, parameter in self.parameters.items():
            if self.kept[name] < parameter.numel():
                # times 0 or 1: a fifth of the time of a masked fill on CPU. What is NaN stays NaN
                keep = self.removed[name].logical_not().view(torch.int8)
                for tensor in (parameter.detach(), *self.states(parameter)):
                    local(tensor).mul_(keep)

    def clean(self) -> None:
        """As `enforce`, and what was removed is +0 whatever it was before: equal masks and weights, equal bytes."""
        for name, parameter in self.parameters.items():
            for tensor in (parameter.detach(), *self.states(parameter)):
                local(tensor).masked_fill_(self.removed[name], 0)

    def states(self, parameter: nn.Parameter) -> list[Tensor]:
        """The optimiser's tensors that hold one number per weight: momentum, moments."""
        found = self.optimizer.state.get(parameter, {}) if self.optimizer is not None else {}
        return [value for value in found.values() if isinstance(value, Tensor) and value.shape == parameter.shape]

    @property
    def density(self) -> float:
        """Fraction kept over all masked parameters."""
        return sum(self.kept.values()) / max(1, sum(p.numel() for p in self.parameters.values()))

    @torch.no_grad()
    def apply_to(self, model: nn.Module) -> None:
        """Zero the removed weights of another model with the same names: an average of weights, a copy.

        Raises:
            ModelError: a parameter is missing there or has another shape.
        """
        others = dict(unwrapped(model).named_parameters())
        for name, removed in self.removed.items():
            if name not in others or local(others[name]).shape != removed.shape:
                raise ModelError(f"the other model has no parameter '{name}' of shape {list(removed.shape)}")
            local(others[name].detach()).masked_fill_(removed.to(others[name].device), 0)


def refuse_outsiders(parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """Refuse what no optimiser group holds: it would be masked but never trained.

    Raises:
        ModelError: names the parameter and says what to do.
    """
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in parameters.items():
        if not parameter.requires_grad:
            raise ModelError(f"parameter '{name}' is frozen (requires_grad=False); exclude it (exclude=['{name}'])")
        if id(parameter) not in known:
            raise ModelError(
                f"parameter '{name}' is in no group of the optimizer; add it there or exclude it (exclude=['{name}'])"
            )
