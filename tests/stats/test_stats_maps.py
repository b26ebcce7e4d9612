"""Feature maps: against forward hooks, whatever way the model writes them, and where their units lie."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import DataError, ModelError, NumericsError
from secateur.core.method import Batch
from secateur.core.progress import Silent
from secateur.shrink.reference import keep_of
from secateur.stats.maps import indices_of, mean_over_maps
from secateur.structure.analysis import analyse
from secateur.structure.dims import Axis, Concat, Product

IMAGES = torch.randn(7, 2, 6, 5, generator=torch.Generator().manual_seed(0))
PARTS = [Batch((IMAGES[:4],)), Batch((IMAGES[4:],))]  # of different sizes
SHAPES: list[tuple[int, ...]] = []


def size_and_mean(maps: Tensor) -> Tensor:
    """A measure that any wrong row, column or sample would change."""
    SHAPES.append(tuple(maps.shape[1:]))
    rows = torch.arange(1, maps.shape[1] + 1)[:, None]
    return (maps * rows * torch.arange(1, maps.shape[2] + 1)).sum((1, 2))


def measured(model: nn.Module, seen: list[Batch] = PARTS, data: list[Batch] = PARTS) -> dict[str, Tensor]:
    SHAPES.clear()
    structure = analyse(model, seen[0])
    return mean_over_maps(model, structure, structure.sites, data, measure=size_and_mean, progress=Silent())


def weighed(x: Tensor) -> Tensor:
    """The same of maps `[samples, channels, rows, columns]`, mean over samples, `[channels]`."""
    rows, columns = (torch.arange(1, n + 1) for n in x.shape[2:])
    return torch.einsum("bchw,h,w->c", x.double(), rows.double(), columns.double()) / len(x)


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model


class Ways(nn.Module):
    """Rectifiers as module, method and in-place function; a residual sum that writes into its input; no activation."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.act = nn.Conv2d(2, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.b, self.c = nn.Conv2d(4, 6, 3, padding=1), nn.Conv2d(6, 6, 1)
        self.d, self.last = nn.Conv2d(6, 5, 1), nn.BatchNorm2d(5)
        self.e, self.head = nn.Conv2d(5, 3, 1), nn.Linear(3, 2)
        self.seen: dict[str, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.a(x)))
        self.seen["a"] = x.clone()
        x = self.b(x).relu()
        self.seen["b"] = x.clone()
        x += self.c(x)
        x = F.relu_(x)
        self.seen["c"] = x.clone()
        x = self.last(self.d(x))
        self.seen["d"] = x.clone()
        x = self.e(x)
        self.seen["e"] = x.clone()
        return self.head(x.mean((2, 3)))


def test_maps_are_those_after_the_last_activation_norm_or_layer():
    model = seeded(Ways)
    found = measured(model)
    with torch.no_grad():
        model(IMAGES)
    expected = {name: weighed(maps) for name, maps in model.seen.items()}
    assert torch.allclose(found["a:channel"], expected["a"], rtol=1e-4)
    assert torch.allclose(found["b:channel"], (expected["b"] + expected["c"]) / 2, rtol=1e-4)  # a stream: two places
    assert torch.allclose(found["d:channel"], expected["d"], rtol=1e-4)
    assert torch.allclose(found["e:channel"], expected["e"], rtol=1e-4)
    assert set(SHAPES) == {(6, 5)}


def test_the_model_is_left_as_it_was():
    model = seeded(Ways).train()
    before = copy.deepcopy(model.state_dict())
    measured(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())


class Dense(nn.Module):
    """Every layer reads all maps before it, each time through another norm."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 3, 3, padding=1), nn.Conv2d(3, 4, 3, padding=1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(3), nn.BatchNorm2d(7)])
        self.head = nn.Conv2d(7, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        self.first = F.relu(self.norms[0](x))
        x = torch.cat([x, self.b(self.first)], 1)
        self.second = F.relu(self.norms[1](x))
        return self.head(self.second).mean((2, 3))


def test_units_are_found_inside_of_concatenations():
    model = seeded(Dense)
    found = measured(model)
    with torch.no_grad():
        model(IMAGES)
    first, second = weighed(model.first), weighed(model.second)
    assert torch.allclose(found["a:channel"], (first + second[:3]) / 2, rtol=1e-4)
    assert torch.allclose(found["b:channel"], second[3:], rtol=1e-4)


class Grouped(nn.Module):
    """Units that are three channels each."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 12, 1), nn.Conv2d(12, 12, 3, groups=4)
        self.head = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        self.seen = F.relu(self.a(x))
        return self.head(self.b(self.seen).mean((2, 3)))


