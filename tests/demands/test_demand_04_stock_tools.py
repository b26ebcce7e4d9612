"""Demand 4: saved by one command, loaded by stock tools in a process that never sees this library."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import pytest
import torch
from cli_runs import good
from safetensors.torch import save_file

import secateur as sc
from secateur.core.plan import Plan

READ = """
import sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
text = AutoTokenizer.from_pretrained("masked")
ids = torch.tensor([text.encode("the cat sat on")])
expected = load_file("expected.safetensors")
for name in ("masked", "shorter"):
    model = AutoModelForCausalLM.from_pretrained(name)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, expected[name]), name
    made = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(made, expected[name + "-made"]), name
model = AutoModelForImageClassification.from_pretrained("images-result")
with torch.no_grad():
    assert torch.equal(model(expected["pixels"]).logits, expected["images-result"])
assert not [name for name in sys.modules if name.split(".")[0] == "secateur"]
print("equal")
"""


def test_three_results_in_a_fresh_process(place):
    lm = ["lm", "--data", "text.txt", "--sparsity", "0.5"]
    good("prune", *lm, "--method", "sparsegpt", "--out", "masked")
    good("prune", *lm, "--method", "shortgpt", "--out", "shorter")
    good(
        "prune", "zoo:digits-vit", "--method", "random", "--sparsity", "0.5", "--samples", "4", "--out", "images-result"
    )
    ids = torch.tensor([[ord(character) for character in "the cat sat on"]])
    expected = {}
    for name in ("masked", "shorter"):
        # not by loading the result: the dense model and the plan must give it
        model = sc.apply_(sc.load("lm"), Plan.load(f"{name}/secateur"))
        with torch.no_grad():
            expected[name] = model(ids).logits
        expected[name + "-made"] = model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
    opened = sc.open_model("zoo:digits-vit")
    model = sc.apply_(opened.model, Plan.load("images-result/secateur"))
    expected["pixels"] = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected["images-result"] = model(expected["pixels"]).logits
    save_file({name: value.contiguous() for name, value in expected.items()}, "expected.safetensors")
    done = subprocess.run(
        [sys.executable, "-I", "-c", READ], capture_output=True, text=True, timeout=120, check=False, cwd=place
    )
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.parametrize("suffix", [".pt", ".bin", ".pkl", ".pth"])
def test_no_pickles_are_written(place, suffix):
    good("prune", "lm", "--method", "random", "--sparsity", "0.5", "--out", "plain", "--force")
    assert not list((place / "plain").rglob(f"*{suffix}"))


# --- structured units -----------------------------------------------------------------------------

ALL = {"first": 0, "last": 4}
LLAMA, GROUPED, VIT = "zoo:pydoc-llama", "zoo:pydoc-llama-gqa", "zoo:digits-vit"


@dataclass(frozen=True)
class Cut:
    """One pruning and the layout that its folder must have; `model` may be the name of an earlier one."""

    model: str
    method: str = "llm_pruner"
    sparsity: float = 0.5
    layout: str = "plain"
    settings: dict[str, object] = field(default_factory=dict)
    steps: int = 1


CUTS = {
    "llama": Cut(LLAMA, settings=ALL),
    "llama-default": Cut(LLAMA),
    "llama-global": Cut(LLAMA, layout="uneven", settings=ALL | {"scope": "global"}),
    "llama-even": Cut(LLAMA, settings=ALL | {"scope": "global", "layout": "uniform"}),
    "llama-width": Cut(LLAMA, "channel_norm", settings={"kinds": "embedding"}),
    "llama-head-dim": Cut(LLAMA, "channel_norm", layout="uneven", settings={"kinds": "head_dim"}),
    "gqa": Cut(GROUPED, settings=ALL),
    "gqa-some": Cut(GROUPED, layout="uneven", settings={"first": 1, "last": 3}),
    "gqa-global": Cut(GROUPED, layout="uneven", settings=ALL | {"scope": "global"}),
    "gqa-even": Cut(GROUPED, sparsity=0.3, settings=ALL | {"scope": "global", "layout": "uniform"}),
    "gqa-head-dim": Cut(GROUPED, "channel_norm", layout="uneven", settings={"kinds": "head_dim"}),
    "vit": Cut(VIT, "channel_norm", layout="uneven"),
    "vit-neurons": Cut(VIT, "channel_norm", settings={"kinds": "neuron"}),
    "llama-twice": Cut("llama-global", sparsity=0.3, layout="uneven", settings=ALL | {"scope": "global"}, steps=2),
    "gqa-twice": Cut("gqa-global", sparsity=0.3, layout="uneven", settings=ALL | {"scope": "global"}, steps=2),
    "even-twice": Cut("llama-even", sparsity=0.3, settings=ALL, steps=2),
    "even-then-uneven": Cut("llama-even", layout="uneven", settings=ALL | {"scope": "global"}, steps=2),
    "wanda-after": Cut("llama-global", "wanda", layout="uneven"),
    "wanda-after-even": Cut("llama", "wanda"),
}
READ_CUTS = """
import json
import sys
import torch
import transformers
from safetensors.torch import load_file
expected, found = load_file("expected.safetensors"), []
for name, remote in json.loads(sys.argv[1]):
    auto = transformers.AutoModelForImageClassification if "vit" in name else transformers.AutoModelForCausalLM
    inputs = expected["pixels" if "vit" in name else "ids"]
    try:
        model = auto.from_pretrained(name, **({"trust_remote_code": True} if remote else {}))
        with torch.no_grad():
            found.append("equal" if torch.equal(model(inputs).logits, expected[name]) else "other logits")
    except Exception as error:
        found.append(type(error).__name__)
