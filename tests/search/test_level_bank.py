"""The supernet's bank: what is written comes back, in memory and on disk; sizes, room, damage, clean-up."""

from __future__ import annotations

import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from secateur.core.errors import OutputError, PlanError
from secateur.search.levels import LevelBank, Variant, bank_bytes, in_words


def variant(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    weight, columns = torch.randn(5, 12, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 3, 4, 11])
    kept = torch.zeros(5, 12)
    kept[:, columns] = weight[:, columns]
    return kept.to(dtype), columns


@pytest.fixture(params=["memory", "disk"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> LevelBank:
    return LevelBank(tmp_path / "bank" if request.param == "disk" else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_matrices_come_back_bit_for_bit(bank: LevelBank, dtype: torch.dtype) -> None:
    weight, columns = variant(dtype)
    bank.write("model.layers.0:head", -2, weight, columns)
    bank.write("model.layers.0:head", 1, weight * 0, columns[:0])
    found = bank.read("model.layers.0:head", -2, 12)
    assert found.dtype == dtype
    assert torch.equal(found, weight)
    assert torch.equal(bank.read("model.layers.0:head", 1, 12), weight * 0)


def test_a_level_can_be_written_again(bank: LevelBank) -> None:
    weight, columns = variant()
    for factor in (1, 2):
        bank.write("a", 0, weight * factor, columns)
    assert torch.equal(bank.read("a", 0, 12), weight * 2)


def test_size_is_known_before_and_room_is_asked_for(
    bank: LevelBank, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, columns = torch.ones(64, 300), torch.arange(200)
    expected = bank_bytes([Variant(64, 200, 4)] * 3)
    for level in range(3):
        bank.write("a", level, weight, columns)
    assert 0.99 * expected < bank.bytes <= expected
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(0, 0, 1000))
    if bank.folder is None:
        bank.require(10**15)
        return
    bank.require(bank.bytes + 1000)  # what is there already counts
    with pytest.raises(OutputError, match=r"needs 931\.3 GiB in .*, and 1\d\d\.?\d* KiB are free"):
        bank.require(10**12)


def test_dropped_banks_leave_nothing(bank: LevelBank) -> None:
    weight, columns = variant()
    bank.write("a", 0, weight, columns)
    bank.drop()
    assert bank.bytes == 0
    assert bank.folder is None or not bank.folder.exists()
    bank.drop()
    with pytest.raises(PlanError, match=r"level 0 of 'a'|missing or damaged"):
        bank.read("a", 0, 12)


def test_another_run_finds_what_is_on_disk_and_names_what_is_damaged(tmp_path: Path) -> None:
    weight, columns = variant()
    LevelBank(tmp_path).write("a", 0, weight, columns)
    again = LevelBank(tmp_path)
    assert torch.equal(again.read("a", 0, 12), weight)
    (path,) = tmp_path.iterdir()  # no temporary file is left
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(PlanError, match="missing or damaged"):
        again.read("a", 0, 12)


@pytest.mark.parametrize(("size", "words"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**40, "3 TiB")])
def test_bytes_in_words(size: int, words: str) -> None:
    assert in_words(size) == words
