"""Choosing units and finding them again by their numbers: what routers of experts are made of.

A router scores the experts, takes the numbers of the k best and has every token multiplied with the weights of
these numbers. The numbers are integers that point at units (`Observer.points`): whatever is looked up or counted
by them has the same units as what was ranked. A removed unit is never among the best; k units must stay.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from secateur.structure.dims import Axis, Dim, concat, size
from secateur.structure.observe import Observer
from secateur.structure.rules.elementwise import ordered
from secateur.structure.table import Call, function, operator
from secateur.structure.traced import Expression, Operation, how, plain


@operator("topk")
def best(run: Observer, call: Call) -> None:
    """The k largest along one dimension, and which these are."""
    x, k = call.args[0], call.get(1, "k")
    d = call.get(2, "dim", -1) % max(1, x.dim())
    dims = list(run.dims(x))
    if not dims or not isinstance(dims[d], Axis) or call.get(3, "largest", True) is False:
        run.fix(dims[d] if dims else 1, "the order of units matters")
    elif k == size(dims[d]):
        run.fix(dims[d], "all units are chosen, in order")
    else:
        run.choose(dims[d], k, call.out[1])
        run.statistic([dims[d]], [x])
    dims[d : d + 1] = [k]
    run.set(call.out[0], dims)


@operator("sort")
def sorted_values(run: Observer, call: Call) -> None:
    """Numbers of units may be sorted; where units are ranked by value, none can go."""
    ordered(run, call)
    points = run.points(call.args[0])
    if points is not None:
        run.point(call.out[0], points)


@operator("cumsum")
def running_sums(run: Observer, call: Call) -> None:
    """Order matters, but not to how often numbers occur: those of removed units do not."""
    x = call.args[0]
    if hasattr(x, "_counts"):
        run.set(call.out, run.dims(x))
    else:
        ordered(run, call)


@function(torch.histc, torch.Tensor.histc)
def histogram(run: Observer, call: Call) -> None:
    """How often every unit's number occurs, where there is one bin for each."""
    bins, low, high = call.get(1, "bins", 100), call.get(2, "min", 0), call.get(3, "max", 0)
    if plain(low) != 0:
        raise ValueError("bins that start elsewhere")
    _counted(run, call, bins, [how(bins), Operation("+", how(high), 1)])


@function(torch.bincount, torch.Tensor.bincount)
def occurrences(run: Observer, call: Call) -> None:
    """How often every unit's number occurs, with as many counts as the code asks for at least."""
    least = call.get(2, "minlength", 0)
    _counted(run, call, least, [how(least)])


def _counted(run: Observer, call: Call, bins: int, written: list[Expression]) -> None:
    points = run.points(call.args[0])
    if points is None or plain(bins) != size(points):
        raise ValueError("not one bin for every unit")
    for expression in written:
        run.require(expression, points)
    run.set(call.out, [points])
    call.out._counts = True


@function(F.one_hot)
def one_hot(run: Observer, call: Call) -> None:
    """A 1 at every number of a unit; classes beyond the units stay."""
    x, classes = call.args[0], call.get(1, "num_classes", -1)
    points = run.points(x)
    if points is None or plain(classes) < size(points):
        raise ValueError("classes that are no units")
    more = plain(classes) - size(points)
    dim: Dim = concat(points, more)
    run.require(how(classes), dim)
    run.set(call.out, [*run.dims(x), dim])
