"""Meta-training: a metanetwork learns to give trained networks weights that are easier to prune (Liu et al. 2025).

One step for one network with weights theta, metanetwork phi, theta' = phi(theta):

    g_task = sum over batches of d loss(theta') / d theta'     the network in eval mode, on its own running statistics
    g_sparse = growing gradient of the group norms at theta'    (`scores.growing`, no loss)
    d phi = (d theta' / d phi)^T (g_task + g_sparse)            one vector-Jacobian product

Gradients are summed up at theta' first, which is the same as a backward pass through the metanetwork for every batch,
at the cost of one. The network itself, its statistics and its gradients stay as they are.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call

from secateur.core.errors import ModelError, NumericsError
from secateur.core.method import Batch, Settings
from secateur.core.progress import track
from secateur.core.seeding import seeded
from secateur.core.units import Site
from secateur.data.batches import cacheless, logits_of, loss_of
from secateur.data.running import device_of
from secateur.scores.growing import growing_gradient, member_weights
from secateur.structure.graph import Family, Graph
from secateur.train.metanetwork import Metanetwork, Shape
from secateur.train.study import Study


class MetaSettings(Settings):
    """The metanetwork and its training; defaults for CIFAR's ResNet-56."""

    layers: int = Field(8, ge=1, description="exchanges of messages in the metanetwork")
    width: int = Field(64, ge=2, description="of its hidden states; 32 for VGG-19, 16 for ResNet-50")
    node_ratio: float = Field(0.01, gt=0, description="weight of what it adds to norms and biases; 0.05 for VGG-19")
    edge_ratio: float = Field(0.01, gt=0, description="weight of what it adds to weights; 0.002 for ResNet-50")
    epochs: int = Field(100, ge=1, description="passes over the networks that it is trained on")
    lr: float = Field(1e-3, gt=0, description="learning rate of AdamW")
    weight_decay: float = Field(5e-4, ge=0, description="of AdamW")
    milestones: tuple[int, ...] = Field((3,), description="epochs after which the rate drops; search the first one")
    factor: float = Field(0.1, gt=0, description="by which it drops")
    reg: float = Field(10.0, ge=0, description="strength of the growing gradient")
    alpha: float = Field(16.0, ge=1, description="how much faster a site's smallest unit shrinks than its largest")
    batch: int = Field(500, ge=1, description="samples per batch of the task loss")
    one_batch: bool = Field(False, description="the task loss of one drawn batch per step instead of all")

    def for_family(self, family: Family) -> Shape:
        """The shape of a metanetwork for one family of graphs."""
        return Shape(
            node=family.node,
            edges=family.edges,
            layers=self.layers,
            width=self.width,
            node_ratio=self.node_ratio,
            edge_ratio=self.edge_ratio,
        )

    def rate(self, epoch: int) -> float:
        """Learning rate of the epoch after `epoch` epochs are done."""
        return self.lr * self.factor ** sum(epoch >= milestone for milestone in self.milestones)


