import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.scores.blocks import angular, cosine
from secateur.scores.weights import magnitude, taylor, uniform_random, wanda

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
cases = {
    "dtype": st.sampled_from(DTYPES),
    "rows": st.integers(1, 5),
    "columns": st.integers(1, 6),
    "seed": st.integers(0, 99),
}


def drawn(rows, columns, seed, dtype=torch.float32):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(deadline=None, max_examples=40)
@given(**cases)
def test_magnitude_and_taylor_weight_by_weight(dtype, rows, columns, seed):
    W, G = drawn(rows, columns, seed, dtype), drawn(rows, columns, seed + 1, dtype)
    found, change = magnitude(W), taylor(W, G)
    assert found.dtype is change.dtype is torch.float32
    for i in range(rows):
        for j in range(columns):
            w, g = W[i, j].item(), G[i, j].item()
            assert found[i, j].item() == abs(w)
            assert change[i, j].item() == pytest.approx(abs(w * g), rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(**cases)
def test_wanda_weight_by_weight(dtype, rows, columns, seed):
    W, X = drawn(rows, columns, seed, dtype), drawn(7, columns, seed + 2)
    X[:, 0] = 0
    found = wanda(W, X.square().sum(0))
    assert found.shape == W.shape
    assert found.dtype is torch.float32
    for i in range(rows):
        for j in range(columns):
            norm = math.sqrt(sum(x.item() ** 2 for x in X[:, j]))
            assert found[i, j].item() == pytest.approx(abs(W[i, j].item()) * norm, rel=1e-5, abs=0)
    assert found[:, 0].eq(0).all()  # a dead feature scores 0 exactly, never NaN


def test_float64_magnitudes_stay_apart():
    W = torch.tensor([1.0, -(1 + 1e-12)], dtype=torch.float64)
    assert magnitude(W).dtype is torch.float64
    assert magnitude(W)[1] > magnitude(W)[0]


def test_scores_do_not_touch_the_weights():
    W = torch.tensor([[-1.0, 2.0]])
    magnitude(W).zero_()
    taylor(W, W).zero_()
    wanda(W, torch.ones(2)).zero_()
    assert W.tolist() == [[-1.0, 2.0]]


def test_random_scores_follow_the_generator_and_cover_the_interval():
    first, second = (uniform_random((200, 50), torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, uniform_random((200, 50), torch.Generator().manual_seed(4)))
    assert 0 <= first.min() < 0.01
    assert 0.99 < first.max() < 1
    assert first.mean().item() == pytest.approx(0.5, abs=0.01)


# --- blocks -------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 6), st.integers(0, 99), st.sampled_from(DTYPES))
def test_cosine_and_angle_token_by_token(samples, tokens, features, seed, dtype):
    rng = torch.Generator().manual_seed(seed)
    before, after = (torch.randn(samples, tokens, features, generator=rng).to(dtype) for _ in range(2))
    found, angles = cosine(before, after), angular(before.flatten(0, 1), after.flatten(0, 1))
    assert found.shape == angles.shape == (samples * tokens,)
    pairs = zip(
        before.reshape(-1, features).double().numpy(), after.reshape(-1, features).double().numpy(), strict=True
    )
    for index, (a, b) in enumerate(pairs):
        value = float(np.dot(a, b)) / (math.sqrt(np.dot(a, a)) * math.sqrt(np.dot(b, b)))
        assert found[index].item() == pytest.approx(value, abs=1e-12)
        assert angles[index].item() == pytest.approx(math.acos(max(-1, min(1, value))) / math.pi, abs=1e-7)


def test_hand_computed_angles():
    before = torch.tensor([[1.0, 0.0]] * 5)
    after = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0], [0.0, 0.0]])
    assert cosine(before, after).tolist() == pytest.approx([1, 0, -1, math.sqrt(0.5), 0.5])
    assert angular(before, after).tolist() == pytest.approx([0, 0.5, 1, 0.25, 1 / 3], abs=1e-7)


def test_a_state_without_direction_counts_one_half():
    zero, other = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    for before, after in ((zero, other), (other, zero), (zero, zero)):
        assert cosine(before, after).tolist() == [0.5, 0.5]
    # and only that one: its neighbours count as they are
    mixed = torch.cat([zero[:, :1], other[:, :1]], 1)
    assert cosine(mixed, other).tolist() == pytest.approx([0.5, 1])


def test_tiny_and_large_states_have_a_direction():
    tiny, large = torch.full((1, 1, 3), 1e-30), torch.full((1, 1, 3), 1e30)
    assert cosine(tiny, large).item() == pytest.approx(1)
    assert cosine(tiny, -tiny).item() == pytest.approx(-1)
    assert angular(tiny[0], large[0]).item() == pytest.approx(0, abs=1e-7)
