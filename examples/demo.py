"""The main job on embedded defaults: prune shipped models five ways, reload each in a new process, compare.

    python examples/demo.py [OUT]

Every step is the command line as a user would type it, each in a process of its own. Ends with a table
and the path of one HTML report.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

JOBS = {
    "channels-half-flops": [
        *("zoo:digits-resnet", "--method", "channel-norm", "--flops", "0.5"),
        *("--recover", "finetune:steps=200"),
    ],
    "llama-quarter-gone": [
        *("zoo:pydoc-llama", "--method", "llm-pruner", "--sparsity", "0.25"),
        *("--set", "first=0", "--set", "last=4"),
    ],
    "wanda-50": ["zoo:pydoc-llama", "--method", "wanda", "--sparsity", "0.5"],
    "shortgpt-25": ["zoo:pydoc-llama", "--method", "shortgpt", "--sparsity", "0.25"],
    "magnitude-90": [
        *("zoo:digits-resnet", "--method", "global-magnitude", "--sparsity", "0.9"),
        *("--recover", "finetune:steps=200"),
    ],
}


def secateur(*words: str) -> dict:
    """Run one command in a new process and read its JSON; progress stays on this terminal's stderr."""
    print(f"$ secateur {' '.join(words)}", flush=True)
    command = [sys.executable, "-c", "from secateur.cli import main; main()", *words, "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokens = torch.arange(3, 19)[None]
print(sum(p.numel() for p in model.parameters()), float(model(tokens).logits.abs().max()), "secateur" in sys.modules)
"""


def plain_transformers(folder: str) -> str:
    """Load a folder in a new process with nothing but transformers and run it."""
    done = subprocess.run([sys.executable, "-c", PLAIN, folder], stdout=subprocess.PIPE, text=True, check=True)
    count, largest, ours = done.stdout.split()
    if ours != "False":
        sys.exit("the plain process imported secateur")
    return f"plain transformers loads {folder}: {int(count):,} parameters, largest logit {float(largest):.3f}"


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "demo-out")
    began = time.monotonic()
    shutil.rmtree(out, ignore_errors=True)
    table = Table(title="secateur demo: dense -> pruned, reloaded in a new process", title_justify="left")
    for column in ("result", "quality", "parameters", "non-zeros", "FLOPs", "ms, batch 16", "file bytes"):
        table.add_column(column, justify="left" if column == "result" else "right")
    for name, job in JOBS.items():
        folder = str(out / name)
        record = secateur("prune", *job, "--out", folder)["record"]
        models = secateur("bench", job[0], folder, "--no-machine")["models"]
        table.add_row(name, *row(models[job[0]], models[folder], record))
    stock = plain_transformers(str(out / "llama-quarter-gone"))
    page = secateur("report", *(str(out / name) for name in JOBS), "--out", str(out / "report.html"))["report"]
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.print(table)
    console.print(stock, highlight=False, soft_wrap=True)
    console.print(f"{time.monotonic() - began:.0f} s in all; report: {page}", highlight=False, soft_wrap=True)


def row(dense: dict, pruned: dict, record: dict) -> list[str]:
    """Dense and pruned figures, both measured after reloading; the quality must be the one that was reported."""
    reported = record["quality"]["recovered"] or record["quality"]["pruned"]
    scale = 100 if pruned["quality"]["metric"] == "accuracy" else 1
    found = pruned["quality"]["value"] * scale
    if abs(found - reported["value"]) > 1e-3 * max(1.0, abs(found)):
        sys.exit(f"the reloaded model scores {found}, the saved one scored {reported['value']}")
    unit = "%" if scale == 100 else " ppl"
    sizes = record["sizes"]["file_bytes"]
    return [
        f"{dense['quality']['value'] * scale:.2f} -> {found:.2f}{unit}",
        *(f"{dense[key]:,} -> {pruned[key]:,}" for key in ("parameters", "nonzeros", "flops")),
        f"{dense['latency']['16']['median']:.1f} -> {pruned['latency']['16']['median']:.1f}",
        f"{sizes['before']:,} -> {sizes['after']:,}",
    ]


if __name__ == "__main__":
    main()
