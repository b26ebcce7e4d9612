"""Super-resolution: photographs as pairs, untrained networks of the right shape."""

import pytest
import torch
from torch.nn import functional as F

from secateur.core.errors import DataError
from secateur.measure.psnr import psnr
from secateur.structure.sites import weight_layers
from secateur.zoo.photos import photographs, photos, resized
from secateur.zoo.super_resolution import SwinLayer, small_edsr, small_swinir


def test_patches_are_pairs_of_the_same_place():
    splits = photos()
    small, large = splits.calibration.inputs, splits.calibration.targets
    assert small.shape[1:] == (3, 16, 16)
    assert large.shape == (len(small), 3, 32, 32)
    inner = F.avg_pool2d(large, 2)[..., 4:-4, 4:-4]
    matching = (inner - small[..., 4:-4, 4:-4]).abs().mean()
    shuffled = (inner - small.roll(1, 0)[..., 4:-4, 4:-4]).abs().mean()
    assert matching < 0.02 < shuffled


def test_training_and_evaluation_do_not_share_a_pixel():
    large, splits = photographs(), photos()
    width = splits.evaluation.targets.shape[-1]
    assert torch.equal(splits.evaluation.targets, large[..., -width:])
    left = splits.calibration.targets
    assert torch.equal(left[0], large[0, :, :32, :32])
    columns = (large.shape[-1] - width) // 2
    assert columns == 224
    assert len(left) == 2 * ((212 - 16) // 8 + 1) * ((224 - 16) // 8 + 1)


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_sides_divide_by_the_scale(scale):
    evaluation = photos(scale).evaluation
    assert evaluation.targets.shape[-2:] == tuple(scale * side for side in evaluation.inputs.shape[-2:])
    figures = psnr(resized(evaluation.inputs, scale), evaluation.targets, scale)
    assert (figures > 20).all()


def test_shrinking_is_antialiased():
    stripes = (torch.arange(64) % 2).float().expand(1, 3, 64, 64)
    assert (resized(stripes, 0.25)[..., 2:-2] - 0.5).abs().max() < 0.02


def test_patches_larger_than_the_photographs_are_refused():
    with pytest.raises(DataError, match="do not fit"):
        photos(patch=4000)


@pytest.mark.parametrize("make", [small_edsr, small_swinir])
@pytest.mark.parametrize(("scale", "size"), [(2, (16, 16)), (3, (9, 14))])
def test_networks_enlarge_images_of_any_size_and_every_weight_trains(make, scale, size):
    torch.manual_seed(0)
    model = make(scale=scale)
    images = torch.rand(2, 3, *size)
    large = model(images)
    assert large.shape == (2, 3, scale * size[0], scale * size[1])
    large.square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in model.parameters())
    tables = {name for name, p in model.named_parameters() if p.dim() > 1} - set(weight_layers(model).sites)
    assert all(name.endswith("attention.bias") for name in tables)  # position tables are no weights to prune
    single = model(images[1:])
    torch.testing.assert_close(single, large[1:].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shifted", [False, True])
def test_windows_do_not_look_across_edges(shifted):
    torch.manual_seed(0)
    layer = SwinLayer(8, 2, 4, shifted)
    x = torch.randn(1, 12, 12, 8, requires_grad=True)
    layer(x)[0, 0, 0].sum().backward()
    seen = x.grad[0].abs().sum(-1) > 0
    side = 2 if shifted else 4  # the corner's window is cut by the image's edge after the shift
    expected = torch.zeros(12, 12, dtype=torch.bool)
    expected[:side, :side] = True
    assert torch.equal(seen, expected)
