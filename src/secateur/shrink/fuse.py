"""Folding batch norms into the layers that feed them: fewer layers, the same function in eval mode.

A norm in eval mode is y = scale * x + shift per channel. Where x is the output of a convolution or a
linear layer that nothing else looks at, scale goes into the weight's rows and shift into the bias
(Jacob et al. 2018, arXiv 1712.05877, section 3.2).
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.core.seeding import seeded
from secateur.data.batches import run
from secateur.data.example import example_for
from secateur.data.running import device_of, evaluating
from secateur.shrink.bypass import Bypass, reads
from secateur.shrink.cut import Undo
from secateur.shrink.verify import TOLERANCE, difference, float_tensors
from secateur.structure.layers import CONVOLUTIONS, TRANSPOSED_CONVOLUTIONS

LAYERS = (nn.Linear, *CONVOLUTIONS, *TRANSPOSED_CONVOLUTIONS)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
Layer = nn.Linear | nn.modules.conv._ConvNd
Norm = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Fused:
    """What `fuse_` did.

    Attributes:
        pairs: (layer, norm) by name, in the order of the run; the norms are identities now.
        left: norm -> why it still stands.
    """

    pairs: list[tuple[str, str]]
    left: dict[str, str]


def fuse_(model: nn.Module, example: Batch | None = None) -> Fused:
    """Fold every batch norm into the layer that alone feeds it, in place; the layers get biases.

    Args:
        model: in eval mode.
        example: inputs to watch one run on and to compare the outputs on; default: made-up ones.

    Returns:
        The pairs that were folded, and why other norms were left.

    Raises:
        ModelError: the model is in train mode, has no weights, does not run, or gives other results with the
            norms folded (code that looks into the norm); the model is as it was.
    """
    _refuse_unready(model)
    batch = example_for(model, example)
    pairs, left, before = feeding(model, batch)
    folded = []
    for pair in pairs:
        why = obstacle(model, *pair)
        if why is None:
            folded.append(pair)
        else:
            left[pair[1]] = why
    undo = [_fold(model, *pair) for pair in folded]
    try:
        gap = _gap(before, run_once(model, batch))
        if gap is not None:
            raise ModelError(f"the largest difference is {gap:.3g}")
    except BaseException as error:
        for put_back in reversed(undo):
            put_back()
        if not isinstance(error, ModelError):
            raise
        raise ModelError(
            f"with its batch norms folded, {type(model).__name__} does not give the same results ({error}), perhaps "
            "because its code uses the norms' own tensors; it is left as it was"
        ) from error
    return Fused(folded, left)


def _refuse_unready(model: nn.Module) -> None:
    if any(module.training for module in model.modules()):
        raise ModelError(
            f"{type(model).__name__} is in train mode, where batch norms follow each batch and cannot be folded; "
            "call model.eval() first"
        )
    if any(tensor.is_meta for tensor in model.parameters()):
        raise ModelError("the model's weights are on the meta device, which has no values to fold; load the weights")


def run_once(model: nn.Module, batch: Batch) -> Any:
    """The model's output in eval mode, on its own device, the same each time.

    Raises:
        ModelError: the model does not run on the batch.
    """
    try:
        with evaluating(model), seeded(0):
            return run(model, batch.to(device_of(model)))
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError) as error:
        shapes = ", ".join(str(list(tensor.shape)) for tensor in batch.tensors)
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelError(f"{type(model).__name__} cannot be run on inputs of shape {shapes}: {first_line}") from error


def _gap(before: Any, after: Any) -> float | None:
    """The largest difference between two outputs where it is above the tolerance of its dtype."""
    for a, b in zip(float_tensors(before), float_tensors(after), strict=True):
        gap = difference(a, b)
        if not gap <= TOLERANCE.get(a.dtype, 2e-5):
            return gap
    return None


# --- which norm reads which layer -----------------------------------------------------------------


@dataclass
class _Output:
    """One output of a layer, held while the run goes on so that nothing else gets its address."""

    layer: Layer
    tensor: Tensor | None
    dims: int
    norms: list[nn.Module] = field(default_factory=list)
    elsewhere: bool = False


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator that reads the output of a layer, and whether a norm is at work then."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.outputs: dict[int, _Output] = {}
        self.reading: int | None = None
        self.calls: Counter[nn.Module] = Counter()

    def made(self, layer: Layer, args: Any, out: Any) -> None:
        """A layer has returned."""
        self.calls[layer] += 1
        if isinstance(out, Tensor) and out.numel():
            self.outputs[_address(out)] = _Output(layer, out, out.dim())

    def begin(self, norm: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        """A norm is called."""
        self.calls[norm] += 1
        x = args[0] if args else next(iter(kwargs.values()), None)
        if isinstance(x, Tensor) and (found := self.outputs.get(_address(x))) and found.tensor is x:
            found.norms.append(norm)
            self.reading = _address(x)

    def end(self, norm: nn.Module, args: Any, out: Any) -> None:
        """A norm has returned; where it returned its input, the input lives on."""
        if isinstance(out, Tensor) and _address(out) == self.reading:
            self.outputs[_address(out)].elsewhere = True
        self.reading = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for item in tree_leaves((args, kwargs)):
            if isinstance(item, Tensor) and (key := _address(item)) != self.reading and key in self.outputs:
                self.outputs[key].elsewhere = True
        return func(*args, **(kwargs or {}))

    def release(self) -> None:
        """Let go of the outputs: one that is still alive is held by the model or its result."""
        alive = [(output, weakref.ref(output.tensor)) for output in self.outputs.values() if output.tensor is not None]
        for output, _ in alive:
            output.tensor = None
        gc.collect()
        for output, reference in alive:
            output.elsewhere |= reference() is not None


def _address(tensor: Tensor) -> int:
    """The same for all views of one memory."""
    return 0 if tensor.is_sparse or not tensor.numel() else tensor.untyped_storage().data_ptr()


def feeding(model: nn.Module, batch: Batch) -> tuple[list[tuple[str, str]], dict[str, str], Any]:
    """Which batch norm alone reads the output of which layer, seen in one run.

    Returns:
        (layer, norm) by name; norm -> why it is in no pair; the model's output.

    Raises:
        ModelError: the model does not run on the batch.
    """
    watch = _Watch()
    handles = []
    for module in model.modules():
        if isinstance(module, LAYERS):
            handles.append(module.register_forward_hook(watch.made))
        elif isinstance(module, NORMS):
            handles.append(module.register_forward_pre_hook(watch.begin, with_kwargs=True))
            handles.append(module.register_forward_hook(watch.end))
    try:
        with watch:
            out = run_once(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    watch.release()
    names = _names(model)
    pairs: list[tuple[str, str]] = []
    left: dict[str, str] = {}
    sources = {norm: output for output in watch.outputs.values() for norm in output.norms}
    for norm in (module for module in model.modules() if isinstance(module, NORMS)):
        source = sources.get(norm)
        why = _unpaired(norm, source, watch.calls, names)
        if why is None and source is not None:
            pairs.append((names[source.layer][0], names[norm][0]))
        else:
            left[names[norm][0]] = why or ""
    return pairs, left, out


def _names(model: nn.Module) -> dict[nn.Module, list[str]]:
    names = defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    return names


def _unpaired(
    norm: Norm, source: _Output | None, calls: Counter[nn.Module], names: dict[nn.Module, list[str]]
) -> str | None:
    """Why a norm does not alone read one layer; None if it does."""
    if norm.running_mean is None or norm.running_var is None:
        return "it has no running statistics and follows each batch"
    if source is None:
        return "its input is not the output of a convolution or linear layer" if calls[norm] else "the run skips it"
    if calls[norm] != 1 or len(names[norm]) > 1:
        return "it is used in several places"
    return _shared(source, calls, names)


def _shared(source: _Output, calls: Counter[nn.Module], names: dict[nn.Module, list[str]]) -> str | None:
    """Why an output that a norm reads is not all that its layer makes, channel by channel for the norm alone."""
    layer = names[source.layer][0]
    if calls[source.layer] != 1 or len(names[source.layer]) > 1:
        return f"'{layer}' is used in several places"
    if source.dims != source.layer.weight.dim():
        return f"the channels that '{layer}' makes are not the ones it takes"
    if source.elsewhere or len(source.norms) > 1:
        return f"the output of '{layer}' is used elsewhere too"
    return None


# --- folding --------------------------------------------------------------------------------------


def plain(module: nn.Module, kinds: tuple[type[nn.Module], ...]) -> bool:
    """Whether a module computes what torch's own class of one of the kinds does, with nothing added."""
    code = [(_method(kind, "forward"), _method(kind, "_conv_forward")) for kind in kinds]
    own = (_method(type(module), "forward"), _method(type(module), "_conv_forward"))
    return own in code and "forward" not in vars(module)


