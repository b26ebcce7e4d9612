"""What a sliced residual stream needs beside plain layers: shortcuts between bases, and norms that count the old width.

A pre-norm block computes h + f(norm(h)). When the stream h changes its basis between two additions, the
block must compute h S + f(norm(h)). `Shortcut` does that inside the plain forward code: it notes what enters
the norm and turns what is added from f into f + h S - h. Torch alone, for copies in saved folders.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Undo = Callable[[], None]
NAME = "shortcut"  # of the submodule of the module whose output is added


class RootMeanSquare(nn.Module):
    """x / sqrt(sum x^2 / width + eps), whatever number of features x has left; computed in float32 or better.

    Args:
        width: the number of features that are counted.
        eps: added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """The scaled features, in the dtype they came in."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean_square = wide.square().sum(-1, keepdim=True) / self.width
        return (wide * torch.rsqrt(mean_square + self.eps)).to(x.dtype)

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"width={self.width}, eps={self.eps:g}"


class Shortcut(nn.Module):
    """Takes a residual stream h to another basis, h S, where a block adds to it.

    With more columns than rows the stream gets wider at the end of the block: the plain addition takes the
    first columns and the others are appended to what the block returns.

    Attributes:
        weight: S, `[features in, features out]`.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self._entered: Tensor | None = None
        self._rest: Tensor | None = None

    def note(self, norm: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook of the norm: what enters it is the stream."""
        self._entered = args[0]

    def add(self, host: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook of the module whose output f is added to the stream: f + h S - h."""
        assert self._entered is not None  # the block runs its norm first
        h, self._entered = self._entered, None
        f = _first(output)
        moved = f + (h @ self.weight).reshape(f.shape)
        if moved.shape[-1] > h.shape[-1]:
            moved, self._rest = moved[..., : h.shape[-1]], moved[..., h.shape[-1] :]
        return _with_first(output, moved - h.reshape(moved.shape))

    def widen(self, block: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """Hook of the block: append the columns that the plain addition had no room for."""
        assert self._rest is not None
        rest, self._rest = self._rest, None
        after = _first(output)
        return _with_first(output, torch.cat([after, rest.reshape(*after.shape[:-1], -1)], -1))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"{self.weight.shape[0]} -> {self.weight.shape[1]}"


def _first(output: Any) -> Tensor:
    found = output[0] if isinstance(output, (tuple, list)) else output
    assert isinstance(found, Tensor)
    return found


def _with_first(output: Any, first: Tensor) -> Any:
    return type(output)((first, *output[1:])) if isinstance(output, (tuple, list)) else first


def attach_norm(model: nn.Module, addition: dict[str, Any]) -> list[Undo]:
    """Put `RootMeanSquare` in the place of a norm: `{"kind": "norm", "module", "width", "eps"}`."""
    owner, _, leaf = addition["module"].rpartition(".")
    parent, before = model.get_submodule(owner), model.get_submodule(addition["module"])
    norm = RootMeanSquare(addition["width"], addition["eps"])
    norm.training = before.training
    setattr(parent, leaf, norm)
    return [lambda: setattr(parent, leaf, before)]


def attach_shortcut(model: nn.Module, addition: dict[str, Any]) -> list[Undo]:
    """Put a shortcut in: `{"kind": "shortcut", "host", "norm", "block", "shape"}`.

    The names are those of the module whose output is added, of the norm that the stream enters, and of the block if it
    returns a wider stream (else None).
    """
    host, norm = model.get_submodule(addition["host"]), model.get_submodule(addition["norm"])
    like = next(model.get_submodule(addition["host"]).parameters())
    shortcut = Shortcut(torch.empty(addition["shape"], dtype=like.dtype, device=like.device))
    shortcut.training = host.training
    host.add_module(NAME, shortcut)
    handles = [norm.register_forward_pre_hook(shortcut.note), host.register_forward_hook(shortcut.add)]
    if addition["block"] is not None:
        handles.append(model.get_submodule(addition["block"]).register_forward_hook(shortcut.widen))
    return [lambda: delattr(host, NAME), *(handle.remove for handle in handles)]


def untie(model: nn.Module, addition: dict[str, Any]) -> list[Undo]:
    """Give a parameter values of its own: `{"kind": "untied", "parameter"}`."""
    owner, _, leaf = addition["parameter"].rpartition(".")
    module = model.get_submodule(owner)
    tied = getattr(module, leaf)
    setattr(module, leaf, nn.Parameter(tied.detach().clone(), requires_grad=tied.requires_grad))
    undo: list[Undo] = [lambda: setattr(module, leaf, tied)]
    config = getattr(model, "config", None)
    if getattr(config, "tie_word_embeddings", False):  # else loading would tie them again
        setattr(config, "tie_word_embeddings", False)  # noqa: B010  (a config of transformers has no declared fields)
        undo.append(lambda: setattr(config, "tie_word_embeddings", True))
    return undo


def shortcuts_in(model: nn.Module) -> list[dict[str, Any]]:
    """The norms and shortcuts that a model has, as `attach_norm` and `attach_shortcut` want them."""
    names = {id(module): name for name, module in model.named_modules()}
    norms: dict[int, str] = {}
    blocks: dict[int, str] = {}
    for name, module in model.named_modules():
        norms |= {id(owner): name for owner in _hooking(module._forward_pre_hooks, "note")}
        blocks |= {id(owner): name for owner in _hooking(module._forward_hooks, "widen")}
    found: list[dict[str, Any]] = [
        {"kind": "norm", "module": name, "width": module.width, "eps": module.eps}
        for name, module in model.named_modules()
        if isinstance(module, RootMeanSquare)
    ]
    for module in model.modules():
        if isinstance(module, Shortcut):
            host = names[id(module)].rpartition(".")[0]
            where = {"host": host, "norm": norms[id(module)], "block": blocks.get(id(module))}
            found.append({"kind": "shortcut", **where, "shape": list(module.weight.shape)})
    return found


def _hooking(hooks: Any, method: str) -> list[Shortcut]:
    owners = [hook.__self__ for hook in hooks.values() if getattr(hook, "__name__", "") == method]
    return [owner for owner in owners if isinstance(owner, Shortcut)]
