"""How much blocks change the hidden state: by hand, from whole blocks, on any call; and calibration drawn afresh."""

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, ModelError, NumericsError
from secateur.core.method import Batch
from secateur.core.progress import Silent
from secateur.data.calibration import fresh
from secateur.stats.changes import Distance, block_changes

NAMES = ["blocks.0", "blocks.1"]


class Turn(nn.Module):
    """Adds a fixed vector; gives a tuple, takes the state by name."""

    def __init__(self, *vector: float):
        super().__init__()
        self.vector = nn.Parameter(torch.tensor(vector))
        self.ran_in_training: list[bool] = []

    def forward(self, *, flag: bool, state: torch.Tensor) -> tuple[torch.Tensor, str]:
        self.ran_in_training.append(self.training)
        return state + self.vector, "more"


class Chain(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Turn(0.0, 0.0), Turn(3.0, -4.0)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x, _ = block(flag=True, state=x)
        return x


def data() -> list[Batch]:
    x = torch.tensor([[[1.0, 0.0], [0.0, 2.0]], [[5.0, 5.0], [-1.0, 3.0]], [[4.0, 0.0], [0.0, 1.0]]])
    return [Batch((x[:2],)), Batch((x[2:],))]  # batches of different size: every token counts alike


@pytest.mark.parametrize(("distance", "value"), [(Distance.EUCLIDEAN, 5.0), (Distance.MANHATTAN, 7.0)])
def test_distances(distance, value):
    found = block_changes(Chain(), NAMES, data(), distance, Silent())
    assert found == pytest.approx({"blocks.0": 0.0, "blocks.1": value})


def test_cosine_is_a_mean_over_tokens():
    tokens = torch.cat([batch.args[0] for batch in data()]).reshape(-1, 2)
    moved = tokens + torch.tensor([3.0, -4.0])
    cosines = [float((a @ b) / a.norm() / b.norm()) for a, b in zip(tokens, moved, strict=True)]
    found = block_changes(Chain(), NAMES, data(), Distance.COSINE, Silent())
    assert found["blocks.0"] == 0
    assert found["blocks.1"] == pytest.approx(1 - sum(cosines) / len(cosines), rel=1e-6)


def test_the_model_is_left_as_it_was():
    model = Chain().train()
    block_changes(model, NAMES, data(), Distance.COSINE, Silent())
    assert model.training
    assert not any(block.ran_in_training[-1] for block in model.blocks)
    assert not any(part._forward_hooks for part in model.modules())


def test_a_block_that_changes_the_shape_is_named():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 3))
    with pytest.raises(ModelError, match="block '1' gives another shape"):
        block_changes(model, ["0", "1"], data(), Distance.COSINE, Silent())
    assert not any(part._forward_hooks for part in model.modules())


def test_a_block_that_never_runs_is_named():
    model = Chain()
    model.spare = nn.Linear(2, 2)
    with pytest.raises(ModelError, match="block 'spare' never ran"):
        block_changes(model, [*NAMES, "spare"], data(), Distance.COSINE, Silent())


def test_a_state_that_is_infinite_is_named():
    model = Chain()
    with torch.no_grad():
        model.blocks[1].vector.fill_(torch.inf)
    with pytest.raises(NumericsError, match=r"block 'blocks\.1' is NaN"):
        block_changes(model, NAMES, data(), Distance.EUCLIDEAN, Silent())


def test_data_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="cannot run on the data"):
        block_changes(nn.Sequential(nn.Linear(9, 9)), ["0"], data(), Distance.COSINE, Silent())


# --- fresh draws ----------------------------------------------------------------------------------

WINDOWS = torch.arange(20)[:, None] * 100 + torch.arange(30)  # window, place


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("keyword", [False, True])
def test_pieces_of_windows_at_random_places(keyword):
    given = [Batch(kwargs={"input_ids": part}) if keyword else Batch((part,)) for part in WINDOWS.split(8)]
    batches = fresh(given, 10, 7, 4, rng())
    assert [batch.samples for batch in batches] == [4, 4, 2]
    tokens = torch.cat([batch.tensors[0] for batch in batches])
    assert tokens.shape == (10, 7)
    assert (tokens[:, 1:] - tokens[:, :-1] == 1).all()
    assert (tokens // 100 == tokens[:, :1] // 100).all()
    assert len(set((tokens[:, 0] // 100).tolist())) == 10
    assert len(set((tokens[:, 0] % 100).tolist())) > 3
    assert all(set(batch.kwargs) == ({"input_ids"} if keyword else set()) for batch in batches)


def test_every_place_can_be_drawn_and_none_beyond():
    tokens = torch.cat([b.args[0] for seed in range(40) for b in fresh([Batch((WINDOWS,))], 20, 28, 20, rng(seed))])
    assert set((tokens[:, 0] % 100).tolist()) == {0, 1, 2}


def test_another_draw_is_another_one():
    first, second = (fresh([Batch((WINDOWS,))], 10, 7, 16, rng(seed))[0].args[0] for seed in (0, 1))
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    "batch",
    [
        Batch((WINDOWS[:, :5],)),  # shorter
        Batch((WINDOWS,), {"attention_mask": torch.ones_like(WINDOWS)}),
        Batch((torch.rand(20, 30),)),
        Batch((torch.rand(20, 1, 3, 3),), target=torch.arange(20)),
    ],
)
def test_what_is_no_plain_window_stays_whole(batch):
    (found,) = fresh([batch], 20, 7, 20, rng())
    assert all(torch.equal(a, b) for a, b in zip(found.tensors, batch.tensors, strict=True))
