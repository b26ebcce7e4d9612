"""`secateur inspect` as a user and as a machine would call it."""

import json

import pytest
from cli_runs import good, run

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
NET = "cli_runs:net"


@pytest.fixture
def lm(work):
    (work / "lm").mkdir()
    (work / "lm" / "config.json").write_text(json.dumps(CONFIG))
    return "lm"


def test_help_teaches_by_example(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = good("inspect", "--help").out
    assert "secateur inspect zoo:digits-resnet" in said
    assert "--json" in said


def test_the_tree_folds_what_repeats(lm):
    said = good("inspect", lm).out
    assert "0..5 (6 alike, each)" in said
    assert said.count("mlp.gate_proj:neuron") == 1
    assert "embed_tokens:embedding" in said
    assert "it is an output of the model" in said
    assert "inputs: made up, [2, 16]" in said


def test_depth_unfolds_and_sums_up(lm):
    said = good("inspect", lm, "--depth", 4).out
    assert said.count("mlp.gate_proj:neuron") == 6
    assert "alike" not in said
    short = good("inspect", lm, "--depth", 1).out
    assert "model: 1 x embedding, 1 x head_dim, 6 x head, 6 x neuron" in short


def test_a_folded_tree_shows_every_different_block(work):
    said = good("inspect", "zoo:digits-resnet").out
    assert "0..1 (2 alike, each)" in said  # the first stage; the others begin with a block of their own
    assert said.count("conv2:channel") == 2


def test_json_is_the_whole_structure(lm):
    found = good("inspect", lm, "--json").json
    assert {"model", "parameters", "flops", "sites", "frozen", "unknown"} <= found.keys()
    assert found["model"] == "lm"
    site = next(site for site in found["sites"] if site["kind"] == "neuron")
    assert {"name", "kind", "units", "cost", "parameters_share", "flops_share", "occurrences", "coupled"} <= site.keys()
    assert site["units"] == 48
    assert site["cost"] == 3 * 32
    assert site["coupled"] == ["model.layers.0.mlp.up_proj", "model.layers.0.mlp.down_proj"]
    assert found["unknown"] == []


def test_frozen_axes_are_listed_on_demand(work):
    said = good("inspect", NET, "--input", "2,1,4,4", "--frozen").out
    assert "4.weight[0]" in said
    assert "it is an output of the model" in said
    assert "1:neuron" in said


def test_no_weights_gives_the_same_answer(work):
    asked = ["inspect", NET, "--input", "2,1,4,4", "--json"]
    assert good(*asked).json == good(*asked, "--no-weights").json


def test_a_page_is_written_beside_the_tree(lm, work):
    said = good("inspect", lm, "--html", "out/page.html").out
    assert "page: out/page.html" in said
    assert "embed_tokens" in (work / "out/page.html").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([NET, "--input", "2,x"], "--input takes sizes as 2,3,224,224, got '2,x'"),
        ([NET, "--tokens", "2x16"], "no table of tokens"),
        ([NET, "--input", "2,1,4,4", "--tokens", "2x16"], "exclude each other"),
        (["cli_runs:stack", "--input", "2,1,5,5,5,5", "--data", "zoo:digits"], "exclude each other"),
        (["nowhere", "--no-weights"], "cannot be built without weights"),
    ],
)
def test_bad_input_is_one_sentence(work, words, message):
    done = run("inspect", *words)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err
