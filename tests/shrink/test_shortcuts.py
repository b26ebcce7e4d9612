"""Shortcuts and norms of the original width, on a block written out by hand."""

import copy
import pickle

import pytest
import torch
from torch import nn

from secateur.shrink.additions import additions_of, attach
from secateur.shrink.shortcuts import RootMeanSquare, Shortcut

WIDTH = 6


class Branch(nn.Module):
    """h + f(norm(h))."""

    def __init__(self, entered=WIDTH, left=WIDTH):
        super().__init__()
        self.norm, self.f = RootMeanSquare(WIDTH, 1e-5), nn.Linear(entered, left)

    def forward(self, h):
        return h + self.f(self.norm(h))


def built(entered, left, block):
    torch.manual_seed(0)
    model = nn.Sequential(Branch(entered, left))
    addition = {"kind": "shortcut", "host": "0.f", "norm": "0.norm", "block": block, "shape": [entered, left]}
    undo = attach(model, [addition])
    with torch.no_grad():
        model[0].f.shortcut.weight.normal_()
    return model, undo


def test_the_norm_counts_the_original_width():
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    padded = torch.cat([x, torch.zeros(5, 2, dtype=torch.float64)], 1)
    expected = nn.functional.rms_norm(padded, (6,), eps=1e-3)[:, :4]
    torch.testing.assert_close(RootMeanSquare(6, 1e-3)(x), expected)
    assert not torch.allclose(nn.functional.rms_norm(x, (4,), eps=1e-3), expected, rtol=1e-2)
    assert RootMeanSquare(6, 1e-3)(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(("left", "block"), [(4, None), (7, "0")])
def test_the_stream_changes_its_basis_where_the_branch_adds(left, block):
    model, _ = built(4, left, block)
    h = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    branch = model[0]
    expected = h @ branch.f.shortcut.weight + nn.functional.linear(branch.norm(h), branch.f.weight, branch.f.bias)
    torch.testing.assert_close(model(h), expected)
    assert model(h).shape[-1] == left


@pytest.mark.parametrize(("left", "block"), [(4, None), (7, "0")])
def test_copies_pickles_and_dtypes_keep_their_own_shortcuts(left, block):
    model, _ = built(4, left, block)
    h = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    before = model(h)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(h), before)
        with torch.no_grad():
            other[0].f.shortcut.weight.zero_()
        assert torch.equal(model(h), before)
        assert not torch.allclose(other(h), before)
    assert "0.f.shortcut.weight" in model.state_dict()
    torch.testing.assert_close(copy.deepcopy(model).double()(h.double()), before.double(), rtol=1e-5, atol=1e-5)


def test_shortcuts_are_trained_like_any_parameter():
    model, _ = built(4, 4, None)
    model(torch.randn(2, 3, 4)).square().sum().backward()
    gradient = model[0].f.shortcut.weight.grad
    assert gradient is not None
    assert gradient.abs().sum() > 0


def test_undo_leaves_no_trace():
    model = nn.Sequential(Branch(), nn.LayerNorm(WIDTH))
    state, kinds = copy.deepcopy(model.state_dict()), [type(module) for module in model.modules()]
    additions = [
        {"kind": "norm", "module": "1", "width": WIDTH, "eps": 1e-5},
        {"kind": "shortcut", "host": "0.f", "norm": "0.norm", "block": "0", "shape": [WIDTH, WIDTH + 1]},
        {"kind": "untied", "parameter": "0.f.weight"},
    ]
    weight = model[0].f.weight
    undo = attach(model, additions)
    assert model[0].f.weight is not weight
    undo()
    assert model[0].f.weight is weight
    assert model.state_dict().keys() == state.keys()
    assert [type(module) for module in model.modules()] == kinds
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_wrong_name_changes_nothing():
    model = nn.Sequential(Branch(), nn.LayerNorm(WIDTH))
    with pytest.raises(AttributeError):
        attach(model, [{"kind": "norm", "module": "1", "width": 6, "eps": 0.1}, {"kind": "untied", "parameter": "9.x"}])
    assert isinstance(model[1], nn.LayerNorm)


def test_a_model_knows_its_additions_under_the_names_of_now():
    model, _ = built(4, 7, "0")
    outer = nn.Sequential(nn.Identity(), *model)  # as when blocks are renumbered
    assert additions_of(outer) == [
        {"kind": "norm", "module": "1.norm", "width": WIDTH, "eps": 1e-5},
        {"kind": "shortcut", "host": "1.f", "norm": "1.norm", "block": "1", "shape": [4, 7]},
    ]
    fresh = nn.Sequential(nn.Identity(), Branch(4, 7))
    attach(fresh, additions_of(outer))
    fresh.load_state_dict(outer.state_dict())
    h = torch.randn(1, 2, 4)
    assert torch.equal(fresh(h), outer(h))
    assert isinstance(fresh[1].f.shortcut, Shortcut)
