"""One factor for every unit that stays, so that a layer which lost units gives again what it gave (mask tuning).

For a layer with inputs X' [T, I] and weight W [O, I], kept inputs K and targets Y [T, O]:

    min over m of ||Y - sum over j in K of m_j X'_j W_j^T||^2 + lambda ||m - 1||^2
    (A + lambda I) m = b + lambda 1,   A = (X'_K^T X'_K) o (W_K^T W_K),   b_j = X'_j^T Y W_j

with the elementwise product o and lambda a fraction of the mean of A's diagonal. Where a unit has several inputs (a
head), A and b are summed over them. A and b are sums over rows, so batches stream through; everything is float64.
The factors go into the weight's columns and cost nothing at run time. After Kwon et al. 2022 (NeurIPS, arXiv
2204.09656), whose tuning of masks this form follows; a full least-squares fit is `recover.obs.solve_on_support`.

Letters: T rows (tokens), I inputs, O outputs, K kept units, w inputs of a unit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.core.distributed import total, total_count
from secateur.core.select import all_finite

HELD_OUT = 5  # every fifth sequence decides whether the factors are taken
LARGEST = 10.0


class Sums:
    """A, b and ||Y||^2 over some rows."""

    def __init__(self, units: int):
        self.gram = torch.zeros(units, units, dtype=torch.float64)
        self.cross = torch.zeros(units, dtype=torch.float64)
        self.energy = torch.zeros((), dtype=torch.float64)
        self.rows = 0

    def add(self, inputs: Tensor, target: Tensor, weight: Tensor, width: int) -> None:
        """Take in rows: `inputs` `[T, K * w]`, `target` `[T, O]`, `weight` `[O, K * w]`, all float64."""
        self.rows += len(inputs)
        gram = (inputs.t() @ inputs).mul_(weight.t() @ weight)
        cross = (inputs * (target @ weight)).sum(0)
        units = len(cross) // width
        if width > 1:
            gram = gram.view(units, width, units, width).sum((1, 3))
        self.gram = self.gram.to(gram.device) + gram
        self.cross = self.cross.to(gram.device) + cross.view(units, width).sum(1)
        self.energy = self.energy.to(gram.device) + target.square().sum()

    def reduce(self) -> None:
        """The sums over the rows of all processes."""
        self.gram, self.cross, self.energy = total(self.gram), total(self.cross), total(self.energy)
        self.rows = total_count(self.rows)

    def error(self, factors: Tensor) -> float:
        """||Y - sum m_j X_j W_j^T||^2."""
        m = factors.to(self.gram)
        return max(0.0, float(self.energy - 2 * m @ self.cross + m @ self.gram @ m))

    def __add__(self, other: Sums) -> Sums:
        found = Sums(0)
        found.gram, found.cross = self.gram + other.gram.to(self.gram), self.cross + other.cross.to(self.cross)
        found.energy, found.rows = self.energy + other.energy.to(self.energy), self.rows + other.rows
        return found


@dataclass(frozen=True)
class Tuned:
    """What a fit came to.

    Attributes:
        factors: m `[K]` float64; all 1 where the solution was not taken.
        accepted: whether it was taken.
        before, after: ||Y - Y'|| / ||Y|| over all rows, with m = 1 and with `factors`.
    """

    factors: Tensor
    accepted: bool
    before: float
    after: float

    def facts(self) -> dict[str, float]:
        """The figures for a report."""
        return {
            "error_before": round(self.before, 6),
            "error_after": round(self.after, 6),
            "factor_min": round(float(self.factors.min()), 6),
            "factor_median": round(float(self.factors.median()), 6),
            "factor_max": round(float(self.factors.max()), 6),
            "accepted": float(self.accepted),
        }


class MaskTuning:
    """Collects the rows of one layer and finds the factors of its kept units.

    Args:
        weight: the layer's columns that read the kept units, `[O, K * w]`, unit after unit.
        units: K.
        sequences: of the whole calibration set; below five, single rows are held out instead of sequences.
    """

    def __init__(self, weight: Tensor, units: int, sequences: int):
        self.weight, self.units, self.sequences = weight.double(), units, sequences
        self.width = weight.shape[1] // max(1, units)
        self.fitted, self.held = Sums(units), Sums(units)
        self._seen = 0

    def update(self, inputs: Tensor, target: Tensor, samples: int) -> None:
        """Take in a batch: what the kept units send, `[T, K * w]`, and what the layer should give, `[T, O]`."""
        held = self._held(len(inputs), samples).to(inputs.device)
        for rows, sums in ((~held, self.fitted), (held, self.held)):
            sums.add(inputs[rows].double(), target[rows].double(), self.weight, self.width)
        self._seen += samples

    def _held(self, rows: int, samples: int) -> Tensor:
        places = torch.arange(rows)
        if self.sequences >= HELD_OUT:
            places = self._seen + places // max(1, rows // samples)
        return places % HELD_OUT == HELD_OUT - 1

    def solve(self, damping: float = 1e-3) -> Tuned:
        """The factors, if they are finite, none is beyond 10 in size, and the error on held-out rows falls.

        Args:
            damping: lambda as a fraction of the mean of A's diagonal, pulling towards m = 1.
        """
        self.fitted.reduce()
        self.held.reduce()
        ones, everything = torch.ones(self.units, dtype=torch.float64), self.fitted + self.held
        found = solved(self.fitted.gram, self.fitted.cross, damping).cpu()
        fits = all_finite(found) and bool((found.abs() <= LARGEST).all())
        accepted = fits and self.held.error(found) < self.held.error(ones)
        factors = found if accepted else ones
        return Tuned(factors, accepted, _relative(everything, ones), _relative(everything, factors))


def _relative(sums: Sums, factors: Tensor) -> float:
    size = float(sums.energy)
    return (sums.error(factors) / size) ** 0.5 if size else 0.0


def solved(gram: Tensor, cross: Tensor, damping: float) -> Tensor:
    """Solve (A + lambda I) m = b + lambda 1; NaN where A cannot be factorised."""
    strength = damping * gram.diagonal().mean()
    matrix = gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    lower, info = torch.linalg.cholesky_ex(matrix)
    if info:
        return torch.full_like(cross, torch.nan)
    return torch.cholesky_solve((cross + strength)[:, None], lower)[:, 0]
