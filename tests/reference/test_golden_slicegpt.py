"""SliceGPT against the official code on two tiny models; where the numbers come from is in the JSON's `provenance`."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

import secateur as sc
from secateur.measure import parameters

GOLDEN = json.loads((Path(__file__).parent / "golden_slicegpt.json").read_text())["results"]
WIDTH, KEPT, VOCABULARY = 32, 24, 40
SHAPE = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4}
TOLERANCE = {"llama": 2e-6, "opt": 1e-7}  # the official Llama gives its logits in float32


def values(name, shape):
    """Small integers over powers of two; the generator of one tensor depends on its name alone."""
    found = np.random.RandomState([0, *name.encode()]).randint(-8, 9, size=shape) / 32
    if "norm" in name and name.endswith("weight"):
        found = 1 + found / 2
    if name.endswith("embed_tokens.weight"):
        found[:, WIDTH // 2 :] = -found[:, : WIDTH // 2]
    return torch.tensor(found, dtype=torch.float64)


def model_of(name):
    common = SHAPE | {"max_position_embeddings": 32}
    if name == "llama":
        config = LlamaConfig(**common, intermediate_size=48, num_key_value_heads=2, rms_norm_eps=1e-5)
        model = LlamaForCausalLM(config)
    else:
        model = OPTForCausalLM(OPTConfig(**common, ffn_dim=48, word_embed_proj_dim=WIDTH))
    model = model.double().eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.copy_(values(key, tuple(parameter.shape)))
    return model


def padded_sequences():
    tokens = torch.tensor(np.random.RandomState(1).randint(3, VOCABULARY, size=(6, 16)))
    mask = torch.ones_like(tokens)
    for row, length in enumerate((16, 11, 16, 7, 13, 16)):
        mask[row, length:] = 0
    return [{"input_ids": tokens[i : i + 2], "attention_mask": mask[i : i + 2]} for i in range(0, 6, 2)]


def held_out():
    return torch.tensor(np.random.RandomState(2).randint(3, VOCABULARY, size=(2, 6)))


def logits(model):
    with torch.no_grad():
        return model(held_out()).logits.double()


def official(key):
    return torch.tensor(GOLDEN[key]["logits"], dtype=torch.float64)


@pytest.mark.parametrize("name", TOLERANCE)
def test_the_models_are_the_ones_the_official_code_sliced(name):
    torch.testing.assert_close(logits(model_of(name)), official(f"{name}/dense"), rtol=0, atol=TOLERANCE[name])


@pytest.mark.parametrize("end", ["wide", "all"])
@pytest.mark.parametrize("name", TOLERANCE)
def test_sliced_models_give_the_official_logits(name, end):
    model = model_of(name)
    plan = sc.plan(model, "slicegpt", 0.25, data=padded_sequences(), slice_head=end == "all")
    sc.apply_(model, plan)
    key = f"{name}/{end}"
    assert plan.kept(next(iter(plan.sites))) == KEPT
    assert parameters(model) == GOLDEN[key]["parameters"]
    torch.testing.assert_close(logits(model), official(key), rtol=0, atol=TOLERANCE[name])
    assert (logits(model) - official(f"{name}/dense")).abs().max() > 0.1


def test_the_recipe_tells_whether_padding_was_left_out():
    model = model_of("opt")
    batches = [{"input_ids": batch["input_ids"]} for batch in padded_sequences()]
    sc.apply_(model, sc.plan(model, "slicegpt", 0.25, data=batches))
    assert (logits(model) - official("opt/wide")).abs().max() > 1e-3
