"""How many neurons a network leaves at zero: dead for every input, and dead for the input at hand.

A neuron is one element of a rectifier's output for one sample: of a convolution one position of one channel. Outputs
are counted right after each rectifier, before pooling and residual sums, with the model in eval mode. Neurons
whose incoming weights are all pruned are counted too: they are statically dead unless their bias keeps them on.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.core.errors import DataError, ModelError
from secateur.core.method import Batch
from secateur.data.batches import forward
from secateur.data.running import device_of, evaluating

# every way to write a rectifier; the ones with an underscore work in place and return their input
RECTIFIERS: frozenset[Callable[..., Any]] = frozenset(
    {F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.relu6}
)
SMOOTH: frozenset[Callable[..., Any]] = frozenset(
    {F.gelu, F.silu, F.elu, F.elu_, F.mish, F.softplus, F.leaky_relu, F.leaky_relu_, F.selu, F.celu}
)


@dataclass(frozen=True)
class ZeroRate:
    """Zero neurons after one rectifier, as fractions of its neurons.

    Attributes:
        neurons: per sample.
        static: zero for every sample.
        dynamic: zero for a sample but not for all, averaged over the samples.
    """

    neurons: int
    static: float
    dynamic: float

    @property
    def total(self) -> float:
        """Zero for a sample, averaged over the samples: static + dynamic."""
        return self.static + self.dynamic

    def to_json(self) -> dict[str, float]:
        """Plain data."""
        return {"neurons": self.neurons, "static": self.static, "dynamic": self.dynamic, "total": self.total}


def zero_rates(model: nn.Module, batches: Iterable[Batch], surrogate: bool = False) -> dict[str, ZeroRate]:
    """Zero rates after every rectifier, in the order in which they are first called.

    Args:
        model: left as it was.
        batches: inputs; every sample counts the same.
        surrogate: count outputs of GELU, SiLU and their like that are not above zero as well; they are
            hardly ever exactly zero.

    Returns:
        Name of the module that calls the rectifier -> rates; `#2` for its second call and so on.

    Raises:
        ModelError: no rectifier is called.
        DataError: no samples, or an output whose neurons differ between batches.
    """
    counter = _Counter(SMOOTH if surrogate else frozenset())
    samples = 0
    with evaluating(model), _named(model, counter.path), counter:
        for batch in batches:
            counter.start(batch.samples)
            forward(model, batch.to(device_of(model)))
            samples += batch.samples
    if not samples:
        raise DataError("zero rates need at least one sample")
    if not counter.zeros:
        raise ModelError(_none(model, counter.smooth))
    return {name: _rate(zeros, samples) for name, zeros in counter.zeros.items()}


def overall(rates: Mapping[str, ZeroRate]) -> ZeroRate:
    """All rectifiers together, every neuron weighing the same."""
    neurons = sum(rate.neurons for rate in rates.values())

    def mean(values: Iterable[tuple[int, float]]) -> float:
        return sum(count * value for count, value in values) / neurons

    return ZeroRate(
        neurons,
        mean((rate.neurons, rate.static) for rate in rates.values()),
        mean((rate.neurons, rate.dynamic) for rate in rates.values()),
    )


def _rate(zeros: Tensor, samples: int) -> ZeroRate:
    static = float((zeros == samples).double().mean())
    return ZeroRate(zeros.numel(), static, float(zeros.double().mean()) / samples - static)


def _none(model: nn.Module, smooth: bool) -> str:
    if not smooth:
        return f"{type(model).__name__} calls no ReLU, so there are no neurons at zero to count"
    return (
        f"{type(model).__name__} calls no ReLU, and GELU, SiLU and their like give no exact zeros; "
        "give surrogate=True to count their outputs that are not above zero"
    )


class _Counter(TorchFunctionMode):
    """Sees every function call and counts zeros in what rectifiers return."""

    def __init__(self, surrogates: frozenset[Callable[..., Any]]):
        super().__init__()
        self.surrogates = surrogates
        self.path: list[str] = [""]  # modules whose forward is running, outermost first
        self.zeros: dict[str, Tensor] = {}  # rectifier -> how often each neuron was zero
        self.smooth = False
        self._calls: dict[str, int] = {}
        self._samples = 0

    def start(self, samples: int) -> None:
        """A new batch."""
        self._calls, self._samples = {}, samples

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        self.smooth |= func in SMOOTH
        if func in RECTIFIERS:
            self._count(output == 0)
        elif func in self.surrogates:
            self._count(output <= 0)
        return output

    def _count(self, dead: Tensor) -> None:
        place = self.path[-1] or "model"
        self._calls[place] = self._calls.get(place, 0) + 1
        name = place if self._calls[place] == 1 else f"{place}#{self._calls[place]}"
        if len(dead) % self._samples:
            raise DataError(
                f"rectifier '{name}' returns {list(dead.shape)} for {self._samples} samples; batch them first"
            )
        found = dead.reshape(self._samples, -1).sum(0)  # tokens of a sample are neurons of their own
        if name in self.zeros and self.zeros[name].shape != found.shape:
            raise DataError(
                f"rectifier '{name}' has another number of neurons in another batch; give samples of one size"
            )
        self.zeros[name] = found + self.zeros.get(name, 0)


@contextlib.contextmanager
def _named(model: nn.Module, path: list[str]) -> Iterator[None]:
    """Keep the names of the modules that are running on a stack."""

    def enter(name: str) -> Callable[..., None]:
        return lambda module, args: path.append(name)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        path.pop()

    handles: list[Any] = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(name)))
        handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
