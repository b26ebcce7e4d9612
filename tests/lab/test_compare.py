import json
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from secateur.cli.app import app
from secateur.core.errors import DataError, ModelError, SettingsError, UnknownNameError
from secateur.core.progress import Silent
from secateur.lab import compare as lab
from secateur.lab.checks._beside import Figure, Ground, Rival, Runs, beside
from secateur.lab.compare import Comparison, compare, markdown, read_comparison
from secateur.train.study import Ledger

RECOVER = "finetune:steps=2"
ASKED = {
    "model": "zoo:pydoc-llama",
    "data": "zoo:pydoc",
    "samples": 4,
    "include": ["model.layers*"],
    "seeds": 2,
    "speed": False,
    "rows": [
        {"methods": ["wanda", "random"], "sparsity": [0.5], "pattern": ["2:4"]},
        {"methods": ["group_random"], "blocks": [0.25], "settings": {"multiple": 1}},
        {"methods": ["shortgpt"], "sparsity": [0.25, 0.1]},
    ],
}


@pytest.fixture
def few(monkeypatch):
    """Only a few evaluation windows."""
    from secateur.data.dataset import Splits
    from secateur.io.data import open_data

    def short(*args):
        found = open_data(*args)
        return Splits(found.calibration, found.evaluation.take(__import__("torch").arange(4)))

    monkeypatch.setattr(lab, "open_data", short)


@pytest.fixture
def table(few):
    return compare(Comparison(**ASKED))


def test_every_method_and_budget_has_a_row_with_its_seeds(table):
    by = {(one.method, one.budget, one.amount): one for one in table}
    assert len(by) == len(table) == 1 + 4 + 1 + 2
    dense = by["dense", "sparsity", 0.0]
    wanda, chance = by["wanda", "sparsity", 0.5], by["random", "sparsity", 0.5]
    assert dense.value < wanda.value < chance.value
    assert len(wanda.values) == 2
    assert wanda.values[0] != wanda.values[1]  # other calibration samples
    assert wanda.interval[0] < wanda.value < wanda.interval[1]
    assert wanda.sampling[0] < wanda.values[0] < wanda.sampling[1]
    assert wanda.parameters == dense.parameters
    assert wanda.nonzeros < 0.6 * dense.nonzeros


def test_blocks_is_a_share_of_the_blocks_parameters(table):
    from secateur import zoo
    from secateur.measure import parameters
    from secateur.structure.stacks import main_stack

    model = zoo.load_model("pydoc-llama")
    inside = sum(p.numel() for block in main_stack(model).blocks for p in block.parameters())
    (row,) = [one for one in table if one.budget == "blocks"]
    assert parameters(model) - row.parameters == pytest.approx(0.25 * inside, rel=0.05)


def test_what_a_method_refuses_becomes_its_row(table):
    bad = [one for one in table if one.error]
    assert [(one.method, one.amount) for one in bad] == [("shortgpt", 0.1)]
    assert "reachable" in bad[0].error
    assert "refused: " in markdown(Comparison(**ASKED), table)


def test_finished_rows_are_not_run_again(few, tmp_path, monkeypatch):
    asked = Comparison(**ASKED | {"rows": ASKED["rows"][:1], "seeds": 1})
    first = compare(asked, tmp_path / "keep")

    def never(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(lab.api, "plan", never)
    assert compare(asked, tmp_path / "keep") == first
    with pytest.raises(SettingsError, match="samples"):
        compare(asked.model_copy(update={"samples": 5}), tmp_path / "keep")


def test_a_row_with_other_settings_is_run_anew(few, tmp_path):
    def table(settings):
        rows = [{"methods": ["wanda"], "sparsity": [0.5], "settings": settings}]
        return compare(Comparison(**ASKED | {"rows": rows, "seeds": 1}), tmp_path / "keep")[1]

    by_row, by_layer = table({}), table({"compare": "layer"})
    assert by_row.value != by_layer.value
    assert table({}) == by_row


def test_speed_and_recovery_are_measured_where_asked_for(few):
    rows = [{"methods": ["shortgpt"], "sparsity": [0.25], "recover": "finetune:steps=2"}]
    (_, row) = compare(Comparison(**ASKED | {"rows": rows, "seeds": 1, "speed": True}))
    assert row.speed["prefill"] > 0
    assert row.speed["decode"] > 0
    assert row.recovered != row.value


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rows": [{"methods": ["wanda"], "sparsty": [0.5]}]}, "field 'rows.0.sparsty'"),
        ({"model": None}, "field 'model'"),
        ({"rows": [{"methods": ["wanda"], "sparsity": ["much"]}]}, "field 'rows.0.sparsity.0'"),
    ],
)
def test_a_wrong_field_is_named(tmp_path, change, match):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(ASKED | change))
    with pytest.raises(SettingsError, match=match):
        read_comparison(tmp_path / "a.yaml")


def test_unknown_names_are_refused_before_anything_runs(tmp_path):
    rows = [{"methods": ["wonda"], "sparsity": [0.5]}]
    with pytest.raises(UnknownNameError, match="wanda"):
        compare(Comparison(**ASKED | {"rows": rows}))
    rows = [{"methods": ["wanda"], "sparsity": [0.5], "settings": {"compair": "row"}}]
    with pytest.raises(UnknownNameError, match="compare"):
        compare(Comparison(**ASKED | {"rows": rows}))


