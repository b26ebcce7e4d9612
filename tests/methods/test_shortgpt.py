"""ShortGPT: influence by definition, the angular variant, protection, and removal that generates."""

import copy
import math
import re

import pytest
import torch
from method_models import Stacked, inputs, stacked, tiny_gpt2
from torch import nn

from secateur import api, zoo
from secateur.core.budget import Budget
from secateur.core.errors import BudgetError, NumericsError, UnknownNameError
from secateur.shrink.apply import apply_, masked


class Turn(nn.Module):
    """Rotates every token by one angle and the last by another; the layer inside is only decoration."""

    def __init__(self, angle: float, last: float):
        super().__init__()
        self.unused = nn.Linear(2, 2)
        self.angle, self.last = angle, last

    def forward(self, x):
        angles = torch.full(x.shape[1:2], self.angle)
        angles[-1] = self.last
        cos, sin = angles.cos(), angles.sin()
        return torch.stack([x[..., 0] * cos - x[..., 1] * sin, x[..., 0] * sin + x[..., 1] * cos], -1) * 3


def turning(*angles):
    return Stacked(*(Turn(*(pair if isinstance(pair, tuple) else (pair, pair))) for pair in angles))


DATA = inputs(4, 5, 2)


def gone(plan, stack="layers"):
    return (~plan.masks[stack]).nonzero().flatten().tolist()


def test_influence_is_one_minus_the_mean_cosine_over_all_tokens():
    angles = [(0.3, 1.2), (1.0, 0.1), (0.5, 0.6), (2.0, 0.0)]
    plan = api.plan(turning(*angles), "shortgpt", 0.5, data=list(DATA.split([1, 3])), keep_scores=True)
    expected = [1 - (4 * math.cos(angle) + math.cos(last)) / 5 for angle, last in angles]
    assert plan.scores["layers"].tolist() == pytest.approx(expected, abs=1e-6)
    assert gone(plan) == [0, 2]
    facts = plan.facts["layers"]
    assert [facts[f"influence_{index}"] for index in range(4)] == pytest.approx(expected, abs=1e-5)


def test_influence_on_a_real_decoder_is_that_of_its_hidden_states():
    model, data = zoo.load_model("pydoc-llama-gqa"), zoo.load_data("pydoc").calibration.inputs[:10]
    plan = api.plan(model, "shortgpt", 0.25, data=list(data.split([7, 3])), keep_scores=True)
    states = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: states.append((args[0], out))) for block in model.model.layers
    ]
    with torch.no_grad():
        model(data)
    for hook in hooks:
        hook.remove()
    for (before, after), found in zip(states, plan.scores["model.layers"], strict=True):
        a, b = before.double().reshape(-1, 96).numpy(), after.double().reshape(-1, 96).numpy()
        cosines = [(x @ y) / math.sqrt((x @ x) * (y @ y)) for x, y in zip(a, b, strict=True)]
        assert float(found) == pytest.approx(1 - sum(cosines) / len(cosines), abs=1e-6)


def test_the_angular_variant_looks_at_the_last_token_and_takes_a_run():
    """Over all tokens blocks 1 and 3 do least; at the last token the run 2, 3 turns back what it turned."""
    model = turning((2.0, 1.0), (0.1, 1.0), (2.0, 0.8), (0.1, -0.8), (2.0, 1.0))
    cosine, run = (api.plan(model, "shortgpt", 0.4, data=DATA, metric=metric) for metric in ("cosine", "angular"))
    assert gone(cosine) == [1, 3]
    assert gone(run) == [2, 3]


def test_a_run_keeps_clear_of_excluded_blocks():
    model = turning((2.0, 1.0), (0.1, 0.3), (2.0, 0.8), (0.1, -0.8), (2.0, 1.0))
    plan = api.plan(model, "shortgpt", 0.4, data=DATA, metric="angular", exclude=["layers.3"])
    assert gone(plan) == [1, 2]
    with pytest.raises(BudgetError, match="layers"):
        api.plan(model, "shortgpt", 0.4, data=DATA, metric="angular", exclude=["layers.1", "layers.3"])


def test_excluded_blocks_stay():
    model = turning(0.1, 0.2, 0.3, 0.4, 0.5)
    assert gone(api.plan(model, "shortgpt", 0.4, data=DATA)) == [0, 1]
    assert gone(api.plan(model, "shortgpt", 0.4, data=DATA, exclude=["layers.0", "layers.2"])) == [1, 3]
    assert gone(api.plan(model, "shortgpt", 0.4, data=DATA, include=["layers.3", "layers.4"])) == [3, 4]
    with pytest.raises(BudgetError, match="excluded"):
        api.plan(model, "shortgpt", 0.4, data=DATA, include=["layers.3"])


def test_first_and_last_block_are_warned_about_by_name():
    plan = api.plan(turning(0.1, 0.9, 0.9, 0.2), "shortgpt", 0.5, data=DATA)
    assert gone(plan) == [0, 3]
    assert any("layers.0" in warning and "first" in warning for warning in plan.warnings)
    assert any("layers.3" in warning and "last" in warning for warning in plan.warnings)
    quiet = api.plan(turning(0.9, 0.1, 0.2, 0.9), "shortgpt", 0.5, data=DATA)
    assert gone(quiet) == [1, 2]
    assert not quiet.warnings


