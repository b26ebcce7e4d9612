"""Singular values of weights: matrices that a weight is seen as, how many values count, what a truncation leaves.

All decompositions are computed in float64 where a weight is smaller than that; singular values are descending.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from math import floor
from typing import Self

import torch
from torch import Tensor

from secateur.core.errors import NumericsError, SettingsError
from secateur.core.select import all_finite
from secateur.core.units import Scheme


class Rule(StrEnum):
    """What decides how many singular values stay."""

    ENERGY = "energy"  # the fewest whose squares add up to this share
    SUM = "sum"  # the fewest that add up to this share
    VALUE = "value"  # the leading ones of at least this size
    RATE = "rate"  # this share of their number, rounded down

    def checked(self, amount: float) -> float:
        """The amount, if the rule can keep it.

        Raises:
            SettingsError: nothing would stay, or more than there is.
        """
        if not amount > 0 or (self is not Rule.VALUE and amount > 1):
            reach = "above 0" if self is Rule.VALUE else "in (0, 1]: a share of all there is"
            raise SettingsError(f"amount={amount:g} with rule={self.value} is not possible; give a number {reach}")
        return amount


def matrices(weight: Tensor, scheme: Scheme) -> Tensor:
    """A weight as one matrix `[1, rows, columns]`, or one for each output in the decoupled scheme `[N, C, k_h k_w]`.

    Args:
        weight: of a convolution `[N, C, k_h, k_w]` or of a linear layer `[N, C]`.
        scheme: channel: `[N, C k_h k_w]`; spatial: `[C k_h, N k_w]`; a linear layer has the channel scheme only.

    Raises:
        SettingsError: a linear layer in another scheme.
    """
    if weight.dim() == 2 and scheme is not Scheme.CHANNEL:
        raise SettingsError(f"a linear layer has no {scheme.value} form; use scheme=channel or leave it out")
    match scheme:
        case Scheme.CHANNEL:
            return weight.flatten(1)[None]
        case Scheme.SPATIAL:
            outputs, inputs, height, width = weight.shape
            return weight.permute(1, 2, 0, 3).reshape(1, inputs * height, outputs * width)
        case _:
            return weight.flatten(2)


def restored(found: Tensor, scheme: Scheme, shape: torch.Size) -> Tensor:
    """The inverse of `matrices`."""
    if scheme is not Scheme.SPATIAL:
        return found.reshape(shape)
    outputs, inputs, height, width = shape
    return found.reshape(inputs, height, outputs, width).permute(2, 0, 1, 3).contiguous()


def full_rank(shape: torch.Size | tuple[int, ...], scheme: Scheme) -> int:
    """The largest rank that a weight of this shape can have."""
    outputs, inputs = shape[:2]
    height, width = shape[2:] if len(shape) == 4 else (1, 1)
    match scheme:
        case Scheme.CHANNEL:
            return min(outputs, inputs * height * width)
        case Scheme.SPATIAL:
            return min(inputs * height, outputs * width)
        case _:
            return min(inputs, height * width)


@dataclass(frozen=True)
class Spectrum:
    """A weight's decomposition.

    Attributes:
        scheme: how the weight was seen.
        shape: of the weight.
        left, values, right: U `[m, rows, n]`, singular values `[m, n]`, V^T `[m, n, columns]`; m matrices.
    """

    scheme: Scheme
    shape: torch.Size
    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, weight: Tensor, scheme: Scheme, name: str = "the weight") -> Self:
        """Decompose a weight.

        Raises:
            NumericsError: NaN or infinity in it, or the decomposition does not converge; names the layer.
        """
        if not all_finite(weight):
            raise NumericsError(f"'{name}' holds NaN or infinity and has no singular values; repair the model first")
        wide = matrices(weight.detach(), scheme).double()
        try:
            left, values, right = torch.linalg.svd(wide, full_matrices=False)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise NumericsError(
                f"the singular values of '{name}' were not found; exclude the layer ({error})"
            ) from error
        return cls(scheme, weight.shape, left, values, right)

    def rank(self, rule: Rule, amount: float) -> int:
        """How many singular values the rule keeps, at least 1; of several matrices the largest number."""
        return max(ranks(self.values, rule, amount))

    def cut(self, counts: Sequence[int]) -> Self:
        """The same without all but the leading `counts[i]` values of the i-th matrix: they become 0."""
        places = torch.arange(self.values.shape[1], device=self.values.device)
        keep = places < torch.tensor(counts, device=self.values.device).unsqueeze(1)
        return replace(self, values=self.values * keep)

    @property
    def weight(self) -> Tensor:
        """U S V^T in the weight's shape, float64."""
        return restored((self.left * self.values.unsqueeze(1)) @ self.right, self.scheme, self.shape)

    @property
    def direction(self) -> Tensor:
        """U V^T of the values above 0, in the weight's shape: a subgradient of the nuclear norm at `weight`."""
        there = (self.values > 0).to(self.left.dtype)
        return restored((self.left * there.unsqueeze(1)) @ self.right, self.scheme, self.shape)

    def energy(self, rank: int) -> float:
        """Share of the squared singular values that the leading `rank` of every matrix hold; 1 for a zero weight."""
        squares = self.values.square()
        whole = squares.sum().item()
        return squares[:, :rank].sum().item() / whole if whole else 1.0

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The two weights of a factorised layer; each side gets the roots of the values, the right one all if spatial.

        Returns:
            As `shrink.factorised.Factorised` has them, float64: `first` and `second`.
        """
        left, values, right = self.left[:, :, :rank], self.values[:, :rank], self.right[:, :rank]
        root = values.sqrt()
        if len(self.shape) == 2:
            return root[0, :, None] * right[0], left[0] * root[0]
        outputs, inputs, height, width = self.shape
        match self.scheme:
            case Scheme.CHANNEL:
                first = (root[0, :, None] * right[0]).reshape(rank, inputs, height, width)
                return first, (left[0] * root[0]).reshape(outputs, rank, 1, 1)
            case Scheme.SPATIAL:
                first = left[0].reshape(inputs, height, rank).permute(2, 0, 1).unsqueeze(3)
                second = (values[0, :, None] * right[0]).reshape(rank, outputs, width).permute(1, 0, 2).unsqueeze(2)
                return first, second
            case _:
                first = (left * root.unsqueeze(1)).transpose(1, 2).reshape(outputs * rank, inputs, 1, 1)
                return first, (root.unsqueeze(2) * right).reshape(outputs, rank, height, width)


def ranks(values: Tensor, rule: Rule, amount: float) -> list[int]:
    """How many leading singular values stay, for each row of `[m, n]`; at least 1.

    Raises:
        SettingsError: a share that is not in (0, 1].
    """
    rule.checked(amount)
    if rule is Rule.RATE:
        return [max(1, floor(amount * values.shape[1] + 1e-9))] * len(values)
    if rule is Rule.VALUE:
        return (values >= amount).cumprod(1).sum(1).clamp(min=1).tolist()
    sizes = values.square() if rule is Rule.ENERGY else values
    reached = sizes.cumsum(1)
    whole = reached[:, -1:]
    # rounding must not ask for one value more than all of them
    enough = reached >= amount * whole * (1 - 1e-12)
    return (enough.to(torch.int64).argmax(1) + 1).tolist()
