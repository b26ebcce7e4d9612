"""What a ticket must beat: the same mask on another initialisation, the same counts at other places."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from enum import StrEnum

import torch
from torch import Tensor

from secateur.allocate.counts import uniform
from secateur.core.errors import SettingsError
from secateur.core.seeding import generator
from secateur.core.select import keep_global, keep_top
from secateur.scores.weights import uniform_random
from secateur.train.snapshot import model_state
from secateur.train.study import Masks, State, Study


class Shuffle(StrEnum):
    """What a shuffled mask has in common with the real one."""

    LAYER = "layer"  # as many weights in every layer, at random places
    GLOBAL = "global"  # as many weights in all, at random places of all layers
    EVEN = "even"  # as many weights in all, the same density in every layer


def reinitialised(study: Study, draw: int = 0) -> State:
    """All parameters and buffers of another draw from the same constructor.

    Args:
        study: knows the constructor.
        draw: number of the draw.

    Raises:
        SettingsError: the constructor gives the same weights under every seed: there is nothing to compare.
    """
    model = study.model(study.rng("reinit", str(draw)).initial_seed())
    original = model_state(study.model())
    state = model_state(model)
    for name in study.sites(model):
        if torch.equal(state[name], original[name]):
            raise SettingsError(
                f"the constructor gives '{name}' the same values under another seed, so a re-initialised control "
                "would be the ticket itself; draw the initial values inside of make()"
            )
    return state


def shuffled(
    masks: Mapping[str, Tensor], seed: int, how: Shuffle = Shuffle.LAYER, draw: int = 0, whole: Collection[str] = ()
) -> Masks:
    """Masks that keep as many weights at random places.

    Args:
        masks: name -> bool, True = keep.
        seed: of the places.
        how: what stays as it was.
        draw: number of the draw.
        whole: masks that are handed back as they are, such as those of layers that were not to be pruned.
    """
    moving = {name: mask for name, mask in masks.items() if name not in whole}
    scores = {
        name: uniform_random(tuple(mask.shape), generator(seed, "shuffled", how, str(draw), name))
        for name, mask in moving.items()
    }
    kept = {name: int(mask.sum()) for name, mask in moving.items()}
    if how is Shuffle.GLOBAL:
        found = keep_global(scores, sum(kept.values()))
    else:
        if how is Shuffle.EVEN:
            kept = uniform({name: mask.numel() for name, mask in moving.items()}, sum(kept.values()))
        found = {name: keep_top(scores[name].reshape(-1), kept[name]).view(scores[name].shape) for name in moving}
    return {name: found[name] if name in moving else mask.clone() for name, mask in masks.items()}
