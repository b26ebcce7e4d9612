"""How far two trained networks are from each other: distance, angle, and the barrier on the line between them.

Distances look at kept weights only: among all weights those that one network lacks would decide. They grow
with learning rate and length of the training, and below a batch norm the scale of a weight means nothing,
so compare at equal recipes, and look at angle or barrier as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import degrees

import torch
from torch import Tensor

from secateur.core.errors import ModelError, NumericsError, SettingsError

State = Mapping[str, Tensor]


def kept_vector(state: State, masks: Mapping[str, Tensor]) -> Tensor:
    """All kept weights in one float64 vector, `[kept]`.

    Raises:
        ModelError: the state lacks a masked tensor, or its shape differs.
    """
    for name, keep in masks.items():
        if name not in state or state[name].shape != keep.shape:
            raise ModelError(f"the state holds no '{name}' of shape {list(keep.shape)} to compare under the mask")
    return torch.cat([state[name].detach().cpu().double()[keep.cpu()] for name, keep in masks.items()])


def l2_distance(one: State, other: State, masks: Mapping[str, Tensor]) -> float:
    """`||m * one - m * other||_2` over all masked tensors (Frankle et al. 2019, section 3)."""
    return float((kept_vector(one, masks) - kept_vector(other, masks)).norm())


def angle(one: State, other: State, masks: Mapping[str, Tensor]) -> float:
    """The angle between the kept weights, in degrees.

    By `2 atan2(|u - v|, |u + v|)` of unit vectors: the arc cosine loses half of the digits of small angles.

    Raises:
        NumericsError: one side is all zeros and has no direction.
    """
    u, v = kept_vector(one, masks), kept_vector(other, masks)
    if not (u.norm() > 0 and v.norm() > 0):
        raise NumericsError("the angle to a network whose kept weights are all zero is not defined")
    u, v = u / u.norm(), v / v.norm()
    return degrees(2 * float(torch.atan2((u - v).norm(), (u + v).norm())))


def interpolated(one: State, other: State, share: float = 0.5) -> dict[str, Tensor]:
    """`(1 - share) * one + share * other`; whole numbers, such as batch norm's counters, are those of `one`.

    Raises:
        ModelError: the states do not hold the same names.
    """
    if one.keys() != other.keys():
        raise ModelError(f"the states differ in {sorted(one.keys() ^ other.keys())}: they are not of one architecture")
    return {
        name: torch.lerp(value.double(), other[name].double(), share).to(value.dtype)
        if value.is_floating_point()
        else value.clone()
        for name, value in one.items()
    }


def barrier(
    one: State,
    other: State,
    error: Callable[[dict[str, Tensor]], float],
    reestimated: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
    shares: Sequence[float] = (0.5,),
) -> float:
    """The largest error on the line between two networks above the mean of the ends' (Frankle et al. 2020).

    Below 2 percentage points the two are said to lie in one linearly connected region.

    Args:
        one: state of the network at share 0.
        other: state of the same architecture at share 1.
        error: state -> error, e.g. in percent.
        reestimated: state -> state with batch-norm statistics taken anew; the ends keep theirs.
        shares: where on the line to look; the midpoint alone by default.

    Raises:
        SettingsError: there are running statistics and nothing to take them anew with: the mean of two
            networks' statistics are those of neither, nor of the one between them.
    """
    norms = [name for name in one if name.rpartition(".")[2] in {"running_mean", "running_var"}]
    if norms and reestimated is None:
        raise SettingsError(
            f"'{norms[0]}' holds running statistics, which cannot be interpolated; give a function that "
            "takes them anew on training data (reestimate=...)"
        )

    def between(share: float) -> float:
        state = interpolated(one, other, share)
        return error(reestimated(state) if reestimated is not None else state)

    ends = (error(dict(one)) + error(dict(other))) / 2
    return max(map(between, shares)) - ends
