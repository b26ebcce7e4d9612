"""Two processes with other seeds: DDP and FSDP2 end with the masks and weights of one process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional as F
from train_models import STEPS, attach

RANK = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import save_file
sys.path.insert(0, sys.argv[3])
import test_train_processes as job

torch.set_num_threads(1)
rank, home, kind = int(sys.argv[1]), Path(sys.argv[2]), sys.argv[4]
dist.init_process_group("gloo", init_method=f"file://{home / 'meeting'}", rank=rank, world_size=2)
torch.manual_seed(100 + rank)
model, optimizer = job.make()
if kind == "ddp":
    model = torch.nn.parallel.DistributedDataParallel(model)
else:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        if list(layer.parameters()):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = job.optimizer_of(model)
if kind == "ddp":
    optimizer = job.optimizer_of(model)
sparsifier = job.sparsifier(model, optimizer)
for step in range(job.STEPS):
    job.one_step(model, optimizer, step, rank, 2)
plan = sparsifier.finish()
weights = {name: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().contiguous()
           for name, p in sparsifier.model.named_parameters()}
state = sparsifier.masks.states(sparsifier.masks.parameters["0.weight"])[0]
state = (state.full_tensor() if hasattr(state, "full_tensor") else state).contiguous()
save_file(weights | {"momentum": state} | {f"mask/{n}": m.to(torch.uint8) for n, m in plan.masks.items()},
          home / f"{rank}.safetensors")
dist.destroy_process_group()
"""


def make():
    """The same initial weights in every process, whatever its seed."""
    rng = torch.Generator().manual_seed(3)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 3))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * 0.3)
    return model, optimizer_of(model)


def optimizer_of(model):
    return torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=1e-2)


def sparsifier(model, optimizer):
    return attach(model, optimizer, start=0.5)


def one_step(model, optimizer, step, rank=0, world=1):
    """Each process takes its share of the batch; the mean gradient is that of the whole batch."""
    rng = torch.Generator().manual_seed(step)
    x, y = torch.randn(16, 6, generator=rng), torch.randint(3, (16,), generator=rng)
    mine = slice(rank * 16 // world, (rank + 1) * 16 // world)
    optimizer.zero_grad()
    F.cross_entropy(model(x[mine]), y[mine]).backward()
    optimizer.step()


def run_ranks(home, kind):
    here = str(Path(__file__).parent)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(home), here, kind],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for rank in ranks:
            _, err = rank.communicate(timeout=120)
            assert rank.returncode == 0, err
    finally:
        for rank in ranks:
            rank.kill()
    return [load_file(home / f"{rank}.safetensors") for rank in (0, 1)]


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_two_processes_end_as_one(kind, tmp_path):
    first, second = run_ranks(tmp_path, kind)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    model, optimizer = make()
    alone = sparsifier(model, optimizer)
    for step in range(STEPS):
        one_step(model, optimizer, step)
    plan = alone.finish()
    for name, mask in plan.masks.items():
        assert torch.equal(first[f"mask/{name}"].bool(), mask), name
        assert (first[name][~mask] == 0).all()
        assert torch.allclose(first[name], model.get_parameter(name), atol=1e-5)
    assert (first["momentum"][~plan.masks["0.weight"]] == 0).all()
    assert sum(int(first[f"mask/{name}"].sum()) for name in plan.masks) == alone.target
