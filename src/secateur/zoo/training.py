"""How the zoo's models are trained: one plain loop for all of them."""

from __future__ import annotations

from collections.abc import Iterator
from math import cos, pi

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.errors import SettingsError
from secateur.core.method import Batch
from secateur.core.progress import Progress, track
from secateur.core.seeding import generator
from secateur.data.batches import task_loss
from secateur.zoo.catalogue import Recipe, ZooModel
from secateur.zoo.digits import digits
from secateur.zoo.skills import skill_windows
from secateur.zoo.text import WINDOW, random_windows, tokens, training_text


def rate_at(step: int, recipe: Recipe) -> float:
    """Learning rate of a step (0-based): linear warm-up, then a cosine down to `floor * rate`."""
    if step < recipe.warmup:
        return recipe.rate * (step + 1) / recipe.warmup
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    return recipe.rate * (recipe.floor + (1 - recipe.floor) * (1 + cos(pi * done)) / 2)


def shifted(images: Tensor, reach: int, rng: torch.Generator) -> Tensor:
    """Each image `[n, 1, h, w]` moved by -reach..reach pixels down and across; zeros come in."""
    count, _, height, width = images.shape
    padded = F.pad(images, (reach,) * 4)[:, 0]  # [n, h + 2 reach, w + 2 reach]
    down, across = torch.randint(2 * reach + 1, (2, count, 1), generator=rng)
    rows, columns = torch.arange(height) + down, torch.arange(width) + across  # [n, h], [n, w]
    picked = padded[torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return picked.unsqueeze(1)


def image_batches(recipe: Recipe, seed: int) -> Iterator[Batch]:
    """Endless batches of digits: every image once an epoch, in a new order; the short rest is left out."""
    data, rng = digits().calibration, generator(seed, "zoo", "batches")
    while True:
        order = torch.randperm(len(data), generator=rng)
        for start in range(0, len(data) - recipe.batch + 1, recipe.batch):
            part = data.take(order[start : start + recipe.batch])
            yield Batch((shifted(part.inputs, recipe.shift, rng),), target=part.targets)


def text_batches(recipe: Recipe, seed: int) -> Iterator[Batch]:
    """Endless batches of random windows of 96 characters of the training text."""
    stream, rng = tokens(training_text()), generator(seed, "zoo", "batches")
    while True:
        yield Batch((random_windows(stream, recipe.batch, WINDOW, rng),))


def skill_batches(recipe: Recipe, seed: int) -> Iterator[Batch]:
    """Endless batches of windows of 96 characters that are filled with new lines."""
    rng = generator(seed, "zoo", "batches")
    while True:
        yield Batch((skill_windows(recipe.batch, WINDOW, rng),))


BATCHES = {"pydoc": text_batches, "digits": image_batches, "skills": skill_batches}


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """SGD with momentum or AdamW, as the recipe says.

    Raises:
        SettingsError: another name.
    """
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), recipe.rate, recipe.momentum, weight_decay=recipe.weight_decay)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), recipe.rate, recipe.betas, weight_decay=recipe.weight_decay)
    raise SettingsError(f"the zoo trains with sgd or adamw, not with '{recipe.optimizer}'")


def train(model: nn.Module, entry: ZooModel, recipe: Recipe, seed: int, progress: Progress) -> None:
    """Train `model` in place by `recipe` (the entry's own or a shortened one); leaves it in eval mode."""
    batches = BATCHES[entry.data](recipe, seed)
    optimizer = make_optimizer(model, recipe)
    model.train()
    for step in track(range(recipe.steps), progress, f"train {entry.name}"):
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, recipe)
        optimizer.zero_grad()
        loss = task_loss(model, next(batches))
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
    model.eval()
