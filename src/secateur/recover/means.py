"""What removed units gave on average, written into the biases of the layers that read them, block by block.

For methods that have the means from their own walk; `recover.bias` measures them on a model in memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from secateur.core.journal import Notes, Section
from secateur.core.method import Task
from secateur.stats.walker import BlockVisit, each_block
from secateur.structure.readers import Reader


def mean_biases(
    task: Task, name: str, reading: Mapping[str, Reader], masks: Mapping[str, Tensor], means: Mapping[str, Tensor]
) -> Section:
    """One walk over weights alone: b = b_old + sum over removed inputs j of mean_j W_j, at the dense model's size.

    Args:
        task: the dense model.
        name: of the journal's section.
        reading: site -> the layer that reads its units.
        masks: site -> keep-mask `[units]`.
        means: site -> mean of every input of the reader that is the site's, `[units * width]`.

    Returns:
        Block -> notes with `weight/<layer>.bias` where something was removed; also for layers without a bias.
    """

    def fold(visit: BlockVisit) -> Notes:
        notes = Notes()
        for site in masks:
            reader = reading[site]
            if reader.inside(visit.name) and not bool(masks[site].all()):
                key = f"weight/{reader.module}.bias"
                notes.tensors[key] = _with_mean(visit, reader, masks[site], means[site], notes.tensors.get(key))
        return notes

    return each_block(replace(task, include=("*",), exclude=()), name, fold, still=True)


def _with_mean(visit: BlockVisit, reader: Reader, mask: Tensor, mean: Tensor, bias: Tensor | None) -> Tensor:
    weight = visit.tensor(reader.layer)
    gone = reader.expanded(~mask).to(weight.device)
    lost = reader.matrix(weight)[:, gone].double() @ mean.to(weight.device).double()[gone]
    if bias is None and visit.module.get_submodule(reader.module.removeprefix(f"{visit.name}.")).bias is not None:
        bias = visit.tensor(f"{reader.module}.bias")
    return (lost if bias is None else lost + bias.double()).to(weight.dtype)