def _method(kind: type[nn.Module], name: str) -> Callable[..., Any] | None:
    return getattr(kind, name, None)


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def obstacle(model: nn.Module, layer_name: str, norm_name: str) -> str | None:
    """Why a norm that alone reads a layer cannot be folded into it; None if it can."""
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    others = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    if is_parametrized(layer) or layer._parameters.get("weight") is None:
        return f"the weight of '{layer_name}' is computed from other parameters"
    if _hooked(layer) or _hooked(norm):
        return f"there are hooks on '{layer_name if _hooked(layer) else norm_name}'"
    for name, module, kinds in ((layer_name, layer, LAYERS), (norm_name, norm, NORMS)):
        if not plain(module, kinds):
            return f"'{name}' is a {type(module).__name__}, which does more than torch's layer of that kind"
    if any(others[id(parameter)] > 1 for parameter in layer.parameters()):
        return f"'{layer_name}' shares its parameters with another layer"
    return None


def _fold(model: nn.Module, layer_name: str, norm_name: str) -> Undo:
    layer, norm = model.get_submodule(layer_name), model.get_submodule(norm_name)
    assert isinstance(layer, Layer)
    assert isinstance(norm, Norm)
    owner_name, _, leaf = norm_name.rpartition(".")
    owner = model.get_submodule(owner_name)
    bias = layer.bias
    values = [(tensor, tensor.detach().clone()) for tensor in (layer.weight, bias) if tensor is not None]
    new_weight, new_bias = folded(layer, norm)
    with torch.no_grad():
        layer.weight.copy_(new_weight)
        if bias is None:
            layer.bias = nn.Parameter(new_bias.to(layer.weight), requires_grad=layer.weight.requires_grad)
        else:
            bias.copy_(new_bias)
    setattr(owner, leaf, nn.Identity().eval())

    def undo() -> None:
        with torch.no_grad():
            for tensor, before in values:
                tensor.copy_(before)
        layer.bias = bias
        setattr(owner, leaf, norm)

    return undo


