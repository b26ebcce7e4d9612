"""The engine of sparse training: parts that act at fixed points of any training loop.

Attached to a model and its optimiser, it works through the optimiser's own hooks, so the loop stays the
user's: accumulation, clipping, AMP (a skipped step is no step), compiled, data-parallel and sharded models
keep working, and a step costs one masked fill per tensor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.core.budget import Budget
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.core.fingerprint import digests
from secateur.core.masks import pack, unpack
from secateur.core.method import Batch, Decision, matches
from secateur.core.plan import Plan, Provenance, versions
from secateur.core.progress import Progress, Silent
from secateur.core.seeding import generator
from secateur.core.units import Site, UnitKind
from secateur.data.example import example_for
from secateur.structure.sites import weight_layers
from secateur.train.masking import Masks, plain, refuse_outsiders, unwrapped
from secateur.train.part import Part
from secateur.train.sharding import is_sharded, same_everywhere, whole


@dataclass(frozen=True)
class Order:
    """What a sparsifier is asked for.

    Attributes:
        method: name of the method, for the provenance.
        settings: its settings, for the provenance and against another resume.
        budget: what stays in the end.
        steps: optimiser steps of the whole training.
        seed: of every random draw.
        include, exclude: shell patterns over parameter names; exclude wins.
        example: inputs to find the structure with, anything that `example_for` takes; guessed without any.
    """

    method: str
    budget: Budget
    steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)
    seed: int = 0
    include: tuple[str, ...] = ("*",)
    exclude: tuple[str, ...] = ()
    example: Any = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise SettingsError(f"training needs at least 1 optimiser step, got steps={self.steps}")

    def inputs(self, model: nn.Module) -> Batch:
        """Two samples to observe the model with.

        Raises:
            DataError: none were given, and they cannot be guessed.
        """
        return example_for(model, self.example)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "method": self.method,
            "settings": dict(self.settings),
            "budget": self.budget.to_json(),
            "steps": self.steps,
            "seed": self.seed,
            "include": list(self.include),
            "exclude": list(self.exclude),
        }

    def provenance(self, model: str) -> Provenance:
        """What a plan that came of it says about its making; `model` is the model's class."""
        asked = self.budget.to_json() | {"include": list(self.include), "exclude": list(self.exclude)}
        return Provenance(
            method=self.method,
            settings=dict(self.settings),
            budget=asked | {"steps": self.steps},
            seed=self.seed,
            model={"class": model, "source": ""},
            data={},
            versions=versions(),
        )