assert not [name for name in sys.modules if name.split(".")[0] == "secateur"]
print(json.dumps(found))
"""
INPUTS = {
    "ids": torch.randint(128, (2, 10), generator=torch.Generator().manual_seed(1)),
    "pixels": torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)),
}


def prune_and_save(cut, home, name):
    """The pruned model, after it was saved as a folder of that name."""
    opened = sc.open_model(cut.model if cut.model.startswith("zoo:") else str(home / cut.model))
    data = sc.open_data(opened.data, opened, samples=4)
    plan = sc.plan(opened.model, cut.method, cut.sparsity, data=data.calibration, **cut.settings)
    sc.apply_(opened.model, plan)
    sc.save(opened.model, home / name, plan, source=opened.folder, factory=opened.factory, data=opened.data)
    return opened.model


def result_logits(model, name):
    with torch.no_grad():
        return model(INPUTS["pixels" if "vit" in name else "ids"]).logits


def read_separately(home, asked):
    """(folder, whether its code may run) -> what `from_pretrained` makes of it in a process without the library."""
    done = subprocess.run(
        [sys.executable, "-I", "-c", READ_CUTS, json.dumps(asked)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        cwd=home,
        env={**os.environ, "HF_MODULES_CACHE": str(home / "modules")},
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(asked, json.loads(done.stdout.splitlines()[-1]), strict=True))


@pytest.fixture(scope="module")
def cuts(tmp_path_factory):
    """(folder, logits of the models in memory, what a fresh process found) for all of `CUTS`."""
    home = tmp_path_factory.mktemp("cuts")
    expected = {name: result_logits(prune_and_save(cut, home, name), name) for name, cut in CUTS.items()}
    save_file(expected | INPUTS, home / "expected.safetensors")
    uneven = {name for name in CUTS if layout_of(home, name) == "uneven"}
    return (
        home,
        expected,
        read_separately(home, [*((name, False) for name in CUTS), *((name, True) for name in uneven)]),
    )


def card_of(home, name):
    return json.loads((home / name / "secateur" / "result.json").read_text())


def layout_of(home, name):
    return card_of(home, name)["layout"]


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_model_is_loaded_by_stock_tools_with_equal_logits(cuts, name):
    """By `from_pretrained` alone where the layout is plain; else with the folder's own code, and refused without."""
    home, _, found = cuts
    uneven = layout_of(home, name) == "uneven"
    assert found[name, uneven] == "equal"
    assert (home / name / "modeling_cut.py").exists() == uneven
    if uneven:
        assert found[name, False] not in ("equal", "other logits")


