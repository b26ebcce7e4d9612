"""What one network of the list is, and what tests do with it before they prune it."""

import functools
import importlib.util
import math
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from secateur.core.errors import ModelError

T = TypeVar("T")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]
"""What a model is called with: positional arguments and keywords."""

BATCH = 2
CACHES = ("past_key_values", "cache_params")
"""Fields of outputs that hold what a next call reads: not results."""


@dataclass(frozen=True)
class Network:
    """A small model with seeded random weights in eval mode, and a batch of two for it."""

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]


def entry(family: str, name: str, make: Callable[[], nn.Module], inputs: Callable[[], Inputs]) -> Network:
    """A network whose weights and inputs depend on nothing but its maker."""
    return Network(name, family, lambda: seeded(make).eval(), lambda: seeded(inputs))


def seeded(make: Callable[[], T], seed: int = 0) -> T:
    """What `make` returns with the generator at `seed`; the caller's generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def use_networks() -> types.ModuleType:
    """Makes torchvision and timm importable and returns torchvision.

    They lie in a folder of their own because PyPI's torchvision is built for another PyTorch: its extension does not
    load, and all that its Python part then lacks is the two operators declared here.
    """
    if importlib.util.find_spec("torchvision") is None:
        folder = _networks_folder()
        if not (folder / "torchvision").is_dir():
            raise ModelError(f"no torchvision in {folder}; set SECATEUR_NETWORKS to a folder with torchvision and timm")
        sys.path.append(str(folder))
        _declare_operators()
    import torchvision

    return torchvision


def available(network: Network) -> bool:
    """Whether the libraries that the network is built from are here; tests skip it otherwise."""
    needed = {"torchvision": ["torchvision"], "timm": ["torchvision", "timm"], "diffusers": ["diffusers"]}
    return all(
        importlib.util.find_spec(package) is not None or (_networks_folder() / package).is_dir()
        for package in needed.get(network.family, [])
    )


def _networks_folder() -> Path:
    return Path(os.environ.get("SECATEUR_NETWORKS", Path(sys.prefix) / "networks"))


@functools.cache
def _declare_operators() -> torch.library.Library:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def images(size: int, channels: int = 3, name: str | None = None) -> Callable[[], Inputs]:
    """Square images, `[2, channels, size, size]`, as the first argument or as the keyword `name`."""
    return tensors((channels, size, size), name)


def tensors(shape: tuple[int, ...], name: str | None = None) -> Callable[[], Inputs]:
    """Normal values `[2, *shape]`, as the first argument or as the keyword `name`."""

    def make() -> Inputs:
        values = torch.randn(BATCH, *shape)
        return ((values,), {}) if name is None else ((), {name: values})

    return make


def tokens(vocabulary: int, length: int, name: str | None = None) -> Callable[[], Inputs]:
    """Token numbers `[2, length]` from 3 on, so that none is padding, a start or an end."""

    def make() -> Inputs:
        ids = torch.randint(3, vocabulary, (BATCH, length))
        return ((ids,), {}) if name is None else ((), {name: ids})

    return make


def vary(inputs: Inputs, seed: int = 1) -> Inputs:
    """Other inputs of the same kinds: new normal values, shuffled numbers; masks stay."""

    def other(value: Any, key: str = "") -> Any:
        if isinstance(value, list | tuple):
            return type(value)(other(item) for item in value)
        if isinstance(value, dict):
            return {name: other(item, name) for name, item in value.items()}
        if not isinstance(value, Tensor) or value.dtype == torch.bool or "mask" in key:
            return value
        if value.is_floating_point():
            return torch.randn_like(value)
        return value.flatten()[torch.randperm(value.numel())].view(value.shape)

    return seeded(lambda: (other(inputs[0]), other(inputs[1])), seed)


@torch.no_grad()
def warm_up(model: nn.Module, inputs: Callable[[], Inputs], runs: int = 3) -> nn.Module:
    """Gives a fresh model values under which a wrong cut shows; in place, seeded.

    Fresh models hide mistakes: zero biases, unit scales, layer scales of 1e-6, batch statistics that do nothing. So
    parameters that are (nearly) constant are drawn at random, small weights are raised to the gain that carries a
    signal through ReLUs, and layers with running statistics see `runs` varied batches in training mode. All other
    layers stay in eval mode meanwhile: dropout, dropped layers and losses have no place here.
    """
    seeded(lambda: _enliven(model))
    layers = [layer for layer in model.modules() if isinstance(layer, _NormBase) and layer.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for run in range(runs if layers else 0):
        for layer in layers:
            layer.train().momentum = 1 / (run + 1)  # the mean over the runs; nothing of the initial 0 and 1 stays
        args, kwargs = vary(inputs(), run + 1)
        model(*args, **kwargs)
    for layer, momentum in zip(layers, momenta, strict=True):
        layer.momentum = momentum
        # A channel that was silent in these few values would be blown up by every other input.
        layer.running_var.clamp_(min=0.1 * layer.running_var.mean().item())
    # LeViT and its kin keep their position biases from the last eval run until they are put into training mode.
    return model.train().eval()


def _enliven(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            _enliven_one(parameter)
    for layer in model.modules():
        if isinstance(layer, _NormBase) and layer.affine:
            layer.weight.uniform_(0.5, 1.5)  # some start around zero, which shuts every channel
        if "FrozenBatchNorm" in type(layer).__name__:
            for buffer in layer.buffers():
                _scatter(buffer)


def _enliven_one(parameter: Tensor) -> None:
    if parameter.numel() == 1:
        parameter.add_(0.5 * (parameter == 0))  # gates that start closed
        return
    fan_in = math.prod(parameter.shape[1:])
    spread = parameter.std().item()
    if fan_in > 1 and parameter.mean().abs() < 0.01:
        if spread < 1e-4:
            parameter.normal_(std=fan_in**-0.5)
        elif spread < 0.6 * fan_in**-0.5:
            parameter.mul_(math.sqrt(2 / fan_in) / spread)
    elif spread < 1e-4:
        _scatter(parameter)


def _scatter(values: Tensor) -> None:
    """Biases, which lie around zero, get a spread of 0.2; scales 0.5 to 1.5, layer scales a fifth of that."""
    mean = values.mean().abs()
    if mean > 5 * values.std(correction=0):
        values.uniform_(0.5, 1.5).mul_(1.0 if mean > 0.2 else 0.2)
    else:
        values.normal_(std=0.2)


def output_tensors(output: Any) -> list[Tensor]:
    """All float tensors of an output, in order; caches are left out."""
    return list(_float_tensors(output))


def _float_tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict):
        for key, value in output.items():
            if key not in CACHES:
                yield from _float_tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from _float_tensors(value)