def test_the_command_writes_a_page_and_data(few, tmp_path):
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(ASKED | {"rows": ASKED["rows"][:1]}))
    words = ["compare", str(tmp_path / "small.yaml"), "--seeds", "1", "--out", str(tmp_path / "out")]
    ran = CliRunner().invoke(app, words)
    assert ran.exit_code == 0, ran.output
    assert "wanda" in ran.output
    found = json.loads((tmp_path / "out" / "small.json").read_text())
    assert found["asked"]["seeds"] == 1
    assert len(found["rows"]) == 5
    assert (tmp_path / "out" / "small.md").read_text().count("| wanda |") == 2


def test_vision_models_are_timed_by_batches_and_methods_that_act_in_training_get_one():
    asked = {
        "model": "zoo:digits-resnet",
        "data": "zoo:digits",
        "samples": 32,
        "seeds": 1,
        "batches": [1, 4],
        "rows": [
            {"methods": ["channel_norm"], "flops": [0.5], "recover": "finetune:steps=2"},
            {
                "methods": ["network_slimming"],
                "flops": [0.5],
                "train": "finetune:steps=3",
                "recover": "finetune:steps=2",
            },
        ],
    }
    dense, norm, slim = compare(Comparison(**asked))
    assert norm.error is slim.error is None
    for row in (norm, slim):
        assert row.flops == pytest.approx(0.5, abs=0.02)
        assert row.parameters < dense.parameters
        assert set(row.speed) == {"batch 1", "batch 4"}
        assert row.recovered != row.value
    page = markdown(Comparison(**asked), [dense, norm, slim])
    assert "| batch 1 | batch 4 |" in page


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ({"methods": ["wanda"], "train": "finetune:steps=2"}, "wanda does not act during training"),
        ({"methods": ["greg"], "train": "batchnorm"}, "'batchnorm' is no training"),
        ({"methods": ["greg"]}, "greg is no one-shot method; give its row a training"),
    ],
)
def test_rows_that_cannot_be_trained_are_refused_before_any_work(rows, match):
    with pytest.raises(SettingsError, match=match):
        compare(Comparison(**ASKED | {"rows": [rows | {"sparsity": [0.5]}]}))


def test_a_training_that_does_not_exist_is_refused_before_any_work():
    with pytest.raises(UnknownNameError, match="unknown recovery 'biases'"):
        compare(Comparison(**ASKED | {"rows": [{"methods": ["greg"], "train": "biases", "sparsity": [0.5]}]}))


def test_shipped_comparisons_are_found_by_name_and_variables_looked_up(tmp_path, monkeypatch):
    assert {"llama-5m-english", "resnet56-cifar10", "resnet20-cifar10"} <= set(lab.known_comparisons())
    found = read_comparison(Path("resnet56-cifar10"))
    assert found.data.startswith("$SECATEUR_DATA/cifar10?")  # as it is said, not as it is on this machine
    (tmp_path / "cifar10").mkdir()
    monkeypatch.setenv("SECATEUR_DATA", str(tmp_path))
    assert lab.located(found.data).startswith(f"{tmp_path}/cifar10?limit=3000&mean")
    monkeypatch.delenv("SECATEUR_DATA")
    with pytest.raises(DataError, match="SECATEUR_DATA='' names no folder with 'cifar10' inside"):
        lab.located(found.data)
    with pytest.raises(SettingsError, match="no file 'resnet57', and no comparison of that name: llama"):
        read_comparison(Path("resnet57"))


SMALL = """
model: zoo:digits-resnet
data: zoo:digits
samples: 16
seeds: 1
rows:
  - {methods: [channel_norm, group_random], flops: [0.5], recover: "finetune:steps=1"}
  - {methods: [group_lasso], flops: [0.5], train: "finetune:steps=1"}
  - {methods: [layer_lottery], settings: {strict: false, criterion: random}, flops: [0.01]}
"""


def test_rows_of_a_comparison_are_the_ground_of_checks(tmp_path):
    (tmp_path / "small.yaml").write_text(SMALL)
    ground = Ground(str(tmp_path / "small.yaml"), "small", Figure.TRAINED, lower=False)
    norm, chance, lasso = Rival("channel_norm"), Rival("group_random"), Rival("group_lasso")
    check = beside(ground, lasso, norm, chance, (("flops", 0.5),))
    ledger = Ledger(None, {})
    (sample,) = check.run(0, Silent(), ledger).values()
    values = [Runs.of(ground, 0, Silent(), ledger).value(rival, ("flops", 0.5)) for rival in (lasso, norm, chance)]
    best = max(values[1:])
    assert (sample.value, sample.baseline, sample.random) == tuple(100 * (value - best) for value in values)
    assert max(sample.baseline, sample.random) == 0  # the better of the two never shows
    drawn = Rival("channel_norm", "", lambda seed, amount: {"norm": "l1"})
    assert drawn.rows(ground.asked(0), 0, ("flops", 0.5)).settings == {"norm": "l1"}
    with pytest.raises(ModelError, match=r"layer_lottery at flops 0\.01"):
        Runs.of(ground, 0, Silent(), ledger).value(Rival("layer_lottery"), ("flops", 0.01))
