"""Inputs of the golden numbers: the same bits on every machine.

All numbers are small integers over powers of two and come from NumPy's frozen `RandomState` stream, so that
matrix products of inputs are exact in float32 whatever the machine's order of summation.
"""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

GOLDEN = "golden.safetensors"
PROVENANCE = "golden.json"


def weights(rows: int, columns: int, seed: int) -> Tensor:
    """Integers in [-2047, 2047] / 1024, none of them zero."""
    rng = np.random.RandomState(seed)
    drawn = rng.randint(1, 2048, (rows, columns)) * (2 * rng.randint(0, 2, (rows, columns)) - 1)
    return torch.from_numpy(drawn.astype(np.float32) / 1024)


def batches(
    features: int, seed: int, sizes: tuple[int, ...] = (3, 1, 4), length: int = 24, dead: int = 0
) -> list[Tensor]:
    """Correlated inputs `[sequences, length, features]` with features of very different scale.

    The first `dead` features of a random order are always zero.
    """
    rng = np.random.RandomState(seed + 1000)
    mixing = rng.randint(-2, 3, (features, features))
    scale = 2.0 ** rng.randint(-3, 3, features)
    scale[rng.permutation(features)[:dead]] = 0
    found = []
    for size in sizes:
        source = rng.randint(-8, 9, (size, length, features))
        found.append(torch.from_numpy(((source @ mixing) * scale / 64).astype(np.float32)))
    return found


def digest(*tensors: Tensor) -> str:
    """Says whether two machines made the same inputs."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Layer:
    """One linear layer and how it is pruned."""

    rows: int
    columns: int
    seed: int
    pruning: dict[str, Any]  # keywords of `secateur.plan`: a sparsity or a pattern
    settings: dict[str, Any] = field(default_factory=dict)
    dead: int = 0
    conv1d: bool = False
    length: int = 48

    def inputs(self) -> list[Tensor]:
        return batches(self.columns, self.seed, length=self.length, dead=self.dead)

    def module(self) -> nn.Module:
        """The layer, with `Conv1D`'s transposed weight where the recipe says so."""
        matrix = weights(self.rows, self.columns, self.seed)
        if self.conv1d:
            from transformers.pytorch_utils import Conv1D

            layer: nn.Module = Conv1D(self.rows, self.columns)
            layer.weight = nn.Parameter(matrix.t().contiguous())
        else:
            layer = nn.Linear(self.columns, self.rows, bias=False)
            layer.weight = nn.Parameter(matrix)
        return layer


SPARSEGPT = {
    "half": Layer(32, 256, 1, {"sparsity": 0.5}),
    "sixty": Layer(32, 256, 2, {"sparsity": 0.6}),
    "half_narrow_blocks": Layer(32, 256, 3, {"sparsity": 0.5}, {"blocksize": 16}),
    "two_of_four": Layer(32, 256, 4, {"pattern": "2:4"}),
    "sixty_narrow_blocks": Layer(48, 96, 5, {"sparsity": 0.6}, {"blocksize": 16}),
    "four_of_eight": Layer(48, 96, 6, {"pattern": "4:8"}),
    "two_of_four_narrow_blocks": Layer(48, 96, 7, {"pattern": "2:4"}, {"blocksize": 16}),
    "four_bits": Layer(48, 96, 8, {"sparsity": 0.5}, {"wbits": 4}),
    "four_bits_two_of_four": Layer(48, 96, 9, {"pattern": "2:4"}, {"wbits": 4}),
    "conv1d": Layer(48, 96, 10, {"sparsity": 0.5}, {"blocksize": 32}, conv1d=True),
    "dead": Layer(48, 96, 11, {"sparsity": 0.5}, dead=9),
    "dead_two_of_four": Layer(48, 96, 12, {"pattern": "2:4"}, dead=9),
    "few_tokens": Layer(48, 96, 13, {"sparsity": 0.5}, length=6),  # 48 tokens for 96 features
}

