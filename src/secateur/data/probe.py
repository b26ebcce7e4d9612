"""Made-up inputs for a model that came without any: what it can be called with, read off its config or first layer."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from secateur.core.errors import DataError
from secateur.core.method import Batch
from secateur.data.running import dtype_of

SAMPLES, LENGTH = 2, 16
SIZES = (224, 32, 28, 64, 96, 256, 16, 8)  # of images, tried in this order where the model does not say
TABLES = (nn.Embedding, nn.EmbeddingBag)
WAVE = 16_000  # samples of sound, one second for most models


def probe_for(model: nn.Module) -> Batch | None:
    """Two made-up samples that fit the model; None if it is not clear what it takes.

    A transformers model says what it takes in its config. A timm model has its input size. Any other
    module with one input is judged by its first layer, and by which of the usual sizes it accepts.
    """
    config = getattr(model, "config", None)
    made = _of_transformers(model, config) if hasattr(config, "get_text_config") else _of_module(model)
    return None if made is None else _cast(made, model)


def of_shape(model: nn.Module, shape: Sequence[int]) -> Batch:
    """Normal values of a shape that the user gave, in the model's dtype."""
    return _cast(Batch((random_values(*shape),)), model)


def of_tokens(model: nn.Module, samples: int, length: int) -> Batch:
    """Token ids of the model's vocabulary.

    Raises:
        DataError: the model has no table of tokens.
    """
    config = getattr(model, "config", None)
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, TABLES)]
    vocabulary = _vocabulary(config) or (tables[0] if tables else None)
    if vocabulary is None:
        raise DataError(f"{type(model).__name__} has no table of tokens; give numbers with --input or --data")
    ids = random_tokens(vocabulary, samples, length)
    if getattr(config, "is_encoder_decoder", False):
        return Batch(kwargs={"input_ids": ids, "decoder_input_ids": ids})
    return Batch((ids,))


def _cast(batch: Batch, model: nn.Module) -> Batch:
    dtype = getattr(torch, dtype_of(model), torch.float32)

    def cast(item: Any) -> Any:
        return item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item

    return Batch(tuple(map(cast, batch.args)), {name: cast(value) for name, value in batch.kwargs.items()})


def random_tokens(vocabulary: int, samples: int = SAMPLES, length: int = LENGTH) -> Tensor:
    """Token ids, `[samples, length]`, always the same."""
    return torch.randint(vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))


