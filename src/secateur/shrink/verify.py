"""Cutting a model and proving it: the cut model against the masked one, on the same inputs."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import PlanError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.data.batches import run
from secateur.data.example import example_for
from secateur.data.running import device_of, evaluating
from secateur.shrink.cut import Undo, install, make_cut
from secateur.shrink.reference import reference
from secateur.structure.analysis import Structure, analyse

TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 1e-2}
"""Largest difference, relative to the largest output where that is above 1."""


def cut_(
    model: nn.Module,
    plan: Plan,
    example: Any = None,
    verify: bool = True,
    structure: Structure | None = None,
) -> Undo:
    """Cut a plan's structured units out of a model, in place, and record the changed attributes in the plan.

    Args:
        model: the model that was planned on; on the meta device only its shapes are checked.
        plan: what stays.
        example: inputs to observe and compare on; default: made-up ones.
        verify: compare with the masked model.
        structure: the model's, if it has just been analysed.

    Returns:
        A function that puts everything back.

    Raises:
        PlanError: the plan does not fit, or the results differ; the model is as it was.
    """
    batch = example_for(model, example, plan.example)
    structure = structure or analyse(model, batch)
    cut = make_cut(model, plan, structure)
    on_meta = any(tensor.is_meta for tensor in model.parameters())
    expected = None
    if verify and not on_meta:
        with unchanged(model):
            expected = reference(model, plan, structure, copied(batch))
    undo = install(model, cut)
    try:
        if verify and on_meta:
            analyse(model, batch)
        elif verify:
            _compare(expected, _outputs(model, copied(batch)))
    except BaseException:
        undo()
        raise
    plan.attributes = tuple(change.to_json() for change in cut.attributes)
    return undo


def _outputs(model: nn.Module, batch: Batch) -> Any:
    """The cut model's outputs.

    Raises:
        PlanError: it cannot be run; gives the model's own words.
    """
    try:
        with unchanged(model), evaluating(model):
            return run(model, batch.to(device_of(model)))
    except Exception as error:
        # the model's own code runs here and may fail in any way
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        raise PlanError(f"the cut model cannot be run ({reason}); the model is left as it was") from error


def copied(batch: Batch) -> Batch:
    """The same inputs in memory of their own: some models write into them."""
    return batch.each(lambda item: item.clone() if isinstance(item, Tensor) else item)


@contextlib.contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Buffers inside the block may be written to; afterwards they hold what they held."""
    before = [(buffer, buffer.detach().clone()) for buffer in model.buffers() if not buffer.is_meta]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, values in before:
                if buffer.shape == values.shape and not torch.equal(buffer, values):
                    buffer.copy_(values)


def _compare(expected: Any, found: Any) -> None:
    mine, theirs = float_tensors(expected), float_tensors(found)
    if not mine:
        raise PlanError(
            f"the model returns {type(expected).__name__} without a tensor of numbers, so a cut cannot be checked; the "
            "model is left as it was. verify=False (--no-verify) cuts all the same"
        )
    for a, b in zip(mine, theirs, strict=True):
        gap = difference(a, b)
        if not gap <= TOLERANCE.get(a.dtype, 2e-5):
            raise PlanError(
                f"the cut model does not give what the masked model gives (largest difference {gap:.3g}); the model is "
                "left as it was. Please report this with the model; verify=False (--no-verify) cuts all the same"
            )


def difference(expected: Tensor, found: Tensor) -> float:
    """Largest difference, relative to the largest expected value where that is above 1; infinite for other shapes."""
    if expected.shape != found.shape:
        return float("inf")
    if not expected.numel():
        return 0.0
    a, b = expected.double(), found.double()
    same = a.eq(b) | (a.isnan() & b.isnan())
    return float(torch.where(same, 0.0, a - b).abs().max() / a.nan_to_num(0.0, 0.0, 0.0).abs().max().clamp_min(1.0))


def float_tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in a model's output, in order; caches for further calls are left out."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        return [tensor for name, item in output.items() if name not in CACHES for tensor in float_tensors(item)]
    if isinstance(output, (list, tuple)):
        return [tensor for item in output for tensor in float_tensors(item)]
    return float_tensors(vars(output)) if hasattr(output, "__dict__") else []


CACHES = ("past_key_values", "cache_params")