class Sparsifier:
    """Runs a method's parts while a network trains.

    Example:
        sparsifier = sc.sparsify(model, optimizer, "granet", sparsity=0.9, steps=len(loader) * epochs)
        ...  # the loop as it was
        plan = sparsifier.finish()

    Args:
        model: any module; may be compiled, data-parallel or sharded.
        optimizer: the one that trains it.
        parts: what happens, in this order at every hook point.
        order: what is asked for.
        progress: receives progress.
        state: of `state_dict`, to go on; the model's and the optimiser's own states must be loaded already.

    Attributes:
        step: optimiser steps that are done.
        steps: optimiser steps of the whole training.
        sites: the weights that may be masked.
        masks: their masks, on the live parameters.
        log: one entry per event: step, what, density reached, figures.
        warnings: sentences for the user.

    Raises:
        ModelError: nothing to prune; a parameter is frozen or belongs to no optimiser group; the model is spread over
            processes or devices in a way that the method cannot follow.
        SettingsError, BudgetError: a schedule does not fit the training, a budget cannot be met.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Sequence[Part],
        order: Order,
        *,
        progress: Progress | None = None,
        state: Mapping[str, Any] | None = None,
    ):
        optimizer = plain(optimizer)
        self.model, self.optimizer, self.order = unwrapped(model), optimizer, order
        self.parts, self.progress = list(parts), progress or Silent()
        self.step, self.steps, self.seed = 0, order.steps, order.seed
        self.log: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        found = weight_layers(self.model, lambda name: matches(name, order.include, order.exclude))
        self.sites: dict[str, Site] = found.sites
        parameters = dict(self.model.named_parameters())
        weights = {name: parameters[name] for name in found.layers}
        refuse_outsiders(weights, optimizer)
        if any(part.hangs for part in self.parts):
            self._refuse_spread(model)
        self.masks = Masks(weights, optimizer)
        self._edited, self._charged, self._closed, self._skipped = False, False, False, False
        self._handles: list[RemovableHandle] = []
        if state is not None:
            self._check_order(state["order"])
        try:
            self._begin(state)
        except BaseException:
            self.close()
            raise
        self._handles += [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def _refuse_spread(self, given: nn.Module) -> None:
        spread = any(is_sharded(parameter) for parameter in self.model.parameters())
        if spread or isinstance(given, nn.DataParallel):
            what = "spread over processes" if spread else "copied to several devices (nn.DataParallel)"
            raise ModelError(
                f"{self.order.method} trains modules of its own beside the model's, and the model is {what}; train it "
                "whole or with DistributedDataParallel"
            )

    def _begin(self, state: Mapping[str, Any] | None) -> None:
        self.masks.writes = state is None
        for part in self.parts:
            part.start(self)
        self.masks.writes = True
        if state is None:
            self.masks.enforce()
            self._project()
        else:
            self.load_state_dict(state)

    # --- what parts see -----------------------------------------------------------------------

    def weight(self, name: str) -> Tensor:
        """One weight, whole, detached."""
        return whole(self.masks.parameters[name].detach())

    def gradient(self, name: str) -> Tensor | None:
        """The gradient of the step just made, whole; also at removed weights. None if there was none."""
        gradient = self.masks.parameters[name].grad
        return None if gradient is None else whole(gradient.detach())

    def rng(self, *purpose: str) -> torch.Generator:
        """A generator for one purpose at this step: the same after a resume."""
        return generator(self.seed, *purpose, str(self.step))

    @property
    def units(self) -> int:
        """All weights that may be masked."""
        return sum(site.units for site in self.sites.values())

    @property
    def target(self) -> int:
        """How many of them stay in the end, exactly."""
        return self.order.budget.of(UnitKind.WEIGHT).keep(self.units)

    @property
    def floor(self) -> int:
        """Weights that every layer keeps at least: one, so that a signal passes, or the budget's floor."""
        return max(1, self.order.budget.floor)

    @property
    def density(self) -> float:
        """Fraction of the weights in the sites that is kept now."""
        return self.masks.density

    @property
    def on_target(self) -> bool:
        """Whether the present state could be the result: as sparse as was asked for."""
        if any(part.ready_at_end for part in self.parts):
            return False
        return sum(self.masks.kept.values()) <= self.target

    def set_masks(self, masks: Mapping[str, Tensor], what: str, **figures: Any) -> None:
        """New masks, the same on every process, and an entry in the log."""
        for name, keep in same_everywhere(dict(masks)).items():
            self.masks.set(name, keep)
        self.log.append({"step": self.step, "what": what, "density": self.density, **figures})

    def warn(self, sentence: str) -> None:
        """A sentence for the user, once."""
        if sentence not in self.warnings:
            self.warnings.append(sentence)

    # --- hook points --------------------------------------------------------------------------

    def after_backward(self) -> None:
        """Let the parts edit gradients. Call it before clipping; otherwise it happens right before the step."""
        if not self._edited:
            self._edited = True
            for part in self.parts:
                part.after_backward(self)

    def penalty(self) -> Tensor:
        """The parts' terms of the loss, for the batch that has just been run: add it to the loss."""
        self._charged = True
        terms = [term for part in self.parts if (term := part.penalty(self)) is not None]
        if terms:
            return torch.stack([term.reshape(()) for term in terms]).sum()
        return torch.zeros((), device=next(self.model.parameters()).device)

    def charge_outputs(self) -> None:
        """Add the penalty to the loss that the model itself returns in training (`output.loss` of transformers).

        Does nothing for methods without a penalty.
        """
        if not any(part.has_penalty for part in self.parts):
            return

        def add(module: nn.Module, args: Any, output: Any) -> Any:
            if module.training and torch.is_grad_enabled():
                if getattr(output, "loss", None) is None:
                    raise ModelError(
                        f"{self.order.method} adds a penalty to the loss, but {type(module).__name__} returns none; "
                        "give it labels, or add sparsifier.penalty() to the loss yourself"
                    )
                output.loss = output.loss + self.penalty()
            return output

        self._handles.append(self.model.register_forward_hook(add))

    def _before_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Any:
        itself, *others = args  # torch hands the optimizer over among its own arguments
        closure = others[0] if others else kwargs.get("closure")
        self._skipped = self._unscaled(optimizer)
        if closure is None:
            if not self._skipped:
                self._prepare()
            return None

        def and_prepare() -> Any:
            """Forward and backward happen inside of `optimizer.step(closure)`, as in Lightning."""
            self._edited = False
            loss = closure()
            self._prepare()
            return loss

        return (itself, and_prepare, *others[1:]), {key: value for key, value in kwargs.items() if key != "closure"}

    @staticmethod
    def _unscaled(optimizer: torch.optim.Optimizer) -> bool:
        """Take a gradient scaler's factor out of the gradients that a fused optimiser would take out in its kernel.

        Returns:
            Whether the kernel will skip this step, because a gradient is not finite.
        """
        scale, overflow = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
        if overflow is not None and bool(overflow):
            return True
        if scale is not None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
                parameter.grad.div_(scale.to(parameter.grad.device))
            optimizer.grad_scale = None  # type: ignore[attr-defined]
        return False

    def _prepare(self) -> None:
        if self.step >= self.steps:
            self.warn(f"training went on after the {self.steps} steps it was planned for; masks stay as they are")
        if not self._charged and any(part.has_penalty for part in self.parts):
            raise ModelError(f"{self.order.method} needs its penalty in the loss: loss = loss + sparsifier.penalty()")
        self.after_backward()
        for part in self.parts:
            part.before_step(self)

    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if self._skipped:
            self._edited = self._charged = False
            return
        self.step += 1
        self.masks.enforce()
        if self.step <= self.steps:
            for part in self.parts:
                part.after_step(self)
        self._edited = self._charged = False
        self._project()

    def _project(self) -> None:
        for part in self.parts:
            part.before_batch(self)

    def end_round(self) -> None:
        """A round of training is over."""
        for part in self.parts:
            part.end_round(self)

    # --- the end ------------------------------------------------------------------------------

    def finish(self) -> Plan:
        """Make what was learned permanent, detach, and give the plan.

        Raises:
            BudgetError: training stopped before the schedule had reached its target.
        """
        if not self._closed:
            for part in self.parts:
                part.finish(self)
            self.masks.clean()
            self.close()
        return self.plan()

    def close(self) -> None:
        """Detach: nothing is enforced any more."""
        for handle in self._handles:
            handle.remove()
        for part in self.parts:
            part.close(self)
        self._closed = True

    def __enter__(self) -> Sparsifier:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def plan(self) -> Plan:
        """What stays now, with where it came from. The weights are masked already."""
        decision = self.decision()
        values = {} if self._sharded else digests(dict(self.model.named_parameters()))
        return Plan(
            sites=decision.sites,
            masks={name: mask.cpu() for name, mask in decision.masks.items()},
            weights={name: value.cpu() for name, value in decision.weights.items()},
            scores={name: score.cpu() for name, score in decision.scores.items()},
            provenance=(self.order.provenance(type(self.model).__name__),),
            planned_on=values,
            applied=dict(values) if all(site.kind is UnitKind.WEIGHT for site in decision.sites.values()) else {},
            warnings=(*self.warnings, *decision.warnings),
            facts=decision.facts,
            additions=tuple(decision.additions),
        )

    def decision(self) -> Decision:
        """What stays now: a part's own decision, or the masks."""
        for part in self.parts:
            found = part.decision(self)
            if found is not None:
                return found
        return Decision(sites=self.sites, masks=self.masks.all())

    @property
    def _sharded(self) -> bool:
        return any(map(is_sharded, self.masks.parameters.values()))

    # --- resuming -----------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that a resumed run needs beside the model's and the optimiser's own state."""
        return {
            "order": self.order.to_json(),
            "step": self.step,
            "masks": {name: pack(mask) for name, mask in self.masks.all().items()},
            "weights": {} if self._sharded else digests(self._weights()),
            "parts": [part.state_dict() for part in self.parts],
            "log": list(self.log),
            "warnings": list(self.warnings),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken. Load the model and the optimiser first.

        Raises:
            SettingsError: the run was asked for something else then; names the first difference.
            ModelError: the model's weights are not those of the checkpoint.
        """
        self._check_order(state["order"])
        for name, entry in state["weights"].items():
            if self._weights().get(name) is None or digests({name: self._weights()[name]})[name] != entry:
                raise ModelError(
                    f"parameter '{name}' is not as it was at the checkpoint: load the model's and the optimizer's "
                    "state of the same checkpoint before the sparsifier's"
                )
        self.step, self.log, self.warnings = state["step"], list(state["log"]), list(state["warnings"])
        for name, packed in state["masks"].items():
            self.masks.set(name, unpack(packed, self.sites[name].shape, name))
        for part, saved in zip(self.parts, state["parts"], strict=True):
            part.load_state_dict(saved)
        self._edited = self._charged = False
        self._project()

    def _weights(self) -> dict[str, Tensor]:
        return {name: parameter.detach() for name, parameter in self.masks.parameters.items()}

    def _check_order(self, saved: Mapping[str, Any]) -> None:
        mine = self.order.to_json()
        for key, value in mine.items():
            if saved.get(key) != value:
                raise SettingsError(
                    f"the checkpoint was made with {key}={saved.get(key)!r}, this run has {value!r}; "
                    "resume with the same, or start anew"
                )


def refuse_unreached(run: Sparsifier) -> None:
    """For a part's `finish`: the target must have been reached.

    Raises:
        BudgetError: training stopped too early.
    """
    kept = sum(run.masks.kept.values())
    if kept != run.target:
        raise BudgetError(
            f"training stopped after {run.step} of {run.steps} steps, before the schedule was through: {kept} weights "
            f"are kept, {run.target} were asked for; train on, or plan with fewer steps"
        )
