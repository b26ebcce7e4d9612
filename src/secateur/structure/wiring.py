"""Which layer reads which, in networks of convolutions, batch norm, residual sums and linear layers.

One real run on an example is watched, function by function: every tensor knows the layer that made it. So code decides
and not names, and everything else is refused by name: a network is wired right or not at all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, NoReturn

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.core.trees import tensors_in
from secateur.data.running import device_of, evaluating, logits, resized

INPUT = -1  # in place of a layer: the network's inputs


@dataclass
class Layer:
    """One convolution or linear layer.

    Attributes:
        name: qualified name of its module; its parameters are `name.weight`, `name.bias`.
        outputs: channels it makes.
        source: number of the layer whose channels it reads; -1 for the inputs.
        per_pair: weights for each pair of an output and an input channel: a kernel's, 1 for a linear layer.
        norm: name of the batch norm behind it.
        adds_to: number of the layer to whose channels its own are added; it makes no channels of its own then.
        identity: number of the layer whose channels are added to its own as they are; -1 for the inputs.
        offset: the first of its own channels to which they are added, where they are fewer.
    """

    name: str
    outputs: int
    source: int
    per_pair: int
    norm: str | None = None
    adds_to: int | None = None
    identity: int | None = None
    offset: int = 0


@dataclass
class Wiring:
    """All layers in the order in which they ran.

    Attributes:
        inputs: channels of the inputs.
        layers: source before reader.
    """

    inputs: int
    layers: list[Layer] = field(default_factory=list)

    @property
    def residual(self) -> bool:
        """Whether anything is added to anything."""
        return any(layer.adds_to is not None or layer.identity is not None for layer in self.layers)

    def width(self, number: int) -> int:
        """Channels of a layer, or of the inputs."""
        return self.inputs if number == INPUT else self.layers[number].outputs

    def depends(self, later: int, earlier: int) -> bool:
        """Whether what a layer computes passed the channels of an earlier one (a layer passes itself)."""
        while later > earlier:
            later = self.layers[later].source
        return later == earlier


@dataclass(frozen=True)
class Flow:
    """What is known of a tensor: channels of which layer, nothing but a norm since (`bare`), positions per channel.

    `offset` zero channels before them and others behind make `width` channels; None where there are no such.
    """

    layer: int
    bare: bool = False
    positions: int = 1
    offset: int = 0
    width: int | None = None


ELEMENTWISE = {
    *("relu", "relu_", "relu6", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_", "elu", "elu_", "selu", "selu_"),
    *("celu", "silu", "silu_", "gelu", "mish", "hardswish", "hardsigmoid", "sigmoid", "sigmoid_", "tanh", "tanh_"),
}
POOLING = {
    *("max_pool2d", "_max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "mean", "amax"),
}
REDUCING = {"mean", "amax"}
UNCHANGED = {"dropout", "dropout_", "dropout2d", "contiguous", "clone", "detach", "to", "float"}
RESHAPING = {"flatten", "view", "reshape", "squeeze"}
SUMS = {"add", "add_", "__add__", "__iadd__", "__radd__"}


class _Recorder(TorchFunctionMode):
    """Follows the channels through one run."""

    def __init__(self, model: nn.Module, wiring: Wiring) -> None:
        super().__init__()
        self.model, self.wiring = model, wiring
        self.names = {id(tensor): name for name, tensor in (*model.named_parameters(), *model.named_buffers())}
        self.modules = {id(module): name for name, module in model.named_modules()}
        self.running: list[str] = []
        self.flows: dict[int, tuple[Flow, Tensor]] = {}  # the tensor is held, so that its id stays its own

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = list(tensors_in((args, kwargs)))
        flows = [self.flows[id(item)][0] for item in given if id(item) in self.flows]
        names = [self.names[id(item)] for item in given if id(item) in self.names]
        before = tuple(given[0].shape) if given else ()
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if flows and any(True for _ in tensors_in(out)):
            if not isinstance(out, Tensor):
                self.refuse(name)
            self.keep(
                out,
                self.moved(name, flows, args, kwargs or {}, out) or self.after(name, flows, names, before, out),
            )
        return out

    def moved(
        self, name: str, flows: list[Flow], args: Sequence[Any], kwargs: Mapping[str, Any], out: Tensor
    ) -> Flow | None:
        """Positions left out, or channels of zeros around: shortcuts without weights (He et al. 2016, option A)."""
        if name in REDUCING and _over_channels(args, kwargs):
            self.refuse(name, "over samples or channels")
        if name not in SUMS and any(flow.width is not None for flow in flows):
            self.refuse(name, "on channels padded with zeros")
        if name == "__getitem__" and len(flows) == 1 and _picks_positions(args[1]):
            return Flow(flows[0].layer, positions=flows[0].positions)
        if name == "pad" and len(flows) == 1 and out.dim() == 4:
            values = [*args[1:], *kwargs.values()]
            sizes, rest = [*values[0]], [value for value in values[1:] if value not in ("constant", None, 0)]
            if len(sizes) == 6 and not any(sizes[:4]) and min(sizes[4:]) >= 0 and not rest:
                return Flow(flows[0].layer, positions=flows[0].positions, offset=sizes[4], width=out.shape[1])
        return None

    def keep(self, tensor: Tensor, flow: Flow) -> None:
        """Say what a tensor holds."""
        self.flows[id(tensor)] = (flow, tensor)

    def after(self, name: str, flows: list[Flow], names: list[str], before: tuple[int, ...], out: Tensor) -> Flow:
        """What a function makes of its inputs."""
        if name in ("conv2d", "linear") and len(flows) == 1 and names:
            return self.layer(name, flows[0], names, before, out)
        if name == "batch_norm" and len(flows) == 1 and names:
            return self.norm(flows[0], names)
        if name in SUMS and len(flows) == 2 and not names:
            return self.sum(flows[0], flows[1])
        if len(flows) != 1 or names or tuple(out.shape[:1]) != before[:1]:
            self.refuse(name)
        return self.passed(name, flows[0], before, tuple(out.shape))

    def passed(self, name: str, flow: Flow, before: tuple[int, ...], after: tuple[int, ...]) -> Flow:
        """A function without parameters that keeps channels apart."""
        if name in RESHAPING and len(after) == 2 and len(before) > 2 and after[1] == prod(before[1:]):
            return Flow(flow.layer, flow.bare, flow.positions * (after[1] // before[1]))
        if after[1:2] != before[1:2]:
            self.refuse(name)
        if name in UNCHANGED or name in RESHAPING:
            return flow
        if name not in ELEMENTWISE and name not in POOLING:
            self.refuse(name)
        return Flow(flow.layer, positions=flow.positions)

    # --- layers, norms and sums ---------------------------------------------------------------

    def layer(self, kind: str, flow: Flow, names: list[str], before: tuple[int, ...], out: Tensor) -> Flow:
        """A convolution or linear layer makes new channels."""
        owner = names[0].rpartition(".")[0]
        module = self.model.get_submodule(owner)
        weight = module._parameters.get("weight")
        if weight is None or names[0] != f"{owner}.weight" or {*names} - {f"{owner}.weight", f"{owner}.bias"}:
            self.refuse(kind, "with parameters that are not one module's weight and bias")
        if any(layer.name == owner for layer in self.wiring.layers):
            raise ModelError(f"'{owner}' runs twice; a network has a graph only where every layer runs once")
        kernel = weight.shape[2:]
        if kind == "conv2d" and (weight.shape[1] != before[1] or flow.positions > 1):
            self.refuse("a grouped convolution")
        if len(kernel) and (kernel[0] != kernel[1] or not kernel[0] % 2):
            self.refuse(f"a convolution with a kernel of {kernel[0]}x{kernel[1]}", "that is not square and odd")
        if kind == "linear" and len(before) != 2:
            self.refuse("a linear layer", f"on inputs of {len(before)} dimensions")
        self.wiring.layers.append(
            Layer(owner, weight.shape[0], flow.layer, kernel.numel() if len(kernel) else flow.positions)
        )
        return Flow(len(self.wiring.layers) - 1, bare=True)

    def norm(self, flow: Flow, names: list[str]) -> Flow:
        """Batch norm right behind the layer that it belongs to."""
        owner = names[0].rpartition(".")[0]
        if {name.rpartition(".")[0] for name in names} != {owner} or f"{owner}.running_mean" not in names:
            self.refuse("batch norm", "without running statistics of its own")
        if not flow.bare or flow.layer == INPUT or self.wiring.layers[flow.layer].norm is not None:
            self.refuse("batch norm", "that does not follow a layer directly")
        self.wiring.layers[flow.layer].norm = owner
        return flow

    def sum(self, one: Flow, other: Flow) -> Flow:
        """A residual sum: an earlier layer's channels are added to a later one's, through a 1x1 convolution or none."""
        ways = [(main, side) for main, side in ((one, other), (other, one)) if self.projects(main, side)]
        if len(ways) == 1:
            main, side = ways[0]
            self.refuse_more(main)
            self.wiring.layers[side.layer].adds_to = main.layer
            return Flow(main.layer)
        main, side = (one, other) if one.layer > other.layer else (other, one)
        plain = main.layer != side.layer and self.wiring.depends(main.layer, side.layer) and not ways
        if not plain or main.width or self.wiring.width(main.layer) != (side.width or self.wiring.width(side.layer)):
            self.refuse("a sum", "of other things than a layer's channels and its block's input")
        self.refuse_more(main)
        layer = self.wiring.layers[main.layer]
        layer.identity, layer.offset = side.layer, side.offset
        return Flow(main.layer)

    def projects(self, main: Flow, side: Flow) -> bool:
        """Whether `side` is a bare 1x1 convolution of channels that `main` was computed from."""
        if not side.bare or INPUT in (main.layer, side.layer) or main.layer == side.layer:
            return False
        layer, before = self.wiring.layers[side.layer], self.wiring.layers[main.layer].source
        if self.wiring.depends(before, side.layer):  # `main` reads it: it is the block's input itself
            return False
        return layer.per_pair == 1 and self.wiring.depends(before, layer.source)

    def refuse_more(self, main: Flow) -> None:
        """A layer takes one shortcut."""
        layer = self.wiring.layers[main.layer]
        if layer.identity is not None or main.layer in [other.adds_to for other in self.wiring.layers]:
            self.refuse("a sum", f"of three and more, '{layer.name}' among them")

    # --- refusing -----------------------------------------------------------------------------

    def refuse(self, what: str, why: str = "") -> NoReturn:
        """One sentence with the place.

        Raises:
            ModelError: always.
        """
        place = next((name for name in reversed(self.running) if name), type(self.model).__name__)
        behind = f", behind '{self.wiring.layers[-1].name}'" if self.wiring.layers else ""
        raise ModelError(
            f"'{place}' computes {what}{f' {why}' if why else ''}{behind}; only networks of convolutions, batch norm "
            "right behind them, residual sums, pooling and linear layers have a graph"
        )


def _over_channels(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a reduction's arguments name one of the first two dimensions."""
    first, *rest = [*args, *kwargs.values()]
    named: list[int] = []
    for value in rest:
        if isinstance(value, (tuple, list)):
            named += value
        elif isinstance(value, int) and not isinstance(value, bool):
            named.append(value)
    return any(number % first.dim() < 2 for number in named)


