"""What structured removal brings: measured prefill and decode speed-up over the FLOPs ratio.

    python benchmarks/llm_speed.py [--methods cfsp,amp,flap,maw] [--shares 0.25,0.5] [--length 512]

The model is the one of llm_folder.py (Llama of 135.5 M parameters, random weights). FLOPs are counted on both models
for the prompt that is timed. Bar: prefill speed-up >= 0.85 x the FLOPs ratio.
"""

from __future__ import annotations

import argparse
import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import secateur as sc
from secateur.core.method import Batch
from secateur.measure import flops
from secateur.measure.decoding import decoding

BAR = 0.85


def build() -> LlamaForCausalLM:
    """Random weights: what is measured is speed."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def main() -> None:
    """Prune copies, time them side by side."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--methods", default="cfsp,amp,maw,flap")
    parser.add_argument("--shares", default="0.25,0.5")
    parser.add_argument("--length", type=int, default=512)
    args = parser.parse_args()
    model = build()
    tokens = torch.randint(32000, (8, 128))
    example = Batch((torch.randint(32000, (1, args.length)),))
    dense = flops(model, example)
    print(f"{torch.get_num_threads()} threads, prompt of {args.length} tokens; dense {dense / 1e9:.1f} GFLOPs")
    for name in args.methods.split(","):
        for share in map(float, args.shares.split(",")):
            cut = copy.deepcopy(model)
            sc.apply_(cut, sc.plan(cut, name, share, data=tokens, example=tokens[:1]))
            ratio = dense / flops(cut, example)
            times = decoding({"dense": model, "cut": cut}, prompt=args.length, tokens=16, rounds=7)
            prefill = times["cut"].prefill / times["dense"].prefill
            decode = times["cut"].decode / times["dense"].decode
            first = f"{times['cut'].first_token:.0f} ms to the first token (dense {times['dense'].first_token:.0f})"
            bar = f"{prefill / ratio:.2f} of the FLOPs ratio {ratio:.2f}, bar {BAR}"
            print(f"{name:6s} {share:4.0%}: prefill {prefill:.2f}x ({bar}), decode {decode:.2f}x, {first}", flush=True)


if __name__ == "__main__":
    main()
