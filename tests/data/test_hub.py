"""Hub data sets, with the library's `load_dataset` replaced: no network is touched."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from data_samples import Characters, colour, grey, numbered

from secateur.core.errors import DataError, MissingExtraError, UnknownNameError
from secateur.data.files import Options
from secateur.data.hub import open_hub


class Hub:
    """Stands in for `datasets.load_dataset`; remembers its calls."""

    def __init__(self, **splits: datasets.Dataset) -> None:
        self.splits = splits
        self.calls: list[tuple[str, str | None, str | None, bool]] = []

    def __call__(self, path: str, name: str | None = None, split: str | None = None, streaming: bool = False) -> Any:
        self.calls.append((path, name, split, streaming))
        if streaming:
            return datasets.IterableDatasetDict(
                {
                    key: part if isinstance(part, datasets.IterableDataset) else part.to_iterable_dataset()
                    for key, part in self.splits.items()
                }
            )
        assert split is not None
        return self.splits[split]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(**splits: datasets.Dataset) -> Hub:
        stand_in = Hub(**splits)
        monkeypatch.setattr(datasets, "load_dataset", stand_in)
        return stand_in

    return install


def texts(*documents: str) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"text": list(documents)})


def pictures(values: list[int], column: str = "image", label: str = "label") -> datasets.Dataset:
    features = datasets.Features({column: datasets.Image(), label: datasets.ClassLabel(names=["even", "odd"])})
    rows = {column: [{"bytes": colour(v), "path": None} for v in values], label: [v % 2 for v in values]}
    return datasets.Dataset.from_dict(rows, features=features)


def test_text_is_streamed_with_its_configuration(hub: Any) -> None:
    calls = hub(test=texts("b" * 100), train=texts("a" * 100)).calls
    splits = open_hub("some/corpus?config=raw&length=10&samples=3", Characters())
    assert calls == [("some/corpus", "raw", None, True)]
    assert splits.calibration.inputs.unique().tolist() == [ord("a")]
    assert splits.calibration.inputs.shape == (3, 10)
    assert splits.evaluation.inputs.unique().tolist() == [ord("b")]
    assert splits.calibration.name == "some/corpus (1 different windows of 3)"


def test_only_the_start_of_an_endless_stream_is_read(hub: Any) -> None:
    read = 0

    def endless() -> Iterator[dict[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield {"text": "word " * 20}

    stream = datasets.IterableDataset.from_generator(endless)
    hub(train=stream, validation=stream)
    splits = open_hub("some/corpus?length=50&samples=4", Characters())
    assert splits.calibration.inputs.shape == (4, 50)
    assert len(splits.evaluation) == 256
    assert read < (4 + 256) * 50 * 16 / 100 + 10


def test_a_single_split_is_divided(hub: Any) -> None:
    hub(everything=texts(numbered(400)))
    splits = open_hub("some/corpus", Characters(), options=Options(length=20))
    assert splits.calibration.inputs.max() < splits.evaluation.inputs.min()


def test_images_with_their_class_names(hub: Any) -> None:
    stand_in = hub(train=pictures(list(range(10)), "img"), test=pictures([100, 101, 102], "img"))
    splits = open_hub("some/pictures?samples=6&size=2")
    assert [call[2:] for call in stand_in.calls] == [(None, True), ("train", False), ("test", False)]
    assert splits.calibration.inputs.shape == (6, 3, 2, 2)
    assert splits.calibration.classes == ("even", "odd")
    assert (splits.evaluation.inputs[:, 0, 0, 0] * 255).round().tolist() == [100, 101, 102]
    assert splits.evaluation.targets is not None
    assert splits.evaluation.targets.tolist() == [0, 1, 0]


def test_images_kept_as_files_in_the_cache(hub: Any, tmp_path: Path) -> None:
    paths = [tmp_path / f"{value}.png" for value in (1, 2)]
    for path in paths:
        path.write_bytes(grey(int(path.stem)))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"image": [str(path) for path in paths], "label": [5, 6]}
    hub(train=datasets.Dataset.from_dict(rows, features=features))
    splits = open_hub("some/pictures")
    assert splits.calibration.classes == ()
    assert splits.calibration.targets is not None
    assert splits.calibration.targets.item() == 4 + round(splits.calibration.inputs[0, 0, 0, 0].item() * 255)
    paths[0].unlink()
    paths[1].unlink()
    with pytest.raises(DataError, match=r"cannot load 'some/pictures' from the hub: .*No such file"):
        open_hub("some/pictures")


def test_conversations_are_streamed_too(hub: Any) -> None:
    rows = datasets.Dataset.from_dict({"question": ["q" * 40] * 3, "answer": ["a" * 40] * 3, "id": [1, 2, 3]})
    stand_in = hub(train=rows, test=rows)
    splits = open_hub("some/chats?length=20&samples=4", Characters())
    assert stand_in.calls == [("some/chats", None, None, True)]
    document = f"Question: {'q' * 40}\nAnswer: {'a' * 40}"
    assert "".join(map(chr, splits.evaluation.inputs[:3].flatten().tolist())) == document[:60]
    chats = [[{"role": "user", "content": "u" * 60}]]
    hub(train=datasets.Dataset.from_dict({"messages": chats, "text": ["t" * 60]}), test=rows)
    plain, chat = (open_hub(f"some/chats?length=20&samples=9{more}", Characters()) for more in ("", "&chat=1"))
    assert plain.calibration.inputs.unique().tolist() == [ord("t")]
    assert ord("u") in chat.calibration.inputs.unique().tolist()
    hub(train=datasets.Dataset.from_dict({"messages": [[{"role": "user", "content": "x"}], []]}))
    with pytest.raises(
        DataError, match="row 1 of the hub data set 'a/b': 'messages' is no list of messages, or an empty"
    ):
        open_hub("a/b", Characters())


def test_unsuitable_columns_and_splits(hub: Any) -> None:
    hub(train=datasets.Dataset.from_dict({"question": ["a"], "label": [1]}))
    with pytest.raises(DataError, match="'a/b' has the columns question, label; it needs 'text', or image or img"):
        open_hub("a/b", Characters())
    hub()
    with pytest.raises(DataError, match="'a/b' has no splits"):
        open_hub("a/b", Characters())
    hub(train=datasets.Dataset.from_dict({"text": [None, 3]}))
    with pytest.raises(DataError, match="row 0 of the hub data set 'a/b' has no text"):
        open_hub("a/b", Characters())


def test_text_needs_a_tokenizer(hub: Any) -> None:
    hub(train=texts("a"))
    with pytest.raises(DataError, match="'a/b' is text and needs a tokenizer"):
        open_hub("a/b")


def test_any_failure_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'a/b' on the Hub.\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(DataError) as caught:
        open_hub("a/b", Characters())
    assert str(caught.value) == (
        "cannot load 'a/b' from the hub: Couldn't reach 'a/b' on the Hub; "
        "check the id and the network, or give a local file"
    )
    assert isinstance(caught.value.__cause__, ConnectionError)


def test_ctrl_c_stays_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(datasets, "load_dataset", interrupted)
    with pytest.raises(KeyboardInterrupt):
        open_hub("a/b", Characters())


def test_unknown_option(hub: Any) -> None:
    hub(train=texts("a"))
    with pytest.raises(UnknownNameError, match="unknown data option 'confg'; did you mean config"):
        open_hub("a/b?confg=raw", Characters())


def test_without_the_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingExtraError, match=r"the package 'datasets': .*secateur\[data\]"):
        open_hub("a/b", Characters())
