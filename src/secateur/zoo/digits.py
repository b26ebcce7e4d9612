"""`zoo:digits`: the 1,797 handwritten 8x8 digits that come with scikit-learn."""

from __future__ import annotations

import numpy as np
import torch

from secateur.data.dataset import DataKind, Dataset, Splits

EVALUATION = 450
NAME = "zoo:digits"


def digits(seed: int = 0, samples: int | None = None) -> Splits:
    """The 1,347 training images as calibration, 450 for evaluation; pixels 0..16 divided by 16.

    The split is always the same and keeps the classes' shares. `samples` draws so many of the
    training images with `seed`; without it all come, in a fixed order.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    bunch = load_digits()
    train, test = train_test_split(
        np.arange(len(bunch.target)), test_size=EVALUATION, stratify=bunch.target, random_state=0
    )
    everything = Dataset(
        name=NAME,
        kind=DataKind.IMAGE,
        inputs=torch.from_numpy(bunch.images.astype(np.float32) / 16).unsqueeze(1),  # [1797, 1, 8, 8]
        targets=torch.from_numpy(bunch.target.astype(np.int64)),
        classes=tuple(map(str, bunch.target_names)),
    )
    calibration = everything.take(torch.from_numpy(train))
    if samples is not None:
        calibration = calibration.sample(samples, seed)
    return Splits(calibration, everything.take(torch.from_numpy(test)))
