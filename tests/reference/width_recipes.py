"""Inputs of the golden numbers of width pruning: the same bits on every machine."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, INNER, BLOCKS, LENGTH, SEQUENCES = 12, 256, 4, 10, 6
HEADS, HEAD_DIM, FEATURES = 3, 4, 10
CFSP: dict[str, dict[str, Any]] = {
    "three_w_one_wa": {"sparsity": 0.4, "coarse": "mse", "scale": 60.0},
    "three_w_one_a": {"sparsity": 0.2, "coarse": "mse", "scale": 60.0, "power": 0.5},
    "one_wa": {"sparsity": 0.6, "coarse": "mae", "scale": 3000.0, "inner_power": 0.5, "power": 2.0},
    "one_a": {"sparsity": 0.4, "coarse": "angular", "scale": 1.0},
    "wanda_base": {"sparsity": 0.5, "coarse": "cosine", "scale": 1.0, "slope": 1000.0},
}
"""Fine score -> the rest of the recipe; `scale` multiplies the inputs."""


def numbers(seed: int, *shape: int) -> Tensor:
    """Integers in [-127, 127] / 64, from NumPy's frozen stream."""
    drawn = np.random.RandomState(seed).randint(-127, 128, shape)
    return torch.from_numpy((drawn / 64).astype(np.float32))


class MLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, seed: int):
        super().__init__()
        for place, (name, out, into) in enumerate(
            (("gate_proj", INNER, WIDTH), ("up_proj", INNER, WIDTH), ("down_proj", WIDTH, INNER))
        ):
            layer = nn.Linear(into, out, bias=False)
            layer.weight = nn.Parameter(numbers(seed + place, out, into) / 8)
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """As the official walk calls it: mask and positions by keyword, a tuple back."""

    def __init__(self, seed: int):
        super().__init__()
        self.mlp, self.gain = MLP(seed), 1 + seed % 4

    def forward(self, x: Tensor, attention_mask: Any = None, position_ids: Any = None) -> tuple[Tensor]:
        size = x.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        return (x + self.gain * size * self.mlp(x / size) / 4,)


class Decoder(nn.Module):
    """Blocks with nothing but gated feed-forwards; inputs are hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Module()
        self.model.layers = nn.ModuleList(Block(11 * index + 3) for index in range(BLOCKS))
        self.config, self.seqlen = SimpleNamespace(use_cache=None, hidden_size=WIDTH), LENGTH

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model.layers:
            x = block(x, attention_mask=None, position_ids=None)[0]
        return x


def sequences(scale: float) -> Tensor:
    """Hidden states `[sequences, tokens, width]`."""
    return numbers(99, SEQUENCES, LENGTH, WIDTH) * scale


AMP_COUNTS = ((32, 11008, 0.1), (32, 11008, 0.3125), (4, 256, 0.3), (4, 256, 0.6), (12, 3072, 0.47), (40, 13824, 0.55))
"""Heads, neurons and the share that goes from each of a layer's."""


def prompts() -> list[Tensor]:
    """What enters the output projection, one prompt after the other, `[1, tokens, heads * head_dim]`."""
    return [numbers(50 + length, 1, length, HEADS * HEAD_DIM) for length in (3, 8, 5)]


def projection() -> Tensor:
    """The output projection's weight, `[features, heads * head_dim]`."""
    return numbers(7, FEATURES, HEADS * HEAD_DIM)


def gate_and_up() -> tuple[Tensor, Tensor]:
    """Weights of gate and up, `[neurons, hidden]`; the first rows are all positive."""
    gate, up = numbers(21, 24, 16), numbers(22, 24, 16)
    gate[:3] = gate[:3].abs()
    return gate, up
