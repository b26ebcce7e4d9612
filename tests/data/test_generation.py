"""Writing by a model: the same as transformers' greedy decoding, cuts by definition, stop tokens kept."""

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from secateur import zoo
from secateur.core.errors import DataError, NumericsError
from secateur.data.generation import Response, Sampling, generated_windows, next_tokens, respond, stop_ids


def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=32, bos_token_id=1, eos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=16, n_layer=2, n_head=2, n_positions=32, bos_token_id=1, eos_token_id=2,
        initializer_range=0.5,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


class Plain(nn.Module):
    """A causal model that is no transformers model: the next token is the sum of all so far, modulo 7."""

    def forward(self, ids):
        return nn.functional.one_hot(ids.cumsum(1) % 7, 7).float()


PROMPTS = [[3, 4, 5], [6, 7], [8, 9, 10], [11], [5, 6, 7, 8]]


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("cache", [True, False])
def test_greedy_responses_are_those_of_transformers(make, cache):
    model = make()
    found = respond(model, PROMPTS, Sampling(limit=12), stop=(2,), cache=cache)
    for prompt, response in zip(PROMPTS, found, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        assert list(response.tokens) == expected[0, len(prompt) :].tolist()
        assert response.stopped is (response.tokens[-1] == 2)
    assert len({response.tokens for response in found}) > 2


def test_a_cache_is_used_and_saves_work():
    model, lengths = llama(), []
    model.model.layers[0].register_forward_hook(lambda module, args, out: lengths.append(args[0].shape[1]))
    respond(model, [[3, 4, 5]], Sampling(limit=4))
    assert lengths == [3, 1, 1, 1]
    lengths.clear()
    respond(model, [[3, 4, 5]], Sampling(limit=4), cache=False)
    assert lengths == [3, 4, 5, 6]


def test_any_module_can_write():
    (found,) = respond(Plain(), [[1, 2]], Sampling(limit=4))
    assert found == Response((3, 6, 5, 3), False)


def test_a_stop_token_is_kept_and_nothing_comes_behind_it():
    long, short = respond(Plain(), [[1, 2], [3, 2]], Sampling(limit=4), stop=(6, 5))
    assert (long, short) == (Response((3, 6), True), Response((5,), True))
    assert long.written == (3,)
    assert short.written == ()
    (cut,) = respond(Plain(), [[1, 2]], Sampling(limit=1), stop=(6,))
    assert (cut.stopped, cut.written) == (False, (3,))


def test_sampled_responses_do_not_depend_on_batches_cache_or_the_surroundings():
    model, sampling = llama(), Sampling(temperature=0.9, top_p=0.95, limit=10)
    first = respond(model, PROMPTS, sampling, seed=1)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert respond(model, PROMPTS, sampling, seed=1, batch=1) == first
    assert respond(model, PROMPTS, sampling, seed=1, cache=False) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert respond(model, PROMPTS, sampling, seed=2) != first
    assert respond(model, PROMPTS, Sampling(limit=10), seed=1) != first


SHARES = torch.tensor([0.1, 0.4, 0.2, 0.3])  # by falling share: tokens 1, 3, 2, 0


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1), {1: 0.4, 3: 0.3, 2: 0.2, 0: 0.1}),
        (Sampling(temperature=1, top_k=2), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(temperature=1, top_p=0.65), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(temperature=1, top_p=0.75), {1: 4 / 9, 3: 3 / 9, 2: 2 / 9}),
        (Sampling(temperature=1, top_k=3, top_p=0.75), {1: 4 / 7, 3: 3 / 7}),
        (Sampling(temperature=0.5), {1: 16 / 30, 3: 9 / 30, 2: 4 / 30, 0: 1 / 30}),
        (Sampling(), {1: 1.0}),
    ],
)
def test_draws_follow_the_distribution_that_is_left(sampling, allowed):
    draws = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    found = next_tokens(SHARES.log().repeat(len(draws), 1), sampling, draws)
    shares = torch.bincount(found, minlength=4) / len(draws)
    for token in range(4):
        assert float(shares[token]) == pytest.approx(allowed.get(token, 0), abs=2e-4)


def test_rounding_never_leads_to_a_token_that_was_cut():
    logits = torch.tensor([[0.0, -1.0, -50.0]])
    assert next_tokens(logits, Sampling(temperature=1, top_k=2), torch.tensor([1.0], dtype=torch.float64)).item() == 1


def test_all_stop_ids_of_a_model_count():
    model = llama()
    model.generation_config.eos_token_id = [2, 7]
    assert stop_ids(model) == (2, 7)
    assert stop_ids(zoo.load_model("pydoc-llama")) == ()


def test_impossible_prompts_and_damaged_models_are_refused():
    model = llama()
    with pytest.raises(DataError, match="prompt 1 has no tokens"):
        respond(model, [[3], []], Sampling())
    with pytest.raises(DataError, match="prompt 0 has 32 tokens, the model's context is 32"):
        respond(model, [[3] * 32], Sampling())
    (found,) = respond(model, [[3] * 30], Sampling(limit=9))
    assert len(found.tokens) == 2
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(NumericsError, match="NaN"):
        respond(model, [[3]], Sampling())


def test_windows_written_by_the_model_are_calibration_data():
    model = llama()
    data = generated_windows(model, 6, 12, seed=3)
    assert data.inputs.shape == (6, 12)
    assert data.inputs.dtype == torch.int64
    assert (data.inputs[:, 0] == 1).all()  # the first token of this model
    assert (
        data.digest == generated_windows(model, 6, 12, seed=3).digest != generated_windows(model, 6, 12, seed=4).digest
    )
    given = generated_windows(model, 6, 12, start=torch.tensor([[5, 6]] * 6), sampling=Sampling())
    assert given.inputs[0].tolist() == [5, 6, *respond(model, [[5, 6]], Sampling(limit=10))[0].tokens]
    open_start = generated_windows(zoo.load_model("pydoc-llama"), 4, 8)
    assert len(set(open_start.inputs[:, 0].tolist())) > 1
    with pytest.raises(DataError, match=r"do not suit 6 windows of 12 tokens"):
        generated_windows(model, 6, 12, start=torch.zeros(5, 1, dtype=torch.int64))
    with pytest.raises(DataError, match="context of 32"):
        generated_windows(model, 6, 33)
    with pytest.raises(DataError, match="does not say its vocabulary"):
        generated_windows(Plain(), 1, 3)
