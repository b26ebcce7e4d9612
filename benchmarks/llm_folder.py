"""Pruning a language model's folder: time and peak memory of Wanda and SparseGPT, beside llm-compressor if it is there.

    python benchmarks/llm_folder.py                                  # ours and plain forward passes
    python benchmarks/llm_folder.py --peer /path/to/venv/bin/python  # an environment with llm-compressor
    python benchmarks/llm_folder.py --large 8                        # 8 GiB in bf16, time per block over depth

Every job is a process of its own, so that peak memory (resident set) is its own; all in one run. The model is a Llama
of hidden 1024, 8 layers, MLP 2816, 16 heads, vocabulary 32,000 tied (135.5 M parameters) with random weights in
float32; 32 x 512 calibration tokens. Bars, beside llm-compressor: Wanda as in the paper (two passes per block) <= 0.75
of its time, one-pass mode <= 0.5, SparseGPT <= 0.6, peak memory <= 0.4.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

THREADS = "2"
JOBS = {
    "forward": ("forward", {}),
    "wanda, two passes": ("wanda", {}),
    "wanda, one pass": ("wanda", {"sequencing": "projection"}),
    "sparsegpt": ("sparsegpt", {}),
    "sparsegpt, one pass": ("sparsegpt", {"true_sequential": True}),
}
PEERS = {"wanda": "WandaPruningModifier", "sparsegpt": "SparseGPTModifier"}
BARS = {"wanda, two passes": ("wanda", 0.75), "wanda, one pass": ("wanda", 0.5), "sparsegpt": ("sparsegpt", 0.6)}


def build(folder: Path, bf16: bool) -> None:
    """The benchmark's model, saved as a Hugging Face folder, and its calibration tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

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
    model = LlamaForCausalLM(config).eval()
    (model.bfloat16() if bf16 else model).save_pretrained(folder)
    torch.save(torch.randint(32000, (32, 512)), folder / "tokens.pt")
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))  # the peer asks for one
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]", pad_token="[UNK]").save_pretrained(folder)


