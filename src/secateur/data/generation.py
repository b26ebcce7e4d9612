"""Text written by a model: one small loop, greedy or sampled, with the model's cache where it has one.

Draws come from a generator for each prompt, so a response depends on the seed and the prompt's place only, not on how
prompts are batched; transformers' own `generate` draws from the global state. Greedy responses are the same.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core.errors import DataError, NumericsError
from secateur.core.method import Settings
from secateur.core.progress import Progress, Silent
from secateur.core.seeding import generator
from secateur.data.batches import cacheless, logits_of
from secateur.data.dataset import DataKind, Dataset
from secateur.data.running import device_of, evaluating


class Sampling(Settings):
    """How the next token is chosen; temperature 0 is greedy."""

    temperature: float = Field(0.0, ge=0, description="logits are divided by it; 0 takes the likeliest token")
    top_k: int = Field(0, ge=0, description="only so many likeliest tokens are drawn from; 0 for all")
    top_p: float = Field(1.0, gt=0, le=1, description="only the likeliest tokens with this much probability together")
    limit: int = Field(64, ge=1, description="largest number of new tokens")


@dataclass(frozen=True)
class Response:
    """What a model wrote.

    Attributes:
        tokens: ids, the stop token included.
        stopped: whether it ended with a stop token; otherwise it hit the limit.
    """

    tokens: tuple[int, ...]
    stopped: bool

    @property
    def written(self) -> tuple[int, ...]:
        """The ids without the stop token."""
        return self.tokens[:-1] if self.stopped else self.tokens


def stop_ids(model: nn.Module, tokenizer: Any = None) -> tuple[int, ...]:
    """All ids that end a response: those of the generation config, of the model's config and of the tokenizer."""
    found: set[int] = set()
    for source in (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer):
        ids = getattr(source, "eos_token_id", None)
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return tuple(sorted(found))


def respond(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    stop: Sequence[int] = (),
    seed: int = 0,
    batch: int = 64,
    cache: bool = True,
    progress: Progress | None = None,
) -> list[Response]:
    """A response to every prompt.

    Prompts of one length run together, so nothing is padded and no model needs a mask.

    Args:
        model: causal language model, ids `[n, length]` to logits `[n, length, vocabulary]`; put in eval mode.
        prompts: token ids, one or more each.
        sampling: temperature, cuts and the largest number of new tokens.
        stop: ids that end a response and are kept in it.
        seed: of the draws.
        batch: prompts that run together.
        cache: use the model's key/value cache if it returns one.
        progress: receives one step for each prompt.

    Raises:
        DataError: an empty prompt, or one that leaves no room in the model's context.
        NumericsError: the model gives NaN.
    """
    of_length = _by_length(prompts, context_of(model))
    found: dict[int, Response] = {}
    writer = _Writer(model, sampling, frozenset(stop), cache)
    progress = progress or Silent()
    progress.start("responses", len(prompts))
    try:
        with evaluating(model):
            for places in of_length.values():
                for start in range(0, len(places), batch):
                    part = places[start : start + batch]
                    ids = torch.tensor([list(prompts[place]) for place in part], device=device_of(model))
                    new = writer.continued(ids, _draws(sampling, seed, part))
                    found |= dict(zip(part, new, strict=True))
                    progress.advance(len(part))
    finally:
        progress.finish()
    return [found[place] for place in range(len(prompts))]


def context_of(model: nn.Module) -> int | None:
    """The longest sequence that the model's config allows; None where it says nothing."""
    found = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None


def _by_length(prompts: Sequence[Sequence[int]], context: int | None) -> dict[int, list[int]]:
    """Length -> places of the prompts that have it."""
    found: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        if not len(prompt):
            raise DataError(f"prompt {place} has no tokens; a model needs one or more to go on from")
        if context is not None and len(prompt) >= context:
            raise DataError(f"prompt {place} has {len(prompt)} tokens, the model's context is {context}; shorten it")
        found[len(prompt)].append(place)
    return found


def _draws(sampling: Sampling, seed: int, places: Sequence[int]) -> Tensor:
    """Uniform numbers `[prompts, limit]`; greedy decoding needs none."""
    if not sampling.temperature:
        return torch.empty(len(places), sampling.limit)
    return torch.stack(
        [torch.rand(sampling.limit, generator=generator(seed, "response", str(p)), dtype=torch.float64) for p in places]
    )


