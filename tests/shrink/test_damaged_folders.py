"""Damaged, incomplete and unsuitable model folders: one sentence names file or tensor; nothing is made up."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from shrink_models import llama, made_sharded, tower

import secateur as sc
from secateur.core.errors import ModelError

META = {"format": "pt"}


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    home = tmp_path_factory.mktemp("dense")
    llama().save_pretrained(home / "whole")
    made_sharded(home / "sharded")
    return home


@pytest.fixture
def folder(template, tmp_path, request):
    import shutil

    return shutil.copytree(template / getattr(request, "param", "whole"), tmp_path / "model")


def refused(folder, *words):
    with pytest.raises(ModelError) as caught:
        sc.load(folder)
    sentence = str(caught.value)
    assert "\n" not in sentence
    for word in (str(folder), *words):
        assert word in sentence, sentence


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, change, name="model.safetensors"):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, metadata=META)


def shards(folder):
    return sorted(folder.glob("model-*.safetensors"))


sharded = pytest.mark.parametrize("folder", ["sharded"], indirect=True)


def test_both_templates_load(template):
    states = [sc.load(template / name).state_dict() for name in ("whole", "sharded")]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("cut", [0, 4, 100, -1, -1000])
def test_truncated_file(folder, cut):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut] if cut else b"")
    refused(folder, "model.safetensors", "truncated or corrupt", "fetch it again")


def test_corrupt_header(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[12:30] = b"\xff" * 18
    path.write_bytes(content)
    refused(folder, "model.safetensors", "truncated or corrupt")


@sharded
def test_truncated_shard(folder):
    path = shards(folder)[1]
    path.write_bytes(path.read_bytes()[:-7])
    refused(folder, path.name, "truncated or corrupt")


@sharded
def test_missing_shard(folder):
    path = shards(folder)[1]
    path.unlink()
    refused(folder, path.name, "is missing")


@sharded
def test_index_that_names_an_absent_tensor(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.ghost.weight"] = shards(folder)[0].name
    index.write_text(json.dumps(content))
    refused(folder, shards(folder)[0].name, "model.ghost.weight")


@sharded
def test_index_that_names_a_tensor_of_another_shard(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = "model.norm.weight"
    wrong = next(path.name for path in shards(folder) if path.name != content["weight_map"][name])
    content["weight_map"][name] = wrong
    index.write_text(json.dumps(content))
    refused(folder, wrong, name)


@sharded
@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}'])
def test_damaged_index(folder, content):
    (folder / "model.safetensors.index.json").write_text(content)
    refused(folder, "model.safetensors.index.json")


@sharded
def test_index_that_forgets_a_tensor(folder):
    """All shards are whole and hold what is promised, and yet the model is incomplete."""
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    file = content["weight_map"].pop("model.norm.weight")
    index.write_text(json.dumps(content))
    edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"), file)
    refused(folder, "model.norm.weight")


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight", "model.norm.weight"])
def test_missing_tensor_is_not_initialised_anew(folder, name):
    edit_weights(folder, lambda tensors: tensors.pop(name))
    refused(folder, name, "LlamaForCausalLM")


def test_tensor_of_another_shape_is_not_initialised_anew(folder):
    name = "model.layers.1.mlp.up_proj.weight"
    edit_weights(folder, lambda tensors: tensors.update({name: torch.zeros(23, 16)}))
    refused(folder, name, "[23, 16]", "[24, 16]")


def test_more_layers_in_the_config_than_in_the_file(folder):
    edit_config(folder, num_hidden_layers=7)
    refused(folder, "model.layers.5")


def test_fewer_layers_in_the_config_than_in_the_file_warns(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.warns(UserWarning, match=r"model\.layers\.3.*does not use"):
        sc.load(folder)


def test_only_pickle_weights(folder):
    path = folder / "model.safetensors"
    path.rename(folder / "pytorch_model.bin")
    refused(folder, "only pickle weights", "pytorch_model.bin", "convert them to safetensors")


def test_no_weights_at_all(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "model.safetensors", "is missing")


@pytest.mark.parametrize("quantised", [{"quant_method": "gptq", "bits": 4}, "gptq"])
def test_quantised(folder, quantised):
    edit_config(folder, quantization_config=quantised)
    refused(folder, "quantised (gptq)", "dense checkpoint")


@pytest.mark.parametrize(
    "name", [["NoSuchModel"], [], None, ["AutoConfig"], ["__version__"], [3], {"a": 1}, ["PretrainedConfig"], "x"]
)
def test_unknown_class(folder, name):
    edit_config(folder, architectures=name)
    refused(folder, "no model class")


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 3},
        {"num_attention_heads": 0},
        {"hidden_size": "wide"},
        {"dtype": "float99"},
        {"rope_parameters": {"rope_type": "unheard of"}},
    ],
)
def test_config_that_no_model_can_be_made_from(folder, changes):
    edit_config(folder, **changes)
    refused(folder, "LlamaForCausalLM")


@pytest.mark.parametrize("content", [b"{", b"[1]", b"", b"\xff\xfe\x00"])
def test_damaged_config(folder, content):
    (folder / "config.json").write_bytes(content)
    refused(folder, "config.json")


def test_folders_that_are_none(tmp_path):
    refused(tmp_path / "nowhere", "is no folder")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "neither config.json nor secateur/result.json")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "is no folder")


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_damaged_card(tmp_path, content):
    sc.save(tower(), tmp_path / "out", factory="shrink_models:tower")
    (tmp_path / "out" / "secateur" / "result.json").write_text(content)
    refused(tmp_path / "out", "result.json")


def test_module_folder_without_weights_or_with_a_cut_file(tmp_path):
    sc.save(tower(), tmp_path / "out", factory="shrink_models:tower")
    path = tmp_path / "out" / "model.safetensors"
    content = path.read_bytes()
    for change, words in ((lambda: path.write_bytes(content[:-3]), "truncated"), (path.unlink, "does not exist")):
        change()
        with pytest.raises(ModelError, match=words):
            sc.load(tmp_path / "out", trust_factory=True)


def test_remote_code_is_never_run(folder, tmp_path):
    """A folder may bring Python files; nothing of them is imported."""
    (folder / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    edit_config(folder, auto_map={"AutoModelForCausalLM": "modeling_evil.Evil", "AutoConfig": "modeling_evil.Config"})
    assert type(sc.load(folder)).__name__ == "LlamaForCausalLM"
    assert not (tmp_path / "ran").exists()
