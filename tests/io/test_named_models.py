"""MODEL: each form a user can name one by, what is known of it afterwards, and names that lead nowhere."""

import pytest
import torch
from cli_runs import net, write_language_model
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import secateur as sc
from secateur import zoo
from secateur.core.errors import ModelError, SettingsError, UnknownNameError
from secateur.io.models import open_model, open_tokenizer, recorded_data

NET = "cli_runs:net"


@pytest.fixture(scope="module")
def lm(tmp_path_factory):
    return write_language_model(tmp_path_factory.mktemp("models") / "lm")


def equal(a: nn.Module, b: nn.Module) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("name", zoo.names())
def test_zoo(name):
    opened = open_model(f"zoo:{name}")
    assert opened.name == f"zoo:{name}"
    assert not opened.model.training
    family = name.partition("-")[0]
    assert opened.data == f"zoo:{family if family in ('pydoc', 'skills') else 'digits'}"
    assert (opened.folder / "model.safetensors").exists()
    plain = name in ("digits-mlp", "digits-resnet")
    assert (opened.factory is not None) == plain
    assert (open_tokenizer(opened) is not None) == (family in ("pydoc", "skills"))
    assert equal(opened.model, zoo.load_model(name))


def test_hugging_face_folder(lm, monkeypatch):
    monkeypatch.chdir(lm.parent)
    for name in (str(lm), "lm", "./lm", "lm/"):
        opened = open_model(name)
        assert type(opened.model).__name__ == "LlamaForCausalLM"
        assert opened.folder.resolve() == lm
        assert (opened.factory, opened.data) == (None, None)
        stored = load_file(lm / "model.safetensors")
        assert torch.equal(opened.model.state_dict()["lm_head.weight"], stored["lm_head.weight"])
    assert open_tokenizer(opened).encode("ab") == [97, 98]


def test_a_folder_that_looks_like_a_hub_id_is_the_folder(lm, tmp_path, monkeypatch):
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").symlink_to(lm)
    monkeypatch.chdir(tmp_path)
    assert type(open_model("owner/name").model).__name__ == "LlamaForCausalLM"


def test_factory_with_and_without_weights(tmp_path):
    opened = open_model(NET)
    assert (opened.factory, opened.folder, opened.data) == (NET, None, None)
    assert not opened.model.training
    assert equal(opened.model, net())
    other = net()
    with torch.no_grad():
        other[1].weight.mul_(2)
    save_model(other, str(tmp_path / "w.safetensors"))
    assert equal(open_model(NET, tmp_path / "w.safetensors").model, other)
    assert open_tokenizer(opened) is None


def test_result_folder_remembers_factory_and_data(tmp_path):
    sc.save(net(), tmp_path / "out", factory=NET, data="zoo:digits")
    opened = open_model(str(tmp_path / "out"), trust_factory=True)
    assert (opened.factory, opened.data, opened.folder) == (NET, "zoo:digits", tmp_path / "out")
    assert equal(opened.model, net())
    with pytest.raises(ModelError, match="--trust-factory"):
        open_model(str(tmp_path / "out"))
    assert recorded_data(tmp_path) is None


def test_stored_dtype_is_kept_and_another_one_is_taken_on_request(tmp_path, lm):
    assert open_model(str(lm)).model.dtype == torch.float32
    assert open_model(str(lm), dtype="bfloat16").model.dtype == torch.bfloat16
    tensors = {name: value.half() for name, value in net().state_dict().items() if value.is_floating_point()}
    save_file(tensors | {"2.num_batches_tracked": torch.tensor(0)}, tmp_path / "half.safetensors")
    model = open_model(NET, tmp_path / "half.safetensors").model
    assert {p.dtype for p in model.parameters()} == {torch.float16}
    assert model[2].num_batches_tracked.dtype == torch.int64
    assert {p.dtype for p in open_model(NET, dtype="float16").model.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("zoo:digits-resnt", UnknownNameError, "did you mean digits-resnet"),
        ("digits-resnet", UnknownNameError, "did you mean zoo:digits-resnet"),
        ("zoo:", UnknownNameError, "unknown zoo model"),
        ("", UnknownNameError, "unknown model|no model folder"),
        ("./nowhere", UnknownNameError, "nowhere"),
        ("a/b/c", UnknownNameError, "a/b/c"),
        ("no_module_of_this_name:make", ModelError, "cannot import"),
    ],
)
def test_names_that_lead_nowhere(name, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((kind, ModelError), match=words):
        open_model(name)


def test_weights_only_go_with_a_factory(lm, tmp_path):
    save_model(net(), str(tmp_path / "w.safetensors"))
    for name in (str(lm), "zoo:digits-mlp"):
        with pytest.raises(ModelError, match="--weights goes with"):
            open_model(name, tmp_path / "w.safetensors")


def test_a_file_is_no_model(tmp_path):
    save_model(net(), str(tmp_path / "w.safetensors"))
    with pytest.raises(ModelError, match=r"is a file.*--weights"):
        open_model(str(tmp_path / "w.safetensors"))


def test_dtype_and_device_names():
    with pytest.raises(UnknownNameError, match="did you mean float16"):
        open_model(NET, dtype="float61")
    for device in ("warp", "cuda:99", "cpu:x"):
        with pytest.raises(SettingsError, match=f"device '{device}' cannot be used"):
            open_model(NET, device=device)


def test_hub_without_network(tmp_path, monkeypatch):
    """HF_HUB_OFFLINE is set for all tests; any socket would fail this one."""
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(ModelError, match="no local folder and cannot be fetched from the hub") as caught:
        open_model("nobody/no-such-model-of-secateur")
    assert "\n" not in str(caught.value)


def test_the_network_is_asked_for_hub_ids_only(monkeypatch, lm):
    asked = []
    monkeypatch.setattr("secateur.io.models._download", lambda name: asked.append(name) or lm)
    for name in ("zoo:digits-mlp", str(lm), NET):
        open_model(name)
    assert asked == []
    assert type(open_model("owner/name-7b").model).__name__ == "LlamaForCausalLM"
    assert asked == ["owner/name-7b"]


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {"type": "nothing known"}}'])
def test_damaged_tokenizer(lm, tmp_path, content):
    import shutil

    folder = shutil.copytree(lm, tmp_path / "lm")
    (folder / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer in .* cannot be loaded") as caught:
        open_tokenizer(open_model(str(folder)))
    assert "\n" not in str(caught.value)