@dataclass(frozen=True)
class _Writer:
    """A model with everything that stays the same from prompt to prompt."""

    model: nn.Module
    sampling: Sampling
    stop: frozenset[int]
    cache: bool

    def continued(self, ids: Tensor, draws: Tensor) -> list[Response]:
        """Responses to prompts `[n, length]` of one length; runs until all have stopped."""
        context = context_of(self.model)
        limit = self.sampling.limit if context is None else min(self.sampling.limit, context - ids.shape[1])
        written: list[list[int]] = [[] for _ in ids]
        ended = [False] * len(ids)
        for step, logits in enumerate(self._logits(ids, written)):
            chosen = next_tokens(logits, self.sampling, draws[:, step])
            for row, token in enumerate(chosen.tolist()):
                ended[row] = ended[row] or token in self.stop
                written[row].append(token)  # behind a stop token too: the row runs along, `_response` cuts it
            if all(ended) or step + 1 == limit:
                break
        return [self._response(row) for row in written]

    def _response(self, tokens: list[int]) -> Response:
        end = next((place for place, token in enumerate(tokens) if token in self.stop), None)
        return Response(tuple(tokens if end is None else tokens[: end + 1]), end is not None)

    def _logits(self, ids: Tensor, written: list[list[int]]) -> Iterator[Tensor]:
        """Logits `[n, vocabulary]` of the next token, for as long as the caller appends to `written`."""
        asked: dict[str, Any] = cacheless(self.model)
        if self.cache and asked:
            asked = {"use_cache": True}
        memory = None
        while True:
            out = (
                self.model(ids, **asked) if memory is None else self.model(ids[:, -1:], past_key_values=memory, **asked)
            )
            memory = getattr(out, "past_key_values", None) if self.cache else None
            logits = logits_of(out)[:, -1].float()
            if logits.isnan().any():
                raise NumericsError("the model gives NaN for the next token; its weights are damaged")
            yield logits
            newest = torch.tensor([row[-1] for row in written], device=ids.device)
            ids = torch.cat([ids, newest[:, None]], 1)


def next_tokens(logits: Tensor, sampling: Sampling, draws: Tensor) -> Tensor:
    """One token for each row of logits `[n, vocabulary]`, by uniform numbers `[n]`; int64 `[n]`.

    Top-k first, then top-p on what is left: the fewest likeliest tokens that reach it, as transformers does.
    """
    if not sampling.temperature:
        return logits.argmax(-1)
    ordered, order = (logits.double() / sampling.temperature).sort(dim=-1, descending=True, stable=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = -torch.inf
    shares = ordered.softmax(-1)
    before = shares.cumsum(-1) - shares
    shares = shares.masked_fill(before >= sampling.top_p, 0)
    reached = shares.cumsum(-1)
    place = torch.searchsorted(reached, draws.to(reached)[:, None] * reached[:, -1:], right=True)
    last = (shares > 0).sum(-1, keepdim=True) - 1  # rounding must not lead behind the last token that may be drawn
    return order.gather(-1, torch.minimum(place, last))[:, 0]


def generated_windows(
    model: nn.Module,
    count: int,
    length: int,
    *,
    seed: int = 0,
    start: Tensor | None = None,
    sampling: Sampling | None = None,
    progress: Progress | None = None,
) -> Dataset:
    """Calibration data that a model writes itself: `count` windows of `length` tokens, for `data=`.

    A stop token does not end a window: what follows it begins anew, as in packed training text.

    Args:
        model: the unpruned language model.
        count: windows.
        length: tokens in each, what it starts from included.
        seed: of all draws.
        start: ids int64 `[count, k]` to go on from; default: the model's first token (`bos_token_id`), or, where it
            has none, one token drawn evenly from the vocabulary for each window.
        sampling: default: temperature 0.9 and top-p 0.95 (Shrestha et al. 2026); its limit is not used.
        progress: receives one step for each window.

    Raises:
        DataError: a count or length that makes no sense, or starts of another number or length.
    """
    context = context_of(model)
    if count < 1 or length < 2 or (context is not None and length > context):
        longest = "" if context is None else f" and at most the model's context of {context}"
        raise DataError(f"windows need a count of 1 or more, 2 tokens or more{longest}; got {count} of {length} tokens")
    start = _starts(model, count, seed) if start is None else start
    if start.dim() != 2 or len(start) != count or not 1 <= start.shape[1] < length:
        raise DataError(f"starts {list(start.shape)} do not suit {count} windows of {length} tokens; give [{count}, k]")
    asked = sampling or Sampling(temperature=0.9, top_p=0.95)
    asked = asked.model_copy(update={"limit": length - start.shape[1]})
    written = respond(model, start.tolist(), asked, seed=seed, progress=progress)
    windows = torch.cat([start.cpu(), torch.tensor([list(response.tokens) for response in written])], 1)
    return Dataset("windows written by the model", DataKind.TEXT, windows)


def _starts(model: nn.Module, count: int, seed: int) -> Tensor:
    config: Any = getattr(model, "config", None)
    first, vocabulary = getattr(config, "bos_token_id", None), getattr(config, "vocab_size", None)
    if isinstance(first, int):
        return torch.full((count, 1), first)
    if not isinstance(vocabulary, int):
        raise DataError(f"{type(model).__name__} does not say its vocabulary; give start=..., ids [{count}, k]")
    return torch.randint(vocabulary, (count, 1), generator=generator(seed, "starts"))
