"""MODEL: a zoo name, a local folder, `module.path:factory`, `timm:NAME`, or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from secateur import zoo
from secateur.core.errors import MissingExtraError, ModelError, SettingsError, UnknownNameError
from secateur.shrink.folder import CARD, CONFIG, OWN, read_config
from secateur.shrink.load import build, load, load_weights, outline_transformers

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "tokenizer*"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class OpenedModel:
    """A model and what is known about where it came from.

    Attributes:
        model: in eval mode.
        name: what the user typed.
        folder: where tokenizer and processors are, if anywhere.
        factory: `module.path:name` that builds the module, for modules that are no transformers model.
        data: the data set that belongs to it, e.g. `zoo:digits`.
    """

    model: nn.Module
    name: str
    folder: Path | None = None
    factory: str | None = None
    data: str | None = None


def open_model(
    name: str,
    weights: str | Path | None = None,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    trust_factory: bool = False,
) -> OpenedModel:
    """The model that a MODEL argument names.

    Args:
        name: `zoo:digits-resnet`, a folder, `module.path:factory`, `timm:resnet18`, or `owner/name` on the hub;
            arguments of a factory and of timm stand behind it: `timm:resnet18?num_classes=10`.
        weights: a safetensors file for a factory.
        device: where to put it.
        dtype: convert to this; default: as stored.
        trust_factory: allow a folder to name the factory that is imported.

    Raises:
        UnknownNameError: gives the nearest names.
        ModelError: it cannot be loaded.
    """
    opened = _open(name, weights, trust_factory)
    if weights is not None and (opened.factory is None or opened.data is not None):
        raise ModelError("--weights goes with module.path:factory; zoo models and folders bring their own")
    if dtype is not None and dtype not in DTYPES:
        raise UnknownNameError("dtype", dtype, DTYPES)
    try:
        opened.model.to(torch.device(device))
        if dtype is not None:
            _cast(opened.model, DTYPES[dtype])
    except (RuntimeError, AssertionError) as error:
        raise SettingsError(f"device '{device}' cannot be used: {str(error).splitlines()[0]}") from error
    return opened


def open_outline(name: str, wanted: bool = False) -> OpenedModel | None:
    """The model without the values of its weights, on the meta device; None where it should be loaded instead.

    A folder with a `config.json` and no safetensors has no weights to load, so it needs no asking.

    Args:
        name: a folder or `module.path:factory`; zoo models are small and always loaded.
        wanted: do without weights even if they are there.

    Raises:
        ModelError: the model cannot be built.
    """
    folder = Path(name)
    if (folder / CONFIG).exists():
        bare = wanted or not any(folder.glob("*.safetensors"))
        return OpenedModel(outline_transformers(folder), name, folder, None, recorded_data(folder)) if bare else None
    if not wanted or name.startswith("zoo:"):
        return None
    if ":" not in name:
        raise ModelError(
            f"'{name}' cannot be built without weights: give module.path:factory or a folder with {CONFIG}"
        )
    with torch.device("meta"):
        return OpenedModel(build(name).eval(), name, factory=name)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Convert what a file would hold; transformers makes its other buffers, in float32, when it loads.

    A plain module's buffers are all converted, as its loader does.
    """
    if not hasattr(model, "save_pretrained"):
        model.to(dtype)
        return
    stored = model.state_dict().keys()
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name in stored and tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)


def _open(name: str, weights: str | Path | None, trust_factory: bool) -> OpenedModel:
    if name.startswith("zoo:"):
        entry = zoo.get(name)
        factory = None if entry.pretrained else entry.factory
        return OpenedModel(zoo.load_model(name), name, zoo.folder(name), factory, f"zoo:{entry.data}")
    folder = Path(name)
    if folder.exists():
        return _open_folder(folder, name, trust_factory)
    if ":" in name:
        model = build(name)
        if weights is not None:
            load_weights(model, Path(weights))
        return OpenedModel(model.eval(), name, factory=name)
    if HUB_ID.match(name):
        folder = _download(name)
        return OpenedModel(load(folder), name, folder)
    raise UnknownNameError("model", name, [f"zoo:{known}" for known in zoo.names()])


def _open_folder(folder: Path, name: str, trust_factory: bool) -> OpenedModel:
    if folder.is_file():
        raise ModelError(f"'{name}' is a file; give its folder, or module.path:factory with --weights {name}")
    model = load(folder, trust_factory=trust_factory)
    factory = None if (folder / CONFIG).exists() else read_config(folder / OWN, CARD).get("factory")
    return OpenedModel(model, name, folder, factory, recorded_data(folder))


def recorded_data(folder: Path) -> str | None:
    """The data set that a result folder was measured on, so that it need not be named again."""
    card = folder / OWN / CARD
    found: Any = read_config(folder / OWN, CARD).get("data") if card.exists() else None
    return found if isinstance(found, str) else None


def _download(name: str) -> Path:
    """A hub repository's config, tokenizer and safetensors files, in the hub's own cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise MissingExtraError("huggingface_hub", "data", "loading a model from the hub") from None
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:
        # the hub's client raises many kinds (offline, not found, gated); all mean the same to the user
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"'{name}' is no local folder and cannot be fetched from the hub ({type(error).__name__}: {reason})"
        ) from error


def open_tokenizer(opened: OpenedModel) -> Any:
    """The tokenizer beside the model; None if there is none.

    Raises:
        ModelError: there are tokenizer files, but they cannot be loaded.
    """
    folder = opened.folder
    if folder is None or not any(folder.glob("tokenizer*")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        # damaged files make the tokenizer's classes raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"the tokenizer in '{folder}' cannot be loaded: {reason}") from error
