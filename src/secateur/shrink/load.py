"""Loading: a transformers folder with transformers, any other module from its factory and its card."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor, nn

from secateur.core.errors import (
    MissingExtraError,
    ModelError,
    PlanError,
    SecateurError,
    SettingsError,
    UnknownNameError,
)
from secateur.core.imports import imported
from secateur.shrink.additions import attach
from secateur.shrink.biases import add_biases_
from secateur.shrink.cut import AttributeChange, set_attributes
from secateur.shrink.depth import remove_blocks_
from secateur.shrink.folder import BUFFERS, CARD, CONFIG, OWN, WEIGHTS, check_weights, quiet_transformers, read_config

TRUSTED = "secateur.zoo."
TIMM = "timm:"


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
        return load_transformers(folder) if layout_of_folder(folder) == "plain" else load_uneven(folder)
    if not (folder / OWN / CARD).exists():
        raise ModelError(f"'{folder}' is no model folder: it has neither {CONFIG} nor {OWN}/{CARD}")
    card = read_config(folder / OWN, CARD)
    if factory is None:
        module = build(_recorded_factory(folder, card, trust_factory))
    else:
        module = _built(factory, f"of '{folder}'")
    resize = replay(module, folder)
    return _with_buffers(load_weights(module, folder / WEIGHTS, resize), folder).eval()


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """What was done to a fresh module, oldest first: `{"blocks": {stack: kept}}` or `{"cut": [attribute changes]}`."""
    if not (folder / OWN / CARD).exists():
        return []
    found: list[dict[str, Any]] = read_config(folder / OWN, CARD).get("steps", [])
    if not (isinstance(found, list) and all(isinstance(step, dict) for step in found)):
        raise ModelError(f"'{folder / OWN / CARD}' has no list of steps; prune the model again")
    return found


def layout_of_folder(folder: Path) -> str:
    """`plain` if the config says every width, `uneven` if the card is needed."""
    card = folder / OWN / CARD
    return str(read_config(folder / OWN, CARD).get("layout", "plain")) if card.exists() else "plain"


def replay(module: nn.Module, folder: Path) -> bool:
    """Do to a fresh module what was done to the saved one; returns whether its tensors must be resized.

    Raises:
        ModelError: the module is not the one that was pruned.
    """
    resize = False
    for step in steps_of(folder):
        try:
            for stack, keep in step.get("blocks", {}).items():
                remove_blocks_(module, stack, keep)
            attach(module, step.get("additions", ()))
            add_biases_(module, step.get("biases", ()))
            if "cut" in step:
                set_attributes(module, [AttributeChange(**change) for change in step["cut"]])
                resize = True
        except (PlanError, TypeError, AttributeError, KeyError) as error:
            raise ModelError(
                f"the model that '{folder}' is built from does not fit what was removed: {error}"
            ) from error
    return resize


def _with_buffers(module: nn.Module, folder: Path) -> nn.Module:
    file = folder / OWN / BUFFERS
    if file.exists():
        buffers = dict(module.named_buffers())
        for name, value in read_tensors(file).items():
            if name not in buffers:
                raise ModelError(f"'{file}' has '{name}', which {type(module).__name__} has not")
            buffers[name].data = value
    return module


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of one safetensors file.

    Raises:
        ModelError: missing, truncated or corrupt.
    """
    if not file.exists():
        raise ModelError(f"weight file '{file}' does not exist")
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except Exception as error:
        raise ModelError(f"weight file '{file}' is truncated or corrupt ({error}); fetch it again") from error
    return tensors


def load_uneven(folder: Path) -> nn.Module:
    """A transformers folder whose widths no config can say: the plain class, cut again, then filled.

    Raises:
        ModelError: damaged files, or names and shapes that differ.
    """
    card = read_config(folder / OWN, CARD)
    shapes, attributes, added = card.get("shapes", {}), card.get("attributes", []), card.get("added", {})
    additions = card.get("additions", [])

    def cut_again(plain: type) -> type:
        def build(self: Any, *args: Any, **kwargs: Any) -> None:
            plain.__init__(self, *args, **kwargs)  # type: ignore[misc]
            attach(self, additions)
            set_attributes(self, [AttributeChange(**change) for change in attributes])
            resized(self, shapes)
            add_biases_(self, added)

        return type(plain.__name__, (plain,), {"__init__": build, "__module__": plain.__module__})

    return _with_buffers(load_transformers(folder, cut_again), folder)


