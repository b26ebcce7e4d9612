"""`secateur evaluate`: abilities and the harness side by side; conversations and generated data on the command line."""

import json
import tempfile
from pathlib import Path

import pytest
import torch
from cli_runs import good, run

import secateur as sc
from secateur import zoo
from secateur.core.plan import Plan
from secateur.measure import perplexity
from secateur.shrink.folder import carry_companions

SKILLS = "zoo:skills-llama"


@pytest.fixture
def place(work, material):
    for name in ("lm", "text.txt"):
        (work / name).symlink_to(material / name)
    return work


def shorter(folder):
    """The zoo's model of skills without its fifth layer, whose outputs are zero."""
    model = zoo.load_model("skills-llama")
    with torch.no_grad():
        model.model.layers[4].self_attn.o_proj.weight.zero_()
        model.model.layers[4].mlp.down_proj.weight.zero_()
    model.save_pretrained(folder)
    carry_companions(zoo.folder("skills-llama"), Path(folder))


def test_abilities_side_by_side(work):
    shorter("short")
    found = good("evaluate", SKILLS, "short", "--limit", "20", "--data", "zoo:skills", "--json").json
    assert list(found["models"]) == [SKILLS, "short"]
    full, short = found["models"].values()
    assert list(full["tasks"]) == ["labels", "digits", "copying", "brackets", "arithmetic", "cloze"]
    for name, task in full["tasks"].items():
        assert task["samples"] == 20
        assert task["how"] == ("generation" if name in {"copying", "brackets", "arithmetic"} else "choice")
        assert name == "cloze" or task["value"] >= 0.9  # what it was trained on
        after = short["tasks"][name]["value"]
        assert short["retained"][name] == pytest.approx(after / task["value"])
    assert min(short["retained"].values()) < 0.9
    assert set(full["retained"].values()) == {1.0}
    assert full["degeneration"].keys() == {"rep_2", "rep_3", "rep_4", "self_bleu", "length", "texts"}
    for name, one in found["models"].items():
        opened = sc.open_model(name)
        text = sc.open_data("zoo:skills", opened).evaluation
        assert one["perplexity"]["value"] == pytest.approx(perplexity(opened.model, text).value)
    assert found["data"] == "zoo:skills"


def test_the_table_for_people(work):
    shorter("short")
    said = good("evaluate", SKILLS, "short", "--limit", "10", "--data", "zoo:skills").out
    for word in (
        "labels (choice)",
        "arithmetic (generation)",
        "cloze (choice)",
        "rep-4 (%)",
        "self-BLEU",
        "mean length",
    ):
        assert word in said
    assert "perplexity, zoo:skills" in said
    assert "10 questions of a kind, seed 0" in " ".join(said.split())
    assert "--shots" not in said


def test_worked_examples_and_seeds(place):
    asked = ["evaluate", SKILLS, "--limit", "6", "--json"]
    first, again = (good(*asked).json for _ in range(2))
    assert first == again
    assert good(*asked, "--seed", "1").json["models"] != first["models"]
    shown = good(*asked, "--shots", "1").json
    assert (first["shots"], shown["shots"]) == (0, 1)
    assert shown["models"] != first["models"]
    said = good("evaluate", "lm", "--limit", "2").out  # random weights
    assert "answers nothing right by generation: show it the notation with --shots 3" in said


def test_without_a_text_there_is_no_perplexity(place):
    assert good("evaluate", "lm", "--limit", "2", "--json").json["models"]["lm"]["perplexity"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["cli_runs:net"], "'cli_runs:net' has no tokenizer beside it"),
        (["lm", "--batch", "4"], "--include-path and --batch go with --tasks"),
        (["lm", "--include-path", "."], "--include-path and --batch go with --tasks"),
        (["lm", "--tasks", "secateur_labels", "--shots", "2"], "--shots is for the built-in tasks"),
        (["lm", "--data", "nothing.txt"], "nothing.txt"),
        (["nowhere"], "unknown model 'nowhere'"),
    ],
)
def test_what_cannot_be_evaluated(place, words, says):
    done = run("evaluate", *words)
    assert (done.code, done.out) == (2, "")
    assert says in done.err


# --- the harness ------------------------------------------------------------------------------------------


