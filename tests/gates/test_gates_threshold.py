import pytest
import torch

from secateur.core.errors import BudgetError, ModelError, NumericsError
from secateur.gates.threshold import LongTail, SigmoidSlope, frozen, soft_threshold, step_gate


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_long_tail_by_hand():
    z = torch.tensor([0.0, 0.1, -0.3, 0.4, 0.41, -1.0, 1.01, 2.9, -3.1], dtype=torch.float64)
    assert LongTail()(z).tolist() == pytest.approx([2, 1.6, 0.8, 0.4, 0.4, 0.4, 0, 0, 0])
    assert LongTail(3.0)(z).tolist() == pytest.approx([2, 1.6, 0.8, 0.4, 0.4, 0.4, 0.4, 0.4, 0])


def test_sigmoid_slope_is_the_derivative_of_the_sigmoid():
    z = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(torch.sigmoid(2.5 * z).sum(), z)
    torch.testing.assert_close(SigmoidSlope(2.5)(z.detach()), expected)


def test_step_gate_by_hand():
    scores, threshold = leaf(-1.5, 0.5, 0.6, 1.2), leaf(0.5)
    gate = step_gate(scores, threshold)
    assert gate.tolist() == [0, 0, 1, 1]  # at the threshold: closed
    gate.backward(torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64))
    slopes = [0, 2, 2 - 4 * 0.1, 0.4]
    expected = [slope * up for slope, up in zip(slopes, [1, 10, 100, 1000], strict=True)]
    assert scores.grad.tolist() == pytest.approx(expected)
    assert threshold.grad.item() == pytest.approx(-sum(expected))


def test_the_surrogate_gradient_is_that_of_the_surrogates_integral():
    """dL/dt against finite differences of a loss in which the step is replaced by the integral of its slope."""
    scores = torch.linspace(-2.9, 2.7, 23, dtype=torch.float64)
    ups = torch.cos(torch.arange(23, dtype=torch.float64))
    threshold = leaf(0.05)
    step_gate(scores, threshold, LongTail(3.0)).backward(ups)

    def integral(z):
        a = z.abs()
        inner = 2 * a - 2 * a**2
        return torch.sign(z) * torch.where(a <= 0.4, inner, 0.48 + 0.4 * (a.clamp(max=3.0) - 0.4))

    up, down = ((ups * integral(scores - 0.05 - h)).sum() for h in (1e-6, -1e-6))
    assert threshold.grad.item() == pytest.approx(float(up - down) / 2e-6, abs=1e-6)


def test_a_fresh_threshold_is_not_dead():
    # standardised scores and a threshold that keeps nearly everything, as a run starts
    scores = torch.linspace(-1.7, 1.7, 16, dtype=torch.float64)
    alive, dead = leaf(-2.0), leaf(-2.0)
    assert step_gate(scores, alive, LongTail(3.0)).sum() == 16
    step_gate(scores, alive, LongTail(3.0)).sum().backward()
    step_gate(scores, dead, SigmoidSlope(50.0)).sum().backward()  # too narrow: the trap
    assert alive.grad.item() < -3
    assert abs(dead.grad.item()) < 1e-3


def test_scores_can_be_kept_out_of_the_gradient():
    weight, threshold = leaf(1.0, 2.0), leaf(1.5)
    step_gate(weight.detach(), threshold).sum().backward()
    assert weight.grad is None
    assert threshold.grad.item() != 0


def test_thresholds_per_row():
    scores = torch.tensor([[0.1, 0.9], [0.1, 0.9]], dtype=torch.float64)
    threshold = torch.tensor([[0.5], [0.0]], dtype=torch.float64, requires_grad=True)
    gate = step_gate(scores, threshold)
    assert gate.tolist() == [[0, 1], [1, 1]]
    gate.sum().backward()
    assert threshold.grad.shape == (2, 1)
    # distances 0.4, 0.4 and 0.1, 0.9: slopes 0.4 + 0.4 and 1.6 + 0.4
    assert threshold.grad.flatten().tolist() == pytest.approx([-0.8, -2.0])


def test_a_minimum_stays_open_and_still_learns():
    scores, threshold = leaf(0.1, 0.3, 0.2), leaf(0.5)
    gate = step_gate(scores, threshold, minimum=1)
    assert gate.tolist() == [0, 1, 0]
    gate.sum().backward()
    assert scores.grad.tolist() == pytest.approx([0.4, 1.2, 0.8])
    with pytest.raises(BudgetError, match="0 to 3"):
        step_gate(scores, threshold, minimum=4)


def test_soft_threshold_and_its_gradients():
    weight, threshold = leaf(-2.0, -0.5, 0.2, 1.5), leaf(0.5)
    soft = soft_threshold(weight, threshold)
    assert soft.tolist() == pytest.approx([-1.5, 0, 0, 1.0])
    ups = torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=torch.float64)
    soft.backward(ups)
    assert weight.grad.tolist() == [1, 0, 0, 1000]
    assert threshold.grad.item() == 1 - 1000  # minus the sign of each kept weight
    smooth = leaf(-2.0, -0.4, 0.2, 1.5)  # away from the kinks
    assert torch.autograd.gradcheck(lambda w, s: soft_threshold(w, torch.sigmoid(s)), (smooth, leaf(0.1)))
    assert soft_threshold(torch.tensor([1.0]).bfloat16(), torch.tensor(0.5).bfloat16()).dtype == torch.bfloat16


def test_frozen_masks_of_both_kinds():
    weight = torch.tensor([-2.0, -0.5, 0.2, 1.5])
    result = frozen(weight.abs(), torch.tensor(0.5))
    assert torch.equal(result.mask, soft_threshold(weight, torch.tensor(0.5)) != 0)
    assert result.shift == 0
    held = frozen(weight, torch.tensor(9.0), minimum=1)
    assert held.mask.tolist() == [False, False, False, True]
    assert held.sampled_share == 0  # the minimum shows as a shift
    assert held.shift == 0.25


def test_bad_input_is_refused():
    nan = torch.tensor([float("nan"), 1.0])
    with pytest.raises(NumericsError, match="scores: 1 of 2"):
        step_gate(nan, torch.tensor(0.0))
    with pytest.raises(NumericsError, match="threshold: 1 of 1"):
        step_gate(torch.zeros(2), nan[:1])
    with pytest.raises(NumericsError, match="weight: 1 of 2"):
        soft_threshold(nan, torch.tensor(0.0))
    with pytest.raises(ModelError, match=r"soft threshold is -0\.25.*sigmoid"):
        soft_threshold(torch.ones(2), torch.tensor(-0.25))
