"""Which blocks can be taken out of a model, and which of them stand next to a change of resolution."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from secateur import zoo
from secateur.core.method import Batch
from secateur.structure.analysis import analyse
from secateur.structure.removable import next_to_turns, removable, residual_blocks
from secateur.train.gated import gateable


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + F.relu(self.conv(x))


class Between(nn.Module):
    """Stages of one width, a pooling layer between them that is in no list; lists in another order than they run."""

    def __init__(self):
        super().__init__()
        self.late = nn.ModuleList([Block(4) for _ in range(3)])
        self.early = nn.ModuleList([Block(4) for _ in range(3)])
        self.stem, self.head = nn.Conv2d(1, 4, 3, padding=1), nn.Linear(4, 2)

    def forward(self, x):
        x = self.stem(x)
        for block in self.early:
            x = block(x)
        x = F.avg_pool2d(x, 2)
        for block in self.late:
            x = block(x)
        return self.head(x.mean((2, 3)))


EXAMPLE = Batch((torch.rand(2, 1, 8, 8),))


def free(model, strict, example=EXAMPLE, **more):
    return [
        name for one in removable(model, analyse(model, example), example, strict=strict, **more) for name in one.names
    ]


def test_a_change_of_resolution_between_two_lists_spares_the_last_and_the_first_block():
    model = Between()
    assert free(model, False) == [f"{stage}.{i}" for stage in ("late", "early") for i in range(3)]
    assert free(model, True) == ["late.1", "late.2", "early.0", "early.1"]


def test_more_channels_at_the_same_resolution_are_no_turn():
    class Wider(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.Sequential(Block(1), nn.Conv2d(1, 4, 1), Block(4), nn.MaxPool2d(2), Block(4), Block(4))

        def forward(self, x):
            return self.blocks(x).mean((2, 3))

    assert free(Wider(), True) == ["blocks.0", "blocks.5"]
    assert free(Wider(), False) == ["blocks.0", "blocks.2", "blocks.4", "blocks.5"]


def test_a_shipped_network_and_the_filter_of_the_user():
    model = zoo.load_model("digits-resnet")
    assert free(model, False) == ["stage1.0", "stage1.1", "stage2.1", "stage3.1"]
    assert free(model, True) == ["stage1.0"]
    assert free(model, False, wants=lambda name: name.startswith("stage2")) == ["stage2.1"]
    structure = analyse(model, EXAMPLE)
    assert gateable(model, structure) == residual_blocks(model, structure)
    assert not any(module._forward_hooks for module in model.modules())


def test_blocks_of_transformers_are_removable_whole_but_take_no_convolution_gates():
    model = zoo.load_model("pydoc-llama")
    example = Batch(kwargs={"input_ids": torch.arange(16).view(2, 8)})
    assert free(model, True, example) == [f"model.layers.{i}" for i in range(4)]
    assert gateable(model, analyse(model, example)) == []


def test_blocks_inside_of_blocks_are_left_alone():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(Block(1), Block(1))

        def forward(self, x):
            return x + self.inner(x)

    model = nn.Sequential(nn.Sequential(Outer(), Outer()), nn.Flatten(), nn.Linear(64, 2))
    assert free(model, False) == ["0.0", "0.1"]


@pytest.mark.parametrize("fails", [True, False])
def test_hooks_are_gone_even_if_the_run_fails(fails):
    model = Between()
    batch = Batch((torch.rand(2, 3 if fails else 1, 8, 8),))
    if fails:
        with pytest.raises(RuntimeError):
            next_to_turns(model, batch, ["early.0", "early.1"])
    else:
        assert next_to_turns(model, batch, ["early.0", "early.1"]) == set()
    assert not any(module._forward_hooks for module in model.modules())
