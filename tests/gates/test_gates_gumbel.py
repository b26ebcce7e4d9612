import math

import pytest
import torch

from secateur.core.errors import BudgetError, ModelError, NumericsError, SettingsError
from secateur.gates.gumbel import GumbelSigmoid, Noise
from secateur.gates.noise import NoiseStream

POINTS = 200_001
MIDPOINTS = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
GATES = [
    GumbelSigmoid(),
    GumbelSigmoid(noise=Noise.GUMBEL),
    GumbelSigmoid(temperature=1.0, noise=Noise.GUMBEL, base=3.0),
    GumbelSigmoid(temperature=1.0, base=-0.5),
]
LOGITS = [-3.0, -0.5, 0.0, 1.2]


def expectation_from_distribution(gate, logit):
    """E[soft] and its derivative from P(soft > x), without the sampling formula."""
    x = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    a = logit + gate.base - gate.temperature * torch.log(x / (1 - x))  # soft > x iff noise > -a
    if gate.noise is Noise.LOGISTIC:
        p = 1 / (1 + torch.exp(-a))
        return float(p.mean()), float((p * (1 - p)).mean())
    return float((1 - torch.exp(-torch.exp(a))).mean()), float((torch.exp(a - torch.exp(a))).mean())


def test_sample_by_hand():
    u = torch.tensor([0.3], dtype=torch.float64)
    logit = torch.tensor([0.2], dtype=torch.float64)
    logistic = 1 / (1 + math.exp(-(0.2 + math.log(0.3 / 0.7)) / 0.4))
    assert GumbelSigmoid().sample(logit, u).item() == pytest.approx(logistic)
    single = 1 / (1 + math.exp(-(0.2 + 3 - math.log(-math.log(0.3))) / 0.4))
    assert GumbelSigmoid(noise=Noise.GUMBEL, base=3.0).sample(logit, u).item() == pytest.approx(single)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", LOGITS)
def test_open_probability_is_the_share_of_open_hard_gates(gate, value):
    logits = torch.full((POINTS,), value, dtype=torch.float64)
    share = float(gate.sample(logits, MIDPOINTS, hard=True).mean())
    assert float(gate.open_probability(logits[:1])) == pytest.approx(share, abs=1e-5)


@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("value", LOGITS)
def test_expectation_and_its_gradient(gate, value):
    logit = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    mean = gate.sample(logit.expand(POINTS), MIDPOINTS).mean()
    (through_samples,) = torch.autograd.grad(mean, logit)
    h = 1e-4
    up, down = (gate.sample((logit.detach() + e).expand(POINTS), MIDPOINTS).mean() for e in (h, -h))
    assert float(through_samples) == pytest.approx(float(up - down) / (2 * h), abs=1e-6)
    expectation, derivative = expectation_from_distribution(gate, logit.detach())
    assert mean.item() == pytest.approx(expectation, abs=1e-5)
    assert float(through_samples) == pytest.approx(derivative, abs=1e-4)


@pytest.mark.parametrize("gate", GATES)
def test_gradient_of_the_open_probability(gate):
    logits = torch.tensor(LOGITS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(gate.open_probability, logits)


@pytest.mark.parametrize("gate", GATES)
def test_hard_gates_are_binary_with_the_gradient_of_the_soft_ones(gate):
    u = NoiseStream(0, "hard").uniform((500,), 0)
    logits = torch.linspace(-4, 4, 500).requires_grad_()
    weights = torch.linspace(-1, 1, 500)
    soft = gate.sample(logits, u)
    hard = gate.sample(logits, u, hard=True)
    assert torch.equal(hard, (soft >= 0.5).float())
    assert 0 < float(hard.detach().mean()) < 1
    (of_soft,) = torch.autograd.grad((soft * weights).sum(), logits)
    (of_hard,) = torch.autograd.grad((hard * weights).sum(), logits)
    assert torch.equal(of_hard, of_soft)


def test_the_median_of_the_noise_is_the_threshold_of_a_frozen_mask():
    gate = GumbelSigmoid(noise=Noise.GUMBEL, base=3.0)
    cut = -3 + math.log(math.log(2))  # keep iff logit + 3 + 0.3665 >= 0
    assert -math.log(math.log(2)) == pytest.approx(0.3665, abs=1e-4)
    logits = torch.tensor([cut - 0.01, cut + 0.01, -3.0, -4.0], dtype=torch.float64)
    assert gate.frozen(logits).mask.tolist() == [False, True, True, False]
    torch.testing.assert_close(gate.value(torch.tensor(cut, dtype=torch.float64)), torch.tensor(0.5).double())
    assert torch.equal(gate.frozen(logits).mask, gate.value(logits) > 0.5)
    # without the median too few are kept: symmetric logits around -base must split above one half
    many = torch.linspace(-2, 2, 4001, dtype=torch.float64) - 3
    share = gate.frozen(many).frozen_share
    assert share > 0.55
    assert gate.frozen(many).sampled_share == pytest.approx(float(gate.open_probability(many).mean()))
    plain = GumbelSigmoid()
    assert plain.frozen(torch.tensor([-0.01, 0.01])).mask.tolist() == [False, True]


def test_frozen_by_count_is_exact_even_where_probabilities_saturate():
    gate = GumbelSigmoid(noise=Noise.GUMBEL)
    assert gate.frozen(torch.tensor([50.0, 70.0, 60.0]), keep=2).mask.tolist() == [False, True, True]
    frozen = gate.frozen(torch.tensor([1.0, 1.0, 2.0, 1.0]), keep=2)
    assert frozen.mask.tolist() == [False, False, True, True]
    with pytest.raises(BudgetError, match="logits"):
        gate.frozen(torch.tensor([1.0]), keep=2)


def test_replay():
    gate, logits = GumbelSigmoid(), torch.zeros(3, 40)
    draw = NoiseStream(1, "pdg")
    first = gate.sample(logits, draw.uniform((3, 40), 9), hard=True)
    assert torch.equal(first, gate.sample(logits, NoiseStream(1, "pdg").uniform((3, 40), 9), hard=True))
    assert not torch.equal(first, gate.sample(logits, draw.uniform((3, 40), 10), hard=True))


def test_bad_input_is_refused():
    with pytest.raises(SettingsError, match="temperature of a Gumbel-sigmoid gate is 0"):
        GumbelSigmoid(temperature=0)
    gate = GumbelSigmoid()
    with pytest.raises(ModelError, match=r"noise has shape \[4\], the gates \[2, 4\]"):
        gate.sample(torch.zeros(2, 4), torch.full((4,), 0.5))
    nan = torch.tensor([float("nan")])
    for call in (gate.value, gate.open_probability, gate.frozen, lambda x: gate.sample(x, torch.tensor([0.5]))):
        with pytest.raises(NumericsError, match="logits: 1 of 1"):
            call(nan)
