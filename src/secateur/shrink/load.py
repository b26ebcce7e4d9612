"""Loading: a transformers folder with transformers, any other module from its factory and its card."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn

from secateur.core.errors import ModelError, UnknownNameError
from secateur.shrink.depth import remove_blocks_
from secateur.shrink.folder import CARD, CONFIG, OWN, WEIGHTS, check_weights, quiet_transformers, read_config

TRUSTED = "secateur."


def load(folder: str | Path, factory: Callable[[], nn.Module] | None = None, trust_factory: bool = False) -> nn.Module:
    """A saved model in eval mode.

    A folder with `config.json` is loaded by the transformers class that the config names, as plain
    `from_pretrained` would. Any other is built by its factory, loses the blocks that its card
    lists, and gets the saved weights.

    Args:
        folder: what `save` wrote, or any local Hugging Face folder with safetensors.
        factory: builds the unpruned module; default: the one recorded in the folder.
        trust_factory: allow importing the recorded factory from a module that is not secateur's own.

    Raises:
        ModelError: missing, truncated or corrupt files, unknown class, names or shapes that differ.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"'{folder}' is no folder")
    if (folder / CONFIG).exists():
        return load_transformers(folder)
    card = read_config(folder / OWN, CARD)
    module = (factory or _recorded_factory(folder, card, trust_factory))()
    if not isinstance(module, nn.Module):
        raise ModelError(f"the factory of '{folder}' returned {type(module).__name__}, not a torch module")
    for step in removed_blocks(folder):
        for stack, keep in step.items():
            remove_blocks_(module, stack, keep)
    return load_weights(module, folder / WEIGHTS).eval()


def removed_blocks(folder: Path) -> list[dict[str, list[bool]]]:
    """The block removals that led to a saved model, oldest first: stack -> which of its blocks stayed."""
    if not (folder / OWN / CARD).exists():
        return []
    found: list[dict[str, list[bool]]] = read_config(folder / OWN, CARD).get("removed_blocks", [])
    return found


def load_weights(module: nn.Module, file: Path) -> nn.Module:
    """Fill a module from one safetensors file; every name and shape must fit.

    Raises:
        ModelError: the file is missing or damaged, or the first name or shape that differs.
    """
    if file.suffix != ".safetensors":
        raise ModelError(f"'{file}' is not a .safetensors file; pickled weights are not read, convert them first")
    if not file.exists():
        raise ModelError(f"weight file '{file}' does not exist")
    try:
        state = load_file(file)
    except Exception as error:
        raise ModelError(f"weight file '{file}' is truncated or corrupt ({error}); fetch it again") from error
    own = module.state_dict()
    for name, tensor in state.items():
        if name not in own:
            raise ModelError(f"'{file}' has '{name}', which {type(module).__name__} has not; use the matching factory")
        if own[name].shape != tensor.shape:
            raise ModelError(f"'{name}' is {list(tensor.shape)} in '{file}' and {list(own[name].shape)} in the model")
    missing, _ = module.load_state_dict(state, strict=False)
    shared = {id(tensor) for name, tensor in own.items() if name in state}  # tied tensors are stored once
    storage = {own[name].data_ptr() for name in state}
    absent = [name for name in missing if id(own[name]) not in shared and own[name].data_ptr() not in storage]
    if absent:
        raise ModelError(f"'{file}' lacks '{absent[0]}'; use the weights of the same model")
    return module


def load_transformers(folder: Path) -> nn.Module:
    """A local Hugging Face folder by the class in its config, safetensors only, no remote code.

    Raises:
        ModelError: damaged or missing weights, unknown class, tensors missing or of other shapes.
    """
    config = read_config(folder)
    names = config.get("architectures") or []
    if quantised := config.get("quantization_config"):
        raise ModelError(f"'{folder}' is quantised ({quantised.get('quant_method')}); start from the dense checkpoint")
    check_weights(folder)
    import transformers

    found = getattr(transformers, names[0], None) if names else None
    if found is None:
        raise ModelError(f"'{folder}': transformers {transformers.__version__} has no class {names or '(none named)'}")
    try:
        with quiet_transformers():
            model, info = found.from_pretrained(folder, use_safetensors=True, output_loading_info=True, dtype="auto")
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"'{folder}' cannot be loaded as {names[0]}: {str(error).splitlines()[0]}") from error
    wrong = sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]]))
    if wrong:
        raise ModelError(f"'{folder}' does not hold the tensor '{wrong[0]}' as {names[0]} needs it")
    loaded: nn.Module = model.eval()
    return loaded


def _recorded_factory(folder: Path, card: dict[str, Any], trust: bool) -> Callable[[], nn.Module]:
    path = card.get("factory")
    if not path:
        raise ModelError(f"'{folder}' was saved without a factory; load it with factory=...")
    if not (path.startswith(TRUSTED) or trust):
        raise ModelError(
            f"'{folder}' is built by '{path}', which would be imported and run; give factory=... or allow it with "
            "trust_factory=True (--trust-factory)"
        )
    return resolve_factory(path)


def resolve_factory(path: str) -> Callable[[], nn.Module]:
    """The callable that `module.path:name` names; the current folder is searched too, as by `python -m`.

    Raises:
        ModelError: the module cannot be imported or has no such callable.
    """
    module_name, colon, name = path.partition(":")
    if not colon:
        raise ModelError(f"'{path}' is not of the form module.path:factory")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ModelError(f"cannot import '{module_name}' of the factory '{path}': {error}") from error
    factory = getattr(module, name, None)
    if not callable(factory):
        known = [found for found, value in vars(module).items() if callable(value)]
        raise UnknownNameError(f"factory in {module_name}", name, known)
    result: Callable[[], nn.Module] = factory
    return result
