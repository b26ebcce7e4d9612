"""DATA: every form gives the right samples for the model at hand."""

import io as bytes_io
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from cli_runs import write_images, write_language_model, write_text

from secateur.core.errors import DataError, SettingsError, UnknownNameError
from secateur.data.dataset import DataKind
from secateur.data.generation import generated_windows
from secateur.io.data import open_data, split_generated
from secateur.io.models import open_model

WINDOW = 24


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("data")
    write_language_model(home / "lm")
    write_text(home / "text.txt")
    write_images(home / "images")
    return home


@pytest.fixture(scope="module")
def lm(home):
    return open_model(str(home / "lm"))


@pytest.fixture(scope="module")
def net():
    return open_model("cli_runs:net")


def ids(text: str) -> list[int]:
    return [ord(character) for character in text]


def assert_windows_of(splits, text: str) -> None:
    """Every window is a piece of the text, letter by letter; both parts have the model's length."""
    for part in (splits.calibration, splits.evaluation):
        assert part.kind is DataKind.TEXT
        assert part.inputs.shape[1] == WINDOW
        assert part.inputs.dtype == torch.int64
        for row in part.inputs.tolist():
            assert "".join(map(chr, row)) in text


def test_zoo(lm, net):
    assert open_data("zoo:pydoc", lm, samples=3).calibration.inputs.shape == (3, 96)
    digits = open_data("zoo:digits", net, samples=5)
    assert digits.calibration.inputs.shape == (5, 1, 8, 8)
    assert len(digits.evaluation) == 450


def test_plain_text(home, lm):
    splits = open_data(str(home / "text.txt"), lm)
    assert_windows_of(splits, (home / "text.txt").read_text())
    assert len(splits.calibration) == 128


