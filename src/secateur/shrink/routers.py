"""Routers whose probabilities are mapped to fewer experts. Torch alone, for copies in saved folders.

Tokens x are scored by the old gate over all n experts: p = softmax(W x). The kept n' experts get p' = p R^T,
and what follows (top-k, division by the sum) sees softmax(log p') in place of p.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Undo = Callable[[], None]
LEAST = 1e-30  # probabilities at or below 0 have no logarithm; this is never among the best


class MappedRouter(nn.Module):
    """A gate over n experts that chooses among n' of them.

    Args:
        gate: a linear layer, or a router with `weight` `[n, features]` that takes the softmax itself. Its
            parameters become this module's, under the same names.
        kept: n'.
        chosen: how many experts a token takes.

    Attributes:
        map: R, `[n', n]`; may be negative.
        lowest: while a float: the smallest probability that any token's last expert had since it was set. At or
            below 0 a token has too few experts, and shares may change sign.
    """

    def __init__(self, gate: nn.Module, kept: int, chosen: int) -> None:
        super().__init__()
        assert isinstance(gate.weight, Tensor)
        self.weight, self.bias = gate.weight, getattr(gate, "bias", None)
        count, width = gate.weight.shape
        self.kept, self.chosen = kept, chosen
        self.map = nn.Parameter(torch.eye(kept, count, device=gate.weight.device), requires_grad=False)
        self.lowest: float | None = None
        self.rest = None if isinstance(gate, nn.Linear) else _without_scores(gate, kept, count, width)
        self.train(gate.training)

    def forward(self, x: Tensor) -> Any:
        """What the gate returned, with n' experts."""
        scores = F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))
        shares = scores.float().softmax(-1) @ self.map.float().t()
        if self.lowest is not None:
            last = shares.topk(self.chosen, -1)[0][..., -1]
            self.lowest = min(self.lowest, float(last.min())) if last.numel() else self.lowest
        logits = shares.clamp_min(LEAST).log()
        if self.rest is None:
            return logits.to(scores.dtype)
        self.rest.weight = torch.eye(self.kept, device=logits.device)  # no buffer: loaders would leave it empty
        out = self.rest(logits.reshape(-1, self.kept))
        first, *others = out  # logits stay in float32
        return (first, *(item.to(scores.dtype) if item.is_floating_point() else item for item in others))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.map.shape[1]} -> {self.map.shape[0]} experts, {self.chosen} for a token"


def _without_scores(gate: nn.Module, kept: int, count: int, width: int) -> nn.Module:
    """A router's own code after its linear layer: it is given logits, and its weight is the identity."""
    rest = copy.copy(gate)
    rest._parameters, rest._buffers, rest._non_persistent_buffers_set = {}, {}, set()
    rest.weight = torch.eye(kept)  # libraries that initialise modules by class look for it
    for name, value in list(vars(rest).items()):
        if type(value) is int and value in (count, width) and name not in ("top_k", "num_experts_per_tok"):
            setattr(rest, name, kept)
    return rest


def attach_experts(model: nn.Module, addition: dict[str, Any]) -> list[Undo]:
    """Give a layer fewer experts and a mapped router, in place; their values are still to come.

    Args:
        model: the plain model.
        addition: `{"kind": "experts", "gate", "members", "kept", "chosen", "mapped", "attributes"}`: the router's
            name; the list of expert modules or ""; n' and k; whether the router is mapped; `[module, attribute,
            value]` of integers that follow.

    Returns:
        What puts everything back.
    """
    undo: list[Undo] = []
    if addition["members"]:
        members = model.get_submodule(addition["members"])
        assert isinstance(members, nn.ModuleList)
        undo.append(_put(model, addition["members"], nn.ModuleList(map(copy.deepcopy, members[: addition["kept"]]))))
    for name, attribute, value in addition["attributes"]:
        undo.append(_set(model.get_submodule(name), attribute, value))
    if addition["mapped"]:
        gate = model.get_submodule(addition["gate"])
        undo.append(_put(model, addition["gate"], MappedRouter(gate, addition["kept"], addition["chosen"])))
    return undo


def _set(owner: Any, name: str, value: Any) -> Undo:
    before = getattr(owner, name)
    setattr(owner, name, value)
    return lambda: setattr(owner, name, before)


def _put(model: nn.Module, name: str, module: nn.Module) -> Undo:
    owner, _, leaf = name.rpartition(".")
    return _set(model.get_submodule(owner), leaf, module)


def routers_in(model: nn.Module) -> list[dict[str, Any]]:
    """The mapped routers that a model has, as `attach_experts` wants them; their experts are gone already."""
    return [
        {
            "kind": "experts",
            "gate": name,
            "members": "",
            "kept": module.kept,
            "chosen": module.chosen,
            "mapped": True,
            "attributes": [],
        }
        for name, module in model.named_modules()
        if isinstance(module, MappedRouter)
    ]
