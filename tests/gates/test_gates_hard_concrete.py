import math

import pytest
import torch

from secateur.core.errors import BudgetError, ModelError, NumericsError, SettingsError
from secateur.gates.hard_concrete import HardConcrete
from secateur.gates.noise import NoiseStream

POINTS = 200_001
MIDPOINTS = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
GATES = [
    HardConcrete(),
    HardConcrete(beta=0.83, delta=0.5),
    HardConcrete(beta=0.83, delta=0.1),
    HardConcrete(beta=0.4, gamma=-0.3, zeta=1.2),
]
LOG_ALPHAS = [-4.0, -1.0, 0.0, 0.7, 3.0]


def quadrature(gate, log_alpha):
    """z at every midpoint of the noise, in float64."""
    return gate.sample(log_alpha.expand(POINTS), MIDPOINTS)


def closed_from_distribution(gate, log_alpha):
    """E[z] and dE[z]/d log_alpha from P(z > x), without any sampling formula: E[z] = integral of P(z > x) over 0..1."""
    x = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    s = (x - gate.gamma) / (gate.zeta - gate.gamma)
    a = log_alpha - gate.beta * torch.log(s / (1 - s))
    # P(noise > -a) for noise = log((u + d) / (1 - u + d)), solved for u
    e = torch.exp(-a)
    u = (e * (1 + gate.delta) - gate.delta) / (1 + e)
    inside = (u > 0) & (u < 1)
    density = torch.where(inside, (1 + 2 * gate.delta) * e / (1 + e) ** 2, torch.zeros_like(u))
    return float((1 - u.clamp(0, 1)).mean()), float(density.mean())


def test_sample_by_hand():
    gate = HardConcrete()
    u = torch.tensor([0.5, 0.9, 1e-6, 1 - 1e-6], dtype=torch.float64)
    z = gate.sample(torch.tensor([0.0, -1.0, 0.0, 0.0], dtype=torch.float64), u)
    s = 1 / (1 + math.exp(-(math.log(9) - 1) * 1.5))
    assert z.tolist() == pytest.approx([0.5, s * 1.2 - 0.1, 0.0, 1.0])
    assert z[2] == 0
    assert z[3] == 1
    # EcoDiff's delta, as written: log(u + d) - log(1 - u + d)
    bounded = HardConcrete(beta=0.83, delta=0.5)
    z = bounded.sample(torch.tensor([-0.5], dtype=torch.float64), torch.tensor([0.8], dtype=torch.float64))
    s = 1 / (1 + math.exp(-(math.log(1.3 / 0.7) - 0.5) / 0.83))
    assert z.item() == pytest.approx(s * 1.2 - 0.1)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", LOG_ALPHAS)
def test_open_probability_is_the_share_of_open_samples(gate, value):
    log_alpha = torch.tensor(value, dtype=torch.float64)
    open_share = float((quadrature(gate, log_alpha) > 0).double().mean())
    assert float(gate.open_probability(log_alpha)) == pytest.approx(open_share, abs=1e-5)


def test_open_probability_by_hand():
    # Louizos et al.: sigmoid(log_alpha - beta log(0.1 / 1.1))
    expected = 1 / (1 + math.exp(-(0.5 - 2 / 3 * math.log(0.1 / 1.1))))
    assert float(HardConcrete().open_probability(torch.tensor(0.5))) == pytest.approx(expected)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", LOG_ALPHAS)
def test_gradient_of_the_open_probability_against_finite_differences(gate, value):
    log_alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(gate.open_probability(log_alpha), log_alpha)
    up, down = (gate.open_probability(log_alpha.detach() + h) for h in (1e-6, -1e-6))
    assert float(gradient) == pytest.approx(float(up - down) / 2e-6, abs=1e-8)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", LOG_ALPHAS)
def test_expectation_and_its_gradient(gate, value):
    """Gradient through samples, common noise = gradient of the expectation, two independent ways."""
    log_alpha = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    mean = quadrature(gate, log_alpha).mean()
    (through_samples,) = torch.autograd.grad(mean, log_alpha)
    h = 1e-3
    up, down = (quadrature(gate, log_alpha.detach() + e).mean() for e in (h, -h))
    assert float(through_samples) == pytest.approx(float(up - down) / (2 * h), abs=2e-5)
    expectation, derivative = closed_from_distribution(gate, log_alpha.detach())
    assert mean.item() == pytest.approx(expectation, abs=1e-5)
    assert float(through_samples) == pytest.approx(derivative, abs=1e-4)


