"""`secateur train`: killed anywhere and resumed, the best state by validation data, early stop, bad input."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from secateur.core.errors import BudgetError, DataError, ModelError, NumericsError, SettingsError, UnknownNameError
from secateur.core.progress import Silent
from secateur.data.dataset import DataKind, Dataset
from secateur.lab.train import TrainJob, prepare, train
from secateur.lab.training import read_job, split
from secateur.train.logs import Log
from secateur.train.loop import Fitting


def job(**more):
    asked = {
        "model": "zoo:digits-mlp",
        "method": "granet",
        "sparsity": 0.9,
        "recipe": {"steps": 24, "lr": 0.05, "batch": 32},
        "settings": {"every": 4},
        "from_scratch": True,
        "evaluate_every": 6,
    }
    return TrainJob(**{**asked, **more})


def die(monkeypatch, step):
    """Trainings are killed before this step."""
    advance = Fitting.advance

    def dying(self, model, optimizer, now, *more):
        if now == step:
            raise KeyboardInterrupt
        return advance(self, model, optimizer, now, *more)

    monkeypatch.setattr(Fitting, "advance", dying)


def run(asked, folder):
    session, _ = prepare(asked, folder, Silent())
    session.run(Silent())
    return session, session.finish()


@pytest.mark.parametrize("dies_at", [3, 7, 19])
def test_a_killed_training_goes_on_and_ends_with_the_same(dies_at, tmp_path, monkeypatch):
    straight, plan = run(job(), tmp_path / "straight")
    die(monkeypatch, dies_at)
    session, _ = prepare(job(), tmp_path / "killed", Silent())
    with pytest.raises(KeyboardInterrupt):
        session.run(Silent())
    session.log.path.open("a").write('{"step": 99, "cut')  # as a kill may leave it
    monkeypatch.undo()
    again, found = run(job(), tmp_path / "killed")
    assert again.best == straight.best
    assert all(torch.equal(plan.masks[name], found.masks[name]) for name in plan.masks)
    for one, other in zip(straight.opened.model.parameters(), again.opened.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert again.log.lines() == straight.log.lines()


def test_only_states_on_target_are_candidates_and_validation_chooses(tmp_path):
    session, plan = run(job(), tmp_path / "run")
    validations = [line for line in session.log.lines() if "validation_accuracy" in line]
    assert [line["step"] for line in validations] == [6, 12, 18, 24]
    on_target = [line for line in validations if line["density"] <= 0.1001]
    assert 0 < len(on_target) < len(validations)
    best = max(line["validation_accuracy"] for line in on_target)
    assert session.best == (best, next(line["step"] for line in on_target if line["validation_accuracy"] == best))
    assert plan.units()[0] == session.sparsifier.target
    kept = sum(int((session.opened.model.get_parameter(name) != 0).sum()) for name in plan.sites)
    assert kept <= plan.units()[0]


def test_validation_and_training_share_no_sample():
    data = Dataset("made", DataKind.IMAGE, torch.arange(50.0)[:, None], torch.zeros(50, dtype=torch.int64))
    held, rest = split(data, 0.2, seed=3)
    assert len(held) == 10
    assert sorted([*held.inputs.flatten().tolist(), *rest.inputs.flatten().tolist()]) == list(range(50))
    with pytest.raises(DataError, match="leave nothing to validate"):
        split(data, 0.001, seed=3)


def test_early_stop_after_as_many_stale_validations(tmp_path):
    asked = job(recipe={"steps": 60, "lr": 1e-9, "batch": 32}, patience=2, settings={"every": 4, "stop": 12})
    session, plan = run(asked, tmp_path / "run")
    assert session.step < 60
    assert session.log.lines()[-1] == {"step": session.step, "event": "early stop"}
    assert plan.units()[0] == session.sparsifier.target


def test_other_settings_do_not_resume(tmp_path):
    prepare(job(), tmp_path / "run", Silent())
    with pytest.raises(SettingsError, match=r"holds a run with sparsity=0.9, this one has 0.8"):
        prepare(job(sparsity=0.8), tmp_path / "run", Silent())


def test_from_scratch_is_not_the_shipped_model(tmp_path):
    fresh, _ = prepare(job(), tmp_path / "a", Silent())
    shipped, _ = prepare(job(from_scratch=False), tmp_path / "b", Silent())
    again, _ = prepare(job(), tmp_path / "c", Silent())
    first = [dict(s.opened.model.named_parameters())["3.weight"] for s in (fresh, shipped, again)]
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[0], first[2])


def test_a_file_and_flags_make_one_job(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: zoo:digits-mlp\nmethod: granet\nsparsity: 0.9\nrecipe:\n  steps: 50\n  lr: 0.1\n")
    found = read_job(TrainJob, config, {"sparsity": 0.8, "recipe": {"lr": "0.2"}})
    assert (found.sparsity, found.recipe) == (0.8, {"steps": 50, "lr": "0.2"})
    assert found.command("out").startswith("secateur train zoo:digits-mlp --method granet --sparsity 0.8 --steps 50")


@pytest.mark.parametrize(
    ("text", "error", "says"),
    [
        ("model: a\nmethod: granet\nmodell: x\n", UnknownNameError, "modell.*did you mean model"),
        ("[1, 2\n", SettingsError, "cannot be read as YAML"),
        ("- 1\n", SettingsError, "must hold names and values"),
        ("method: granet\n", SettingsError, "give the model"),
        ("model: a\nmethod: granet\nvalidation: 2\n", SettingsError, "validation"),
    ],
)
def test_wrong_files_are_refused(text, error, says, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(text)
    with pytest.raises(error, match=says):
        read_job(TrainJob, config, {})


def test_a_cut_by_flops_is_met_repaired_and_reported(tmp_path):
    asked = TrainJob(
        model="zoo:digits-resnet",
        method="network_slimming",
        flops=0.6,
        recipe={"steps": 6, "batch": 32},
        recover="finetune:steps=8",
    )
    record = train(asked, tmp_path / "half")
    flops = record.sizes.flops
    assert 0.58 * flops.before < flops.after <= 0.6 * flops.before
    assert record.quality.recovered.value > record.quality.pruned.value
    assert record.recovery.name == "finetune"
    words = record.reproduce.command
    assert "--flops 0.6" in words
    assert "--recover finetune:steps=8" in words
    assert "sc.Budget(0.6, 'flops')" in record.reproduce.python
    assert "--sparsity" not in words


def test_wrong_requests_are_refused_before_anything_slow(tmp_path):
    with pytest.raises(ModelError, match="wanda does not act during training"):
        prepare(job(method="wanda", settings={}), tmp_path / "a", Silent())
    with pytest.raises(BudgetError, match="give one of --sparsity, --parameters, --flops; got 0"):
        prepare(job(sparsity=None), tmp_path / "b", Silent())
    with pytest.raises(UnknownNameError, match="did you mean lr"):
        prepare(job(recipe={"lrr": 1}), tmp_path / "c", Silent())


def test_a_log_goes_on_after_its_step(tmp_path):
    log = Log(tmp_path)
    for step in (1, 2, 3):
        log.write(step, loss=1.0 / step)
    again = Log(tmp_path, step=2)
    again.write(3, loss=9.0)
    assert [line["loss"] for line in again.lines()] == [1.0, 0.5, 9.0]
    assert [json.loads(line)["step"] for line in again.path.read_text().splitlines()] == [1, 2, 3]


def test_tensorboard_gets_the_figures(tmp_path):
    pytest.importorskip("tensorboard")
    log = Log(tmp_path, tensorboard=True)
    log.write(1, loss=0.5, event="start")
    log.close()
    assert any((tmp_path / "tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"recover": "self_generated"}, "single weights|fill removed weights"),
        ({"method": "lapp", "sparsity": 0.3, "model": "zoo:digits-resnet", "settings": {}, "recover": "self_generated"},
         "self_generated is for language models; 'zoo:digits' holds no windows"),
        ({"recover": "batchnorm"}, "has no batch norm to re-estimate"),
        ({"recover": "finetune:steps"}, "name=value"),
    ],
)  # fmt: skip
def test_a_recovery_that_cannot_work_is_refused_before_the_training(other, said, tmp_path, monkeypatch):
    monkeypatch.setattr(Fitting, "advance", lambda *_: pytest.fail("it was trained"))
    with pytest.raises((SettingsError, ModelError), match=said):
        train(job(**other), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def killed(monkeypatch, asked, out, step=13):
    die(monkeypatch, step)
    with pytest.raises(KeyboardInterrupt):
        train(asked, out)
    monkeypatch.undo()


def test_a_training_is_not_gone_on_with_on_other_weights_or_data(tmp_path, monkeypatch):
    weights = tmp_path / "own.safetensors"
    (tmp_path / "net.py").write_text(
        "from torch import nn\n"
        "def make():\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    torch.manual_seed(0)
    state = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)).state_dict()
    save_file(state, weights)
    asked = job(model="net:make", weights=str(weights), data="zoo:digits", from_scratch=False)
    killed(monkeypatch, asked, tmp_path / "out")
    monkeypatch.syspath_prepend(str(tmp_path))
    save_file({name: value * 1.1 for name, value in state.items()}, weights)
    with pytest.raises(SettingsError, match="holds a run with network="):
        train(asked, tmp_path / "out")
    save_file(state, weights)
    fewer = Dataset.take
    monkeypatch.setattr(Dataset, "take", lambda self, chosen: fewer(self, chosen[:-1]))
    with pytest.raises(SettingsError, match="holds a run with training_data="):
        train(asked, tmp_path / "out")
    monkeypatch.setattr(Dataset, "take", fewer)
    assert run(asked, tmp_path / "out.training")[0].step == 24


def test_weights_that_are_not_finite_are_named_before_the_training(tmp_path, monkeypatch):
    (tmp_path / "sick.py").write_text(
        "import torch\nfrom torch import nn\n"
        "def make():\n"
        "    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10))\n"
        "    model[3].weight.data[2, 3] = torch.nan\n"
        "    return model\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for method, settings in (("granet", {"every": 4}), ("trp", {}), ("lapp", {}), ("network_slimming", {})):
        asked = job(model="sick:make", data="zoo:digits", from_scratch=False, method=method, settings=settings)
        with pytest.raises(NumericsError, match=r"layer '3.weight' has NaN or infinite weights; repair the model"):
            train(asked, tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_a_training_that_fails_before_anything_is_kept_leaves_nothing(tmp_path):
    with pytest.raises(NumericsError, match="lower lr"):
        train(job(recipe={"steps": 24, "lr": 1e30, "batch": 32}), tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert run(job(), tmp_path / "out.training")[0].step == 24
