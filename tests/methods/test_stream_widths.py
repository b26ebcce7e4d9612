"""Width methods of language models on a folder that is streamed block by block: the same result as in memory."""

import pytest
import torch
from transformers import AutoModelForCausalLM
from width_models import TEXT, llama, logits

import secateur as sc
from secateur.streaming import prune_folder


@pytest.mark.parametrize(("method", "settings"), [("cfsp", {}), ("amp", {}), ("maw", {}), ("amp", {"order": "random"})])
def test_a_streamed_folder_ends_as_a_model_in_memory(method, settings, tmp_path):
    model = llama()
    model.save_pretrained(tmp_path / "dense")
    found = prune_folder(tmp_path / "dense", tmp_path / "out", method, 0.5, data=TEXT, **settings)
    plan = sc.plan(model, method, 0.5, data=TEXT, **settings)
    sc.apply_(model, plan)
    again = sc.load(found.folder) if method == "cfsp" else AutoModelForCausalLM.from_pretrained(found.folder).eval()
    assert torch.equal(logits(again), logits(model))
