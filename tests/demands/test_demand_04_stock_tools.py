"""Demand 4: saved by one command, loaded by stock tools in a process that never sees this library."""

import subprocess
import sys

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
