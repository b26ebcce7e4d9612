import os
import sys

import pytest
import torch
from torch import nn

from secateur.core.method import Batch
from secateur.measure import forward_memory, peak_memory
from secateur.measure.memory import PROC

MB = 2**20
RESETTABLE = sys.platform == "linux" and os.access(PROC / "clear_refs", os.W_OK)
needs_reset = pytest.mark.skipif(not RESETTABLE, reason="this system lets no process reset its peak")


@needs_reset
@pytest.mark.parametrize("megabytes", [16, 64])
def test_rise_is_what_the_work_holds_at_once(megabytes):
    found = peak_memory(lambda: torch.ones(megabytes * MB // 4))
    assert 0.9 * megabytes * MB < found.rise < 1.2 * megabytes * MB + 4 * MB
    assert found.peak > found.rise
    assert "VmHWM" in found.method


@needs_reset
def test_earlier_peaks_do_not_count():
    del_me = torch.ones(128 * MB // 4)
    del del_me
    assert peak_memory(lambda: torch.ones(8 * MB // 4)).rise < 64 * MB


@needs_reset
def test_memory_that_the_warm_up_freed_counts_again():
    pins = []

    def work():
        blocks = [b"x" * count for count in range(1000, 11000)]  # about 60 MB in many small pieces
        pins.append(b"x" * 100_000)  # lies above them and keeps the heap from shrinking by itself
        del blocks

    assert peak_memory(work).rise > 40 * MB


@needs_reset
def test_forward_pass_holds_its_activations():
    model = nn.Sequential(nn.Linear(8, 4096, bias=False), nn.Linear(4096, 8, bias=False)).train()
    found = forward_memory(model, Batch((torch.ones(2048, 8),)))
    assert 0.9 * 2048 * 4096 * 4 < found.rise < 3 * 2048 * 4096 * 4
    assert model.training


def test_without_the_reset_the_result_says_lifetime(tmp_path):
    calls = []
    found = peak_memory(lambda: calls.append(1), proc=tmp_path / "missing")
    assert "whole life" in found.method
    assert found.rise is None
    assert found.peak > 10 * MB
    assert len(calls) == 2
    assert found.to_json() == {"peak": found.peak, "rise": None, "method": found.method}


def test_status_is_read_in_kibibytes(tmp_path):
    (tmp_path / "clear_refs").write_bytes(b"-")
    (tmp_path / "status").write_text("Name:\tx\nVmHWM:\t    300 kB\nVmRSS:\t    100 kB\n")
    found = peak_memory(lambda: None, proc=tmp_path)
    assert (found.peak, found.rise) == (300 * 1024, 200 * 1024)
    assert (tmp_path / "clear_refs").read_bytes() == b"5"
