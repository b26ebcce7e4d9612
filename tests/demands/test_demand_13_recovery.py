"""Demand 13: recovery in one call, the report says how much came back and what to try; singular Hessians are told."""

import json
import re

import pytest
import torch
from cli_runs import good

import secateur as sc
from secateur.core.plan import Plan

DIGITS = ["prune", "zoo:digits-resnet", "--method", "global-magnitude", "--sparsity", "0.93", "--seed", "1"]


def words_of(page: str) -> str:
    return " ".join(re.sub(r"<[^>]+>", " ", re.sub(r"(?s)<(style|script).*?</\1>", " ", page)).split())


@pytest.fixture(scope="module")
def recovered(runs):
    """One call each, on a network that lost most of its accuracy."""
    with pytest.MonkeyPatch.context() as patch:
        from cli_runs import hurry

        patch.chdir(runs)
        hurry(patch)
        for name, word in (
            ("none", None),
            ("tuned", "finetune:steps=40,optimizer=sgd,lr=0.05"),
            ("norms", "batchnorm"),
        ):
            good(*DIGITS, *(["--recover", word] if word else []), "--out", name)
    return runs


def record(folder, name):
    return json.loads((folder / name / "secateur" / "report.json").read_text())


@pytest.mark.parametrize("name", ["tuned", "norms"])
def test_one_call_brings_accuracy_back_and_the_record_has_all_three_figures(recovered, name):
    found = record(recovered, name)["quality"]
    before, pruned, after = (found[key]["value"] for key in ("before", "pruned", "recovered"))
    assert pruned == record(recovered, "none")["quality"]["pruned"]["value"]  # the same pruned model
    assert pruned < after <= before + 1
    assert record(recovered, "none")["quality"]["recovered"] is None
    assert record(recovered, "none")["recovery"] is None
    described = record(recovered, name)["recovery"]
    assert described["name"] in ("finetune", "batchnorm")
    assert described["text"]


@pytest.mark.parametrize("name", ["tuned", "norms"])
def test_the_report_says_how_much_came_back(recovered, name):
    found = record(recovered, name)["quality"]
    before, pruned, after = (found[key]["value"] for key in ("before", "pruned", "recovered"))
    share = round(100 * (after - pruned) / (before - pruned))
    page = words_of((recovered / name / "report.html").read_text())
    assert "came back" in page or "won back" in page
    assert any(f"{near}" in page for near in (share - 1, share, share + 1))


def test_the_report_says_what_to_try_next(recovered):
    page = words_of((recovered / "none" / "report.html").read_text())
    assert "nothing was retrained: add a recovery step (--recover)" in page


def test_settings_of_the_recovery_are_in_the_record_and_the_command(recovered):
    found = record(recovered, "tuned")
    assert found["recovery"]["settings"]["steps"] == 40
    assert found["recovery"]["settings"]["warmup"] == 0.05  # defaults are written out too
    assert "--recover finetune:steps=40,optimizer=sgd,lr=0.05" in found["reproduce"]["command"]


def test_recovery_keeps_the_masks_and_trains_the_rest(recovered):
    plan = Plan.load(recovered / "tuned" / "secateur")
    before, after = sc.load(recovered / "none").state_dict(), sc.load(recovered / "tuned").state_dict()
    for name, mask in plan.masks.items():
        assert not after[name][~mask].any()
        assert not torch.equal(after[name][mask], before[name][mask])


def test_batch_norm_recovery_changes_nothing_but_the_statistics(recovered):
    before, after = sc.load(recovered / "none").state_dict(), sc.load(recovered / "norms").state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert {name.rpartition(".")[2] for name in changed} <= {"running_mean", "running_var", "num_batches_tracked"}


def test_singular_hessians_are_damped_and_reported(place):
    """Fewer tokens than features: no Hessian of the layer has full rank."""
    words = ["prune", "lm", "--method", "sparsegpt", "--sparsity", "0.5", "--samples", "1", "--out", "singular"]
    done = good(*words, "--data", "text.txt?length=6", "--set", "percdamp=1e-30")
    found = record(place, "singular")
    told = [sentence for sentence in found["warnings"] if "singular" in sentence]
    layers = {row["site"]: row["facts"]["damping"] for row in found["layers"]}
    raised = {site for site, damping in layers.items() if damping > 1e-30}
    assert raised
    assert len(told) == len(raised)
    assert all(any(site in sentence for sentence in told) for site in raised)
    assert "singular" in done.err
    assert "singular" in words_of((place / "singular" / "report.html").read_text())
    good(*words, "--data", "text.txt", "--force")  # the default damping is enough: nothing to tell
    usual = record(place, "singular")
    assert not [sentence for sentence in usual["warnings"] if "singular" in sentence]
    assert {row["facts"]["damping"] for row in usual["layers"]} == {0.01}
