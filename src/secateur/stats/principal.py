"""Principal axes of a stream of states, and states confined to some of them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.distributed import total
from secateur.stats.catching import Call

DAMPING = 0.01  # of the mean diagonal
Project = Callable[[Tensor], Tensor]


def centred(x: Tensor) -> Tensor:
    """States without the mean of its features."""
    return x - x.mean(-1, keepdim=True)


@dataclass
class Scatter:
    """Sum of x^T x over tokens, `[features, features]`, in float64.

    Attributes:
        centre: subtract every token's mean feature first, as a layer norm does.
        matrix: the sum so far.
    """

    width: int
    centre: bool = False
    matrix: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.matrix = torch.zeros(self.width, self.width, dtype=torch.float64)

    def add(self, states: Tensor, real: Tensor | None = None) -> None:
        """Take in states `[..., features]`; only where `real` `[...]` is not 0, which leaves padding out."""
        x = states.reshape(-1, self.width).double()
        if real is not None:
            x = x[real.reshape(-1).to(x.device) != 0]
        x = centred(x) if self.centre else x
        self.matrix = self.matrix.to(x.device) + x.T @ x

    def axes(self) -> Axes:
        """The principal axes over the data of all processes."""
        return principal_axes(total(self.matrix), self.centre)


@dataclass(frozen=True)
class Axes:
    """An orthogonal basis, the most important direction first.

    Attributes:
        basis: `[features, axes]`, float64.
        energy: the sum of squares along each axis, `[axes]`.
    """

    basis: Tensor
    energy: Tensor

    def share(self, width: int) -> float:
        """How much of the sum of squares the first axes hold."""
        return float(self.energy[:width].sum() / self.energy.sum().clamp_min(torch.finfo(torch.float64).tiny))


def principal_axes(scatter: Tensor, centre: bool = False) -> Axes:
    """Eigenvectors of a damped scatter matrix by falling eigenvalue.

    A hundredth of the mean diagonal is added to the diagonal. Of centred states it is added within the
    centred space only, so that the constant direction, which they have nothing of, is always the last axis.

    Args:
        scatter: float64 `[features, features]`.
        centre: whether it is of centred states.
    """
    identity = torch.eye(len(scatter), dtype=scatter.dtype, device=scatter.device)
    space = centred(identity) if centre else identity
    _, vectors = torch.linalg.eigh(scatter + DAMPING * scatter.diagonal().mean() * space)
    basis = vectors.flip(1)
    return Axes(basis, (basis * (scatter @ basis)).sum(0))


def random_axes(width: int, rng: torch.Generator, centre: bool = False) -> Axes:
    """Axes that know nothing of the data, uniform among all bases; the constant direction last if centred."""
    scatter = Scatter(width, centre)
    scatter.add(torch.randn(2 * width, width, generator=rng, dtype=torch.float64))
    return scatter.axes()


def projection(basis: Tensor, centre: bool) -> Project:
    """A function: x -> its part in the space that the columns of `basis` span, in x's dtype."""

    def project(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = centred(wide) if centre else wide
        own = basis.to(wide.device, wide.dtype)
        return ((wide @ own) @ own.T).to(x.dtype)

    return project


@contextlib.contextmanager
def entering(module: nn.Module, project: Project) -> Iterator[None]:
    """The hidden state that enters a module is projected inside the block."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        call = Call.of(args, kwargs)
        assert call is not None
        call = call.with_hidden(project(call.hidden))
        return call.args, call.kwargs

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def between(norm: nn.Module, host: nn.Module, project: Project) -> Iterator[None]:
    """The stream that enters `norm` is projected after `host`'s output has been added to it."""
    stream: list[Tensor] = []

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        stream[:] = [args[0]]

    def move(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        f = output[0] if isinstance(output, (tuple, list)) else output
        h = stream[0].reshape(f.shape)
        moved = project(h + f) - h
        return type(output)((moved, *output[1:])) if isinstance(output, (tuple, list)) else moved

    handles = [norm.register_forward_pre_hook(note), host.register_forward_hook(move)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
