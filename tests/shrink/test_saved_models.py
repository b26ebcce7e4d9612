"""Saved transformers models: stock tools in a fresh process give the same logits; everything else is carried."""

import json
import stat

import pytest
import torch
from safetensors.torch import load_file, save_file
from shrink_models import (
    STACKS,
    assert_same_bits,
    bits,
    block_plan,
    fresh_python,
    llama,
    model_inputs,
    model_of,
    outputs,
    qwen3,
    state,
    t5,
    tied_llama,
    vit,
    weight_plan,
)

import secateur as sc
from secateur.core.errors import OutputError
from secateur.data.dataset import DataKind, Dataset
from secateur.shrink import save as saving

TOKENS = Dataset("t", DataKind.TEXT, torch.randint(0, 48, (4, 12), generator=torch.Generator().manual_seed(3)))
COMPARE = """
import json, sys
from pathlib import Path
import torch, transformers
from safetensors.torch import load_file
for folder in sys.argv[1:]:
    folder = Path(folder)
    given = load_file(folder.parent / (folder.name + "-inputs.safetensors"))
    auto = getattr(transformers, (folder.parent / (folder.name + "-auto.txt")).read_text())
    model, info = auto.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    expected = given.pop("expected")
    with torch.no_grad():
        found = model.eval()(**given).logits
    assert torch.equal(found, expected), (folder, (found - expected).abs().max())
    print(folder.name)
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Masked and block-removed results of all families, each with inputs and the logits before saving."""
    home = tmp_path_factory.mktemp("saved")
    for name in STACKS:
        for kind in ("masked", "removed"):
            model, stack = model_of(name)
            if kind == "removed":
                plan = block_plan(model, stack, [1, 3])
            else:
                block = model.get_submodule(stack)[2]
                parameters = [n for n, p in model.named_parameters() if p.dim() == 2 and n.startswith(f"{stack}.2.")]
                assert parameters, block
                plan = weight_plan(model, parameters)
            folder = home / f"{name}-{kind}"
            sc.save(sc.apply_(model, plan), folder, plan)
            inputs = model_inputs(name)
            save_file(inputs | {"expected": outputs(model, inputs)}, home / f"{folder.name}-inputs.safetensors")
            kinds = {"vit": "ForImageClassification", "bert": "ForMaskedLM", "t5": "ForSeq2SeqLM"}
            auto = "AutoModel" + kinds.get(name.partition("-")[0], "ForCausalLM")
            (home / f"{folder.name}-auto.txt").write_text(auto)
    return home


def test_plain_from_pretrained_in_a_fresh_process_gives_equal_logits(saved):
    folders = sorted(str(path) for path in saved.iterdir() if path.is_dir())
    assert len(folders) == 2 * len(STACKS)
    printed = fresh_python(COMPARE, *folders).split()
    assert printed == [path.rpartition("/")[2] for path in folders]


@pytest.mark.parametrize("name", STACKS)
def test_own_loader_gives_the_same_bits(saved, name):
    for kind in ("masked", "removed"):
        folder = saved / f"{name}-{kind}"
        inputs = load_file(saved / f"{folder.name}-inputs.safetensors")
        expected = inputs.pop("expected")
        model = sc.load(folder)
        assert not model.training
        assert torch.equal(outputs(model, inputs), expected)


def test_removed_blocks_are_not_in_the_file(saved):
    names = load_file(saved / "llama-removed" / "model.safetensors").keys()
    assert {name.split(".")[2] for name in names if ".layers." in name} == {"0", "1", "2"}


def test_zeros_are_in_the_file(saved):
    stored = load_file(saved / "llama-masked" / "model.safetensors")
    plan = sc.Plan.load(saved / "llama-masked" / "secateur")
    for name, mask in plan.masks.items():
        assert torch.equal(stored[name] != 0, mask)


