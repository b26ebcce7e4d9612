"""How good a model is: accuracy on labelled samples, perplexity on windows of text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.core.progress import Progress, Silent, track
from secateur.data.batches import refuse_foreign_labels, task_loss, token_losses
from secateur.data.dataset import DataKind, Dataset
from secateur.data.running import device_of, evaluating, logits


class Metric(StrEnum):
    """A figure of merit that is a function of a mean over samples."""

    ACCURACY = "accuracy"
    PERPLEXITY = "perplexity"

    @property
    def higher_is_better(self) -> bool:
        """Which way is better."""
        return self is Metric.ACCURACY

    def from_mean(self, mean: Any) -> Any:
        """The metric from the mean of the per-sample values, element by element; overflow gives infinity."""
        with np.errstate(over="ignore"):
            return np.exp(mean) if self is Metric.PERPLEXITY else np.asarray(mean, dtype=float)


@dataclass(frozen=True, eq=False)
class Quality:
    """A metric with what it was computed from.

    Attributes:
        metric: accuracy (0 to 1) or perplexity (1 and up).
        value: the metric; NaN or infinite where a sample's value is.
        values: float64 `[samples]`: 1 or 0 for right or wrong, or a window's mean loss in nats. NaN
            where the model's output is NaN.
    """

    metric: Metric
    value: float
    values: Tensor

    @property
    def samples(self) -> int:
        """How many images or windows were scored."""
        return len(self.values)

    @property
    def higher_is_better(self) -> bool:
        """Which way is better."""
        return self.metric.higher_is_better

    @property
    def broken(self) -> int:
        """Samples whose value is NaN or infinite; anything but 0 means that the model is damaged."""
        return int((~torch.isfinite(self.values)).sum())

    def to_json(self) -> dict[str, Any]:
        """Plain data without the per-sample values; a value that JSON lacks is the word nan or inf."""
        return {
            "metric": self.metric.value,
            "value": self.value if np.isfinite(self.value) else str(self.value),
            "samples": self.samples,
            "broken_samples": self.broken,
            "higher_is_better": self.higher_is_better,
        }


def quality(
    model: nn.Module, dataset: Dataset, batch_size: int | None = None, progress: Progress | None = None
) -> Quality:
    """Accuracy where the samples have labels, perplexity for text without.

    Raises:
        DataError: images without labels, or data that does not fit the model's output.
    """
    if dataset.targets is not None:
        return accuracy(model, dataset, batch_size or 64, progress)
    if dataset.kind is DataKind.TEXT:
        return perplexity(model, dataset, batch_size or 8, progress)
    raise DataError(f"'{dataset.name}' has no labels, so accuracy cannot be measured; give labelled images")


def accuracy(model: nn.Module, dataset: Dataset, batch_size: int = 64, progress: Progress | None = None) -> Quality:
    """Fraction of the samples whose highest logit is the target's.

    A sample with a NaN among its logits is neither right nor wrong: its value, and so the accuracy, is NaN.

    Raises:
        DataError: no targets, logits that are not `[samples, classes]`, or a target without a logit.
    """
    if dataset.targets is None:
        raise DataError(f"'{dataset.name}' has no labels; accuracy needs them")

    def score(out: Tensor, batch: Batch) -> Tensor:
        target = batch.target
        assert target is not None  # the dataset has targets
        if out.dim() != 2:
            raise DataError(
                f"'{dataset.name}' has one label for each sample, but the model gives {list(out.shape)}; accuracy "
                "needs [samples, classes]"
            )
        refuse_foreign_labels(out, target, dataset.name, ignored=False)
        right = (out.argmax(1) == target.to(out.device)).double()
        return right.masked_fill(out.isnan().any(1), torch.nan)

    return _scored(model, dataset, Metric.ACCURACY, batch_size=batch_size, score=score, progress=progress)


def perplexity(model: nn.Module, dataset: Dataset, batch_size: int = 8, progress: Progress | None = None) -> Quality:
    """Perplexity: exp of the mean over windows of the mean next-token loss; windows are `dataset.inputs` `[n, L]`.

    Each window stands alone and gives L - 1 losses, the evaluation of Wanda (Sun et al., 2023, arXiv
    2306.11695) and SparseGPT. Losses are averaged in float64.

    Raises:
        DataError: inputs that are not token ids of windows of 2 or more, or logits that are not per token.
    """
    shape = list(dataset.inputs.shape)
    if dataset.inputs.dim() != 2 or shape[1] < 2 or dataset.inputs.dtype != torch.int64:
        raise DataError(
            f"'{dataset.name}' holds {dataset.inputs.dtype} {shape}; perplexity needs int64 token ids "
            f"[windows, length] with a length of 2 or more"
        )

    def score(out: Tensor, batch: Batch) -> Tensor:
        tokens = batch.args[0]
        if out.dim() != 3 or out.shape[:2] != tokens.shape or int(tokens.max()) >= out.shape[2]:
            raise DataError(
                f"the model gives {list(out.shape)} for tokens {list(tokens.shape)} up to id {int(tokens.max())}; "
                f"perplexity needs a causal language model with this vocabulary"
            )
        return token_losses(out, tokens.to(out.device)).double().mean(1)

    return _scored(model, dataset, Metric.PERPLEXITY, batch_size=batch_size, score=score, progress=progress)


def mean_loss(model: nn.Module, dataset: Dataset, batch_size: int = 256) -> float:
    """Mean cross entropy over all samples in eval mode, statistics of batch norms as they are; in nats.

    Raises:
        DataError: images without labels.
    """
    with evaluating(model):
        losses = (
            task_loss(model, batch.to(device_of(model))).item() * batch.samples for batch in dataset.batches(batch_size)
        )
        return sum(losses) / len(dataset)


def _scored(
    model: nn.Module,
    dataset: Dataset,
    metric: Metric,
    *,
    batch_size: int,
    score: Callable[[Tensor, Batch], Tensor],
    progress: Progress | None,
) -> Quality:
    batches = list(dataset.batches(batch_size))
    with evaluating(model):
        parts = [
            score(logits(model, batch), batch).cpu() for batch in track(batches, progress or Silent(), metric.value)
        ]
    values = torch.cat(parts)
    return Quality(metric, float(metric.from_mean(values.mean().item())), values)
