"""Weight and depth methods on a trained 5 M Llama and WikiText-2: perplexity on 120 windows of 256 tokens.

    python benchmarks/wikitext_llama.py MODEL_FOLDER VALID.txt TEST.txt [--seeds 3]

Calibration: 64 windows of 256 tokens of VALID, drawn anew for each seed. Prints mean and range over the
seeds; magnitude and random are the baseline and the control.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import secateur as sc
from secateur.data.dataset import DataKind, Dataset
from secateur.data.files import read_documents
from secateur.data.text import calibration_windows, evaluation_windows, tokenize
from secateur.io.models import open_tokenizer
from secateur.measure import perplexity

BLOCKS = ("model.layers.*",)
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "magnitude": ("global_magnitude", {"spread": "uniform", "include": BLOCKS}),
    "wanda": ("wanda", {}),
    "wanda, one pass": ("wanda", {"sequencing": "projection"}),
    "sparsegpt": ("sparsegpt", {}),
    "random": ("random", {"include": BLOCKS}),
}
BUDGETS: list[dict[str, Any]] = [{"sparsity": s} for s in (0.3, 0.5, 0.6, 0.7)] + [{"pattern": "2:4"}]


def spread(values: list[float]) -> str:
    return f"{sum(values) / len(values):9.2f}  ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("valid")
    parser.add_argument("test")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    opened = sc.open_model(args.model, dtype="float32")
    tokenizer = open_tokenizer(opened)
    documents, held_out = read_documents(Path(args.valid)), read_documents(Path(args.test))
    windows = evaluation_windows(tokenize("\n\n".join(held_out), tokenizer), 256, 120)
    evaluation = Dataset("test", DataKind.TEXT, windows)

    def score(method: str, seed: int, **options: Any) -> float:
        drawn = calibration_windows(documents, tokenizer, 256, 64, seed).tokens
        plan = sc.plan(opened.model, method, data=torch.as_tensor(drawn), seed=seed, **options)
        with sc.masked(opened.model, plan):
            return perplexity(opened.model, evaluation).value

    print(f"dense: {perplexity(opened.model, evaluation).value:.2f}")
    for name, (method, options) in ROWS.items():
        for budget in BUDGETS:
            found = [score(method, seed, **options, **budget) for seed in range(args.seeds)]
            asked = next(iter(budget.values()))
            print(f"{name:16s} {asked!s:4s} {spread(found)}", flush=True)
    for blocks in (1, 2):
        found = [score("shortgpt", seed, sparsity=blocks / 6 + 1e-6) for seed in range(args.seeds)]
        print(f"shortgpt, {blocks} of 6   {spread(found)}")


if __name__ == "__main__":
    main()
