"""Local pruning by groups of inputs: brute force, plain formulas, and the traps of the paper."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from secateur.core.errors import BudgetError, NumericsError, SettingsError
from secateur.recover.group_obs import GroupOBS, Pace, Saliency


def layer(outputs: int = 8, inputs: int = 12, seed: int = 0, tokens: int = 400) -> tuple[Tensor, Tensor]:
    """A weight and the second moment of correlated inputs of different scales."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(inputs, inputs, generator=rng).double() / inputs**0.5 + 0.3
    x = torch.randn(tokens, inputs, generator=rng).double() @ mixing
    return torch.randn(outputs, inputs, generator=rng), x.t() @ x


def groups(inputs: int, width: int) -> Tensor:
    return torch.arange(inputs).view(-1, width)


def damped(hessian: Tensor, damping: float = 0.01) -> Tensor:
    return hessian + damping * hessian.diagonal().mean() * torch.eye(len(hessian)).double()


def squared_error(weight: Tensor, dense: Tensor, hessian: Tensor) -> float:
    change = (weight - dense).double()
    return float(((change @ hessian) * change).sum())


def optimum(dense: Tensor, hessian: Tensor, inputs: list[int]) -> Tensor:
    """Least squares on some inputs, row by row."""
    solved = torch.zeros_like(dense.double())
    if inputs:
        H = damped(hessian)
        solved[:, inputs] = torch.linalg.solve(H[inputs][:, inputs], (dense.double() @ H)[:, inputs].t()).t()
    return solved


