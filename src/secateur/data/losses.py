"""What a network is judged by that serves several tasks: several losses of one output, by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isnan
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError, SecateurError, SettingsError
from secateur.core.imports import imported
from secateur.core.method import Batch
from secateur.core.trees import tensors_in
from secateur.data.batches import logits_of, loss_of, run
from secateur.data.running import device_of

TaskLosses = Callable[[Any, Batch], Mapping[str, Tensor]]
"""(the model's raw output, batch) -> name -> mean loss over the batch, a scalar."""

UNCHECKED = "it was not checked whether every head of the model has a loss; what serves a head without one may go"


def cross_entropy(output: Any, batch: Batch) -> dict[str, Tensor]:
    """One task: mean cross entropy of the labels, or of the next tokens.

    Raises:
        SettingsError: the output is a mapping of several, and which has what loss was not said.
    """
    if isinstance(output, dict) and not hasattr(output, "logits"):
        raise SettingsError(
            f"the model returns {', '.join(map(str, output))}, and no loss was named for them; give "
            "losses=module.path:function, which returns a loss for each by name"
        )
    return {"loss": loss_of(logits_of(output), batch)}


def losses_from(given: str | TaskLosses) -> TaskLosses:
    """A function of losses from what a user gives: itself, `module.path:function`, or nothing for cross entropy.

    Raises:
        ModelError, UnknownNameError: the function cannot be imported.
    """
    if isinstance(given, str):
        return imported(given, "losses") if given else cross_entropy
    return given


def name_of(given: str | TaskLosses) -> str:
    """What to write down for it: `module.path:function`."""
    if isinstance(given, str):
        return given
    return f"{given.__module__}:{getattr(given, '__qualname__', type(given).__qualname__)}"


@torch.no_grad()
def mean_losses(model: nn.Module, batches: Sequence[Batch], losses: TaskLosses) -> dict[str, float]:
    """Every task's loss: the mean over the batches, weighted by their samples, summed in float64.

    Args:
        model: run as it is; the caller sees to eval mode.
        batches: always in this order.
        losses: of an output.

    Raises:
        SettingsError: the function fails, or returns something else than scalars by name, always the same names.
    """
    totals: dict[str, float] = {}
    for place, batch in enumerate(batches):
        moved = batch.to(device_of(model))
        values = {name: float(value) for name, value in _scalars(losses, run(model, moved), moved).items()}
        if place and values.keys() != totals.keys():
            raise SettingsError(f"losses named {sorted(totals)} on the first batch and {sorted(values)} on another one")
        for name, value in values.items():
            totals[name] = totals.get(name, 0.0) + value * batch.samples
    samples = sum(batch.samples for batch in batches)
    return {name: total / samples for name, total in totals.items()}


def _scalars(losses: TaskLosses, output: Any, batch: Batch) -> dict[str, Tensor]:
    try:
        found = losses(output, batch)
    except SecateurError:
        raise
    except Exception as error:
        # the user's own code runs here and may fail in any way
        raise SettingsError(f"the losses {name_of(losses)} failed: {type(error).__name__}: {error}") from error
    if not isinstance(found, Mapping) or not found:
        raise SettingsError(f"the losses {name_of(losses)} must be a mapping of names to scalars, not {found!r:.60}")
    return {str(name): _scalar(str(name), value) for name, value in found.items()}


def _scalar(name: str, value: Any) -> Tensor:
    if isinstance(value, Real):
        return torch.tensor(float(value), dtype=torch.float64)
    if not isinstance(value, Tensor) or value.numel() != 1 or value.is_complex():
        what = f"a {value.dtype} tensor of shape {list(value.shape)}" if isinstance(value, Tensor) else f"{value!r:.60}"
        raise SettingsError(f"loss '{name}' is {what}; it must be a scalar tensor or a number, the mean over the batch")
    return value.reshape(())


def refuse_heads_without_loss(model: nn.Module, batch: Batch, losses: TaskLosses) -> list[str]:
    """Parameters that matter to an output and to no loss are of a task that nothing would protect.

    Returns:
        A warning where a loss has no gradient: what that one reads cannot be told.

    Raises:
        SettingsError: there are such parameters; names their module.
    """
    moved = batch.to(device_of(model))
    with torch.enable_grad():
        output = run(model, moved)
        try:
            judged = _scalars(losses, output, moved)
        except SettingsError:  # it runs without gradients only: of numpy, for example
            return [f"{name_of(losses)} does not run with gradients, so {UNCHECKED}"]
        results = [tensor for tensor in tensors_in(output) if tensor.requires_grad]
        given = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not results or not given:
            return []
        if flat := next((name for name, value in judged.items() if not value.requires_grad), ""):
            return [f"loss '{flat}' has no gradient, so {UNCHECKED}"]
        of_losses = torch.autograd.grad([*judged.values()], [*given.values()], retain_graph=True, allow_unused=True)
        total = torch.stack([tensor.sum().float() for tensor in results]).sum()
        of_outputs = torch.autograd.grad(total, [*given.values()], allow_unused=True)
    for name, loss, result in zip(given, of_losses, of_outputs, strict=True):
        if loss is None and result is not None:
            raise SettingsError(
                f"'{name.rpartition('.')[0] or name}' of {type(model).__name__} is of a task without a loss: it makes "
                f"an output that {name_of(losses)} does not look at, so whatever only that task needs would go; give "
                "losses=module.path:function with a loss for every task"
            )
    return []


def refuse_unusable(losses: Mapping[str, float]) -> None:
    """For criteria that divide by a loss.

    Raises:
        DataError: one is zero, negative or NaN; names it.
    """
    for name, value in losses.items():
        if isnan(value) or not 0 < value < float("inf"):
            raise DataError(
                f"loss '{name}' is {value:.6g}, and how much it rises is measured relative to itself: give a loss that "
                "is positive and finite on these data (a squared error or cross entropy instead of its negative or a "
                "score; held-out data where a model knows the others by heart)"
            )
