"""Local pruning of one layer by groups of inputs, with compensation (Tyr-the-Pruner, Li et al. 2025, arXiv 2503.09657).

A group is what goes as a whole: the columns of an output projection that one head fills, or one column that a
neuron fills. Groups go in rounds; after every round the weights that are left make up for it, and at the end they
are solved for exactly on the inputs that stay:

    f(W) = 1/2 tr(W^T H W) - tr(G^T W),  H = sum of x x^T over all tokens + damping,  G = H W of the dense weights

Letters: O outputs, I inputs; inside, W is `[I, O]`, the transpose of the layer's `[O, I]`, as in the paper.

The saliency of group S, P = H^-1 on the inputs that are left and W as compensated so far:

* paper: mean over the group's inputs p of |<G_p, W_p>| + |W_p|^2 / (2 P_pp);
* code: sum over the group of W * ((P_SS)^-1 W / 2 + G), signed, with the exact inverse of the group's block.

Units per round: the paper removes one head or 16 neurons at a time (`step`); the published code spreads what is to
go over 1 round for heads, 16 for neurons (`rounds`).

The published code zeroes rows and columns of H^-1 for groups whose weights are all zero, which is right only if their
inputs are zero too; here they are eliminated properly. It works in float32; here float64 on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor

from secateur.core.errors import BudgetError, NumericsError, SettingsError

ZERO = 1e-12  # a group whose absolute weights add up to this has been pruned already
SPARE = 8  # inputs that went are dropped from the inverse once they are this part of it


class Saliency(StrEnum):
    """Which score decides who goes."""

    PAPER = "paper"
    CODE = "code"


@dataclass(frozen=True)
class Pace:
    """How many groups go at once: `step` of them, or what is to go in `rounds` nearly equal parts.

    With a step the levels of one matrix lie on one path, each going on where the one before it stopped; with
    rounds every level has its own path.
    """

    step: int | None = None
    rounds: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.step, self.rounds) if value is not None]
        if len(given) != 1 or given[0] < 1:
            raise SettingsError(f"give either a step or rounds, 1 or more; got step={self.step}, rounds={self.rounds}")

    def parts(self, count: int) -> list[int]:
        """Groups per round, for `count` that go; the first rounds take the remainder."""
        if self.step is not None:
            return [min(self.step, count - done) for done in range(0, count, self.step)]
        rounds = min(self.rounds or 1, count)
        return [count // rounds + (index < count % rounds) for index in range(rounds)]


@dataclass(frozen=True)
class Pruned:
    """A matrix with some of its groups gone.

    Attributes:
        weight: `[O, I]` float32; zero in every column of a group that went.
        keep: bool `[groups]`.
        loss: f(W) of the module's docstring.
        error: |X (W - W_dense)|^2 / |X W_dense|^2, damping included.
    """

    weight: Tensor
    keep: Tensor
    loss: float
    error: float


class GroupOBS:
    """One matrix to be pruned at any number of levels.

    Args:
        weight: `[O, I]`, dense.
        hessian: `[I, I]`, the sum of x x^T over all tokens; a positive multiple changes only `Pruned.loss`.
        columns: int64 `[groups, width]`: the inputs of every group; together all inputs, each once.
        damping: added to the Hessian's diagonal, as a fraction of its mean.
        saliency: who goes.

    Raises:
        NumericsError: the Hessian cannot be inverted.
    """

    def __init__(
        self,
        weight: Tensor,
        hessian: Tensor,
        columns: Tensor,
        *,
        damping: float = 0.01,
        saliency: Saliency = Saliency.PAPER,
    ):
        if sorted(columns.flatten().tolist()) != list(range(weight.shape[1])):
            raise SettingsError(
                f"groups must hold each of the {weight.shape[1]} inputs once, got {columns.shape[0]} groups of "
                f"{columns.shape[1]} inputs"
            )
        self.dense, self.saliency = weight.detach(), saliency
        self.columns = columns.to(weight.device)
        dtype = torch.float64 if weight.device.type == "cpu" else torch.float32
        H = hessian.to(dtype)
        diagonal = H.diagonal()
        self.H = H + torch.diag(torch.full_like(diagonal, damping * diagonal.mean().item()))
        self.W = self.dense.to(dtype).t() * (diagonal != 0)[:, None]  # (I, O); nothing comes from dead inputs
        self.G = self.H @ self.W

    @cached_property
    def empty(self) -> Tensor:
        """The groups without weights, in order."""
        return (self.W.abs()[self.columns].sum((1, 2)) <= ZERO).nonzero().flatten()

    @cached_property
    def start(self) -> _Path:
        """Before the first round: the groups that have weights."""
        live = torch.ones(len(self.columns), dtype=torch.bool, device=self.W.device)
        live[self.empty] = False
        groups = live.nonzero().flatten()
        index = self.columns[groups].flatten()
        factor, info = torch.linalg.cholesky_ex(self.H[index][:, index])
        if info:
            raise NumericsError("the Hessian cannot be inverted; raise the damping")
        P = torch.cholesky_inverse(factor)
        return _Path(groups, self.W[index], self.G[index], P, self.columns.shape[1], [], torch.zeros_like(live[groups]))

    def prune(self, keep: int, pace: Pace) -> Pruned:
        """The matrix with `keep` groups."""
        return self.levels([keep], pace)[0]

    def levels(self, keeps: Sequence[int], pace: Pace) -> list[Pruned]:
        """The matrix at several numbers of kept groups, in the order asked for; one inverse serves all.

        Raises:
            BudgetError: a number that cannot be kept.
        """
        groups = len(self.columns)
        for keep in keeps:
            if not 0 <= keep <= groups:
                raise BudgetError(f"cannot keep {keep} of {groups} groups; the reachable range is 0 to {groups}")
        found: dict[int, Pruned] = {}
        path: _Path | None = None
        for keep in sorted(set(keeps), reverse=True):
            if path is None or pace.rounds is not None:
                path = self._path(keep)
            found[keep] = self._level(keep, path, pace)
        return [found[keep] for keep in keeps]

    def _path(self, keep: int) -> _Path | None:
        """From the start, where the way to `keep` groups needs rounds."""
        return self.start.copy() if 0 < keep < len(self.columns) - len(self.empty) else None

    def _level(self, keep: int, path: _Path | None, pace: Pace) -> Pruned:
        """Follow a path until `keep` groups are left."""
        groups = len(self.columns)
        if path is None or not keep:
            return self._result((list(range(groups)) if not keep else self.empty.tolist())[: groups - keep])
        for count in pace.parts(groups - keep - len(self.empty) - len(path.gone)):
            path.remove(count, self.saliency)
        return self._result(self.empty.tolist() + path.gone)

    def _result(self, gone: list[int]) -> Pruned:
        keep = torch.ones(len(self.columns), dtype=torch.bool, device=self.W.device)
        keep[gone] = False
        if not gone:
            return Pruned(self.dense.float(), keep, self._loss(self.W), 0.0)
        solved = self._solved(keep)
        change = solved - self.W
        whole = (self.W * self.G).sum().item()
        error = (change * (self.H @ change)).sum().item() / whole if whole else 0.0
        return Pruned(solved.t().float().contiguous(), keep, self._loss(solved), error)

    def _solved(self, keep: Tensor) -> Tensor:
        """W_K = (H_KK)^-1 G_K, zero elsewhere."""
        solved = torch.zeros_like(self.W)
        index = self.columns[keep].flatten()
        if len(index):
            factor, info = torch.linalg.cholesky_ex(self.H[index][:, index])
            if info and (self.W != 0).any():
                raise NumericsError("the Hessian cannot be inverted on the kept inputs; raise the damping")
            solved[index] = self.W[index] if info else torch.cholesky_solve(self.G[index], factor)
        return solved

    def _loss(self, W: Tensor) -> float:
        return (0.5 * W * (self.H @ W) - W * self.G).sum().item()


@dataclass
class _Path:
    """The state between rounds, on the inputs of `groups`, group after group.

    Attributes:
        groups: int64 `[g]`: their numbers in the matrix.
        W, G: `[g * width, O]`.
        P: `[g * width, g * width]`: the inverse of H on the inputs that have not gone; zero for those that have.
        width: inputs per group.
        gone: numbers of the groups that have gone, in order.
        dropped: which of `groups` are among them.
    """

    groups: Tensor
    W: Tensor
    G: Tensor
    P: Tensor
    width: int
    gone: list[int]
    dropped: Tensor

    def copy(self) -> _Path:
        return replace(self, W=self.W.clone(), P=self.P.clone(), gone=[], dropped=self.dropped.clone())

    def remove(self, count: int, saliency: Saliency) -> None:
        """One round: the `count` lowest groups go and the rest compensates."""
        scores = self._scores(saliency).masked_fill(self.dropped, torch.inf)
        if scores.isnan().any():
            raise NumericsError("the saliencies of groups contain NaN; check the weights and calibration data")
        picked = torch.argsort(scores, stable=True)[:count]
        self.gone += self.groups[picked].tolist()
        self._eliminate(self._inputs(picked))
        self.dropped[picked] = True
        if self.dropped.sum() * SPARE > len(self.dropped):
            self._shrink()

    def _inputs(self, picked: Tensor) -> Tensor:
        return (picked[:, None] * self.width + torch.arange(self.width, device=picked.device)).flatten()

    def _eliminate(self, p: Tensor) -> None:
        """W -= P_:p (P_pp)^-1 W_p and the same for P; exact zeros where inputs went."""
        factor = torch.linalg.cholesky(self.P[p][:, p])
        column = self.P[:, p]
        self.W.addmm_(column, torch.cholesky_solve(self.W[p], factor), alpha=-1)
        self.P.addmm_(column, torch.cholesky_solve(self.P[p], factor), alpha=-1)
        self.W[p] = 0
        self.P[p] = 0
        self.P[:, p] = 0

    def _shrink(self) -> None:
        """Drop what went from all tensors."""
        left = (~self.dropped).nonzero().flatten()
        index = self._inputs(left)
        self.groups, self.dropped = self.groups[left], self.dropped[left]
        self.W, self.G, self.P = self.W[index], self.G[index], self.P[index][:, index]

    def _scores(self, saliency: Saliency) -> Tensor:
        """Saliency of every group, `[g]`; of those that went anything finite."""
        first = (self.W * self.G).sum(1)  # (g * width)
        if saliency is Saliency.PAPER:
            second = self.W.square().sum(1) / (2 * self.P.diagonal().clamp_min(ZERO))
            return (first.abs() + second).view(-1, self.width).mean(1)
        return first.view(-1, self.width).sum(1) + self._second_order() / 2

    def _second_order(self) -> Tensor:
        """Sum of W_S * (P_SS)^-1 W_S per group, `[g]`."""
        if self.width == 1:
            return self.W.square().sum(1) / self.P.diagonal().clamp_min(ZERO)
        n, width = len(self.groups), self.width
        diagonal = torch.arange(n, device=self.P.device)
        blocks = self.P.view(n, width, n, width)[diagonal, :, diagonal]  # (g, width, width)
        if self.dropped.any():
            blocks = torch.where(self.dropped[:, None, None], torch.eye(width).to(self.P), blocks)
        W = self.W.view(n, width, -1)
        solved: Tensor = torch.linalg.solve(blocks, W)
        return (W * solved).sum((1, 2))
