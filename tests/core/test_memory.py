import sys

import pytest
import torch

from secateur.core.memory import give_back


def resident():
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) // 1024


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_freed_memory_goes_back():
    pieces = [torch.ones(16_000) for _ in range(3000)]  # 64 kB each: below what the allocator maps apart
    last = torch.ones(16_000)  # above them all: nothing can be cut off at the end of the heap
    full = resident()
    del pieces
    give_back()
    assert resident() < full - 100
    assert last[0] == 1


def test_another_c_library_is_no_error(monkeypatch):
    from secateur.core import memory

    memory._trim.cache_clear()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError))
    give_back()
    memory._trim.cache_clear()
