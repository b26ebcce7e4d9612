"""A method's own parameters, e.g. gates, that the user's optimiser trains along and that go in the end.

They are the optimiser's last group, without weight decay unless they are weights themselves: it would pull gates to
1/2. Learning rate schedulers that hold a rate for every group must be made afterwards. The optimiser's state_dict is
as if they were not there, so that it loads into an optimiser which has none yet; their own state is saved here.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn


class Extra:
    """Parameters that train along.

    Args:
        optimizer: any of torch's; gets one more group with the options of its first.
        parameters: in a fixed order.
        model: what they train along with. Their gradients go with its own: after every step, and where the model's
            were taken away (`model.zero_grad()` does not know these parameters).
        decay: decay them as the optimiser's first group decays; not at all by default.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Iterable[nn.Parameter],
        model: nn.Module,
        decay: bool = False,
    ):
        self.optimizer, self.parameters = optimizer, list(parameters)
        options = {key: value for key, value in optimizer.param_groups[0].items() if key not in ("params", "lr_scale")}
        options |= {} if decay else {"weight_decay": 0.0}
        optimizer.add_param_group(options | {"params": self.parameters})
        self.group = optimizer.param_groups[-1]
        self._hooks = [
            optimizer.register_state_dict_post_hook(self._without),
            optimizer.register_step_post_hook(lambda *_: self._clear()),
            # no method of this object: copies of the model would copy it and the optimiser
            model.register_forward_pre_hook(lambda module, args: self._follow(module)),
        ]

    def _clear(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def _follow(self, model: nn.Module) -> None:
        if torch.is_grad_enabled() and all(parameter.grad is None for parameter in model.parameters()):
            self._clear()

    def _without(self, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
        mine = next(i for i, group in enumerate(optimizer.param_groups) if group is self.group)
        gone = set(state["param_groups"][mine]["params"])
        groups = [group for i, group in enumerate(state["param_groups"]) if i != mine]
        kept = {key: value for key, value in state["state"].items() if key not in gone}
        return state | {"param_groups": groups, "state": kept}

    def average(self) -> None:
        """The same gradients on every process: data-parallel wrappers do not know these parameters."""
        if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return
        for parameter in self.parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
            parameter.grad /= dist.get_world_size()

    def leave(self) -> None:
        """The optimiser is as if they had never been there."""
        for hook in self._hooks:
            hook.remove()
        groups = self.optimizer.param_groups
        groups[:] = [group for group in groups if group is not self.group]
        for parameter in self.parameters:
            self.optimizer.state.pop(parameter, None)

    def state_dict(self) -> dict[str, Any]:
        """Values, what the optimiser knows of them, options of the group."""
        return {
            "values": [parameter.detach().clone() for parameter in self.parameters],
            "states": [copy.deepcopy(dict(self.optimizer.state.get(p, {}))) for p in self.parameters],
            "options": {key: value for key, value in self.group.items() if key != "params"},
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        for parameter, value, known in zip(self.parameters, state["values"], state["states"], strict=True):
            parameter.copy_(value)
            self.optimizer.state.pop(parameter, None)
            if known:
                self.optimizer.state[parameter] = copy.deepcopy(known)
        self.group.update(state["options"])
