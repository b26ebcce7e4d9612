import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from secateur.core.errors import BudgetError, ModelError, NumericsError
from secateur.gates.freeze import Frozen, freeze_above, freeze_global, freeze_top, keep_above


def test_a_frozen_mask_reports_both_shares():
    frozen = Frozen(torch.tensor([True, True, False, True]), 0.5)
    assert frozen.frozen_share == 0.75
    assert frozen.shift == 0.25
    assert str(frozen) == "3 of 4 kept (0.7500), open share while sampled 0.5000"


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-2, 2), min_size=2, max_size=12), st.data())
def test_top_counts_are_exact_with_ties(values, data):
    keep = data.draw(st.integers(0, len(values)))
    scores = torch.tensor(values, dtype=torch.float32).reshape(1, -1)
    share = torch.linspace(0, 1, len(values))
    if len(set(values)) == 1 and 0 < keep < len(values):
        with pytest.raises(ModelError, match="nothing was learned"):
            freeze_top(scores, keep, share)
        return
    frozen = freeze_top(scores, keep, share)
    order = sorted(range(len(values)), key=lambda i: (values[i], i))
    expected = [i in order[len(values) - keep :] for i in range(len(values))]
    assert frozen.mask.tolist() == [expected]
    assert frozen.mask.dtype == torch.bool
    assert frozen.sampled_share == pytest.approx(0.5)


def test_global_freezing_ranks_over_tensors():
    scores = {"a": torch.tensor([5.0, 1.0]), "b": torch.tensor([[1.0, 1.0], [0.0, 7.0]])}
    shares = {"a": torch.tensor([0.9, 0.2]), "b": torch.full((2, 2), 0.25)}
    frozen = freeze_global(scores, 4, shares)
    assert frozen["a"].mask.tolist() == [True, False]
    assert frozen["b"].mask.tolist() == [[True, True], [False, True]]
    assert frozen["a"].sampled_share == pytest.approx(0.55)
    assert frozen["b"].sampled_share == 0.25


def test_freezing_refuses_what_cannot_be():
    one = torch.tensor([1.0, 2.0])
    with pytest.raises(BudgetError, match=r"keep 3 of 2 gates \(heads\); the range is 0 to 2"):
        freeze_top(one, 3, one, "heads")
    with pytest.raises(ModelError, match=r"all 4 gates \(a, b\) have the same score"):
        freeze_global({"a": torch.ones(2), "b": torch.ones(2)}, 1, {"a": one, "b": one})
    with pytest.raises(NumericsError, match="heads: 1 of 2"):
        freeze_top(torch.tensor([1.0, float("nan")]), 1, one, "heads")
    with pytest.raises(NumericsError, match="threshold"):
        keep_above(one, torch.tensor(float("nan")))
    # equal scores are no matter where they do not decide
    assert freeze_top(torch.ones(3), 3, one).mask.all()
    assert not freeze_top(torch.ones(3), 0, one).mask.any()
    # different tensors of equal entries do differ
    assert freeze_global({"a": torch.ones(2), "b": torch.zeros(2)}, 2, {"a": one, "b": one})["a"].mask.all()


def test_above_a_threshold_with_a_minimum():
    scores = torch.tensor([0.1, 0.7, 0.5, 0.3])
    assert keep_above(scores, 0.5).tolist() == [False, True, False, False]
    assert keep_above(scores, 0.5, minimum=1).tolist() == [False, True, False, False]
    assert keep_above(scores, 0.2, minimum=1).tolist() == [False, True, True, True]
    assert keep_above(scores, 0.5, minimum=3).tolist() == [False, True, True, True]
    assert keep_above(scores, 9.0, minimum=1).sum() == 1
    assert keep_above(scores, torch.tensor([0.0, 0.8, 0.0, 0.8])).tolist() == [True, False, True, False]
    with pytest.raises(BudgetError, match="0 to 4"):
        keep_above(scores, 0.5, minimum=5)
    frozen = freeze_above(scores, 0.2, torch.tensor([1.0, 0.0]), minimum=0)
    assert frozen.mask.tolist() == [False, True, True, True]
    assert frozen.sampled_share == 0.5