def resized(module: nn.Module, shapes: dict[str, list[int]]) -> None:
    """Give parameters and buffers other shapes; their values are to be loaded.

    Raises:
        ModelError: the module has no such tensor.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, shape in shapes.items():
        if name not in tensors:
            raise ModelError(f"{type(module).__name__} has no '{name}' to resize; use the model that was pruned")
        tensors[name].data = tensors[name].data.new_empty(shape)


def load_weights(module: nn.Module, file: Path, resize: bool = False) -> nn.Module:
    """Fill a module from one safetensors file; every name and shape must fit, dtypes become the file's.

    Args:
        module: built, and cut as the saved one was.
        file: the weights.
        resize: give tensors the file's shapes, for modules with units cut out.

    Raises:
        ModelError: the file is missing or damaged, or the first name or shape that differs.
    """
    if file.suffix != ".safetensors":
        raise ModelError(f"'{file}' is not a .safetensors file; pickled weights are not read, convert them first")
    return fill(module, read_tensors(file), file, resize)


def fill(module: nn.Module, state: dict[str, Tensor], file: Path, resize: bool) -> nn.Module:
    """Put tensors into a module; see `load_weights`."""
    if resize:
        _resize(module, state)
    own = module.state_dict()
    for name, tensor in state.items():
        if name not in own:
            raise ModelError(f"'{file}' has '{name}', which {type(module).__name__} has not; use the matching factory")
        if own[name].shape != tensor.shape:
            raise ModelError(f"'{name}' is {list(tensor.shape)} in '{file}' and {list(own[name].shape)} in the model")
        if own[name].is_floating_point() != tensor.is_floating_point():
            raise ModelError(f"'{name}' is {tensor.dtype} in '{file}' and {own[name].dtype} in the model")
    _take_dtypes(module, state)
    missing, _ = module.load_state_dict(state, strict=False)
    own = module.state_dict()
    storage = {own[name].data_ptr() for name in state}  # tied tensors are stored once
    absent = [name for name in missing if own[name].data_ptr() not in storage]
    if absent:
        raise ModelError(f"'{file}' lacks '{absent[0]}'; use the weights of the same model")
    return module


def _resize(module: nn.Module, state: dict[str, Tensor]) -> None:
    own = dict(module.named_parameters()) | dict(module.named_buffers())
    odd = {name: list(t.shape) for name, t in state.items() if name in own and own[name].dim() == t.dim()}
    resized(module, {name: shape for name, shape in odd.items() if list(own[name].shape) != shape})


def _take_dtypes(module: nn.Module, state: dict[str, Tensor]) -> None:
    """Give the module the file's dtypes; buffers that no file holds follow where all the others agree."""
    floats = {tensor.dtype for tensor in state.values() if tensor.is_floating_point()}
    if len(floats) == 1:
        module.to(floats.pop())
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if name in state:
            tensor.data = tensor.data.to(state[name].dtype)


def load_transformers(folder: Path, adapt: Callable[[type], type] = lambda plain: plain) -> nn.Module:
    """A local Hugging Face folder by the class in its config, safetensors only, no remote code.

    Args:
        folder: with config and weights.
        adapt: makes the class to load from the one that the config names.

    Raises:
        ModelError: damaged or missing weights, unknown class, tensors missing or of other shapes.
    """
    config = read_config(folder)
    refuse_quantised(folder, config)
    check_weights(folder)
    found: Any = adapt(model_class(folder, config))
    try:
        with quiet_transformers():
            model, info = found.from_pretrained(
                folder, use_safetensors=True, output_loading_info=True, dtype="auto", ignore_mismatched_sizes=True
            )
    except Exception as error:
        # a damaged config can make a model class raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"'{folder}' cannot be loaded as {found.__name__}: {reason}") from error
    if info["mismatched_keys"]:
        name, stored, needed = min(info["mismatched_keys"], key=str)
        raise ModelError(f"'{folder}' holds '{name}' as {list(stored)}, its {CONFIG} needs {list(needed)}")
    if info["missing_keys"]:
        raise ModelError(f"'{folder}' lacks the tensor '{min(info['missing_keys'])}' that {found.__name__} needs")
    if info["unexpected_keys"]:
        name = min(info["unexpected_keys"])
        warnings.warn(f"'{folder}' holds '{name}', which {found.__name__} does not use", stacklevel=2)
    loaded: nn.Module = model.eval()
    loaded.__class__ = model_class(folder, config)
    return loaded


