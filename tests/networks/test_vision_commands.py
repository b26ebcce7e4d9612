"""Structured methods from the command line on a person's own image classifiers: transformers, timm, a factory."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))

import cli_runs
from cli_runs import good, run
from network_tools import _networks_folder, use_networks

import secateur as sc
from secateur.core.method import Batch
from secateur.io.data import PREPROCESSOR, open_data
from secateur.io.models import open_model
from secateur.measure.flops import flops
from secateur.report.record import Record
from secateur.shrink.folder import CARD

SIZE, CLASSES, SAMPLES = 16, 3, 24
TIMM = f"timm:resnet10t?num_classes={CLASSES}"
FACTORY = """
from torch import nn
def make():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64),
        nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 3),
    )
"""


def pictures() -> list[tuple[str, int]]:
    return [(f"{number}.png", number % CLASSES) for number in range(SAMPLES)]


def write_pictures(home: Path) -> None:
    """A folder with one folder a class, for training and testing, and the same as a parquet file."""
    import pyarrow
    import pyarrow.parquet
    from PIL import Image

    rng, rows = torch.Generator().manual_seed(0), []
    for name, label in pictures():
        image = torch.randint(0, 160, (SIZE, SIZE, 3), generator=rng)
        image[..., label] += 90
        for split in ("train", "test"):
            place = home / "pictures" / split / f"class-{label}"
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.byte().numpy()).save(place / name)
        rows.append({"image": {"bytes": (place / name).read_bytes(), "path": name}, "label": label})
    (home / "table").mkdir()
    for split in ("train", "test"):
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), home / "table" / f"{split}.parquet")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    home = tmp_path_factory.mktemp("vision")
    write_pictures(home)
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic", num_labels=CLASSES, hidden_act="relu"
    )
    ResNetForImageClassification(config).save_pretrained(home / "classifier")
    ViTImageProcessor(size={"height": SIZE, "width": SIZE}).save_pretrained(home / "classifier")
    (home / "mynets.py").write_text(FACTORY)
    return home


@pytest.fixture
def place(home, monkeypatch):
    monkeypatch.chdir(home)
    monkeypatch.syspath_prepend(str(home))
    monkeypatch.setenv("COLUMNS", "300")
    cli_runs.hurry(monkeypatch)
    return home


def checked(folder: Path, method: str, share: float, trusted: bool = False) -> None:
    """Plan, model and report are there, and FLOPs are what was asked for."""
    record = Record.load(folder / "secateur" / "report.json")
    assert record.method.name == method
    sizes = record.sizes.flops
    assert sizes.after <= share * sizes.before
    assert (folder / "report.html").exists()
    plan = sc.Plan.load(folder / "secateur")
    assert plan.provenance[0].method == method
    model = sc.load(folder, trust_factory=trusted)
    assert flops(model, Batch((torch.rand(1, 3, SIZE, SIZE),))) == pytest.approx(sizes.after, rel=1e-6)


PLANNED = {
    "channel-norm": [], "group-taylor": [], "group-random": [], "fpgm": [], "hrank": [], "svd": [],
    "network-slimming": [], "layer-lottery": ["strict=false", "criterion=snip"],
    "pagcp": ["tolerance=5", "total_tolerance=1e7", "top=1"],
}  # fmt: skip
TRAINED = {"greg": [], "group-lasso": [], "network-slimming": [], "trp": [], "lapp": ["rate=0.3", "phase=0.8"]}


def words_of(settings: list[str]) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


@pytest.mark.parametrize("method", PLANNED)
def test_a_classifier_of_transformers_and_a_folder_of_pictures(place, method):
    words = ["prune", "classifier", "--method", method, "--flops", "0.9", "--data", "pictures"]
    good(*words, *words_of(PLANNED[method]), "--out", f"pruned-{method}")
    checked(place / f"pruned-{method}", method.replace("-", "_"), 0.9)


@pytest.mark.parametrize("method", TRAINED)
def test_training_a_classifier_of_one_s_own_and_a_parquet_file(place, method):
    words = ["train", "mynets:make", "--method", method, "--flops", "0.8", "--data", "table", "--steps", "6"]
    words += ["--recipe", "batch=8", "--recover", "finetune:steps=2", *words_of(TRAINED[method])]
    done = good(*words, "--out", f"trained-{method}")
    assert "accuracy before recovery" in done.out
    checked(place / f"trained-{method}", method.replace("-", "_"), 0.8, trusted=True)
    shown = re.search(
        r"asked flops 0\.8, reached (0\.\d+) of the dense flops, \d+\.\d+% of the (channels|ranks) removed",
        good("show", f"trained-{method}").out,
    )
    record = Record.model_validate_json((place / f"trained-{method}" / "secateur" / "report.json").read_text())
    assert float(shown[1]) == pytest.approx(record.sizes.flops.after / record.sizes.flops.before, abs=1e-4)


@pytest.mark.skipif(not (_networks_folder() / "timm").is_dir(), reason="timm is in the folder of networks")
def test_a_timm_network_by_its_name(place):
    use_networks()
    good("prune", TIMM, "--method", "fpgm", "--flops", "0.5", "--data", "table", "--out", "timm-half")
    checked(place / "timm-half", "fpgm", 0.5, trusted=True)
    card = json.loads((place / "timm-half" / "secateur" / CARD).read_text())
    assert card["factory"] == TIMM
    done = run("prune", "timm:resnet10x", "--method", "fpgm", "--flops", "0.5", "--data", "table", "--out", "no")
    assert (done.code, done.out) == (2, "")
    assert "unknown timm network 'resnet10x'; did you mean resnet10t" in done.err


def write_classes(folder: Path, names: list[str]) -> None:
    from PIL import Image

    for split in ("train", "test"):
        for shade, name in enumerate(names * 2):
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (SIZE, SIZE), (shade, 0, 0)).save(folder / split / name / f"{shade}.png")


STEPS = ["--steps", "2", "--recipe", "batch=4"]


@pytest.mark.parametrize(
    "words",
    [
        ["prune", "classifier", "--method", "fpgm", "--flops", "0.5", "--recover", "finetune:steps=2"],
        ["prune", "classifier", "--method", "group-taylor", "--flops", "0.5"],
        ["prune", "classifier", "--method", "pagcp", "--flops", "0.5"],
        ["prune", "classifier", "--method", "layer-lottery", "--sparsity", "0.5", "--set", "criterion=snip"],
        ["train", "classifier", "--method", "lapp", "--flops", "0.6", *STEPS],
        ["study", "classifier", "--method", "layer-lottery", "--sparsity", "0", "--set", "p=1", *STEPS],
    ],
    ids=" ".join,
)
def test_more_classes_than_the_head_has_is_one_sentence(place, words):
    write_classes(place / "many", [f"class-{label}" for label in range(5)])
    before = sorted(path.name for path in place.iterdir())
    done = run(*words, "--data", "many", "--out", "no")
    assert (done.code, done.out) == (2, "")
    assert len(done.err.splitlines()) == 1
    assert "'many' has labels from 0 to 4, but the model gives [1, 3], 3 classes" in done.err
    assert sorted(path.name for path in place.iterdir()) == before


def test_classes_go_by_the_names_of_the_head(place):
    """The folder's order is the alphabet's, the head's is not."""
    from transformers import ResNetForImageClassification

    model = ResNetForImageClassification.from_pretrained(place / "classifier")
    model.config.id2label = {0: "zebra", 1: "ant", 2: "bee"}
    model.config.label2id = {name: index for index, name in model.config.id2label.items()}
    model.save_pretrained(place / "named")
    (place / "named" / PREPROCESSOR).write_bytes((place / "classifier" / PREPROCESSOR).read_bytes())
    write_classes(place / "animals", ["ant", "zebra"])
    found = open_data("animals", open_model("named")).evaluation
    assert sorted(set(found.targets.tolist())) == [0, 1]
    reds = found.inputs[:, 0, 0, 0]
    assert found.targets[reds.argmin()] == 1  # the darkest is an ant
    write_classes(place / "others", ["ant", "yak"])
    done = run("prune", "named", "--method", "fpgm", "--flops", "0.5", "--data", "others", "--out", "no")
    assert (done.code, done.out) == (2, "")
    assert "'others' has the class 'yak', which is none of the 3 of the model's head ('zebra', ...)" in done.err
