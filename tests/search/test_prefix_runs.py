"""Runs that go on from the first changed block give the bits of whole runs, or are whole runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur import zoo
from secateur.core.method import Batch
from secateur.data.batches import forward
from secateur.search.prefix import PrefixRuns, run_order


class Counting(nn.Module):
    def __init__(self, *, writes: bool = False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))
        self.calls, self.writes = 0, writes

    def forward(self, x: Tensor) -> tuple[Tensor, str]:
        self.calls += 1
        if self.writes:
            x.add_(1)
        return torch.tanh(x @ self.weight) + x, "extra"


class Chain(nn.Module):
    """Blocks that return more than a state, and a head that reads the first block's output as well."""

    def __init__(self, blocks: int = 4, *, writes: bool = False):
        super().__init__()
        self.blocks = nn.ModuleList(Counting(writes=writes) for _ in range(blocks))

    def forward(self, x: Tensor) -> Tensor:
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1])[0])
        return states[-1] + states[1]


def batches() -> list[Batch]:
    rng = torch.Generator().manual_seed(0)
    return [Batch((torch.randn(3, 4, generator=rng),)) for _ in range(2)]


def test_blocks_before_the_change_are_not_run_again_and_bits_are_those_of_whole_runs() -> None:
    model = Chain()
    blocks: list[Counting] = [block for block in model.blocks if isinstance(block, Counting)]
    with torch.no_grad(), PrefixRuns(model, blocks, batches()) as runs:
        for number, first in enumerate([0, 2, 3, 1, 4]):
            if first < 4:
                blocks[first].weight.mul_(1.5)
            whole = Chain()
            whole.load_state_dict(model.state_dict())
            for index, batch in enumerate(batches()):
                before = [block.calls for block in blocks]
                assert torch.equal(runs.logits(index, first), whole(*batch.args))
                ran = [block.calls - count for block, count in zip(blocks, before, strict=True)]
                assert ran == ([0] * first + [1] * (4 - first) if number else [1] * 4)
    assert not any("forward" in vars(block) for block in blocks)


def test_a_change_that_is_not_told_goes_unseen() -> None:
    """The test above can fail."""
    model = Chain()
    with torch.no_grad(), PrefixRuns(model, list(model.blocks), batches()) as runs:
        before = runs.logits(0, 0)
        model.blocks[0].weight.mul_(2)  # type: ignore[operator]
        assert torch.equal(runs.logits(0, 1), before)
        assert not torch.equal(runs.logits(0, 0), before)


def test_blocks_that_write_into_their_inputs_are_run_whole() -> None:
    model = Chain(writes=True)
    with torch.no_grad(), PrefixRuns(model, list(model.blocks), batches()) as runs:
        first = runs.logits(0, 0)
        assert runs._kept[0] is None
        runs.batches[0].args[0].sub_(1)  # the first block wrote there, too
        assert torch.equal(runs.logits(0, 3), first)


def test_without_room_every_run_is_whole() -> None:
    model = Chain()
    with torch.no_grad(), PrefixRuns(model, list(model.blocks), batches(), room=10) as runs:
        runs.logits(0, 0)
        runs.logits(0, 3)
        assert [block.calls for block in model.blocks] == [2] * 4


def test_forward_methods_of_wrappers_are_put_back() -> None:
    model = Chain()
    own = model.blocks[1].forward
    model.blocks[1].forward = own
    with PrefixRuns(model, list(model.blocks), batches()), pytest.raises(ZeroDivisionError):
        raise ZeroDivisionError
    with PrefixRuns(model, list(model.blocks), batches()):
        pass
    assert vars(model.blocks[1])["forward"] == own
    assert "forward" not in vars(model.blocks[0])


def test_a_real_decoder() -> None:
    model, data = zoo.load_model("pydoc-llama").eval(), zoo.load_data("pydoc", samples=4)
    batch = next(data.calibration.batches(4))
    blocks = list(model.model.layers)  # type: ignore[union-attr, arg-type]
    with torch.no_grad(), PrefixRuns(model, blocks, [batch]) as runs:
        runs.logits(0, 0)
        blocks[2].mlp.down_proj.weight.mul_(0.5)
        found = runs.logits(0, 2)
    with torch.no_grad():
        assert torch.equal(found, forward(model, batch))


def test_order_of_blocks() -> None:
    model = Chain()
    assert run_order(model, list(model.blocks), batches()[0]) == [0, 1, 2, 3]
    assert run_order(model, list(model.blocks)[::-1], batches()[0]) == [3, 2, 1, 0]
    assert run_order(model, [*model.blocks, Counting()], batches()[0]) is None
    model.blocks[2] = model.blocks[1]
    assert run_order(model, list(model.blocks)[:2], batches()[0]) is None
    assert not any(block._forward_pre_hooks for block in model.blocks)