def test_the_harness_from_the_command_line(work, monkeypatch):
    pytest.importorskip("lm_eval")
    shorter("short")
    (work / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(work / "temporary"))
    asked = ["evaluate", SKILLS, "short", "--tasks", "secateur_labels,secateur_copying", "--limit", "8"]
    found = good(*asked, "--data", "zoo:skills", "--json").json
    own = good("evaluate", SKILLS, "short", "--limit", "8", "--json").json
    for place, (name, one) in enumerate(found["models"].items()):
        labels, copying = one["scores"]
        assert (labels["task"], labels["metric"], labels["samples"]) == ("secateur_labels", "acc", 8)
        assert labels["value"] == pytest.approx(own["models"][name]["tasks"]["labels"]["value"])
        assert copying["value"] == pytest.approx(own["models"][name]["tasks"]["copying"]["value"])
        retained = own["models"][name]["retained"]["copying"]
        assert found["changes"]["secateur_copying exact_match"][place] == pytest.approx(retained - 1)
    assert found["perplexity"]["short"] > found["perplexity"][SKILLS]
    assert found["groups"].keys() == {"secateur_labels acc", "secateur_copying exact_match"}
    assert not list((work / "temporary").iterdir())
    said = good(*asked, "--data", "zoo:skills").out
    for word in ("secateur_labels", "exact_match", "± ", "perplexity, zoo:skills"):
        assert word in said


# --- calibration on conversations and on what the model writes ------------------------------------------------


def wanda(*more):
    return ["prune", "lm", "--method", "wanda", "--sparsity", "0.5", *more]


def test_calibration_on_what_the_model_writes(place):
    spec = "text.txt?generated=5"
    good(*wanda("--data", spec, "--samples", "6", "--out", "own"))
    good(*wanda("--data", "text.txt", "--samples", "6", "--out", "text"))
    own, text = (Plan.load(f"{name}/secateur").provenance[0].data for name in ("own", "text"))
    assert own["name"] == "text.txt, gone on with by the model after 5 tokens"
    assert own["digest"] != text["digest"]
    record, other = (json.loads(Path(f"{name}/secateur/report.json").read_text()) for name in ("own", "text"))
    assert record["quality"]["before"] == other["quality"]["before"]  # measured on the same text
    assert json.loads(Path("own/secateur/result.json").read_text())["data"] == "text.txt"
    again = good(*wanda("--data", spec, "--samples", "6", "--dry-run", "--json")).json["provenance"][0]["data"]
    assert again == own


def test_the_model_cannot_write_while_it_is_streamed(place):
    done = run(*wanda("--data", "text.txt?generated=5", "--out", "out", "--stream"))
    assert (done.code, done.out) == (2, "")
    assert "its weights must be in memory; leave it out, or do without --stream" in done.err
    assert not (place / "out").exists()


def test_recovery_trains_on_the_text_itself(place, monkeypatch):
    from secateur.lab import prune as job

    opened = []
    monkeypatch.setattr(job, "open_data", lambda spec, *rest: opened.append(spec) or sc.open_data(spec, *rest))
    good(*wanda("--data", "text.txt?generated=5", "--samples", "4", "--out", "out", "--recover", "finetune:steps=2"))
    assert opened == ["text.txt?generated=5", "text.txt"]


def test_generated_data_are_for_calibration(place):
    train = ["train", "lm", "--method", "granet", "--sparsity", "0.5", "--steps", "4", "--out", "out"]
    done = run(*train, "--data", "text.txt?generated=5")
    assert done.code == 2
    assert "is for calibration; train on the text itself" in done.err


def test_calibration_on_conversations(place):
    config = Path("chat") / "tokenizer_config.json"
    sc.save(sc.load("lm"), "chat", source=Path("lm"), verify=False)
    template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"chat_template": template}))
    rows = [{"question": f"what is {i}?" * 3, "answer": f"it is {i}." * 3} for i in range(60)]
    Path("chat.jsonl").write_text("\n".join(map(json.dumps, rows)))
    opened = sc.open_model("chat")
    data = sc.open_data("chat.jsonl", opened)
    whole = "\n\n".join(f"u:{row['question']};a:{row['answer']};" for row in rows)
    for row in (*data.calibration.inputs.tolist(), *data.evaluation.inputs.tolist()):
        assert "".join(map(chr, row)) in whole
    found = good(
        "prune", "chat", "--method", "wanda", "--sparsity", "0.5", "--data", "chat.jsonl", "--dry-run", "--json"
    )
    assert found.json["provenance"][0]["data"]["name"].startswith("chat.jsonl")
    Path("chat.jsonl").write_text('{"question": "a"}\n')
    done = run("prune", "chat", "--method", "wanda", "--sparsity", "0.5", "--data", "chat.jsonl", "--out", "out")
    assert done.code == 2
    assert "'chat.jsonl' line 1 has no text in 'text', nor a conversation in 'messages'" in done.err