def build_large(folder: Path, gib: float) -> None:
    """A 7B-shaped Llama in bf16 with as many layers as fit, written shard by shard."""
    import torch
    from transformers import LlamaConfig

    from secateur.core.shards import shapes_of, write_shard

    folder.mkdir()
    layer = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096
    layers = max(2, round((gib * 2**30 / 2 - 2 * 32000 * 4096) / layer))
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=layers,
        num_attention_heads=32,
        max_position_embeddings=2048,
        dtype="bfloat16",
    ).save_pretrained(folder)
    shapes = {f"self_attn.{p}_proj": (4096, 4096) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (11008, 4096), "mlp.up_proj": (11008, 4096), "mlp.down_proj": (4096, 11008)}
    weight_map = {}
    generator = torch.Generator().manual_seed(0)

    def random(shape: tuple[int, ...]) -> torch.Tensor:
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    for index in range(layers):
        tensors = {f"model.layers.{index}.{name}.weight": random(shape) for name, shape in shapes.items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{norm}.weight"] = torch.ones(4096, dtype=torch.bfloat16)
        write_shard(folder / f"block-{index}.safetensors", shapes_of(tensors), iter(tensors.items()))
        weight_map |= dict.fromkeys(tensors, f"block-{index}.safetensors")
    rest = {"model.embed_tokens.weight": random((32000, 4096)), "lm_head.weight": random((32000, 4096))}
    rest["model.norm.weight"] = torch.ones(4096, dtype=torch.bfloat16)
    write_shard(folder / "rest.safetensors", shapes_of(rest), iter(rest.items()))
    weight_map |= dict.fromkeys(rest, "rest.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.save(torch.randint(32000, (4, 256)), folder / "tokens.pt")


OURS = """
import json, sys, time, torch
folder, out, name, settings = sys.argv[1], sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
tokens = torch.load(folder + "/tokens.pt", weights_only=True)
if name == "forward":
    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    start = time.perf_counter()
    with torch.no_grad():
        for window in tokens.split(4):
            model.model(window)
    print("seconds", time.perf_counter() - start)
else:
    from secateur.streaming import prune_folder
    from transformers import LlamaForCausalLM  # both clocks start when libraries are imported
    start = time.perf_counter()
    done = prune_folder(folder, out, name, 0.5, data=tokens, **settings)
    print("seconds", time.perf_counter() - start)
    print("blocks", json.dumps([round(s, 2) for s in done.seconds]))
"""

PEER = """
import sys, time, torch
folder, out, name = sys.argv[1:4]
from datasets import Dataset
from transformers import AutoModelForCausalLM
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier
tokens = torch.load(folder + "/tokens.pt", weights_only=True)
data = Dataset.from_dict({"input_ids": tokens.tolist(), "attention_mask": torch.ones_like(tokens).tolist()})
start = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
recipe = dict(WandaPruningModifier=WandaPruningModifier, SparseGPTModifier=SparseGPTModifier)[name](
    sparsity=0.5, mask_structure="0:0", targets=["Linear"], ignore=["re:.*lm_head"])
oneshot(model=model, dataset=data, recipe=recipe, max_seq_length=512, num_calibration_samples=len(tokens), batch_size=1,
        output_dir=out, tokenizer=None)
print("seconds", time.perf_counter() - start)
"""


def run(python: str, script: str, *arguments: str) -> tuple[float, float, list[str]]:
    """Seconds from after the imports to the end, peak GiB of the process, what it printed."""
    environment = os.environ | {"OMP_NUM_THREADS": THREADS, "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen([python, "-c", script, *arguments], stdout=output, stderr=output, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        output.seek(0)
        lines = output.read().splitlines()
    if status:
        raise SystemExit("\n".join(lines[-20:]))
    seconds = next(float(line.split()[1]) for line in lines if line.startswith("seconds"))
    return seconds, usage.ru_maxrss / 2**20, lines


def table(folder: Path, scratch: Path, peer: str | None, jobs: list[str]) -> None:
    """Every job once, and the ratios."""
    found: dict[str, tuple[float, float]] = {}
    for label in jobs:
        method, settings = JOBS[label]
        seconds, gib, _ = run(sys.executable, OURS, str(folder), str(scratch / "out"), method, json.dumps(settings))
        found[label] = seconds, gib
        print(f"{label:22s} {seconds:7.1f} s {gib:6.2f} GiB", flush=True)
        subprocess.run(["rm", "-rf", str(scratch / "out")], check=True)
    peers: dict[str, tuple[float, float]] = {}
    for method, modifier in PEERS.items() if peer else ():
        seconds, gib, _ = run(str(peer), PEER, str(folder), str(scratch / "peer"), modifier)
        peers[method] = seconds, gib
        print(f"{'llm-compressor ' + method:22s} {seconds:7.1f} s {gib:6.2f} GiB", flush=True)
        subprocess.run(["rm", "-rf", str(scratch / "peer")], check=True)
    for label, (method, bar) in BARS.items():
        if method in peers and label in found:
            time_ratio, memory = found[label][0] / peers[method][0], found[label][1] / peers[method][1]
            print(
                f"{label:22s} {time_ratio:5.2f} of the peer's time (bar {bar}), {memory:5.2f} of its memory (bar 0.4)"
            )


def main() -> None:
    """Parse, build, run."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", help="python of an environment with llm-compressor")
    parser.add_argument("--large", type=float, help="GiB of a large model instead")
    parser.add_argument("--bf16", action="store_true", help="the benchmark's model in bfloat16")
    parser.add_argument("--jobs", default=";".join(JOBS), help="which of " + "; ".join(JOBS))
    parser.add_argument("--method", default="wanda", help="for --large")
    parser.add_argument("--scratch", default=None, help="where to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as name:
        scratch = Path(name)
        if args.large:
            build_large(scratch / "model", args.large)
            size = sum(path.stat().st_size for path in (scratch / "model").glob("*.safetensors")) / 2**30
            start = time.perf_counter()
            seconds, gib, lines = run(
                sys.executable, OURS, str(scratch / "model"), str(scratch / "out"), args.method, "{}"
            )
            blocks = next(json.loads(line.partition(" ")[2]) for line in lines if line.startswith("blocks"))
            whole = time.perf_counter() - start
            print(f"{size:.2f} GiB in {seconds:.0f} s ({whole:.0f} s with start-up), peak {gib:.2f} GiB")
            print("seconds per block:", *blocks)
            return
        # in a process of its own: a job's peak memory counts from that of the process that starts it
        builder = multiprocessing.get_context("spawn").Process(target=build, args=(scratch / "model", args.bf16))
        builder.start()
        builder.join()
        table(scratch / "model", scratch, args.peer, [label for label in JOBS if label in args.jobs.split(";")])


if __name__ == "__main__":
    main()
