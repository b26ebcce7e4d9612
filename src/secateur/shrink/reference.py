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
    """The output of the masked model on a batch.

    Raises:
        ModelError: the run takes another way than the observed one, or counts units in a function that
            has no masked form here; names it.
    """
    masks = {structure.axes[name]: plan.masks[name] for name in structured(plan) if not bool(plan.masks[name].all())}
    batch = batch.to(device_of(model))
    with evaluating(model), _Masked(structure, masks):
        return run(model, batch)


class _Masked(TorchFunctionMode):
    def __init__(self, structure: Structure, masks: Mapping[Axis, Tensor]) -> None:
        super().__init__()
        self.found = structure.observation
        self.masks = masks
        self.call = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.call += 1
        call, kwargs = self.call, kwargs or {}
        counted = [entry for entry in self.found.statistics.get(call, ()) if self._touched(entry.dims)]
        if counted:
            out = self._counting(func, args, kwargs, counted[0])
        else:
            out = func(*args, **kwargs)
        if call in self.found.results and not _shares(out, (*args, *kwargs.values())):
            return self._silenced(func, out, self.found.results[call])
        return out

    def _touched(self, dims: tuple[Dim, ...]) -> bool:
        return any(axis in self.masks for dim in dims for axis in axes(dim))

    def _silenced(self, func: Any, out: Any, rows: tuple[tuple[Dim, ...] | None, ...]) -> Any:
        if not isinstance(out, (list, tuple)):
            return self._silence(func, out, rows[0])
        done = [self._silence(func, item, row) for item, row in zip(out, rows, strict=True)]
        return type(out)(done) if type(out) in (list, tuple) else type(out)(done)  # named tuples take one sequence

    def _silence(self, func: Any, out: Any, dims: tuple[Dim, ...] | None) -> Any:
        if dims is None or not isinstance(out, Tensor) or not self._touched(dims):
            return out
        if tuple(map(size, dims)) != tuple(out.shape):
            name = getattr(func, "__name__", "a function")
            raise ModelError(f"the run takes another way than the observed one at {name}: {list(out.shape)}, not {dims}")
        if not (out.is_floating_point() or out.is_complex()):
            return out
        for d, dim in enumerate(dims):
            if self._touched((dim,)):
                keep = keep_of(dim, self.masks).to(out.device)
                out = out.masked_fill_(~keep.view(-1, *[1] * (out.dim() - d - 1)), 0)
        return out

    def _counting(self, func: Any, args: Any, kwargs: Any, entry: Any) -> Any:
        name = getattr(func, "__name__", "")
        rule = COUNTING.get(name)
        if rule is None:
            raise ModelError(f"'{name}' counts units and has no masked form to compare a cut with ({entry.reason})")
        keeps = [
            [keep_of(dim, self.masks) if self._touched((dim,)) else None for dim in dims] for dims in entry.inputs
        ]
        return rule(func, keeps, args, kwargs)


def _shares(out: Any, args: tuple[Any, ...]) -> bool:
    """Whether a result is a view of an argument, which is silent already; an in-place result is none."""
    first = out[0] if isinstance(out, (list, tuple)) and out else out
    if not isinstance(first, Tensor):
        return False
    storage = first.untyped_storage().data_ptr()
    inputs = [item for item in args if isinstance(item, Tensor)]
    return any(item is not first and item.untyped_storage().data_ptr() == storage for item in inputs)


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
    names = ("input", "normalized_shape", "weight", "bias", "eps") if "layer" in func.__name__ else (
        "input",
        "normalized_shape",
        "weight",
        "eps",
    )
    given = dict(zip(names, args, strict=False)) | kwargs
    x, width = given["input"], len(given["normalized_shape"])
    small = _gathered(x, keeps[0])
    tail = keeps[0][-width:]
    weights = {
        key: None if given.get(key) is None else _gathered(given[key], tail) for key in names[2:-1]
    }
    eps = {} if given.get("eps") is None else {"eps": given["eps"]}
    norm = F.layer_norm if "layer" in func.__name__ else F.rms_norm
    out = norm(small, tuple(small.shape[-width:]), **weights, **eps)
    return _scattered(out, x.shape, keeps[0])


def _group_norm(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Tensor:
    """Group norm over the kept channels of every group."""
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
    x, groups, keep = given["input"], given["num_groups"], keeps[0][1]
    if keep is None:
        raise AssertionError("group norm without a mask")
    alive = int(keep.view(groups, -1).any(1).sum())
    parts = {key: _gathered(given[key], [keep]) for key in ("weight", "bias") if given.get(key) is not None}
    out = F.group_norm(_gathered(x, keeps[0]), alive, **parts, eps=given.get("eps", 1e-5))
    return _scattered(out, x.shape, keeps[0])


def _reduced(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Any:
    """Means, maxima and the like over the kept units; other dimensions are put back whole."""
    x = args[0] if args else kwargs.pop("input")
    out = func(_gathered(x, keeps[0]), *args[1:], **kwargs)
    return _map(lambda item: _restored(item, x, keeps[0]), out)


def _map(what: Callable[[Tensor], Tensor], out: Any) -> Any:
    return what(out) if isinstance(out, Tensor) else type(out)([what(item) for item in out])


def _restored(out: Tensor, x: Tensor, keeps: list[Tensor | None]) -> Tensor:
    if out.dim() == x.dim():
        left = [keep if out.shape[d] != 1 or x.shape[d] == 1 else None for d, keep in enumerate(keeps)]
        return _scattered(out, x.shape, left)
    if any(keep is not None and out.dim() and int(keep.sum()) in out.shape for keep in keeps):
        return _restored_reduced(out, x, keeps)
    return out


def _restored_reduced(out: Tensor, x: Tensor, keeps: list[Tensor | None]) -> Tensor:
    """Without keepdim: dimensions that are left stand in order."""
    sizes = [int(keep.sum()) if keep is not None else x.shape[d] for d, keep in enumerate(keeps)]
    position, left, shape = 0, [], []
    for d, n in enumerate(sizes):
        if position < out.dim() and out.shape[position] == n and len(sizes) - d >= out.dim() - position:
            left.append(keeps[d])
            shape.append(x.shape[d])
            position += 1
    return _scattered(out, torch.Size(shape), left) if position == out.dim() else out


def _softmax(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Tensor:
    x = args[0]
    return _scattered(func(_gathered(x, keeps[0]), *args[1:], **kwargs), x.shape, keeps[0])


def _attention(func: Any, keeps: Keeps, args: Any, kwargs: Any) -> Tensor:
    """The default scale is one over the square root of the kept head dimensions."""
    keep = keeps[0][-1]
    assert keep is not None
    return func(*args, **(kwargs | {"scale": int(keep.sum()) ** -0.5}))  # type: ignore[no-any-return]


COUNTING: dict[str, Callable[[Any, Keeps, Any, Any], Any]] = {
    "layer_norm": _layer_norm,
    "rms_norm": _layer_norm,
    "group_norm": _group_norm,
    "scaled_dot_product_attention": _attention,
    "softmax": _softmax,
    "log_softmax": _softmax,
    **dict.fromkeys(
        ("mean", "var", "std", "var_mean", "std_mean", "amax", "amin", "max", "min", "logsumexp", "prod"), _reduced
    ),
}
"""Functions that count units -> how they are run on the kept ones."""
