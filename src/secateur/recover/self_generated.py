"""Recovery on responses of the unpruned model: it answers prompts, the pruned one is tuned on its answers by LoRA.

Shrestha et al. 2026, "On the limits of layer pruning for generative reasoning in LLMs". The full model answers each
prompt once, sampled at temperature 0.9 and top-p 0.95, without any filter for right answers; the end token is kept so
that the pruned model learns to stop, and answers cut off by the limit are left out. The loss is on the answer only.
LoRA on all linear layers of the blocks: rank 16, alpha 32, dropout 0.05 (the paper's plain variant); AdamW 2e-4,
betas 0.9 and 0.99, decay 1e-4, constant after 50 steps of warm-up, 8 samples a step, clip 1; merged in the end.

The paper's main runs are QLoRA (4-bit base, rank 64, alpha 16), which needs a GPU and bitsandbytes and is not here. The
released code looks for the assistant's header in the tokens and silently ignores samples without it; here prompt and
answer are never joined before the border is known, so every sample has a loss.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import DataError, MissingExtraError, ModelError, NumericsError, OutputError, SettingsError
from secateur.core.method import Settings
from secateur.core.progress import Progress, Silent, track
from secateur.core.seeding import generator, seeded
from secateur.core.units import UnitKind
from secateur.data.batches import IGNORED, cacheless, logits_of
from secateur.data.chat import QUESTION, prompt_ids
from secateur.data.dataset import Dataset
from secateur.data.generation import Sampling, context_of, respond, stop_ids
from secateur.data.running import device_of, evaluating, training
from secateur.recover.recovery import Recovery, Request
from secateur.structure.sites import weight_layers
from secateur.structure.stacks import find_stacks

STOPPED, CUT = "stop", "length"


@dataclass(frozen=True)
class Exchange:
    """A prompt and an answer to it.

    Attributes:
        prompt, answer: as text; empty where there was no tokenizer.
        prompt_ids: with the frame or chat template around the prompt.
        answer_ids: the end token included, unless the answer was cut off.
        finish: `stop`, or `length` where the answer hit the limit.
    """

    prompt: str
    answer: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    finish: str


class LoRA(Settings):
    """How the pruned model is tuned."""

    steps: int = Field(300, ge=1, description="optimiser steps")
    batch: int = Field(8, ge=1, description="samples per step")
    rank: int = Field(16, ge=1, description="rank of the LoRA matrices")
    alpha: float = Field(32.0, gt=0, description="LoRA's scale is alpha / rank")
    dropout: float = Field(0.05, ge=0, lt=1, description="dropout before the LoRA matrices")
    lr: float = Field(2e-4, gt=0, description="learning rate, constant after the warm-up")
    warmup: int = Field(50, ge=0, description="steps of linearly rising learning rate")
    betas: tuple[float, float] = Field((0.9, 0.99), description="of AdamW")
    weight_decay: float = Field(1e-4, ge=0, description="of AdamW")
    clip: float = Field(1.0, gt=0, description="largest gradient norm")
    held_out: float = Field(0.1, ge=0, lt=1, description="share of the answers that only the validation loss sees")


class SelfGeneratedSettings(LoRA):
    """The recovery's settings: LoRA's, and how prompts and responses are made from windows of text."""

    prompt: int = Field(32, ge=1, description="tokens of each window that the unpruned model goes on from")
    responses: int = Field(1024, ge=1, description="at most so many windows are answered")
    limit: int = Field(512, ge=1, description="largest number of tokens in a response")
    temperature: float = Field(0.9, gt=0, description="of sampling; the paper does not decode greedily")
    top_p: float = Field(0.95, gt=0, le=1, description="of sampling")

    @property
    def sampling(self) -> Sampling:
        """How the responses are drawn."""
        return Sampling(temperature=self.temperature, top_p=self.top_p, limit=self.limit)


def self_generated(
    full: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    sampling: Sampling | None = None,
    *,
    frame: str = QUESTION,
    seed: int = 0,
    path: str | Path | None = None,
    progress: Progress | None = None,
) -> list[Exchange]:
    """Let the unpruned model answer prompts, once each.

    Args:
        full: the model before anything was removed.
        tokenizer: its tokenizer.
        prompts: questions; those that leave no room in the model's context are left out.
        sampling: default: temperature 0.9, top-p 0.95, 512 new tokens at most.
        frame: what stands around a prompt, `{}`, where the tokenizer has no chat template.
        seed: of the draws.
        path: a JSON Lines file to keep them in; must not exist.
        progress: receives one step for each prompt.

    Raises:
        DataError: no prompt fits the model's context.
        OutputError: the file exists or cannot be written.
    """
    if path is not None and Path(path).exists():
        raise OutputError(f"'{path}' exists already; choose another file for the responses")
    context = context_of(full)
    framed = [(prompt, prompt_ids(tokenizer, prompt, frame)) for prompt in prompts]
    fitting = [(prompt, ids) for prompt, ids in framed if context is None or len(ids) < context]
    if not fitting:
        raise DataError(f"none of {len(prompts)} prompts leaves room in the model's context of {context} tokens")
    sampling = sampling or SelfGeneratedSettings().sampling
    stop = stop_ids(full, tokenizer)
    answers = respond(full, [ids for _, ids in fitting], sampling, stop=stop, seed=seed, progress=progress)
    made = [
        Exchange(
            prompt,
            tokenizer.decode(list(answer.written)),
            tuple(ids),
            answer.tokens,
            STOPPED if answer.stopped else CUT,
        )
        for (prompt, ids), answer in zip(fitting, answers, strict=True)
    ]
    if path is not None:
        write_exchanges(made, path)
    return made


def exchange_of(tokenizer: Any, prompt: str, answer: str, stop: Sequence[int], frame: str = QUESTION) -> Exchange:
    """A given answer, say a data set's own, in the form of a generated one: with an end token.

    Raises:
        SettingsError: there is no end token.
    """
    if not stop:
        raise SettingsError("the model has no end token, so a given answer cannot end; name one with stop=[...]")
    end = getattr(tokenizer, "eos_token_id", None)
    ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    whole = (*ids, end if end in stop else stop[0])
    return Exchange(prompt, answer, tuple(prompt_ids(tokenizer, prompt, frame)), whole, STOPPED)


def write_exchanges(exchanges: Sequence[Exchange], path: str | Path) -> None:
    """Write one JSON object a line; the file appears whole or not at all.

    Raises:
        OutputError: it cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text("".join(json.dumps(asdict(item)) + "\n" for item in exchanges), encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OutputError(f"cannot write '{path}': {error.strerror}") from error


def read_exchanges(path: str | Path) -> list[Exchange]:
    """Read what `write_exchanges` wrote.

    Raises:
        DataError: the file is missing or a line is no exchange; names the line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"'{path}' cannot be read: {error.strerror}") from error
    return [_exchange(line, f"line {number} of '{path}'") for number, line in enumerate(lines, 1)]


def _exchange(line: str, where: str) -> Exchange:
    try:
        found = json.loads(line)
        ids = {name: tuple(map(int, found[name])) for name in ("prompt_ids", "answer_ids")}
        return Exchange(str(found["prompt"]), str(found["answer"]), **ids, finish=str(found["finish"]))
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is no prompt with an answer: {type(error).__name__} {error}") from error


def usable(exchanges: Sequence[Exchange], stops: bool = True) -> list[Exchange]:
    """The exchanges to train on: those whose answer ended by itself.

    Args:
        exchanges: with answers of any length.
        stops: whether the model has an end token at all; without one every answer is cut off and stays.

    Raises:
        DataError: none is left.
    """
    found = [one for one in exchanges if one.answer_ids and (one.finish == STOPPED or not stops)]
    if not found:
        raise DataError(
            f"all {len(exchanges)} answers were cut off by the limit, so nothing is left to learn to stop from; "
            "raise the limit"
        )
    return found


def padded(exchanges: Sequence[Exchange], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Ids and labels int64 `[n, longest]`, padded behind; labels of prompt and padding are -100.

    A causal model's real tokens never see the padding behind them, so no mask is needed.
    """
    longest = max(len(one.prompt_ids) + len(one.answer_ids) for one in exchanges)
    ids = torch.full((len(exchanges), longest), pad)
    labels = torch.full((len(exchanges), longest), IGNORED)
    for row, one in enumerate(exchanges):
        start, end = len(one.prompt_ids), len(one.prompt_ids) + len(one.answer_ids)
        ids[row, :end] = torch.tensor([*one.prompt_ids, *one.answer_ids])
        labels[row, start:end] = torch.tensor(one.answer_ids)
    return ids, labels


def answer_loss(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean next-token cross entropy in nats over the labels that are not -100."""
    logits = logits_of(model(ids, **cacheless(model)))
    return F.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)


def tune(
    model: nn.Module,
    exchanges: Sequence[Exchange],
    settings: LoRA | None = None,
    *,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Tune a model in place on answers by LoRA, and merge what was learnt into its weights.

    Args:
        model: causal language model, already pruned.
        exchanges: to learn from; see `usable`.
        settings: LoRA's.
        seed: of initialisation, order and dropout.
        progress: receives one step for each optimiser step.

    Returns:
        Steps, trained parameters, first and last loss, and the loss on held-out answers where there are any.

    Raises:
        MissingExtraError: peft is not installed.
        DataError: there are no exchanges.
        NumericsError: the loss became NaN or infinite; gives the step.
    """
    settings, progress = settings or LoRA(), progress or Silent()
    learnt, held_out = _split(exchanges, settings.held_out, seed)
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    tuned = _with_lora(model, settings, seed)
    try:
        losses = _fit(tuned, learnt, settings, seed, progress)
        trained = sum(p.numel() for p in tuned.parameters() if p.requires_grad)
    except BaseException:
        tuned.unload()
        raise
    else:
        tuned.merge_and_unload(safe_merge=True)
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(wanted[name])
    figures = {"trained_parameters": float(trained), "first_loss": losses[0], "last_loss": losses[-1]}
    if held_out:
        figures["validation_loss"] = _loss_on(model, held_out, settings.batch)
    return {"steps": float(settings.steps), **figures}


def _split(exchanges: Sequence[Exchange], share: float, seed: int) -> tuple[list[Exchange], list[Exchange]]:
    """Answers to learn from, and held-out ones."""
    if not exchanges:
        raise DataError("there are no answers to tune on")
    order = torch.randperm(len(exchanges), generator=generator(seed, "held-out answers")).tolist()
    held_out = int(share * len(exchanges))
    return [exchanges[place] for place in order[held_out:]], [exchanges[place] for place in order[:held_out]]


def _loss_on(model: nn.Module, exchanges: Sequence[Exchange], size: int) -> float:
    """Mean over batches of the loss on answers."""
    losses = []
    with evaluating(model):
        for start in range(0, len(exchanges), size):
            ids, labels = padded(exchanges[start : start + size])
            losses.append(float(answer_loss(model, ids.to(device_of(model)), labels.to(device_of(model)))))
    return sum(losses) / len(losses)


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise MissingExtraError("peft", "peft", "tuning by LoRA") from None
    return peft


def _with_lora(model: nn.Module, settings: LoRA, seed: int) -> Any:
    peft = _peft()
    blocks = [name for stack in find_stacks(model) for name in stack.names]
    layers = weight_layers(model, within=blocks).layers
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=[name.removesuffix(".weight") for name in layers],
        bias="none",
    )
    with seeded(seed):
        return peft.get_peft_model(model, config)


def _fit(model: nn.Module, exchanges: Sequence[Exchange], settings: LoRA, seed: int, progress: Progress) -> list[float]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, settings.lr, settings.betas, weight_decay=settings.weight_decay)
    device, losses = device_of(model), list[float]()
    with training(model, seed):
        batches = _batches(exchanges, settings.batch, seed)
        for step in track(range(settings.steps), progress, "tuning on answers"):
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * min(1.0, (step + 1) / max(1, settings.warmup))
            ids, labels = padded(next(batches))
            optimizer.zero_grad()
            loss = answer_loss(model, ids.to(device), labels.to(device))
            if not torch.isfinite(loss.detach()):
                raise NumericsError(f"the loss is {float(loss.detach())} at step {step + 1} of tuning; lower lr")
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, settings.clip)
            optimizer.step()
            losses.append(float(loss.detach()))
    return losses


