"""Batches from whatever the user has, and how a model is run and scored on one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import DataError
from secateur.core.fingerprint import describe
from secateur.core.method import Batch
from secateur.data.dataset import Dataset

IGNORED = -100  # the class index that torch's losses leave out


def as_batches(data: Any, size: int = 8) -> list[Batch]:
    """Batches from a Dataset, one tensor, or an iterable such as a DataLoader.

    Items of an iterable may be a `Batch`, a tensor (the model's only input), a mapping (keyword
    inputs; `labels` are the target) or a pair (input, target). A target that is a mapping holds those of
    several tasks, by name. Items are taken as the batches that they are; a tensor or a Dataset is cut
    into batches of `size`.

    Raises:
        DataError: nothing usable; says what was found.
    """
    if isinstance(data, Dataset):
        return list(data.batches(size))
    if isinstance(data, Tensor):
        return [Batch((chunk,)) for chunk in torch.split(data, size)]
    if isinstance(data, (Batch, Mapping)):
        data = [data]
    if not isinstance(data, Iterable):
        raise DataError(f"data must be a Dataset, a tensor or an iterable of batches, got {type(data).__name__}")
    batches = [_as_batch(item) for item in data]
    if not batches:
        raise DataError("the data holds no batches")
    return batches


def _as_batch(item: Any) -> Batch:
    if isinstance(item, Batch):
        return item
    if isinstance(item, Tensor):
        return Batch((item,))
    if isinstance(item, Mapping):
        labels = item.get("labels")
        if isinstance(labels, Mapping):
            return Batch(kwargs={key: value for key, value in item.items() if key != "labels"}, targets=dict(labels))
        # a language model's labels repeat its inputs; the shifted loss is computed from the logits here
        target = labels if isinstance(labels, Tensor) and labels.dim() == 1 else None
        return Batch(kwargs={key: value for key, value in item.items() if key != "labels"}, target=target)
    if isinstance(item, (tuple, list)) and len(item) == 2:
        if isinstance(item[1], Mapping):
            return Batch((item[0],), targets=dict(item[1]))
        return Batch((item[0],), target=item[1])
    raise DataError(f"a batch must be a tensor, a mapping or a pair (input, target), got {type(item).__name__}")


def split_batch(batch: Batch, size: int = 1) -> list[Batch]:
    """A batch as batches of at most `size` samples; tensors of another length stay whole."""

    def pick(item: Any, start: int) -> Any:
        sliced = isinstance(item, Tensor) and item.dim() > 0 and item.shape[0] == batch.samples
        return item[start : start + size] if sliced else item

    return [batch.each(partial(pick, start=start)) for start in range(0, batch.samples, size)]


def taken(batch: Batch, index: Tensor) -> Batch:
    """The samples at `index` (int64, repetition allowed), in that order; tensors of another length stay whole."""
    samples = batch.samples

    def pick(item: Any) -> Any:
        per_sample = isinstance(item, Tensor) and item.dim() > 0 and item.shape[0] == samples
        return item[index.to(item.device)] if per_sample else item

    return batch.each(pick)


def joined(batches: Sequence[Batch]) -> Batch:
    """All samples as one batch; what is not one entry per sample must be the same in all and stays as it is.

    Raises:
        DataError: the batches differ in what they hold or in the shape of a sample.
    """
    if len(batches) == 1:
        return batches[0]
    first, sizes = batches[0], [batch.samples for batch in batches]
    alike = {
        (len(batch.args), tuple(sorted(batch.kwargs)), batch.target is None, tuple(sorted(batch.targets)))
        for batch in batches
    }
    if len(alike) > 1:
        raise DataError("the batches differ in their inputs or only some have labels, so they cannot be joined to one")
    return Batch(
        tuple(_joined_item([batch.args[place] for batch in batches], sizes) for place in range(len(first.args))),
        {key: _joined_item([batch.kwargs[key] for batch in batches], sizes) for key in first.kwargs},
        _joined_item([batch.target for batch in batches], sizes),
        {name: _joined_item([batch.targets[name] for batch in batches], sizes) for name in first.targets},
    )


def _joined_item(items: list[Any], sizes: list[int]) -> Any:
    tensors = [item for item in items if isinstance(item, Tensor)]
    per_sample = [item.dim() > 0 and len(item) == size for item, size in zip(tensors, sizes, strict=False)]
    if len(tensors) < len(items) or not all(per_sample):
        if all(_same(item, items[0]) for item in items):
            return items[0]
        raise DataError("the batches differ in something that is not per sample, so they cannot be joined to one")
    if len({(item.shape[1:], item.dtype) for item in tensors}) > 1:
        shapes = sorted({str(list(item.shape[1:])) for item in tensors})
        raise DataError(f"samples of shapes {' and '.join(shapes)} cannot be joined to one batch; pad or resize them")
    return torch.cat(tensors)


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return torch.equal(one, other)
    return not isinstance(one, Tensor) and not isinstance(other, Tensor) and bool(one == other)


def drawn(batches: Sequence[Batch], samples: int, rng: torch.Generator) -> Batch:
    """One batch of `samples` samples, drawn without repetition; all of them, in order, if there are no more."""
    everything = joined(batches)
    if everything.samples <= samples:
        return everything
    return taken(everything, torch.randperm(everything.samples, generator=rng)[:samples])


def balanced(batches: Sequence[Batch], per_class: int, rng: torch.Generator) -> list[Batch]:
    """For each class in the labels, in ascending order, a batch of at most `per_class` drawn samples.

    Raises:
        DataError: there are no labels, or they are not one class index per sample.
    """
    everything = joined(batches)
    target = everything.target
    if target is None or target.dim() != 1 or target.is_floating_point():
        raise DataError("classes can only be balanced where every sample has one class index as its label")
    order = torch.randperm(everything.samples, generator=rng).to(target.device)
    places = [order[target[order] == label][:per_class] for label in sorted(set(target.tolist()))]
    return [taken(everything, place) for place in places]


def run(model: nn.Module, batch: Batch) -> Any:
    """The model's raw output; a transformers model is asked not to build a key/value cache."""
    return model(*batch.args, **(cacheless(model) | batch.kwargs))


