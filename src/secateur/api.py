"""The Python interface: plan, and the parts it is used with."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur.core import catalogue
from secateur.core.budget import Budget, Pattern, Quantity
from secateur.core.distributed import agreed
from secateur.core.errors import BudgetError, DataError, ModelError, NumericsError, SettingsError
from secateur.core.fingerprint import data_digest, model_digest
from secateur.core.method import Batch, Decision, Group, Method, Protocol, Settings, Task
from secateur.core.plan import Plan, Provenance, versions
from secateur.core.progress import Progress, Silent
from secateur.core.seeding import seeded
from secateur.core.select import all_finite
from secateur.core.units import UnitKind
from secateur.data.batches import as_batches
from secateur.data.dataset import Dataset
from secateur.data.example import describe_example, example_for
from secateur.data.running import evaluating
from secateur.methods import methods
from secateur.shrink.apply import stamp
from secateur.structure.analysis import Structure
from secateur.structure.analysis import analyse as find_structure
from secateur.train.loop import Fit
from secateur.train.sharding import local
from secateur.train.sparsifier import Order, Sparsifier
from secateur.train.study import Findings, Ledger, Study

__all__ = ["analyse", "find_method", "methods", "plan", "sparsify", "study"]


def analyse(model: nn.Module, example: Any = None) -> Structure:
    """What can be cut out of a model: its channels, neurons, heads and widths, and why the rest is frozen.

    No weights are needed: a model on the meta device will do.

    Args:
        model: any module; it is left exactly as it was.
        example: inputs that it can be run on: a tensor, a mapping, a `Batch`; default: made-up ones.

    Raises:
        DataError: it is not clear what the model takes.
        ModelError: it cannot be run on the example, or its structure depends on values.
    """
    return find_structure(model, example_for(model, example))


def find_method(name: str) -> Method:
    """A method of the catalogue; hyphen or underscore.

    Raises:
        UnknownNameError: gives the nearest names.
    """
    return catalogue.find(methods(), name)


def plan(
    model: nn.Module,
    method: str,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    budget: Budget | None = None,
    data: Any = None,
    seed: int = 0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    keep_scores: bool = False,
    example: Any = None,
    source: str = "",
    progress: Progress | None = None,
    **settings: Any,
) -> Plan:
    """Decide what a model can do without. The model is left exactly as it was.

    Args:
        model: any module; a transformers model needs nothing special.
        method: a name from `methods()`; hyphen or underscore.
        sparsity: fraction of the method's units to remove, in [0, 1).
        pattern: instead of a sparsity, "2:4": keep 2 of every 4 inputs.
        budget: instead of both, a `Budget` with a floor or in other quantities.
        data: calibration data: a Dataset, a tensor of inputs, or an iterable of batches
            (tensors, mappings, (input, target) pairs).
        seed: of everything random; same seed, same plan, bit for bit.
        include: shell patterns over module and parameter names that may be pruned.
        exclude: patterns that may not; wins over `include`.
        keep_scores: store the scores in the plan.
        example: inputs that the model can be run on, for methods that cut channels, heads or widths and
            for synaptic flow; a tensor, a mapping or a `Batch`. Default: the calibration data's first
            batch, or made-up ones.
        source: where the model came from, for the provenance.
        progress: receives progress; silent by default.
        **settings: the method's own settings.

    Returns:
        The plan. In a distributed job every rank gets rank 0's.

    Raises:
        UnknownNameError: no such method or setting; gives the nearest names.
        BudgetError: the budget is malformed, out of reach, or would empty a layer.
        DataError, NumericsError, ModelError: what is wrong, and with which layer.
    """
    entry = find_method(method)
    if entry.run is None:
        raise ModelError(f"{entry.name} is no one-shot method, it cannot make a plan by itself; {_way_to(entry)}")
    checked = entry.configure(settings)
    budget = budget_of(entry, sparsity, pattern, budget)
    refuse_sick(model)
    batches = calibration(entry, checked, data)
    runs = entry.structured or checked.uses_example or budget.quantity is Quantity.FLOPS
    task = Task(
        model=model,
        budget=budget,
        batches=batches,
        seed=seed,
        include=tuple(include),
        exclude=tuple(exclude),
        keep_scores=keep_scores,
        progress=progress or Silent(),
        example=example_for(model, data if example is None else example) if runs else None,
    )
    with evaluating(model), seeded(seed):
        decision, origin = agreed((entry.run(task, checked), _provenance(entry, checked, task, data, source)))
    made = Plan(
        sites=decision.sites,
        masks={name: mask.cpu() for name, mask in decision.masks.items()},
        weights={name: value.cpu() for name, value in decision.weights.items()},
        scores={name: value.cpu() for name, value in decision.scores.items()},
        provenance=(origin,),
        warnings=tuple(decision.warnings),
        facts=decision.facts,
        example=describe_example(task.example) if entry.structured else None,
        additions=tuple(decision.additions),
    )
    refuse_empty(made, budget, decision)
    stamp(model, made)
    return made


def sparsify(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    method: str,
    sparsity: float | None = None,
    *,
    steps: int,
    budget: Budget | None = None,
    seed: int = 0,
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    progress: Progress | None = None,
    state: Mapping[str, Any] | None = None,
    example: Any = None,
    **settings: Any,
) -> Sparsifier:
    """Let a method act while your loop trains the model: call it before the loop, `finish()` after it.

    Args:
        model: any module; may be compiled, data-parallel or sharded.
        optimizer: the one that trains it, any of torch's.
        method: a name from `methods()` that acts during training, e.g. `granet`.
        sparsity: fraction of the prunable weights that is removed in the end, exactly.
        steps: optimiser steps of the whole training.
        budget: instead of a sparsity, with a floor per layer.
        seed: of everything random.
        include: shell patterns over parameter names that may be pruned.
        exclude: patterns that may not; wins over `include`.
        progress: receives progress; silent by default.
        state: `sparsifier.state_dict()` of a checkpoint, to go on from there; load the model's and the
            optimiser's state of the same checkpoint first.
        example: inputs (a batch, a tensor, a data set) for methods that find the structure in a run or count FLOPs;
            guessed from the model by default.
        **settings: the method's own settings.

    Raises:
        UnknownNameError: no such method or setting; gives the nearest names.
        ModelError: the method does not act during training; a parameter is frozen or not optimised.
        NumericsError: NaN or infinite weights; names the layer.
        SettingsError, BudgetError: a schedule does not fit the training, a budget cannot be met.
    """
    entry = find_method(method)
    if entry.parts is None:
        raise ModelError(f"{entry.name} does not act during training; {_way_to(entry)}")
    checked = entry.configure(settings)
    refuse_sick(model)
    order = Order(
        method=entry.name,
        budget=budget_of(entry, sparsity, None, budget),
        steps=steps,
        settings=checked.model_dump(mode="json"),
        seed=seed,
        include=tuple(include),
        exclude=tuple(exclude),
        example=example,
    )
    return Sparsifier(model, optimizer, entry.parts(order, checked), order, progress=progress, state=state)


def study(
    make: Callable[[], nn.Module],
    fit: Fit,
    method: str,
    sparsity: float | None = None,
    *,
    steps: int | None = None,
    budget: Budget | None = None,
    folder: str | Path | None = None,
    seed: int = 0,
    metric: str = "accuracy",
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    extras: Mapping[str, Any] | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> Findings:
    """Run a procedure around whole trainings of yours: lottery tickets, rewinding, criteria on trial.

    Args:
        make: gives a freshly initialised model; torch is seeded when it is called.
        fit: your training, `fit(model, masks, start, stop) -> metrics`; see `secateur.train.loop.Fit`.
        method: a name from `methods()` that is a procedure, e.g. `lottery`.
        sparsity: fraction of the prunable weights that is removed in the end.
        steps: optimiser steps of one whole training; default: `fit.steps`.
        budget: instead of a sparsity.
        folder: where every round is kept; run again after a kill, it goes on and ends with the same result. It is
            known by the settings, by the network where `make` gives the same one each time, and by `fit.known_by`,
            a mapping of plain data, if `fit` has one.
        seed: of initialisation and every random draw.
        metric: which figure of `fit` is compared.
        include: shell patterns over parameter names that may be pruned.
        exclude: patterns that may not; wins over `include`.
        extras: what single procedures need besides; their documentation says it.
        about: what else the folder is known by, plain data: the name of the data, the settings of `fit`.
        progress: receives progress; silent by default.
        **settings: the procedure's own settings.

    Raises:
        UnknownNameError: no such method or setting; gives the nearest names.
        ModelError: the method is no procedure; `fit` did not keep removed weights at zero.
        SettingsError: the folder holds a run with other settings, of another network or on other data.
    """
    entry = find_method(method)
    if entry.procedure is None:
        raise ModelError(f"{entry.name} is no procedure around trainings; {_way_to(entry)}")
    checked = entry.configure(settings)
    steps = getattr(fit, "steps", None) if steps is None else steps
    if steps is None:
        raise SettingsError("give steps=..., the optimiser steps of one whole training")
    order = Order(
        method=entry.name,
        budget=budget_of(entry, sparsity, None, budget),
        steps=steps,
        settings=checked.model_dump(mode="json"),
        seed=seed,
        include=tuple(include),
        exclude=tuple(exclude),
    )
    known = {} if folder is None else _known_by(order.to_json() | {"metric": metric}, make, seed, fit, about or {})
    asked = Study(
        make=make,
        fit=fit,
        steps=steps,
        budget=order.budget,
        seed=seed,
        metric=metric,
        include=order.include,
        exclude=order.exclude,
        ledger=Ledger(None if folder is None else Path(folder), known),
        progress=progress or Silent(),
        extras=extras or {},
    )
    found: Findings = entry.procedure(asked, checked)
    if found.masks is not None:
        found.plan = _plan_of(asked, order, found)
    return found


def _known_by(
    order: Mapping[str, Any], make: Callable[[], nn.Module], seed: int, fit: Fit, about: Mapping[str, Any]
) -> dict[str, Any]:
    """What a study's folder is known by, as plain data.

    Raises:
        SettingsError: something in `about` or `fit.known_by` is not plain, or has a name that is taken.
    """
    found = dict(order)
    network, again = _digest(make, seed), _digest(make, seed)
    if network == again:
        found["network"] = network
    own = getattr(fit, "known_by", None)
    for source, words in (("fit.known_by", own if isinstance(own, Mapping) else {}), ("about", about)):
        if taken := [name for name in words if name in found]:
            raise SettingsError(f"{source} names '{taken[0]}', by which a study is known anyway; use another name")
        try:
            found |= json.loads(json.dumps(dict(words), allow_nan=False))
        except (TypeError, ValueError) as error:
            raise SettingsError(f"{source} must be plain data, numbers, words, lists and mappings: {error}") from error
    return {**{name: found[name] for name in about}, **found}


def _digest(make: Callable[[], nn.Module], seed: int) -> str:
    """Of the network that every training starts from."""
    with seeded(seed):
        return model_digest(make())


def _plan_of(asked: Study, order: Order, found: Findings) -> Plan:
    """The masks of a procedure as a plan for the model with the weights that it found."""
    assert found.masks is not None
    model = asked.model()
    if found.state is not None:
        model.load_state_dict(found.state)
    made = Plan(
        sites=asked.sites(model),
        masks=found.masks,
        provenance=(order.provenance(type(model).__name__),),
        warnings=tuple(found.warnings),
    )
    stamp(model, made)
    return made


def _way_to(entry: Method) -> str:
    """The call that a method is made for."""
    calls = {
        Protocol.PLAN: "sc.plan (secateur prune)",
        Protocol.SPARSIFIER: "sc.sparsify (secateur train)",
        Protocol.PROCEDURE: "sc.study",
        Protocol.ATTACHMENT: "its attachment",
    }
    return "use " + " or ".join(calls[protocol] for protocol in entry.protocols or (entry.kind,))


def budget_of(entry: Method, sparsity: float | None, pattern: str | None, budget: Budget | None) -> Budget:
    given = [item for item in (sparsity, pattern, budget) if item is not None]
    if len(given) != 1:
        raise BudgetError(f"give exactly one of sparsity, pattern and budget; got {len(given)}")
    if pattern is not None:
        budget = Budget.nm(Pattern.parse(pattern))
    elif sparsity is not None:
        budget = Budget(sparsity)
    assert budget is not None
    if budget.pattern and not entry.patterns:
        raise BudgetError(f"{entry.name} does not support N:M patterns; give a sparsity")
    if entry.units is UnitKind.WEIGHT and entry.exact is not Group.TOTAL:
        _ = budget.sparsity  # such methods decide row by row or layer by layer: a total would be read as a share
    return budget


def refuse_sick(model: nn.Module) -> None:
    """NaN anywhere reaches every later activation: name where it comes from, not where it was noticed.

    Raises:
        NumericsError: names the layer.
    """
    for name, parameter in model.named_parameters():
        if parameter.device.type != "meta" and not all_finite(local(parameter.detach())):
            raise NumericsError(f"layer '{name}' has NaN or infinite weights; repair the model before pruning it")


def calibration(entry: Method, settings: Settings, data: Any) -> list[Batch]:
    if data is None:
        if entry.needs_data:
            raise DataError(f"{entry.name} needs calibration data; give data=... (--data)")
        return []
    return as_batches(data) if entry.needs_data or settings.uses_data else []


def _provenance(entry: Method, settings: Settings, task: Task, data: Any, source: str) -> Provenance:
    return Provenance(
        method=entry.name,
        settings=settings.model_dump(mode="json"),
        budget=task.budget.to_json() | {"include": list(task.include), "exclude": list(task.exclude)},
        seed=task.seed,
        model={"class": type(task.model).__name__, "source": source},
        data=describe_data(task.batches, data),
        versions=versions(),
    )


def describe_data(batches: Sequence[Batch], data: Any) -> dict[str, Any]:
    """Name, digest and number of samples of calibration data; empty without any."""
    if not batches:
        return {}
    return {
        "name": data.name if isinstance(data, Dataset) else type(data).__name__,
        "digest": data_digest([tensor for batch in batches for tensor in batch.tensors]),
        "samples": sum(batch.samples for batch in batches),
    }


def refuse_empty(made: Plan, budget: Budget, decision: Decision) -> None:
    """A layer without any weight passes no signal: say so instead of saving a dead model."""
    for name, mask in made.masks.items():
        if mask.numel() and not bool(mask.any()):
            fullest = max(decision.masks, key=lambda other: float(decision.masks[other].float().mean()))
            raise BudgetError(
                f"layer '{name}' would keep 0 of {mask.numel()} units at {budget} (densest: '{fullest}'); lower the "
                f"sparsity, exclude the layer, or keep a minimum in every layer "
                f"(--minimum 1; in Python Budget({budget.amount:g}, floor=1))"
            )
    kept, total = made.units()
    if kept == total and budget.removes and not budget.pattern:
        smallest = min(site.matrix_shape[1] if len(site.shape) > 1 else site.units for site in made.sites.values())
        raise BudgetError(
            f"{budget} removes nothing in any of {len(made.sites)} sites; "
            f"the smallest step of the narrowest is {1 / smallest:.4g}"
        )
