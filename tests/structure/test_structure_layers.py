from math import prod

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.core.errors import ModelError, NumericsError
from secateur.core.units import Layout, Site, UnitKind
from secateur.structure.layers import WeightLayer, from_matrix, layout_of, patches, to_matrix

LAYERS = [
    (nn.Linear(5, 3), Layout.LINEAR, (3, 5)),
    (Conv1D(3, 5), Layout.TRANSPOSED, (3, 5)),
    (nn.Conv1d(2, 3, 4), Layout.CONV, (3, 8)),
    (nn.Conv2d(2, 3, (2, 5)), Layout.CONV, (3, 20)),
    (nn.Conv3d(2, 3, (1, 2, 3)), Layout.CONV, (3, 12)),
    (nn.Conv2d(4, 6, 3, groups=2), Layout.CONV, (6, 18)),
    (nn.ConvTranspose1d(2, 3, 4), Layout.CONV_TRANSPOSED, (12, 2)),
    (nn.ConvTranspose2d(2, 3, (4, 5)), Layout.CONV_TRANSPOSED, (60, 2)),
]


def layer_of(module, name="fc.weight"):
    return WeightLayer(Site(name, UnitKind.WEIGHT, tuple(module.weight.shape), layout_of(module)), module)


@pytest.mark.parametrize(("module", "layout", "shape"), LAYERS, ids=lambda value: type(value).__name__)
def test_the_matrix_of_every_kind_of_layer(module, layout, shape):
    assert layout_of(module) is layout
    layer = layer_of(module)
    assert layer.matrix.shape == layer.site.matrix_shape == shape
    back = layer.to_site(layer.matrix.clone())
    assert torch.equal(back, module.weight)
    assert back.is_contiguous()
    # and the other way round, with numbers that are all different
    matrix = torch.arange(float(prod(shape))).view(shape)
    assert torch.equal(to_matrix(from_matrix(matrix, layer.site), layout), matrix)


def test_rows_are_outputs_and_columns_inputs():
    torch.manual_seed(0)
    for module in (nn.Linear(5, 3), Conv1D(3, 5)):
        x = torch.randn(2, 4, 5)
        assert torch.allclose(module(x) - module.bias, x @ layer_of(module).matrix.t(), atol=1e-6)
    # a transposed convolution at one position: column i holds all that input channel i adds
    module = nn.ConvTranspose2d(2, 3, (4, 5), bias=False)
    x = torch.randn(1, 2, 1, 1)
    assert torch.allclose(module(x).flatten(), layer_of(module).matrix @ x.flatten(), atol=1e-6)


def test_other_modules_have_no_layout():
    for module in (nn.Embedding(3, 2), nn.LayerNorm(3), nn.BatchNorm2d(3), nn.Bilinear(2, 2, 2), nn.ReLU()):
        assert layout_of(module) is None
    assert layout_of(type("Mine", (nn.Linear,), {})(2, 2)) is Layout.LINEAR


def test_the_weight_is_live_and_detached():
    module = nn.Linear(2, 2)
    layer = layer_of(module)
    assert not layer.weight.requires_grad
    module.weight.data = torch.full((2, 2), 7.0)
    assert layer.matrix.eq(7).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_bad_weights_are_refused_by_name(bad):
    module = nn.Conv2d(2, 3, 3)
    module.weight.data[1, 0, 2, 1] = bad
    with pytest.raises(NumericsError, match=r"layer 'stem\.weight' has NaN or infinite weights; repair"):
        _ = layer_of(module, "stem.weight").matrix


# --- inputs as a matrix -------------------------------------------------------------------------

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


@st.composite
def convolutions(draw):
    dims = draw(st.integers(1, 3))

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, dilation, stride = each(1, 3), each(1, 2), each(1, 3)
    padding = draw(st.sampled_from(["same", "valid", "numbers"]))
    if padding == "numbers":
        padding = each(0, 2)
    if padding == "same":
        stride = (1,) * dims
    mode = draw(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    size = each(1, 7)
    channels = draw(st.integers(1, 3))
    batch = draw(st.sampled_from([None, 1, 2]))
    torch.manual_seed(draw(st.integers(0, 99)))
    conv = KINDS[dims](channels, 2, kernel, stride, padding, dilation, bias=False, padding_mode=mode).double()
    x = torch.randn(*(() if batch is None else (batch,)), channels, *size, dtype=torch.float64)
    return conv, x


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.filter_too_much])
@given(convolutions())
def test_patches_times_weight_is_the_convolution(case):
    conv, x = case
    try:
        expected = conv(x)
    except (RuntimeError, AssertionError):  # torch does not allow this padding or kernel for this size
        assume(False)
    found = patches(conv, x) @ conv.weight.flatten(1).t()
    batched = expected if x.dim() == len(conv.kernel_size) + 2 else expected.unsqueeze(0)
    assert found.shape == (batched[:, 0].numel(), conv.out_channels)
    assert torch.allclose(found, batched.movedim(1, -1).reshape(-1, conv.out_channels), atol=1e-12)


def test_an_even_kernel_with_same_padding_pads_more_at_the_end():
    conv = nn.Conv1d(1, 1, 2, padding="same", bias=False)
    found = patches(conv, torch.tensor([[[1.0, 2.0, 3.0]]]))
    assert found.tolist() == [[1, 2], [2, 3], [3, 0]]


def test_inputs_of_linear_layers_are_flattened_tokens():
    x = torch.arange(24.0).view(2, 3, 4)
    assert torch.equal(layer_of(nn.Linear(4, 2)).input_matrix(x), x.view(6, 4))
    assert torch.equal(layer_of(Conv1D(2, 4)).input_matrix(x), x.view(6, 4))
    assert layer_of(nn.Linear(4, 2)).input_matrix(x[0, 0]).shape == (1, 4)


def test_grouped_and_transposed_convolutions_name_the_layer():
    with pytest.raises(ModelError, match=r"'dw\.weight' is a grouped convolution \(2 groups\).*--exclude 'dw\.weight'"):
        layer_of(nn.Conv2d(4, 4, 3, groups=2), "dw.weight").input_matrix(torch.zeros(1, 4, 5, 5))
    with pytest.raises(ModelError, match=r"'up\.weight' is a transposed convolution.*--exclude 'up\.weight'"):
        layer_of(nn.ConvTranspose2d(4, 4, 3), "up.weight").input_matrix(torch.zeros(1, 4, 5, 5))


def test_input_keys_tell_apart_what_turns_one_tensor_into_other_matrices():
    linear = [nn.Linear(4, 2), nn.Linear(4, 9), Conv1D(2, 4)]
    assert len({layer_of(module).input_key() for module in linear}) == 1
    plain = {"in_channels": 4, "out_channels": 4, "kernel_size": 3}
    different = [
        nn.Linear(4, 2),
        nn.ConvTranspose2d(**plain),
        nn.Conv2d(**plain),
        nn.Conv2d(**plain | {"kernel_size": (3, 1)}),
        nn.Conv2d(**plain, stride=2),
        nn.Conv2d(**plain, padding=1),
        nn.Conv2d(**plain, padding="same"),
        nn.Conv2d(**plain, padding=1, padding_mode="reflect"),
        nn.Conv2d(**plain, dilation=2),
        nn.Conv2d(**plain, groups=2),
    ]
    assert len({layer_of(module).input_key() for module in different}) == len(different)
    assert layer_of(nn.Conv2d(4, 7, 3)).input_key() == layer_of(nn.Conv2d(**plain)).input_key()
