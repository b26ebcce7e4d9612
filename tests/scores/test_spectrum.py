"""Spectra of weights: matrices by hand, Eckart-Young against all else of the rank, rank rules by counting."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import NumericsError, SettingsError
from secateur.core.units import Scheme
from secateur.scores.spectrum import Rule, Spectrum, full_rank, matrices, ranks, restored

SHAPES = [(5, 3, 3, 3), (4, 6, 1, 5), (7, 2, 3, 1), (3, 4, 2, 2)]
WAYS = [(scheme, shape) for scheme in Scheme for shape in SHAPES] + [(Scheme.CHANNEL, (5, 9)), (Scheme.CHANNEL, (6, 2))]


def weight(shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- matrices ---------------------------------------------------------------------------------------


def test_every_entry_of_a_matrix_is_where_the_scheme_says():
    w = weight((5, 3, 2, 4))
    n, c, i, j = 3, 2, 1, 3
    value = w[n, c, i, j]
    assert matrices(w, Scheme.CHANNEL).shape == (1, 5, 24)
    assert matrices(w, Scheme.CHANNEL)[0, n, c * 8 + i * 4 + j] == value
    assert matrices(w, Scheme.SPATIAL).shape == (1, 6, 20)
    assert matrices(w, Scheme.SPATIAL)[0, c * 2 + i, n * 4 + j] == value
    assert matrices(w, Scheme.DECOUPLED).shape == (5, 3, 8)
    assert matrices(w, Scheme.DECOUPLED)[n, c, i * 4 + j] == value


@pytest.mark.parametrize(("scheme", "shape"), WAYS)
def test_restoring_is_the_inverse_and_full_rank_counts_values(scheme, shape):
    w = weight(shape)
    found = matrices(w, scheme)
    assert torch.equal(restored(found, scheme, w.shape), w)
    assert full_rank(w.shape, scheme) == min(found.shape[1:]) == Spectrum.of(w, scheme).values.shape[1]


@pytest.mark.parametrize("scheme", [Scheme.SPATIAL, Scheme.DECOUPLED])
def test_linear_layers_have_one_form(scheme):
    with pytest.raises(SettingsError, match="use scheme=channel"):
        matrices(weight((4, 3)), scheme)


# --- truncation -------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(way=st.sampled_from(WAYS), seed=st.integers(0, 999), data=st.data())
def test_no_matrix_of_the_rank_is_nearer(way, seed, data):
    """Eckart-Young: the error is the tail, and any other factors of as many columns leave at least as much."""
    scheme, shape = way
    w = weight(shape, seed)
    spectrum = Spectrum.of(w, scheme)
    rank = data.draw(st.integers(1, full_rank(w.shape, scheme)))
    near = spectrum.cut([rank] * len(spectrum.values))
    error = (w - near.weight).square().sum()
    assert error == pytest.approx(float(spectrum.values[:, rank:].square().sum()), abs=1e-12)
    matrix = matrices(w, scheme)
    basis = torch.linalg.qr(weight((len(matrix), matrix.shape[2], rank), seed + 1)).Q
    other = matrix @ basis @ basis.transpose(1, 2)  # the best with these directions
    assert error <= (matrix - other).square().sum() + 1e-12
    assert spectrum.energy(rank) == pytest.approx(1 - float(error / w.square().sum()), abs=1e-12)


@settings(max_examples=40, deadline=None)
@given(way=st.sampled_from(WAYS), seed=st.integers(0, 999), share=st.floats(0.05, 1))
def test_truncating_twice_changes_nothing_more(way, seed, share):
    scheme, shape = way
    spectrum = Spectrum.of(weight(shape, seed), scheme)
    counts = ranks(spectrum.values, Rule.ENERGY, share)
    once = spectrum.cut(counts)
    again = Spectrum.of(once.weight, scheme).cut(counts)
    torch.testing.assert_close(again.weight, once.weight, rtol=0, atol=1e-12)
    assert torch.equal(once.cut(counts).values, once.values)
    found = torch.linalg.matrix_rank(matrices(once.weight, scheme), atol=1e-9)
    assert found.tolist() == counts


def test_matrices_of_one_weight_are_cut_each_for_itself():
    spectrum = Spectrum.of(weight((3, 4, 2, 2)), Scheme.DECOUPLED)
    near = matrices(spectrum.cut([1, 4, 2]).weight, Scheme.DECOUPLED)
    assert torch.linalg.matrix_rank(near, atol=1e-9).tolist() == [1, 4, 2]
    torch.testing.assert_close(near[1], weight((3, 4, 2, 2))[1].flatten(1))


@pytest.mark.parametrize(("scheme", "shape"), WAYS)
def test_the_direction_is_a_subgradient_of_the_nuclear_norm(scheme, shape):
    """Where the rank is full the norm is smooth and autograd through the sum of values agrees."""
    w = weight(shape).requires_grad_()
    torch.linalg.svdvals(matrices(w, scheme)).sum().backward()
    torch.testing.assert_close(Spectrum.of(w, scheme).direction, w.grad)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), rank=st.integers(1, 4), size=st.floats(0.01, 3))
def test_below_full_rank_the_norm_lies_above_its_tangent(seed, rank, size):
    """||W + D|| >= ||W|| + <G, D>: what a subgradient is, with the truncated factors."""
    near = Spectrum.of(weight((5, 4), seed), Scheme.CHANNEL).cut([rank])
    step = size * weight((5, 4), seed + 1)
    moved = torch.linalg.svdvals(near.weight + step).sum()
    assert moved >= near.values.sum() + (near.direction * step).sum() - 1e-9


def test_values_of_zero_have_no_direction():
    spectrum = Spectrum.of(torch.zeros(3, 4), Scheme.CHANNEL)
    assert not spectrum.direction.any()
    assert spectrum.energy(1) == 1
    assert spectrum.rank(Rule.ENERGY, 0.9) == spectrum.rank(Rule.VALUE, 0.05) == 1


# --- ranks ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "amount", "rank"),
    [
        (Rule.ENERGY, 16 / 30, 1),  # squares 16, 9, 4, 1
        (Rule.ENERGY, 0.54, 2),
        (Rule.ENERGY, 0.9, 3),
        (Rule.ENERGY, 0.97, 4),
        (Rule.ENERGY, 1.0, 4),
        (Rule.SUM, 0.4, 1),
        (Rule.SUM, 0.7, 2),
        (Rule.SUM, 0.71, 3),
        (Rule.VALUE, 3.0, 2),
        (Rule.VALUE, 0.5, 4),
        (Rule.VALUE, 99.0, 1),  # never none
        (Rule.RATE, 0.5, 2),
        (Rule.RATE, 0.74, 2),
        (Rule.RATE, 0.01, 1),
        (Rule.RATE, 1.0, 4),
    ],
)
def test_rules_by_hand(rule, amount, rank):
    assert ranks(torch.tensor([[4.0, 3.0, 2.0, 1.0]], dtype=torch.float64), rule, amount) == [rank]


def test_a_rate_is_the_share_that_was_typed():
    assert ranks(torch.ones(1, 100), Rule.RATE, 0.29) == [29]


def test_the_count_of_large_values_stops_at_the_first_small_one():
    assert ranks(torch.tensor([[3.0, 0.04, 1.0]]), Rule.VALUE, 0.05) == [1]


def test_every_matrix_has_its_own_rank_and_the_weight_the_largest():
    both = torch.stack([torch.eye(3), torch.diag(torch.tensor([9.0, 1, 1]))])
    spectrum = Spectrum.of(both.unsqueeze(3), Scheme.DECOUPLED)
    assert ranks(spectrum.values, Rule.ENERGY, 0.9) == [3, 1]
    assert spectrum.rank(Rule.ENERGY, 0.9) == 3


@pytest.mark.parametrize("amount", [1.01, 0.0, -1.0, float("nan")])
@pytest.mark.parametrize("rule", [Rule.ENERGY, Rule.SUM, Rule.RATE])
def test_more_than_everything_is_refused(rule, amount):
    with pytest.raises(SettingsError, match=r"in \(0, 1\]"):
        ranks(torch.ones(1, 4), rule, amount)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_sick_weights_are_named(bad):
    w = weight((3, 4))
    w[1, 2] = bad
    with pytest.raises(NumericsError, match=r"'stem\.conv' holds NaN or infinity"):
        Spectrum.of(w, Scheme.CHANNEL, "stem.conv")


# --- factors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_decompositions_are_made_in_float64(dtype):
    assert Spectrum.of(weight((4, 3), dtype=dtype), Scheme.CHANNEL).values.dtype == torch.float64


def test_both_sides_get_the_roots_of_the_values_but_the_spatial_right_all():
    w = weight((5, 4, 3, 3))
    channel, spatial = (Spectrum.of(w, scheme) for scheme in (Scheme.CHANNEL, Scheme.SPATIAL))
    first, second = channel.factors(3)
    torch.testing.assert_close(first.flatten(1).norm(dim=1), channel.values[0, :3].sqrt())
    torch.testing.assert_close(second.flatten(1).norm(dim=0), channel.values[0, :3].sqrt())
    first, second = spatial.factors(3)
    torch.testing.assert_close(first.flatten(1).norm(dim=1), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(second.transpose(0, 1).flatten(1).norm(dim=1), spatial.values[0, :3])