WANDA = {
    "half": {"sparsity": 0.5},
    "sixty": {"sparsity": 0.6},
    "two_of_four": {"pattern": "2:4"},
    "four_of_eight": {"pattern": "4:8"},
    "variant": {"sparsity": 0.5, "variant": True},
    "variant_sixty": {"sparsity": 0.6, "variant": True},
}
WIDTH, INNER, BLOCKS, LENGTH, SEQUENCES = 96, 64, 2, 24, 8


class _Attention(nn.Module):
    """Not attention: two projections of one input, rounded and clamped so that all sums stay exact."""

    def __init__(self, seed: int):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(WIDTH, INNER, bias=False), nn.Linear(INNER, WIDTH, bias=False)
        self.q_proj.weight = nn.Parameter(weights(INNER, WIDTH, seed))
        self.o_proj.weight = nn.Parameter(weights(WIDTH, INNER, seed + 1))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.round(self.q_proj(x)).clamp(0, 63)
        return torch.round(self.o_proj(hidden) / 4)


class Block(nn.Module):
    """A block as the official walk calls it: mask and positions by keyword, a tuple back."""

    def __init__(self, seed: int):
        super().__init__()
        self.self_attn = _Attention(seed)

    def forward(self, x: Tensor, attention_mask: Any = None, position_ids: Any = None) -> tuple[Tensor]:
        return ((x + self.self_attn(x)).clamp(-63, 63),)


class _Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(100 + 10 * index) for index in range(BLOCKS))


class Decoder(nn.Module):
    """Two blocks whose sums are exact in float32, arranged as the official code expects a Llama."""

    def __init__(self) -> None:
        super().__init__()
        self.model = _Inner()

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.model.layers:
            x = layer(x, attention_mask=None, position_ids=None)[0]
        return x


def sequences() -> Tensor:
    """`[sequences, length, width]`: integers, features of different scale, the last ones never used."""
    rng = np.random.RandomState(77)
    source = rng.randint(-4, 5, (SEQUENCES, LENGTH, WIDTH)) @ rng.randint(-1, 2, (WIDTH, WIDTH))
    scaled = np.clip(source * 2.0 ** rng.randint(-3, 2, WIDTH), -63, 63)
    scaled[..., -5:] = 0
    return torch.from_numpy(np.round(scaled).astype(np.float32))


# GBLM-Pruner: masks from given gradient tables over `Decoder`, and the tables of a small Llama
GBLM = {
    "half": ({"sparsity": 0.5}, {}),
    "sixty": ({"sparsity": 0.6}, {}),
    "two_of_four": ({"pattern": "2:4"}, {}),
    "four_of_eight": ({"pattern": "4:8"}, {}),
    "variant": ({"sparsity": 0.5}, {"variant": True}),
    "inverse": ({"sparsity": 0.5}, {"inverse": True}),
    "gradient": ({"sparsity": 0.5}, {"mode": "gradient"}),
    "gradient_two_of_four": ({"pattern": "2:4"}, {"mode": "gradient"}),
    "gradient_inverse": ({"sparsity": 0.5}, {"mode": "gradient", "inverse": True}),
}
GRADIENT_SEQUENCES = 5


def tables(model: nn.Module) -> dict[str, Tensor]:
    """A made-up gradient table for every weight in the blocks: distinct in each row, exact in float16, from 1 up.

    About as large as the activation term, so that neither decides alone.
    """
    found = {}
    for number, (name, parameter) in enumerate(model.named_parameters()):
        rng = np.random.RandomState(500 + number)
        rows, columns = parameter.shape
        drawn = np.stack([rng.permutation(1920)[:columns] for _ in range(rows)]) + 128
        found[name] = torch.from_numpy(drawn.astype(np.float32) / 16)
    return found


def gradient_model() -> nn.Module:
    """A Llama of two blocks with queries that share keys, strong random weights, without dropout."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    rng = np.random.RandomState(88)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.from_numpy(rng.standard_normal(tuple(parameter.shape)) * 0.2))
    return model


def gradient_ids() -> Tensor:
    """`[sequences, length]` token ids."""
    return torch.from_numpy(np.random.RandomState(89).randint(0, 40, (GRADIENT_SEQUENCES, 12)).astype(np.int64))
