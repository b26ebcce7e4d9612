"""Saving: a folder that stock tools load, checked by loading it before it gets its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

from secateur.core.errors import OutputError, SecateurError
from secateur.core.files import check_free, whole_folder, write_json
from secateur.core.method import Batch
from secateur.core.plan import Plan, versions
from secateur.core.units import UnitKind
from secateur.data.batches import run
from secateur.data.probe import probe_for
from secateur.data.running import device_of, evaluating
from secateur.shrink.additions import additions_of, attach
from secateur.shrink.biases import given_biases
from secateur.shrink.cut import odd_attributes, structured
from secateur.shrink.depth import kept_list, renumbered
from secateur.shrink.folder import BUFFERS, CARD, OWN, WEIGHTS, carry_companions, quiet_transformers
from secateur.shrink.layout import plain_config, runtimes
from secateur.shrink.load import layout_of_folder, load, read_tensors, steps_of
from secateur.shrink.pattern import check_patterns
from secateur.shrink.remote import write_model_code
from secateur.shrink.verify import difference, float_tensors

TOLERANCE = 1e-5


def save(
    model: nn.Module,
    folder: str | Path,
    plan: Plan | None = None,
    *,
    source: str | Path | None = None,
    factory: str | None = None,
    data: str | None = None,
    probe: Batch | None = None,
    verify: bool = True,
    force: bool = False,
    extend: Callable[[Path], None] | None = None,
) -> Path:
    """Write a pruned model so that it reloads, and prove it before the folder appears.

    A transformers model becomes a plain Hugging Face folder; `config.json` gets a `secateur` section
    that other tools ignore. Any other module is saved as `model.safetensors` and its factory. Both
    get `secateur/plan.*` and `secateur/result.json`.

    Args:
        model: the model after `apply_`.
        folder: where to; must not exist unless `force`.
        plan: what was done.
        source: folder to carry tokenizer, processor and generation files from; default: where the
            transformers model was loaded from.
        factory: `module.path:name` that builds the unpruned module.
        data: the data set to measure the model on later, noted in the card.
        probe: inputs for the comparison; for transformers models made up where possible.
        verify: reload and compare all tensors and, where there is a probe, the logits (at most 1e-5 apart).
        force: replace an existing folder.
        extend: called with the temporary folder at the end, to add more files.

    Raises:
        OutputError: the folder exists, the disk is full, a layer does not hold the plan's N:M pattern, or the
            reloaded model differs.
    """
    folder = Path(folder)
    check_free(folder, force)
    with whole_folder(folder, force) as temporary:
        own = temporary / OWN
        own.mkdir()
        if plan is not None:
            plan.write_into(own)
        card = _card(model, plan, source, factory) | {"data": data}
        if _is_transformers(model):
            card["layout"] = _save_transformers(model, temporary, plan, source, card)
        else:
            save_model(model, str(temporary / WEIGHTS))
        card["runtimes"] = runtimes(card["kind"], card["layout"])
        if buffers := _cut_buffers(model, plan, source):
            save_file(buffers, own / BUFFERS)
        write_json(own / CARD, card)
        if verify:
            if plan is not None:
                check_patterns(model, plan)
            verify_folder(model, temporary, factory, probe)
        if extend is not None:
            extend(temporary)
    return folder


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "save_pretrained") and hasattr(getattr(model, "config", None), "to_dict")


def _card(model: nn.Module, plan: Plan | None, source: str | Path | None, factory: str | None) -> dict[str, Any]:
    kind = "transformers" if _is_transformers(model) else "module"
    steps = steps_of(Path(source)) if source else []
    if plan is not None:
        steps = [*steps, *_steps(plan)]
    return {
        "kind": kind,
        "class": type(model).__name__,
        "factory": factory,
        "steps": steps,
        "layout": "uneven" if any({"cut", "biases", "additions"} & step.keys() for step in steps) else "plain",
        "versions": versions(),
    }


def _steps(plan: Plan) -> list[dict[str, Any]]:
    """What a loader must do to a fresh module, in order."""
    found: list[dict[str, Any]] = [{"additions": list(plan.additions)}] if plan.additions else []
    found += [{"biases": given}] if (given := given_biases(plan)) else []
    found += [{"cut": list(plan.attributes)}] if structured(plan) else []
    now = {name: kept_list(plan.masks[name]) for name, site in plan.sites.items() if site.kind is UnitKind.BLOCK}
    return [*found, {"blocks": now}] if now else found


def _cut_buffers(model: nn.Module, plan: Plan | None, source: str | Path | None) -> dict[str, Tensor]:
    """Buffers that were cut, now or before, and that no state dict holds, such as rotary frequencies."""
    stored = model.state_dict().keys()
    touched = set()
    if plan is not None:
        places = (place.parameter for name in structured(plan) for place in plan.sites[name].occurrences)
        touched = {now for now in (renumbered(name, plan) for name in places) if now is not None}
    earlier = Path(source) / OWN / BUFFERS if source else None
    if earlier is not None and earlier.exists():
        touched |= read_tensors(earlier).keys()
    found = {name: buffer for name, buffer in model.named_buffers() if name in touched and name not in stored}
    return {name: buffer.detach().cpu().clone() for name, buffer in found.items()}


def _save_transformers(
    model: Any, folder: Path, plan: Plan | None, source: str | Path | None, card: dict[str, Any]
) -> str:
    """Save as a Hugging Face folder; returns the layout, `plain` where the config can say all widths."""
    origin = Path(source or model.name_or_path or "")
    was_uneven = str(origin) != "." and origin.is_dir() and layout_of_folder(origin) == "uneven"
    changed = plan is not None and bool(structured(plan) or given_biases(plan))
    additions = additions_of(model)
    if not (changed or was_uneven or additions):
        _save_pretrained(model, folder, plan, source)
        return "plain"
    config = plain_config(model, plan) if plan is not None and changed and not (was_uneven or additions) else None
    if config is not None:
        dense, model.config = model.config, config
        try:
            _save_pretrained(model, folder, plan, source)
        finally:
            model.config = dense
        return "plain"
    _save_pretrained(model, folder, plan, source)
    with torch.device("meta"):
        fresh = type(model)(model.config)
    attach(fresh, additions)
    card["additions"] = additions
    card["shapes"] = _odd_shapes(model, fresh)
    card["attributes"] = [change.to_json() for change in odd_attributes(model, fresh)]
    card["added"] = _added(model, fresh)
    write_model_code(folder, type(model).__name__, card, _cut_buffers(model, plan, source))
    return "uneven"


def _odd_shapes(model: nn.Module, fresh: nn.Module) -> dict[str, list[int]]:
    """The parameters and buffers that the config would build with other shapes."""
    plain = dict(fresh.named_parameters()) | dict(fresh.named_buffers())
    mine = {**dict(model.named_parameters()), **_stored_buffers(model)}
    return {
        name: list(tensor.shape) for name, tensor in mine.items() if name in plain and plain[name].shape != tensor.shape
    }


def _added(model: nn.Module, fresh: nn.Module) -> dict[str, list[int]]:
    """The parameters that the config would not build, such as biases that make up for removed units."""
    plain = dict(fresh.named_parameters())
    return {name: list(tensor.shape) for name, tensor in model.named_parameters() if name not in plain}


def _stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that a state dict holds; the others are made when a model is built."""
    stored = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers() if name in stored}