def _picks_positions(index: Any) -> bool:
    """Whether an index leaves samples and channels alone and takes slices of the rest."""
    whole = slice(None)
    slices = isinstance(index, tuple) and len(index) == 4 and all(isinstance(part, slice) for part in index)
    return slices and index[0] == whole and index[1] == whole


def wire(model: nn.Module, example: Batch) -> Wiring:
    """Which layer reads which.

    Args:
        model: a network of convolutions and linear layers; it is left exactly as it was.
        example: inputs; two samples are run.

    Raises:
        ModelError: the network holds something else; names the layer and what it computes. It cannot be run.
    """
    batch = resized(example, 2).to(device_of(model))
    if len(batch.args) != 1 or batch.kwargs or not isinstance(batch.args[0], Tensor) or batch.args[0].dim() < 2:
        raise ModelError(f"{type(model).__name__} must take one tensor of images and nothing else to have a graph")
    images = batch.args[0]
    wiring = Wiring(inputs=images.shape[1])
    recorder = _Recorder(model, wiring)
    recorder.keep(images, Flow(INPUT))
    handles = _watch(recorder)
    try:
        with evaluating(model), recorder:
            logits(model, batch)
    finally:
        for handle in handles:
            handle.remove()
    return wiring


def _watch(recorder: _Recorder) -> list[Any]:
    def enter(module: nn.Module, args: Any) -> None:
        recorder.running.append(recorder.modules.get(id(module), ""))

    def leave(module: nn.Module, args: Any, out: Any) -> None:
        recorder.running.pop()

    hook: Callable[..., Any] = register_module_forward_hook
    return [register_module_forward_pre_hook(enter), hook(leave, always_call=True)]
