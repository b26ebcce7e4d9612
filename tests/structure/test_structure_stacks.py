from collections import OrderedDict

import pytest
import stack_models
from torch import nn

from secateur.core.errors import ModelError
from secateur.structure.stacks import find_stacks, main_stack


@pytest.mark.parametrize("name", stack_models.MODELS)
def test_the_stacks_of_every_family(name):
    model, expected = stack_models.build(name), stack_models.MODELS[name][1]
    stacks = find_stacks(model)
    assert [stack.name for stack in stacks] == expected
    for stack in stacks:
        assert stack.blocks == tuple(model.get_submodule(stack.name))
        assert [model.get_submodule(inner) for inner in stack.names] == list(stack.blocks)
    largest = max(stacks, key=lambda s: sum(p.numel() for p in model.get_submodule(s.name).parameters()))
    assert main_stack(model) == largest


def test_the_largest_stack_is_the_main_one_wherever_it_stands():
    def stack(depth):
        return nn.ModuleList([stack_models.Block(4) for _ in range(depth)])

    model = nn.Module()
    model.first, model.second, model.third = stack(2), stack(4), stack(3)
    assert main_stack(model).name == "second"
    assert [s.name for s in find_stacks(model)] == ["first", "second", "third"]


def test_lists_inside_a_block_are_no_stacks_of_their_own():
    class Expert(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Linear(4, 4)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([Expert(), Expert()])

    model = nn.Module()
    model.layers = nn.ModuleList([Layer(), Layer()])
    assert [stack.name for stack in find_stacks(model)] == ["layers"]


@pytest.mark.parametrize(
    "model",
    [
        nn.Linear(2, 2),
        nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2)),
        nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))),
        nn.Sequential(nn.ModuleList([nn.LayerNorm(2), nn.LayerNorm(2)])),
        nn.Sequential(nn.ModuleList([])),
        nn.Sequential(nn.Sequential(stack_models.Block(4))),  # a Sequential of one is a wrapper
        nn.Sequential(nn.Sequential(stack_models.Block(4), stack_models.Residual(4, 4))),  # not alike
    ],
)
def test_what_is_no_stack(model):
    assert find_stacks(model) == []
    with pytest.raises(ModelError, match=f"{type(model).__name__} has no list of blocks that could be removed"):
        main_stack(model)


def test_a_module_list_may_hold_one_block_or_different_ones():
    model = nn.Module()
    model.one = nn.ModuleList([stack_models.Block(4)])
    model.mixed = nn.ModuleList([stack_models.Block(4), stack_models.Residual(4, 4)])
    assert [stack.name for stack in find_stacks(model)] == ["one", "mixed"]


def test_the_members_of_a_named_or_gappy_sequence_have_the_names_that_they_have_there():
    blocks = [stack_models.Block(4) for _ in range(3)]
    model = nn.Module()
    model.named = nn.Sequential(OrderedDict(zip(("layer_a", "layer_b", "layer_c"), blocks, strict=True)))
    model.sliced = nn.Sequential(*(stack_models.Block(4) for _ in range(4)))[1:]
    named, sliced = find_stacks(model)
    assert named.names == ("named.layer_a", "named.layer_b", "named.layer_c")
    assert sliced.names == ("sliced.1", "sliced.2", "sliced.3")
    for stack in (named, sliced):
        assert [model.get_submodule(name) for name in stack.names] == list(stack.blocks)