def test_json_lines(home, lm, tmp_path):
    texts = [(home / "text.txt").read_text()[start : start + 400] for start in range(0, 4000, 400)]
    (tmp_path / "t.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 3}) for text in texts))
    assert_windows_of(open_data(str(tmp_path / "t.jsonl"), lm, samples=4), "\n\n".join(texts))


def test_parquet_of_text(home, lm, tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = [(home / "text.txt").read_text()[start : start + 400] for start in range(0, 4000, 400)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "t.parquet")
    assert_windows_of(open_data(str(tmp_path / "t.parquet"), lm, samples=4), "\n\n".join(texts))


@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("nested", [True, False], ids=["as on the hub", "bytes"])
def test_parquet_of_images(net, tmp_path, column, nested):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (10, 4, 4), dtype=np.uint8)
    cells = []
    for image in pixels:
        stored = bytes_io.BytesIO()
        Image.fromarray(image).save(stored, "PNG")
        cells.append({"bytes": stored.getvalue(), "path": None} if nested else stored.getvalue())
    pq.write_table(pa.table({column: cells, "label": list(range(10))}), tmp_path / "i.parquet")
    splits = open_data(str(tmp_path / "i.parquet"), net)
    assert len(splits.calibration) + len(splits.evaluation) == 10
    for part in (splits.calibration, splits.evaluation):
        for image, label in zip(part.inputs, part.targets.tolist(), strict=True):
            np.testing.assert_allclose(image[0].numpy() * 255, pixels[label], atol=1e-4)


def test_image_folder(home, net):
    splits = open_data(str(home / "images"), net)
    assert splits.calibration.kind is DataKind.IMAGE
    assert splits.calibration.classes == ("class0", "class1", "class2")
    assert len(splits.calibration) + len(splits.evaluation) == 36
    for image, label in zip(splits.evaluation.inputs, splits.evaluation.targets.tolist(), strict=True):
        assert 60 * label / 255 - 1e-6 <= image.min() <= image.max() < (60 * label + 80) / 255


def test_options_after_a_question_mark_win(home, lm, net):
    assert open_data(f"{home / 'text.txt'}?length=10&samples=2", lm).calibration.inputs.shape == (2, 10)
    assert open_data(f"{home / 'images'}?size=6&limit=10", net).calibration.inputs.shape == (8, 1, 6, 6)
    with pytest.raises(UnknownNameError, match="did you mean length"):
        open_data(f"{home / 'text.txt'}?lenght=10", lm)


def test_seed_and_samples(home, lm):
    spec = str(home / "text.txt")
    first, again, other = (open_data(spec, lm, seed, samples=6) for seed in (0, 0, 1))
    assert torch.equal(first.calibration.inputs, again.calibration.inputs)
    assert not torch.equal(first.calibration.inputs, other.calibration.inputs)
    assert torch.equal(first.evaluation.inputs, other.evaluation.inputs)  # what is measured on stays


def test_window_is_the_context_length_but_at_most_2048(home, lm):
    from secateur.io.data import _window

    assert _window(lm) == WINDOW
    lm.model.config.max_position_embeddings = 131_072
    assert _window(lm) == 2048
    lm.model.config.max_position_embeddings = WINDOW
    assert _window(replace(lm, model=torch.nn.Linear(1, 1))) == 128


@pytest.mark.parametrize(
    ("preprocessor", "shape", "of"),
    [
        ({"size": {"height": 6, "width": 6}}, 6, lambda x: x),
        ({"size": {"shortest_edge": 5}}, 5, lambda x: x),
        ({"size": 7, "do_normalize": False, "image_mean": [0.5], "image_std": [0.5]}, 7, lambda x: x),
        ({"do_normalize": True, "image_mean": [0.5], "image_std": [0.25]}, 4, lambda x: (x - 0.5) / 0.25),
    ],
)
def test_preprocessor_of_the_model_decides_size_and_scale(home, net, tmp_path, preprocessor, shape, of):
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    model = replace(net, folder=tmp_path)
    found = open_data(str(home / "images"), model).evaluation.inputs
    plain = open_data(f"{home / 'images'}?size={shape}", net).evaluation.inputs
    assert found.shape[-2:] == (shape, shape)
    torch.testing.assert_close(found, of(plain))


def test_images_come_in_the_model_s_dtype(home):
    model = open_model("cli_runs:net", dtype="bfloat16")
    assert open_data(str(home / "images"), model).calibration.inputs.dtype == torch.bfloat16
    assert open_data("zoo:digits", model).evaluation.inputs.dtype == torch.bfloat16
    assert open_data("zoo:pydoc", model).evaluation.inputs.dtype == torch.int64


def test_text_needs_a_tokenizer(home, net):
    with pytest.raises(DataError, match="needs a tokenizer"):
        open_data(str(home / "text.txt"), net)


@pytest.mark.parametrize(
    ("spec", "kind", "words"),
    [
        ("zoo:pydocs", UnknownNameError, "did you mean pydoc"),
        ("pydoc", UnknownNameError, "did you mean zoo:pydoc"),
        ("", (UnknownNameError, DataError), "."),
        ("nowhere.txt", DataError, "does not exist"),
        ("nowhere/nothing.parquet", DataError, "does not exist"),
        ("./nowhere", DataError, "does not exist"),
        ("/nowhere/at/all", DataError, "does not exist"),
        ("a/b/c", UnknownNameError, "unknown data set"),
    ],
)
def test_names_that_lead_nowhere(lm, spec, kind, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind, match=words):
        open_data(spec, lm)


def test_the_model_writes_its_own_calibration_data(home, lm):
    spec = str(home / "text.txt")
    text = open_data(spec, lm, seed=3, samples=6)
    own = open_data(f"{spec}?generated=5", lm, seed=3, samples=6)
    assert own.calibration.inputs.shape == (6, WINDOW)
    assert torch.equal(own.calibration.inputs[:, :5], text.calibration.inputs[:, :5])
    assert not torch.equal(own.calibration.inputs[:, 5:], text.calibration.inputs[:, 5:])
    assert torch.equal(own.evaluation.inputs, text.evaluation.inputs)  # measured on the text
    assert "by the model after 5 tokens" in own.calibration.name
    assert own.evaluation.name == spec
    again, other = (open_data(f"{spec}?length={WINDOW}&generated=5", lm, seed, samples=6) for seed in (3, 4))
    assert torch.equal(own.calibration.inputs, again.calibration.inputs)
    assert not torch.equal(own.calibration.inputs, other.calibration.inputs)
    expected = generated_windows(lm.model, 6, WINDOW, seed=3, start=text.calibration.inputs[:, :5])
    assert torch.equal(own.calibration.inputs, expected.inputs)


def test_a_zoo_model_writes_its_own_calibration_data():
    opened = open_model("zoo:skills-llama")
    found = open_data("zoo:skills?generated=12", opened, samples=4)
    text = open_data("zoo:skills", opened, samples=4)
    assert torch.equal(found.calibration.inputs[:, :12], text.calibration.inputs[:, :12])
    assert not torch.equal(found.calibration.inputs, text.calibration.inputs)
    assert torch.equal(found.evaluation.inputs, text.evaluation.inputs)


def test_generated_data_need_a_model_with_weights_and_text(home, lm, net):
    spec = str(home / "text.txt")
    with torch.device("meta"):
        outline = replace(lm, model=type(lm.model)(lm.model.config))
    with pytest.raises(SettingsError, match=r"its weights must be in memory; .* without --stream"):
        open_data(f"{spec}?generated=5", outline)
    with pytest.raises(DataError, match="holds images; generated=5 is for text"):
        open_data(f"{home / 'images'}?generated=5", net)
    with pytest.raises(DataError, match="windows of 24 tokens; generated=24 leaves nothing"):
        open_data(f"{spec}?generated=24", lm)
    for wrong in ("0", "-1", "all", ""):
        with pytest.raises(DataError, match=f"'generated' of '.*text.txt' cannot be '{wrong}'"):
            open_data(f"{spec}?generated={wrong}", lm)


@pytest.mark.parametrize(
    ("spec", "rest", "start"),
    [
        ("a.txt", "a.txt", None),
        ("a.txt?length=4", "a.txt?length=4", None),
        ("a.txt?generated=3", "a.txt", 3),
        ("a.txt?generated=3&length=4", "a.txt?length=4", 3),
        ("a/b?config=c&generated=3&limit=1", "a/b?config=c&limit=1", 3),
    ],
)
def test_the_text_behind_generated_data(spec, rest, start):
    assert split_generated(spec) == (rest, start)


def test_hub_without_network(lm, monkeypatch):
    import socket

    def refuse(*args, **kwargs):
        raise AssertionError("the network was touched")

    pytest.importorskip("datasets")
    monkeypatch.setattr(socket.socket, "connect", refuse)
    with pytest.raises(DataError, match="cannot load 'nobody/no-such-data' from the hub") as caught:
        open_data("nobody/no-such-data", lm)
    assert "\n" not in str(caught.value)


def test_hub_is_asked_for_ids_only(home, lm, monkeypatch):
    asked = []
    monkeypatch.setattr("secateur.io.data.open_hub", lambda spec, *rest: asked.append(spec) or 1 / 0)
    open_data(str(home / "text.txt"), lm)
    assert asked == []
    with pytest.raises(ZeroDivisionError):
        open_data("Salesforce/wikitext?config=wikitext-2-raw-v1", lm)
    assert asked == ["Salesforce/wikitext?config=wikitext-2-raw-v1"]
