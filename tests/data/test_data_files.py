"""Files and folders: what each kind gives, how options are read, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from data_samples import Characters, colour, grey, numbered, write_parquet

from secateur.core.errors import DataError, MissingExtraError, SecateurError, UnknownNameError
from secateur.data.dataset import DataKind, Dataset
from secateur.data.files import Options, open_file, parse_spec, read_documents
from secateur.data.images import ImageOptions


def values(dataset: Dataset) -> list[int]:
    return [round(value * 255) for value in dataset.inputs[:, 0, 0, 0].tolist()]


def folder(path: Path, classes: dict[str, list[int]]) -> Path:
    for name, pixels in classes.items():
        (path / name).mkdir(parents=True)
        for value in pixels:
            (path / name / f"{value:03d}.png").write_bytes(grey(value))
    return path


def test_options_after_the_question_mark() -> None:
    defaults = Options(length=64, images=ImageOptions(channels=3))
    spec = "a/b.parquet?mean=0.485,0.456,0.406&std=0.5&size=32&limit=2000&samples=9"
    path, options = parse_spec(spec, defaults)
    assert path == "a/b.parquet"
    assert options == Options(64, 9, 2000, ImageOptions(32, 3, (0.485, 0.456, 0.406), (0.5,)))
    assert parse_spec("a.txt", defaults) == ("a.txt", defaults)
    assert parse_spec("a.txt?", defaults) == ("a.txt", defaults)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("limit=many", "'limit' of 'x.txt' cannot be 'many'"),
        ("mean=0.1,,0.2", "'mean' of 'x.txt' cannot be '0.1,,0.2'"),
        ("size", "'size' of 'x.txt' cannot be ''"),
        ("limit=0", "'limit' must be 1 or more"),
        ("samples=-1", "'samples' must be 1 or more"),
        ("channels=2", "1 or 3 channels"),
    ],
)
def test_bad_values_of_options(query: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_spec(f"x.txt?{query}", Options())


def test_unknown_option_gives_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="unknown data option 'lenght'; did you mean length"):
        parse_spec("x.txt?lenght=3", Options())


def test_a_file_name_may_hold_a_question_mark(tmp_path: Path) -> None:
    (tmp_path / "what?.txt").write_text("x")
    with pytest.raises(DataError, match="holds 1 tokens"):
        open_file(str(tmp_path / "what?.txt"), Characters())


def test_plain_text_is_one_document(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffe\u0301t\u00e9\n\nend".encode())
    assert read_documents(path) == ["e\u0301t\u00e9\n\nend"]
    path.write_bytes(b"abc\xff")
    with pytest.raises(DataError, match="not UTF-8 text: bad byte at position 3"):
        read_documents(path)


def test_json_lines_give_one_document_a_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "one\ntwo", "id": 3}) + "\n\n" + json.dumps({"text": "é"}) + "\n")
    assert read_documents(path) == ["one\ntwo", "é"]


@pytest.mark.parametrize("line", ["{", "[]", '"text"', '{"txt": "a"}', '{"text": 3}', "\\xff", "[" * 100_000])
def test_bad_json_lines_are_numbered(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl' line 3 (is not JSON|has no text in 'text')"):
        read_documents(path)


def test_parquet_text_gives_one_document_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"id": [1, 2, 3], "text": ["one", "", "three"]}), path, row_group_size=2)
    assert read_documents(path) == ["one", "", "three"]
    pq.write_table(pa.table({"text": ["one", "two", None]}), path, row_group_size=2)
    with pytest.raises(DataError, match=r"a\.parquet' row 2 has no text"):
        read_documents(path)
    pq.write_table(pa.table({"body": ["one"]}), path)
    with pytest.raises(DataError, match=r"has the columns body; it needs 'text'"):
        read_documents(path)


def test_unknown_kinds_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(DataError, match=r"a\.csv' is of no known kind"):
        open_file(str(tmp_path / "a.csv"), Characters())
    with pytest.raises(DataError, match=r"gone\.txt' does not exist"):
        open_file(str(tmp_path / "gone.txt") + "?length=4", Characters())
    with pytest.raises(DataError, match=r"cannot read .*: No such file"):
        read_documents(tmp_path / "gone.txt")


def test_text_file_opens_as_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(numbered(2000))
    splits = open_file(f"{path}?length=16&samples=5&limit=3", Characters(), seed=1)
    assert splits.calibration.inputs.shape == (5, 16)
    assert splits.evaluation.inputs.shape == (3, 16)
    assert splits.calibration.name == str(path)
    assert len(open_file(str(path), Characters(), options=Options(length=16)).calibration) == 128
    with pytest.raises(DataError, match="is text and needs a tokenizer"):
        open_file(str(path))


@pytest.mark.parametrize(("first", "second"), [("train", "test"), ("train", "validation"), ("valid", "test")])
def test_folder_with_two_texts_calibrates_on_one_and_measures_on_the_other(
    tmp_path: Path, first: str, second: str
) -> None:
    (tmp_path / f"{first}.jsonl").write_text(json.dumps({"text": "a" * 50}))
    (tmp_path / f"{second}.jsonl").write_text(json.dumps({"text": "b" * 50}))
    splits = open_file(str(tmp_path), Characters(), options=Options(length=10))
    assert splits.calibration.inputs.unique().tolist() == [ord("a")]
    assert splits.evaluation.inputs.unique().tolist() == [ord("b")]
    assert len(splits.evaluation) == 5


def test_folder_with_one_text_holds_a_part_of_it_out(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text(numbered(100))
    splits = open_file(str(tmp_path), Characters(), options=Options(length=10))
    assert splits.calibration.inputs.max() < splits.evaluation.inputs.min() == 0x4E00 + 90


@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label"), ("image", "labels")])
def test_parquet_images_with_class_names(tmp_path: Path, columns: tuple[str, str]) -> None:
    images = [colour(i) for i in range(10)]
    path = write_parquet(tmp_path / "a.parquet", images, [i % 2 for i in range(10)], columns, ["even", "odd"])
    splits = open_file(str(path))
    for part in (splits.calibration, splits.evaluation):
        assert part.kind is DataKind.IMAGE
        assert part.classes == ("even", "odd")
        assert part.targets is not None
        assert part.targets.tolist() == [value % 2 for value in values(part)]
    assert sorted(values(splits.calibration) + values(splits.evaluation)) == list(range(10))


def test_parquet_of_raw_bytes_and_without_metadata(tmp_path: Path) -> None:
    pq.write_table(pa.table({"image": [grey(5), grey(6)], "label": [7, 1]}), tmp_path / "a.parquet")
    splits = open_file(str(tmp_path / "a.parquet"))
    assert splits.calibration.classes == ()
    assert sorted(values(splits.calibration) + values(splits.evaluation)) == [5, 6]


def test_parquet_folder_gives_both_parts(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train.parquet", [grey(i) for i in range(10)], [0] * 10)
    write_parquet(tmp_path / "test.parquet", [grey(100 + i) for i in range(4)], [0] * 4)
    splits = open_file(f"{tmp_path}?samples=6&mean=0.5&std=0.5")
    assert len(splits.calibration) == 6
    assert torch.allclose(splits.evaluation.inputs[:, 0, 0, 0], (torch.arange(100, 104) / 255 - 0.5) / 0.5)
    assert splits.evaluation.name == str(tmp_path)


def test_only_the_row_groups_and_rows_needed_are_read(tmp_path: Path) -> None:
    # every image but those drawn is damaged: reading one more than needed would fail
    sound = write_parquet(tmp_path / "a.parquet", [grey(i) for i in range(60)], [0] * 60, group=7)
    drawn = open_file(f"{sound}?limit=10", seed=4)
    kept = {*values(drawn.calibration), *values(drawn.evaluation)}
    damaged = [grey(i) if i in kept else b"damaged" for i in range(60)]
    write_parquet(sound, damaged, [0] * 60, group=11)
    again = open_file(f"{sound}?limit=10", seed=4)
    assert again.calibration.digest == drawn.calibration.digest
    with pytest.raises(DataError, match=r"a\.parquet' row \d+ is not a readable image"):
        open_file(str(sound))


def test_parquet_rows_are_named(tmp_path: Path) -> None:
    images = [grey(i) for i in range(10)]
    path = write_parquet(tmp_path / "a.parquet", [*images[:8], b"bad", images[9]], [0] * 10)
    with pytest.raises(DataError, match=r"a\.parquet' row 8 is not a readable image"):
        open_file(str(path))
    write_parquet(path, [*images[:4], {"bytes": None, "path": "x.png"}, *images[5:]], [0] * 10)
    with pytest.raises(DataError, match="row 4 does not hold the bytes of an image"):
        open_file(str(path))
    write_parquet(path, images, [0] * 6 + [None] * 4)
    with pytest.raises(DataError, match=r"row [6-9] has the label None"):
        open_file(str(path))


def test_parquet_without_the_columns_needed(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"picture": [b""], "label": [0]}), path)
    with pytest.raises(DataError, match="has the columns picture, label; it needs 'text', or image or img with label"):
        open_file(str(path))
    pq.write_table(pa.table({"image": [b""], "class": [0]}), path)
    with pytest.raises(DataError, match="has the columns image, class"):
        open_file(str(path))


def test_parquet_with_metadata_that_is_no_json(tmp_path: Path) -> None:
    table = pa.table({"image": [grey(1)], "label": [0]}).replace_schema_metadata({b"huggingface": b"{"})
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="metadata 'huggingface' that is not JSON"):
        open_file(str(tmp_path / "a.parquet"))


def test_damaged_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [grey(i) for i in range(10)], [0] * 10)
    content = path.read_bytes()
    # an empty file, one without its end, and one whose pages are overwritten
    for damaged in (b"", content[: len(content) // 2], content[:8] + b"\xff" * 300 + content[308:]):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.parquet'"):
            open_file(str(path))


def test_bytes_of_a_parquet_file_turned_one_by_one(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", [grey(i) for i in range(4)], [0] * 4, classes=["only"])
    content = path.read_bytes()
    failures = 0
    for place in range(0, len(content), 13):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            open_file(str(path))
        except SecateurError:
            failures += 1
    assert failures > 10


def test_image_folder(tmp_path: Path) -> None:
    folder(tmp_path, {"zebra": [20, 21, 22, 23], "ant": [10, 11, 12, 13], ".hidden": []})
    (tmp_path / "ant" / "notes.md").write_text("not an image")
    splits = open_file(str(tmp_path))
    assert splits.calibration.classes == ("ant", "zebra")
    for part in (splits.calibration, splits.evaluation):
        assert part.targets is not None
        assert part.targets.tolist() == [value // 20 for value in values(part)]
    assert sorted(values(splits.calibration) + values(splits.evaluation)) == [10, 11, 12, 13, 20, 21, 22, 23]


def test_image_folder_with_train_and_test_inside(tmp_path: Path) -> None:
    folder(tmp_path / "train", {"a": [1, 2], "b": [3]})
    folder(tmp_path / "val", {"a": [101], "b": [102]})
    splits = open_file(str(tmp_path))
    assert sorted(values(splits.calibration)) == [1, 2, 3]
    assert values(splits.evaluation) == [101, 102]
    assert splits.evaluation.classes == ("a", "b")


def test_image_folder_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no sub-folders"):
        open_file(str(tmp_path))
    folder(tmp_path, {"a": [1, 2], "b": []})
    with pytest.raises(DataError, match=r"b' holds no image"):
        open_file(str(tmp_path))
    (tmp_path / "b" / "x.jpg").write_bytes(b"not a jpeg")
    with pytest.raises(DataError, match=r"x\.jpg' is not a readable image"):
        open_file(str(tmp_path))
    (tmp_path / "b" / "x.jpg").write_bytes(grey(1, 9, 9))
    with pytest.raises(DataError, match=r"\.(png|jpg)' has \dx\d pixels"):
        open_file(str(tmp_path))
    assert open_file(f"{tmp_path}?size=5").calibration.inputs.shape == (2, 1, 5, 5)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet", [grey(1)], [0])
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(MissingExtraError, match=r"parquet files needs the package 'pyarrow': .*secateur\[data\]"):
        open_file(str(path))


def test_importing_the_room_does_not_import_the_extras() -> None:
    import subprocess

    code = "import sys, secateur.data.hub; print([m for m in ('pyarrow', 'PIL', 'datasets') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
