import json
from enum import StrEnum

import pytest
import torch
from pydantic import Field, ValidationError
from torch import nn

from secateur.core.budget import Budget
from secateur.core.errors import SettingsError, UnknownNameError
from secateur.core.method import Batch, Settings, Task, configure, describe


class Mode(StrEnum):
    FAST = "fast"
    SLOW = "slow"


class Example(Settings):
    count: int = Field(3, ge=1, description="how many")
    ratio: float = Field(0.5, gt=0, le=1, description="how much")
    on: bool = Field(False, description="whether")
    mode: Mode = Field(Mode.FAST, description="which way")
    sizes: tuple[int, ...] = Field((1, 2), description="several")


class Required(Settings):
    must: int = Field(description="has no default")
    made: list[int] = Field(default_factory=lambda: [1], description="default made anew")


def test_defaults_and_conversions_from_text():
    assert configure("m", Example, {}) == Example()
    found = configure("m", Example, {"count": "7", "ratio": "1e-3", "on": "true", "mode": "slow"})
    assert found == Example(count=7, ratio=0.001, on=True, mode=Mode.SLOW)
    assert found.mode is Mode.SLOW
    assert configure("m", Example, {"on": "false"}).on is False


@pytest.mark.parametrize(
    ("values", "place", "got"),
    [
        ({"count": "many"}, "count", "'many'"),
        ({"count": 0}, "count", "0"),
        ({"count": 1.5}, "count", "1.5"),
        ({"ratio": "0"}, "ratio", "'0'"),
        ({"ratio": 1.1}, "ratio", "1.1"),
        ({"on": "perhaps"}, "on", "'perhaps'"),
        ({"mode": "quick"}, "mode", "'quick'"),
        ({"sizes": (1, "x")}, r"sizes\.1", "'x'"),
    ],
)
def test_wrong_values_name_setting_owner_and_value(values, place, got):
    with pytest.raises(SettingsError, match=f"^setting '{place}' of wanda: .*, got {got}$"):
        configure("wanda", Example, values)


def test_missing_and_unknown_settings():
    with pytest.raises(SettingsError, match="setting 'must' of m: Field required"):
        configure("m", Required, {})
    with pytest.raises(UnknownNameError, match="unknown setting of wanda 'coutn'; did you mean count"):
        configure("wanda", Example, {"coutn": 1})


def test_settings_are_frozen_and_closed():
    made = Example()
    with pytest.raises(ValidationError):
        made.count = 5
    with pytest.raises(ValidationError):
        Example(other=1)


def test_descriptions_are_plain_data():
    rows = {row["name"]: row for row in describe(Example)}
    assert list(rows) == ["count", "ratio", "on", "mode", "sizes"]
    assert rows["count"] == {"name": "count", "type": "int", "default": 3, "help": "how many"}
    assert rows["mode"]["type"] == "Mode"
    required = {row["name"]: row["default"] for row in describe(Required)}
    assert json.loads(json.dumps(required)) == {"must": None, "made": [1]}


def task(include=("*",), exclude=(), seed=0):
    return Task(nn.Linear(1, 1), Budget(0.5), include=include, exclude=exclude, seed=seed)


@pytest.mark.parametrize(
    ("include", "exclude", "name", "wanted"),
    [
        (("*",), (), "layers.0.fc.weight", True),
        (("layers.0",), (), "layers.0.fc.weight", True),  # the whole subtree
        (("layers.0",), (), "layers.01.fc.weight", False),  # no mere prefix of the text
        (("layers.1",), (), "layers.10.fc.weight", False),
        (("layers.0.fc.weight",), (), "layers.0.fc.weight", True),
        (("layers.0.fc.weight",), (), "layers.0.fc", False),
        (("*.fc",), (), "layers.0.fc.weight", True),
        (("fc",), (), "layers.0.fc.weight", False),  # patterns start at the root
        (("layers.[01]",), (), "layers.1.fc.weight", True),
        (("layers.?",), (), "layers.10.fc.weight", False),
        (("*",), ("layers.0",), "layers.0.fc.weight", False),
        (("*",), ("layers.0",), "layers.1.fc.weight", True),
        (("layers.0.fc.weight",), ("layers",), "layers.0.fc.weight", False),  # exclude wins, however broad
        (("layers.0", "head"), (), "head.weight", True),
        (("Layers.0",), (), "layers.0.fc.weight", False),  # case matters on every system
        ((), (), "head.weight", False),
        (("*",), ("*",), "head.weight", False),
        (("*",), ("*norm*", "head"), "head.weight", False),
    ],
)
def test_wants(include, exclude, name, wanted):
    assert task(include, exclude).wants(name) is wanted


def test_rng_is_one_stream_per_purpose_and_seed():
    drawn = [torch.rand(3, generator=task(seed=s).rng(*p)).tolist() for s, p in [(0, "a"), (0, "b"), (1, "a")]]
    assert drawn[0] != drawn[1] != drawn[2] != drawn[0]
    assert torch.rand(3, generator=task(seed=0).rng("a")).tolist() == drawn[0]


def test_batches_know_their_tensors_and_samples():
    a, b, c, target = torch.zeros(4, 2), torch.ones(4), torch.zeros(4, 3), torch.zeros(4)
    batch = Batch((a, "text"), {"z": b, "flag": True, "m": c}, target)
    assert [id(tensor) for tensor in batch.tensors] == [id(a), id(c), id(b), id(target)]
    assert batch.samples == 4
    assert Batch(kwargs={"x": torch.zeros(2, 9)}).samples == 2
    moved = batch.to("meta")
    assert {tensor.device.type for tensor in moved.tensors} == {"meta"}
    assert moved.args[1] == "text"
    assert moved.kwargs["flag"] is True
    assert batch.tensors[0].device.type == "cpu"
