"""Layer removal by selectors: by definition, original indices, ties, refusals, generation with the cache after it."""

import copy

import pytest
import torch
from method_models import inputs, stacked, tiny_gpt2
from torch import nn

from secateur import api, zoo
from secateur.core.budget import Budget
from secateur.core.errors import BudgetError, DataError, ModelError, NumericsError, SettingsError
from secateur.core.method import Batch, Task
from secateur.data.dataset import DataKind, Dataset
from secateur.methods.depth.layer_limits import LayerLimitsSettings, plan, prompt_means
from secateur.shrink.apply import apply_, masked

STACK = "model.layers"


def llama(blocks=6, seed=0):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=blocks, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=48, initializer_range=0.3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


TOKENS = torch.randint(40, (6, 12), generator=torch.Generator().manual_seed(0))


def planned(model, count, data=TOKENS, **settings):
    blocks = len(model.model.layers)
    return api.plan(model, "layer_limits", budget=Budget(blocks - count, "units"), data=data, **settings)


def gone(made, stack=STACK):
    return (~made.masks[stack]).nonzero().flatten().tolist()


def test_reverse_takes_the_last_but_the_very_last_stays_unless_asked():
    assert gone(planned(llama(), 2, selector="reverse")) == [3, 4]
    assert gone(planned(llama(), 2, selector="reverse", drop_last=True)) == [4, 5]
    assert gone(planned(llama(), 4, selector="reverse")) == [1, 2, 3, 4]
    assert gone(planned(llama(), 2, selector="reverse", exclude=[f"{STACK}.4"])) == [2, 3]


def test_cosine_is_the_mean_over_prompts_of_the_mean_over_their_real_tokens():
    model = llama()
    mask = torch.ones_like(TOKENS)
    mask[0, 2:] = 0
    mask[1, 5:] = 0
    batches = [
        {"input_ids": TOKENS[:1], "attention_mask": mask[:1]},
        {"input_ids": TOKENS[1:], "attention_mask": mask[1:]},
    ]
    made = planned(model, 2, batches, keep_scores=True)
    states = model(TOKENS, attention_mask=mask, output_hidden_states=True, use_cache=False).hidden_states
    seen = []
    hooks = [
        block.register_forward_hook(lambda _, args, out: seen.append((args[0], out))) for block in model.model.layers
    ]
    model(TOKENS, attention_mask=mask, use_cache=False)
    for hook in hooks:
        hook.remove()
    assert torch.equal(seen[0][0], states[0])
    for (before, after), score in zip(seen, made.scores[STACK].tolist(), strict=True):
        of_prompts = []
        for prompt in range(6):
            real = [place for place in range(12) if mask[prompt, place]]
            cosines = [torch.cosine_similarity(before[prompt, p], after[prompt, p], dim=0).item() for p in real]
            of_prompts.append(sum(cosines) / len(cosines))
        assert score == pytest.approx(1 - sum(of_prompts) / 6, abs=1e-5)
    lowest = made.scores[STACK].argsort()[:2]
    assert sorted(lowest.tolist()) == gone(made)
    assert planned(model, 2, keep_scores=True).scores[STACK].tolist() != made.scores[STACK].tolist()


