"""`secateur study`: procedures as a job, killed anywhere and resumed, with and without a pruned network."""

import json
import re
from functools import partial

import pytest
import torch
from torch import nn

import secateur as sc
from secateur.core.errors import BudgetError, ModelError, OutputError, SettingsError, UnknownNameError
from secateur.io.data import open_data
from secateur.io.models import open_model
from secateur.lab import training
from secateur.lab.study import FINDINGS, StudyJob, figures, maker, study
from secateur.train.loop import Fitting, Recipe


def job(**more):
    asked = {
        "model": "zoo:digits-mlp",
        "method": "lottery",
        "sparsity": 0.36,
        "recipe": {"steps": 6, "lr": 0.05, "batch": 32},
    }
    return StudyJob(**{**asked, **more})


def findings(folder):
    return json.loads((folder / "secateur" / FINDINGS).read_text())


@pytest.mark.parametrize("dies_at", [2, 3])
def test_a_killed_study_goes_on_and_ends_with_the_same(dies_at, tmp_path, monkeypatch):
    straight = study(job(), tmp_path / "straight")
    whole, calls = Fitting.__call__, []

    def dying(self, model, masks, start, stop):
        calls.append((start, stop))
        if len(calls) == dies_at:
            raise KeyboardInterrupt
        return whole(self, model, masks, start, stop)

    monkeypatch.setattr(Fitting, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        study(job(), tmp_path / "killed")
    assert not (tmp_path / "killed").exists()
    with pytest.raises(SettingsError, match=r"killed\.study' holds a run with seed=0"):
        study(job(seed=1), tmp_path / "killed")
    found = study(job(), tmp_path / "killed")
    assert found.to_json() == straight.to_json()
    done = len(straight.rows)
    assert len(calls) == done + 1  # what was done is not done again, only what was cut off
    assert findings(tmp_path / "killed") == findings(tmp_path / "straight")
    assert not (tmp_path / "killed.study").exists()


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"model": "zoo:digits-resnet"}, "model='zoo:digits-mlp', this one has 'zoo:digits-resnet'"),
        ({"pretrained": True}, "pretrained=False, this one has True"),
        ({"validation": 0.2}, "validation=0.1, this one has 0.2"),
        ({"recipe": {"steps": 6, "lr": 0.04, "batch": 32}}, "recipe.lr=0.05, this one has 0.04"),
    ],
)
def test_trainings_of_another_network_or_on_other_data_are_not_taken_for_one_s_own(other, said, tmp_path, monkeypatch):
    whole, calls = Fitting.__call__, []

    def dying(self, model, masks, start, stop):
        calls.append(start)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole(self, model, masks, start, stop)

    monkeypatch.setattr(Fitting, "__call__", dying)
    with pytest.raises(KeyboardInterrupt):
        study(job(), tmp_path / "out")
    with pytest.raises(SettingsError, match=re.escape(said)):
        study(job(**other), tmp_path / "out")


def test_a_study_in_python_knows_its_network_and_its_data(tmp_path):
    opened = open_model("zoo:digits-mlp")
    data = open_data("zoo:digits", opened).calibration.sample(64, 0)

    def run(width=8, samples=64, about=None, between=nn.ReLU, folder="run", known_by=None, **more):
        def make():
            return nn.Sequential(nn.Flatten(), nn.Linear(64, width), between(), nn.Linear(width, 10))

        chosen = data.take(torch.arange(samples))
        fit = Fitting(chosen, Recipe(steps=4, batch=16), lambda model: figures(model, chosen), **{"seed": 0, **more})
        if known_by is not None:
            fit = partial(Fitting.__call__, fit)
            fit.steps, fit.known_by = 4, known_by
        return sc.study(make, fit, "lottery", 0.2, folder=tmp_path / folder, about=about)

    first = run()
    assert run().rows == first.rows
    others = {
        "network=": [{"width": 12}, {"between": nn.Tanh}],
        "training_data=": [{"samples": 60}],
        "x=None": [{"about": {"x": 1}}],
        "data_order=0": [{"seed": 7}],
        "also_at=": [{"also_at": (2,)}],
    }
    for word, cases in others.items():
        for other in cases:
            with pytest.raises(SettingsError, match=word):
                run(**other)
    for about in ({"path": tmp_path}, {"w": torch.ones(2)}, {"lr": float("nan")}, {"some": {1, 2}}):
        with pytest.raises(SettingsError, match="about must be plain data"):
            run(folder="new", about=about)
    with pytest.raises(SettingsError, match="about names 'seed', by which a study is known anyway"):
        run(folder="new", about={"seed": 1})
    assert not (tmp_path / "new").exists()
    run(folder="new", known_by={"own": (1, 2)})
    run(folder="new", known_by={"own": (1, 2)})
    with pytest.raises(SettingsError, match="own="):
        run(folder="new", known_by={"own": (1, 3)})
    for unrelated in (7, lambda: 7):
        assert run(folder="unrelated", known_by=unrelated).rows


