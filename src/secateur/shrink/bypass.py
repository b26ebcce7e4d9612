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
from torch.nn.utils import skip_init

Undo = Callable[[], None]
NAME = "bypass"


class Bypass(nn.Module):
    """The light branch beside a convolution and its norm; its own convolution is zero until it gets values.

    Args:
        conv: the convolution of full width.
        norm: the batch norm that reads it.
        kernel: the convolution's own kernel size, or 1 x 1, which fits where the padding keeps the size.
        groups: of the branch.
        normed: whether the branch has a batch norm of its own; a bias otherwise.
        kept: places of the convolution's kept filters; None while all are there.

    Attributes:
        mask: in place of a cut: called with the convolution and the norm, gives what multiplies each channel of the
            norm's output, `[filters]`.
    """

    def __init__(
        self,
        conv: nn.Conv2d,
        norm: nn.BatchNorm2d,
        kernel: Sequence[int],
        groups: int,
        *,
        normed: bool = True,
        kept: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        like: dict[str, Any] = {"dtype": conv.weight.dtype, "device": conv.weight.device}
        width = conv.out_channels
        geometry: dict[str, Any] = {"stride": conv.stride, "padding": 0}
        if tuple(kernel) == tuple(conv.kernel_size):
            geometry |= {"padding": conv.padding, "dilation": conv.dilation, "padding_mode": conv.padding_mode}
        # values come later, and torch's global generator is not touched on the way
        self.conv = skip_init(  # type: ignore[no-untyped-call]
            nn.Conv2d, conv.in_channels, width, tuple(kernel), groups=groups, bias=not normed, **geometry, **like
        )
        for parameter in self.conv.parameters():
            nn.init.zeros_(parameter)
        self.norm: nn.Module = nn.Identity()
        if normed:
            self.norm = nn.BatchNorm2d(width, norm.eps, norm.momentum, **like)
        # in the state dict: loaders that build on the meta device fill nothing else
        self.places: Tensor | None
        places = None if kept is None else torch.tensor(list(kept), dtype=torch.int64, device=conv.weight.device)
        self.register_buffer("places", places)
        self.kept = None if kept is None else list(kept)
        self.mask: Callable[[nn.Module, nn.Module], Tensor] | None = None
        self._entered: tuple[nn.Module, Tensor] | None = None
        self.train(conv.training)

    def note(self, conv: nn.Module, args: tuple[Any, ...]) -> None:
        """Pre-hook of the convolution: what enters it."""
        self._entered = conv, args[0]

    def add(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook of the norm after it: the kept filters at their places, and the branch."""
        assert self._entered is not None  # the convolution runs before its norm
        (conv, x), self._entered = self._entered, None
        if self.training != norm.training:
            self.train(norm.training)  # a branch that only hangs beside the model does not follow its mode
        beside: Tensor = self.norm(self.conv(x))
        if self.mask is not None:
            output = output * self.mask(conv, norm).to(output.dtype).view(1, -1, 1, 1)
        if self.places is None:
            return output + beside
        return beside.index_add(1, self.places, output.to(beside.dtype))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return "" if self.kept is None else f"kept={len(self.kept)} of {self.conv.out_channels}"


def hang(conv: nn.Module, norm: nn.Module, bypass: Bypass) -> list[Undo]:
    """Let a branch act, without being a part of the model."""
    handles = [conv.register_forward_pre_hook(bypass.note), norm.register_forward_hook(bypass.add)]
    return [handle.remove for handle in handles]


def make_bypass(model: nn.Module, addition: dict[str, Any]) -> tuple[nn.Conv2d, nn.BatchNorm2d, Bypass]:
    """The convolution and the norm that an addition names, and the branch between them, not yet attached.

    Raises:
        AttributeError: the model has no module of such a name, or it is of another kind.
    """
    conv, norm = model.get_submodule(addition["conv"]), model.get_submodule(addition["norm"])
    for name, module, kind in ((addition["conv"], conv, nn.Conv2d), (addition["norm"], norm, nn.BatchNorm2d)):
        if not isinstance(module, kind):
            raise AttributeError(f"'{name}' is a {type(module).__name__}, a by-pass stands beside a {kind.__name__}")
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    own = {name: addition[name] for name in ("kernel", "groups", "normed", "kept")}
    return conv, norm, Bypass(conv, norm, **own)


def attach_bypass(model: nn.Module, addition: dict[str, Any]) -> list[Undo]:
    """Put a by-pass beside a convolution: `{"kind": "bypass", "conv", "norm", "kernel", "groups", "normed", "kept"}`.

    With `kept` None the convolution stays whole; with places, its weights come at the kept size.
    """
    conv, norm, bypass = make_bypass(model, addition)
    norm.add_module(NAME, bypass)
    return [lambda: delattr(norm, NAME), *hang(conv, norm, bypass)]


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
            "normed": isinstance(module.norm, nn.BatchNorm2d),
            "kept": module.kept,
        }
        for name, module in model.named_modules()
        if isinstance(module, Bypass)
    ]