def test_values_without_noise():
    gate = HardConcrete()
    log_alpha = torch.tensor([-10.0, 0.0, 1.0, 10.0], dtype=torch.float64)
    expected = [0.0, 0.5, 1.2 / (1 + math.exp(-1)) - 0.1, 1.0]
    assert gate.value(log_alpha).tolist() == pytest.approx(expected)


def test_counted_values_have_the_expected_number_of_zeros():
    gate = HardConcrete()
    # P(open) of log_alpha = beta log(0.1 / 1.1) is exactly 1/2: of eight such gates four are closed, ties by index
    even = 2 / 3 * math.log(0.1 / 1.1)
    log_alpha = torch.full((8,), even, dtype=torch.float64)
    value = gate.counted_value(log_alpha)
    soft = 1 / (1 + math.exp(-even * 0.8 * 1.5))
    assert value.tolist() == pytest.approx([0.0] * 4 + [soft] * 4)
    log_alpha = torch.tensor([60.0, 50.0, -60.0, 70.0])
    assert gate.counted_value(log_alpha).tolist() == [1, 1, 0, 1]
    # gates that are certainly open keep their value; half of the undecided ones are closed
    log_alpha = torch.cat([torch.full((20,), 40.0), torch.full((20,), even)])
    value = gate.counted_value(log_alpha)
    assert int((value == 0).sum()) == 10
    assert (value[:20] == 1).all()


def test_frozen_by_value_and_by_count():
    gate = HardConcrete()
    log_alpha = torch.tensor([-9.0, -3.0, -2.0, 4.0])
    frozen = gate.frozen(log_alpha)
    assert frozen.mask.tolist() == [False, False, True, True]  # value > 0 iff log_alpha > log(0.1 / 1.1) = -2.4
    assert torch.equal(frozen.mask, gate.value(log_alpha) > 0)
    assert frozen.sampled_share == pytest.approx(float(gate.open_probability(log_alpha).mean()))
    assert frozen.frozen_share == 0.5
    assert gate.frozen(log_alpha, threshold=0.5).mask.tolist() == [False, False, False, True]
    assert gate.frozen(log_alpha, keep=3).mask.tolist() == [False, True, True, True]
    saturated = torch.tensor([80.0, 90.0, 70.0])  # values and probabilities are all exactly 1
    assert gate.frozen(saturated, keep=1).mask.tolist() == [False, True, False]
    with pytest.raises(BudgetError, match="log_alpha"):
        gate.frozen(log_alpha, keep=5)
    with pytest.raises(ModelError, match="nothing was learned"):
        gate.frozen(torch.full((4,), 3.0), keep=2)


def test_replayed_noise_gives_the_same_gates_and_fresh_noise_others():
    gate, stream, log_alpha = HardConcrete(), NoiseStream(0, "heads"), torch.zeros(50)
    one = gate.sample(log_alpha, stream.uniform((50,), 4, "block 2"))
    assert torch.equal(one, gate.sample(log_alpha, NoiseStream(0, "heads").uniform((50,), 4, "block 2")))
    assert not torch.equal(one, gate.sample(log_alpha, stream.uniform((50,), 5, "block 2")))


def test_half_precision_is_computed_in_float32():
    u = NoiseStream(0, "half").uniform((64,), 0)
    log_alpha = torch.linspace(-3, 3, 64).bfloat16().requires_grad_()
    z = HardConcrete().sample(log_alpha, u)
    assert z.dtype == torch.float32
    assert torch.equal(z, HardConcrete().sample(log_alpha.detach().float(), u))
    z.sum().backward()
    assert log_alpha.grad.dtype == torch.bfloat16


def test_bad_input_is_refused():
    gate = HardConcrete()
    with pytest.raises(ModelError, match=r"noise has shape \[3\], the gates \[2, 3\]"):
        gate.sample(torch.zeros(2, 3), torch.full((3,), 0.5))
    nan = torch.tensor([float("nan")])
    for call in (gate.value, gate.open_probability, gate.frozen, gate.counted_value, lambda x: gate.sample(x, x)):
        with pytest.raises(NumericsError, match="log_alpha: 1 of 1"):
            call(nan)
    for wrong in ({"beta": 0}, {"gamma": 0.0}, {"zeta": 1.0}, {"delta": -0.1}):
        with pytest.raises(SettingsError, match="hard-concrete gate needs"):
            HardConcrete(**wrong)
