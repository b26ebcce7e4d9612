"""Speed of text generation: reading the prompt, the first token, and the tokens after it, with a key/value cache."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.progress import Progress, Silent, track
from secateur.data.running import device_of, evaluating


@dataclass(frozen=True)
class Decoding:
    """Medians over interleaved rounds.

    Attributes:
        prefill: prompt tokens a second.
        first_token: milliseconds from the prompt to its first answer token.
        decode: tokens a second after the first.
        prompt, tokens, batch: lengths and number of sequences.
        rounds: how many were timed.
        threads: torch's threads.
    """

    prefill: float
    first_token: float
    decode: float
    prompt: int
    tokens: int
    batch: int
    rounds: int
    threads: int

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def can_generate(model: nn.Module) -> bool:
    """Whether it is a transformers model that writes text."""
    asked = getattr(model, "can_generate", None)
    return callable(asked) and bool(asked())


def decoding(
    models: Mapping[str, nn.Module],
    *,
    prompt: int = 128,
    tokens: int = 32,
    batch: int = 1,
    rounds: int = 5,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Decoding]:
    """Time causal language models against each other, one greedy continuation each per round, in an order drawn anew.

    Args:
        models: name -> transformers model that takes `past_key_values`.
        prompt: tokens read at once.
        tokens: tokens written, the first one included.
        batch: sequences side by side.
        rounds: timed rounds, after one that is not.
        seed: of the prompt's tokens and the order.
        progress: told of every round.

    Raises:
        ModelError: a model keeps no key/value cache.
    """
    order, rng = random.Random(seed), torch.Generator().manual_seed(seed)
    vocabulary = min(int(model.get_input_embeddings().weight.shape[0]) for model in models.values())  # type: ignore[operator]
    ids = torch.randint(vocabulary, (batch, prompt), generator=rng)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for number in track(range(rounds + 1), progress or Silent(), "decoding"):
        for name in order.sample(sorted(models), len(models)):
            found = _continuation(models[name], ids.to(device_of(models[name])), tokens)
            if number:
                times[name].append(found)
    return {name: _medians(found, (batch, prompt), tokens) for name, found in times.items()}


def _medians(found: list[tuple[float, float]], shape: tuple[int, int], tokens: int) -> Decoding:
    first, rest = (statistics.median(column) for column in zip(*found, strict=True))
    batch, prompt = shape
    return Decoding(
        prefill=batch * prompt / first,
        first_token=first * 1e3,
        decode=batch * (tokens - 1) / rest if tokens > 1 else float("nan"),
        prompt=prompt,
        tokens=tokens,
        batch=batch,
        rounds=len(found),
        threads=torch.get_num_threads(),
    )


def _continuation(model: nn.Module, ids: Tensor, tokens: int) -> tuple[float, float]:
    """Seconds for the prompt and its first token, and for the other tokens."""
    with evaluating(model):
        start = _now(ids)
        out = model(ids, use_cache=True)
        if getattr(out, "past_key_values", None) is None:
            raise ModelError(f"{type(model).__name__} keeps no key/value cache, so decoding cannot be timed")
        following = out.logits[:, -1:].argmax(-1)
        first = _now(ids)
        for _ in range(tokens - 1):
            out = model(following, past_key_values=out.past_key_values, use_cache=True)
            following = out.logits[:, -1:].argmax(-1)
        return first - start, _now(ids) - first


def _now(tensor: Tensor) -> float:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