def cacheless(model: nn.Module) -> dict[str, Any]:
    """The keyword that keeps a transformers model from building a key/value cache, where it has one."""
    return {"use_cache": False} if getattr(getattr(model, "config", None), "use_cache", None) is not None else {}


def logits_of(output: Any) -> Tensor:
    """The tensor that matters in a model's output: `.logits`, the tensor itself, or a tuple's first."""
    if isinstance(output, Tensor):
        return output
    for name in ("logits", "last_hidden_state"):
        if isinstance(found := getattr(output, name, None), Tensor):
            return found
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise DataError(f"the model returns {type(output).__name__}; expected a tensor, a tuple or an object with .logits")


def forward(model: nn.Module, batch: Batch) -> Tensor:
    """The model's logits on one batch."""
    return logits_of(run(model, batch))


def token_losses(logits: Tensor, tokens: Tensor) -> Tensor:
    """Next-token cross entropy in nats, `[sequences, length - 1]`, in float32.

    Args:
        logits: `[sequences, length, vocabulary]`.
        tokens: int64 `[sequences, length]`.
    """
    flat = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), tokens[:, 1:].flatten(), reduction="none")
    return flat.view(tokens.shape[0], -1)


def token_mask(batch: Batch) -> Tensor | None:
    """Which tokens are real, bool `[samples, tokens]`; None where no attention mask says that some are padding."""
    mask = batch.kwargs.get("attention_mask")
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def token_weights(batch: Batch, values: Tensor) -> Tensor:
    """What every token counts in a mean over its own sequence, float32 `[samples, tokens]`: 0 for padding.

    Args:
        batch: where the values come from.
        values: `[samples, tokens, features]`, or with samples and tokens in one dimension.

    Raises:
        DataError: the values do not have a row for each token of the attention mask.
    """
    tokens, mask = values.shape[:-1].numel() // batch.samples, token_mask(batch)
    if mask is None:
        return torch.full((batch.samples, tokens), 1 / tokens, device=values.device)
    if tuple(mask.shape) != (batch.samples, tokens):
        raise DataError(
            f"the attention mask {list(mask.shape)} does not fit hidden states of {batch.samples} samples and {tokens} "
            "tokens; give an attention mask with one entry per token"
        )
    weights = mask.to(values.device).float()
    return weights / weights.sum(1, keepdim=True).clamp_min(1)


