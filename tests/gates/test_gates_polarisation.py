import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import BudgetError, DataError, ModelError, NumericsError
from secateur.gates.binary import binary_gate
from secateur.gates.polarisation import (
    activation_loss,
    agreement,
    agreement_loss,
    consensus,
    polarization_regulariser,
)

binary_batches = st.integers(2, 9).flatmap(
    lambda b: st.integers(1, 5).flatmap(
        lambda n: st.lists(st.lists(st.integers(0, 1), min_size=n, max_size=n), min_size=b, max_size=b)
    )
)


def test_half_the_batch_against_half_is_exactly_a_quarter():
    # every sample is confident, so a loss on p (1 - p) would be almost 0
    p = torch.tensor([[0.999], [0.999], [0.001], [0.001]], requires_grad=True)
    assert agreement_loss(binary_gate(p)).item() == 0.25
    assert float((p * (1 - p)).detach().mean()) < 0.002


def test_undecided_but_unanimous_samples_cost_nothing():
    assert agreement_loss(binary_gate(torch.full((8, 3), 0.51))).item() == 0
    assert agreement_loss(binary_gate(torch.full((8, 3), 0.49))).item() == 0


@settings(deadline=None, max_examples=60)
@given(binary_batches)
def test_losses_and_gradients_against_loops(batch):
    B, L = len(batch), len(batch[0])
    p = torch.tensor(batch, dtype=torch.float64).mul(0.6).add(0.2).requires_grad_()
    loss = agreement_loss(binary_gate(p))
    means = [sum(row[i] for row in batch) / B for i in range(L)]
    assert float(loss.detach()) == pytest.approx(sum(m * (1 - m) for m in means) / L)
    loss.backward()
    for row in p.grad:
        assert row.tolist() == pytest.approx([(1 - 2 * m) / (B * L) for m in means])
    gates = binary_gate(p.detach())
    assert float(activation_loss(gates)) == pytest.approx(sum(means) / L)
    costs = torch.arange(1, L + 1, dtype=torch.float64)
    weighted = sum((i + 1) * m for i, m in enumerate(means)) / sum(range(1, L + 1))
    assert float(activation_loss(gates, costs)) == pytest.approx(weighted)
    assert float(activation_loss(gates, costs, 0.3)) == pytest.approx((weighted - 0.3) ** 2)
    pairs = [row[i] == (means[i] > 0.5) for row in batch for i in range(L) if means[i] != 0.5]
    ties = sum(m == 0.5 for m in means) * B / 2
    assert agreement(gates) == pytest.approx((sum(pairs) + ties) / (B * L))


def test_an_open_majority_pushes_open_and_a_closed_one_closed():
    p = torch.tensor([[0.9, 0.1], [0.9, 0.1], [0.1, 0.9]], requires_grad=True)
    agreement_loss(binary_gate(p)).backward()
    assert (p.grad[:, 0] < 0).all()  # descent raises p
    assert (p.grad[:, 1] > 0).all()


def test_target_gradient_has_the_right_side():
    p = torch.full((4, 2), 0.9, requires_grad=True)
    activation_loss(binary_gate(p), target=0.5).backward()
    assert torch.allclose(p.grad, torch.full((4, 2), 2 * 0.5 / 8))


def test_consensus_keeps_what_most_samples_open():
    rate = torch.tensor([0.0, 0.5, 0.51, 1.0])
    static = consensus(rate)
    assert static.mask.tolist() == [False, False, True, True]
    assert static.sampled_share == pytest.approx(0.5025)
    assert consensus(torch.tensor([0.1, 0.3, 0.2]), minimum=1).mask.tolist() == [False, True, False]


def test_polarization_of_scaling_factors_by_hand():
    g = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64, requires_grad=True)  # mean 2
    loss = polarization_regulariser(g, t=1.5)
    assert float(loss.detach()) == pytest.approx(1.5 * 8 - (2 + 1 + 0 + 3))
    # off the kinks, one above the mean of 1.3 and three below, so that the gradient through the mean counts
    shifted = torch.tensor([0.3, -1.0, 0.9, 5.0], dtype=torch.float64, requires_grad=True)
    assert polarization_regulariser(shifted, 1.5).item() == pytest.approx(1.5 * 7.2 - 7.4)
    assert torch.autograd.gradcheck(lambda x: polarization_regulariser(x, 1.5), shifted)
    # over layers: one common mean
    parts = [shifted[:1].detach(), shifted[1:].detach().view(1, 3)]
    together = polarization_regulariser(shifted.detach(), 1.5)
    assert float(polarization_regulariser(parts, 1.5)) == pytest.approx(float(together))
    # bounded factors: two groups beat all factors at the mean
    split, equal = torch.tensor([0.0, 0.0, 1.0, 1.0]), torch.full((4,), 0.5)
    assert polarization_regulariser(split, 1.2) < polarization_regulariser(equal, 1.2)


def test_bad_input_is_refused():
    with pytest.raises(DataError, match="at least 2 samples"):
        agreement_loss(torch.ones(1, 4))
    with pytest.raises(ModelError, match=r"\[samples, units\], got \[4\]"):
        agreement_loss(torch.ones(4))
    for loss in (agreement_loss, activation_loss, agreement):
        with pytest.raises(ModelError, match=r"exactly 0 or 1.*binary_gate"):
            loss(torch.full((4, 2), 0.7))
        with pytest.raises(NumericsError, match="gates: 8 of 8"):
            loss(torch.full((4, 2), float("nan")))
    with pytest.raises(BudgetError, match="share between 0 and 1"):
        activation_loss(torch.ones(4, 2), target=1.5)
    with pytest.raises(NumericsError, match="scaling factors"):
        polarization_regulariser(torch.tensor([float("nan")]))
