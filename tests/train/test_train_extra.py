"""A method's own parameters in the user's optimiser: they train along, are not saved with it, and go."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from secateur.train.extra import Extra

RANK = """
import sys
import torch
import torch.distributed as dist
from torch import nn
from secateur.train.extra import Extra

rank, home = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{home}/meeting", rank=rank, world_size=2)
mine, idle = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.tensor([5.0]))
model = nn.Linear(1, 1)
optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
extra = Extra(optimizer, [mine, idle], model)
mine.grad = torch.tensor([2.0, 0.0]) * rank
if rank:
    idle.grad = torch.tensor([4.0])
extra.average()
optimizer.step()
torch.save([mine.detach(), idle.detach()], f"{home}/{rank}.pt")
dist.destroy_process_group()
"""


def made(kind=torch.optim.SGD, **options):
    layer = nn.Linear(2, 1)
    optimizer = kind([{"params": layer.parameters(), "lr_scale": 0.1}], **{"lr": 0.1, "weight_decay": 0.5} | options)
    own = nn.Parameter(torch.tensor([1.0, -2.0]))
    return layer, optimizer, own, Extra(optimizer, [own], layer)


def step(optimizer, *parameters):
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_the_group_has_the_first_one_s_options_but_no_decay_and_no_scale():
    _, optimizer, own, _ = made(momentum=0.9)
    group = optimizer.param_groups[-1]
    assert group["params"] == [own]
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.1, 0.9, 0.0)
    assert "lr_scale" not in group
    assert optimizer.param_groups[0]["weight_decay"] == 0.5
    step(optimizer, own)
    assert own.tolist() == pytest.approx([0.9, -2.1])


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_the_optimiser_s_state_loads_into_one_without_them(kind):
    layer, optimizer, own, _ = made(kind)
    step(optimizer, *layer.parameters(), own)
    other = nn.Linear(2, 1)
    bare = kind([{"params": other.parameters(), "lr_scale": 0.1}], lr=0.3)
    bare.load_state_dict(optimizer.state_dict())
    assert bare.param_groups[0]["lr"] == 0.1
    assert bare.state[other.weight].keys() == optimizer.state[layer.weight].keys()
    assert len(optimizer.param_groups) == 2  # nothing happened to the live one
    assert own in optimizer.state or kind is torch.optim.SGD


def test_a_resumed_group_takes_the_same_steps():
    _, optimizer, own, extra = made(torch.optim.Adam)
    step(optimizer, own)
    optimizer.param_groups[-1]["lr"] = 0.05
    saved = copy.deepcopy(extra.state_dict())
    step(optimizer, own)
    _, again, other, resumed = made(torch.optim.Adam)
    resumed.load_state_dict(saved)
    step(again, other)
    assert torch.equal(other, own)
    assert saved["values"][0].tolist() != own.tolist()  # a copy, not the live tensor


def test_leaving_leaves_nothing_behind():
    layer, optimizer, own, extra = made(momentum=0.9)
    step(optimizer, *layer.parameters(), own)
    extra.leave()
    assert [group["params"] for group in optimizer.param_groups] == [list(layer.parameters())]
    assert own not in optimizer.state
    assert layer.weight in optimizer.state
    assert len(optimizer.state_dict()["param_groups"]) == 1


def test_two_processes_take_the_mean_gradient(tmp_path):
    ranks = [subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [rank.wait(60) for rank in ranks] == [0, 0]
    for rank in range(2):
        mine, idle = torch.load(tmp_path / f"{rank}.pt")
        assert mine.tolist() == [0.5, 2.0]  # 1 - 0.5 * (0 + 2) / 2
        assert idle.tolist() == [4.0]  # no gradient on rank 0 counts as 0
