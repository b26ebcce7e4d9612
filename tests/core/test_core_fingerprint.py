import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.fingerprint import data_digest, describe, digests, mismatches, tensor_digest

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(DTYPES), st.lists(st.integers(1, 5), min_size=0, max_size=3), st.data())
def test_any_single_element_decides(dtype, shape, data):
    tensor = (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 3).to(dtype)
    other = tensor.clone().reshape(-1)
    index = data.draw(st.integers(0, other.numel() - 1))
    other[index] = ~other[index] if dtype is torch.bool else other[index] + 1
    assert tensor_digest(tensor) == tensor_digest(tensor.clone())
    assert tensor_digest(tensor) != tensor_digest(other.view(tensor.shape))


def test_the_smallest_changes_count():
    one = torch.ones(2, 3)
    assert tensor_digest(one) != tensor_digest(one.clone().index_put_((torch.tensor(1),), torch.tensor(1 + 1.2e-7)))
    assert tensor_digest(torch.zeros(1)) != tensor_digest(-torch.zeros(1))


@pytest.mark.parametrize("other", [torch.zeros(3, 2), torch.zeros(6), torch.zeros(2, 3, dtype=torch.int32)])
def test_equal_bytes_of_another_shape_or_type_differ(other):
    this = torch.zeros(2, 3)
    assert tensor_digest(this) == tensor_digest(other)  # the bytes alone say nothing about the shape
    assert digests({"w": this}) != digests({"w": other})
    assert data_digest([this]) != data_digest([other])
    assert list(mismatches({"w": other}, digests({"w": this}), {})) == [
        ("w", f"is {describe(other)}, planned on float32[2, 3]")
    ]


def test_order_and_number_of_tensors_decide_over_data():
    a, b = torch.zeros(2), torch.ones(2)
    found = {data_digest(items) for items in ([a, b], [b, a], [a], [b], [a, a], [], [torch.cat([a, b])])}
    assert len(found) == 7


def test_views_and_empty_tensors():
    matrix = torch.arange(12.0).view(3, 4)
    assert tensor_digest(matrix.t()) == tensor_digest(matrix.t().contiguous()) != tensor_digest(matrix)
    assert tensor_digest(matrix[:, ::2]) == tensor_digest(matrix[:, ::2].clone())
    assert describe(torch.zeros(0, 3)) == "float32[0, 3]"
    assert tensor_digest(torch.zeros(0, 3)) == tensor_digest(torch.zeros(3, 0))
    assert tensor_digest(torch.nn.Parameter(matrix)) == tensor_digest(matrix)


def test_names_are_sorted_and_the_words_are_stable():
    found = digests({"b": torch.zeros(2, dtype=torch.bfloat16), "a": torch.zeros(())})
    assert list(found) == ["a", "b"]
    assert found["b"].startswith("bfloat16[2] ")
    assert found["a"].startswith("float32[] ")
    assert len(found["a"].rpartition(" ")[2]) == 16


def test_mismatches_name_what_differs():
    planned = {"a": torch.zeros(2), "b": torch.ones(2)}
    expected = digests(planned)
    pruned = digests({"a": torch.tensor([0.0, 5.0])})
    assert list(mismatches(planned, expected, {})) == []
    assert list(mismatches({**planned, "a": torch.tensor([0.0, 5.0])}, expected, pruned)) == []
    assert list(mismatches({**planned, "b": torch.tensor([0.0, 5.0])}, expected, pruned)) == [("b", "has other values")]
    assert list(mismatches({"a": planned["a"]}, expected, {})) == [("b", "is missing")]
    assert list(mismatches({**planned, "c": torch.zeros(1)}, expected, {})) == [("c", "is not in the planned model")]


def test_without_bytes_only_shape_and_type_are_compared():
    real = {"w": torch.rand(2, 3)}
    meta = {"w": torch.zeros(2, 3, device="meta")}
    assert digests(meta) == {"w": "float32[2, 3] meta"}
    assert list(mismatches(meta, digests(real), {})) == list(mismatches(real, digests(meta), {})) == []
    assert list(mismatches({"w": torch.zeros(3, 2, device="meta")}, digests(real), {})) != []
