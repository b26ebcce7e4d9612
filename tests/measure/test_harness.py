"""The evaluation harness: tasks as files against our own way of asking, uneven folders, no network, a stub of it."""

import copy
import math
import random
import socket
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from transformers import AutoTokenizer

from secateur import api, zoo
from secateur.core.errors import DataError, MissingExtraError, ModelError, OutputError, SettingsError, UnknownNameError
from secateur.data.skills import Question
from secateur.measure import harness as room
from secateur.measure import tasks
from secateur.measure.harness import HarnessResult, Score, changes, harness, harness_report, read_results
from secateur.measure.task_files import write_task
from secateur.measure.task_report import Kind
from secateur.measure.tasks import How, LanguageTask, run_task
from secateur.shrink.apply import apply_
from secateur.shrink.load import layout_of_folder, load
from secateur.shrink.save import save
from secateur.zoo.text import corpus

SKILLS = zoo.folder("skills-llama")
TASKS = [tasks.labels(20), tasks.brackets(20), tasks.arithmetic(12), tasks.cloze(corpus(), 20)]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(SKILLS, local_files_only=True)


@pytest.fixture(scope="module")
def uneven(tmp_path_factory):
    """A damaged model in a folder with widths that its config cannot say."""
    folder, model = tmp_path_factory.mktemp("uneven") / "model", zoo.load_model("skills-llama")
    plan = api.plan(model, "group_random", sparsity=0.5, seed=1, exclude=("*layers.0*", "*layers.1*"), kinds="neuron")
    apply_(model, plan)
    save(model, folder, plan, source=SKILLS)
    assert layout_of_folder(folder) == "uneven"
    return folder


# --- with the library ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def library():
    return pytest.importorskip("lm_eval")


def test_the_harness_asks_what_we_ask(library, uneven, tokenizer, tmp_path):
    names = [write_task(task, tmp_path) for task in TASKS]
    found = harness(uneven, names, include_path=tmp_path)
    model = load(uneven)
    mine = {task.name: run_task(model, tokenizer, task) for task in TASKS}
    for name, task in zip(names, TASKS, strict=True):
        metric = "acc" if task.how is How.CHOICE else "exact_match"
        score = found.score(f"{name} {metric}")
        assert score.value == pytest.approx(mine[task.name].accuracy)
        assert score.samples == len(task.questions)
        assert score.higher_is_better
        assert score.error is not None
    assert any(0.1 < result.accuracy < 0.95 for result in mine.values())  # or all agree whatever is asked
    assert found.parts == ()
    handed = harness(model, names[:1], tokenizer=tokenizer, include_path=[tmp_path], limit=7, batch_size=3)
    assert [score.samples for score in handed.scores] == [7]
    first = LanguageTask("labels", How.CHOICE, TASKS[0].questions[:7])
    assert handed.scores[0].value == pytest.approx(run_task(model, tokenizer, first).accuracy)