def refuse_quantised(folder: Path, config: dict[str, Any]) -> None:
    """Quantised weights cannot be pruned.

    Raises:
        ModelError: the config says that the checkpoint is quantised; gives the kind.
    """
    if quantised := config.get("quantization_config"):
        kind = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ModelError(f"'{folder}' is quantised ({kind}); start from the dense checkpoint")


def outline_transformers(folder: Path) -> nn.Module:
    """The model that a folder's config describes, on the meta device: everything but the values of its weights.

    Raises:
        ModelError: unknown class, or a config that no model can be made of.
    """
    config = read_config(folder)
    found = model_class(folder, config)
    try:
        with quiet_transformers(), torch.device("meta"):
            model: nn.Module = found(found.config_class.from_pretrained(folder))
    except Exception as error:
        # a damaged config can make a model class raise anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"'{folder}' cannot be built as {found.__name__}: {reason}") from error
    return model.eval()


def model_class(folder: Path, config: dict[str, Any]) -> Any:
    """The transformers class that the config names."""
    import transformers

    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else names
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise ModelError(
            f"'{folder}': transformers {transformers.__version__} has no model class {name or '(none named)'}"
        )
    return found


def _recorded_factory(folder: Path, card: dict[str, Any], trust: bool) -> str:
    path = card.get("factory")
    if not path:
        raise ModelError(f"'{folder}' was saved without a factory; load it with factory=...")
    if not (path.startswith(TRUSTED) or trust):
        raise ModelError(
            f"'{folder}' is built by '{path}', which would be imported and run; give factory=... or allow it with "
            "trust_factory=True (--trust-factory)"
        )
    return str(path)


def build(path: str) -> nn.Module:
    """The module that the factory `module.path:name` makes.

    Raises:
        ModelError: it cannot be imported, fails, or returns something else.
    """
    return _built(resolve_factory(path), f"'{path}'")


def _built(factory: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        module = factory()
    except SecateurError:
        raise
    except Exception as error:
        raise ModelError(f"the factory {name} failed: {type(error).__name__}: {error}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"the factory {name} returned {type(module).__name__}, not a torch module")
    return module


def resolve_factory(path: str) -> Callable[[], nn.Module]:
    """The callable that `module.path:name` or `timm:NAME` names; arguments stand behind it, `?num_classes=10&depth=3`.

    Raises:
        ModelError, UnknownNameError: see `core.imports.imported`; timm has no such network.
        MissingExtraError: timm is not installed.
        SettingsError: an argument without a value.
    """
    place, _, words = path.partition("?")
    given = dict(_argument(word, path) for word in words.split("&") if word)
    return partial(_timm_network(place.removeprefix(TIMM)) if place.startswith(TIMM) else imported(place), **given)


def _argument(word: str, path: str) -> tuple[str, Any]:
    name, equals, text = word.partition("=")
    if not equals:
        raise SettingsError(f"'{path}': arguments are name=value&name=value, got '{word}'")
    try:
        return name, yaml.safe_load(text)
    except yaml.YAMLError:
        return name, text


def _timm_network(name: str) -> Callable[..., nn.Module]:
    try:
        import timm
    except ImportError:
        raise MissingExtraError("timm", "timm", f"'{TIMM}{name}'") from None
    if not timm.is_model(name):
        raise UnknownNameError("timm network", name, timm.list_models())
    return partial(timm.create_model, name)
