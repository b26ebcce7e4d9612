"""Killed at any moment, run again with the same command: the same bytes."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
import streaming_tools as tools
import torch

from secateur.core.errors import SettingsError
from secateur.streaming import prune_folder

RUN = """
import sys
import torch
torch.set_num_threads(1)
from secateur.streaming import prune_folder
home, method, spill = sys.argv[1:]
data = torch.load(home + "/tokens.pt", weights_only=True)
print("ready", flush=True)
prune_folder(home + "/dense", home + "/out", method, 0.5, data=data, spill=spill == "1")
"""
POLL = 0.002


def notes(home):
    return len(list(home.glob(".out.secateur-work/process-0/*/*.safetensors")))


def start(home, method, spill):
    command = [sys.executable, "-c", RUN, str(home), method, "1" if spill else "0"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"ready\n"
    return process


@pytest.mark.parametrize(
    ("method", "spill"), [("wanda", True), pytest.param("sparsegpt", False, marks=pytest.mark.slow)]
)
def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(tmp_path, method, spill):
    tools.build("llama-deep", tmp_path / "dense")
    torch.save(tools.tokens(40, 48), tmp_path / "tokens.pt")
    prune_folder(tmp_path / "dense", tmp_path / "straight", method, 0.5, data=tools.tokens(40, 48), spill=spill)
    pause, killed_at = random.Random(3), []
    for wanted in (1, 4):
        process = start(tmp_path, method, spill)
        while process.poll() is None and notes(tmp_path) < wanted:
            time.sleep(POLL)
        time.sleep(pause.random() * 0.01)  # anywhere in the next block
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed_at.append(notes(tmp_path))
    assert not (tmp_path / "out").exists()
    assert wanted <= killed_at[-1] < 10, killed_at
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".out.secateur-work/process-0/*/*.safetensors")}
    process = start(tmp_path, method, spill)
    while notes(tmp_path) == killed_at[-1] and process.poll() is None:
        time.sleep(POLL)
    assert all(path.stat().st_mtime_ns == when for path, when in before.items() if path.exists())  # nothing done twice
    _, errors = process.communicate()
    assert process.returncode == 0, errors.decode()[-2000:]
    assert tools.digests(tmp_path / "out") == tools.digests(tmp_path / "straight")
    assert not list(tmp_path.glob(".*"))


def test_an_unfinished_run_with_other_settings_is_refused(tmp_path, monkeypatch):
    tools.build("llama", tmp_path / "dense")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("secateur.streaming.save_streamed", killed)
    with pytest.raises(KeyboardInterrupt):
        prune_folder(tmp_path / "dense", tmp_path / "out", "wanda", 0.5, data=tools.tokens())
    monkeypatch.undo()
    for change, word in (
        ({"seed": 1}, "seed"),
        ({"compare": "layer"}, "settings"),
        ({"data": tools.tokens(6)}, "data"),
    ):
        given = {"data": tools.tokens(), **change}
        with pytest.raises(SettingsError, match=f"unfinished run with another {word}"):
            prune_folder(tmp_path / "dense", tmp_path / "out", "wanda", 0.5, **given)
    with pytest.raises(SettingsError, match="another budget"):
        prune_folder(tmp_path / "dense", tmp_path / "out", "wanda", 0.4, data=tools.tokens())
    weights = next((tmp_path / "dense").glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    with pytest.raises(SettingsError, match="another source"):
        prune_folder(tmp_path / "dense", tmp_path / "out", "wanda", 0.5, data=tools.tokens())


RANK = """
import sys
import torch
import torch.distributed as dist
torch.set_num_threads(1)
import secateur.streaming as streaming
home, rank, method = sys.argv[1], int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{home}/meeting", rank=rank, world_size=2)
torch.manual_seed(rank)
data = torch.load(home + "/tokens.pt", weights_only=True)
streaming.shutil.rmtree = lambda *args, **kwargs: None  # the test compares what both wrote
streaming.prune_folder(home + "/dense", home + "/both", method, 0.5, data=list(data.split(3)))
dist.destroy_process_group()
"""


@pytest.mark.parametrize(
    "method", ["wanda", pytest.param("sparsegpt", marks=pytest.mark.slow), pytest.param("gblm", marks=pytest.mark.slow)]
)
def test_two_processes_share_the_samples_and_decide_alike(tmp_path, method):
    from secateur.core.journal import Journal
    from secateur.core.plan import Plan

    tools.build("llama", tmp_path / "dense")
    data = tools.tokens()
    torch.save(data, tmp_path / "tokens.pt")
    command = [sys.executable, "-c", RANK, str(tmp_path)]
    ranks = [subprocess.Popen([*command, str(rank), method], stderr=subprocess.PIPE) for rank in range(2)]
    for process in ranks:
        _, errors = process.communicate()
        assert process.returncode == 0, errors.decode()[-2000:]
    work = tmp_path / ".both.secateur-work"
    first, second = (Journal(work / f"process-{rank}").section("layers") for rank in range(2))
    assert list(first) == list(second)
    assert len(first) == 3
    for block in first:
        for name, tensor in first[block].tensors.items():
            assert torch.equal(tensor, second[block].tensors[name]), name
    prune_folder(tmp_path / "dense", tmp_path / "one", method, 0.5, data=list(data.split(3)))
    one, both = (Plan.load(tmp_path / name / "secateur").masks for name in ("one", "both"))
    agreement = torch.cat([(one[name] == both[name]).flatten() for name in one]).float().mean()
    assert agreement > 0.999  # sums in another order
