import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import NumericsError
from secateur.stats import listeners
from secateur.stats.listeners import AbsoluteMean, Hessian, SecondMoment, TokenMoments

KINDS = [SecondMoment, Hessian]
ALL = [*KINDS, TokenMoments, AbsoluteMean]


def content(stat):
    return torch.stack([stat.mean, stat.deviations]) if isinstance(stat, TokenMoments) else stat.value


def closed_form(kind, x, samples):
    """In float64 from all tokens at once."""
    x = x.double().numpy()
    if kind is SecondMoment:
        return np.array([sum(float(v) ** 2 for v in column) for column in x.T]) / samples
    return 2 * sum(np.outer(row, row) for row in x) / samples


@settings(deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(KINDS),
    batches=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=5),
    features=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 99),
)
def test_running_values_equal_the_closed_form(kind, batches, features, dtype, seed):
    torch.manual_seed(seed)
    stat = kind(features)
    parts = [torch.randn(samples * tokens, features).to(dtype) for samples, tokens in batches]
    for part, (samples, _) in zip(parts, batches, strict=True):
        stat.update(part, samples)
    total = sum(samples for samples, _ in batches)
    expected = torch.from_numpy(closed_form(kind, torch.cat(parts), total))
    assert stat.value.dtype is torch.float32
    assert torch.allclose(stat.value.double(), expected, rtol=1e-4, atol=1e-5)
    assert stat.samples == total


def test_hand_computed():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    moment, hessian, spread, absolute = SecondMoment(2), Hessian(2), TokenMoments(2), AbsoluteMean(2)
    for stat in (moment, hessian, spread, absolute):
        stat.update(x, 1)  # one sample of two tokens
    assert moment.value.tolist() == [10, 20]  # a sum over tokens, not a mean
    assert hessian.value.tolist() == [[20, 28], [28, 40]]
    assert spread.mean.tolist() == [2, 3]
    assert spread.variance.tolist() == [2, 2]
    assert absolute.value.tolist() == [2, 3]
    for stat in (moment, hessian, spread, absolute):
        stat.update(torch.zeros(1, 2), 1)
    assert moment.value.tolist() == [5, 10]
    assert hessian.value.tolist() == [[10, 14], [14, 20]]
    assert spread.mean.tolist() == pytest.approx([4 / 3, 2])
    assert spread.variance.tolist() == pytest.approx([7 / 3, 4])  # of 1, 3, 0 and 2, 4, 0
    assert absolute.value.tolist() == [1, 1.5]  # both samples weigh the same, whatever their length
    assert torch.equal(hessian.value.diagonal(), 2 * moment.value)


def test_half_precision_does_not_overflow():
    moment = SecondMoment(1)
    for _ in range(3):
        moment.update(torch.full((4, 1), 60000.0, dtype=torch.float16), 2)
    assert moment.value.item() == pytest.approx(2 * 60000.0**2, rel=1e-3)


def test_pieces_of_a_large_input_are_all_counted(monkeypatch):
    monkeypatch.setattr(listeners, "CHUNK", 7)
    x = torch.randn(11, 3, generator=torch.Generator().manual_seed(0))
    for features in (3, 1):
        moment = SecondMoment(features)
        moment.update(x[:, :features], 2)
        assert torch.allclose(moment.value, x[:, :features].square().sum(0) / 2)
    monkeypatch.setattr(listeners, "CHUNK", 1)  # fewer than one row
    moment = SecondMoment(3)
    moment.update(x, 2)
    assert torch.allclose(moment.value, x.square().sum(0) / 2)


@settings(deadline=None, max_examples=40)
@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), shift=st.sampled_from([0, 1e3]), seed=st.integers(0, 99)
)
def test_moments_do_not_depend_on_how_the_data_is_cut(sizes, shift, seed):
    torch.manual_seed(seed)
    parts = [torch.randn(size, 3) + shift for size in sizes]
    stat = TokenMoments(3)
    for part in parts:
        stat.update(part, 1)
    everything = torch.cat(parts).double()
    assert torch.allclose(stat.mean, everything.mean(0), rtol=1e-6)
    expected = everything.var(0) if len(everything) > 1 else torch.zeros(3, dtype=torch.float64)
    assert torch.allclose(stat.variance.double(), expected, rtol=1e-3, atol=1e-6)


def test_absolute_mean_does_not_cancel_signs_and_weighs_samples_alike():
    stat = AbsoluteMean(1)
    stat.update(torch.tensor([[-1.0], [1.0], [-4.0], [4.0]]), 2)  # two samples of two tokens
    stat.update(torch.full((8, 1), -10.0), 1)
    assert stat.value.item() == pytest.approx((1 + 4 + 10) / 3)


@pytest.mark.parametrize("kind", ALL)
def test_a_batch_without_tokens_changes_no_sum(kind):
    # an expert to which nothing was routed
    first, last = kind(2), kind(2)
    x = torch.tensor([[1.0, -2.0]])
    first.update(torch.zeros(0, 2), 1)
    first.update(x, 1)
    last.update(x, 1)
    last.update(torch.zeros(0, 2), 1)
    assert torch.equal(content(first), content(last))
    assert content(first).isfinite().all()
    assert first.samples == last.samples == 2


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_infinity_are_found_whatever_follows(kind, bad):
    stat = kind(2)
    stat.update(torch.tensor([[1.0, bad]]), 1)
    stat.update(torch.ones(5, 2), 5)
    with pytest.raises(NumericsError, match=r"enter layer 'fc\.weight' contain NaN or infinity"):
        stat.check("fc.weight")
    clean = kind(2)
    clean.check("fc.weight")


@pytest.mark.parametrize("kind", ALL)
def test_inputs_are_left_alone(kind):
    x = torch.ones(3, 2)
    kind(2).update(x, 1)
    assert x.eq(1).all()