@pytest.mark.parametrize("name", CUTS)
def test_the_library_loads_it_with_equal_logits_and_the_same_shapes(cuts, name):
    home, expected, _ = cuts
    loaded = sc.load(home / name)
    assert torch.equal(result_logits(loaded, name), expected[name])
    assert len(card_of(home, name)["steps"]) == CUTS[name].steps
    assert sum(p.numel() for p in loaded.parameters()) < sum(p.numel() for p in dense(name).parameters())


def dense(name):
    while not name.startswith("zoo:"):
        name = CUTS[name].model
    return sc.open_model(name).model


@pytest.mark.parametrize(
    "name",
    CUTS,
)
def test_the_layout_is_plain_wherever_a_config_can_say_it(cuts, name):
    assert layout_of(cuts[0], name) == CUTS[name].layout


@pytest.mark.parametrize("name", CUTS)
def test_who_takes_the_folder_is_said(cuts, name):
    card = card_of(cuts[0], name)
    told = card["runtimes"]
    assert {"transformers", "vLLM", "llama.cpp", "ONNX"} <= set(told)
    if card["layout"] == "plain":
        assert told["transformers"] == "plain from_pretrained"
        assert told["vLLM"] == "if it knows the architecture"
    else:
        assert told["transformers"] == "with trust_remote_code"
        assert all(told[one].startswith("no, the config cannot say") for one in ("vLLM", "llama.cpp"))
        assert "layout=uniform" in told["vLLM"]


def test_a_module_that_is_no_transformers_model_goes_round_twice(tmp_path):
    images = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    for model, name in (("zoo:digits-resnet", "once"), ("once", "twice")):
        made = prune_and_save(Cut(model, "channel_norm", 0.4), tmp_path, name)
        loaded = sc.load(tmp_path / name)
        with torch.no_grad():
            assert torch.equal(loaded(images), made(images))
        assert [p.shape for p in loaded.parameters()] == [p.shape for p in made.parameters()]
        assert "transformers" not in card_of(tmp_path, name)["runtimes"]
        assert "secateur.load" in card_of(tmp_path, name)["runtimes"]
    sizes = [sum(p.numel() for p in sc.load(tmp_path / name).parameters()) for name in ("once", "twice")]
    assert sizes[1] < 0.6 * sizes[0] < sizes[0]
    assert len(card_of(tmp_path, "twice")["steps"]) == 2


def test_blocks_can_go_after_an_uneven_cut(cuts):
    home, _, _ = cuts
    model = prune_and_save(Cut("llama-global", "shortgpt", 0.25), home, "shorter-after")
    assert torch.equal(result_logits(sc.load(home / "shorter-after"), "llama"), result_logits(model, "llama"))


def test_an_uneven_cut_can_go_after_blocks(tmp_path):
    prune_and_save(Cut(LLAMA, "shortgpt", 0.25), tmp_path, "shorter")
    settings = {"first": 0, "last": 3, "scope": "global"}
    model = prune_and_save(Cut("shorter", settings=settings), tmp_path, "both")
    assert layout_of(tmp_path, "both") == "uneven"
    assert torch.equal(result_logits(sc.load(tmp_path / "both"), "llama"), result_logits(model, "llama"))


def test_attention_that_is_chosen_at_run_time_does_not_hinder_saving(tmp_path):
    """Sums in another order are no other results."""
    opened = sc.open_model(GROUPED)
    opened.model.set_attn_implementation("eager")
    plan = sc.plan(opened.model, "channel_norm", 0.5)
    sc.apply_(opened.model, plan)
    sc.save(opened.model, tmp_path / "eager", plan, source=opened.folder)
