"""Demand 15: one command for every method, short logs, a machine-readable report, five lines of Python."""

import json

import pytest
from cli_runs import good

import secateur as sc
from secateur.core.method import Group, Protocol
from secateur.report.record import Record

FIVE_LINES = """
import secateur as sc
opened = sc.open_model("lm")
data = sc.open_data("text.txt", opened)
plan = sc.plan(opened.model, "wanda", 0.5, data=data.calibration)
sc.save(sc.apply_(opened.model, plan), "from-python", plan, source=opened.folder)
"""
THREE_LINES = """
import secateur as sc
job = sc.Job("lm", "wanda", sparsity=0.5, data="text.txt")
record = sc.prune(job, "whole-job")
"""


BY_PROTOCOL = {
    protocol: [n for n, m in sorted(sc.methods().items()) if protocol in m.protocols] for protocol in Protocol
}
# during training; they need convolutions, in residual blocks or with batch norms
CONVOLUTIONAL = ("consensus", "lapp", "network_slimming", "trp")
# runs of the model tried, and a search's candidates
FEW = {
    "rd": ["resolution=3"],
    "adapt_pruner": ["iterations=2"],
    "tyr": ["iterations=1", "generations=2", "offspring=4"],
}
GRAPHS = {"metapruning"}  # convolutional too, and with a network of its own that a study makes


@pytest.mark.parametrize("method", sorted({*BY_PROTOCOL[Protocol.PLAN]} - {"eep", "network_slimming"} - GRAPHS))
def test_one_command_for_every_method(place, method):
    words = ["prune", "lm", "--method", method, "--sparsity", "0.5", "--minimum", "1", "--data", "text.txt"]
    words += [word for setting in FEW.get(method, []) for word in ("--set", setting)]
    check_result(place / f"one-{method}", method, good(*words, "--out", f"one-{method}"))


@pytest.mark.parametrize("method", sorted({*BY_PROTOCOL[Protocol.SPARSIFIER]} - {*CONVOLUTIONAL} - GRAPHS))
def test_one_command_for_every_method_that_trains(place, method):
    words = ["train", "lm", "--method", method, "--sparsity", "0.5", "--minimum", "1", "--data", "text.txt"]
    words += ["--steps", "12", "--evaluate-every", "4", "--recipe", "lr=0.01", "--recipe", "batch=4"]
    words += ["--set", "every=2"] if "every" in sc.methods()[method].settings.model_fields else []
    check_result(place / f"trained-{method}", method, good(*words, "--out", f"trained-{method}"))


