import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from secateur.core.errors import ModelError
from secateur.core.shards import DTYPES, read_header, read_rows, read_tensor, shapes_of, write_shard

FLOATS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]


def random(shape, dtype, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (torch.rand(shape, generator=rng) * 4 - 2).to(dtype)


@settings(deadline=None, max_examples=40)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtypes=st.lists(st.sampled_from(FLOATS), min_size=6, max_size=6),
)
def test_the_safetensors_library_reads_what_was_written(tmp_path_factory, shapes, dtypes):
    file = tmp_path_factory.mktemp("shards") / "a.safetensors"
    tensors = {f"t{i}.x": random(shape, dtype, i) for i, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))}
    backwards = reversed(tensors.items())
    assert write_shard(file, shapes_of(tensors), backwards) == sum(t.numel() * t.itemsize for t in tensors.values())
    loaded = load_file(file)
    assert loaded.keys() == tensors.keys()
    for name, value in tensors.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
        assert torch.equal(read_tensor(read_header(file)[name]), value)


def test_what_the_library_wrote_is_read_and_memory_is_its_own(tmp_path):
    file = tmp_path / "a.safetensors"
    tensors = {"w": random((7, 3), torch.bfloat16), "b": random((3,), torch.float32)}
    save_file(tensors, file, {"format": "pt"})
    header = read_header(file)
    assert header["w"].shape == (7, 3)
    assert header["w"].bytes == 42
    value = read_tensor(header["w"])
    value.fill_(0)
    assert torch.equal(read_tensor(header["w"]), tensors["w"])
    rows = torch.tensor([0, 2, 6])
    assert torch.equal(read_rows(header["w"], rows), tensors["w"][rows])


def test_same_tensors_same_bytes_in_any_order(tmp_path):
    tensors = {"w": random((7, 3), torch.bfloat16), "b": random((3,), torch.float32), "c": random((1,), torch.int64)}
    write_shard(tmp_path / "a", shapes_of(tensors), iter(tensors.items()))
    flipped = dict(reversed(tensors.items()))
    write_shard(tmp_path / "b", shapes_of(flipped), iter(flipped.items()))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ([("a", torch.zeros(2))], "'b' did not come"),
        ([("a", torch.zeros(3)), ("b", torch.zeros(1))], "'a' is torch.float32"),
        ([("a", torch.zeros(2)), ("b", torch.zeros(1)), ("c", torch.zeros(1))], "c"),
    ],
)
def test_a_broken_promise_leaves_no_file(tmp_path, given, match):
    shapes = {"a": (torch.float32, (2,)), "b": (torch.float32, (1,))}
    with pytest.raises((ValueError, KeyError), match=match):
        write_shard(tmp_path / "x.safetensors", shapes, iter(given))
    assert not (tmp_path / "x.safetensors").exists()


def damaged(tmp_path, kind):
    file = tmp_path / "a.safetensors"
    if kind == "missing":
        return file
    save_file({"w": torch.ones(64)}, file)
    content = file.read_bytes()
    match kind:
        case "cut":
            content = content[:-40]
        case "empty":
            content = b""
        case "header":
            content = content[:12] + b"\x00" + content[13:]
        case "long":
            content = struct.pack("<Q", 1 << 60) + content[8:]
        case "dtype":
            text = json.dumps({"w": {"dtype": "X9", "shape": [1], "data_offsets": [0, 4]}}).encode()
            content = struct.pack("<Q", len(text)) + text + bytes(4)
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("kind", ["missing", "cut", "empty", "header", "long", "dtype"])
def test_damaged_files_are_refused_by_name(tmp_path, kind):
    with pytest.raises(ModelError, match=r"a\.safetensors"):
        read_header(damaged(tmp_path, kind))


def test_a_file_that_shrinks_later_is_noticed(tmp_path):
    file = tmp_path / "a.safetensors"
    save_file({"w": torch.ones(64)}, file)
    entry = read_header(file)["w"]
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="shorter than its header says"):
        read_tensor(entry)


def test_every_dtype_has_one_name():
    assert len(set(DTYPES.values())) == len(DTYPES)