def test_prompts_of_other_lengths_count_the_same():
    values, mask = torch.tensor([[1.0, 2.0, 9.0], [3.0, 3.0, 3.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    assert prompt_means(values, mask).tolist() == [1.5, 3]
    assert prompt_means(values, None).tolist() == [4, 3]


def test_iterative_is_greedy_by_the_loss_on_the_data():
    model = llama()
    made = planned(model, 2, selector="iterative")

    def loss(removed):
        left = copy.deepcopy(model)
        left.model.layers = nn.ModuleList(b for i, b in enumerate(left.model.layers) if i not in removed)
        logits = left(TOKENS, use_cache=False).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()).item()

    singles = {index: loss([index]) for index in range(1, 6)}
    first = min(singles, key=singles.get)
    second = min((i for i in singles if i != first), key=lambda i: loss([first, i]))
    assert gone(made) == sorted([first, second])
    facts = made.facts[STACK]
    assert (facts["round_0"], facts["round_1"]) == (first, second)
    assert "fitness_without_0" not in facts
    for index, value in singles.items():
        assert facts[f"fitness_without_{index}"] == pytest.approx(-value, abs=1e-5)
    assert len(model.model.layers) == 6
    assert [block.self_attn.layer_idx for block in model.model.layers] == list(range(6))


def test_iterative_never_takes_layer_0_and_of_equal_ones_the_later_by_original_index():
    model = llama()
    assert gone(planned(model, 2, selector="iterative", fitness=lambda net: 1.0)) == [4, 5]
    original = list(model.model.layers)

    def few_odd(net):  # the best rest keeps 0, 2 and 4
        return -sum(original.index(block) % 2 for block in net.model.layers)

    made = planned(model, 3, selector="iterative", fitness=few_odd)
    assert gone(made) == [1, 3, 5]
    assert made.provenance[0].settings["fitness"].endswith("few_odd")
    assert [made.facts[STACK][f"round_{place}"] for place in range(3)] == [5, 3, 1]
    likes_losing_0 = planned(model, 1, selector="iterative", fitness=lambda net: original[0] not in net.model.layers)
    assert gone(likes_losing_0) == [5]


def test_a_fitness_that_fails_leaves_the_model_whole():
    model = llama()
    with pytest.raises(ZeroDivisionError):
        planned(model, 1, selector="iterative", fitness=lambda net: 1 / 0)
    assert len(model.model.layers) == model.config.num_hidden_layers == 6


def test_a_given_list_in_any_order_names_original_layers_once():
    model = llama()
    made = planned(model, 3, selector="given", layers=(4, 1, 3))
    assert gone(made) == [1, 3, 4]
    kept = [model.model.layers[index] for index in (0, 2, 5)]
    apply_(model, made)
    assert list(model.model.layers) == kept
    for wrong in ((4, 4, 1), (-1, 2, 3), (2, 3, 6), (2, 3), ()):
        with pytest.raises(SettingsError, match="3 different layers"):
            planned(llama(), 3, selector="given", layers=wrong)


def test_nothing_removed_is_bit_identical():
    model = llama()
    before = model(TOKENS).logits
    for selector in ("reverse", "cosine", "iterative", "given"):
        made = api.plan(model, "layer_limits", 0.0, data=TOKENS, selector=selector)
        assert gone(made) == []
        with masked(model, made):
            assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("selector", ["reverse", "cosine", "iterative"])
def test_removed_layers_are_as_identities(selector):
    model = llama()
    made = planned(model, 2, selector=selector)
    skipping = copy.deepcopy(model)
    for index in gone(made):
        skipping.model.layers[index].register_forward_hook(lambda module, args, out: args[0])
    apply_(model, made)
    expected = skipping(TOKENS, use_cache=False).logits
    torch.testing.assert_close(model(TOKENS).logits, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(expected, llama()(TOKENS).logits, atol=1e-2)


@pytest.mark.parametrize("make", [llama, lambda: tiny_gpt2(blocks=6)])
def test_what_is_left_generates_with_its_cache_as_without(make):
    model = make()
    stack = STACK if hasattr(model, "model") else "transformer.h"
    made = api.plan(model, "layer_limits", 0.4, data=TOKENS[:, :7], selector="reverse")
    assert gone(made, stack) == [3, 4]
    apply_(model, made)
    assert model.config.num_hidden_layers == 4

    def greedy(cache):
        return model.generate(TOKENS[:2, :7], max_new_tokens=12, do_sample=False, use_cache=cache, pad_token_id=0)

    assert torch.equal(greedy(True), greedy(False))


@pytest.mark.parametrize("selector", ["reverse", "cosine", "iterative"])
def test_too_many_layers_are_refused(selector):
    for count in (5, 6):
        with pytest.raises(BudgetError, match=r"sparsity 0\.1667 \(1 block\) to 0\.6667 \(4 blocks\)"):
            planned(llama(), count, selector=selector)


def test_excluded_layers_and_layer_0_stay():
    first_and_last = [f"{STACK}.0", f"{STACK}.3"]
    with pytest.raises(BudgetError, match="layer 0 never does and 2 others are excluded"):
        planned(llama(blocks=4), 2, selector="iterative", include=first_and_last)
    assert gone(planned(llama(blocks=4), 1, selector="iterative", include=first_and_last)) == [3]
    for selector in ("reverse", "cosine"):
        with pytest.raises(BudgetError, match="without the excluded"):
            planned(llama(blocks=4), 2, selector=selector, include=[f"{STACK}.1"])


def test_encoder_decoder_models_are_refused():
    from transformers import T5Config, T5ForConditionalGeneration

    model = T5ForConditionalGeneration(
        T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )
    with pytest.raises(ModelError, match=r"encoder-decoder.*shortgpt"):
        api.plan(model, "layer_limits", 0.25, data=TOKENS)


def test_what_cannot_be_done_is_said():
    with pytest.raises(SettingsError, match="Python only"):
        planned(llama(), 1, selector="iterative", fitness="accuracy")
    with pytest.raises(DataError, match="no labels and is not text"):
        api.plan(stacked(4), "layer_limits", 0.25, data=inputs(4, 5, 12), selector="iterative")
    with pytest.raises(NumericsError, match=r"layers\.0"):
        api.plan(stacked(4), "layer_limits", 0.25, data=torch.full((2, 5, 12), torch.nan))
    task = Task(llama(), Budget(0.5), [Batch((TOKENS,))], residency=object())
    with pytest.raises(SettingsError, match="streaming cannot"):
        plan(task, LayerLimitsSettings(selector="iterative"))


def test_labelled_data_are_a_task_too():
    model = zoo.load_model("digits-vit")
    data = zoo.load_data("digits", samples=32).calibration
    assert isinstance(data, Dataset)
    assert data.kind is DataKind.IMAGE
    made = api.plan(model, "layer_limits", 0.25, data=data, selector="iterative")
    (stack,) = made.masks
    assert len(gone(made, stack)) == 1