def test_nothing_of_the_caller_s_is_changed(library, tokenizer, tmp_path):
    model = zoo.load_model("skills-llama").train()
    name = write_task(TASKS[0], tmp_path)
    assert tokenizer.pad_token is None
    states = random.getstate(), torch.get_rng_state()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    harness(model, [name], tokenizer=tokenizer, include_path=tmp_path, limit=2)
    assert model.training
    assert tokenizer.pad_token is None
    assert random.getstate() == states[0]
    assert torch.equal(torch.get_rng_state(), states[1])
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_the_user_s_tasks_touch_no_network(library, tokenizer, tmp_path, monkeypatch):
    import datasets
    from huggingface_hub import constants

    touched = []

    def refuse(*args, **kwargs):
        touched.append(args)
        raise OSError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    for place in (datasets.config, constants):  # tests run with both switched off by the environment
        monkeypatch.setattr(place, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    model = zoo.load_model("skills-llama")
    name = write_task(TASKS[0], tmp_path)
    harness(model, [name], tokenizer=tokenizer, include_path=tmp_path, limit=1)
    task = yaml.safe_load((tmp_path / f"{name}.yaml").read_text())
    (tmp_path / "far.yaml").write_text(
        yaml.safe_dump({**task, "task": "far", "dataset_path": "no/such"} | {"dataset_kwargs": {}})
    )
    with pytest.raises(
        DataError, match=r"the data of far cannot be had: .*; tasks from include_path run without network"
    ):
        harness(model, ["far"], tokenizer=tokenizer, include_path=tmp_path, limit=1)
    assert touched == []
    assert not constants.HF_HUB_OFFLINE
    assert not datasets.config.HF_HUB_OFFLINE
    assert "HF_HUB_OFFLINE" not in room.os.environ


# --- task files ---------------------------------------------------------------------------------------


def test_task_files_hold_everything_that_is_asked(tmp_path):
    task = LanguageTask("t", How.CHOICE, (Question("b>", " y", (" x", " y")),), (Question("a>", " x", (" x", " y")),))
    assert write_task(task, tmp_path / "new" / "folder") == "secateur_t"
    document = yaml.safe_load((tmp_path / "new" / "folder" / "secateur_t.yaml").read_text())
    questions = Path(document["dataset_kwargs"]["data_files"]["test"])
    assert questions.is_absolute()
    assert questions.read_text() == ('{"prompt": "a> x\\nb>", "answer": " y", "options": [" x", " y"], "gold": 1}\n')
    assert (document["output_type"], document["doc_to_choice"], document["target_delimiter"]) == (
        "multiple_choice",
        "options",
        "",
    )
    write_task(TASKS[1], tmp_path)
    document = yaml.safe_load((tmp_path / "secateur_brackets.yaml").read_text())
    assert document["generation_kwargs"] == {"until": ["\n"], "max_gen_toks": 16, "do_sample": False}
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write the task 'secateur_t'"):
        write_task(task, tmp_path / "file")


# --- with a stub of the library's public interface ---------------------------------------------------------


@pytest.fixture
def stub(monkeypatch):
    """Modules that stand for the library, and what they were called with."""
    calls = SimpleNamespace(evaluate=[], models=[], managers=[])

    def simple_evaluate(**asked):
        calls.evaluate.append(asked)
        random.random()
        return {
            "results": {name: {"alias": name, "acc,none": 0.5, "acc_stderr,none": 0.1} for name in asked["tasks"]},
            "higher_is_better": {},
            "n-samples": {},
        }

    class Manager:
        def __init__(self, include_path=None, include_defaults=True):
            calls.managers.append((include_path, include_defaults))
            self.all_tasks = ["mine"] * bool(include_path) + ["hellaswag", "arc_easy"] * include_defaults

    def model(**asked):
        calls.models.append(asked)
        return asked

    for name in ("lm_eval", "lm_eval.models", "lm_eval.models.huggingface", "lm_eval.tasks"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["lm_eval"].simple_evaluate = simple_evaluate
    sys.modules["lm_eval.models.huggingface"].HFLM = model
    sys.modules["lm_eval.tasks"].TaskManager = Manager
    return calls


def test_what_the_library_is_asked(stub, tokenizer, tmp_path):
    model = zoo.load_model("pydoc-llama")
    state = random.getstate()
    found = harness(model, ["mine"], tokenizer=tokenizer, include_path=tmp_path, limit=3, batch_size=5, seed=7)
    assert [score.value for score in found.scores] == [0.5]
    (asked,) = stub.evaluate
    assert (asked["tasks"], asked["limit"], asked["batch_size"]) == (["mine"], 3, 5)
    assert {asked[f"{kind}_seed"] for kind in ("random", "numpy_random", "torch_random", "fewshot_random")} == {7}
    (wrapped,) = stub.models
    assert wrapped["pretrained"] is model
    assert wrapped["tokenizer"] is not tokenizer
    assert wrapped["tokenizer"].pad_token_id == tokenizer.eos_token_id
    assert stub.managers == [([str(tmp_path)], False)]
    assert random.getstate() == state


def test_a_model_without_an_end_token_is_padded_with_a_token_that_it_knows(stub):
    folder = zoo.folder("pydoc-llama")
    harness(folder, ["hellaswag"])
    padded = stub.models[0]["tokenizer"]
    assert padded.eos_token is None
    assert padded.pad_token_id == 0
    assert len(padded) == len(AutoTokenizer.from_pretrained(folder))


def test_only_tasks_of_the_harness_s_own_may_use_the_network(stub, tokenizer, tmp_path, monkeypatch):
    model, seen = zoo.load_model("pydoc-llama"), []
    monkeypatch.setattr(room, "_no_network", lambda wanted: seen.append(wanted) or room.contextlib.nullcontext())
    harness(model, ["mine"], tokenizer=tokenizer, include_path=tmp_path)
    harness(model, ["mine", "hellaswag"], tokenizer=tokenizer, include_path=tmp_path)
    harness(model, ["arc_easy"], tokenizer=tokenizer)
    assert seen == [True, False, False]
    assert stub.managers[1:3] == [([str(tmp_path)], False), ([str(tmp_path)], True)]


def test_what_cannot_be_evaluated(stub, tokenizer, tmp_path, monkeypatch):
    model = zoo.load_model("pydoc-llama")
    with pytest.raises(UnknownNameError, match="unknown task 'helaswag'; did you mean hellaswag"):
        harness(model, ["helaswag"], tokenizer=tokenizer)
    with pytest.raises(DataError, match="needs the model's tokenizer"):
        harness(model, ["hellaswag"])
    with pytest.raises(ModelError, match="Linear is no transformers model"):
        harness(nn.Linear(1, 1), ["hellaswag"], tokenizer=tokenizer)
    with pytest.raises(DataError, match="nowhere' is no folder"):
        harness(model, ["mine"], tokenizer=tokenizer, include_path=tmp_path / "nowhere")
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(DataError, match="bare' holds no tokenizer"):
        harness(tmp_path / "bare", ["hellaswag"])
    for asked in ({"tasks": []}, {"tasks": ["mine"], "limit": 0}, {"tasks": ["mine"], "batch_size": 0}):
        with pytest.raises(SettingsError, match="a task or more, with limit and batch_size 1 or more"):
            harness(model, tokenizer=tokenizer, **asked)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"needs the package 'lm-eval': pip install 'secateur\[eval\]'"):
        harness(model, ["hellaswag"], tokenizer=tokenizer)


# --- results ------------------------------------------------------------------------------------------

FOUND = {
    "results": {
        "group": {"alias": "group", "acc,none": 0.5, "acc_stderr,none": "N/A"},
        "one": {
            "alias": " - one",
            "acc,none": 0.25,
            "acc_stderr,none": 0.1,
            "acc_norm,none": 1,
            "acc_norm_stderr,none": 0.2,
        },
        "two": {"alias": " - two", "acc,none": 0.75, "acc_stderr,none": 0.1, "sample_len": 4},
        "gsm": {"alias": "gsm", "exact_match,strict-match": 0.0, "exact_match,flexible-extract": 0.1, "name": "gsm"},
        "wiki": {"alias": "wiki", "word_perplexity,none": 20.0, "word_perplexity_stderr,none": "N/A"},
    },
    "group_subtasks": {"group": ["inner"], "inner": ["one", "two"]},
    "higher_is_better": {"one": {"acc": True, "acc_norm": None}, "wiki": {"word_perplexity": False}, "group": {}},
    "n-samples": {"one": {"original": 9, "effective": 4}},
    "versions": {"one": 1.0, "wiki": 2},
}


def test_results_are_read():
    found = read_results(FOUND, ["group", "gsm", "wiki"])
    assert [score.name for score in found.scores] == [
        "group acc",
        "gsm exact_match,strict-match",
        "gsm exact_match,flexible-extract",
        "wiki word_perplexity",
    ]
    assert [score.name for score in found.parts] == ["one acc", "one acc_norm", "two acc"]
    assert found.score("one acc") == Score("one", "acc", 0.25, 0.1, 4, True)
    assert found.score("group acc").error is None
    assert not found.score("wiki word_perplexity").higher_is_better
    assert [score.name for score in read_results(FOUND, ["group", "one"]).scores][:3] == [
        "group acc",
        "one acc",
        "one acc_norm",
    ]
    assert found.to_json()["versions"] == {"one": "1.0", "wiki": "2"}
    with pytest.raises(UnknownNameError, match="unknown score 'one accc'; did you mean one acc"):
        found.score("one accc")
    with pytest.raises(DataError, match="no score for group"):
        read_results({"results": {"group": {"alias": "group"}}}, ["group"])


def of(**values):
    """A result with these scores; those that are called perplexity are better when lower."""
    return HarnessResult(
        tuple(Score(n, "m", value, None, None, not n.startswith("perplexity")) for n, value in values.items()), (), {}
    )


def test_changes_and_the_report():
    found = {
        "full": of(a=0.8, b=0.5, perplexity_of_text=10.0, zero=0.0, broken=math.nan),
        "half": of(a=0.4, b=0.55, perplexity_of_text=15.0, zero=0.3, broken=1.0),
    }
    change = changes(found)
    assert change["a m"] == pytest.approx([0, -0.5])
    assert change["b m"] == pytest.approx([0, 0.1])
    assert change["perplexity_of_text m"] == pytest.approx([0, 0.5])
    assert change["zero m"] == change["broken m"] == [None, None]
    report = harness_report(found)
    assert report.task("perplexity_of_text m").perplexity
    assert report.group(Kind.FRAGILE) == ("a m", "perplexity_of_text m")
    with pytest.raises(UnknownNameError, match="unknown score 'a m'"):
        changes({"full": of(a=1.0), "half": of(b=1.0)})
    plain = {"full": of(a=0.8), "half": of(a=0.79)}
    assert harness_report(plain, [4.0, 5.0]).task("perplexity").values == (4.0, 5.0)
    assert harness_report(plain, [4.0, 5.0]).group(Kind.ROBUST) == ("a m",)
    with pytest.raises(DataError, match="needs a perplexity beside the tasks"):
        harness_report(plain)


def test_json_of_a_broken_score_is_json():
    import json

    found = of(a=math.nan, b=math.inf).to_json()
    assert [score["value"] for score in json.loads(json.dumps(found, allow_nan=False))["scores"]] == ["nan", "inf"]
    assert copy.deepcopy(found) == found
