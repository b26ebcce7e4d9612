import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from secateur.core.errors import BudgetError, ModelError, NumericsError
from secateur.gates.binary import binary_gate, scores_from, through, top_gate, top_gates
from secateur.gates.checks import refuse_aliases, refuse_nan


def leaf(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, requires_grad=True)


def test_binary_gate_by_hand():
    p = leaf(0.2, 0.5, 0.5000001, 0.9)
    g = binary_gate(p)
    assert g.tolist() == [0, 0, 1, 1]
    (g * torch.tensor([3.0, -5.0, 7.0, 11.0])).sum().backward()
    assert p.grad.tolist() == [3, -5, 7, 11]  # the identity: every gate, open or not, on either side
    assert binary_gate(torch.tensor([-1.0, 0.1]), threshold=0.0).tolist() == [0, 1]


def test_the_gradient_of_a_gate_reaches_what_made_p():
    logit = leaf(0.0, 2.0)
    binary_gate(torch.sigmoid(logit)).sum().backward()
    s = torch.sigmoid(logit.detach())
    torch.testing.assert_close(logit.grad, s * (1 - s))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_open_gates_are_exactly_one_in_every_dtype(dtype):
    # hard - soft.detach() + soft is not: it leaves rounding errors in about a third of the gates
    p = torch.linspace(0, 1, 1001).to(dtype).requires_grad_()
    g = binary_gate(p)
    assert g.dtype == dtype
    assert torch.equal(g, (p > 0.5).to(dtype))
    g.sum().backward()
    assert torch.equal(p.grad, torch.ones_like(p))


def test_through_takes_value_gradient_and_slope_from_where_it_says():
    soft = leaf(0.3, 0.6)
    value = torch.tensor([5.0, 6.0])
    out = through(value, soft, torch.tensor([2.0, -1.0]))
    assert out.tolist() == [5, 6]
    out.backward(torch.tensor([10.0, 10.0]))
    assert soft.grad.tolist() == [20, -10]
    with torch.no_grad():
        out += 1
    assert value.tolist() == [5, 6]  # the forward value is a copy


@settings(deadline=None, max_examples=100)
@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, 2.0, float("inf")]), min_size=1, max_size=12), st.data())
def test_top_gate_counts_are_exact_with_ties_and_infinities(values, data):
    keep = data.draw(st.integers(0, len(values)))
    scores = leaf(*values)
    gate = top_gate(scores, keep)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))  # among equals the lower index goes first
    expected = [0.0] * len(values)
    for i in order[len(values) - keep :]:
        expected[i] = 1.0
    assert gate.tolist() == expected
    gate.sum().backward()
    assert scores.grad.tolist() == [1.0] * len(values)


def test_top_gate_works_row_by_row_and_refuses_impossible_counts():
    scores = torch.tensor([[1.0, 1.0, 1.0], [3.0, 2.0, 1.0]])
    assert top_gate(scores, 2).tolist() == [[0, 1, 1], [1, 1, 0]]
    with pytest.raises(BudgetError, match="0 to 3"):
        top_gate(scores, 4)


def test_top_gates_rank_all_tensors_together_and_send_gradients_to_closed_gates():
    scores = {"a": leaf(0.1, 0.9), "b": leaf(0.5, 0.5, 0.5)}
    gates = top_gates(scores, 3)
    assert gates["a"].tolist() == [0, 1]
    assert gates["b"].tolist() == [0, 1, 1]
    (gates["a"].sum() * 2 + gates["b"].sum() * 3).backward()
    assert scores["a"].grad.tolist() == [2, 2]
    assert scores["b"].grad.tolist() == [3, 3, 3]


def test_a_closed_unit_comes_back_when_the_loss_wants_it():
    scores = nn.Parameter(torch.tensor([1.0, 0.9, 0.1]))
    optimizer = torch.optim.SGD([scores], lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        (top_gate(scores, 1) * torch.tensor([1.0, 0.0, -1.0])).sum().backward()  # only unit 2 helps
        optimizer.step()
    assert top_gate(scores, 1).tolist() == [0, 0, 1]


def test_nan_is_refused_and_named():
    bad = torch.tensor([1.0, float("nan"), 0.0])
    for call in (lambda: binary_gate(bad), lambda: top_gate(bad, 1), lambda: top_gates({"layer.3": bad}, 1)):
        with pytest.raises(NumericsError, match="1 of 3 gate values are NaN"):
            call()
    with pytest.raises(NumericsError, match=r"layer\.3"):
        top_gates({"layer.3": bad}, 1)
    assert refuse_nan(torch.tensor([float("inf")]), "x").item() == float("inf")


def test_scores_start_as_a_copy_that_trains_on_its_own():
    weight = nn.Parameter(torch.randn(4, 3, generator=torch.Generator().manual_seed(0)))
    before = weight.detach().clone()
    scores = scores_from(weight)
    assert isinstance(scores, nn.Parameter)
    assert scores.requires_grad
    assert torch.equal(scores, weight)
    with torch.no_grad():
        scores += 1
    assert torch.equal(weight, before)
    refuse_aliases({"s": scores}, {"w": weight})


@pytest.mark.parametrize(
    "alias",
    [
        lambda w: w,
        lambda w: nn.Parameter(w.data),
        lambda w: w.detach(),
        lambda w: w[1:],  # a part of the same memory, at another address
        lambda w: w.t(),
    ],
)
def test_aliased_scores_are_refused_with_both_names(alias):
    weights = {"fc1.weight": nn.Parameter(torch.ones(3, 3)), "fc2.weight": nn.Parameter(torch.ones(3, 3))}
    scores = {"fc1.scores": scores_from(weights["fc1.weight"]), "fc2.scores": alias(weights["fc2.weight"])}
    with pytest.raises(
        ModelError, match=r"'fc2\.scores' share their memory with the weight 'fc2\.weight'.*scores_from"
    ):
        refuse_aliases(scores, weights)


def test_tensors_without_memory_are_no_aliases():
    refuse_aliases({"s": torch.empty(0)}, {"w": torch.empty(0)})
    refuse_aliases({"s": torch.empty(2, device="meta")}, {"w": torch.empty(2, device="meta")})
