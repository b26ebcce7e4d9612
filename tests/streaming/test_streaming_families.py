"""Streamed from shards to shards, a model of any family ends as it does in memory."""

import pytest
import streaming_tools as tools
import torch
import transformers as tf

import secateur as sc
from secateur.core.plan import Plan
from secateur.data.dataset import DataKind, Dataset
from secateur.measure import perplexity
from secateur.streaming import folder_perplexity, prune_folder


def logits(model):
    with torch.no_grad():
        return model(tools.tokens()[:3]).logits


@pytest.mark.parametrize("family", [name for name in tools.FAMILIES if name != "llama-deep"])
def test_the_result_is_that_of_the_model_in_memory(family, tmp_path):
    model = tools.build(family, tmp_path / "dense")
    data = tools.tokens()
    done = prune_folder(tmp_path / "dense", tmp_path / "out", "wanda", 0.5, data=data)
    dense = logits(model)
    plan = sc.plan(model, "wanda", 0.5, data=data, include=[*done.plan.sites])
    sc.apply_(model, plan)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(logits(again), logits(model))
    assert not torch.allclose(logits(again), dense, atol=1e-3)
    assert all(
        torch.equal(mask, plan.masks[name]) for name, mask in Plan.load(tmp_path / "out" / "secateur").masks.items()
    )
    windows = Dataset("windows", DataKind.TEXT, data)
    assert folder_perplexity(tmp_path / "out", windows).value == pytest.approx(perplexity(again, windows).value, 1e-5)
    assert len(done.seconds) == 3
    assert not list(tmp_path.glob(".*"))  # the work folder is gone


@pytest.mark.parametrize(
    "method", ["sparsegpt", "gblm", "cfsp", "amp", "maw", "flap", "comp", "shortgpt", "layer_limits"]
)
def test_other_methods_stream_as_they_are(method, tmp_path):
    model = tools.build("llama", tmp_path / "dense")
    data = tools.tokens()
    prune_folder(tmp_path / "dense", tmp_path / "out", method, 0.4, data=data)
    plan = sc.plan(model, method, 0.4, data=list(data.split(12)), include=["model.layers*"])
    sc.apply_(model, plan)
    again = sc.load(tmp_path / "out")
    assert torch.allclose(logits(again), logits(model), atol=1e-5)
    assert sum(p.numel() for p in again.parameters()) == sum(p.numel() for p in model.parameters())


def test_two_of_four_holds_in_every_group(tmp_path):
    tools.build("llama", tmp_path / "dense", dtype=torch.bfloat16)
    prune_folder(tmp_path / "dense", tmp_path / "out", "sparsegpt", pattern="2:4", data=tools.tokens())
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    for name, parameter in again.named_parameters():
        if "layers" in name and parameter.dim() == 2:
            assert int((parameter.view(-1, 4) != 0).sum(1).max()) == 2


def test_bfloat16_stays_bfloat16_and_can_be_run_in_float32(tmp_path):
    tools.build("llama", tmp_path / "dense", dtype=torch.bfloat16)
    for name, dtype in (("same", None), ("wide", torch.float32)):
        prune_folder(tmp_path / "dense", tmp_path / name, "sparsegpt", 0.5, data=tools.tokens(), dtype=dtype)
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / name)
        assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    one, other = (Plan.load(tmp_path / name / "secateur").masks for name in ("same", "wide"))
    kept = torch.cat([(one[name] == other[name]).flatten() for name in one]).float().mean()
    assert 0.95 < kept < 1  # rounding moves a few


def test_spilled_activations_change_nothing(tmp_path):
    tools.build("llama", tmp_path / "dense")
    for name, spill in (("memory", False), ("disk", True)):
        prune_folder(tmp_path / "dense", tmp_path / name, "sparsegpt", 0.5, data=tools.tokens(), spill=spill)
    assert tools.digests(tmp_path / "memory") == tools.digests(tmp_path / "disk")


def test_a_large_embedding_is_read_by_rows(tmp_path, monkeypatch):
    tools.build("gemma2", tmp_path / "dense")  # scales what it looks up, and ties it to the head
    prune_folder(tmp_path / "dense", tmp_path / "whole", "wanda", 0.5, data=tools.tokens())
    monkeypatch.setattr("secateur.shrink.resident.WHOLE", 0)
    prune_folder(tmp_path / "dense", tmp_path / "rows", "wanda", 0.5, data=tools.tokens())
    assert tools.digests(tmp_path / "whole") == tools.digests(tmp_path / "rows")
    windows = Dataset("windows", DataKind.TEXT, tools.tokens())
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "rows").eval()
    assert folder_perplexity(tmp_path / "rows", windows).value == pytest.approx(perplexity(again, windows).value, 1e-5)


def test_companions_are_carried_and_the_config_says_what_happened(tmp_path):
    tools.build("llama", tmp_path / "dense")
    (tmp_path / "dense" / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (tmp_path / "dense" / "generation_config.json").write_text('{"max_new_tokens": 7}')
    prune_folder(tmp_path / "dense", tmp_path / "out", "wanda", 0.5, data=tools.tokens())
    for name in ("tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "out" / name).read_text() == (tmp_path / "dense" / name).read_text()
    section = tf.AutoConfig.from_pretrained(tmp_path / "out").secateur
    assert section["methods"] == ["wanda"]
    assert section["kept"] * 2 == section["total"]
