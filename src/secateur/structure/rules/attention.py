"""Attention as one function."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from secateur.structure.dims import Dim, factor, size
from secateur.structure.observe import Observer
from secateur.structure.table import Call, function


@function(F.scaled_dot_product_attention)
def scaled_dot_product(run: Observer, call: Call) -> None:
    """[..., heads, tokens, head_dim]: head dims of queries and keys meet, heads run side by side."""
    q, k, v = (call.get(i, name) for i, name in enumerate(("query", "key", "value")))
    mask = call.get(3, "attn_mask")
    queries, keys, values = (list(run.dims(tensor)) for tensor in (q, k, v))
    inner = run.same(queries[-1], keys[-1])
    if call.kwargs.get("scale") is None:
        run.statistic([inner], [q, k, v])
    run.same(keys[-2], values[-2])
    batch: list[Dim] = []
    for a, b, c in zip(queries[:-2], keys[:-2], values[:-2], strict=True):
        run.same(b, c)
        if size(a) != size(b) and size(b) > 1:  # enable_gqa: query head h uses key/value head h // repeats
            groups, _ = factor(a, size(a) // size(b), run.reason("heads share keys and values"))
            run.same(groups, b)
            batch.append(a)
        else:
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


def _mask(run: Observer, mask: torch.Tensor, dims: list[Dim]) -> None:
    for position, dim in enumerate(reversed(run.dims(mask)), 1):
        if size(dim) > 1 and position <= len(dims):
            run.same(dims[-position], dim)


@function(F.multi_head_attention_forward)
def multi_head(run: Observer, call: Call) -> None:
    """torch's packed attention computes its head width from the embedding: width and heads keep what they have."""
    names = ("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias")
    given = dict(zip(names, call.args, strict=False)) | call.kwargs
    query, key = given["query"], given["key"]
    why = "nn.MultiheadAttention computes its head width from the embedding"
    for tensor in call.tensors:
        for dim in run.dims(tensor):
            run.fix(dim, why)
    width, tokens, source = query.shape[-1], query.shape[0], key.shape[0]
    batch = query.shape[1] if query.dim() == 3 else 1
    run.multiply(tokens * batch, 2 * width, width)
    run.multiply(source * batch, 2 * width, width)
    run.multiply(2 * batch * tokens * source, width)
    average = given.get("average_attn_weights", True)
    heads = () if average else (int(given["num_heads"]),)
    lead = (batch,) if query.dim() == 3 else ()
    weights = run.make([*lead, *heads, tokens, source], query) if given.get("need_weights", True) else None
    call.out = (run.make(query.shape, query), weights)


