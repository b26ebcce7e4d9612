"""Convolutions that lost filters but not their width: a light by-pass adds to the full output. Torch alone.

    y = scatter(norm(conv(x))) + norm'(bypass(x))

`conv` has the kept filters only; `scatter` puts their outputs at their places among zeros. While filters are still
being chosen, all are there and a mask stands for the scatter. The by-pass lives in the norm (`norm.bypass`), whose
output is where the branch is added; it sees what enters the convolution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Undo = Callable[[], None]
NAME = "bypass"


class Bypass(nn.Module):
    """The light branch beside a convolution.

    Args:
        conv: the convolution of full width.
        kernel: the convolution's own kernel size, or 1.
        groups: of the branch.
        kept: places of the convolution's kept filters; None while all are there.

    Attributes:
        mask: while it is a tensor `[filters]`: multiplies the norm's output in place of a cut.
    """

    def __init__(self, conv: nn.Conv2d, kernel: Sequence[int], groups: int, kept: Sequence[int] | None = None) -> None:
        super().__init__()
        padding: Any = conv.padding if tuple(kernel) == tuple(conv.kernel_size) else 0
        like: dict[str, Any] = {"dtype": conv.weight.dtype, "device": conv.weight.device}
        width, (height, across) = conv.out_channels, kernel
        stride: Any = conv.stride
        self.conv = nn.Conv2d(
            conv.in_channels, width, (height, across), stride, padding, groups=groups, bias=False, **like
        )
        self.norm = nn.BatchNorm2d(width, **like)
        self.kept = None if kept is None else list(kept)
        places = torch.tensor([] if kept is None else kept, dtype=torch.int64, device=conv.weight.device)
        self.places: Tensor
        self.register_buffer("places", places, persistent=False)
        self.mask: Tensor | None = None
        self._entered: Tensor | None = None
        self.train(conv.training)

    def note(self, conv: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook of the convolution: what enters it."""
        self._entered = args[0]

    def add(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook of the norm after it: the kept filters at their places, and the branch."""
        assert self._entered is not None  # the convolution runs before its norm
        x, self._entered = self._entered, None
        beside: Tensor = self.norm(self.conv(x))
        if self.mask is not None:
            output = output * self.mask.to(output.dtype).view(1, -1, 1, 1)
        if self.kept is None:
            return output + beside
        return beside.index_add(1, self.places.to(output.device), output.to(beside.dtype))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return "" if self.kept is None else f"kept={len(self.kept)} of {self.norm.num_features}"


def attach_bypass(model: nn.Module, addition: dict[str, Any]) -> list[Undo]:
    """Put a by-pass beside a convolution: `{"kind": "bypass", "conv", "norm", "kernel", "groups", "kept"}`.

    Without `kept` the convolution stays whole; with it, its weights come at the kept size.
    """
    conv, norm = model.get_submodule(addition["conv"]), model.get_submodule(addition["norm"])
    assert isinstance(conv, nn.Conv2d)
    bypass = Bypass(conv, addition["kernel"], addition["groups"], addition["kept"])
    norm.add_module(NAME, bypass)
    handles = [conv.register_forward_pre_hook(bypass.note), norm.register_forward_hook(bypass.add)]
    return [lambda: delattr(norm, NAME), *(handle.remove for handle in handles)]


def bypasses_in(model: nn.Module) -> list[dict[str, Any]]:
    """The by-passes that a model has, as `attach_bypass` wants them."""
    convs = {
        id(hook.__self__): name
        for name, module in model.named_modules()
        for hook in module._forward_pre_hooks.values()
        if isinstance(getattr(hook, "__self__", None), Bypass)
    }
    return [
        {
            "kind": "bypass",
            "conv": convs[id(module)],
            "norm": name.rpartition(".")[0],
            "kernel": list(module.conv.kernel_size),
            "groups": module.conv.groups,
            "kept": module.kept,
        }
        for name, module in model.named_modules()
        if isinstance(module, Bypass)
    ]
