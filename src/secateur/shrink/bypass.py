"""Convolutions that lost filters but not their width: a light by-pass adds to the full output. Torch alone.

    y = scatter(norm(conv(x))) + norm'(bypass(x))

`conv` has the kept filters only; `scatter` puts their outputs at their places among zeros. While filters are still
being chosen, all are there and a mask stands for the scatter. The by-pass lives in the norm (`norm.bypass`), whose
output is where the branch is added; it sees what enters the convolution.

A merged by-pass is part of the kept filters' weights and runs for the other places only; nothing is added up:

    y = at their places(norm(conv(x)), norm'(bypass(x)))
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

    conv: nn.Conv2d
    norm: nn.Module
    places: Tensor | None

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
        self.width, self.groups, self._given = conv.out_channels, groups, list(kept or ())
        self.conv, self.norm = self.layers(conv, norm, tuple(kernel), normed)
        self.keep("places", kept, conv.weight.device)
        self.mask: Callable[[nn.Module, nn.Module], Tensor] | None = None
        self._entered: tuple[nn.Module, Tensor] | None = None
        self.train(conv.training)

    @property
    def kept(self) -> list[int] | None:
        """Places of the filters that are there now, perhaps fewer than at first; None while all are there."""
        return None if self.places is None else self.places.tolist()

    def sizes(self, conv: nn.Conv2d) -> tuple[int, int, int]:
        """Inputs, filters and groups of the branch's convolution."""
        return conv.in_channels, self.width, self.groups

    def layers(
        self, conv: nn.Conv2d, norm: nn.BatchNorm2d, kernel: tuple[int, ...], normed: bool
    ) -> tuple[nn.Conv2d, nn.Module]:
        """The branch's convolution, with the geometry of the one it stands beside, and its norm."""
        like: dict[str, Any] = {"dtype": conv.weight.dtype, "device": conv.weight.device}
        inputs, filters, groups = self.sizes(conv)
        geometry: dict[str, Any] = {"stride": conv.stride, "padding": 0}
        if kernel == tuple(conv.kernel_size):
            geometry |= {"padding": conv.padding, "dilation": conv.dilation, "padding_mode": conv.padding_mode}
        # values come later, and torch's global generator is not touched on the way
        light = skip_init(  # type: ignore[no-untyped-call]
            nn.Conv2d, inputs, filters, kernel, groups=groups, bias=not normed, **geometry, **like
        )
        for parameter in light.parameters():
            nn.init.zeros_(parameter)
        return light, nn.BatchNorm2d(filters, norm.eps, norm.momentum, **like) if normed else nn.Identity()

    def keep(self, name: str, places: Sequence[int] | None, device: torch.device) -> None:
        """Places in the state dict: loaders that build on the meta device fill nothing else."""
        found = None if places is None else torch.tensor(list(places), dtype=torch.int64, device=device)
        self.register_buffer(name, found)

    def note(self, conv: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Pre-hook of the convolution: what enters it."""
        self._entered = conv, (args or tuple(kwargs.values()))[0]

    def entered(self, norm: nn.Module) -> tuple[nn.Module, Tensor]:
        """The convolution and what it read; the branch follows the norm's mode, also where it only hangs beside."""
        assert self._entered is not None  # the convolution runs before its norm
        found, self._entered = self._entered, None
        if self.training != norm.training:
            self.train(norm.training)
        return found

    def add(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook of the norm after it: the kept filters at their places, and the branch."""
        conv, x = self.entered(norm)
        beside: Tensor = self.norm(self.conv(x))
        if self.mask is not None:
            output = output * self.mask(conv, norm).to(output.dtype).view(1, -1, 1, 1)
        if self.places is None:
            return output + beside
        return beside.index_add(1, self.places, output.to(beside.dtype))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return "" if self.places is None else f"kept={len(self.places)} of {self.width}"


class MergedBypass(Bypass):
    """The branch where the kept filters have it in their weights: filters for the other places, each on its own.

    Args:
        kept: not all and not none of the places; the rest as for `Bypass`.
    """

    entering: Tensor

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, *args: Any, **more: Any) -> None:
        super().__init__(conv, norm, *args, **more)
        made = [*self._given, *self.rest]
        self.keep("places", sorted(range(self.width), key=made.__getitem__), conv.weight.device)
        self.keep("entering", reads(conv, self.groups)[self.rest].flatten().tolist(), conv.weight.device)

    @property
    def kept(self) -> list[int]:
        """Places of the filters; none of them can be cut later."""
        return self._given

    @property
    def rest(self) -> list[int]:
        """The places that have no filter."""
        return sorted(set(range(self.width)) - set(self._given))

    def extra_repr(self) -> str:
        """Shown by `print(model)`."""
        return f"merged into {len(self._given)} of {self.width}"

    def sizes(self, conv: nn.Conv2d) -> tuple[int, int, int]:
        """As many groups as filters, so that any of them may be missing."""
        filters = len(self.rest)
        return filters * (conv.in_channels // self.groups), filters, filters

    def add(self, norm: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Hook of the norm: kept filters and branch, each at its places."""
        assert self.places is not None
        _, x = self.entered(norm)
        beside: Tensor = self.norm(self.conv(x.index_select(1, self.entering)))
        return torch.cat([output, beside.to(output.dtype)], 1).index_select(1, self.places)


def reads(conv: nn.Conv2d, groups: int) -> Tensor:
    """What each filter of a grouped branch beside a convolution reads: input channels `[filters, inputs / groups]`."""
    per_group, inputs = conv.out_channels // groups, conv.in_channels // groups
    first = torch.arange(conv.out_channels, device="cpu") // per_group * inputs  # values, even where meta is default
    return first[:, None] + torch.arange(inputs, device="cpu")


def hang(conv: nn.Module, norm: nn.Module, bypass: Bypass) -> list[Undo]:
    """Let a branch act, without being a part of the model."""
    handles = [
        conv.register_forward_pre_hook(bypass.note, with_kwargs=True),
        norm.register_forward_hook(bypass.add),
    ]
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
    return conv, norm, (MergedBypass if addition["merged"] else Bypass)(conv, norm, **own)


def attach_bypass(model: nn.Module, addition: dict[str, Any]) -> list[Undo]:
    """Put a by-pass beside a convolution.

    Args:
        model: changed in place.
        addition: `{"kind": "bypass", "conv", "norm", "kernel", "groups", "normed", "kept", "merged"}`. With `kept`
            None the convolution stays whole; with places, its weights come at the kept size.
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
            "groups": module.groups,
            "normed": isinstance(module.norm, nn.BatchNorm2d),
            "kept": module.kept,
            "merged": isinstance(module, MergedBypass),
        }
        for name, module in model.named_modules()
        if isinstance(module, Bypass)
    ]