def test_files_are_readable_by_others(saved):
    for path in (saved / "llama-masked").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o755 if path.is_dir() else 0o644), path
    assert stat.S_IMODE((saved / "llama-masked").stat().st_mode) == 0o755


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_config_gets_one_section_and_nothing_else_changes(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = sc.load(tmp_path / "dense")
    plan = sc.plan(model, "global-magnitude", 0.5)
    sc.save(sc.apply_(model, plan), tmp_path / "out", plan)
    assert not hasattr(model.config, "secateur")  # the model in memory is as it was
    found = config_of(tmp_path / "out")
    section = found.pop("secateur")
    assert found == config_of(tmp_path / "dense")
    kept, total = plan.units()
    assert section == {
        "methods": [plan.provenance[0].method],
        "units": ["weight"],
        "kept": kept,
        "total": total,
        "pattern": "unstructured",
    }


def test_pattern_and_structure_are_named_in_the_config(tmp_path):
    model = llama()
    plan = sc.plan(model, "wanda", pattern="2:4", data=TOKENS)
    sc.save(sc.apply_(model, plan), tmp_path / "nm", plan)
    assert config_of(tmp_path / "nm")["secateur"]["pattern"] == "2:4"
    model = llama()
    plan = sc.plan(model, "shortgpt", 0.2, data=TOKENS)
    sc.save(sc.apply_(model, plan), tmp_path / "cut", plan)
    section = config_of(tmp_path / "cut")["secateur"]
    assert (section["pattern"], section["units"], section["kept"], section["total"]) == ("structured", ["block"], 4, 5)


def test_only_the_number_of_layers_and_their_list_change_when_blocks_go(tmp_path):
    model = qwen3()
    model.save_pretrained(tmp_path / "dense")
    plan = block_plan(model, "model.layers", [0])
    sc.save(sc.apply_(model, plan), tmp_path / "out", plan)
    before, after = config_of(tmp_path / "dense"), config_of(tmp_path / "out")
    after.pop("secateur")
    assert after.pop("num_hidden_layers") == 4
    assert after.pop("layer_types") == before.pop("layer_types")[1:]
    before.pop("num_hidden_layers")
    assert after == before


def test_tied_embeddings_stay_tied(tmp_path):
    model = tied_llama()
    plan = sc.plan(model, "random", 0.5)
    sc.save(sc.apply_(model, plan), tmp_path / "out", plan)
    again = sc.load(tmp_path / "out")
    assert again.lm_head.weight is again.model.embed_tokens.weight
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert_same_bits(again, state(model))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays(tmp_path, dtype):
    llama().save_pretrained(tmp_path / "dense")
    opened = sc.open_model(str(tmp_path / "dense"), dtype=dtype)
    plan = sc.plan(opened.model, "random", 0.5)
    sc.save(sc.apply_(opened.model, plan), tmp_path / "out", plan, source=opened.folder)
    again = sc.load(tmp_path / "out")
    assert {p.dtype for p in again.parameters()} == {getattr(torch, dtype)}
    assert again.model.rotary_emb.inv_freq.dtype == torch.float32
    assert_same_bits(again, state(opened.model))
    inputs = {"input_ids": TOKENS.inputs}
    assert torch.equal(outputs(again, inputs), outputs(opened.model, inputs))


def test_a_model_cast_by_hand_is_refused_with_the_reason(tmp_path):
    """`.half()` also rounds the rotary frequencies, which no file holds: stock tools would load another model."""
    with pytest.raises(OutputError, match=r"inv_freq' was cast to torch\.float16: load the model in that dtype"):
        sc.save(llama().half(), tmp_path / "out")


COMPANIONS = {
    "tokenizer.json": "{}",
    "tokenizer_config.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "special_tokens_map.json": "{}",
    "merges.txt": "a b",
    "spiece.model": "x",
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "LICENSE": "free",
}


def test_tokenizer_template_processor_and_generation_config_are_carried(tmp_path):
    model = llama()
    model.generation_config.temperature = 0.25
    model.generation_config.do_sample = True
    model.save_pretrained(tmp_path / "dense")
    for name, text in COMPANIONS.items():
        (tmp_path / "dense" / name).write_text(text)
    (tmp_path / "dense" / "training.bin").write_text("must not travel")
    (tmp_path / "dense" / "README.md").write_text("neither")
    model = sc.load(tmp_path / "dense")  # knows its folder without being told
    plan = sc.plan(model, "random", 0.5)
    sc.save(sc.apply_(model, plan), tmp_path / "out", plan)
    for name, text in COMPANIONS.items():
        assert (tmp_path / "out" / name).read_text() == text
    made = {path.name for path in (tmp_path / "out").iterdir()}
    assert made == {*COMPANIONS, "config.json", "generation_config.json", "model.safetensors", "secateur"}
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text())["temperature"] == 0.25


def test_zoo_tokenizer_works_from_the_result(tmp_path):
    from transformers import AutoTokenizer

    opened = sc.open_model("zoo:pydoc-llama")
    plan = sc.plan(opened.model, "random", 0.5)
    sc.save(sc.apply_(opened.model, plan), tmp_path / "out", plan, source=opened.folder)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.decode(tokenizer.encode("def f(): pass")) == "def f(): pass"


