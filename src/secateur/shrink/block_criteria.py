"""How much whole blocks matter: by the scores of their weights, their outputs, or predictions without them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from enum import StrEnum

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import DataError, SettingsError
from secateur.core.method import Batch, Settings, Task
from secateur.data.batches import drawn
from secateur.data.running import logits
from secateur.scores.blocks import Aggregate, of_blocks
from secateur.scores.pls import importance_in_projection
from secateur.scores.sensitivity import (
    GRASP_PER_CLASS,
    GRASP_TEMPERATURE,
    SNIP_SAMPLES,
    grasp,
    halves,
    redraw_xavier,
    snip,
)
from secateur.scores.weights import magnitude, uniform_random
from secateur.shrink.depth import without_blocks
from secateur.stats.block_outputs import Reduce, block_outputs, mean_absolute, mean_rank, pooled
from secateur.stats.output_layer import output_layer
from secateur.structure.removable import Removable
from secateur.structure.sites import weight_layers


class Criterion(StrEnum):
    """How blocks are scored."""

    GRASP = "grasp"  # w (H g), signed
    SNIP = "snip"  # |w dL/dw|
    HRANK = "hrank"  # mean rank of its output's feature maps (Lin et al. 2020)
    EXPECT_ABS = "expect_abs"  # mean absolute output (DropNet, Tan and Motani 2020)
    KL = "kl"  # divergence of the predictions without the block
    PLS = "pls"  # variable importance of its pooled outputs in a regression of the labels
    L1 = "l1"  # |w|
    RANDOM = "random"


OF_WEIGHTS = (Criterion.GRASP, Criterion.SNIP, Criterion.L1, Criterion.RANDOM)


class BlockCriterionSettings(Settings):
    """Settings of everything that scores blocks."""

    criterion: Criterion = Field(Criterion.GRASP, description="grasp, snip, hrank, expect_abs, kl, pls, l1, random")
    aggregate: Aggregate = Field(Aggregate.SUM, description="of a block's weights, for grasp, snip and l1: sum or mean")
    samples: int = Field(SNIP_SAMPLES, ge=2, description="samples in the one batch of all criteria but grasp")
    per_class: int = Field(GRASP_PER_CLASS, ge=1, description="samples of each class in the two halves of grasp")
    temperature: float = Field(GRASP_TEMPERATURE, gt=0, description="the logits are divided by it, for grasp")
    fresh_head: bool = Field(True, description="grasp scores under a newly drawn (Xavier) output layer")
    components: int = Field(2, ge=1, description="of the regression of pls")

    @property
    def uses_data(self) -> bool:
        """Only two criteria look at weights alone."""
        return self.criterion not in (Criterion.L1, Criterion.RANDOM)


def block_scores(task: Task, settings: BlockCriterionSettings, lists: Sequence[Removable]) -> dict[str, float]:
    """Name of each block that can go -> its score, higher = keep.

    Raises:
        DataError: data or labels that the criterion needs are missing.
        NumericsError: something is NaN or infinite; names the block or layer.
    """
    names = [name for one in lists for name in one.names]
    if not names:
        return {}
    if settings.uses_data and not task.batches:
        raise DataError(f"criterion={settings.criterion} needs data, labelled or text; give data=... (--data)")
    match settings.criterion:
        case Criterion.RANDOM:
            found = torch.rand(len(names), generator=task.rng("blocks", "random"), dtype=torch.float64)
        case Criterion.KL:
            found = torch.tensor(
                [_divergence(task.model, _batch(task, settings), one, i) for one in lists for i in one.free]
            )
        case Criterion.EXPECT_ABS:
            found = _outputs_mean(task, settings, names, mean_absolute)
        case Criterion.HRANK:
            found = _outputs_mean(task, settings, names, mean_rank)
        case Criterion.PLS:
            found = _projections(task, settings, names)
        case _:
            found = of_blocks(weight_scores(task, settings, names), names, settings.aggregate)
    return dict(zip(names, found.tolist(), strict=True))


def weight_scores(task: Task, settings: BlockCriterionSettings, blocks: Sequence[str]) -> dict[str, Tensor]:
    """Parameter name -> a score for each weight, of all linear and convolution weights.

    Args:
        task: model and data.
        settings: the criterion.
        blocks: names of the blocks that are compared.

    Raises:
        SettingsError: the criterion scores blocks only.
    """
    layers = weight_layers(task.model).layers
    match settings.criterion:
        case Criterion.SNIP:
            return snip(task.model, _batch(task, settings), list(layers), task.progress)
        case Criterion.GRASP:
            parts = halves(task.batches, settings.per_class, task.rng("grasp", "batch"))
            return grasp(_fresh_head(task, settings, blocks), parts, list(layers), settings.temperature)
        case Criterion.L1:
            return {name: magnitude(layer.weight) for name, layer in layers.items()}
        case Criterion.RANDOM:
            return {n: uniform_random(tuple(one.weight.shape), task.rng("weights", n)) for n, one in layers.items()}
        case _:
            raise SettingsError(f"criterion={settings.criterion} scores whole blocks and no weights; give another one")


def _fresh_head(task: Task, settings: BlockCriterionSettings, blocks: Sequence[str]) -> nn.Module:
    """The model, or a copy whose output layer is drawn anew, as the official code of GraSP does."""
    weight, _ = _output_weight(task, blocks) if settings.fresh_head else ("", "")
    if not weight:
        return task.model
    clone = copy.deepcopy(task.model)
    redraw_xavier(clone, [weight], lambda name: task.rng("grasp", "head", name))
    return clone


def head_warnings(task: Task, settings: BlockCriterionSettings, blocks: Sequence[str]) -> list[str]:
    """A sentence where grasp should score under a new output layer and cannot.

    Args:
        task: model and data.
        settings: the criterion.
        blocks: names of the blocks that are compared.
    """
    if settings.criterion is not Criterion.GRASP or not settings.fresh_head:
        return []
    _, reason = _output_weight(task, blocks)
    return [f"grasp scored under the output layer as it is, since {reason}"] if reason else []


def _output_weight(task: Task, blocks: Sequence[str]) -> tuple[str, str]:
    """The weight that may be drawn anew, or nothing and the reason: whatever else uses it would change too."""
    head = output_layer(task.model, task.batches[0])
    if not head.exact:
        return "", "no linear layer makes the model's output"
    around = next((block for block in blocks if head.name.startswith(f"{block}.")), None)
    if around is not None:
        return "", f"'{head.name}' lies in the block '{around}'"
    name, parameters = f"{head.name}.weight", dict(task.model.named_parameters(remove_duplicate=False))
    if name not in parameters:
        return "", f"'{name}' is computed from other parameters"
    tied = next((other for other, one in parameters.items() if one is parameters[name] and other != name), None)
    return ("", f"'{name}' is tied to '{tied}'") if tied else (name, "")


def _batch(task: Task, settings: BlockCriterionSettings) -> Batch:
    return drawn(task.batches, settings.samples, task.rng("blocks", "batch"))


def _outputs_mean(task: Task, settings: BlockCriterionSettings, names: Sequence[str], reduce: Reduce) -> Tensor:
    """Mean over samples of a number for each of a block's outputs, `[blocks]`."""
    outputs = block_outputs(task.model, [_batch(task, settings)], names, reduce, task.progress)
    return torch.stack([outputs[name].double().mean() for name in names])


def _projections(task: Task, settings: BlockCriterionSettings, names: Sequence[str]) -> Tensor:
    """Mean importance in projection of a block's pooled channels, all blocks in one regression, `[blocks]`."""
    batch = _batch(task, settings)
    if batch.target is None or batch.target.dim() != 1:
        raise DataError("criterion=pls needs one class as the label of every sample; give labelled data")
    outputs = block_outputs(task.model, [batch], names, pooled, task.progress)
    features = torch.cat([outputs[name] for name in names], 1)
    found = importance_in_projection(features, batch.target.cpu(), settings.components)
    return torch.stack([part.mean() for part in torch.split(found, [outputs[name].shape[1] for name in names])])


@torch.no_grad()
def _divergence(model: nn.Module, batch: Batch, one: Removable, index: int) -> float:
    """KL divergence in nats of the predictions without a block from those with it, mean over samples."""
    whole = F.log_softmax(logits(model, batch).double(), -1)
    with without_blocks(model, one.stack.name, [place != index for place in range(len(one.stack.blocks))]):
        less = F.log_softmax(logits(model, batch).double(), -1)
    return float((whole.exp() * (whole - less)).sum(-1).mean())