def test_a_network_that_is_another_one_each_time_is_no_reason_to_refuse(tmp_path):
    rng = torch.Generator().manual_seed(0)

    def make():
        model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
        nn.init.normal_(model[1].weight, std=0.1, generator=rng)
        return model

    data = open_data("zoo:digits", open_model("zoo:digits-mlp")).calibration.sample(64, 0)
    fit = Fitting(data, Recipe(steps=2, batch=16), lambda model: figures(model, data))
    first = sc.study(make, fit, "lottery", 0.2, folder=tmp_path / "run")
    assert sc.study(make, fit, "lottery", 0.2, folder=tmp_path / "run").rows == first.rows


def test_a_study_that_is_refused_leaves_no_folder_behind(tmp_path):
    with pytest.raises(SettingsError, match="cannot rewind to step 9"):
        study(job(method="rewinding", settings={"k": 9}), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert study(job(method="rewinding", settings={"k": 3}), tmp_path / "out").rows


def test_the_final_network_reloads_and_is_measured_on_test_data(tmp_path):
    found = study(job(), tmp_path / "ticket")
    model = sc.load(tmp_path / "ticket")
    weights = dict(model.named_parameters())
    for name, keep in found.masks.items():
        assert not weights[name][~keep].any()
        assert torch.equal(weights[name], found.state[name])
    assert found.plan.units()[0] == found.rows[-1]["kept"]
    assert findings(tmp_path / "ticket")["summary"]["test"]["accuracy"] > 20
    assert findings(tmp_path / "ticket")["job"]["method"] == "lottery"


def test_plasticity_leaves_a_table_and_no_network(tmp_path):
    found = study(job(method="plasticity", settings={"moments": (2, 4), "recovery": 2}), tmp_path / "out")
    assert [row["step"] for row in found.rows] == [2, 2, 4, 4]
    assert findings(tmp_path / "out")["rows"] == found.rows
    assert [path.name for path in (tmp_path / "out" / "secateur").iterdir()] == [FINDINGS]
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_structured_study_saves_the_smaller_network(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "WINDOWS", 80)
    asked = {
        "model": "zoo:pydoc-llama",
        "method": "adapt_pruner",
        "sparsity": 0.5,
        "pretrained": True,
        "recipe": {"steps": 3, "lr": 1e-4, "batch": 8, "optimizer": "adamw", "decay": "wsd"},
        "settings": {"stages": 2, "iterations": 8, "amplitude": 0.05, "samples": 16},
    }
    found = study(job(**asked), tmp_path / "small")
    model = sc.load(tmp_path / "small")
    assert sum(p.numel() for p in model.parameters()) == found.summary["parameters"]
    assert found.summary["kept"] < 0.7
    for name, keep in found.plan.masks.items():
        if name.endswith("neuron"):
            assert model.get_submodule(name.partition(":")[0]).out_features == int(keep.sum())
    measured = figures(model, open_data("zoo:pydoc", open_model("zoo:pydoc-llama", None), 0).evaluation)
    assert findings(tmp_path / "small")["summary"]["test"] == pytest.approx(measured)


def test_trainings_start_from_new_or_from_trained_weights():
    opened = open_model("zoo:digits-mlp", None)
    name = "3.weight"

    def weight(pretrained, seed):
        torch.manual_seed(seed)
        return dict(maker(opened, pretrained)().named_parameters())[name]

    shipped = dict(opened.model.named_parameters())[name]
    assert torch.equal(weight(True, 0), shipped)
    assert not torch.equal(weight(False, 0), shipped)
    assert torch.equal(weight(False, 0), weight(False, 0))
    assert not torch.equal(weight(False, 0), weight(False, 1))
    assert not torch.equal(opened.model[3].weight, maker(opened, False)()[3].weight)  # the opened one stays


@pytest.mark.parametrize(
    ("wrong", "error", "says"),
    [
        ({"method": "wanda"}, ModelError, "wanda is no procedure around trainings"),
        ({"method": "lotery"}, UnknownNameError, "did you mean lottery"),
        ({"sparsity": None}, BudgetError, "give one of --sparsity"),
        ({"settings": {"ratee": 1}}, UnknownNameError, "did you mean rate"),
        ({"recipe": {"stepps": 1}}, UnknownNameError, "did you mean steps"),
    ],
)
def test_wrong_requests_are_refused_before_anything_is_trained(wrong, error, says, tmp_path):
    with pytest.raises(error, match=says):
        study(job(**wrong), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_older_result_is_not_replaced(tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="exists already"):
        study(job(), tmp_path / "out")
