import pytest
import torch

from secateur.core.errors import PlanError
from secateur.core.journal import Journal, Notes, overlaid, write_tensors


def notes(seed, **more):
    rng = torch.Generator().manual_seed(seed)
    tensors = {"mask/w": torch.rand(5, 3, generator=rng) > 0.5, "scores/w": torch.rand(4, generator=rng)}
    return Notes(tensors, {f"site{seed}": {"loss": seed / 7}}, [f"sentence {seed}"], **more)


def same(one, other):
    assert one.facts == other.facts
    assert one.warnings == other.warnings
    assert one.tensors.keys() == other.tensors.keys()
    for name in one.tensors:
        assert one.tensors[name].dtype == other.tensors[name].dtype
        assert torch.equal(one.tensors[name], other.tensors[name])


@pytest.mark.parametrize("on_disk", [False, True])
def test_notes_come_back_in_the_order_of_writing(tmp_path, on_disk):
    section = Journal(tmp_path / "j" if on_disk else None).section("walk")
    names = [f"layers.{i}" for i in (10, 2, 1)]
    for seed, name in enumerate(names):
        section.write(name, notes(seed))
    assert list(section) == names
    for seed, name in enumerate(names):
        same(section[name], notes(seed))
    assert section.warnings() == ["sentence 0", "sentence 1", "sentence 2"]
    assert section.facts() == {f"site{i}": {"loss": i / 7} for i in range(3)}
    assert "layers.3" not in section
    with pytest.raises(KeyError):
        section["layers.3"]


def test_another_run_finds_what_was_written_and_goes_on(tmp_path):
    Journal(tmp_path).section("walk").write("a.0", notes(0))
    section = Journal(tmp_path).section("walk")
    section.write("a.1", notes(1))
    again = Journal(tmp_path).section("walk")
    assert list(again) == ["a.0", "a.1"]
    same(again["a.0"], notes(0))
    again.write("a.0", notes(2))  # done again: the newer counts, at its old place
    assert list(Journal(tmp_path).section("walk")) == ["a.0", "a.1"]
    same(Journal(tmp_path).section("walk")["a.0"], notes(2))
    assert "a.0" not in Journal(tmp_path).section("other")


def test_masks_take_a_bit_per_entry(tmp_path):
    section = Journal(tmp_path).section("walk")
    section.write("x", Notes({"mask": torch.ones(800, 1000, dtype=torch.bool)}))
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.stat().st_size < 800 * 1000 / 8 + 1000


def test_half_written_notes_do_not_count(tmp_path):
    section = Journal(tmp_path).section("walk")
    section.write("x", notes(0))
    (file,) = tmp_path.rglob("*.safetensors")
    file.with_suffix(".tmp").write_bytes(file.read_bytes()[:50])
    assert list(Journal(tmp_path).section("walk")) == ["x"]
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(PlanError, match="damaged"):
        Journal(tmp_path).section("walk")["x"]


@pytest.mark.parametrize("spill", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_kept_bit_for_bit(tmp_path, spill, dtype):
    states = [torch.randn(2, 3, 4).to(dtype), torch.randn(1, 5).to(dtype), torch.empty(0, dtype=dtype)]
    section = Journal(tmp_path, spill=spill).section("walk")
    used = section.keep_state("b.1", states)
    again = Journal(tmp_path, spill=spill).section("walk").state("b.1")
    for found in (used, again):
        assert len(found) == 3
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(found, states, strict=True))
    assert (used is states) is not spill
    section.drop_state("b.1")
    assert section.state("b.1") is None
    assert not list(tmp_path.rglob("*.state*"))


def test_a_state_counts_only_when_it_is_whole(tmp_path):
    kept = write_tensors(tmp_path / "s", [torch.ones(100)])
    (tmp_path / "s").write_bytes(bytes(8))
    with pytest.raises(PlanError, match="shorter than it says"):
        kept[0]
    section = Journal(tmp_path).section("walk")
    (tmp_path / "walk" / "x.state").write_bytes(bytes(8))  # killed before its list was written
    assert section.state("x") is None


def test_groups_of_tensors_are_read_when_asked_for_and_can_be_overlaid(tmp_path):
    section = Journal(tmp_path).section("walk")
    section.write("a", Notes({"mask/p": torch.tensor([True, False]), "weight/p": torch.ones(2)}))
    section.write("b", Notes({"mask/q": torch.tensor([False])}))
    masks = section.tensors("mask")
    assert list(masks) == ["p", "q"]
    assert len(masks) == 2
    assert masks["q"].tolist() == [False]
    with pytest.raises(KeyError):
        masks["r"]
    both = overlaid(masks)
    both["r"] = torch.tensor([True])
    assert set(both) == {"p", "q", "r"}
    assert both["p"].tolist() == [True, False]
    assert "r" not in masks