def folded(layer: Layer, norm: Norm) -> tuple[Tensor, Tensor]:
    """The layer's weight and bias with the norm's scale and shift in them, float64 on the CPU."""
    weight, mean, variance = _precise(layer.weight), _precise(norm.running_mean), _precise(norm.running_var)
    assert weight is not None
    assert mean is not None
    assert variance is not None
    gamma, beta, bias = _precise(norm.weight), _precise(norm.bias), _precise(layer.bias)
    scale = (variance + norm.eps).rsqrt() * (1 if gamma is None else gamma)
    shift = (0 if bias is None else bias * scale) - mean * scale + (0 if beta is None else beta)
    if isinstance(layer, TRANSPOSED_CONVOLUTIONS):  # [in, out / groups, *kernel], inputs sorted by group
        groups = weight.view(layer.groups, -1, *weight.shape[1:])
        return (groups * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1), shift
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift


def _precise(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach().to("cpu", torch.float64)


def merged(conv: nn.Module, norm: nn.Module, bypass: Bypass) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a convolution and its norm with a by-pass in them: the same function in eval mode.

    The filters get the norms' scales; the norm's statistics become those of their outputs, taking what the two branches
    make as uncorrelated, so that a training that goes on finds it about right.

    Args:
        conv: `nn.Conv2d` with all its filters.
        norm: the batch norm that reads it, with running statistics.
        bypass: beside them, of full width.

    Returns:
        Tensors of the convolution and of the norm by name, float64 on the CPU.
    """
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.modules.batchnorm._BatchNorm)
    filters, shift = folded(conv, norm)
    rows, own, moments = _branch(bypass)
    places = reads(conv, bypass.groups)
    top, left = ((a - b) // 2 for a, b in zip(conv.kernel_size, rows.shape[2:], strict=True))
    filters[torch.arange(len(rows))[:, None], places, top : top + rows.shape[2], left : left + rows.shape[3]] += rows
    mean, variance = (a + b for a, b in zip(_moments(norm, shift), moments, strict=True))
    shift = shift + own
    changed = {"weight": filters, "bias": torch.zeros_like(shift)}
    if norm.weight is None:  # nothing to scale and shift with: statistics that leave the values and add the shift
        return changed, {"running_mean": -shift, "running_var": torch.full_like(shift, 1 - norm.eps)}
    scale = (variance + norm.eps).sqrt()
    return changed, {"running_mean": mean, "running_var": variance, "weight": scale, "bias": shift + mean}


def _branch(bypass: Bypass) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Filters and shift of a by-pass with its norm in them, mean and variance of what the filters make."""
    conv, norm = bypass.conv, bypass.norm
    if isinstance(norm, nn.modules.batchnorm._BatchNorm):
        rows, shift = folded(conv, norm)
        return rows, shift, _moments(norm, shift)
    bias = _precise(conv.bias)
    assert bias is not None
    # without a norm, statistics are not known
    return conv.weight.detach().double().cpu(), bias, (torch.zeros_like(bias), torch.zeros_like(bias))


def _moments(norm: Norm, shift: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of what a layer makes that has its norm's scale in it, without `shift`."""
    variance, gamma, beta = _precise(norm.running_var), _precise(norm.weight), _precise(norm.bias)
    assert variance is not None
    spread = variance / (variance + norm.eps) * (1 if gamma is None else gamma**2)
    return (0 if beta is None else beta) - shift, spread
