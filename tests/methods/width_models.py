"""Small language models and oracles for the tests of structured language-model methods on widths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    OPTConfig,
    Phi3Config,
    PretrainedConfig,
)

from secateur.core.method import Batch

IDS = torch.randint(3, 40, (6, 8), generator=torch.Generator().manual_seed(2))
TEXT = [Batch((IDS[:4],)), Batch((IDS[4:],))]
COMMON: dict[str, Any] = {
    "vocab_size": 40,
    "max_position_embeddings": 32,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def made(config: PretrainedConfig) -> nn.Module:
    """With weights large enough for blocks to matter, biases included."""
    torch.manual_seed(0)
    model: nn.Module = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def llama(heads: int = 4, kv: int = 4, head_dim: int = 4, layers: int = 3, inner: int = 24) -> nn.Module:
    config = LlamaConfig(
        hidden_size=16,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv,
        head_dim=head_dim,
        **COMMON,
    )
    return made(config)


def opt() -> nn.Module:
    """Feed-forwards without a gate, with biases."""
    config = OPTConfig(
        hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=16, **COMMON
    )
    return made(config)


def phi3() -> nn.Module:
    """Gate and up in one layer, and so query, key and value."""
    config = Phi3Config(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        **COMMON,
    )
    return made(config)


def mixtral() -> nn.Module:
    """Experts."""
    config = MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=4,
        **COMMON,
    )
    return made(config)


def big_llama(layers: int, hidden: int, inner: int, heads: int, **more: Any) -> nn.Module:
    """Only the shapes, on the meta device."""
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


@torch.no_grad()
def seen(model: nn.Module, module: str, ids: Tensor = IDS, **more: Any) -> Tensor:
    """What enters a module when the model runs on all ids at once, float64."""
    found: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_pre_hook(lambda _, args: found.append(args[0].double()))
    model(ids, **more)
    handle.remove()
    return found[0]


def padded() -> tuple[list[Batch], list[Batch]]:
    """Prompts of 8 and 5 tokens: one by one, and in one batch with padding on the right."""
    long, short = IDS[:1], IDS[1:2, :5]
    filled = torch.cat([short, torch.full((1, 3), 7)], 1)
    mask = torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    together = Batch(kwargs={"input_ids": torch.cat([long, filled]), "attention_mask": mask})
    return [Batch((long,)), Batch((short,))], [together]


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found
