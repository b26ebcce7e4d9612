"""Mask tuning against plain least squares on single factors, in every shape that it takes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.recover.tuning import LARGEST, MaskTuning, Sums, solved

SEQUENCES, TOKENS, UNITS, OUTPUTS = 10, 7, 5, 4


def layer(seed=0, width=1, units=UNITS):
    """Inputs `[sequences, tokens, units * width]`, a weight, and targets that other factors than 1 fit best."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(SEQUENCES, TOKENS, units * width, generator=rng, dtype=torch.float64)
    weight = torch.randn(OUTPUTS, units * width, generator=rng, dtype=torch.float64)
    wanted = 1 + torch.rand(units, generator=rng, dtype=torch.float64)
    noise = torch.randn(SEQUENCES, TOKENS, OUTPUTS, generator=rng, dtype=torch.float64)
    return x, weight, (x * wanted.repeat_interleave(width)) @ weight.t() + 0.5 * noise


def columns(x, weight, width=1):
    """The least-squares matrix `[T * O, units]`: what every unit alone gives to all outputs."""
    rows = x.flatten(0, -2)
    alone = rows[:, None, :] * weight[None]  # (T, O, units * width)
    return alone.view(len(rows) * len(weight), -1, width).sum(2)


def tuned(x, weight, target, width=1, damping=0.0, sizes=(SEQUENCES,), sequences=SEQUENCES):
    fit = MaskTuning(weight, weight.shape[1] // width, sequences)
    for part, wanted in zip(x.split(list(sizes)), target.split(list(sizes)), strict=True):
        fit.update(part.flatten(0, 1), wanted.flatten(0, 1), len(part))
    return fit.solve(damping)


def fitted_rows(x):
    return x[torch.arange(SEQUENCES) % 5 != 4]


@pytest.mark.parametrize("width", [1, 3])
def test_factors_are_the_least_squares_solution(width):
    x, weight, target = layer(width=width)
    matrix, y = columns(fitted_rows(x), weight, width), fitted_rows(target).reshape(-1)
    expected = torch.linalg.lstsq(matrix, y).solution
    found = tuned(x, weight, target, width)
    assert found.accepted
    torch.testing.assert_close(found.factors, expected, rtol=1e-9, atol=1e-9)
    whole, everything = columns(x, weight, width), target.reshape(-1)
    for factors, error in ((torch.ones(UNITS).double(), found.before), (expected, found.after)):
        direct = (everything - whole @ factors).norm() / everything.norm()
        assert error == pytest.approx(float(direct), rel=1e-9)


def test_the_damped_solution_has_no_gradient_left():
    """Autograd on the damped loss itself, in which the product of two Grams does not appear."""
    x, weight, target = layer()
    found = tuned(x, weight, target, damping=0.3)
    rows, y = fitted_rows(x).flatten(0, 1), fitted_rows(target).flatten(0, 1)
    strength = 0.3 * columns(fitted_rows(x), weight).square().sum(0).mean()
    m = found.factors.clone().requires_grad_()
    loss = (y - (rows * m) @ weight.t()).square().sum() + strength * (m - 1).square().sum()
    (gradient,) = torch.autograd.grad(loss, m)
    assert gradient.abs().max() < 1e-9 * loss
    assert (found.factors - 1).norm() < (tuned(x, weight, target).factors - 1).norm()  # towards 1


def test_the_gram_of_the_inputs_alone_gives_something_else():
    """The trap: X^T X without the weight's columns."""
    x, weight, target = layer()
    rows = fitted_rows(x).flatten(0, 1)
    wrong = solved(rows.t() @ rows, (rows * (fitted_rows(target).flatten(0, 1) @ weight)).sum(0), 0.0)
    assert (wrong - tuned(x, weight, target).factors).abs().max() > 0.1


@pytest.mark.parametrize("sizes", [(SEQUENCES,), (1,) * SEQUENCES, (3, 4, 2, 1)])
def test_batches_do_not_matter(sizes):
    x, weight, target = layer()
    torch.testing.assert_close(
        tuned(x, weight, target, sizes=sizes).factors, tuned(x, weight, target).factors, rtol=1e-12, atol=1e-12
    )


def test_half_of_two_identical_units_is_made_up_for():
    """Collinear units: the one that stays gets a factor near 2."""
    x, weight, _ = layer()
    x[..., 1], weight[:, 1] = x[..., 0], weight[:, 0]
    kept = [0, 2, 3, 4]
    found = tuned(x[..., kept], weight[:, kept], x @ weight.t(), damping=1e-3)
    assert found.accepted
    assert found.factors[0] == pytest.approx(2, abs=0.01)
    assert (found.factors[1:] - 1).abs().max() < 0.01


def test_collinear_units_are_solved_with_damping_and_left_alone_without():
    x, weight, _ = layer()
    x[..., 1], weight[:, 1] = x[..., 0], weight[:, 0]
    target = 1.5 * x @ weight.t()
    damped = tuned(x, weight, target, damping=1e-3)
    assert damped.accepted
    assert damped.factors[0] == pytest.approx(float(damped.factors[1]), abs=1e-9)
    assert not tuned(torch.zeros_like(x), weight, target).accepted  # nothing at all comes in: A is zero
    assert solved(torch.zeros(2, 2).double(), torch.ones(2).double(), 0.0).isnan().all()


def test_wild_factors_are_refused():
    x, weight, target = layer()
    found = tuned(x, weight, target * 3 * LARGEST)
    assert not found.accepted
    assert found.factors.tolist() == [1] * UNITS
    assert found.before == found.after
    assert tuned(x, weight, target * LARGEST / 3).accepted


def test_factors_that_do_not_hold_on_other_sequences_are_refused():
    x, weight, _ = layer()
    target = 2 * x @ weight.t()
    target[4::5] = x[4::5] @ weight.t()  # the held-out sequences want no change
    found = tuned(x, weight, target)
    assert not found.accepted
    assert found.factors.tolist() == [1] * UNITS


def test_few_sequences_hold_out_single_rows():
    x, weight, target = layer()
    found = tuned(x[:2], weight, target[:2], sizes=(1, 1), sequences=2)
    rows, y = x[:2].flatten(1, 1).reshape(2, TOKENS, -1), target[:2]
    fitted = torch.arange(TOKENS) % 5 != 4
    expected = torch.linalg.lstsq(columns(rows[:, fitted], weight), y[:, fitted].reshape(-1)).solution
    torch.testing.assert_close(found.factors, expected, rtol=1e-9, atol=1e-9)


@given(st.integers(0, 10**6), st.floats(0, 1))
def test_the_error_on_held_out_rows_never_rises(seed, damping):
    x, weight, target = layer(seed)
    fit = MaskTuning(weight, UNITS, SEQUENCES)
    fit.update(x.flatten(0, 1), target.flatten(0, 1), SEQUENCES)
    found = fit.solve(damping)
    assert fit.held.error(found.factors) <= fit.held.error(torch.ones(UNITS))
    assert found.facts()["accepted"] == found.accepted


def test_sums_add_up():
    x, weight, target = layer()
    parts = [Sums(UNITS), Sums(UNITS), Sums(UNITS)]
    rows, y = x.flatten(0, 1), target.flatten(0, 1)
    parts[0].add(rows[:20], y[:20], weight, 1)
    parts[1].add(rows[20:], y[20:], weight, 1)
    parts[2].add(rows, y, weight, 1)
    joined, m = parts[0] + parts[1], torch.rand(UNITS, dtype=torch.float64)
    assert joined.error(m) == pytest.approx(parts[2].error(m), rel=1e-12)
    assert joined.rows == len(rows)