def _batches(exchanges: Sequence[Exchange], size: int, seed: int) -> Iterator[list[Exchange]]:
    """Endless; every exchange once an epoch, in a new order each time; the short rest of an epoch is left out."""
    size, epoch = min(size, len(exchanges)), 0
    while True:
        order = torch.randperm(len(exchanges), generator=generator(seed, "answers", str(epoch))).tolist()
        for start in range(0, len(order) - size + 1, size):
            yield [exchanges[place] for place in order[start : start + size]]
        epoch += 1


def refuse(model: nn.Module, data: Dataset, removed: UnitKind) -> None:
    """Say before anything is removed what this is not for.

    Raises:
        SettingsError: single weights are removed, which merging would fill.
        ModelError: the data are no text.
        MissingExtraError: peft is not installed.
    """
    if removed is UnitKind.WEIGHT:
        raise SettingsError(
            "self_generated merges LoRA into whole matrices, which would fill removed weights; finetune"
        )
    if data.inputs.dim() != 2 or data.inputs.dtype != torch.int64:
        raise ModelError(f"self_generated is for language models; '{data.name}' holds no windows of tokens")
    _peft()


def recover(request: Request, settings: SelfGeneratedSettings) -> dict[str, float]:
    """Let the unpruned model go on from the starts of the data's windows, and tune the pruned model on that.

    Raises:
        SettingsError: the unpruned model is not given, or the plan removed single weights, which merging would fill.
        DataError, ModelError: the data are no text, or nothing usable was written.
    """
    full, data = request.dense, request.data
    if full is None:
        raise SettingsError("self_generated needs the unpruned model, which writes the answers: Request(dense=...)")
    if full is request.model:
        raise SettingsError("dense must be the model before pruning, not the pruned one itself; give a copy of it")
    for kind in request.plan.kinds:
        refuse(request.model, data, kind)
    starts = data.sample(settings.responses, request.seed).inputs[:, : settings.prompt].tolist()
    stop = stop_ids(full)
    answers = respond(full, starts, settings.sampling, stop=stop, seed=request.seed, progress=request.progress)
    exchanges = [
        Exchange("", "", tuple(ids), answer.tokens, STOPPED if answer.stopped else CUT)
        for ids, answer in zip(starts, answers, strict=True)
    ]
    chosen = usable(exchanges, stops=bool(stop))
    found = tune(request.model, chosen, settings, seed=request.seed, progress=request.progress)
    return {**found, "answers": float(len(chosen)), "answers_cut_off": float(len(exchanges) - len(chosen))}


recovery = Recovery(
    name="self_generated",
    title="tune a language model by LoRA on answers of the unpruned one; expect it to write more like that one",
    settings=SelfGeneratedSettings,
    run=recover,
    refuse=refuse,
)
