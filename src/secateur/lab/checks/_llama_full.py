"""A trained Llama of 5.5 M parameters on WikiText-2: every one-shot method beside its baseline and a random control."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from secateur.core.seeding import generator
from secateur.lab.checks._beside import Amount, Figure, Ground, Rival, beside
from secateur.lab.reproduce import FullCheck

GROUND = Ground(
    "llama-5m-english",
    "Llama of 5.5 M parameters trained on WikiText-2; 64 calibration windows of 256 tokens of the validation text, "
    "drawn by the seed; perplexity on 120 windows of the test text, nothing trained after pruning. Shares of blocks "
    "are shares of the parameters inside the blocks.",
    Figure.PRUNED,
    lower=True,
)
MAGNITUDE, NORM, UNITS = Rival("global_magnitude", "per layer"), Rival("channel_norm"), Rival("group_random")
SPARSITIES: tuple[Amount, ...] = (("sparsity", 0.5), ("sparsity", 0.7), ("pattern", "2:4"))
SHARES: tuple[Amount, ...] = (("blocks", 0.2), ("blocks", 0.4))
BLOCKS = 6
DEPTHS: tuple[Amount, ...] = (("sparsity", 0.17), ("sparsity", 0.34))  # one and two of six blocks


def of_weights(method: str, baseline: Rival = MAGNITUDE) -> FullCheck:
    """A method on single weights beside magnitude per layer, or another, and random weights."""
    return beside(GROUND, Rival(method), baseline, Rival("random"), SPARSITIES)


def of_units(method: str) -> FullCheck:
    """A method on heads, neurons or widths beside the L2 norm of units and random units."""
    return beside(GROUND, Rival(method), NORM, UNITS, SHARES)


def of_blocks(method: str, label: str = "") -> FullCheck:
    """A method on whole blocks beside removing the last ones; the control are blocks drawn at random."""
    last = Rival("layer_limits", "reverse")
    return beside(GROUND, Rival(method, label), last, Rival("layer_limits", "reverse", _any_blocks), DEPTHS)


def _any_blocks(seed: int, amount: float | str) -> Mapping[str, Any]:
    order = torch.randperm(BLOCKS, generator=generator(seed, "random-blocks")).tolist()
    return {"selector": "given", "layers": tuple(order[: int(float(amount) * BLOCKS)])}