def test_sharded_source_prunes_like_the_whole_one(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="10KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    results = []
    for name in ("whole", "sharded"):
        loaded = sc.load(tmp_path / name)
        plan = sc.plan(loaded, "wanda", 0.5, data=TOKENS)
        sc.save(sc.apply_(loaded, plan), tmp_path / f"{name}-out", plan)
        results.append((tmp_path / f"{name}-out" / "model.safetensors").read_bytes())
        assert not list((tmp_path / f"{name}-out").glob("*.index.json"))
    assert results[0] == results[1]


def test_pruning_a_pruned_folder_again(tmp_path):
    """Blocks, blocks again, weights: each from the folder of the one before, all with stock tools."""
    llama().save_pretrained(tmp_path / "0")
    steps = [("shortgpt", 0.2), ("shortgpt", 0.25), ("wanda", 0.5)]
    for number, (method, sparsity) in enumerate(steps):
        model = sc.load(tmp_path / str(number))
        plan = sc.plan(model, method, sparsity, data=TOKENS)
        sc.save(sc.apply_(model, plan), tmp_path / str(number + 1), plan)
        assert outputs(model, {"input_ids": TOKENS.inputs}).shape == (4, 12, 48)
        if number:  # the section of the step before is still the loaded model's own
            assert model.config.secateur["methods"] == [steps[number - 1][0]]
    last = sc.load(tmp_path / "3")
    assert last.config.num_hidden_layers == len(last.model.layers) == 3
    assert config_of(tmp_path / "3")["secateur"]["methods"] == ["wanda"]
    assert_same_bits(last, state(model))


# --- save refuses what does not reload --------------------------------------------------------------


def corrupt(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def flip_unused_row(tensors):
    """A token that the made-up inputs may not contain: equal logits, other weights."""
    tensors["model.embed_tokens.weight"][-1, 0] += 1
    tensors["model.embed_tokens.weight"][-2, 0] += 1


CORRUPTIONS = {
    "one weight": lambda tensors: tensors["model.layers.0.mlp.up_proj.weight"].view(-1)[3].add_(0.5),
    "rows of the embedding": flip_unused_row,
    "NaN": lambda tensors: tensors["lm_head.weight"].view(-1)[0].fill_(float("nan")),
    "a tensor lost": lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"),
    "another shape": lambda tensors: tensors.update({"lm_head.weight": torch.zeros(2, 2)}),
    "a dtype": lambda tensors: tensors.update({key: value.half() for key, value in tensors.items()}),
}


@pytest.fixture
def corrupted(monkeypatch, request):
    original = saving._save_transformers

    def wrong(model, folder, *rest):
        layout = original(model, folder, *rest)
        corrupt(folder, CORRUPTIONS[request.param])
        return layout

    monkeypatch.setattr(saving, "_save_transformers", wrong)


@pytest.mark.parametrize("corrupted", CORRUPTIONS, indirect=True)
def test_save_refuses_when_the_reloaded_model_differs_and_leaves_nothing(tmp_path, corrupted):
    model = llama()
    with pytest.raises(OutputError, match="reload"):
        sc.save(model, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("corrupted", ["one weight"], indirect=True)
def test_without_verification_it_is_saved_all_the_same(tmp_path, corrupted):
    sc.save(llama(), tmp_path / "out", verify=False)
    assert (tmp_path / "out" / "model.safetensors").exists()


@pytest.mark.parametrize("corrupted", ["one weight"], indirect=True)
def test_a_refused_replacement_leaves_the_old_folder(tmp_path, corrupted):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(OutputError):
        sc.save(llama(), tmp_path / "out", force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_a_config_that_cannot_describe_the_model_is_found_out(tmp_path):
    """T5's first block alone owns the position bias: without it no configuration fits what is left."""
    model = t5()
    plan = block_plan(model, "encoder.block", [0])
    with pytest.raises(OutputError, match=r"does not reload: it lacks the tensor .*relative_attention_bias"):
        sc.save(sc.apply_(model, plan), tmp_path / "out", plan)
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused_first_and_replaced_with_force(tmp_path):
    model = vit()
    sc.save(model, tmp_path / "out")
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    with pytest.raises(OutputError, match="--force"):
        sc.save(model, tmp_path / "out")
    assert before == {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    (tmp_path / "out" / "old.txt").write_text("of the old one")
    sc.save(model, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "old.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_save_leaves_the_model_alone(tmp_path):
    llama().save_pretrained(tmp_path / "dense")
    model = sc.load(tmp_path / "dense").train()
    before, config = state(model), model.config.to_dict()
    sc.save(model, tmp_path / "out")
    assert_same_bits(model, before)
    assert model.training
    assert model.config.to_dict() == config


def test_extend_runs_before_the_folder_appears_and_its_failure_removes_everything(tmp_path):
    seen = []

    def extend(folder):
        seen.append((folder / "config.json").exists() and not (tmp_path / "out").exists())
        raise ValueError("by design")

    with pytest.raises(ValueError, match="by design"):
        sc.save(llama(), tmp_path / "out", extend=extend)
    assert seen == [True]
    assert list(tmp_path.iterdir()) == []


def test_two_saves_are_byte_identical(tmp_path):
    for name in ("a", "b"):
        model = llama()
        plan = sc.plan(model, "wanda", 0.5, data=TOKENS)
        sc.save(sc.apply_(model, plan), tmp_path / name, plan)
    files = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    assert len(files) >= 6
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes(), file
    assert bits(torch.tensor([0.0])) != bits(torch.tensor([-0.0]))  # what the oracle of this file rests on
