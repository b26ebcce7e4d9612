"""The algebra of tensor dimensions: every dimension is a product or concatenation of axes.

A dimension is one of

- an `int`: nothing can be removed here (batch, positions, a constant in the code);
- an `Axis`: n units that can be removed one by one;
- a `Product`: row-major, `(heads, head_dim)` is `heads * head_dim` indices;
- a `Concat`: one after the other, as `torch.cat` makes them.

Operators say what belongs together: `unify` makes two dimensions the same, `cut` and `factor` split
one. An axis that is split becomes a link to its parts, wherever it stands. Where a dimension cannot
be expressed, its axes are frozen with the reason: they keep all their units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from math import prod


class Axis:
    """Units that are removed one by one, in every place where the axis stands."""

    __slots__ = ("frozen", "link", "size")

    def __init__(self, size: int, frozen: str | None = None) -> None:
        self.size = size
        self.link: Dim | None = None  # what the axis turned out to be
        self.frozen = frozen  # why no unit can go

    def __repr__(self) -> str:
        return f"Axis({self.size}{', frozen' if self.frozen else ''}, {id(self):x})"


class Product:
    """Row-major: the first part changes slowest."""

    __slots__ = ("parts", "size")

    def __init__(self, *parts: Dim) -> None:
        self.parts = parts
        self.size = prod(map(size, parts))

    def __repr__(self) -> str:
        return f"Product{self.parts}"


class Concat:
    """One part after the other."""

    __slots__ = ("parts", "size")

    def __init__(self, *parts: Dim) -> None:
        self.parts = parts
        self.size = sum(map(size, parts))

    def __repr__(self) -> str:
        return f"Concat{self.parts}"


Dim = int | Axis | Product | Concat


def size(dim: Dim) -> int:
    """Number of indices."""
    return dim if isinstance(dim, int) else dim.size


def resolve(dim: Dim) -> Dim:
    """The dimension with links followed, nested parts flattened and constants merged."""
    if isinstance(dim, int):
        return dim
    if isinstance(dim, Axis):
        if dim.link is None:
            return dim
        dim.link = resolve(dim.link)
        return dim.link
    return product(*dim.parts) if isinstance(dim, Product) else concat(*dim.parts)


def product(*dims: Dim) -> Dim:
    """The normal form of a product."""
    parts: list[Dim] = []
    for dim in map(resolve, dims):
        for part in dim.parts if isinstance(dim, Product) else (dim,):
            if isinstance(part, int) and parts and isinstance(parts[-1], int):
                parts[-1] = parts[-1] * part
            elif part != 1:
                parts.append(part)
    return Product(*parts) if len(parts) > 1 else parts[0] if parts else 1


def concat(*dims: Dim) -> Dim:
    """The normal form of a concatenation."""
    parts: list[Dim] = []
    for dim in map(resolve, dims):
        for part in dim.parts if isinstance(dim, Concat) else (dim,):
            if isinstance(part, int) and parts and isinstance(parts[-1], int):
                parts[-1] = parts[-1] + part
            elif size(part):
                parts.append(part)
    return Concat(*parts) if len(parts) > 1 else parts[0] if parts else 0


def axes(dim: Dim) -> Iterator[Axis]:
    """The axes that a dimension is made of, with repetitions."""
    dim = resolve(dim)
    if isinstance(dim, Axis):
        yield dim
    elif not isinstance(dim, int):
        for part in dim.parts:
            yield from axes(part)


def freeze(dim: Dim, reason: str) -> None:
    """No unit of this dimension can go. The first reason stays."""
    if isinstance(dim, int):
        return
    for axis in axes(dim):
        axis.frozen = axis.frozen or reason


def count(dim: Dim, kept: Mapping[Axis, int]) -> int:
    """Number of indices when `kept` says how many units of each axis stay."""
    dim = resolve(dim)
    if isinstance(dim, int):
        return dim
    if isinstance(dim, Axis):
        return kept.get(dim, dim.size)
    parts = [count(part, kept) for part in dim.parts]
    return prod(parts) if isinstance(dim, Product) else sum(parts)


def unify(a: Dim, b: Dim, reason: str) -> None:
    """Make two dimensions of one size the same: index i of one is index i of the other.

    Args:
        a: one dimension.
        b: the other.
        reason: where and why, for axes that are frozen because no common form exists.
    """
    a, b = resolve(a), resolve(b)
    if a is b:
        return
    if isinstance(a, int) or isinstance(b, int):
        freeze(a, reason)
        freeze(b, reason)
    elif isinstance(a, Axis):
        _bind(a, b)
    elif isinstance(b, Axis):
        _bind(b, a)
    elif isinstance(a, Product) and isinstance(b, Product):
        _match_products(a, b, reason)
    elif isinstance(a, Concat) and isinstance(b, Concat):
        _match_concats(list(a.parts), list(b.parts), reason)
    else:
        _match_mixed(a, b, reason)


def _bind(axis: Axis, dim: Dim) -> None:
    axis.link = dim
    if axis.frozen:
        freeze(dim, axis.frozen)


def _match_concats(a: list[Dim], b: list[Dim], reason: str) -> None:
    while a and b:
        x, y = a.pop(0), b.pop(0)
        smaller = min(size(x), size(y))
        if size(x) > smaller:
            x, rest = cut(x, smaller, reason)
            a.insert(0, rest)
        elif size(y) > smaller:
            y, rest = cut(y, smaller, reason)
            b.insert(0, rest)
        unify(x, y, reason)


def _match_products(a: Product, b: Product, reason: str) -> None:
    x, y = list(a.parts), list(b.parts)
    while x and y:
        p, q = x.pop(), y.pop()
        smaller = min(size(p), size(q))
        if size(p) % smaller or size(q) % smaller:
            for dim in (*x, *y, p, q):
                freeze(dim, reason)
            return
        if size(p) > smaller:
            rest, p = factor(p, smaller, reason)
            x.append(rest)
        elif size(q) > smaller:
            rest, q = factor(q, smaller, reason)
            y.append(rest)
        unify(p, q, reason)


def _match_mixed(a: Dim, b: Dim, reason: str) -> None:
    """A product with a concatenation: cut the product where the parts of the concatenation meet."""
    whole, joined = (a, b) if isinstance(a, Product) else (b, a)
    assert isinstance(whole, Product)
    assert isinstance(joined, Concat)
    inner = whole.size // size(whole.parts[0])
    if all(size(part) % inner == 0 for part in joined.parts):
        _match_concats([whole], list(joined.parts), reason)
        return
    minor = size(whole.parts[-1])
    if all(size(part) % minor == 0 for part in joined.parts):
        major, last = factor(joined, minor, reason)
        unify(product(*whole.parts[:-1]), major, reason)
        unify(whole.parts[-1], last, reason)
        return
    freeze(a, reason)
    freeze(b, reason)


def _part(n: int, frozen: str | None) -> Dim:
    """A new axis; a single unit is none, since something must stay."""
    return Axis(n, frozen) if n > 1 else n


def cut(dim: Dim, at: int, reason: str) -> tuple[Dim, Dim]:
    """The first `at` indices and the rest."""
    dim = resolve(dim)
    if at <= 0 or at >= size(dim):
        return (dim, 0) if at > 0 else (0, dim)
    if isinstance(dim, int):
        return at, dim - at
    if isinstance(dim, Axis):
        head, tail = _part(at, dim.frozen), _part(dim.size - at, dim.frozen)
        dim.link = Concat(head, tail)
        return head, tail
    return _cut_concat(dim, at, reason) if isinstance(dim, Concat) else _cut_product(dim, at, reason)


def _cut_concat(dim: Concat, at: int, reason: str) -> tuple[Dim, Dim]:
    before: list[Dim] = []
    parts = list(dim.parts)
    while at >= size(parts[0]):
        at -= size(parts[0])
        before.append(parts.pop(0))
    head, tail = cut(parts[0], at, reason)
    return concat(*before, head), concat(tail, *parts[1:])


def _cut_product(dim: Product, at: int, reason: str) -> tuple[Dim, Dim]:
    rest = dim.parts[1:]
    inner = prod(map(size, rest))
    if at % inner == 0:
        first, second = cut(dim.parts[0], at // inner, reason)
        return product(first, *rest), product(second, *rest)
    freeze(dim, reason)
    return at, dim.size - at


def factor(dim: Dim, minor: int, reason: str) -> tuple[Dim, Dim]:
    """The dimension as a product `(size / minor, minor)`: what `view` does to it."""
    dim = resolve(dim)
    n = size(dim)
    if minor in (1, n):
        return (dim, 1) if minor == 1 else (1, dim)
    if n % minor:
        freeze(dim, reason)
    if n % minor or isinstance(dim, int):
        return n // minor, minor
    if isinstance(dim, Axis):
        outer, inner = _part(n // minor, dim.frozen), _part(minor, dim.frozen)
        dim.link = Product(outer, inner)
        return outer, inner
    if isinstance(dim, Product):
        return _factor_product(dim, minor, reason)
    return _factor_concat(dim, minor, reason)


def _factor_product(dim: Product, minor: int, reason: str) -> tuple[Dim, Dim]:
    *first, last = dim.parts
    inner = size(last)
    if inner % minor == 0:
        outer, found = factor(last, minor, reason)
        return product(*first, outer), found
    if minor % inner == 0:
        outer, found = factor(product(*first), minor // inner, reason)
        return outer, product(found, last)
    freeze(dim, reason)
    return dim.size // minor, minor


def _factor_concat(dim: Concat, minor: int, reason: str) -> tuple[Dim, Dim]:
    if all(size(part) % minor == 0 for part in dim.parts):
        pairs = [factor(part, minor, reason) for part in dim.parts]
        for _, found in pairs[1:]:
            unify(pairs[0][1], found, reason)
        return concat(*(outer for outer, _ in pairs)), resolve(pairs[0][1])
    rest: Dim = dim
    pieces = []
    for _ in range(dim.size // minor - 1):
        piece, rest = cut(rest, minor, reason)
        pieces.append(piece)
    for piece in pieces:
        unify(piece, rest, reason)
    return dim.size // minor, resolve(rest)
