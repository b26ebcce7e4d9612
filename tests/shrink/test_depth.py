"""Removing blocks equals skipping them, on every family; indices, counts and per-layer lists follow."""

import copy
from collections import OrderedDict

import pytest
import torch
from shrink_models import (
    BLOCKS,
    CAUSAL,
    STACKS,
    Residual,
    assert_same_bits,
    block_plan,
    llama,
    model_inputs,
    model_of,
    outputs,
    state,
    t5,
    tower,
)
from torch import nn

import secateur as sc
from secateur.core.errors import PlanError
from secateur.shrink.depth import renumbered

GONE = [1, 3]
KEPT = [0, 2, 4]


def skipping(model: nn.Module, stack: str, gone: list[int]) -> nn.Module:
    """The oracle: a copy in which the given blocks hand their first input on, whatever they compute."""
    clone = copy.deepcopy(model)

    def skip(module, args, kwargs, output):
        entering = args[0] if args else kwargs["hidden_states"]
        return (entering, *output[1:]) if isinstance(output, tuple) else entering

    for index in gone:
        clone.get_submodule(stack)[index].register_forward_hook(skip, with_kwargs=True)
    return clone


@pytest.mark.parametrize("name", STACKS)
def test_removed_equals_skipped_and_masked_equals_removed(name):
    model, stack = model_of(name)
    inputs, before = model_inputs(name), state(model)
    config = copy.deepcopy(model.config.to_dict())
    dense, expected = outputs(model, inputs), outputs(skipping(model, stack, GONE), inputs)
    assert (dense - expected).abs().max() > 1e-2  # the blocks do something
    plan = block_plan(model, stack, GONE)
    with sc.masked(model, plan):
        masked = outputs(model, inputs)
        assert len(model.get_submodule(stack)) == BLOCKS - len(GONE)
    assert torch.equal(outputs(model, inputs), dense)
    assert_same_bits(model, before)
    assert model.config.to_dict() == config
    removed = outputs(sc.apply_(model, plan), inputs)
    assert torch.equal(removed, masked)
    torch.testing.assert_close(removed, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", STACKS)
def test_the_right_blocks_stay_in_order(name):
    model, stack = model_of(name)
    blocks = list(model.get_submodule(stack))
    sc.apply_(model, block_plan(model, stack, GONE))
    assert list(model.get_submodule(stack)) == [blocks[index] for index in KEPT]
    assert type(model.get_submodule(stack)) is nn.ModuleList


@pytest.mark.parametrize("name", CAUSAL)
def test_layer_indices_are_renumbered_and_put_back(name):
    model, stack = model_of(name)

    def indices():
        return [
            sorted({value for part in block.modules() for key, value in vars(part).items() if key == "layer_idx"})
            for block in model.get_submodule(stack)
        ]

    before = indices()
    with sc.masked(model, block_plan(model, stack, GONE)):
        assert indices() == before[: len(KEPT)]
    assert indices() == before
    if name != "opt":  # every other one numbers its attention
        assert before == [[index] for index in range(BLOCKS)]


@pytest.mark.parametrize("name", STACKS)
def test_config_counts(name):
    model, stack = model_of(name)
    sc.apply_(model, block_plan(model, stack, GONE))
    if name == "t5-encoder":
        assert (model.config.num_layers, model.config.num_decoder_layers) == (3, BLOCKS)
    elif name == "t5-decoder":
        assert (model.config.num_layers, model.config.num_decoder_layers) == (BLOCKS, 3)
    else:
        assert model.config.num_hidden_layers == 3


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_per_layer_lists_lose_the_same_entries(name):
    model, stack = model_of(name)
    kinds = list(model.config.layer_types)
    plan = block_plan(model, stack, [0, 3])
    with sc.masked(model, plan):
        assert model.config.layer_types == [kinds[1], kinds[2], kinds[4]]
    assert model.config.layer_types == kinds


def test_a_list_of_another_length_or_meaning_stays():
    model = llama()
    model.config.layer_notes = ["a", "b"]
    model.config.odd_numbers = [1, 3, 5, 7, 9]  # as long as the stack, but not about layers
    sc.apply_(model, block_plan(model, "model.layers", [0]))
    assert model.config.layer_notes == ["a", "b"]
    assert model.config.odd_numbers == [1, 3, 5, 7, 9]


@pytest.mark.parametrize("name", CAUSAL)
def test_generate_with_cache_equals_without(name):
    model, stack = model_of(name)
    sc.apply_(model, block_plan(model, stack, GONE))
    tokens = model_inputs(name)["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    cached = model.generate(tokens, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(tokens, use_cache=False, **settings))
    with torch.no_grad():  # and as picked one at a time by hand
        expected = tokens
        for _ in range(8):
            best = model(input_ids=expected, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            expected = torch.cat([expected, best], 1)
    assert torch.equal(cached, expected)
    cache = model(input_ids=tokens, use_cache=True).past_key_values
    assert len(cache) == len(KEPT)


def test_t5_generates_after_losing_decoder_blocks():
    model = t5()
    sc.apply_(model, block_plan(model, "decoder.block", [2, 4]))
    tokens = model_inputs("t5-decoder")["input_ids"]
    made = [model.generate(tokens, max_new_tokens=5, do_sample=False, use_cache=cache) for cache in (True, False)]
    assert torch.equal(*made)


def test_applying_a_removal_twice_is_refused_with_the_reason():
    model = llama()
    plan = block_plan(model, "model.layers", [2])
    sc.apply_(model, plan)
    once = state(model)
    with pytest.raises(PlanError, match=r"has 4 blocks.*made for 5.*applied already"):
        sc.apply_(model, plan)
    assert_same_bits(model, once)


def test_sequential_stays_a_sequential_and_runs():
    model, x = tower(), torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    expected = skipping(model, "blocks", [0, 5])(x)
    sc.apply_(model, block_plan(model, "blocks", [0, 5]))
    assert type(model.blocks) is nn.Sequential
    torch.testing.assert_close(model(x), expected, atol=1e-6, rtol=0)


NAMES = ("enter", "layer_1", "layer_2", "last")


class Named(nn.Module):
    """Blocks with names, or with numbers that do not begin at 0."""

    def __init__(self, gappy: bool = False):
        super().__init__()
        blocks = [Residual(4) for _ in NAMES]
        self.blocks = nn.Sequential(OrderedDict(zip(NAMES, blocks, strict=True)))
        if gappy:
            self.blocks = nn.Sequential(Residual(4), *blocks)[1:]
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.blocks(x))


def named() -> nn.Module:
    return Named()


def gappy() -> nn.Module:
    return Named(gappy=True)


@pytest.mark.parametrize(("make", "kept"), [(named, ["enter", "layer_2"]), (gappy, ["1", "3"])])
def test_blocks_with_names_keep_them_and_come_back_from_disk(make, kept, tmp_path):
    model, x = make(), torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    plan, expected = block_plan(model, "blocks", GONE), skipping(model, "blocks", GONE)(x)
    with sc.masked(model, plan):
        assert list(model.blocks._modules) == kept
    assert len(model.blocks) == len(NAMES)
    sc.save(sc.apply_(model, plan), tmp_path / "out", plan, factory=f"test_depth:{make.__name__}")
    again = sc.load(tmp_path / "out", trust_factory=True)
    assert list(again.blocks._modules) == kept
    assert_same_bits(again, state(model))
    torch.testing.assert_close(again(x), expected, atol=1e-6, rtol=0)


def test_shortgpt_takes_out_blocks_with_names():
    model = Named()
    data = [torch.randn(8, 5, 4, generator=torch.Generator().manual_seed(0))]
    plan = sc.plan(model, "shortgpt", 0.5, data=data)
    kept = [name for name, stays in zip(NAMES, plan.masks["blocks"].tolist(), strict=True) if stays]
    assert list(sc.apply_(model, plan).blocks._modules) == kept
    assert len(kept) == 2


def test_names_after_a_removal_are_known_where_the_lists_names_are():
    plan = block_plan(Named(), "blocks", [1])
    leaves = {"blocks": NAMES}
    assert renumbered("blocks.enter.linear.weight", plan, leaves) == "blocks.enter.linear.weight"
    assert renumbered("blocks.layer_1", plan, leaves) is None
    assert renumbered("blocks.3.linear", plan) == "blocks.2.linear"
    assert renumbered("blocks.layer_2.linear", plan, leaves) == "blocks.layer_2.linear"
    assert renumbered("blocks.scale", plan) == "blocks.scale"  # of the list itself


class Staged(nn.Sequential):
    """A sequence that is not built from its members."""

    def __init__(self, width: int, depth: int):
        super().__init__(*(Residual(width) for _ in range(depth)))
        self.gain = 2.0

    def forward(self, x):
        return super().forward(x) * self.gain


def test_a_sequence_with_a_constructor_of_its_own_keeps_its_kind_attributes_and_hooks():
    model = nn.Module()
    model.blocks = Staged(4, 4)
    calls = []
    handle = model.blocks.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    blocks = list(model.blocks)
    expected = 2 * blocks[2](blocks[0](x))
    with sc.masked(model, block_plan(model, "blocks", GONE)):
        assert torch.equal(model.blocks(x), expected)
    assert list(model.blocks) == blocks
    sc.apply_(model, block_plan(model, "blocks", GONE))
    assert type(model.blocks) is Staged
    assert torch.equal(model.blocks(x), expected)
    assert len(calls) == 2
    handle.remove()
    model.blocks(x)
    assert len(calls) == 2


def test_nested_masks_come_off_in_order():
    model = llama()
    before, inputs = state(model), model_inputs("llama")
    dense = outputs(model, inputs)
    with sc.masked(model, block_plan(model, "model.layers", [0])):
        one = outputs(model, inputs)
        with sc.masked(model, block_plan(model, "model.layers", [0])):
            assert model.config.num_hidden_layers == BLOCKS - 2
            assert not torch.equal(outputs(model, inputs), one)
        assert torch.equal(outputs(model, inputs), one)
    assert_same_bits(model, before)
    assert torch.equal(outputs(model, inputs), dense)


def test_indices_that_count_from_one_keep_their_offset():
    model = nn.Module()
    model.blocks = nn.ModuleList(Residual(4) for _ in range(4))
    for number, block in enumerate(model.blocks, start=1):
        block.layer_number = number
        block.layer_index_note = number  # ends otherwise: no index
    sc.apply_(model, block_plan(model, "blocks", [0, 2]))
    assert [block.layer_number for block in model.blocks] == [1, 2]
    assert [block.layer_index_note for block in model.blocks] == [2, 4]


def test_shortgpt_on_an_encoder_removes_physically():
    from secateur.zoo import load_data, load_model

    model = load_model("zoo:digits-vit")
    data = load_data("zoo:digits", samples=32).calibration
    plan = sc.plan(model, "shortgpt", 0.5, data=data)
    (stack,) = plan.masks
    expected = skipping(model, stack, [i for i, stays in enumerate(plan.masks[stack]) if not stays])
    inputs = {"pixel_values": data.inputs}
    expected = outputs(expected, inputs)
    count = sum(p.numel() for p in model.parameters())
    assert torch.equal(outputs(sc.apply_(model, plan), inputs), expected)
    assert sum(p.numel() for p in model.parameters()) < 0.6 * count
