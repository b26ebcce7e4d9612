"""Principal axes of streams of states."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.stats.principal import Scatter, between, entering, principal_axes, projection, random_axes


def states(tokens=200, width=10, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=rng) * torch.logspace(0, -3, width)


def test_axes_are_the_singular_vectors_of_the_states():
    x = states()
    scatter = Scatter(10)
    for part in x.split(70):
        scatter.add(part)
    axes = scatter.axes()
    _, values, vectors = torch.linalg.svd(x.double(), full_matrices=False)
    torch.testing.assert_close((axes.basis * vectors.T).sum(0).abs(), torch.ones(10, dtype=torch.float64))
    torch.testing.assert_close(axes.energy, values.square())
    torch.testing.assert_close(axes.basis.T @ axes.basis, torch.eye(10, dtype=torch.float64))


def test_sums_are_formed_in_float64():
    """Small directions drown in the rounding of large ones otherwise."""
    x = states(tokens=1000)
    scatter = Scatter(10)
    scatter.add(x)
    exact = torch.tensor(x.double().numpy().T @ x.double().numpy())
    torch.testing.assert_close(scatter.matrix, exact, rtol=1e-10, atol=0)
    assert not torch.allclose((x.T @ x).double(), exact, rtol=1e-10, atol=0)


def test_padding_is_left_out():
    x, padded = states(), Scatter(10)
    garbage = torch.full((200, 10), 1e3)
    padded.add(torch.stack([x, garbage], 1), torch.tensor([[1, 0]]).expand(200, 2))
    plain = Scatter(10)
    plain.add(x)
    torch.testing.assert_close(padded.matrix, plain.matrix)


@pytest.mark.parametrize("rank", [1, 4])
def test_centred_states_have_the_constant_direction_last(rank):
    """Also where they leave other directions empty."""
    low = states(seed=3)[:, :rank] @ torch.randn(rank, 10, generator=torch.Generator().manual_seed(4))
    scatter = Scatter(10, centre=True)
    scatter.add(low + 5)
    last = scatter.axes().basis[:, -1]
    torch.testing.assert_close(last.abs(), torch.full((10,), 10**-0.5, dtype=torch.float64))


@settings(max_examples=20, deadline=None)
@given(width=st.integers(2, 9), kept=st.integers(1, 9), centre=st.booleans(), seed=st.integers(0, 99))
def test_projections_are_idempotent_and_shrink(width, kept, centre, seed):
    rng = torch.Generator().manual_seed(seed)
    project = projection(random_axes(width, rng, centre).basis[:, : min(kept, width)], centre)
    x = torch.randn(5, width, generator=rng, dtype=torch.float64)
    torch.testing.assert_close(project(project(x)), project(x))
    assert (project(x).norm(dim=-1) <= x.norm(dim=-1) + 1e-9).all()


def test_random_axes_depend_on_the_generator_alone():
    one, same, other = (random_axes(8, torch.Generator().manual_seed(seed)).basis for seed in (0, 0, 1))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other)
    torch.testing.assert_close(one.T @ one, torch.eye(8, dtype=torch.float64))


def test_damping_keeps_the_axes_of_a_clear_case():
    scatter = torch.diag(torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64))
    axes = principal_axes(scatter)
    assert axes.basis.abs().argmax(0).tolist() == [1, 2, 0]
    assert axes.energy.tolist() == [9, 4, 1]
    assert axes.share(2) == pytest.approx(13 / 14)


class Half(nn.Module):
    """h + f(norm(h))."""

    def __init__(self):
        super().__init__()
        self.norm, self.f = nn.LayerNorm(6), nn.Linear(6, 6)

    def forward(self, h):
        return h + self.f(self.norm(h))


def test_hooks_project_the_stream_and_go_away():
    torch.manual_seed(0)
    block, x = Half(), torch.randn(2, 4, 6)
    with torch.no_grad():
        plain, moved = block(x), 3 * block(2 * x)
        with entering(block, lambda state: 2 * state), between(block.norm, block.f, lambda state: 3 * state):
            torch.testing.assert_close(block(x), moved)
        assert torch.equal(block(x), plain)
    assert not block._forward_pre_hooks
    assert not block.f._forward_hooks