def test_one_command_for_experts(place):
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64,
    )  # fmt: skip
    MixtralForCausalLM(config).save_pretrained(place / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (place / "moe" / name).write_bytes((place / "lm" / name).read_bytes())
    words = ["prune", "moe", "--method", "eep", "--sparsity", "0.5", "--data", "text.txt", "--samples", "8"]
    words += [word for pair in ("initial=4", "discrete=8", "total=12", "router=fold") for word in ("--set", pair)]
    check_result(place / "one-eep", "eep", good(*words, "--out", "one-eep"))


@pytest.mark.parametrize("method", CONVOLUTIONAL)
def test_one_command_for_a_method_that_needs_convolutions(place, method):
    words = ["train", "zoo:digits-resnet", "--method", method, "--sparsity", "0.4", "--steps", "6"]
    done = good(*words, "--recipe", "batch=32", "--evaluate-every", "3", "--out", f"trained-{method}")
    assert "saved in" in done.out
    assert "accuracy" in done.out


AROUND = {
    "adapt_pruner": {"stages": 2, "iterations": 2},
    "ap": {"p": 0.5, "q": 0.1},
    "journey": {"every": 1, "against": ""},
    "layer_lottery": {"strict": False, "repeats": 1},
    "lottery": {"rate": 0.5},
    "oracle": {"candidates": 2, "repeats": 1},
    "pagcp": {"rounds": 1},
    "plasticity": {"moments": 4},
    "rewinding": {"rate": 0.5},
    "sap": {"rounds": 1},
}


MODELS = dict.fromkeys(("oracle", "layer_lottery"), "zoo:digits-resnet") | {"adapt_pruner": "lm"}


@pytest.mark.parametrize("method", sorted({*BY_PROTOCOL[Protocol.PROCEDURE]} - GRAPHS))
def test_one_command_for_every_method_around_trainings(place, method):
    model = MODELS.get(method, "zoo:digits-mlp")  # an MLP has no channels and no blocks
    words = ["study", model, "--method", method, "--sparsity", "0.5", "--minimum", "1", "--steps", "16"]
    words += [word for name, value in AROUND[method].items() for word in ("--set", f"{name}={value}")]
    words += ["--pretrained"] if method == "oracle" else []
    words += ["--data", "text.txt"] if model == "lm" else []
    done = good(*words, "--out", f"around-{method}")
    assert f"{model} under {method}" in done.out
    assert (place / f"around-{method}" / "secateur" / "findings.json").exists()


def test_one_command_to_train_a_metanetwork_and_one_to_prune_with_it(place):
    words = ["zoo:digits-resnet", "--method", "metapruning", "--sparsity", "0.4"]
    words += [word for pair in ("metanetwork=net", "parts=4") for word in ("--set", pair)]
    small = [word for pair in ("models=2", "epochs=1", "layers=1", "width=4") for word in ("--set", pair)]
    done = good("study", *words, *small, "--minimum", "1", "--steps", "8", "--out", "meta-trained")
    assert "zoo:digits-resnet under metapruning" in done.out
    assert "saved in" in good("prune", *words, "--out", "meta-pruned").out
    assert Record.load(place / "meta-pruned" / "secateur" / "report.json").method.name == "metapruning"


def check_result(out, method, done):
    assert "saved in" in done.out
    assert "perplexity" in done.out
    assert len(done.out.splitlines()) < 20  # a result, not a log
    assert all(line.startswith("warning: ") for line in done.err.splitlines() if not line.endswith(" s"))
    record = Record.load(out / "secateur" / "report.json")
    assert record.method.name == method
    if sc.methods()[method].exact not in (Group.COST, Group.AIM):  # of parameters then, or not exactly
        assert record.budget.sparsity == pytest.approx(0.5)
    json.loads((out / "secateur" / "report.json").read_text())
    assert (out / "report.html").exists()


def test_python_needs_five_lines(place):
    assert len(FIVE_LINES.strip().splitlines()) <= 5
    exec(FIVE_LINES, {})
    good("prune", "lm", "--method", "wanda", "--sparsity", "0.5", "--data", "text.txt", "--out", "from-command")
    found = [(place / name / "model.safetensors").read_bytes() for name in ("from-python", "from-command")]
    assert found[0] == found[1]
    assert found[0] != (place / "lm" / "model.safetensors").read_bytes()


def test_the_whole_job_in_three(place):
    names = {}
    exec(THREE_LINES, names)
    assert names["record"] == Record.load(place / "whole-job" / "secateur" / "report.json")
    assert len(names["record"].reproduce.python.splitlines()) <= 5


def test_progress_reports_every_stage_to_whoever_listens(place):
    """Stages are balanced, know their number of steps, and reach it: that is what time left is made of."""

    class Listener:
        def __init__(self):
            self.open, self.done = [], []

        def start(self, stage, total):
            self.open.append([stage, total, 0])

        def advance(self, steps=1):
            self.open[-1][2] += steps

        def finish(self):
            self.done.append(tuple(self.open.pop()))

    heard = Listener()
    asked = sc.Job("lm", "wanda", sparsity=0.5, data="text.txt", recover="finetune:steps=7")
    sc.prune(asked, "heard", heard)
    assert heard.open == []
    stages = {stage: (total, steps) for stage, total, steps in heard.done}
    assert {"blocks", "fine-tuning", "perplexity", "latency"} <= stages.keys()
    assert stages["fine-tuning"] == (7, 7)
    assert stages["blocks"] == (4, 4)
    assert all(total == steps for stage, (total, steps) in stages.items() if total is not None and stage != "latency")


def test_the_library_itself_prints_nothing(place, capfd):
    sc.prune(sc.Job("lm", "sparsegpt", sparsity=0.5, data="text.txt"), "silent")
    assert capfd.readouterr() == ("", "")
