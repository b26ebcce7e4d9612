"""What the checks on small character models share: the model, the text that comes with Python, its training."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.progress import Progress
from secateur.core.seeding import generator
from secateur.data.dataset import DataKind, Dataset
from secateur.measure import perplexity
from secateur.train.loop import Decay, Fitting, OptimizerName, Recipe
from secateur.zoo import text

CONTEXT = 64  # predicted characters per window


@cache
def _encoded() -> tuple[Tensor, Tensor, int]:
    """Training and held-out text as ids of the characters that occur, and how many there are."""
    split = len(text.training_text())
    symbols, ids = torch.unique(text.tokens(text.corpus()), return_inverse=True)
    return ids[:split], ids[split:], len(symbols)


@cache
def held_out() -> Dataset:
    """The held-out text in windows that do not overlap."""
    ids = _encoded()[1]
    count = len(ids) // (CONTEXT + 1)
    return Dataset("pydoc", DataKind.TEXT, ids[: count * (CONTEXT + 1)].view(count, CONTEXT + 1))


@dataclass(frozen=True)
class Widths:
    """Size of a character model."""

    blocks: int = 2
    width: int = 64
    heads: int = 4
    head: int = 16
    mlp: int = 256


class Block(nn.Module):
    """Pre-norm attention and MLP without biases."""

    def __init__(self, size: Widths):
        super().__init__()
        inner = size.heads * size.head
        self.head = size.head
        self.norms = nn.ModuleList(nn.LayerNorm(size.width, bias=False) for _ in range(2))
        self.q, self.k, self.v = (nn.Linear(size.width, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, size.width, bias=False)
        self.up, self.down = nn.Linear(size.width, size.mlp, bias=False), nn.Linear(size.mlp, size.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[batch, positions, width]` to the same."""
        y = self.norms[0](x)
        q, k, v = (layer(y).unflatten(-1, (-1, self.head)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, positions, head)
        x = x + self.o(mixed.transpose(1, 2).flatten(2))
        found: Tensor = x + self.down(F.gelu(self.up(self.norms[1](x))))
        return found


class CharacterModel(nn.Module):
    """A decoder over characters with learned positions and an output head of its own."""

    def __init__(self, size: Widths):
        super().__init__()
        symbols = _encoded()[2]
        self.tokens, self.positions = nn.Embedding(symbols, size.width), nn.Embedding(CONTEXT + 1, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.norm = nn.LayerNorm(size.width, bias=False)
        self.head = nn.Linear(size.width, symbols, bias=False)
        for embedding in (self.tokens, self.positions):
            nn.init.normal_(embedding.weight, std=0.02)  # torch's default of 1 would drown what the blocks add

    def forward(self, ids: Tensor) -> Tensor:
        """Logits `[batch, positions, symbols]` of ids `[batch, positions]`."""
        x = self.tokens(ids) + self.positions.weight[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        found: Tensor = self.head(self.norm(x))
        return found


def fitting(steps: int, seed: int, progress: Progress, batch: int = 32, lr: float = 3e-3) -> Fitting:
    """AdamW (0.9, 0.95, decay 0.1), clip 1, 1 % warm-up, cosine to 10 %; every window of text is met once."""
    recipe = Recipe(
        steps=steps,
        batch=batch,
        optimizer=OptimizerName.ADAMW,
        lr=lr,
        betas=(0.9, 0.95),
        weight_decay=0.1,
        last=0.1,
        warmup=0.01,
        clip=1.0,
        decay=Decay.COSINE,
    )
    windows = text.random_windows(_encoded()[0], steps * batch, CONTEXT + 1, generator(seed, "characters"))
    data = Dataset("pydoc", DataKind.TEXT, windows)
    return Fitting(data, recipe, _loss, seed=seed, progress=progress)


def _loss(model: nn.Module) -> dict[str, float]:
    """Held-out loss in nats per character."""
    return {"loss": math.log(perplexity(model, held_out()).value)}
