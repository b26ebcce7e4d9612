"""Whether a cut transformers model is one that its own config can say, and who can load the folder then."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from secateur.core.plan import Plan
from secateur.core.units import Site, UnitKind
from secateur.shrink.cut import AttributeChange, structured
from secateur.shrink.depth import renumbered

FIELDS: dict[UnitKind, tuple[str, ...]] = {
    UnitKind.NEURON: (
        "intermediate_size",
        "n_inner",
        "ffn_dim",
        "d_ff",
        "hidden_dim",
        "encoder_ffn_dim",
        "decoder_ffn_dim",
        "mlp_dim",
        "moe_intermediate_size",
    ),
    UnitKind.HEAD: ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads"),
    UnitKind.KV_GROUP: ("num_key_value_heads", "num_kv_heads"),
    UnitKind.HEAD_DIM: ("head_dim", "attention_head_size", "d_kv"),
    UnitKind.EMBEDDING: ("hidden_size", "n_embd", "d_model", "embed_dim"),
    UnitKind.EXPERT: ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"),
}
"""Kinds of unit -> the names that configs give to their number."""


CHOSEN = "num_experts_per_tok"  # how many experts a token takes


def plain_config(model: Any, plan: Plan) -> Any | None:
    """A config whose plain model has exactly the cut model's shapes and sizes; None if there is none.

    Args:
        model: the transformers model after the cut.
        plan: the plan that was applied; its `attributes` are compared with what the config builds.
    """
    for config in _candidates(model.config, plan):
        if _builds_the_same(model, config, plan):
            return config
    return None


def _candidates(config: Any, plan: Plan) -> Iterator[Any]:
    sites = [plan.sites[name] for name in structured(plan) if not bool(plan.masks[name].all())]
    changed = copy.deepcopy(config)
    for part, dense in zip(_parts(changed), _parts(config), strict=True):
        for site in sites:
            _tell(part, dense, site, plan)
        for addition in plan.additions:
            if addition["kind"] == "experts" and hasattr(part, CHOSEN):
                setattr(part, CHOSEN, addition["chosen"])
    yield changed


def _parts(config: Any) -> list[Any]:
    """The config and the configs inside it."""
    inner = [value for value in vars(config).values() if hasattr(value, "to_dict") and hasattr(value, "model_type")]
    return [config, *inner]


def _tell(config: Any, dense: Any, site: Site, plan: Plan) -> None:
    """Give the config the number of units that one site keeps, where the dense one has the old number."""
    kept = plan.kept(site.name)
    for field in FIELDS.get(site.kind, ()):
        if getattr(dense, field, None) == site.units:
            if site.kind in (UnitKind.HEAD, UnitKind.KV_GROUP):
                _spell_out_head_dim(config, dense)
            setattr(config, field, kept)
    if site.kind is UnitKind.KV_GROUP:
        heads = getattr(dense, "num_attention_heads", 0)
        if heads and heads % site.units == 0:
            config.num_attention_heads = heads // site.units * kept
    if site.kind is UnitKind.HEAD and getattr(dense, "num_key_value_heads", None) == site.units:
        config.num_key_value_heads = kept


def _spell_out_head_dim(config: Any, dense: Any) -> None:
    """Without this, a config would compute the head width from the new number of heads."""
    heads, width = getattr(dense, "num_attention_heads", None), getattr(dense, "hidden_size", None)
    if hasattr(config, "head_dim") and not config.head_dim and heads and width:
        config.head_dim = width // heads


def _builds_the_same(model: nn.Module, config: Any, plan: Plan) -> bool:
    try:
        with torch.device("meta"):
            plain = type(model)(config)
    except Exception:
        return False  # configs check themselves in many ways; any complaint means that this one cannot say it
    mine, theirs = model.state_dict(), plain.state_dict()
    if mine.keys() != theirs.keys() or any(mine[name].shape != theirs[name].shape for name in mine):
        return False
    buffers = dict(plain.named_buffers())
    if any(name in buffers and buffers[name].shape != buffer.shape for name, buffer in model.named_buffers()):
        return False
    changes = (replace(change, module=now) for change, now in _after_blocks(plan))
    return all(_has(plain, change) for change in changes)


def _after_blocks(plan: Plan) -> Iterator[tuple[AttributeChange, str]]:
    """Every changed attribute, and the name that its module has once the plan's blocks are gone too."""
    for change in (AttributeChange(**entry) for entry in plan.attributes):
        now = renumbered(change.module, plan)
        if now is not None:
            yield change, now


def _has(model: nn.Module, change: AttributeChange) -> bool:
    owner: Any = model.get_submodule(change.module)
    owner = owner if change.on_config is None else getattr(owner, change.on_config)
    value = getattr(owner, change.attribute, None)
    value = value if change.index is None or value is None else value[change.index]
    return bool(value == change.value)


EXPORTED = "by `secateur export`"


def runtimes(kind: str, layout: str) -> dict[str, str]:
    """Who takes the folder, in a few words each.

    Args:
        kind: `transformers` or `module`.
        layout: `plain` (the config says all widths) or `uneven`.
    """
    if kind != "transformers":
        return {"secateur.load": "yes, with its factory", "ONNX": EXPORTED}
    if layout == "plain":
        served = "if it knows the architecture"
        return {"transformers": "plain from_pretrained", "vLLM": served, "llama.cpp": served, "ONNX": EXPORTED}
    refused = "no, the config cannot say these widths or biases; prune with layout=uniform"
    return {
        "secateur.load": "yes",
        "transformers": "with trust_remote_code",
        "vLLM": refused,
        "llama.cpp": refused,
        "ONNX": EXPORTED,
    }
