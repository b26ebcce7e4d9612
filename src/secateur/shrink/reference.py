"""What a cut must give: the dense model, run with removed units silenced at every step.

An independent way to the same numbers: no tensor changes its shape and no weight changes its value.
After every function the removed units of its result are set to zero, and functions that count units
(means, normalisations, softmax) see the kept ones only. So the masked model that `shrink` is compared
with is defined as: removed units are zero wherever they are added up, and are not counted where units
are counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.data.batches import run
from secateur.data.running import device_of, evaluating
from secateur.shrink.cut import structured
from secateur.structure.analysis import Structure
from secateur.structure.dims import Axis, Concat, Dim, axes, resolve, size

Keep = Tensor  # bool over the indices of one dimension


def keep_of(dim: Dim, masks: Mapping[Axis, Tensor]) -> Keep:
    """Which indices of a dimension stay."""
    dim = resolve(dim)
    if isinstance(dim, int):
        return torch.ones(dim, dtype=torch.bool)
    if isinstance(dim, Axis):
        return masks.get(dim, torch.ones(dim.size, dtype=torch.bool))
    parts = [keep_of(part, masks) for part in dim.parts]
    if isinstance(dim, Concat):
        return torch.cat(parts)
    found = parts[0]
    for part in parts[1:]:
        found = (found[:, None] & part).reshape(-1)
    return found


def reference(model: nn.Module, plan: Plan, structure: Structure, batch: Batch) -> Any:
    """The output of the masked model on a batch of the size that the structure was found with.

    Raises:
        ModelError: the run takes another way than the observed one, or counts units in a function that
            has no masked form here; names it.
    """
    masks = {structure.axes[name]: plan.masks[name] for name in structured(plan) if not bool(plan.masks[name].all())}
    batch = batch.to(device_of(model))
    with evaluating(model), _Masked(model, structure, masks):
        return run(model, batch)


class _Masked(TorchFunctionMode):
    def __init__(self, model: nn.Module, structure: Structure, masks: Mapping[Axis, Tensor]) -> None:
        super().__init__()
        self.found = structure.observation
        self.masks = masks
        self.raw = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers()) if t.numel()}
        names = {id(t): n for n, t in (*model.named_parameters(), *model.named_buffers())}
        self.dims = {key: structure.observation.tensors.get(name) for key, name in names.items()}
        self.call = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        call = self.call + 1
        name = getattr(func, "__name__", "function")
        entries = [entry for entry in self.found.statistics.get(call, ()) if entry.function == name]
        counted = [entry for entry in entries if self._touched(entry.dims)]
        if counted:
            out = self._counting(func, args, kwargs, counted[0], call)
        else:
            if name in PRODUCTS:
                args = [self._silent_parameter(item) for item in args]
            out = func(*args, **kwargs)
        if not _holds_tensors(out):
            return out
        self.call = call
        if call not in self.found.results:
            return out
        if self._is_raw(out) and not _in_place(func):  # a view of a parameter, or itself as `weight.float()` returns it
            return self._silenced(func, _copied(out), self.found.results[call])
        if _shared(out, (*args, *kwargs.values())) is None:
            return self._silenced(func, out, self.found.results[call])
        return out  # a view of what is silent already

    def _is_raw(self, out: Any) -> bool:
        first = out[0] if isinstance(out, (list, tuple)) and out else out
        return isinstance(first, Tensor) and first.untyped_storage().data_ptr() in self.raw

    def _silent_parameter(self, item: Any) -> Any:
        """Parameters that are multiplied with each other lose their removed units first."""
        dims = self.dims.get(id(item)) if isinstance(item, Tensor) else None
        if dims is None or not self._touched(dims):
            return item
        return _scattered(_gathered(item, self._keeps(dims)), item.shape, self._keeps(dims))

    def _touched(self, dims: tuple[Dim, ...]) -> bool:
        return any(axis in self.masks for dim in dims for axis in axes(dim))

    def _silenced(self, func: Any, out: Any, rows: tuple[tuple[Dim, ...] | None, ...]) -> Any:
        if not isinstance(out, (list, tuple)):
            return self._silence(func, out, rows[0])
        done = [self._silence(func, item, row) for item, row in zip(out, rows, strict=True)]
        return type(out)(done)  # torch's named tuples take one sequence too

    def _silence(self, func: Any, out: Any, dims: tuple[Dim, ...] | None) -> Any:
        if dims is None or not isinstance(out, Tensor) or not self._touched(dims):
            return out
        if tuple(map(size, dims)) != tuple(out.shape):
            name = getattr(func, "__name__", "a function")
            raise ModelError(
                f"the run takes another way than the observed one at {name}: {list(out.shape)}, not {dims}"
            )
        if not (out.is_floating_point() or out.is_complex()):
            return out
        for d, dim in enumerate(dims):
            if self._touched((dim,)):
                keep = keep_of(dim, self.masks).to(out.device)
                out = out.masked_fill_(~keep.view(-1, *[1] * (out.dim() - d - 1)), 0)
        return out

    def _counting(self, func: Any, args: Any, kwargs: Any, entry: Any, call: int) -> Any:
        name = getattr(func, "__name__", "")
        rule = COUNTING.get(name)
        if rule is None:
            raise ModelError(f"'{name}' counts units and has no masked form to compare a cut with ({entry.reason})")
        out = rule(func, [self._keeps(dims) for dims in entry.inputs], args, kwargs)
        rows = self.found.results.get(call, ())
        if not isinstance(out, (list, tuple)):
            return self._whole(out, rows[0] if rows else None)
        whole = [self._whole(item, row) for item, row in zip(out, rows, strict=True)] if rows else list(out)
        return type(out)(whole)

    def _keeps(self, dims: tuple[Dim, ...]) -> list[Tensor | None]:
        return [keep_of(dim, self.masks) if self._touched((dim,)) else None for dim in dims]

    def _whole(self, out: Any, dims: tuple[Dim, ...] | None) -> Any:
        """A result over kept units at its full size, zeros elsewhere."""
        if dims is None or not isinstance(out, Tensor) or tuple(out.shape) == tuple(map(size, dims)):
            return out
        return _scattered(out, torch.Size(map(size, dims)), self._keeps(dims))


PRODUCTS = {"matmul", "mm", "bmm", "__matmul__", "einsum", "addmm", "baddbmm", "__rmatmul__"}


def _holds_tensors(out: Any) -> bool:
    return any(isinstance(item, Tensor) for item in (out if isinstance(out, (list, tuple)) else (out,)))


def _shared(out: Any, args: tuple[Any, ...]) -> Tensor | None:
    """The argument that a result is a view of; an in-place result is none."""
    first = out[0] if isinstance(out, (list, tuple)) and out else out
    if not isinstance(first, Tensor):
        return None
    storage = first.untyped_storage().data_ptr()
    inputs = [item for item in args if isinstance(item, Tensor) and item is not first]
    return next((item for item in inputs if item.untyped_storage().data_ptr() == storage), None)


def _in_place(func: Any) -> bool:
    """Whether a function writes into its argument and gives it back: `add_`, `__iadd__`."""
    name = str(getattr(func, "__name__", ""))
    return name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _copied(out: Any) -> Any:
    """Views of a parameter are silenced as copies: the parameter keeps its values."""
    return out.clone() if isinstance(out, Tensor) else type(out)([item.clone() for item in out])


Keeps = list[list[Tensor | None]]


def _gathered(x: Tensor, keeps: list[Tensor | None]) -> Tensor:
    for d, keep in enumerate(keeps):
        if keep is not None:
            x = x.index_select(d, keep.nonzero().flatten().to(x.device))
    return x


def _scattered(x: Tensor, shape: torch.Size, keeps: list[Tensor | None]) -> Tensor:
    """The inverse of `_gathered`, zeros elsewhere."""
    for d, keep in enumerate(keeps):
        if keep is not None:
            whole = x.new_zeros(*x.shape[:d], shape[d], *x.shape[d + 1 :])
            x = whole.index_copy(d, keep.nonzero().flatten().to(x.device), x)
    return x


def _layer_norm(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Tensor:
    """Layer and RMS norm over the kept units."""
    layer = "layer" in func.__name__
    names = ("input", "normalized_shape", "weight", "bias", "eps") if layer else RMS_ARGUMENTS
    given = dict(zip(names, args, strict=False)) | kwargs
    width = len(given["normalized_shape"])
    small = _gathered(given["input"], keeps[0])
    tail = keeps[0][-width:]
    weights = {key: None if given.get(key) is None else _gathered(given[key], tail) for key in names[2:-1]}
    eps = {} if given.get("eps") is None else {"eps": given["eps"]}
    norm: Any = F.layer_norm if layer else F.rms_norm
    out: Tensor = norm(small, tuple(small.shape[-width:]), **weights, **eps)
    return out


RMS_ARGUMENTS = ("input", "normalized_shape", "weight", "eps")


def _group_norm(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Tensor:
    """Group norm over the kept channels of every group."""
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
    x, groups, keep = given["input"], given["num_groups"], keeps[0][1]
    assert keep is not None
    alive = int(keep.view(groups, -1).any(1).sum())
    parts = {key: _gathered(given[key], [keep]) for key in ("weight", "bias") if given.get(key) is not None}
    return F.group_norm(_gathered(x, keeps[0]), alive, **parts, eps=given.get("eps", 1e-5))


def _batch_norm(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Tensor:
    """Statistics of the batch itself, over the kept entries."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    given["input"] = _gathered(given["input"], keeps[0])
    for name in names[1:5]:
        if given.get(name) is not None:
            given[name] = _gathered(given[name], [keeps[0][1]])
    return F.batch_norm(**{name: value for name, value in given.items() if name in names})