def random_values(*shape: int) -> Tensor:
    """Normal values, always the same."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


# --- transformers ---------------------------------------------------------------------------------


def _of_transformers(model: nn.Module, config: Any) -> Batch | None:
    main = getattr(model, "main_input_name", "")
    takes = inspect.signature(model.forward).parameters
    both = {"input_ids", "pixel_values"} <= takes.keys() and getattr(config, "vision_config", None) is not None
    if both and "image_grid_thw" not in takes:
        return _images_and_text(config)
    decoder = getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in takes
    ids = _tokens(config)
    if main == "input_ids":
        if ids is None or not decoder:
            return None if ids is None else Batch((ids,))
        return Batch(kwargs={"input_ids": ids, "decoder_input_ids": ids[:, : LENGTH // 2]})
    make = {"pixel_values": _images, "input_values": _sound, "input_features": _features}.get(main)
    values = make(config) if make else None
    if values is None or (decoder and ids is None):
        return None
    return Batch(kwargs={main: values, "decoder_input_ids": ids}) if decoder else Batch((values,))


def _tokens(config: Any) -> Tensor | None:
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", LENGTH) or LENGTH
    vocabulary = _vocabulary(config)
    return None if vocabulary is None else random_tokens(vocabulary, length=min(LENGTH, longest))


def _vocabulary(config: Any) -> int | None:
    text = config.get_text_config() if hasattr(config, "get_text_config") else None
    found = getattr(text, "vocab_size", None)
    return found if isinstance(found, int) else None


def _images_and_text(config: Any) -> Batch | None:
    """A text that ends where CLIP looks for its end, with a place for every patch where the model wants one."""
    ids, pixels = _tokens(config), _images(config.vision_config)
    if ids is None or pixels is None:
        return None
    end = getattr(config.get_text_config(), "eos_token_id", None)
    if isinstance(end, int):
        ids = torch.where(ids == end, 0, ids)
        ids[:, -1] = min(end, config.get_text_config().vocab_size - 1)
    place = getattr(config, "image_token_id", None)
    if isinstance(place, int):
        ids = torch.where(ids == place, place - 1, ids)
        ids = torch.cat([torch.full((SAMPLES, _places(config)), place), ids], 1)
    return Batch(kwargs={"input_ids": ids, "pixel_values": pixels})


def _places(config: Any) -> int:
    """How many tokens an image becomes: one a patch, unless the config has a number of its own."""
    own = getattr(config, "mm_tokens_per_image", None)
    if isinstance(own, int):
        return own
    vision = config.vision_config
    patches = int((vision.image_size // vision.patch_size) ** 2)
    return patches + (getattr(config, "vision_feature_select_strategy", "default") == "full")


def _images(config: Any) -> Tensor | None:
    """`[2, channels, height, width]`; with frames before the channels for video."""
    inner = getattr(config, "backbone_config", None) or config
    size = next((found for one in (config, inner) if (found := getattr(one, "image_size", None))), SIZES[0])
    if isinstance(size, Mapping):
        size = (size.get("height"), size.get("width"))
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(inner, "num_channels", 3)
    if not all(isinstance(number, int) for number in (height, width, channels)):
        return None
    frames = [config.num_frames] if isinstance(getattr(config, "num_frames", None), int) else []
    return random_values(SAMPLES, *frames, channels, height, width)


def _sound(config: Any) -> Tensor:
    """A wave, or a spectrogram `[2, time, mel bins]` for models that look at it as an image."""
    length, bins = getattr(config, "max_length", None), getattr(config, "num_mel_bins", None)
    if isinstance(length, int) and isinstance(bins, int) and not hasattr(config, "conv_dim"):
        return random_values(SAMPLES, length, bins)
    channels = getattr(config, "audio_channels", None)
    return random_values(SAMPLES, *([channels] if channels else []), WAVE)


def _features(config: Any) -> Tensor | None:
    """A spectrogram: Whisper's is `[2, mel bins, time]` and of fixed length, all others' `[2, time, bins]`."""
    bins, places = getattr(config, "num_mel_bins", None), getattr(config, "max_source_positions", None)
    if isinstance(bins, int) and isinstance(places, int):
        return random_values(SAMPLES, bins, 2 * places)
    for name in ("input_feat_per_channel", "feature_projection_input_dim"):
        if isinstance(width := getattr(config, name, None), int):
            return random_values(SAMPLES, 4 * LENGTH, width)
    return None


# --- any other module -----------------------------------------------------------------------------


def _of_module(model: nn.Module) -> Batch | None:
    parameters = inspect.signature(model.forward).parameters.values()
    plain = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [one for one in parameters if one.default is one.empty and one.kind in plain]
    if len(needed) > 1:
        return None
    candidates = [*_of_timm(model), *_of_first_layer(model)]
    return next((made for made in candidates if _accepts(model, made)), candidates[0] if candidates else None)


def _of_timm(model: nn.Module) -> Iterator[Batch]:
    config = getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None)
    size = config.get("input_size") if isinstance(config, Mapping) else None
    own = getattr(getattr(model, "patch_embed", None), "img_size", None)
    if size is not None:
        sizes = [size, *([(size[0], *own)] if isinstance(own, tuple) else [])]
        yield from (Batch((random_values(SAMPLES, *one),)) for one in sizes)


def _of_first_layer(model: nn.Module) -> Iterator[Batch]:
    shapes: list[tuple[int, ...]]
    for module in model.modules():
        match module:
            case nn.Conv1d():
                shapes = [(module.in_channels, 256)]
            case nn.Conv2d():
                shapes = [(module.in_channels, size, size) for size in SIZES]
            case nn.Conv3d():
                shapes = [(module.in_channels, *size) for size in ((8, 64, 64), (16, 112, 112), (16, 224, 224))]
            case nn.Linear():
                shapes = [(module.in_features,), (LENGTH, module.in_features)]
            case nn.RNNBase() if module.batch_first:
                shapes = [(LENGTH, module.input_size)]
            case nn.Embedding() | nn.EmbeddingBag():
                yield Batch((random_tokens(module.num_embeddings),))
                return
            case _:
                continue
        yield from (Batch((random_values(SAMPLES, *shape),)) for shape in shapes)
        return


def _accepts(model: nn.Module, batch: Batch) -> bool:
    """Whether the model runs on inputs of these shapes: a copy of it does, without weights and without computing."""
    tensors = (*model.parameters(), *model.buffers())
    copies: dict[int, Any] = {id(tensor): _meta(tensor) for tensor in tensors}
    try:
        copy = deepcopy(model, copies).eval()
        with torch.no_grad():
            copy(*batch.to("meta").args)
    except Exception:
        # whatever a model raises on inputs that do not fit, or on tensors without values
        return False
    return True


def _meta(tensor: Tensor) -> Tensor:
    bare = tensor.detach().to("meta")
    return nn.Parameter(bare, requires_grad=False) if isinstance(tensor, nn.Parameter) else bare
