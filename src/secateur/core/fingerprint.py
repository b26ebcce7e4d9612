"""Fingerprints: which model and which data a plan was made for."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn


def tensor_digest(tensor: Tensor) -> str:
    """A hash of the tensor's bytes (16 hex digits); `"meta"` where there are no bytes."""
    if tensor.device.type == "meta":
        return "meta"
    data = memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return hashlib.blake2b(data, digest_size=8).hexdigest()


def describe(tensor: Tensor) -> str:
    """Dtype and shape in one word, e.g. `float32[64, 32]`."""
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name -> `dtype[shape] digest` for every tensor, sorted by name."""
    return {name: f"{describe(tensors[name])} {tensor_digest(tensors[name])}" for name in sorted(tensors)}


def model_digest(model: nn.Module) -> str:
    """One hash over a model's tensors, their names and what its modules are; its class before it."""
    stored = model.state_dict()
    words = re.sub(r" at 0x[0-9a-f]+", "", repr(model))  # addresses of functions change from process to process
    total = hashlib.blake2b(f"{words} {sorted(stored)}".encode(), digest_size=8)
    total.update(data_digest(stored[name] for name in sorted(stored)).encode())
    return f"{type(model).__name__} {total.hexdigest()}"


def data_digest(tensors: Iterable[Tensor]) -> str:
    """One hash over a sequence of tensors, order included."""
    total = hashlib.blake2b(digest_size=8)
    for tensor in tensors:
        total.update(f"{describe(tensor)} {tensor_digest(tensor)}".encode())
    return total.hexdigest()


def mismatches(
    tensors: Mapping[str, Tensor], expected: Mapping[str, str], also: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Pairs (name, what differs) between a model's tensors and a stored fingerprint.

    A tensor agrees when it equals its entry in `expected` (the model as it was planned on) or in
    `also` (the same after the plan was applied), which may hold parameters that the plan adds.
    """
    for name in sorted(tensors.keys() - expected.keys()):
        if name not in also:
            yield name, "is not in the planned model"
        elif digests({name: tensors[name]})[name] != also[name]:
            yield name, "has other values"
    for name, entry in expected.items():
        if name not in tensors:
            yield name, "is missing"
        elif describe(tensors[name]) != entry.rpartition(" ")[0]:
            yield name, f"is {describe(tensors[name])}, planned on {entry.rpartition(' ')[0]}"
        else:
            digest = tensor_digest(tensors[name])
            planned = {entry.rpartition(" ")[2], also.get(name, entry).rpartition(" ")[2]}
            if digest not in planned and "meta" not in planned | {digest}:
                yield name, "has other values"
