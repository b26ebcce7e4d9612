"""Inputs of FLAP's golden numbers: a small Llama with heads of 128, as the published code asks for, and token ids."""

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

GOLDEN = "golden_flap.json"
WIDTH, HEADS, INNER, BLOCKS, LENGTH, SEQUENCES = 512, 4, 512, 3, 16, 6
PLANS = {
    "wifv-al_am-0.2": ("wifv", "al_am", 0.2, None),
    "wifv-al_am-0.5": ("wifv", "al_am", 0.5, None),
    "ifv-al_am-0.3": ("ifv", "al_am", 0.3, None),
    "wifn-al_am-0.3": ("wifn", "al_am", 0.3, None),
    "wifv-al_mm-0.4": ("wifv", "al_mm", 0.4, 3),
    "wifv-ul_um-0.3": ("wifv", "ul_um", 0.3, None),
    "wifn-ul_mm-0.4": ("wifn", "ul_mm", 0.4, 3),
}
"""Name -> metric, structure, ratio, heads to remove."""
WITH_BIASES = "wifv-al_am-0.5"


def llama() -> nn.Module:
    """Weights from NumPy's frozen stream, inputs of every layer of different scale so that widths differ."""
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=WIDTH,
        intermediate_size=INNER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    rng = np.random.RandomState(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                drawn = rng.standard_normal(tuple(parameter.shape)) * 0.06
                if name.endswith(("v_proj.weight", "up_proj.weight")):
                    drawn *= np.exp(rng.standard_normal((len(drawn), 1)))
                parameter.copy_(torch.from_numpy(drawn.astype(np.float32)))
    return model


def sequences() -> Tensor:
    """Token ids `[sequences, length]`."""
    return torch.from_numpy(np.random.RandomState(6).randint(0, 32, (SEQUENCES, LENGTH)))


def inputs() -> Tensor:
    """What enters a single layer: `[sequences, tokens, features]`."""
    rng = np.random.RandomState(7)
    return torch.from_numpy((rng.standard_normal((7, 9, 12)) + rng.standard_normal(12)).astype(np.float32))


def hexed(mask: Tensor) -> str:
    """A bool vector as hexadecimal digits."""
    return np.packbits(mask.numpy()).tobytes().hex()