class TestBruteForce:
    @pytest.mark.parametrize("width", [1, 3])
    @pytest.mark.parametrize("saliency", Saliency)
    def test_weights_are_least_squares_on_the_kept_inputs_and_errors_are_theirs(
        self, width: int, saliency: Saliency
    ) -> None:
        W, H = layer()
        columns = groups(12, width)
        solver = GroupOBS(W, H, columns, saliency=saliency)
        for keep in range(1, len(columns)):
            found = solver.prune(keep, Pace(step=1))
            inputs = columns[found.keep].flatten().tolist()
            expected = optimum(W, H, inputs)
            torch.testing.assert_close(found.weight, expected.float(), rtol=1e-4, atol=1e-5)
            error = squared_error(expected, W, damped(H)) / squared_error(W * 0, W, damped(H))
            assert found.error == pytest.approx(error, rel=1e-6)
            loss = float((-expected * (W.double() @ damped(H)) + 0.5 * expected * (expected @ damped(H))).sum())
            assert found.loss == pytest.approx(loss, rel=1e-6)

    def test_one_group_less_is_the_best_choice_where_the_first_order_term_says_nothing(self) -> None:
        """With orthogonal inputs both terms are proportional to the exact increase of the error."""
        W, _ = layer(inputs=8)
        H = torch.diag(torch.tensor([1.0, 2, 3, 0.5, 4, 1, 2, 0.1]).double())
        for saliency in Saliency:
            found = GroupOBS(W, H, groups(8, 2), saliency=saliency).prune(3, Pace(step=1))
            errors = [
                squared_error(optimum(W, H, groups(8, 2)[list(kept)].flatten().tolist()), W, damped(H))
                for kept in combinations(range(4), 3)
            ]
            assert found.error * squared_error(W * 0, W, damped(H)) == pytest.approx(min(errors), rel=1e-6)

    @pytest.mark.parametrize("width", [1, 3])
    @pytest.mark.parametrize("saliency", Saliency)
    def test_every_round_takes_the_lowest_by_the_formula(self, width: int, saliency: Saliency) -> None:
        """Literally: the inverse of the Hessian of what is left, the solution on it, one group at a time."""
        W, H = layer(seed=3)
        columns, left = groups(12, width), list(range(12 // width))
        G = (W.double() @ damped(H)).t()
        while len(left) > 1:
            index = columns[left].flatten()
            inverse = torch.linalg.inv(damped(H)[index][:, index])
            current = inverse @ G[index]
            scores = []
            for place in range(len(left)):
                own = slice(place * width, (place + 1) * width)
                P, w, g = inverse[own, own], current[own], G[index][own]
                if saliency is Saliency.CODE:
                    scores.append(float((w * (torch.linalg.inv(P) @ w / 2 + g)).sum()))
                else:
                    first = (w * g).sum(1).abs()
                    scores.append(float((first + w.square().sum(1) / (2 * P.diagonal())).mean()))
            left.pop(scores.index(min(scores)))
            found = GroupOBS(W, H, columns, saliency=saliency).prune(len(left), Pace(step=1))
            assert found.keep.nonzero().flatten().tolist() == left


class TestRounds:
    def test_counts_per_round(self) -> None:
        assert Pace(step=16).parts(40) == [16, 16, 8]
        assert Pace(rounds=16).parts(40) == [3] * 8 + [2] * 8
        assert Pace(rounds=16).parts(3) == [1, 1, 1]
        assert Pace(rounds=1).parts(7) == [7]
        assert Pace(step=3).parts(0) == Pace(rounds=3).parts(0) == []

    @pytest.mark.parametrize("wrong", [{}, {"step": 1, "rounds": 1}, {"step": 0}, {"rounds": 0}])
    def test_one_of_them_is_needed(self, wrong: dict[str, int]) -> None:
        with pytest.raises(SettingsError, match="either a step or rounds"):
            Pace(**wrong)

    @pytest.mark.parametrize("pace", [Pace(step=1), Pace(rounds=4)])
    def test_several_levels_at_once_are_what_each_is_alone(self, pace: Pace) -> None:
        W, H = layer(inputs=48)
        together = GroupOBS(W, H, groups(48, 1)).levels([7, 48, 0, 30, 7, 31], pace)
        for keep, found in zip([7, 48, 0, 30, 7, 31], together, strict=True):
            alone = GroupOBS(W, H, groups(48, 1)).prune(keep, pace)
            assert torch.equal(found.keep, alone.keep)
            torch.testing.assert_close(found.weight, alone.weight)
            assert int(found.keep.sum()) == keep

    def test_rounds_help(self) -> None:
        """Progressive removal sees what the earlier one changed (the paper's ablation)."""
        one, many = [], []
        for seed in range(12):
            W, H = layer(inputs=32, seed=seed)
            solver = GroupOBS(W, H, groups(32, 1), saliency=Saliency.CODE)
            one.append(solver.prune(16, Pace(rounds=1)).error)
            many.append(solver.prune(16, Pace(rounds=16)).error)
        assert sum(many) < sum(one)


class TestTraps:
    @settings(max_examples=25, deadline=None)
    @given(st.integers(0, 10**6), st.sampled_from([1, 2, 4]), st.sampled_from(list(Saliency)), st.integers(1, 3))
    def test_never_worse_than_zeroing_the_same_groups(
        self, seed: int, width: int, saliency: Saliency, step: int
    ) -> None:
        W, H = layer(inputs=16, seed=seed)
        columns = groups(16, width)
        for found in GroupOBS(W, H, columns, saliency=saliency).levels(range(1, len(columns)), Pace(step=step)):
            zeroed = W * found.keep.repeat_interleave(width)
            assert squared_error(found.weight, W, damped(H)) < squared_error(zeroed, W, damped(H))

    def test_all_and_nothing(self) -> None:
        W, H = layer()
        everything, nothing = GroupOBS(W, H, groups(12, 3)).levels([4, 0], Pace(step=1))
        assert torch.equal(everything.weight, W)
        assert everything.keep.all()
        assert everything.error == 0
        assert not nothing.weight.any()
        assert not nothing.keep.any()
        assert (nothing.error, nothing.loss) == (pytest.approx(1), 0)

    def test_dead_inputs_go_first_and_change_nothing(self) -> None:
        W, H = layer()
        dead = [2, 7]
        H[dead], H[:, dead] = 0, 0
        solver = GroupOBS(W, H, groups(12, 1))
        found = solver.levels([11, 10, 9], Pace(step=1))
        assert [one.keep.nonzero().flatten().tolist() for one in found[:2]] == [
            [i for i in range(12) if i != 2],
            [i for i in range(12) if i not in dead],
        ]
        assert found[0].error < 1e-12 > found[1].error
        assert not found[0].weight[:, dead].any()
        assert not found[2].keep[dead].any()
        alive = [i for i in range(12) if i not in dead]
        torch.testing.assert_close(found[1].weight[:, alive], W[:, alive])

    def test_weights_that_are_zero_already_go_first(self) -> None:
        """On live inputs: the rest is solved for on what is left, with nothing lost."""
        W, H = layer()
        W[:, [0, 1, 2, 6, 7, 8]] = 0
        found = GroupOBS(W, H, groups(12, 3)).levels([3, 2, 1], Pace(step=1))
        assert [one.keep.tolist() for one in found[:2]] == [[False, True, True, True], [False, True, False, True]]
        assert max(found[0].error, found[1].error) < 1e-12
        torch.testing.assert_close(found[1].weight, W)
        assert found[2].error > 1e-3

    def test_the_target_is_the_dense_output(self) -> None:
        """Pruning in two calls, the second with G of the pruned weights, ends elsewhere than pruning at once."""
        W, H = layer(inputs=24)
        at_once = GroupOBS(W, H, groups(24, 1)).prune(8, Pace(step=1))
        first = GroupOBS(W, H, groups(24, 1)).prune(16, Pace(step=1))
        again = GroupOBS(first.weight, H, groups(24, 1)).prune(8, Pace(step=1))
        assert squared_error(at_once.weight, W, H) < squared_error(again.weight, W, H)
        assert at_once.error != again.error

    def test_a_layer_that_never_saw_anything(self) -> None:
        W, _ = layer()
        found = GroupOBS(W, torch.zeros(12, 12), groups(12, 3)).levels([4, 2, 0], Pace(step=1))
        assert [int(one.keep.sum()) for one in found] == [4, 2, 0]
        assert [one.error for one in found] == [0, 0, 0]

    def test_groups_need_not_be_in_a_row(self) -> None:
        W, H = layer()
        order = torch.randperm(12, generator=torch.Generator().manual_seed(1))
        mixed = GroupOBS(W, H, order.view(4, 3)).prune(2, Pace(step=1))
        sorted_ = GroupOBS(W[:, order], H[order][:, order], groups(12, 3)).prune(2, Pace(step=1))
        assert torch.equal(mixed.keep, sorted_.keep)
        torch.testing.assert_close(mixed.weight[:, order], sorted_.weight)


class TestRefusals:
    def test_groups_that_miss_inputs(self) -> None:
        W, H = layer()
        with pytest.raises(SettingsError, match="each of the 12 inputs once"):
            GroupOBS(W, H, torch.zeros(12, 1, dtype=torch.int64))

    def test_counts_out_of_reach(self) -> None:
        W, H = layer()
        with pytest.raises(BudgetError, match="cannot keep 5 of 4 groups"):
            GroupOBS(W, H, groups(12, 3)).prune(5, Pace(step=1))

    def test_no_second_moment(self) -> None:
        W, H = layer()
        with pytest.raises(NumericsError, match="raise the damping"):
            GroupOBS(W, H - 10 * H.diagonal().max() * torch.eye(12), groups(12, 3)).prune(2, Pace(step=1))
