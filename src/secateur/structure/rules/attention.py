"""Attention as one function."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from secateur.structure.dims import Dim, concat, factor, product, size
from secateur.structure.observe import REPEATS, Observer
from secateur.structure.table import Call, function
from secateur.structure.traced import Slot, how, plain


@function(F.scaled_dot_product_attention)
def scaled_dot_product(run: Observer, call: Call) -> None:
    """[..., heads, tokens, head_dim]: head dims of queries and keys meet, heads run side by side."""
    q, k, v = (call.get(i, name) for i, name in enumerate(("query", "key", "value")))
    mask = call.get(3, "attn_mask")
    queries, keys, values = (list(run.dims(tensor)) for tensor in (q, k, v))
    inner = run.same(queries[-1], keys[-1])
    if call.kwargs.get("scale") is None:
        run.statistic([inner], [q, k, v])
    for dim in (run.same(keys[-2], values[-2]), queries[-2]):
        run.fix(dim, "positions attend to each other")
    batch: list[Dim] = []
    for a, b, c in zip(queries[:-2], keys[:-2], values[:-2], strict=True):
        run.same(b, c)
        if size(a) != size(b) and size(b) > 1:  # enable_gqa: query head h uses key/value head h // repeats
            groups, repeats = factor(a, size(a) // size(b), run.reason("heads share keys and values"))
            run.same(groups, b)
            for name in REPEATS:
                run.require(run.attribute(name), repeats)
            batch.append(a)
        else:
            if size(b) == 1:
                _shared_by_all(run, a)
            batch.append(a if size(b) == 1 else run.same(a, b))
    if mask is not None:
        _mask(run, mask, [*batch, queries[-2], keys[-2]])
    if len(batch) > 1:
        run.role("heads", batch[-1])
        run.role("keys", keys[-3])
    run.role("head_dim", inner)
    run.role("head_dim", values[-1])
    if call.out is None:
        call.out = run.make([*q.shape[:-1], v.shape[-1]], q)
    run.set(call.out, [*run.dims(q)[:-1], values[-1]])
    run.multiply(1, *batch, queries[-2], keys[-2], inner)
    run.multiply(1, *batch, queries[-2], keys[-2], values[-1])


def _shared_by_all(run: Observer, heads: Dim) -> None:
    """One key for all queries: the number of repeats is the number of heads."""
    for name in REPEATS:
        expression = run.attribute(name)
        if isinstance(expression, Slot) and expression.value == size(heads):
            run.require(expression, heads)


def _mask(run: Observer, mask: torch.Tensor, dims: list[Dim]) -> None:
    for position, dim in enumerate(reversed(run.dims(mask)), 1):
        if size(dim) > 1 and position <= len(dims):
            run.same(dims[-position], dim)


@function(F.multi_head_attention_forward)
def multi_head(run: Observer, call: Call) -> None:
    """Torch's packed attention computes its head width from the embedding: the embedding is made of the heads."""
    names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    tail = ("bias_k", "bias_v", "add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias")
    given |= dict(zip(tail, call.args[len(names) :], strict=False))
    query, key = given["query"], given["key"]
    if given.get("use_separate_proj_weight") or given.get("bias_k") is not None:
        for tensor in call.tensors:
            for dim in run.dims(tensor):
                run.fix(dim, "separate key and value widths")
    width = query.shape[-1]
    heads = plain(given["num_heads"])
    stream = run.dims(query)[-1]
    for dim in (*run.dims(query)[:-1], *run.dims(key)[:-1]):
        run.fix(dim, "positions attend to each other")
    for tensor in (key, given["value"]):
        stream = run.same(stream, run.dims(tensor)[-1])
    outer, inner = factor(stream, width // heads, run.reason("the embedding is made of heads"))
    run.require(run.attribute("num_heads") or how(given["num_heads"]), outer)
    run.require(run.attribute("embed_dim") or how(given["embed_dim_to_check"]), product(outer, inner))
    for name, dim in (("head_dim", inner), ("kdim", product(outer, inner)), ("vdim", product(outer, inner))):
        run.require(run.attribute(name), dim)
    run.role("heads", outer)
    run.role("head_dim", inner)
    _projections(run, given, product(outer, inner))
    run.statistic([product(outer, inner)], [query, key, given["value"]])
    call.out = _attended(run, given, query, key, product(outer, inner))


def _projections(run: Observer, given: dict[str, Any], stream: Dim) -> None:
    """in_proj [3 * width, width] and out_proj [width, width]."""
    packed = concat(stream, stream, stream)
    if given.get("in_proj_weight") is not None:
        rows, columns = run.dims(given["in_proj_weight"])
        run.same(rows, packed)
        run.same(columns, stream)
    if given.get("in_proj_bias") is not None:
        run.same(run.dims(given["in_proj_bias"])[0], packed)
    for dim in (*run.dims(given["out_proj_weight"]),):
        run.same(dim, stream)
    if given.get("out_proj_bias") is not None:
        run.same(run.dims(given["out_proj_bias"])[0], stream)


def _attended(
    run: Observer, given: dict[str, Any], query: torch.Tensor, key: torch.Tensor, stream: Dim
) -> tuple[torch.Tensor, torch.Tensor | None]:
    tokens, source = query.shape[0], key.shape[0]
    batched = query.dim() == 3
    batch = query.shape[1] if batched else 1
    run.multiply(tokens * batch, stream, stream)
    run.multiply(tokens * batch, stream, stream)
    run.multiply(2 * source * batch, stream, stream)
    run.multiply(2 * batch * tokens * source, stream)
    out = run.make(query.shape, query)
    run.set(out, [*run.dims(query)[:-1], stream])
    if not given.get("need_weights", True):
        return out, None
    heads = () if given.get("average_attn_weights", True) else (plain(given["num_heads"]),)
    return out, run.make([*((batch,) if batched else ()), *heads, tokens, source], query)