def _reduced(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Any:
    """Means, maxima, softmax and the like over the kept units."""
    names = {key: value for key, value in kwargs.items() if key != "input"}
    return func(_gathered(args[0] if args else kwargs["input"], keeps[0]), *args[1:], **names)


def _best(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Any:
    """The k largest of the kept units, by the numbers that these have in the dense model."""
    x = args[0] if args else kwargs["input"]
    given = dict(zip(("k", "dim"), args[1:], strict=False)) | kwargs
    d = given.get("dim", -1) % x.dim()
    keep = keeps[0][d]
    assert keep is not None
    hidden = ~keep.to(x.device).view(-1, *[1] * (x.dim() - d - 1))
    rest = {name: value for name, value in kwargs.items() if name != "input"}
    return func(x.masked_fill(hidden, -torch.inf), *args[1:], **rest)


def _weight_norm(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Tensor:
    out: Tensor = func(_gathered(args[0], keeps[0]), _gathered(args[1], keeps[1]), *args[2:])
    return out


def _attention(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Tensor:
    """The default scale is one over the square root of the kept head dimensions."""
    keep = keeps[0][-1]
    assert keep is not None
    return func(*args, **(kwargs | {"scale": int(keep.sum()) ** -0.5}))  # type: ignore[no-any-return]


def _recurrent(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Any:
    """Hidden units meet inside the function: the removed ones have no weights there."""
    weights = args[2]
    silent = [
        _scattered(_gathered(weight, keep), weight.shape, keep) for weight, keep in zip(weights, keeps, strict=False)
    ]
    return func(args[0], args[1], silent, *args[3:], **kwargs)


def _multi_head(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Any:
    """Torch's packed attention on the kept embedding: its own scale follows the kept head width."""
    keep = keeps[0][-1]
    assert keep is not None
    names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias")
    tail = ("bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")
    given = dict(zip((*names, *tail), args, strict=False)) | kwargs
    for i, name in enumerate(names[:3]):
        given[name] = _gathered(given[name], keeps[i])
    for name in ("in_proj_weight", "out_proj_weight"):
        rows = keep.repeat(given[name].shape[0] // len(keep))
        given[name] = _gathered(given[name], [rows, keep])
    for name in ("in_proj_bias", "out_proj_bias"):
        if given.get(name) is not None:
            given[name] = _gathered(given[name], [keep.repeat(given[name].shape[0] // len(keep))])
    heads = int(keep.view(given["num_heads"], -1).any(1).sum())
    return func(**(given | {"embed_dim_to_check": int(keep.sum()), "num_heads": heads}))


COUNTING: dict[str, Callable[[Any, Keeps, Any, Any], Any]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "batch_norm": _batch_norm,
    "scaled_dot_product_attention": _attention,
    "_weight_norm": _weight_norm,
    "topk": _best,
    "multi_head_attention_forward": _multi_head,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
    **dict.fromkeys(
        ("mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "logsumexp", "prod"), _reduced
    ),
    **dict.fromkeys(("softmax", "log_softmax", "sum", "norm", "linalg_vector_norm"), _reduced),
}
"""Functions that count units -> how they are run on the kept ones."""