@pytest.mark.parametrize(("sparsity", "count"), [(0.2, 1), (0.39, 1), (0.4, 2), (0.6, 3), (0.8, 4), (0.99, 4)])
def test_the_sparsity_is_rounded_down_to_blocks(sparsity, count):
    plan = api.plan(turning(0.5, 0.4, 0.3, 0.2, 0.1), "shortgpt", sparsity, data=DATA)
    assert gone(plan) == [5 - count + index for index in range(count)]


def test_the_number_of_blocks_may_be_given():
    plan = api.plan(turning(0.5, 0.4, 0.3), "shortgpt", budget=Budget(2, "units"), data=DATA)
    assert gone(plan) == [2]
    with pytest.raises(BudgetError, match="sparsity must be in"):
        Budget(1.5, "sparsity")
    with pytest.raises(UnknownNameError, match="did you mean units"):
        Budget(2, "unit")
    floored = api.plan(turning(0.5, 0.4, 0.3, 0.2), "shortgpt", budget=Budget(0.75, floor=3), data=DATA)
    assert gone(floored) == [3]


def test_a_sparsity_that_removes_no_block_is_refused_with_the_range_that_works():
    model = turning(0.5, 0.4, 0.3, 0.2)
    with pytest.raises(BudgetError, match="reachable") as refused:
        api.plan(model, "shortgpt", 0.2, data=DATA)
    low, high = map(float, re.search(r"sparsity ([0-9.]+) \(1 block\) to ([0-9.]+)", str(refused.value)).groups())
    assert len(gone(api.plan(model, "shortgpt", low, data=DATA))) == 1
    assert len(gone(api.plan(model, "shortgpt", high, data=DATA))) == 3
    with pytest.raises(BudgetError, match="N:M"):
        api.plan(model, "shortgpt", pattern="2:4", data=DATA)


@pytest.mark.parametrize("quantity", ["parameters", "flops"])
def test_what_counts_no_blocks_is_refused(quantity):
    with pytest.raises(BudgetError, match=f"removes whole blocks and takes no .*{quantity}"):
        api.plan(turning(0.5, 0.4, 0.3), "shortgpt", budget=Budget(0.5, quantity), data=DATA)


@pytest.mark.parametrize("place", [(0, 0), (2, 4)])
def test_nan_at_any_token_is_refused(place):
    """A cosine of NaN counts 0.5; broken activations must not pass for zero vectors."""
    broken = inputs(4, 5, 12)
    broken[*place, 3] = torch.nan
    with pytest.raises(NumericsError, match=r"layers\.0"):
        api.plan(stacked(4), "shortgpt", 0.25, data=broken)


def test_a_zero_vector_counts_half():
    data = torch.zeros(2, 5, 2)
    plan = api.plan(turning(0.1, 0.2, 0.3), "shortgpt", 0.4, data=data, keep_scores=True)
    assert plan.scores["layers"].tolist() == [0.5, 0.5, 0.5]


def qwen3():
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, use_sliding_window=True, sliding_window=4,
        max_window_layers=2, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


MODELS = {
    "llama": (lambda: zoo.load_model("pydoc-llama"), "model.layers"),
    "gqa": (lambda: zoo.load_model("pydoc-llama-gqa"), "model.layers"),
    "gpt2": (lambda: tiny_gpt2(blocks=4), "transformer.h"),
    "sliding windows": (qwen3, "model.layers"),
}


@pytest.mark.parametrize("name", MODELS)
def test_what_is_left_generates_with_its_cache_as_without(name):
    make, stack = MODELS[name]
    model = make()
    tokens = torch.randint(0, 40, (3, 7), generator=torch.Generator().manual_seed(0))
    plan = api.plan(model, "shortgpt", 0.5, data=tokens)
    kept = plan.masks[stack].nonzero().flatten().tolist()
    assert len(kept) == 2
    dense = copy.deepcopy(model)
    before = [block for index, block in enumerate(model.get_submodule(stack)) if index in kept]
    kinds = getattr(model.config, "layer_types", None)
    apply_(model, plan)
    assert list(model.get_submodule(stack)) == before
    assert model.config.num_hidden_layers == 2
    if kinds:
        assert list(model.config.layer_types) == [kinds[index] for index in kept]
    indices = [getattr(block.attn if name == "gpt2" else block.self_attn, "layer_idx") for block in before]  # noqa: B009
    assert indices == [0, 1]

    def greedy(net, cache):
        return net.generate(tokens, max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=0)

    assert torch.equal(greedy(model, True), greedy(model, False))
    with masked(dense, plan):
        assert torch.equal(greedy(dense, True), greedy(model, False))
    assert len(dense.get_submodule(stack)) == 4
    assert torch.equal(greedy(dense, True), greedy(dense, False))
    assert not torch.equal(greedy(dense, True), greedy(model, True))