def test_a_unit_of_several_channels_has_the_mean_of_their_maps():
    model = seeded(Grouped)
    found = measured(model)
    with torch.no_grad():
        model(IMAGES)
    assert torch.allclose(found["a:channel"], weighed(model.seen).view(4, 3).mean(1), rtol=1e-4)


def test_without_two_dimensions_of_positions():
    """Neurons of a classifier are 1 x 1, of tokens a row; the units of a one-dimensional convolution a row as well."""
    flat = seeded(lambda: nn.Sequential(nn.Flatten(), nn.Linear(60, 8), nn.ReLU(), nn.Linear(8, 3)))
    found = measured(flat)["1:neuron"]
    assert torch.allclose(found, flat[:3](IMAGES).double().mean(0), rtol=1e-4)
    assert set(SHAPES) == {(1, 1)}
    tokens = seeded(lambda: nn.Sequential(nn.Flatten(1, 2), nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3)))
    found = measured(tokens)["1:neuron"]
    sent = tokens[:3](IMAGES).transpose(1, 2)[:, :, None]  # (samples, neurons, 1, tokens)
    assert torch.allclose(found, weighed(sent.detach()), rtol=1e-4)
    assert set(SHAPES) == {(1, 12)}


class Attention(nn.Module):
    """Four heads of three dimensions."""

    def __init__(self):
        super().__init__()
        self.heads, self.width = 4, 3
        self.q, self.k, self.v = (nn.Linear(5, 12) for _ in range(3))
        self.out = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1, 2)
        split = (len(x), x.shape[1], self.heads, self.width)
        q, k, v = (one(x).view(split).transpose(1, 2) for one in (self.q, self.k, self.v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(len(x), x.shape[1], -1)
        return self.out(x).mean(1)


def test_a_heads_map_is_its_features_by_tokens():
    model = seeded(Attention)
    (found,) = [value for name, value in measured(model).items() if name.endswith(":head")]
    x = IMAGES.flatten(1, 2)
    sent = [one(x).unflatten(2, (4, 3)).permute(0, 2, 3, 1) for one in (model.q, model.k, model.v)]
    assert torch.allclose(found, torch.stack([weighed(one.detach()) for one in sent]).mean(0), rtol=1e-4, atol=1e-4)
    assert (3, 12) in SHAPES


def test_bad_input():
    model = seeded(Ways)
    with pytest.raises(DataError, match="at least one calibration sample"):
        measured(model, PARTS, data=[])
    with pytest.raises(ModelError, match=r"'a:channel' were seen as .* and are \[2, 4, 8, 8\]"):
        measured(model, PARTS, data=[*PARTS, Batch((torch.zeros(2, 2, 8, 8),))])
    with pytest.raises(NumericsError, match=r"'a:channel' hold NaN"):
        measured(model, PARTS, data=[Batch((torch.full((2, 2, 6, 5), torch.nan),))])


def trees(axis: Axis) -> st.SearchStrategy:
    """Dimensions that hold an axis once."""
    other = st.one_of(st.integers(1, 4), st.integers(2, 4).map(Axis))

    def around(inner: st.SearchStrategy) -> st.SearchStrategy:
        return st.one_of(
            st.tuples(other, inner).map(lambda two: Concat(*two)),
            st.tuples(inner, other).map(lambda two: Concat(*two)),
            st.tuples(other, inner).map(lambda two: Product(*two)),
            st.tuples(inner, other).map(lambda two: Product(*two)),
        )

    return st.recursive(st.just(axis), around, max_leaves=4)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(2, 5))
def test_indices_are_those_that_a_mask_would_remove(data, units):
    axis = Axis(units)
    dim = data.draw(trees(axis))
    found = indices_of(dim, axis)
    for unit in range(units):
        keep = torch.arange(units) != unit
        assert found[unit].tolist() == (~keep_of(dim, {axis: keep})).nonzero().flatten().tolist()
