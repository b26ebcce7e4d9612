"""The table of the zoo: what each model is, where its parts are, and how it was trained. Needs no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from secateur.core.errors import UnknownNameError
from secateur.core.files import read_json

PREFIX = "zoo:"
CARD, WEIGHTS = "card.json", "model.safetensors"
DATA = ("digits", "pydoc", "skills")


class ZooTask(StrEnum):
    """What a model does, hence how its quality is measured."""

    CLASSIFICATION = "classification"  # accuracy, a fraction
    LANGUAGE = "language"  # perplexity per token


@dataclass(frozen=True)
class Recipe:
    """How a model is trained; all of it is written into its card.

    Attributes:
        optimizer: `sgd` or `adamw`.
        steps, batch: number of steps, and samples in each.
        rate: peak learning rate; it rises linearly over `warmup` steps and falls as a cosine to
            `floor` times the peak.
        momentum: of SGD.
        betas: of AdamW.
        weight_decay: on all parameters.
        clip: largest norm of the gradient; None for no limit.
        shift: images are moved by up to so many pixels in each direction.
        threads: CPU threads; another number may change the last bits of the result.
    """

    optimizer: str
    steps: int
    batch: int
    rate: float
    warmup: int = 0
    floor: float = 0.0
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = None
    shift: int = 0
    threads: int = 2


@dataclass(frozen=True)
class ZooModel:
    """One entry of the zoo.

    Attributes:
        name: what the user types after `zoo:`.
        title: one line for a list.
        task: what it does.
        data: name of the data set it was trained on.
        factory: `module:function` that makes it untrained; takes no arguments.
        recipe: how it is trained.
        pretrained: whether its folder is a Hugging Face folder; otherwise factory + safetensors.
        half: whether its weights are stored, and so rounded, as float16.
    """

    name: str
    title: str
    task: ZooTask
    data: str
    factory: str
    recipe: Recipe
    pretrained: bool = False
    half: bool = False


_VISION, _LANGUAGE = "secateur.zoo.vision", "secateur.zoo.language"
_LLAMA_RECIPE = Recipe("adamw", 1200, 12, 2e-3, warmup=100, floor=0.05, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0)

MODELS = (
    ZooModel(
        name="digits-mlp",
        title="MLP 64-512-512-10 with ReLU",
        task=ZooTask.CLASSIFICATION,
        data="digits",
        factory=f"{_VISION}:digits_mlp",
        recipe=Recipe("sgd", 800, 128, 0.1),
    ),
    ZooModel(
        name="digits-resnet",
        title="residual CNN with BatchNorm, 3 stages of 2 blocks, 16-32-64 channels",
        task=ZooTask.CLASSIFICATION,
        data="digits",
        factory=f"{_VISION}:digits_resnet",
        recipe=Recipe("sgd", 500, 128, 0.1, warmup=30, weight_decay=5e-4, shift=1),
    ),
    ZooModel(
        name="digits-vit",
        title="vision transformer, 4 layers of width 64, patches of 2x2",
        task=ZooTask.CLASSIFICATION,
        data="digits",
        factory=f"{_VISION}:digits_vit",
        recipe=Recipe("adamw", 1000, 128, 2e-3, warmup=100, floor=0.02, weight_decay=0.05, clip=1.0, shift=1),
        pretrained=True,
    ),
    ZooModel(
        name="pydoc-llama",
        title="Llama, 4 layers of width 96, 4 heads, one token a character",
        task=ZooTask.LANGUAGE,
        data="pydoc",
        factory=f"{_LANGUAGE}:pydoc_llama",
        recipe=_LLAMA_RECIPE,
        pretrained=True,
    ),
    ZooModel(
        name="pydoc-llama-gqa",
        title="the same Llama with 2 key/value heads for its 4 heads",
        task=ZooTask.LANGUAGE,
        data="pydoc",
        factory=f"{_LANGUAGE}:pydoc_llama_gqa",
        recipe=_LLAMA_RECIPE,
        pretrained=True,
    ),
    ZooModel(
        name="skills-llama",
        title="Llama, 8 layers of width 128, that labels sentences, calculates in steps, closes brackets and copies",
        task=ZooTask.LANGUAGE,
        data="skills",
        factory=f"{_LANGUAGE}:skills_llama",
        recipe=Recipe(
            "adamw", 1400, 16, 2e-3, warmup=100, floor=0.05, betas=(0.9, 0.95), weight_decay=0.1, clip=1.0, threads=1
        ),
        pretrained=True,
        half=True,
    ),
)


def _plain(name: str) -> str:
    """`zoo:Digits_MLP` -> `digits-mlp`: prefix, case and underscores do not matter."""
    return name.strip().lower().removeprefix(PREFIX).replace("_", "-")


def names() -> list[str]:
    """Names of all models, sorted, without the prefix `zoo:`."""
    return sorted(model.name for model in MODELS)


def get(name: str) -> ZooModel:
    """The entry of that name, with or without `zoo:`.

    Raises:
        UnknownNameError: gives the nearest names.
    """
    for model in MODELS:
        if model.name == _plain(name):
            return model
    raise UnknownNameError("zoo model", name, names())


def data_names() -> list[str]:
    """Names of all data sets, sorted, without the prefix `zoo:`."""
    return sorted(DATA)


def data_name(name: str) -> str:
    """The data set's name without prefix.

    Raises:
        UnknownNameError: gives the nearest names.
    """
    if _plain(name) not in DATA:
        raise UnknownNameError("zoo data set", name, data_names())
    return _plain(name)


def folder(name: str) -> Path:
    """The shipped folder of a model: its weights, its card and, for Hugging Face models, their files."""
    return Path(__file__).parent / "weights" / get(name).name


def card(name: str) -> dict[str, Any]:
    """The shipped model's card: recipe, seed, quality, versions, digest of the data."""
    document: dict[str, Any] = read_json(folder(name) / CARD)
    return document
