"""Optimal-Brain-Surgeon compensation of one layer (Frantar and Alistarh 2023, SparseGPT).

Letters: O outputs, I inputs, W `[O, I]` weights, H `[I, I]` Hessian of the layer's squared output
error, U upper Cholesky factor of the inverse: H^-1 = U^T U.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.errors import NumericsError
from secateur.core.select import all_finite

MaskRule = Callable[[Tensor, Tensor], Tensor]
"""(compensated weights `[O, b]`, diagonal of U `[b]`) of the columns ahead -> keep-mask `[O, b]`."""


@dataclass(frozen=True)
class InverseFactor:
    """U, the inputs that are always zero, and the damping that was needed (fraction of mean diag H)."""

    upper: Tensor
    dead: Tensor
    damping: float


def inverse_factor(hessian: Tensor, damping: float = 0.01) -> InverseFactor:
    """Upper Cholesky factor of the damped inverse Hessian.

    Inputs that are always zero get a unit diagonal. If the factorisation fails the damping is
    raised tenfold, up to 1e3 times the mean diagonal, and the value used is reported.

    Raises:
        NumericsError: no damping helped (the Hessian is not a second moment).
    """
    dead = hessian.diagonal() == 0
    kind = torch.float64 if hessian.device.type == "cpu" else torch.float32
    diagonal = hessian.diagonal().to(kind) + dead
    mean = diagonal.mean()
    used = damping
    while used <= 1e3:
        # read from the far corner, H = R R^T with R upper, so H^-1 = U^T U with U = R^-1: no inverse of H is needed
        flipped = hessian.flip(0, 1).to(kind)
        flipped.diagonal().copy_((diagonal + used * mean).flip(0))
        lower, info = torch.linalg.cholesky_ex(flipped)
        del flipped  # these matrices are the largest things in memory where layers are wide
        if not info:
            upper = lower.flip(0, 1)
            del lower
            inverse_upper_(upper)
            if all_finite(upper.diagonal()) and torch.isfinite(upper.sum()):
                return InverseFactor(upper.to(torch.float32), dead, used)
        used = max(used * 10, 1e-8)
    raise NumericsError("the Hessian cannot be factorised even when strongly damped")


LEAF = 64  # rows below which a triangle is inverted directly


def inverse_upper_(triangle: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, in place, by matrix products: n^3 / 3 multiplications.

    With [[A, B], [0, D]]^-1 = [[A^-1, -A^-1 B D^-1], [0, D^-1]], halves first.
    """
    n = len(triangle)
    if n <= LEAF:
        eye = torch.eye(n, dtype=triangle.dtype, device=triangle.device)
        return triangle.copy_(torch.linalg.solve_triangular(triangle, eye, upper=True))
    half = n // 2
    first, last = inverse_upper_(triangle[:half, :half]), inverse_upper_(triangle[half:, half:])
    triangle[:half, half:] = -(first @ triangle[:half, half:]) @ last
    return triangle


@dataclass(frozen=True)
class Sweep:
    """Result of `sweep`.

    Attributes:
        weight: new weights.
        keep: what was kept.
        error: exactly 1/2 sum over rows of d H d, d the change of the row and H the damped Hessian; with
            H = 2/N X X^T and without damping that is the layer's squared output error / N. Zeroing dead
            inputs costs nothing.
    """

    weight: Tensor
    keep: Tensor
    error: float


def sweep(
    weight: Tensor,
    factor: InverseFactor,
    rule: MaskRule,
    *,
    width: int = 128,
    lookahead: int | None = None,
    quantise: Callable[[Tensor], Tensor] | None = None,
) -> Sweep:
    """Walk the columns left to right, zero what the rule drops, push the error onto the columns ahead.

    Args:
        weight: `[O, I]`, any float dtype; the work is done in float32.
        factor: of the layer's Hessian.
        rule: chooses the mask of the next columns from weights that already carry the compensation.
        width: columns per lazy block; the update to the right of a block is one matrix product.
        lookahead: how many columns the rule decides at once; None = a whole block.
        quantise: rounds a column `[O]` to its grid; must map 0 to 0.
    """
    W = weight.detach().clone().float()
    U = factor.upper
    W[:, factor.dead] = 0
    keep = torch.ones_like(W, dtype=torch.bool)
    error = torch.zeros((), dtype=torch.float64, device=W.device)
    for start in range(0, W.shape[1], width):
        end = min(start + width, W.shape[1])
        inside = slice(start, end)
        block = _Block(W[:, inside], keep[:, inside], U[inside, inside])
        errors = block.solve(rule, lookahead or width, quantise)
        error += errors.square().sum(dtype=torch.float64)
        W[:, end:] -= errors @ U[inside, end:]
    return Sweep(W.to(weight.dtype), keep, error.item() / 2)


NEAR = 16  # columns that are updated one by one


@dataclass(frozen=True)
class _Block:
    """Views of one block of columns: weights `[O, b]`, mask `[O, b]`, factor `[b, b]`."""

    W: Tensor
    keep: Tensor
    U: Tensor

    def solve(self, rule: MaskRule, ahead: int, quantise: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Zero and compensate column by column, in place; returns the scaled errors `[O, b]`.

        The loop runs on a transposed copy: rows of a contiguous `[b, O]` are columns of W. Errors reach the next
        few columns at once and the others of the block by one matrix product for every few columns.
        """
        columns = self.W.t().contiguous()  # (b, O)
        keep = self.keep.t().contiguous()
        errors = torch.empty_like(columns)
        diagonal = self.U.diagonal().tolist()
        near = -(-NEAR // ahead) * ahead if ahead < len(columns) else NEAR
        for start in range(0, len(columns), near):
            end = min(start + near, len(columns))
            for i in range(start, end):
                if i % ahead == 0:
                    mask = rule(columns[i : i + ahead].t(), self.U.diagonal()[i : i + ahead])
                    keep[i : i + ahead] = mask.t()
                value = columns[i] * keep[i]
                if quantise is not None:
                    value = quantise(value)
                torch.sub(columns[i], value, out=errors[i])
                errors[i].div_(diagonal[i])
                columns[i] = value
                columns[i + 1 : end].addr_(self.U[i, i + 1 : end], errors[i], alpha=-1)
            columns[end:].addmm_(self.U[start:end, end:].t(), errors[start:end], alpha=-1)
        self.W.copy_(columns.t())
        self.keep.copy_(keep.t())
        return errors.t()


def solve_on_support(weight: Tensor, hessian: Tensor, keep: Tensor) -> Tensor:
    """The exact optimum of the layer's squared error for a given mask: w_K = H_KK^-1 (H w)_K per row.

    Args:
        weight: `[O, I]`.
        hessian: `[I, I]`, positive definite on every row's support.
        keep: bool `[O, I]`.

    Returns:
        float64 `[O, I]`, zero outside the mask.
    """
    W, H = weight.double(), hessian.double()
    solved = torch.zeros_like(W)
    target = W @ H
    for row in range(len(W)):
        support = keep[row].nonzero().squeeze(1)
        if len(support):
            solved[row, support] = torch.linalg.solve(H[support][:, support], target[row, support])
    return solved
