"""What is refused, in one sentence that says what is wrong and where; and what stops half-way keeps what it has."""

import json

import pytest
import streaming_tools as tools
import torch
from safetensors.torch import load_file, save_file

import secateur as sc
from secateur.core.errors import DataError, ModelError, NumericsError, OutputError, SecateurError, SettingsError
from secateur.streaming import folder_perplexity, open_folder, prune_folder


@pytest.fixture
def dense(tmp_path):
    tools.build("llama", tmp_path / "dense")
    return tmp_path / "dense"


def prune(dense, **more):
    given = {"data": tools.tokens()} | more
    return prune_folder(dense, dense.parent / "out", "wanda", 0.5, **given)


def refused(dense, match, kind=ModelError, **more):
    with pytest.raises(kind, match=match):
        prune(dense, **more)
    assert not (dense.parent / "out").exists()


def shard_with(dense, name):
    index = json.loads((dense / "model.safetensors.index.json").read_text())
    return dense / index["weight_map"][name]


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


NAME = "model.layers.1.mlp.up_proj.weight"


def test_a_missing_shard(dense):
    file = shard_with(dense, NAME)
    file.unlink()
    refused(dense, f"{file.name}' is missing")


def test_a_truncated_shard(dense):
    file = shard_with(dense, NAME)
    file.write_bytes(file.read_bytes()[:-100])
    refused(dense, f"{file.name}' is truncated or corrupt")


def test_an_index_that_names_what_is_not_there(dense):
    edit(shard_with(dense, NAME), lambda tensors: tensors.pop(NAME))
    refused(dense, f"lacks the tensor '{NAME}'")


def test_a_tensor_that_the_index_forgets(dense):
    path = dense / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    file = dense / index["weight_map"].pop(NAME)
    path.write_text(json.dumps(index))
    edit(file, lambda tensors: tensors.pop(NAME))
    refused(dense, f"lacks the tensor '{NAME}' that LlamaForCausalLM needs")


def test_a_shape_that_the_config_does_not_say(dense):
    edit(shard_with(dense, NAME), lambda tensors: tensors.update({NAME: torch.zeros(40, 32)}))
    refused(dense, rf"holds '{NAME}' as \[40, 32\], its config needs \[48, 32\]")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_stop_at_their_block_and_earlier_blocks_are_kept(dense, bad):
    edit(shard_with(dense, NAME), lambda tensors: tensors[NAME][3].fill_(bad))
    refused(dense, f"'{NAME}' in .* holds NaN or infinity", NumericsError)
    work = dense.parent / ".out.secateur-work"
    assert [path.name for path in work.rglob("*.safetensors")] == ["000000-model.layers.0.safetensors"]


def test_activations_that_overflow_name_the_layer(dense):
    name = "model.layers.1.mlp.down_proj.weight"
    for proj in ("gate", "up"):
        key = f"model.layers.1.mlp.{proj}_proj.weight"
        edit(shard_with(dense, key), lambda tensors, key=key: tensors[key].mul_(1e30))
    refused(dense, f"enter layer '{name}' contain NaN or infinity", NumericsError)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_quantised_checkpoints(dense, method):
    path = dense / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_method": method}}))
    refused(dense, f"is quantised \\({method}\\); start from the dense checkpoint")


def test_pickles_only(dense):
    for path in dense.glob("*.safetensors*"):
        path.unlink()
    (dense / "pytorch_model.bin").write_bytes(b"x")
    refused(dense, "only pickle weights are there")


def test_the_source_as_output(dense):
    with pytest.raises(OutputError, match="is the folder to be pruned"):
        prune_folder(dense, dense, "wanda", 0.5, data=tools.tokens(), force=True)
    assert open_folder(dense).checkpoint.bytes > 0


def test_an_output_that_exists(dense):
    (dense.parent / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        prune(dense)


def test_no_folder_of_transformers(tmp_path):
    with pytest.raises(ModelError, match="is no Hugging Face folder"):
        open_folder(tmp_path)


def test_no_data(dense):
    refused(dense, "wanda needs calibration data", DataError, data=None)


def test_a_disk_that_is_too_small(dense, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    refused(dense, "free some space or choose another --out")


def test_a_disk_that_fills_up_keeps_the_work(dense, monkeypatch):
    import errno

    import secateur.shrink.stream as stream

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stream, "write_shard", full)
    with pytest.raises(OutputError, match="disk full while writing"):
        prune(dense)
    assert not (dense.parent / "out").exists()
    monkeypatch.undo()
    prune(dense)
    assert (dense.parent / "out" / "config.json").exists()


def test_tokens_that_the_model_does_not_have(dense):
    with pytest.raises(SecateurError):
        prune(dense, data=torch.full((4, 24), 5000))


def test_experts_without_tokens_are_pruned_by_magnitude_and_named(tmp_path):
    tools.build("mixtral", tmp_path / "dense")
    done = prune_folder(tmp_path / "dense", tmp_path / "out", "wanda", 0.5, data=torch.ones(1, 2, dtype=torch.int64))
    named = [
        sentence for sentence in done.plan.warnings if "experts." in sentence and "pruned by magnitude" in sentence
    ]
    assert named  # two tokens cannot reach all of eight experts


def test_perplexity_wants_windows(dense):
    from secateur.data.dataset import DataKind, Dataset

    with pytest.raises(DataError, match="perplexity needs int64 token ids"):
        folder_perplexity(dense, Dataset("x", DataKind.TEXT, torch.ones(4, 1, dtype=torch.int64)))


@pytest.mark.parametrize(
    "method", sorted(name for name, m in sc.methods().items() if m.run is not None and not m.streams)
)
def test_methods_that_need_the_whole_model_say_so_before_any_work(dense, method):
    with pytest.raises(SettingsError, match=f"{method} needs the whole model in memory.*these can: .*wanda"):
        prune_folder(dense, dense.parent / "out", method, 0.5, data=tools.tokens())
    assert not list(dense.parent.glob(".*"))


@pytest.mark.parametrize("method", ["random", "group_random"])
def test_methods_without_data_stream_too(dense, method):
    prune_folder(dense, dense.parent / "out", method, 0.5)
    assert (dense.parent / "out" / "config.json").exists()
