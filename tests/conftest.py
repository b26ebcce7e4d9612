"""What all tests share."""

from __future__ import annotations

import os

# Some virtual machines announce AMX but do not allow it: a bfloat16 product then ends the process.
# oneDNN reads this before its first product, so it must be set before torch is imported.
os.environ.setdefault("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two processes with two spinning threads each stand in each other's way on two cores; this reaches subprocesses too.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

torch.set_num_threads(1)
