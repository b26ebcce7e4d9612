"""The algebra of dimensions against brute force: every index knows which units it stands and falls with."""

from __future__ import annotations

from itertools import pairwise
from itertools import product as pairs_of
from math import prod
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.plan import Plan
from secateur.core.units import Site, UnitKind
from secateur.shrink.cut import removed_indices
from secateur.shrink.reference import keep_of
from secateur.structure.analysis import _roots
from secateur.structure.dims import (
    Axis,
    Concat,
    Dim,
    Product,
    axes,
    concat,
    count,
    cut,
    factor,
    freeze,
    product,
    resolve,
    size,
    unify,
)
from secateur.structure.observe import Observation

QUICK = settings(max_examples=150, deadline=None)
LARGEST = 24
Labels = list[frozenset[tuple[Axis, int]]]


# --- brute force ----------------------------------------------------------------------------------


def labels(dim: Dim) -> Labels:
    """For every index the units that it needs; frozen units always stay, so nothing needs them."""
    if isinstance(dim, int):
        return [frozenset()] * dim
    if isinstance(dim, Axis):
        if dim.link is not None:
            return labels(dim.link)
        return [frozenset() if dim.frozen else frozenset({(dim, unit)}) for unit in range(dim.size)]
    parts = [labels(part) for part in dim.parts]
    if isinstance(dim, Concat):
        return [label for part in parts for label in part]
    return [frozenset().union(*chosen) for chosen in pairs_of(*parts)]


def roots_of(*dims: Dim) -> list[Axis]:
    return list(dict.fromkeys(axis for dim in dims for axis in axes(dim) if axis.frozen is None))


def staying(dim: Dim, masks: dict[Axis, torch.Tensor]) -> list[bool]:
    """Index by index, whether it stays when the units without a mask entry go."""
    return [all(bool(masks[axis][unit]) for axis, unit in label) for label in labels(dim)]


def masks_for(data: st.DataObject, *dims: Dim) -> dict[Axis, torch.Tensor]:
    masks = {}
    for axis in roots_of(*dims):
        bits = data.draw(st.lists(st.booleans(), min_size=axis.size, max_size=axis.size))
        masks[axis] = torch.tensor(bits)
        masks[axis][data.draw(st.integers(0, axis.size - 1))] = True
    return masks


# --- random dimensions ----------------------------------------------------------------------------


def divisors(n: int) -> list[int]:
    return [d for d in range(2, n) if n % d == 0]


