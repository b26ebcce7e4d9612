"""Sparse training inside other people's loops: callbacks for transformers' Trainer and for Lightning.

Both only attach a sparsifier when training begins and take its plan when training ends; everything between
goes through the optimiser's own hooks.

Example:
    callback = hf_callback("granet", sparsity=0.9)
    Trainer(model, args, train_dataset=data, callbacks=[callback]).train()
    callback.plan.save("plan")
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import api
from secateur.core.errors import MissingExtraError, PlanError
from secateur.core.plan import Plan
from secateur.core.trees import load_tree, save_tree
from secateur.train.sparsifier import Sparsifier

FOLDER = "sparsifier"  # beside a checkpoint's other files


class Attachment:
    """What both callbacks share: a sparsifier from the start of training to its end.

    Attributes:
        sparsifier: while training and afterwards; None before.
        plan: what stays, once the whole training was done.
    """

    def __init__(self, method: str, sparsity: float | None, asked: dict[str, Any]):
        self.method, self.sparsity, self.asked = method, sparsity, asked
        self.sparsifier: Sparsifier | None = None
        self.plan: Plan | None = None
        self.saved: Any = None

    def attach(self, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> Sparsifier:
        """Begin, or go on from the saved state; `steps` is the whole training."""
        self.sparsifier = api.sparsify(
            model, optimizer, self.method, self.sparsity, steps=steps, state=self.saved, **self.asked
        )
        return self.sparsifier

    def detach(self) -> None:
        """End. A run that was cut short keeps its masks and has no plan."""
        if self.sparsifier is not None and self.sparsifier.step >= self.sparsifier.steps:
            self.plan = self.sparsifier.finish()


class TransformersHooks(Attachment):
    """The events of `transformers.TrainerCallback` that matter."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Model and optimiser are there, and loaded where training is resumed."""
        if state.global_step:
            self.saved = read_state(Path(args.output_dir) / f"checkpoint-{state.global_step}")
        self.attach(kwargs["model"], kwargs["optimizer"], state.max_steps).charge_outputs()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A checkpoint has just been written."""
        if self.sparsifier is None:
            return
        saved = self.sparsifier.state_dict()  # on every rank: sharded masks are gathered
        if state.is_world_process_zero:
            save_tree(saved, Path(args.output_dir) / f"checkpoint-{state.global_step}" / FOLDER)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Training is over."""
        self.detach()


class LightningHooks(Attachment):
    """The events of Lightning's `Callback` that matter."""

    def state_dict(self) -> dict[str, Any]:
        """Goes into Lightning's checkpoint."""
        return {} if self.sparsifier is None else self.sparsifier.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Comes out of it, before training begins."""
        self.saved = state_dict or None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Model and optimiser are there, and loaded where training is resumed."""
        self.attach(pl_module, trainer.optimizers[0], int(trainer.estimated_stepping_batches))

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        """The loss can still be added to."""
        assert self.sparsifier is not None
        if any(part.has_penalty for part in self.sparsifier.parts):
            loss.add_(self.sparsifier.penalty())

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Gradients are there and not clipped yet."""
        assert self.sparsifier is not None
        self.sparsifier.after_backward()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Training is over."""
        self.detach()


def hf_callback(method: str, sparsity: float | None = None, **asked: Any) -> Any:
    """A callback for transformers' `Trainer`; arguments as for `secateur.sparsify`, without `steps`.

    The sparsifier's state is written into every checkpoint and read again by `resume_from_checkpoint`. A method's
    penalty is added to the loss that the model returns. The plan is in `callback.plan` after training.

    Raises:
        MissingExtraError: accelerate, which Trainer needs, is not installed.
    """
    try:
        import_module("accelerate")
    except ModuleNotFoundError as error:
        raise MissingExtraError("accelerate", "train", "transformers' Trainer") from error
    base = import_module("transformers").TrainerCallback
    return type("SparsifierCallback", (TransformersHooks, base), {})(method, sparsity, asked)


def lightning_callback(method: str, sparsity: float | None = None, **asked: Any) -> Any:
    """A callback for Lightning's `Trainer`; arguments as for `secateur.sparsify`, without `steps`.

    The sparsifier's state goes into Lightning's checkpoints. A method's penalty is added to the loss before backward,
    gradient edits come before clipping. The plan is in `callback.plan` after training.

    Raises:
        MissingExtraError: neither `lightning` nor `pytorch_lightning` is installed.
    """
    return type("SparsifierCallback", (LightningHooks, _lightning().Callback), {})(method, sparsity, asked)


def read_state(checkpoint: Path) -> Any:
    """The sparsifier's state in a checkpoint of Trainer.

    Raises:
        PlanError: the checkpoint holds none.
    """
    if not (checkpoint / FOLDER).exists():
        raise PlanError(
            f"'{checkpoint}' holds no sparsifier state; resume from a checkpoint that was written with the callback, "
            "or start anew"
        )
    return load_tree(checkpoint / FOLDER)


def _lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in ("lightning", "pytorch_lightning"):
                raise
    raise MissingExtraError("pytorch-lightning", "lightning", "the callback for Lightning")