@dataclass(frozen=True, eq=False)
class Subject:
    """A trained network that a metanetwork learns on or changes.

    Attributes:
        model: in eval mode.
        graph: where its tensors stand.
        sites: the units that may be pruned.
    """

    model: nn.Module
    graph: Graph
    sites: Mapping[str, Site]

    @cached_property
    def members(self) -> frozenset[str]:
        """Parameters whose slices belong to units."""
        return member_weights(self.model)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers, detached."""
        return {name: value.detach() for name, value in self.model.state_dict().items()}


def task_gradient(
    model: nn.Module, weights: Mapping[str, Tensor], batches: Sequence[Batch]
) -> tuple[dict[str, Tensor], float]:
    """(sum over batches of the gradients of their mean losses with respect to `weights`, mean loss).

    Args:
        model: runs with these weights and its own buffers, in eval mode.
        weights: parameter name -> value.
        batches: with labels.

    Raises:
        NumericsError: the loss is NaN or infinite.
    """
    own = dict(model.named_parameters())  # which may be of lower precision than the metanetwork
    leaves = {name: value.detach().to(own[name].dtype).requires_grad_() for name, value in weights.items()}
    summed = {name: torch.zeros_like(value) for name, value in weights.items()}
    losses = 0.0
    for batch in batches:
        moved = batch.to(device_of(model))
        with torch.enable_grad():
            output = functional_call(model, leaves, moved.args, cacheless(model) | moved.kwargs)
            loss = loss_of(logits_of(output), moved)
        if not torch.isfinite(loss):
            raise NumericsError(f"the loss with the metanetwork's weights is {loss.item()}; lower lr or the ratios")
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(leaves, found, strict=True):
            if gradient is not None:
                summed[name] += gradient.to(summed[name])
        losses += loss.item()
    return summed, losses / max(1, len(batches))


def meta_gradient(
    net: Metanetwork, subject: Subject, batches: Sequence[Batch], settings: MetaSettings
) -> dict[str, float]:
    """Add the gradient of one network to the metanetwork's `.grad`; weights whose gradient is not finite are left out.

    Returns:
        `task_loss`, and the lengths of the two gradients at the network's weights, `task` and `sparse`.

    Raises:
        NumericsError: the loss or all gradients are not finite.
    """
    modes = [(module, module.training) for module in subject.model.modules()]
    subject.model.eval()  # statistics of made-up weights must not leak into the buffers
    try:
        weights = net.changed(subject.graph, subject.tensors)
        task, loss = task_gradient(subject.model, weights, batches)
    finally:
        for module, training in modes:
            module.training = training
    sparse = growing_gradient(subject.sites, weights, subject.members, strength=settings.reg, alpha=settings.alpha)
    total = {name: task[name] + sparse[name] if name in sparse else task[name] for name in weights}
    sound = [name for name, value in total.items() if bool(torch.isfinite(value).all())]
    if not sound:
        raise NumericsError("no gradient of the network's weights is finite; lower lr, reg or the ratios")
    torch.autograd.backward([weights[name] for name in sound], [total[name] for name in sound])
    return {"task_loss": loss, "task": _length(task), "sparse": _length(sparse)}


def _length(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in tensors.values()))


def one_family(subjects: Sequence[Subject]) -> Family:
    """What the networks' graphs have in common.

    Raises:
        ModelError: they are of several families.
    """
    families = list(dict.fromkeys(subject.graph.family for subject in subjects))
    if len(families) > 1:
        raise ModelError(
            f"one network's graph has {families[0]}, another's {families[1]}; train one metanetwork for each kind"
        )
    return families[0]


# --- all epochs ---------------------------------------------------------------------------------------


class MetaTraining:
    """The epochs of a meta-training, each from the study's ledger if it is there.

    Args:
        study: whose seed and ledger are used.
        subjects: the networks to learn on, all of one family.
        batches: of the task loss.
        settings: the metanetwork and its training.

    Raises:
        ModelError: the networks' graphs are of several families.
    """

    def __init__(
        self, study: Study, subjects: Sequence[Subject], batches: Sequence[Batch], settings: MetaSettings
    ) -> None:
        self.study, self.subjects, self.batches, self.settings = study, subjects, batches, settings
        self.shape = settings.for_family(one_family(subjects))

    def network(self, epoch: int) -> Metanetwork:
        """The metanetwork after so many epochs, frozen."""
        return self._at(epoch)[0].eval().requires_grad_(False)

    def run(self) -> list[dict[str, float]]:
        """Every epoch's means over its steps: `task_loss` and the lengths of the two gradients."""
        epochs = range(1, self.settings.epochs + 1)
        return [self._state(epoch)["figures"] for epoch in track(epochs, self.study.progress, "meta-training")]

    def _at(self, epoch: int) -> tuple[Metanetwork, torch.optim.Optimizer]:
        with seeded(self.study.seed):
            net = Metanetwork(self.shape).to(device_of(self.subjects[0].model))
        optimizer = torch.optim.AdamW(net.parameters(), self.settings.lr, weight_decay=self.settings.weight_decay)
        if epoch:
            state = self._state(epoch)
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
        return net, optimizer

    def _state(self, epoch: int) -> dict[str, Any]:
        found: dict[str, Any] = self.study.ledger.once(f"epoch-{epoch}", lambda: self._trained(epoch))
        return found

    def _trained(self, epoch: int) -> dict[str, Any]:
        """The next epoch: one step for each network, in a drawn order."""
        net, optimizer = self._at(epoch - 1)
        optimizer.param_groups[0]["lr"] = self.settings.rate(epoch - 1)
        steps = []
        for index in torch.randperm(len(self.subjects), generator=self.study.rng("order", str(epoch))).tolist():
            optimizer.zero_grad()
            steps.append(meta_gradient(net, self.subjects[index], self._seen(epoch, index), self.settings))
            optimizer.step()
        figures = {name: fmean(step[name] for step in steps) for name in steps[0]}
        state = {name: value.detach().clone() for name, value in net.state_dict().items()}
        return {"net": state, "optimizer": copy.deepcopy(optimizer.state_dict()), "figures": figures}

    def _seen(self, epoch: int, index: int) -> Sequence[Batch]:
        if not self.settings.one_batch:
            return self.batches
        rng = self.study.rng("batch", str(epoch), str(index))
        return [self.batches[int(torch.randint(len(self.batches), (), generator=rng))]]
