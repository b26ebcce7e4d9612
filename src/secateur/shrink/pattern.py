"""Whether weights really have an N:M pattern: counted everywhere, and tried on torch's 2:4 kernels on CUDA."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.core.budget import Pattern
from secateur.core.errors import OutputError
from secateur.core.plan import Plan
from secateur.core.units import Layout, UnitKind
from secateur.structure.fused import DIMS
from secateur.structure.layers import to_matrix

CUDA_MULTIPLE = 64  # rows and columns that torch's semi-structured kernels ask for


def pattern_of(plan: Plan) -> Pattern | None:
    """The pattern that the plan was asked for, if it was."""
    found = {str(entry.budget["pattern"]) for entry in plan.provenance if entry.budget.get("pattern")}
    return Pattern.parse(found.pop()) if len(found) == 1 else None


def check_patterns(model: nn.Module, plan: Plan) -> None:
    """`check_pattern` for all of a model's parameters.

    Raises:
        OutputError: names the first layer that does not hold the pattern.
    """
    pattern = pattern_of(plan)
    if pattern is not None:
        for name, parameter in model.named_parameters():
            check_pattern(plan, pattern, name, parameter.detach())


def check_pattern(plan: Plan, pattern: Pattern, name: str, value: Tensor) -> None:
    """Count the weights that are not zero in every group of a layer; on a CUDA device also compress and multiply.

    Raises:
        OutputError: a group holds too many, or the compressed weight gives other products; names the layer.
    """
    site = plan.sites.get(name)
    if site is None or site.kind is not UnitKind.WEIGHT:
        return
    several = value.dim() == DIMS and site.layout is Layout.LINEAR  # a matrix for each of several experts
    matrices = value.flatten(0, -2) if several else to_matrix(value, site.layout)
    groups = matrices.reshape(-1, pattern.of)
    most = int(torch.count_nonzero(groups, dim=1).max()) if groups.numel() else 0
    if most > pattern.keep:
        raise OutputError(f"'{name}' keeps {most} of {pattern.of} inputs somewhere, {pattern} was asked for")
    if value.is_cuda and (pattern.keep, pattern.of) == (2, 4) and all(n % CUDA_MULTIPLE == 0 for n in matrices.shape):
        _check_kernel(name, matrices)


def _check_kernel(name: str, matrix: Tensor) -> None:
    half = matrix.half().contiguous()
    x = torch.eye(half.shape[1], dtype=half.dtype, device=half.device)
    product = torch.sparse.to_sparse_semi_structured(half) @ x
    if not torch.equal(product, half):
        raise OutputError(
            f"'{name}' gives other products when torch compresses it to 2:4; save it with another pattern"
        )
