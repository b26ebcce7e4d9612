"""The column sweep against brute force, and least squares on a given mask against lstsq."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import NumericsError
from secateur.recover.obs import inverse_factor, solve_on_support, sweep
from secateur.recover.quantise import minmax_grid


def problem(rows, columns, seed=0, tokens=None):
    """Weights, a Hessian 2 / N X^T X and its inputs, all float64 but exactly float32."""
    rng = np.random.RandomState(seed)
    tokens = tokens or 3 * columns
    mixing = rng.randn(columns, columns) / columns**0.5
    inputs = torch.from_numpy((rng.randn(tokens, columns) @ mixing).astype(np.float32)).double()
    weight = torch.from_numpy(rng.randn(rows, columns).astype(np.float32)).double()
    return weight, 2 / tokens * inputs.t() @ inputs, inputs


def damped(hessian, damping=0.01):
    """What `inverse_factor` inverts."""
    h = hessian + torch.diag((hessian.diagonal() == 0).double())
    return h + damping * h.diagonal().mean() * torch.eye(len(h), dtype=torch.float64)


def given_mask(keep):
    """A rule for `sweep` that hands out a mask made beforehand."""
    seen = 0

    def rule(ahead, diagonal):
        nonlocal seen
        part = keep[:, seen : seen + ahead.shape[1]]
        seen += ahead.shape[1]
        return part

    return rule


def swept(weight, hessian, keep, **options):
    return sweep(weight.float(), inverse_factor(hessian.float()), given_mask(keep), **options)


def brute_force(weight, hessian, keep, quantise=None):
    """Left to right: fix a column's value, then move all columns to its right to their exact optimum.

    With d = w' - w and everything up to column i fixed, d' H d is least at
    d_right = -H_right,right^-1 H_right,left d_left.
    """
    final = weight.clone()
    for i in range(weight.shape[1]):
        value = torch.where(keep[:, i], final[:, i], 0.0)
        final[:, i] = quantise(value) if quantise else value
        left, right = slice(0, i + 1), slice(i + 1, None)
        if i + 1 < weight.shape[1]:
            pushed = torch.linalg.solve(hessian[right, right], hessian[right, left] @ (final - weight)[:, left].t())
            final[:, right] = weight[:, right] - pushed.t()
    return final


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 24),
    width=st.integers(1, 30),
    density=st.floats(0, 1),
    seed=st.integers(0, 10**6),
)
def test_a_sweep_is_a_sequence_of_exact_conditional_updates(rows, columns, width, density, seed):
    weight, hessian, _ = problem(rows, columns, seed)
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    found = swept(weight, hessian, keep, width=width)
    expected = brute_force(weight, damped(hessian), keep)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(found.keep, keep)
    assert not found.weight[~keep].any()


@settings(max_examples=30, deadline=None)
@given(columns=st.integers(1, 24), width=st.integers(1, 30), density=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_the_error_is_half_the_damped_quadratic_form(columns, width, density, seed):
    """Each step adds e^2 / 2 with e = (w - q) / U_ii, the exact rise of 1/2 d' H d; the sum is the final value."""
    weight, hessian, _ = problem(4, columns, seed)
    keep = torch.rand(4, columns, generator=torch.Generator().manual_seed(seed)) < density
    found = swept(weight, hessian, keep, width=width)
    change = found.weight.double() - weight
    exact = 0.5 * float(((change @ damped(hessian)) * change).sum())
    assert found.error == pytest.approx(exact, rel=1e-4, abs=1e-9)


def test_the_error_is_the_output_s_up_to_damping():
    """With H = 2 / N X^T X the form without damping is the squared output error / N."""
    weight, hessian, inputs = problem(6, 20)
    keep = torch.rand(6, 20, generator=torch.Generator().manual_seed(0)) < 0.5
    found = sweep(weight.float(), inverse_factor(hessian.float(), 1e-7), given_mask(keep))
    change = found.weight.double() - weight
    assert found.error == pytest.approx(float((inputs @ change.t()).square().sum()) / len(inputs), rel=1e-3)


def test_dead_inputs_are_zeroed_for_free():
    weight, hessian, _ = problem(4, 12)
    hessian[[2, 7]] = 0
    hessian[:, [2, 7]] = 0
    keep = torch.rand(4, 12, generator=torch.Generator().manual_seed(0)) < 0.5
    keep[:, 2] = True
    found = swept(weight, hessian, keep)
    weight[:, [2, 7]] = 0
    torch.testing.assert_close(found.weight.double(), brute_force(weight, damped(hessian), keep), rtol=1e-3, atol=1e-4)
    change = found.weight.double() - weight
    assert found.error == pytest.approx(0.5 * float(((change @ damped(hessian)) * change).sum()), rel=1e-4)


