"""Wanda against plain forward passes of the same calibration data, in one run.

Bars: the paper's two-pass semantics at most 1.1 times two forward passes; the one-pass mode at most
1.15 times one. The model has a small vocabulary, so that the head, which a walk over the blocks does
not run, gives the walk no head start. Timed are the walk with everything Wanda does in it (statistics,
scores, selection, zeros, outputs) and, apart, the whole `sc.plan` with its fingerprints.

    python benchmarks/wanda_walker.py [--hidden 768] [--layers 6] [--sequences 32] [--length 512] [--rounds 3]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import secateur as sc
from secateur.core.budget import Budget
from secateur.core.method import Task
from secateur.data.batches import as_batches, forward


def build(hidden: int, layers: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=hidden,
        intermediate_size=int(hidden * 2.75) // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        max_position_embeddings=2048,
    )
    return LlamaForCausalLM(config).eval()


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    defaults = {"hidden": 768, "layers": 6, "sequences": 32, "length": 512, "rounds": 3, "batch": 8}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    model = build(args.hidden, args.layers)
    tokens = torch.randint(256, (args.sequences, args.length))
    batches = as_batches(tokens, args.batch)
    wanda = sc.methods()["wanda"]
    task = Task(model=model, budget=Budget(0.5), batches=batches)

    @torch.no_grad()
    def plain() -> None:
        for batch in batches:
            forward(model, batch)

    work = {
        "forward": plain,
        "two-pass walk": lambda: wanda.run(task, wanda.configure({})),
        "one-pass walk": lambda: wanda.run(task, wanda.configure({"sequencing": "projection"})),
        "sc.plan, two passes": lambda: sc.plan(model, "wanda", sparsity=0.5, data=batches),
    }
    times: dict[str, list[float]] = {name: [] for name in work}
    plain()
    for _ in range(args.rounds):
        for name, call in work.items():
            times[name].append(timed(call))
    one = statistics.median(times["forward"])
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters / 1e6:.1f} M parameters, {tokens.numel()} tokens, {torch.get_num_threads()} threads")
    bars = {"two-pass walk": (2, 1.1), "one-pass walk": (1, 1.15), "sc.plan, two passes": (2, None)}
    print(f"{'plain forward':22s} {one:7.2f} s")
    for name, (passes, bar) in bars.items():
        found = statistics.median(times[name])
        ratio = found / (passes * one)
        limit = f"bar {bar}: {'met' if ratio <= bar else 'MISSED'}" if bar else ""
        print(f"{name:22s} {found:7.2f} s = {ratio:.3f} x {passes} forward  {limit}")


if __name__ == "__main__":
    main()
