"""Demand 5: one block in memory at a time; the result is that of the model in memory."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur.core.shards import shapes_of, write_shard

HIDDEN, INNER, LAYERS, VOCABULARY = 768, 2048, 24, 2048

RUN = """
import json, sys
import torch
torch.set_num_threads(1)
from secateur.streaming import peak_resident, prune_folder
folder, out, method, spill = sys.argv[1:]
tokens = torch.randint(2048, (4, 128), generator=torch.Generator().manual_seed(0))
prune_folder(folder + "-tiny", out + "-tiny", method, 0.5, data=tokens % 8)  # what libraries take, once
before = peak_resident()
done = prune_folder(folder, out, method, 0.5, data=tokens, spill=spill == "1")
print(json.dumps({"before": before, "peak": peak_resident(), "blocks": len(done.seconds)}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 24 blocks with random weights in float32, 0.66 GiB; a block is 27 MiB."""
    home = tmp_path_factory.mktemp("large") / "model"
    home.mkdir()
    tiny = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2)
    LlamaForCausalLM(tiny).save_pretrained(f"{home}-tiny")
    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=12,
        tie_word_embeddings=True,
        dtype="float32",
    ).save_pretrained(home)
    shapes = {f"self_attn.{p}_proj": (HIDDEN, HIDDEN) for p in "qkvo"}
    shapes |= {"mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER)}
    weight_map = {}

    def keep(file, tensors):
        write_shard(home / file, shapes_of(tensors), iter(tensors.items()))
        weight_map.update(dict.fromkeys(tensors, file))

    for index in range(LAYERS):
        prefix = f"model.layers.{index}."
        block = {f"{prefix}{name}.weight": torch.randn(shape) / shape[1] ** 0.5 for name, shape in shapes.items()}
        block |= {f"{prefix}{n}_layernorm.weight": torch.ones(HIDDEN) for n in ("input", "post_attention")}
        keep(f"block-{index}.safetensors", block)
    rest = {"model.embed_tokens.weight": torch.randn(VOCABULARY, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    keep("rest.safetensors", rest)
    (home / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return home


@pytest.mark.parametrize(
    ("method", "spill", "matrices"),
    [("wanda", True, 0), pytest.param("sparsegpt", False, 3, marks=pytest.mark.slow)],
)
def test_memory_stays_at_two_blocks_and_little_else(folder, tmp_path, method, spill, matrices):
    command = [sys.executable, "-c", RUN, str(folder), str(tmp_path / "out"), method, "1" if spill else "0"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    mib = 2**20
    block = sum(path.stat().st_size for path in folder.glob("block-0.*")) / mib
    whole = sum(path.stat().st_size for path in folder.glob("*.safetensors")) / mib
    states = 2 * 4 * 128 * HIDDEN * 4 / mib
    solver = matrices * INNER**2 * 8 / mib  # in float64, of the widest layer
    bound = 2 * block + states + solver + 100  # what a forward pass and the allocator take beside that
    extra = (found["peak"] - found["before"]) / mib
    assert found["blocks"] == LAYERS
    assert bound < 0.4 * whole  # the bound means something
    assert extra < bound, (
        f"{extra:.0f} MiB beside what was there before, {bound:.0f} allowed, the model has {whole:.0f}"
    )
    assert sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors")) > 0.99 * whole * mib
