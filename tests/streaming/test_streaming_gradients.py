"""Gradients of a folder that is streamed: as from the whole model, with kills on the way to the loss and back."""

import pytest
import streaming_tools as tools
import torch

import secateur as sc
from secateur.stats.backward import GradientSums
from secateur.streaming import prune_folder


@pytest.mark.parametrize("family", ["llama-tied", "gemma2", "gpt2", "opt", "phi3-fused", "mixtral"])
def test_masks_are_those_of_the_whole_model(tmp_path, family):
    model, data = tools.build(family, tmp_path / "dense"), tools.tokens(6)
    done = prune_folder(tmp_path / "dense", tmp_path / "out", "gblm", 0.5, data=data)
    plan = sc.plan(model, "gblm", 0.5, data=data, include=[*done.plan.sites])
    assert done.plan.masks.keys() == plan.masks.keys()
    assert all(torch.equal(done.plan.masks[name], mask) for name, mask in plan.masks.items())
    assert done.plan.facts == plan.facts


class Killed(BaseException):
    pass


@pytest.mark.parametrize("spill", [False, True])
def test_a_killed_run_ends_with_the_same_bytes(tmp_path, monkeypatch, spill):
    tools.build("llama", tmp_path / "dense")
    data = tools.tokens(6)
    prune_folder(tmp_path / "dense", tmp_path / "straight", "gblm", 0.5, data=data, spill=spill)
    real, updates = GradientSums.update, []

    def update(self, gradient):
        updates.append(1)
        if len(updates) in (50, 100):  # 7 layers, 6 samples: in the second block; when it goes on, in the third
            raise Killed
        real(self, gradient)

    monkeypatch.setattr(GradientSums, "update", update)
    for _ in range(2):
        with pytest.raises(Killed):
            prune_folder(tmp_path / "dense", tmp_path / "out", "gblm", 0.5, data=data, spill=spill)
    prune_folder(tmp_path / "dense", tmp_path / "out", "gblm", 0.5, data=data, spill=spill)
    assert len(updates) == 42 + 8 + 42 + 8 + 42  # finished blocks were not done again
    assert tools.digests(tmp_path / "out") == tools.digests(tmp_path / "straight")
    assert not list(tmp_path.glob(".*"))
