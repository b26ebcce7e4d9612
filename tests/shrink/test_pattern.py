import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import OutputError
from secateur.shrink.pattern import check_patterns


def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64))


def pruned(pattern="2:4"):
    model = make()
    plan = sc.plan(model, "wanda", pattern=pattern, data=torch.randn(8, 64))
    return sc.apply_(model, plan), plan


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8"])
def test_what_holds_passes(pattern):
    check_patterns(*pruned(pattern))


def test_one_weight_too_many_is_found_before_anything_is_saved(tmp_path):
    model, plan = pruned()
    with torch.no_grad():
        row = model[2].weight[17]
        row[4:8] = 1.0
    with pytest.raises(OutputError, match=r"'2\.weight' keeps 4 of 4 inputs somewhere, 2:4 was asked for"):
        sc.save(model, tmp_path / "out", plan, factory="test_pattern:make")
    assert not (tmp_path / "out").exists()


def test_convolutions_are_counted_along_their_inputs():
    model = nn.Sequential(nn.Conv2d(8, 4, 3))
    plan = sc.plan(model, "wanda", pattern="2:4", data=torch.randn(2, 8, 6, 6))
    check_patterns(sc.apply_(model, plan), plan)


def test_without_a_pattern_nothing_is_asked():
    model = make()
    plan = sc.plan(model, "wanda", 0.1, data=torch.randn(8, 64))
    check_patterns(sc.apply_(model, plan), plan)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch's 2:4 kernels need CUDA")
def test_the_kernels_agree_on_cuda():
    model, plan = pruned()
    check_patterns(model.cuda(), plan)