def _save_pretrained(model: Any, folder: Path, plan: Plan | None, source: str | Path | None) -> None:
    before = getattr(model.config, "secateur", None)
    if plan is not None:
        model.config.secateur = summary(plan)
    try:
        with quiet_transformers():
            model.save_pretrained(folder)
    finally:
        if before is not None:
            model.config.secateur = before
        elif plan is not None:
            del model.config.secateur
    origin = Path(source or model.name_or_path or "")
    if str(origin) != "." and origin.is_dir():
        carry_companions(origin, folder)


def summary(plan: Plan) -> dict[str, Any]:
    """The `secateur` section of `config.json`: what was removed, in a form that tools may ignore."""
    kept, total = plan.units()
    patterns = {str(entry.budget["pattern"]) for entry in plan.provenance if entry.budget.get("pattern")}
    structured = any(kind is not UnitKind.WEIGHT for kind in plan.kinds)
    return {
        "methods": [entry.method for entry in plan.provenance],
        "units": [kind.value for kind in plan.kinds],
        "kept": kept,
        "total": total,
        "pattern": ", ".join(sorted(patterns)) or ("structured" if structured else "unstructured"),
    }


def verify_folder(model: nn.Module, folder: Path, factory: str | None, probe: Batch | None) -> None:
    """Load the folder and compare it with the model in memory.

    Raises:
        OutputError: it does not load, or gives other logits.
    """
    try:
        again = load(folder, trust_factory=factory is not None)
    except SecateurError as error:
        reason = str(error).replace(f"'{folder}'", "it").replace(f"{folder}/", "")  # a name that goes with the folder
        raise OutputError(f"the saved model does not reload: {reason} (--no-verify saves it all the same)") from error
    again.to(device_of(model))
    probe = probe or (probe_for(model) if _is_transformers(model) else None)
    with evaluating(model):
        gaps = [_tensor_gap(model, again), *([_logit_gap(model, again, probe)] if probe else [])]
    if not all(gap <= TOLERANCE for gap in gaps):  # NaN is above too
        reason = f"largest difference {max(gaps):.3g}{_cast_buffer(model, again)}"
        raise OutputError(f"the saved model gives other results after reloading ({reason})")


def _cast_buffer(model: nn.Module, again: nn.Module) -> str:
    """A hint where a model was cast as a whole: files do not hold every buffer, loading makes them as they were."""
    fresh = dict(again.named_buffers())
    for name, buffer in model.named_buffers():
        if name in fresh and fresh[name].dtype != buffer.dtype:
            return f"; buffer '{name}' was cast to {buffer.dtype}: load the model in that dtype instead of casting it"
    return ""


def _logit_gap(model: nn.Module, again: nn.Module, probe: Batch) -> float:
    moved = probe.to(device_of(model))
    expected, found = float_tensors(run(model, moved)), float_tensors(run(again, moved))
    if len(expected) != len(found):
        return float("inf")
    return max((difference(a, b) for a, b in zip(expected, found, strict=True)), default=0.0)


def _gap(expected: Tensor, found: Tensor) -> float:
    """Largest difference; NaN and infinity count as equal where both have the same."""
    return float(torch.where(expected.eq(found) | (expected.isnan() & found.isnan()), 0, expected - found).abs().max())


def _tensor_gap(model: nn.Module, again: nn.Module) -> float:
    mine, theirs = model.state_dict(), again.state_dict()
    if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in mine):
        return float("inf")
    return max((_gap(mine[name].float(), theirs[name].float()) for name in mine if mine[name].numel()), default=0.0)