def task_loss(model: nn.Module, batch: Batch, temperature: float = 1.0) -> Tensor:
    """Mean cross entropy: against the target, or against the next tokens for a language model.

    Args:
        model: gives logits.
        batch: inputs with class indices, or token ids; of padded text only real tokens count.
        temperature: the logits are divided by it.

    Raises:
        DataError: there is no target and the inputs are not token ids.
    """
    return loss_of(forward(model, batch) / temperature, batch)


def loss_of(logits: Tensor, batch: Batch) -> Tensor:
    """The loss of `task_loss` from a model's logits."""
    if batch.target is not None:
        return label_loss(logits, batch.target)
    if batch.targets:
        raise DataError(
            f"the data holds targets of several tasks ({', '.join(batch.targets)}), and this needs one loss; give data "
            "with one target"
        )
    tokens, real = _text_of(batch)
    if tokens is None or logits.dim() != 3:
        raise DataError("this needs a loss, but the data has no labels and is not text; give data with labels")
    losses = token_losses(logits, tokens)
    if real is None or bool(real.all()):
        return losses.mean()
    counted = (real[:, :-1] != 0) & (real[:, 1:] != 0)  # neither predicted from padding nor padding itself
    return losses[counted].sum() / counted.sum().clamp(min=1)


def label_loss(logits: Tensor, target: Tensor, smoothing: float = 0.0) -> Tensor:
    """Mean cross entropy in float32.

    Args:
        logits: `[samples, classes, ...]`.
        target: class indices `[samples, ...]`, or probabilities of the logits' shape.
        smoothing: share of the target that is spread over all classes.

    Raises:
        DataError: a class index without a logit, or targets of another form.
    """
    whole = not target.is_floating_point() and target.dtype is not torch.bool
    expected = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else logits.shape[:0]
    if target.shape != (expected if whole else logits.shape) or target.dtype is torch.bool:
        raise DataError(
            f"the data's targets are {describe(target)} and the model gives {list(logits.shape)}; the loss needs class "
            f"indices {list(expected)}, or shares of all classes {list(logits.shape)} in floating point"
        )
    if whole:
        target = target.long()
        refuse_foreign_labels(logits, target)
    return F.cross_entropy(logits.float(), target, label_smoothing=smoothing)


def refuse_foreign_labels(logits: Tensor, target: Tensor, name: str = "the data", *, ignored: bool = True) -> None:
    """Class indices must be those of the head; on some devices nothing runs any more after one that is not.

    Args:
        logits: `[samples, classes, ...]`.
        target: class indices, int64.
        name: of the data.
        ignored: whether -100 may stand for no class, as in torch's losses.

    Raises:
        DataError: there are others; gives both ranges.
    """
    counted = target[target != IGNORED] if ignored else target
    classes = logits.shape[min(1, logits.dim() - 1)] if logits.dim() else 0
    lowest, highest = (int(counted.min()), int(counted.max())) if counted.numel() else (0, 0)
    if lowest < 0 or highest >= classes:
        raise DataError(
            f"{name if name == 'the data' else repr(name)} has labels from {lowest} to {highest}, but the model gives "
            f"{list(logits.shape)}, {classes} classes; give data with the classes of its head, or a model with a head "
            "for these"
        )


def _text_of(batch: Batch) -> tuple[Tensor | None, Tensor | None]:
    """The token ids that a language model predicts, and the mask of those that are no padding, where there is one."""
    named = {key: item for key, item in batch.kwargs.items() if isinstance(item, Tensor)}
    for prefix in ("decoder_", ""):
        if f"{prefix}input_ids" in named:
            return named[f"{prefix}input_ids"], named.get(f"{prefix}attention_mask")
    ids = [item for item in batch.tensors if item.dtype == torch.int64 and item.dim() == 2]
    ids = [item for item in ids if item is not named.get("attention_mask")]
    return (ids[0], named.get("attention_mask")) if ids else (None, None)
