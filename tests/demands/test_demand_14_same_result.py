"""Demand 14: same seed, same bytes; and a result says what made it."""

import json
import platform

import pytest
import torch
import transformers
from cli_runs import HURRIED, files, good, separately

import secateur as sc
from secateur.core.plan import Plan

RUNS = {
    "wanda": ["lm", "--method", "wanda", "--sparsity", "0.5", "--data", "text.txt"],
    "sparsegpt": ["lm", "--method", "sparsegpt", "--sparsity", "0.5", "--data", "text.txt"],
    "shortgpt": ["lm", "--method", "shortgpt", "--sparsity", "0.5", "--data", "text.txt"],
    "taylor": ["cli_runs:net", "--method", "taylor", "--sparsity", "0.5", "--data", "images", "--samples", "6"],
    "recovered": [
        *("cli_runs:net", "--method", "random", "--sparsity", "0.5", "--data", "images"),
        *("--recover", "finetune:steps=5,batch=8"),
    ],
}
MEASURED = ("latency", "machine")  # stopwatch figures: the only thing that may differ


def written(folder) -> dict[str, bytes]:
    """All files of a result; of the report without what a stopwatch says."""
    found = files(folder)
    record = json.loads(found.pop("secateur/report.json"))
    assert all(record.pop(name) for name in MEASURED)
    del found["report.html"]  # made from the record
    return found | {"record": json.dumps(record).encode()}


def run(place, name, folder, seed="3"):
    """The job of that name in a folder of its own, so that the command line is the same."""
    home = place / folder
    home.mkdir(exist_ok=True)
    for link in ("lm", "text.txt", "images"):
        if not (home / link).exists():
            (home / link).symlink_to(place / link)
    return home, ["prune", *RUNS[name], "--seed", seed, "--out", "result"]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "wanda"])  # that one is compared across processes
def test_two_runs_are_byte_identical_and_another_seed_is_not(place, monkeypatch, name):
    results: list[dict[str, bytes]] = []
    for folder, seed in ((f"{name}-1", "3"), (f"{name}-2", "3"), (f"{name}-3", "4")):
        home, words = run(place, name, folder, seed)
        monkeypatch.chdir(home)
        torch.manual_seed(len(results))  # the global generators must not matter
        torch.rand(len(results) + 1)
        good(*words)
        results.append(written(home / "result"))
    assert results[0].keys() == results[1].keys()
    for file, content in results[0].items():
        assert results[1][file] == content, file
    assert results[2]["record"] != results[0]["record"]
    if name != "shortgpt":  # few blocks: another seed may well choose the same
        assert results[2]["secateur/plan.safetensors"] != results[0]["secateur/plan.safetensors"]


def test_another_process_gives_the_same_bytes(place, monkeypatch):
    """Another hash seed and another address space."""
    for folder in ("here", "there"):
        home, words = run(place, "wanda", folder)
        if folder == "here":
            monkeypatch.chdir(home)
            good(*words)
        else:
            done = separately(*words, cwd=home, before=HURRIED, env={"PYTHONHASHSEED": "12345"})
            assert done.code == 0, done.err
    assert written(place / "here" / "result") == written(place / "there" / "result")


def test_a_result_says_what_made_it(place, monkeypatch):
    home, words = run(place, "wanda", "said")
    monkeypatch.chdir(home)
    good(*words)
    record = json.loads((home / "result" / "secateur" / "report.json").read_text())
    plan = Plan.load(home / "result" / "secateur")
    made = record["reproduce"]
    assert made["seed"] == 3
    assert made["settings"] == sc.methods()["wanda"].configure({}).model_dump(mode="json")  # defaults written out
    assert {"compare", "sequencing", "variant"} <= made["settings"].keys()
    assert made["versions"]["torch"] == torch.__version__
    assert made["versions"]["transformers"] == transformers.__version__
    assert made["versions"]["python"] == platform.python_version()
    assert made["versions"]["secateur"] == sc.__version__
    opened = sc.open_model("lm")
    data = sc.open_data("text.txt", opened, seed=3, samples=128).calibration
    assert record["calibration"] == {
        "name": data.name,
        "digest": plan.provenance[0].data["digest"],
        "samples": len(data),
    }
    from secateur.core.fingerprint import data_digest

    assert plan.provenance[0].data["digest"] == data_digest([batch.args[0] for batch in data.batches(8)])
    # every layer's decision, in the record and bit by bit in the plan
    linear = {
        f"{n}.weight" for n, m in opened.model.named_modules() if isinstance(m, torch.nn.Linear) and "layers" in n
    }
    assert {row["site"] for row in record["layers"]} == linear == set(plan.masks)
    for row in record["layers"]:
        assert row["kept"] == int(plan.masks[row["site"]].sum())
        assert row["units"] == plan.masks[row["site"]].numel()
    # the model planned on, by the bytes of each parameter
    assert set(plan.planned_on) == {name for name, _ in opened.model.named_parameters()}


def test_other_data_and_other_weights_show_in_the_record(place, monkeypatch):
    home, words = run(place, "wanda", "others")
    monkeypatch.chdir(home)
    good(*words)
    first = json.loads((home / "result" / "secateur" / "report.json").read_text())
    (home / "other.txt").write_text((home / "text.txt").read_text()[::-1])
    words[words.index("text.txt")] = "other.txt"
    good(*words, "--force")
    second = json.loads((home / "result" / "secateur" / "report.json").read_text())
    assert second["calibration"]["digest"] != first["calibration"]["digest"]
    assert second["model"]["fingerprint"] == first["model"]["fingerprint"]
    good("prune", "result", *words[2:], "--force")
    third = json.loads((home / "result" / "secateur" / "report.json").read_text())
    assert third["model"]["fingerprint"] != first["model"]["fingerprint"]
