"""One linear layer in several layouts: dense, sparse, smaller. What `machine` puts the stopwatch to."""

from __future__ import annotations

import importlib
import importlib.util
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from enum import StrEnum
from functools import cache
from math import sqrt
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from secateur.core.budget import Pattern
from secateur.core.seeding import generator
from secateur.core.select import keep_pattern, keep_top

OUT, IN = 4096, 1024

Product = Callable[[], Any]


class Layout(StrEnum):
    """How the weight `[4096, 1024]` is stored and multiplied."""

    DENSE = "dense float32"
    BFLOAT16 = "dense bfloat16"
    CSR_90 = "90 % zeros, CSR"
    CSR_99 = "99 % zeros, CSR"
    TWO_OF_FOUR = "2:4 zeros"
    ROWS = "90 % of the rows removed"
    ONNXRUNTIME = "dense float32, onnxruntime"


def weight() -> Tensor:
    """The layer's weight, float32 `[4096, 1024]`, the same on every call."""
    return torch.randn(OUT, IN, generator=generator(0, "probe", "weight")) / sqrt(IN)


def inputs(batch: int) -> Tensor:
    """Inputs, float32 `[batch, 1024]`, the same on every call."""
    return torch.randn(batch, IN, generator=generator(0, "probe", "inputs"))


def masked(layout: Layout) -> Tensor:
    """The dense float32 weight that a layout stands for: zeros written in, or rows left out."""
    dense = weight()
    scores = torch.rand(OUT, IN, generator=generator(0, "probe", "scores"))
    match layout:
        case Layout.CSR_90 | Layout.CSR_99:
            kept = dense.numel() // (10 if layout is Layout.CSR_90 else 100)
            return dense.mul(keep_top(scores.flatten(), kept).view_as(dense))
        case Layout.TWO_OF_FOUR:
            return dense.mul(keep_pattern(scores, Pattern(2, 4)))
        case Layout.ROWS:
            return dense[: OUT // 10].clone()
        case _:
            return dense


def stored(layout: Layout, device: torch.device) -> Any:
    """The weight of a torch layout on a device, ready for `product`.

    Raises:
        RuntimeError: this torch or this machine lacks the layout; the message says what.
    """
    dense = masked(layout).to(device)
    match layout:
        case Layout.BFLOAT16:
            if device.type == "cpu" and (trouble := bfloat16_trouble()):
                raise RuntimeError(trouble)
            return dense.bfloat16()
        case Layout.TWO_OF_FOUR if device.type == "cuda":
            from torch.sparse import to_sparse_semi_structured

            return to_sparse_semi_structured(dense.bfloat16())
        case Layout.CSR_90 | Layout.CSR_99 | Layout.TWO_OF_FOUR:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
                return dense.to_sparse_csr()
        case _:
            return dense


def product(layout: Layout, stored_weight: Any, batch: int, device: torch.device) -> Product:
    """A callable that multiplies `batch` inputs with the weight; gives `[batch, out]`."""
    x = inputs(batch).to(device)
    if layout is Layout.ONNXRUNTIME:
        return _onnx_product(batch)
    if stored_weight.layout is torch.sparse_csr:
        columns = x.t().contiguous()  # (in, batch): the sparse matrix stands on the left

        def transposed() -> Tensor:
            return torch.matmul(stored_weight, columns).t()

        return transposed
    x = x.to(stored_weight.dtype)
    return lambda: F.linear(x, stored_weight)


@cache
def bfloat16_trouble() -> str | None:
    """Why bfloat16 products cannot be run on this CPU, or None where they can.

    Tried in a child process: on virtual machines that announce matrix instructions (AMX) which the host
    forbids, the first product ends the process, and no error can be caught.
    """
    code = (
        "import torch; torch.set_num_threads(1); "
        f"torch.nn.functional.linear(torch.ones(16, {IN}).bfloat16(), torch.ones({OUT}, {IN}).bfloat16())"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"a trial of a bfloat16 product in a process of its own failed: {error}"
    if done.returncode == -signal.SIGILL:
        return (
            "a bfloat16 product ends the process with an illegal instruction; "
            "the environment variable ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 may help"
        )
    return None if done.returncode == 0 else f"a trial of a bfloat16 product ended with code {done.returncode}"


def has_onnxruntime() -> bool:
    """Whether onnxruntime, and onnx to write the layer for it, are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("onnxruntime", "onnx"))


def _onnx_product(batch: int) -> Product:
    onnx = importlib.import_module("onnx")
    runtime = importlib.import_module("onnxruntime")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    transposed = onnx.numpy_helper.from_array(weight().t().contiguous().numpy(), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "linear",
        [helper.make_tensor_value_info("x", kind, [batch, IN])],
        [helper.make_tensor_value_info("y", kind, [batch, OUT])],
        [transposed],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feed = {"x": inputs(batch).numpy()}
    return lambda: session.run(None, feed)[0]
