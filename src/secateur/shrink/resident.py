"""Weights that are in memory only while a part of the model is at work: the model itself stays on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.memory import give_back
from secateur.core.method import Residency
from secateur.shrink.checkpoint import Checkpoint
from secateur.shrink.folder import quiet_transformers, read_config
from secateur.shrink.load import model_class, refuse_quantised

WHOLE = 1 << 25  # bytes up to which an embedding is read as a whole instead of row by row


def skeleton(folder: Path) -> nn.Module:
    """The folder's model with buffers, but with parameters on the meta device.

    Raises:
        ModelError: no transformers model, quantised, or a config that no model can be made of.
    """
    config = read_config(folder)
    refuse_quantised(folder, config)
    found = model_class(folder, config)
    try:
        with quiet_transformers(), _parameters_on_meta():
            model: Any = found(found.config_class.from_pretrained(folder))
    except Exception as error:
        # a damaged config can make a model class raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"'{folder}' cannot be built as {found.__name__}: {reason}") from error
    model.name_or_path = str(folder)
    made: nn.Module = model.eval()
    return made


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Modules built inside the block get parameters without memory; what they compute for buffers is real."""
    register: Any = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None and not parameter.is_meta:
            self._parameters[name] = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


class Streamed(Residency):
    """Reads weights from a checkpoint when a part of the model is needed, and drops them afterwards.

    Args:
        model: from `skeleton`.
        checkpoint: its weights.
        device: where parts are run.
        dtype: of floating-point weights while they are here; default: as stored.
    """

    def __init__(
        self,
        model: nn.Module,
        checkpoint: Checkpoint,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ):
        self.model, self.checkpoint, self.dtype = model, checkpoint, dtype
        self._device = torch.device(device)
        self._here: dict[str, tuple[nn.Module, str, nn.Parameter]] = {}
        self._stored_buffers = [name for name, _ in model.named_buffers() if checkpoint.has(name)]
        for name in self._stored_buffers:  # small: positions, masks
            _set_buffer(model, name, checkpoint.read(name))
        for module in model.modules():
            for leaf, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[leaf] = buffer.to(self._device)

    @property
    def device(self) -> torch.device:
        """Where parts are run."""
        return self._device

    @contextlib.contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """The weights of the module `name` are there inside the block."""
        module = self.model.get_submodule(name)
        brought = [f"{name}.{leaf}" if name else leaf for leaf, _ in module.named_parameters(remove_duplicate=False)]
        try:
            for one in brought:
                self._bring(one)
            yield
        finally:
            for one in brought:
                self._drop(one)
            give_back()

    @contextlib.contextmanager
    def outside(self, names: Sequence[str]) -> Iterator[None]:
        """The weights of everything outside the modules `names` come when they are first used inside the block.

        Of large embeddings only the rows that are looked up are read.
        """
        prefixes = tuple(f"{name}." for name in names)
        undo: list[Callable[[], object]] = []
        brought: list[str] = []
        try:
            for name, module in self.model.named_modules():
                if f"{name}.".startswith(prefixes) or not module._parameters:
                    continue
                own = [
                    f"{name}.{leaf}" if name else leaf for leaf, one in module._parameters.items() if one is not None
                ]
                if isinstance(module, nn.Embedding) and self.checkpoint.size(own[0]) > WHOLE:
                    undo.append(self._by_rows(module, own[0]))
                elif own:
                    undo.append(self._when_called(module, own, brought))
            yield
        finally:
            for one in undo:
                one()
            for name in brought:
                self._drop(name)

    def _when_called(self, module: nn.Module, names: list[str], brought: list[str]) -> Callable[[], object]:
        def bring(module: nn.Module, args: Any) -> None:
            for name in names:
                if name not in self._here:
                    self._bring(name)
                    brought.append(name)

        return module.register_forward_pre_hook(bring).remove

    def _by_rows(self, module: nn.Embedding, name: str) -> Callable[[], object]:
        """Let the module look up ids in a table of only the rows that they name."""
        own, real, empty = module.__dict__.get("forward"), module.forward, module._parameters["weight"]

        def forward(ids: Tensor) -> Tensor:
            rows, where = torch.unique(ids.cpu(), return_inverse=True)
            table = self.checkpoint.rows(name, rows)
            table = self.checkpoint.read(name)[rows] if table is None else table
            module._parameters["weight"] = nn.Parameter(self._cast(table), requires_grad=False)
            try:
                found: Tensor = real(where.to(self._device))
                return found
            finally:
                module._parameters["weight"] = empty

        vars(module)["forward"] = forward

        def undo() -> None:
            del vars(module)["forward"]
            if own is not None:
                vars(module)["forward"] = own

        return undo

    def _bring(self, name: str) -> None:
        if name in self._here:
            return
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        empty = module._parameters[leaf]
        assert empty is not None
        self._here[name] = (module, leaf, empty)
        module._parameters[leaf] = nn.Parameter(self._cast(self.checkpoint.read(name)), requires_grad=False)

    def _drop(self, name: str) -> None:
        if name in self._here:
            module, leaf, empty = self._here.pop(name)
            module._parameters[leaf] = empty

    def _cast(self, value: Tensor) -> Tensor:
        dtype = self.dtype if self.dtype is not None and value.is_floating_point() else value.dtype
        return value.to(self._device, dtype)


def _set_buffer(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._buffers[leaf] = value
