"""What stands in a saved folder, and checks of weight files before anything is loaded from them."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from secateur.core.errors import ModelError

OWN = "secateur"  # sub-folder with plan, result card and report data
CARD = "result.json"
BUFFERS = "buffers.safetensors"  # in OWN: cut buffers that no state dict holds
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

COMPANIONS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*.model",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor*.json",
    "generation_config.json",
    "LICENSE*",
)
"""Files beside the weights that a user of the model needs: tokenizer, processors, generation settings."""


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """No bars and no warnings of transformers inside the block: what matters becomes our own error."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def carry_companions(source: Path, target: Path) -> list[str]:
    """Copy tokenizer, processor and generation files that `target` does not have; returns their names."""
    carried = []
    for pattern in COMPANIONS:
        for path in sorted(source.glob(pattern)):
            if path.is_file() and not (target / path.name).exists():
                shutil.copyfile(path, target / path.name)
                carried.append(path.name)
    return carried


def read_config(folder: Path, name: str = CONFIG) -> dict[str, Any]:
    """A JSON object from the folder.

    Raises:
        ModelError: missing or damaged; names the file.
    """
    path = folder / name
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"'{folder}' is no model folder: it has no {name}") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"'{path}' cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ModelError(f"'{path}' does not hold a JSON object")
    return found


def check_weights(folder: Path) -> list[Path]:
    """Open every shard's header; returns the shards.

    Raises:
        ModelError: pickle only, or a shard that is missing, truncated, corrupt or without a promised tensor.
    """
    if (folder / INDEX).exists() and not (folder / WEIGHTS).exists():  # the single file wins, as in transformers
        promised = read_config(folder, INDEX).get("weight_map")
        if not isinstance(promised, dict) or not all(isinstance(name, str) for name in promised.values()):
            raise ModelError(f"'{folder / INDEX}' has no map from tensors to files; fetch the file again")
        shards = sorted({folder / name for name in promised.values()})
    else:
        promised, shards = {}, [folder / WEIGHTS]
    for shard in shards:
        names = _tensor_names(shard)
        absent = sorted(name for name, file in promised.items() if file == shard.name and name not in names)
        if absent:
            raise ModelError(f"'{shard}' lacks the tensor '{absent[0]}' that {INDEX} promises; fetch the file again")
    return shards


def _tensor_names(shard: Path) -> set[str]:
    try:
        with safe_open(shard, framework="pt") as file:
            return set(file.keys())
    except FileNotFoundError:
        pickles = sorted(path.name for path in shard.parent.glob("*.bin")) + sorted(
            path.name for path in shard.parent.glob("*.pt*")
        )
        hint = f"; only pickle weights are there ({pickles[0]}), convert them to safetensors" if pickles else ""
        raise ModelError(f"weight file '{shard}' is missing{hint}") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"weight file '{shard}' is truncated or corrupt ({error}); fetch it again") from error