@st.composite
def dims_of(draw: st.DrawFn, n: int, pool: list[Axis], depth: int = 2) -> Dim:
    """A dimension of size n: a constant, an axis (a known one sometimes), a product or a concatenation."""
    known = [axis for axis in pool if axis.size == n]
    choices = ["int", "axis", "axis"] + ["known"] * bool(known)
    if depth and n > 1:
        choices += ["concat"] + ["product"] * bool(divisors(n))
    match draw(st.sampled_from(choices)):
        case "known":
            return draw(st.sampled_from(known))
        case "product":
            d = draw(st.sampled_from(divisors(n)))
            return Product(draw(dims_of(n // d, pool, depth - 1)), draw(dims_of(d, pool, depth - 1)))
        case "concat":
            at = draw(st.integers(1, n - 1))
            return Concat(draw(dims_of(at, pool, depth - 1)), draw(dims_of(n - at, pool, depth - 1)))
        case "axis" if n > 1:
            pool.append(Axis(n))
            return pool[-1]
    return n


def some(data: st.DataObject, count_: int = 1) -> list[Dim]:
    """Dimensions of one size that share axes."""
    n = data.draw(st.integers(1, LARGEST))
    pool: list[Axis] = []
    return [data.draw(dims_of(n, pool)) for _ in range(count_)]


# --- properties -----------------------------------------------------------------------------------


@QUICK
@given(st.data())
def test_the_normal_form_means_the_same(data):
    (dim,) = some(data)
    found = resolve(dim)
    assert labels(found) == labels(dim)
    assert size(found) == len(labels(dim))
    assert not isinstance(found, (Product, Concat)) or all(type(part) is not type(found) for part in found.parts)


@QUICK
@given(st.data())
def test_normal_forms_hold_no_two_constants_side_by_side(data):
    for make, neutral in ((product, 1), (concat, 0)):
        dims = [data.draw(dims_of(data.draw(st.integers(1, 4)), [], 1)) for _ in range(3)]
        found = make(*dims)
        parts = found.parts if isinstance(found, Product if neutral else Concat) else ()
        assert not any(isinstance(a, int) and isinstance(b, int) for a, b in pairwise(parts))
        assert neutral not in [part for part in parts if isinstance(part, int)]


@QUICK
@given(st.data())
def test_count_is_the_number_of_indices_that_stay(data):
    (dim,) = some(data)
    masks = masks_for(data, dim)
    assert count(dim, {axis: int(mask.sum()) for axis, mask in masks.items()}) == sum(staying(dim, masks))


@QUICK
@given(st.data())
def test_the_keep_mask_of_a_dimension_is_index_by_index(data):
    (dim,) = some(data)
    masks = masks_for(data, dim)
    assert keep_of(dim, masks).tolist() == staying(dim, masks)


@QUICK
@given(st.data())
def test_cut_gives_the_first_indices_and_the_rest(data):
    (dim,) = some(data)
    at = data.draw(st.integers(0, size(dim)))
    head, tail = cut(dim, at, "why")
    assert (size(head), size(tail)) == (at, size(dim) - at)
    assert labels(head) + labels(tail) == labels(dim)


@QUICK
@given(st.data())
def test_factor_gives_rows_and_columns(data):
    (dim,) = some(data)
    minor = data.draw(st.sampled_from([d for d in range(1, size(dim) + 1) if size(dim) % d == 0]))
    outer, inner = factor(dim, minor, "why")
    assert (size(outer), size(inner)) == (size(dim) // minor, minor)
    assert labels(dim) == labels(Product(outer, inner))


@QUICK
@given(st.data())
def test_unified_dimensions_lose_the_same_indices(data):
    a, b = some(data, 2)
    unify(a, b, "why")
    assert labels(a) == labels(b)
    masks = masks_for(data, a, b)
    assert staying(a, masks) == staying(b, masks)
    kept = {axis: int(mask.sum()) for axis, mask in masks.items()}
    assert count(a, kept) == count(b, kept) == sum(staying(a, masks))


@QUICK
@given(st.data())
def test_a_long_run_of_operations_stays_consistent(data):
    """What was said early still holds after everything that was said later."""
    dims = some(data, 4)
    n = size(dims[0])
    promises = []
    for _ in range(data.draw(st.integers(1, 6))):
        dim = data.draw(st.sampled_from(dims))
        match data.draw(st.sampled_from(["unify", "cut", "factor"])):
            case "unify":
                other = data.draw(st.sampled_from(dims))
                unify(dim, other, "why")
                promises.append((dim, other))
            case "cut":
                promises.append((dim, Concat(*cut(dim, data.draw(st.integers(1, n)), "why"))))
            case _:
                minor = data.draw(st.sampled_from([d for d in range(1, n + 1) if n % d == 0]))
                promises.append((dim, Product(*factor(dim, minor, "why"))))
    for a, b in promises:
        assert labels(a) == labels(b)


@QUICK
@given(st.data())
def test_unify_is_symmetric_in_what_stays_free(data):
    n = data.draw(st.integers(2, LARGEST))
    seed = data.draw(st.integers(0, 2**20))

    def build() -> list[Dim]:
        rng = Random(seed)

        def make(m: int, depth: int) -> Dim:
            kind = rng.choice(["int", "axis", "axis", "product", "concat"]) if depth else "axis"
            if kind == "product" and divisors(m):
                d = rng.choice(divisors(m))
                return Product(make(m // d, depth - 1), make(d, depth - 1))
            if kind == "concat" and m > 1:
                at = rng.randint(1, m - 1)
                return Concat(make(at, depth - 1), make(m - at, depth - 1))
            return m if kind == "int" or m == 1 else Axis(m)

        return [make(n, 2), make(n, 2)]

    def shape(dim: Dim) -> list[list[tuple[int, int]]]:
        order = roots_of(dim)
        return [sorted((order.index(axis), unit) for axis, unit in label) for label in labels(dim)]

    a, b = build()
    unify(a, b, "why")
    c, d = build()
    unify(d, c, "why")
    assert shape(a) == shape(c)


@QUICK
@given(st.data())
def test_occurrences_delete_exactly_the_indices_that_go(data):
    """Cutting units by their occurrences equals deleting the indices, also where an axis stands several times."""
    dims = some(data, 2)
    unify(*dims, "why")
    tensors = {"p": tuple(dims), "q": (data.draw(dims_of(size(dims[0]), list(roots_of(*dims)))),)}
    places = _roots(Observation(tensors=tensors))
    masks = masks_for(data, *(dim for row in tensors.values() for dim in row))
    names = {axis: f"s{i}" for i, axis in enumerate(masks)}
    sites = {
        names[axis]: Site(names[axis], UnitKind.NEURON, (axis.size,), occurrences=tuple(places[axis])) for axis in masks
    }
    plan = Plan(sites, {names[axis]: mask for axis, mask in masks.items()})
    found = removed_indices(plan)
    for name, row in tensors.items():
        for d, dim in enumerate(row):
            gone = [i for i, stays in enumerate(staying(dim, masks)) if not stays]
            assert found.get(name, {}).get(d, torch.tensor([], dtype=torch.int64)).tolist() == gone


@QUICK
@given(st.data())
def test_every_unit_of_an_axis_owns_equally_many_indices(data):
    (dim,) = some(data)
    for axis, places in _roots(Observation(tensors={"p": (dim,)})).items():
        for place in places:
            owned = place.indices(axis.size)
            assert owned.shape == (axis.size, place.times * place.repeat)
            assert len(owned.unique()) == owned.numel()
            assert int(owned.min()) >= 0
            assert int(owned.max()) < size(dim)


# --- cases by hand --------------------------------------------------------------------------------


def test_flattened_positions_belong_to_their_channel():
    """conv [C, H, W] -> flatten -> linear: channel c owns the columns c * H * W ..."""
    columns, channels = Axis(12), Axis(3)
    unify(columns, product(channels, 4), "flatten")
    assert [[i for i, label in enumerate(labels(columns)) if (channels, c) in label] for c in range(3)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10, 11],
    ]


def test_shared_keys_split_the_queries_into_groups():
    """8 query heads on 2 key/value heads of 4: (kv, repeats, head_dim) on the one side, (kv, head_dim) on the other."""
    queries, keys = Axis(32), Axis(8)
    q_heads, q_dim = factor(queries, 4, "view")
    k_heads, k_dim = factor(keys, 4, "view")
    unify(q_dim, k_dim, "scores")
    groups, repeats = factor(q_heads, 4, "shared")
    unify(groups, k_heads, "shared")
    assert resolve(queries).parts == (resolve(k_heads), resolve(repeats), resolve(k_dim))
    assert count(queries, {resolve(k_heads): 1}) == 16
    assert count(keys, {resolve(k_heads): 1}) == 4


def test_three_parts_of_a_fused_projection():
    fused, width = Axis(12), Axis(4)
    rest: Dim = fused
    for _ in range(2):
        part, rest = cut(rest, 4, "chunk")
        unify(part, width, "same")
    unify(rest, width, "same")
    assert labels(fused) == labels(width) * 3
    assert count(fused, {resolve(width): 3}) == 9


def test_one_unit_that_is_cut_off_stays():
    axis = Axis(5)
    head, tail = cut(axis, 1, "class token")
    assert head == 1
    assert count(axis, {tail: 1}) == 2


def test_what_has_no_common_form_is_frozen_with_the_reason():
    a, b = Product(Axis(2), Axis(3)), Product(Axis(3), Axis(2))
    unify(a, b, "a view in 'mix'")
    assert not roots_of(a, b)
    assert {axis.frozen for axis in (*axes(a), *axes(b))} == {"a view in 'mix'"}


def test_the_first_reason_stays():
    axis = Axis(3)
    freeze(axis, "first")
    freeze(axis, "second")
    assert axis.frozen == "first"


@pytest.mark.parametrize("frozen_first", [True, False])
def test_a_frozen_axis_freezes_what_it_turns_out_to_be(frozen_first):
    axis, parts = Axis(6), product(Axis(2), Axis(3))
    if frozen_first:
        freeze(axis, "output")
        unify(axis, parts, "same")
    else:
        unify(axis, parts, "same")
        freeze(axis, "output")
    assert [part.frozen for part in axes(parts)] == ["output", "output"]


def test_a_constant_freezes_what_must_equal_it():
    axis = Axis(4)
    unify(axis, 4, "added to a fixed table")
    assert axis.frozen == "added to a fixed table"


def test_links_are_followed_wherever_the_axis_stands():
    axis = Axis(6)
    before = Concat(axis, 2)
    factor(axis, 3, "view")
    assert isinstance(resolve(before).parts[0], Product)
    assert prod(map(size, resolve(axis).parts)) == 6
