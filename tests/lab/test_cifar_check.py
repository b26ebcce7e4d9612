"""The full scale's network and crops, without its data."""

import pytest
import torch
from torch.nn import functional as F

from secateur.lab.checks._cifar import CONDITIONS, comparison, crops_and_mirrors
from secateur.lab.cifar import CifarResNet
from secateur.lab.reproduce import find_check
from secateur.train.study import Ledger


def test_the_network_has_the_parameters_of_the_paper():
    model = CifarResNet()
    assert sum(p.numel() for p in model.parameters()) == 269_722  # 0.27 M, without weights in the shortcuts
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    assert sum(p.numel() for p in CifarResNet(9).parameters()) == 853_018  # ResNet-56, 0.85 M
    assert CifarResNet(width=64).linear.in_features == 256
    assert {"conv1.weight", "layer2.0.conv1.weight", "layer3.2.bn2.bias", "linear.bias"} <= set(model.state_dict())


def test_a_shortcut_between_stages_subsamples_and_pads():
    block = CifarResNet().layer2[0].eval()
    with torch.no_grad():
        block.conv2.weight.zero_()  # the branch gives nothing, the shortcut is left
    x = torch.rand(1, 16, 8, 8)
    out = block(x)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_crops_and_mirrors_image_by_image():
    images = torch.rand(6, 3, 32, 32)
    found = crops_and_mirrors(images, torch.Generator().manual_seed(3))
    for before, after in zip(images, found, strict=True):
        padded = F.pad(before, (4, 4, 4, 4))
        crops = [padded[:, y : y + 32, x : x + 32] for y in range(9) for x in range(9)]
        assert any(torch.equal(after, crop) or torch.equal(after, crop.flip(2)) for crop in crops)
    assert torch.equal(found, crops_and_mirrors(images, torch.Generator().manual_seed(3)))
    assert not torch.equal(found, crops_and_mirrors(images, torch.Generator().manual_seed(4)))


def ledger(**accuracies):
    """A ledger that knows everything, so nothing is trained."""
    found = Ledger(None, {})
    for name, value in accuracies.items():
        found.once(f"{name.replace('__', '-')}-seed0", lambda value=value: value)
    return found


def test_claims_compare_with_dense_magnitude_and_random():
    known = {"dense__0": 85.0, "granet__90": 83.0, "granet__95": 80.0, "global_magnitude__90": 82.0}
    known |= {"global_magnitude__95": 81.0, "random__90": 60.0, "random__95": 50.0}
    samples = comparison("granet").run(0, None, ledger(**known))
    under, over = samples["under_dense_90"], samples["over_magnitude_95"]
    assert (under.value, under.baseline, under.random) == (2, 3, 25)
    assert (over.value, over.baseline, over.random) == (-1, 0, -31)
    assert samples["over_random_95"].value == 30
    assert set(samples) == set(comparison("granet").claims)
    assert not any(name.startswith("over_magnitude") for name in comparison("global_magnitude").claims)


@pytest.mark.parametrize("name", ["global_magnitude", "rd", "granet", "bip", "random"])
def test_five_methods_share_the_conditions(name):
    assert find_check(name).full.conditions == CONDITIONS


def test_random_is_compared_with_uniform_densities():
    known = {"random__90": 60.0, "random__95": 50.0, "random__uniform__90": 58.0, "random__uniform__95": 49.0}
    samples = find_check("random").full.run(0, None, ledger(**known))
    assert [samples[f"over_uniform_{level}"].value for level in (90, 95)] == [2, 1]
