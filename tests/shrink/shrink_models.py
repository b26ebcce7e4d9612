"""Tiny transformers models of several families, plain modules with traps, and plans made by hand."""

import subprocess
import sys

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BertForMaskedLM,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen3Config,
    T5Config,
    ViTConfig,
)

from secateur.core.plan import Plan
from secateur.core.units import Layout, Site, UnitKind

BLOCKS = 5
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def _perturbed(model: nn.Module) -> nn.Module:
    """Default initialisations are so small that a block hardly matters; make every block count, and repeatably."""
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=rng) * 0.2
            parameter.copy_(noise if parameter.dim() > 1 else parameter + noise)
    return model.eval()


def _common() -> dict:
    return {
        "vocab_size": 48,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        **NO_TOKENS,
    }


def llama() -> nn.Module:
    return _perturbed(AutoModelForCausalLM.from_config(LlamaConfig(**_common())))


def tied_llama() -> nn.Module:
    return _perturbed(AutoModelForCausalLM.from_config(LlamaConfig(**_common(), tie_word_embeddings=True)))


def gpt2() -> nn.Module:
    config = GPT2Config(vocab_size=48, n_embd=16, n_layer=BLOCKS, n_head=2, n_positions=64, **NO_TOKENS)
    return _perturbed(AutoModelForCausalLM.from_config(config))


def opt() -> nn.Module:
    config = OPTConfig(
        vocab_size=48,
        hidden_size=16,
        ffn_dim=24,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
        **(NO_TOKENS | {"pad_token_id": 1}),
    )
    return _perturbed(AutoModelForCausalLM.from_config(config))


def qwen3() -> nn.Module:
    """Layers alternate between full and sliding attention, so that a wrong cut of `layer_types` shows."""
    kinds = ["full_attention", "sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    config = Qwen3Config(**_common(), head_dim=4, use_sliding_window=True, sliding_window=3, layer_types=kinds)
    return _perturbed(AutoModelForCausalLM.from_config(config))


def gemma3() -> nn.Module:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    config = Gemma3TextConfig(**_common(), head_dim=4, sliding_window=3, layer_types=kinds)
    return _perturbed(AutoModelForCausalLM.from_config(config))


def bert() -> nn.Module:
    config = BertConfig(
        vocab_size=48,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
        max_position_embeddings=64,
    )
    return _perturbed(BertForMaskedLM(config))


def vit() -> nn.Module:
    config = ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=BLOCKS,
        num_attention_heads=2,
    )
    return _perturbed(AutoModelForImageClassification.from_config(config))


def t5() -> nn.Module:
    config = T5Config(
        vocab_size=48,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=BLOCKS,
        num_decoder_layers=BLOCKS,
        num_heads=2,
        decoder_start_token_id=0,
        pad_token_id=0,
        eos_token_id=1,
    )
    return _perturbed(AutoModelForSeq2SeqLM.from_config(config))


# name -> (factory, module list)
STACKS = {
    "llama": (llama, "model.layers"),
    "gpt2": (gpt2, "transformer.h"),
    "opt": (opt, "model.decoder.layers"),
    "qwen3": (qwen3, "model.layers"),
    "gemma3": (gemma3, "model.layers"),
    "bert": (bert, "bert.encoder.layer"),
    "vit": (vit, "vit.encoder.layer"),
    "t5-encoder": (t5, "encoder.block"),
    "t5-decoder": (t5, "decoder.block"),
}
CAUSAL = ("llama", "gpt2", "opt", "qwen3", "gemma3")


def model_of(name: str) -> tuple[nn.Module, str]:
    """A model and the name of its list of blocks, whatever this version of transformers calls it."""
    make, stack = STACKS[name]
    model = make()
    names = {found for found, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    if stack not in names:
        leaf = [found for found in names if len(model.get_submodule(found)) == BLOCKS]
        assert len(leaf) == 1, leaf
        stack = leaf[0]
    return model, stack


def model_inputs(name: str) -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(2)
    if name == "vit":
        return {"pixel_values": torch.randn(3, 1, 8, 8, generator=rng)}
    tokens = torch.randint(2, 48, (2, 12), generator=rng)
    if name.startswith("t5"):
        return {"input_ids": tokens, "decoder_input_ids": torch.randint(2, 48, (2, 7), generator=rng)}
    return {"input_ids": tokens}


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model.eval()(**inputs).logits


def block_plan(model: nn.Module, stack: str, gone: list[int]) -> Plan:
    """A hand-made plan: bound to no model, only to names and shapes."""
    count = len(model.get_submodule(stack))
    mask = torch.ones(count, dtype=torch.bool)
    mask[gone] = False
    return Plan({stack: Site(stack, UnitKind.BLOCK, (count,))}, {stack: mask})


def weight_plan(model: nn.Module, names: list[str], seed: int = 0) -> Plan:
    """A hand-made plan with random masks over the named parameters."""
    rng = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    shapes = {name: tuple(parameters[name].shape) for name in names}
    return Plan(
        {name: Site(name, UnitKind.WEIGHT, shape, Layout.LINEAR) for name, shape in shapes.items()},
        {name: torch.rand(shape, generator=rng) < 0.6 for name, shape in shapes.items()},
    )


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same_bits(model: nn.Module, before: dict[str, Tensor]) -> None:
    """Equal names, and values equal in every bit: -0.0 is not 0.0, NaN is itself."""
    after = model.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert after[name].dtype == value.dtype
        assert bits(after[name]) == bits(value), name


def fresh_python(code: str, *arguments: str) -> str:
    """What a new Python process prints; it fails where secateur was imported."""
    check = "\nimport sys as _s\nassert not [m for m in _s.modules if m.split('.')[0] == 'secateur']\n"
    done = subprocess.run(
        [sys.executable, "-I", "-c", code + check, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# --- plain modules ----------------------------------------------------------------------------------


class Residual(nn.Module):
    """x + linear(tanh(x))."""

    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(torch.tanh(x))


class Tower(nn.Module):
    """Blocks in a Sequential, a tied pair of linears, and buffers, one of which is not saved."""

    def __init__(self, kind: type = nn.Sequential):
        super().__init__()
        blocks = [Residual(6) for _ in range(6)]
        self.blocks = nn.Sequential(*blocks) if kind is nn.Sequential else nn.ModuleList(blocks)
        self.first = nn.Linear(6, 6, bias=False)
        self.second = nn.Linear(6, 6, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("shift", torch.arange(6.0))
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("scratch", torch.full((2,), 7.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.second(torch.relu(self.first(x + self.shift))) * self.count + self.scratch.sum()


def tower() -> nn.Module:
    return Tower()


def listed_tower() -> nn.Module:
    return Tower(nn.ModuleList)


def no_module() -> dict:
    return {"not": "a module"}


def breaks() -> nn.Module:
    raise ZeroDivisionError("by design")


def made_sharded(folder) -> None:
    """The Llama in several files."""
    llama().save_pretrained(folder, max_shard_size="10KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 2
