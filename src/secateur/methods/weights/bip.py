"""Pruning as bi-level optimisation, BiP (Zhang, Yao, Ram, Zhao, Chen, Hong, Wang, Liu 2022, NeurIPS).

Upper level: which mask; lower level: the weights under it. Both enter only as z = m * theta, so the implicit gradient
of the upper problem is an element-wise formula of one ordinary gradient g = dL/dz:

    IG = (theta - m g / gamma) g,   dL/ds = IG sign(s),   m = 1 for the largest |s|.

On successive batches of one training, at the final sparsity from the start: a step of the weights under the fixed mask
(gradient m g, the loop's own optimiser, whose weight decay also reaches hidden weights), then a step of the scores
under fixed weights (SGD of their own). The scores start as a copy of the weights, so bring a pretrained network: noise
is kept otherwise. Shuffle between epochs, so that both levels see all data. Half of the batches train scores: the
steps given are batches. Usually no fine-tuning follows; below 1 % kept it does.

Between steps the model holds z, so it can be evaluated at any time and `.grad` after backward is dense. On a step of
the scores the optimiser finds no gradients (nothing decays, no momentum moves), and running statistics of norms stay.
`variant=hydra` is HYDRA (Sehwag et al. 2020): weights never move, every batch trains scores, with theta g sign(s).
`gamma_inverse=0` is the straight-through alternation without the correction.

The official code gives scores and weights the same memory (so its mask is the weights' magnitude), squares the score's
gradient in the correction (`reference=True` does that, on a score memory of its own), lets both optimisers decay both
groups and update norms' statistics, and ranks channels of the first layer too (exclude it if its inputs are images).
Masked filters keep their norm's shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.allocate.spread import Spread, choose
from secateur.core import tags as t
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, ModelError
from secateur.core.method import Decision, Group, Method, Protocol, Settings
from secateur.core.select import keep_top
from secateur.core.units import Layout, Site, UnitKind
from secateur.gates.binary import scores_from
from secateur.train.loop import Decay, Recipe
from secateur.train.part import Part
from secateur.train.sharding import local, parted_like
from secateur.train.sparsifier import Order, Sparsifier

RESTLESS = 0.2  # share of the kept weights that changed in the last report: the scores' rate is too high


class Granularity(StrEnum):
    """What goes as a whole: weights in one ranking, or the same share of every convolution's filters or channels."""

    UNSTRUCTURED = "unstructured"
    FILTER = "filter"
    CHANNEL = "channel"


class Variant(StrEnum):
    """Alternate, or train scores alone."""

    BIP = "bip"
    HYDRA = "hydra"


class BipSettings(Settings):
    """Settings; defaults are the published configuration's."""

    granularity: Granularity = Field(Granularity.UNSTRUCTURED, description="weights, or filters/channels of each layer")
    variant: Variant = Field(Variant.BIP, description="bip alternates; hydra trains scores on frozen weights")
    gamma_inverse: float = Field(1e-4, ge=0, description="1/gamma, weight of the correction; 0 is straight-through")
    mask_lr: float = Field(0.1, gt=0, description="the scores' rate; times 0.1 at half and at 3/4 (hydra: cosine)")
    mask_momentum: float = Field(0.9, ge=0, lt=1, description="of the scores' SGD")
    mask_decay: float = Field(1e-4, ge=0, description="weight decay of the scores (hydra's own: 5e-4)")
    lower: int = Field(1, ge=1, description="steps of the weights before each step of the scores")
    reference: bool = Field(False, description="the official correction: minus the squared score gradient over gamma")
    report: int = Field(100, ge=1, description="steps between two log entries with the number of flips (an epoch)")

    def schedule(self, steps: int) -> Recipe:
        """The scores' learning rate over the whole training."""
        decay = Decay.COSINE if self.variant is Variant.HYDRA else Decay.STEPS
        return Recipe(steps=steps, lr=self.mask_lr, decay=decay, milestones=(0.5, 0.75), factor=0.1)


def implicit_gradient(theta: Tensor, mask: Tensor, gradient: Tensor, gamma_inverse: float) -> Tensor:
    """(theta - m g / gamma) g, element by element (equation 10).

    Args:
        theta: weights, also those that the mask hides.
        mask: True = keep.
        gradient: of the loss with respect to z = m * theta, dense.
        gamma_inverse: 1/gamma.
    """
    return (theta - gamma_inverse * mask * gradient) * gradient


