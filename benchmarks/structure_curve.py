"""What it costs to analyse a language model without its weights: seconds and memory for 8 to 128 layers.

    python benchmarks/structure_curve.py

A Llama with the widths of the 8B model is made on the meta device and observed, each size in a process of its
own. The cost should be linear in the number of operators: the last column is the time per layer.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

LAYERS = (8, 16, 32, 64, 128)


def one(layers: int) -> None:
    """Analyse and print seconds, sites, and resident megabytes before and after."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from secateur.core.method import Batch
    from secateur.structure.analysis import analyse

    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=8,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config).eval()
    batch = Batch((torch.randint(128, (2, 16)),))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    begun = time.perf_counter()
    structure = analyse(model, batch)
    seconds = time.perf_counter() - begun
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(layers, f"{seconds:.3f}", len(structure.sites), f"{before:.0f}", f"{after:.0f}")


def main() -> None:
    if len(sys.argv) > 1:
        one(int(sys.argv[1]))
        return
    print(f"{'layers':>8}{'seconds':>9}{'sites':>7}{'MB before':>11}{'MB after':>10}{'ms per layer':>14}")
    for layers in LAYERS:
        done = subprocess.run([sys.executable, __file__, str(layers)], stdout=subprocess.PIPE, text=True, check=True)
        count, seconds, sites, before, after = done.stdout.split()
        print(f"{count:>8}{seconds:>9}{sites:>7}{before:>11}{after:>10}{1000 * float(seconds) / layers:>14.1f}")


if __name__ == "__main__":
    main()
