"""Demand 11: the same masks in every process; nothing that needs a particular device."""

import os
import re
import subprocess
import sys
from pathlib import Path

from cli_runs import PROCESS

import secateur

RANK = """
import os, sys
from pathlib import Path
import torch
import torch.distributed as dist
import secateur as sc
from secateur.data.dataset import DataKind, Dataset
import cli_runs

torch.set_num_threads(1)
rank, home = int(sys.argv[1]), Path(sys.argv[2])
dist.init_process_group("gloo", init_method=f"file://{home / 'meeting'}", rank=rank, world_size=2)
torch.manual_seed(100 + rank)  # global seeds differ, and so do the data and the seeds asked for
data = Dataset(f"rank {rank}", DataKind.IMAGE, torch.randn(16, 1, 4, 4), torch.randint(3, (16,)))
for name in ("random", "wanda", "sparsegpt", "taylor"):
    model = cli_runs.net().eval()
    plan = sc.plan(model, name, 0.5, seed=rank, keep_scores=True, data=None if name == "random" else data)
    plan.save(home / f"{name}-{rank}")
    sc.save(sc.apply_(model, plan), home / f"{name}-{rank}-model", plan, factory="cli_runs:net")
dist.destroy_process_group()
# alone, the two would not agree: what makes the comparison worth something
sc.plan(cli_runs.net(), "random", 0.5, seed=rank).save(home / f"alone-{rank}")
"""


def test_two_processes_with_different_seeds_and_data_end_with_identical_plans(tmp_path):
    environment = {**os.environ, **PROCESS, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True
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

    def content(name, rank, file):
        return (tmp_path / f"{name}-{rank}" / file).read_bytes()

    for name in ("random", "wanda", "sparsegpt", "taylor"):
        for file in ("plan.safetensors", "plan.json"):
            assert content(name, 0, file) == content(name, 1, file), (name, file)
        models = [(tmp_path / f"{name}-{rank}-model" / "model.safetensors").read_bytes() for rank in (0, 1)]
        assert models[0] == models[1]
    assert content("alone", 0, "plan.safetensors") != content("alone", 1, "plan.safetensors")


def test_the_tree_names_no_device_outright():
    """`.cuda()` and friends tie code to one accelerator; a device is always asked for or taken from the model."""
    forbidden = re.compile(r"\.cuda\(\)|device\s*=\s*[\"']cuda|\.to\([\"']cuda")
    sources = list(Path(secateur.__file__).parent.rglob("*.py"))
    assert len(sources) > 100
    found = [f"{path}: {match.group()}" for path in sources for match in [forbidden.search(path.read_text())] if match]
    assert found == []
    assert forbidden.search("model.cuda()")
