"""Train a zoo model from scratch and write the folder that is shipped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from secateur.core.errors import SettingsError
from secateur.core.files import check_free, whole_folder, write_json
from secateur.core.plan import versions
from secateur.core.progress import Progress, Silent
from secateur.core.seeding import seeded
from secateur.zoo.catalogue import CARD, WEIGHTS, Recipe, ZooModel, ZooTask, get
from secateur.zoo.grading import quality
from secateur.zoo.language import write_tokenizer
from secateur.zoo.loading import make, no_bars
from secateur.zoo.skills import END
from secateur.zoo.sources import data_digest, load_data
from secateur.zoo.training import train
from secateur.zoo.vision import digits_processor


def build(
    name: str,
    out: Path,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    steps: int | None = None,
    force: bool = False,
) -> dict[str, float]:
    """Train a model on the CPU and write its folder, `card.json` included.

    Equal seed, versions, threads and processor give equal bytes.

    Args:
        name: model of the zoo.
        out: the folder to write; appears whole or not at all.
        seed: for the initial weights and the batches.
        progress: receives one stage with one step for each training step.
        steps: train for so many steps instead of the recipe's.
        force: replace `out` if it exists.

    Returns:
        `{"accuracy": fraction}` or `{"perplexity": per token}` on the evaluation split.

    Raises:
        UnknownNameError: gives the nearest names.
        SettingsError: `steps` is not positive.
        OutputError: `out` exists or cannot be written.
    """
    entry, out = get(name), Path(out)
    recipe = entry.recipe if steps is None else replace(entry.recipe, steps=steps)
    if recipe.steps < 1:
        raise SettingsError(f"training needs at least 1 step, got {recipe.steps}")
    check_free(out, force)
    with _threads(recipe.threads), seeded(seed):
        model = make(entry)
        train(model, entry, recipe, seed, progress or Silent())
        if entry.half:
            model.half().float()  # the card is to say how good the stored weights are
        result = quality(model, load_data(entry.data).evaluation)
    with whole_folder(out, force) as temporary:
        write_model(model, entry, temporary)
        write_json(temporary / CARD, describe(model, entry, recipe, seed, result))
    return result


@contextlib.contextmanager
def _threads(count: int) -> Iterator[None]:
    """Sums split over another number of threads round differently, so the number is part of the recipe."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_model(model: nn.Module, entry: ZooModel, path: Path) -> None:
    """Write weights and, for Hugging Face models, configuration and tokenizer or image processor."""
    if not entry.pretrained:
        save_file({key: value.contiguous() for key, value in model.state_dict().items()}, path / WEIGHTS)
        return
    save: Any = model.save_pretrained  # torch types unknown attributes of a module as tensors
    with no_bars():
        save(path, state_dict=halves(model)) if entry.half else save(path)
    if entry.task is ZooTask.LANGUAGE:
        write_tokenizer(path, END if entry.data == "skills" else None)
    else:
        write_json(path / "preprocessor_config.json", digits_processor())


def halves(model: nn.Module) -> dict[str, Tensor]:
    """The state as it is stored: float16."""
    return {key: value.half() for key, value in model.state_dict().items()}


def describe(model: nn.Module, entry: ZooModel, recipe: Recipe, seed: int, result: dict[str, float]) -> dict[str, Any]:
    """The card: what the model is, how it was made and how good it is."""
    return {
        "name": entry.name,
        "title": entry.title,
        "task": entry.task.value,
        "data": entry.data,
        "data_digest": data_digest(entry.data),
        "factory": entry.factory,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "recipe": asdict(recipe),
        "seed": seed,
        "quality": result,
        "versions": versions(),
    }