def score_gradient(theta: Tensor, mask: Tensor, gradient: Tensor, scores: Tensor, settings: BipSettings) -> Tensor:
    """The gradient of the scores: through |s| and, straight, through the ranking."""
    gamma_inverse = 0.0 if settings.variant is Variant.HYDRA else settings.gamma_inverse
    if settings.reference:
        plain = theta * gradient * scores.sign()
        return plain - gamma_inverse * plain.square()
    return implicit_gradient(theta, mask, gradient, gamma_inverse) * scores.sign()


class BiLevel(Part):
    """Steps of weights and of scores in turn; holds what the mask hides."""

    def __init__(self, settings: BipSettings):
        self.settings = settings
        self.theta: dict[str, Tensor] = {}
        self.scores: dict[str, nn.Parameter] = {}
        self.masks: dict[str, Tensor] = {}
        self.seen: dict[str, Tensor] = {}  # masks at the last report
        self.flips = 0
        self.statistics: list[tuple[Tensor, Tensor]] = []

    def start(self, run: Sparsifier) -> None:
        """Copy the weights to hidden weights and to scores: the first mask is that of magnitudes."""
        self.sites = {name: site for name, site in run.sites.items() if self._prunes(site)}
        if not self.sites:
            raise ModelError(f"granularity={self.settings.granularity} needs convolutions, the model has none to prune")
        self.theta = {name: run.weight(name).clone() for name in self.sites}
        self.scores = {name: scores_from(weight) for name, weight in self.theta.items()}
        own = self.settings
        self.solver = torch.optim.SGD(self.scores.values(), own.mask_lr, own.mask_momentum, weight_decay=own.mask_decay)
        self.rate = own.schedule(run.steps).rate
        self.masks = self._ranked(run)
        self.dense = all(bool(mask.all()) for mask in self.masks.values())
        self.seen = dict(self.masks)

    def _prunes(self, site: Site) -> bool:
        whole_units = self.settings.granularity is not Granularity.UNSTRUCTURED
        return not whole_units or site.layout in (Layout.CONV, Layout.CONV_TRANSPOSED)

    def _ranked(self, run: Sparsifier) -> dict[str, Tensor]:
        """The mask of the scores as they are: the largest |s|, exactly as many as the budget keeps."""
        importance = {name: score.detach().abs() for name, score in self.scores.items()}
        if self.settings.granularity is Granularity.UNSTRUCTURED:
            return choose(importance, self.sites, Budget(run.target, Quantity.UNITS, floor=run.floor), Spread.GLOBAL)
        return {name: self._units(run, self.sites[name], score) for name, score in importance.items()}

    def _units(self, run: Sparsifier, site: Site, importance: Tensor) -> Tensor:
        """Whole filters or channels of one layer, by the l2 norm of their scores."""
        filters = self.settings.granularity is Granularity.FILTER
        dim = int(filters is (site.layout is Layout.CONV_TRANSPOSED))  # [out, in, ...] or [in, out, ...]
        count, budget = site.shape[dim], run.order.budget.of(UnitKind.WEIGHT)
        norms = importance.transpose(0, dim).flatten(1).norm(dim=1)
        keep = budget.keep(count)
        if keep < max(1, budget.floor):
            keep = min(count, max(1, budget.floor))
            run.warn(f"layer '{site.name}' was held at {keep} of {count} {self.settings.granularity}s")
        shape = [-1 if place == dim else 1 for place in range(len(site.shape))]
        return keep_top(norms, keep).view(shape).expand(site.shape).contiguous()

    # --- one step -----------------------------------------------------------------------------

    def of_weights(self, step: int) -> bool:
        """Whether the step after `step` steps belongs to the weights; a full mask has nothing to learn."""
        if self.settings.variant is Variant.HYDRA:
            return False
        return self.dense or step % (self.settings.lower + 1) < self.settings.lower

    def before_batch(self, run: Sparsifier) -> None:
        """The model computes with z = m * theta."""
        if run.step >= run.steps:
            return
        for name, theta in self.theta.items():
            _write(run.masks.parameters[name], theta * self.masks[name])
        if not self.of_weights(run.step):
            self.statistics = [(buffer, buffer.clone()) for buffer in running_statistics(run.model)]

    def before_step(self, run: Sparsifier) -> None:
        """Give the optimiser theta and m g, or nothing while the scores move."""
        if run.step >= run.steps:
            return
        if self.of_weights(run.step):
            for name, theta in self.theta.items():
                parameter = run.masks.parameters[name]
                _write(parameter, theta)
                if parameter.grad is not None:
                    local(parameter.grad).mul_(parted_like(self.masks[name], parameter))
            return
        self._move_scores(run)
        for group in run.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None
        for buffer, value in self.statistics:
            buffer.copy_(value)
        self.statistics = []

    def _move_scores(self, run: Sparsifier) -> None:
        for name, score in self.scores.items():
            gradient = run.gradient(name)
            if gradient is None:
                run.warn(f"'{name}' had no gradient; its scores stayed")
                continue
            theta, mask, g = self.theta[name], self.masks[name], gradient.to(score.dtype)
            score.grad = score_gradient(theta, mask, g, score.detach(), self.settings)
        for group in self.solver.param_groups:
            group["lr"] = self.rate(run.step)
        self.solver.step()
        self.solver.zero_grad()
        self.masks = self._ranked(run)

    def after_step(self, run: Sparsifier) -> None:
        """Remember what the optimiser made of theta; report; at the end the mask is final."""
        if self.of_weights(run.step - 1):
            for name, theta in self.theta.items():
                theta.copy_(run.weight(name))
        if run.step % self.settings.report == 0 or run.step == run.steps:
            self._report(run)
        if run.step == run.steps:
            run.set_masks(self._full(run), "freeze")

    def _report(self, run: Sparsifier) -> None:
        kept = sum(int(mask.sum()) for mask in self.masks.values())
        flips = sum(int((mask ^ self.seen[name]).sum()) for name, mask in self.masks.items())
        self.seen, self.flips = dict(self.masks), self.flips + flips
        density = kept / sum(site.units for site in self.sites.values())
        run.log.append({"step": run.step, "what": "bip", "density": density, "flips": flips})
        if run.step < run.steps or self.dense:
            return
        if not self.flips:
            run.warn("the mask never changed: raise mask_lr, or train longer")
        if flips > RESTLESS * kept:
            run.warn(f"{flips} entries of the mask changed in the last report, {kept} are kept: lower mask_lr")

    def _full(self, run: Sparsifier) -> dict[str, Tensor]:
        """The masks of all sites; what this granularity does not prune stays whole."""
        return {name: self.masks[name].clone() if name in self.masks else run.masks.get(name) for name in run.sites}

    # --- the end, resuming ----------------------------------------------------------------------

    def finish(self, run: Sparsifier) -> None:
        """Refuse an end before the end: the masks are still moving.

        Raises:
            BudgetError: training stopped too early.
        """
        if run.step < run.steps:
            raise BudgetError(
                f"training stopped after {run.step} of {run.steps} steps, while scores were still learning; train on, "
                "or plan with fewer steps"
            )

    def decision(self, run: Sparsifier) -> Decision:
        """The masks as they are now."""
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        return Decision(sites=self.sites, masks=masks)

    def state_dict(self) -> dict[str, Any]:
        """Hidden weights, scores, their momentum, masks."""
        return {
            "theta": dict(self.theta),
            "scores": {name: score.detach() for name, score in self.scores.items()},
            "solver": self.solver.state_dict(),
            "masks": dict(self.masks),
            "seen": dict(self.seen),
            "flips": self.flips,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        for name, theta in self.theta.items():
            theta.copy_(state["theta"][name])
            self.scores[name].copy_(state["scores"][name])
        self.solver.load_state_dict(state["solver"])
        self.masks, self.seen = _moved(state["masks"], self.theta), _moved(state["seen"], self.theta)
        self.flips = state["flips"]


def _moved(masks: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: mask.to(like[name].device) for name, mask in masks.items()}


def _write(parameter: nn.Parameter, value: Tensor) -> None:
    local(parameter.detach()).copy_(parted_like(value, parameter))


def running_statistics(model: nn.Module) -> Iterator[Tensor]:
    """The buffers that norms update while they run."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            yield from module.buffers(recurse=False)


def make_parts(order: Order, settings: BipSettings) -> Sequence[Part]:
    """One part does it all."""
    return [BiLevel(settings)]


method = Method(
    name="bip",
    paper="21",
    title="Advancing model pruning via bi-level optimization",
    citation="Zhang, Yao, Ram, Zhao, Chen, Hong, Wang, Liu 2022, NeurIPS, arXiv 2210.04092",
    formula="IG = (theta - m g / gamma) g, g = dL/d(m theta); weights and scores step in turn, largest |s| stay",
    kind=Protocol.SPARSIFIER,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED, t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LEARNED}),
        granularity=frozenset({t.Granularity.WEIGHT, t.Granularity.FILTER, t.Granularity.CHANNEL}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
        learn=frozenset({t.Learn.BILEVEL}),
    ),
    settings=BipSettings,
    parts=make_parts,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    changes_weights=True,
)