@pytest.mark.parametrize("columns", [128, 129, 256])
def test_the_width_of_lazy_blocks_does_not_matter_for_a_given_mask(columns):
    weight, hessian, _ = problem(8, columns)
    keep = torch.rand(8, columns, generator=torch.Generator().manual_seed(0)) < 0.5
    narrow, wide, one = (swept(weight, hessian, keep, width=width) for width in (16, 128, 1))
    torch.testing.assert_close(narrow.weight, wide.weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(one.weight, wide.weight, rtol=0, atol=1e-4)
    assert narrow.error == pytest.approx(wide.error, rel=1e-4)
    late = weight[:, -1].float()[keep[:, -1]]
    assert ((wide.weight[:, -1][keep[:, -1]] - late).abs() > 1e-3).all()  # the last column did hear of the first


def test_the_rule_sees_compensated_weights_and_the_factor_s_diagonal():
    weight, hessian, _ = problem(3, 12)
    factor = inverse_factor(hessian.float())
    seen = []

    def rule(ahead, diagonal):
        seen.append((ahead.clone(), diagonal.clone()))
        return torch.arange(ahead.shape[1]).expand(3, -1) % 2 == 0

    sweep(weight.float(), factor, rule, width=8, lookahead=4)
    assert [tuple(ahead.shape) for ahead, _ in seen] == [(3, 4)] * 3
    keep = (torch.arange(12) % 2 == 0).expand(3, -1)
    for index, (ahead, diagonal) in enumerate(seen):
        decided = keep.clone()
        decided[:, 4 * index :] = True  # nothing ahead is pruned yet
        expected = brute_force(weight, damped(hessian), decided)[:, 4 * index : 4 * index + 4]
        torch.testing.assert_close(ahead.double(), expected, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(diagonal, factor.upper.diagonal()[4 * index : 4 * index + 4])


def test_joint_rounding_is_compensated_too():
    weight, hessian, _ = problem(5, 16)
    keep = torch.rand(5, 16, generator=torch.Generator().manual_seed(0)) < 0.6
    quantise = minmax_grid(weight, 4)
    found = swept(weight, hessian, keep, quantise=quantise)
    expected = brute_force(weight, damped(hessian), keep, lambda column: quantise(column.float()).double())
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-3, atol=1e-4)
    rounded = quantise((weight.float() * keep)[:, 0])
    assert torch.equal(found.weight[:, 0], rounded)


def test_the_caller_s_weight_is_not_touched_and_its_dtype_comes_back():
    weight, hessian, _ = problem(4, 12)
    keep = torch.ones(4, 12, dtype=torch.bool)
    keep[:, ::2] = False
    for dtype in (torch.float16, torch.float32, torch.float64):
        given_weight = weight.to(dtype)
        before = given_weight.clone()
        found = sweep(given_weight, inverse_factor(hessian.float()), given_mask(keep))
        assert torch.equal(given_weight, before)
        assert found.weight.dtype is dtype


def test_the_factor_s_rows_are_those_of_the_remaining_inverses():
    """U_ii^2 = [H_R^-1]_00 and U_i,i: = [H_R^-1]_0,: / U_ii with R the columns from i on."""
    _, hessian, _ = problem(1, 10)
    upper = inverse_factor(hessian.float()).upper.double()
    torch.testing.assert_close(upper.t() @ upper, torch.linalg.inv(damped(hessian)), rtol=1e-4, atol=1e-4)
    for i in range(10):
        inverse = torch.linalg.inv(damped(hessian)[i:, i:])
        torch.testing.assert_close(upper[i, i:], inverse[0] / inverse[0, 0].sqrt(), rtol=1e-4, atol=1e-4)
        assert not upper[i, :i].any()


def test_damping_rises_tenfold_only_when_it_must():
    _, hessian, _ = problem(1, 10)
    assert inverse_factor(hessian.float(), 0.01).damping == 0.01
    singular = torch.ones(6, 6)
    assert inverse_factor(singular, 0.01).damping == 0.01
    raised = inverse_factor(singular, 1e-30)
    assert 1e-30 < raised.damping <= 1e-3
    assert torch.isfinite(raised.upper).all()
    with pytest.raises(NumericsError, match="cannot be factorised"):
        inverse_factor(torch.full((3, 3), torch.nan))


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 4), columns=st.integers(1, 16), density=st.floats(0, 1), seed=st.integers(0, 10**6))
def test_least_squares_on_a_support_is_lstsq(rows, columns, density, seed):
    weight, hessian, inputs = problem(rows, columns, seed)
    keep = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) < density
    found = solve_on_support(weight, hessian, keep)
    for row in range(rows):
        support = keep[row].numpy()
        expected = np.zeros(columns)
        target = (inputs @ weight[row]).numpy()
        expected[support] = np.linalg.lstsq(inputs.numpy()[:, support], target, rcond=None)[0]
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-6, atol=1e-8)


def test_the_sweep_lies_between_plain_zeroing_and_least_squares():
    weight, hessian, inputs = problem(16, 64, tokens=300)
    keep = torch.rand(16, 64, generator=torch.Generator().manual_seed(0)) < 0.5

    def error(value):
        return float((inputs @ (value.double() - weight).t()).square().sum())

    best, ours = error(solve_on_support(weight, hessian, keep)), error(swept(weight, hessian, keep).weight)
    assert best < 0.9 * ours
    assert ours < 0.9 * error(weight * keep)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 6),
    columns=st.integers(1, 12),
    bits=st.integers(2, 16),
    sign=st.sampled_from(["both", "positive", "negative", "zero row"]),
    seed=st.integers(0, 10**6),
)
def test_the_grid_maps_zero_to_zero_and_its_levels_to_themselves(rows, columns, bits, sign, seed):
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight = {"both": weight, "positive": weight.abs(), "negative": -weight.abs(), "zero row": weight}[sign]
    if sign == "zero row":
        weight[0] = 0
    quantise = minmax_grid(weight, bits)
    assert torch.equal(quantise(torch.zeros(rows)), torch.zeros(rows))
    low, high = weight.amin(1).clamp(max=0), weight.amax(1).clamp(min=0)
    span = torch.where(low == high, torch.full_like(low, 2.0), high - low)
    step = span / (2**bits - 1)
    for column in weight.t():
        once = quantise(column)
        assert torch.equal(quantise(once), once)
        # half a step, and half a step more at an end, since the zero level is rounded as well
        assert ((once - column).abs() <= 1.0001 * step).all()
    spread = torch.linspace(-3, 3, 2001).unsqueeze(1) * span  # far beyond both ends
    levels = torch.stack([quantise(column) for column in spread])
    assert max(column.unique().numel() for column in levels.t()) <= 2**bits
    assert ((levels.amax(0) - levels.amin(0)) <= span * 1.0001).all()
