"""Training on the logits of a larger model beside the labels (Hinton, Vinyals, Dean 2015, arXiv 1503.02531)."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.fingerprint import model_digest
from secateur.core.method import Batch
from secateur.data.batches import forward, label_loss
from secateur.data.running import device_of, evaluating
from secateur.train.loop import Fitting


def distillation(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, alpha: float) -> Tensor:
    """Mean over the positions of alpha T^2 KL(teacher || student) + (1 - alpha) cross entropy, in float32.

    Args:
        student: logits `[positions, classes]`.
        teacher: logits of the same shape.
        labels: class indices `[positions]`.
        temperature: T, which divides the logits of both inside the divergence.
        alpha: 1 is the teacher alone, 0 the labels alone.
    """
    soft = F.log_softmax(student.float() / temperature, -1)
    aim = F.log_softmax(teacher.float() / temperature, -1)
    divergence = F.kl_div(soft, aim, log_target=True, reduction="none").sum(-1).mean()
    return alpha * temperature**2 * divergence + (1 - alpha) * label_loss(student, labels)


class Distilling(Fitting):
    """A `Fitting` with a teacher; of text the positions that have a next token count.

    Args:
        fit: data, recipe, evaluation, seed and order; its label smoothing plays no part.
        teacher: gives logits of the same shape; left as it is.
        temperature, alpha: as for `distillation`.
    """

    def __init__(self, fit: Fitting, teacher: nn.Module, temperature: float, alpha: float):
        super().__init__(
            fit.data,
            fit.recipe,
            fit.evaluate,
            seed=fit.seed,
            augment=fit.augment,
            also_at=fit.also_at,
            progress=fit.progress,
            stage=fit.stage,
        )
        self.teacher, self.temperature, self.alpha = teacher, temperature, alpha

    @property
    def known_by(self) -> dict[str, Any]:
        """What a training depends on, as plain data."""
        own = {"temperature": self.temperature, "alpha": self.alpha}
        return {**super().known_by, **own, "teacher": model_digest(self.teacher)}

    def reordered(self, seed: int) -> Distilling:
        """The same with another order of the data."""
        return Distilling(super().reordered(seed), self.teacher, self.temperature, self.alpha)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """The teacher's logits and the labels, or the next tokens."""
        logits = forward(model, batch)
        with evaluating(self.teacher):
            aim = forward(self.teacher, batch.to(device_of(self.teacher))).to(logits.device)
        labels = batch.target
        if labels is None:
            tokens = batch.tensors[0]
            logits, aim, labels = logits[:, :-1].flatten(0, 1), aim[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
        return distillation(logits, aim, labels, self.temperature, self.alpha)
