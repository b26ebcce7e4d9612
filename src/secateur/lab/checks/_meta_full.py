"""Meta pruning of a trained ResNet-56 by a metanetwork that learned on ResNet-20 and has never seen a deeper network.

Beside it the same fine-tuning and cut without a metanetwork, and with one that was never trained.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur import api
from secateur.core.progress import Progress
from secateur.core.seeding import seeded
from secateur.lab.checks._beside import Figure, Ground
from secateur.lab.checks._resnet_full import FLOPS, TRAINED
from secateur.lab.cifar import resnet20, resnet32
from secateur.lab.compare import Bench, Rows
from secateur.lab.reproduce import Expectation, FullCheck, Sample
from secateur.measure import accuracy
from secateur.train.loop import Fitting, Recipe
from secateur.train.metanetwork import Metanetwork, Shape
from secateur.train.study import Ledger

EPOCHS = 40
SIZE: Mapping[str, Any] = {"layers": 4, "width": 32, "node_ratio": 0.01, "edge_ratio": 0.01}
HALF = "finetune:steps=32,optimizer=sgd,lr=0.02"
NAMES = ("learnt", "nothing", "untrained")

CLAIMS = {
    f"flops-{amount}": Expectation(
        f"accuracy points above the better of no metanetwork and an untrained one, at flops {amount}", "> 0", "both"
    )
    for _, amount in FLOPS
}
CONDITIONS = (
    f"{TRAINED.conditions} The metanetwork ({SIZE['layers']} layers, width {SIZE['width']}, ratios 0.01) learned in "
    f"{EPOCHS} steps on one pretrained ResNet-20, each with one batch of 250 images; its weights go into the "
    "ResNet-56 before the first of the 32 batches."
)


def learnt(ground: Ground, seed: int, progress: Progress) -> dict[str, Tensor]:
    """The state of a metanetwork after its training; the ResNet-32 is what the study holds out."""
    data = Bench(ground.asked(seed), Ledger(None, {}), progress).splits(seed).calibration
    with tempfile.TemporaryDirectory() as place:
        folder = str(Path(place) / "metanetwork")
        api.study(
            resnet20,
            Fitting(data, Recipe(steps=1, batch=64), evaluate=lambda model: {"accuracy": accuracy(model, data).value}),
            "metapruning",
            0.1,
            seed=seed,
            extras={"models": [resnet20(), resnet32()]},
            progress=progress,
            metanetwork=folder,
            held_out=0.5,
            epochs=EPOCHS,
            milestones=(),
            reg=1.0,
            batch=250,
            one_batch=True,
            parts=1,
            **SIZE,
        )
        return dict(Metanetwork.load(folder).state_dict())


def metanetworks(place: Path, state: Mapping[str, Tensor], seed: int) -> None:
    """One folder each: trained, adding nothing, never trained."""
    shape = Shape(node=8, edges=(9,), **SIZE)
    for name in NAMES:
        with seeded(seed):
            ratio = 0.0 if name == "nothing" else shape.node_ratio
            net = Metanetwork(shape.model_copy(update={"node_ratio": ratio, "edge_ratio": ratio}))
        if name == "learnt":
            net.load_state_dict(state)
        net.save(str(place / name), {})


def run(seed: int, progress: Progress, ledger: Ledger) -> dict[str, Sample]:
    """All claims under one seed."""
    state = ledger.once(f"metanetwork-seed{seed}", lambda: learnt(TRAINED, seed, progress))
    bench = Bench(TRAINED.asked(seed), Ledger(None, {}), progress)
    samples = {}
    with tempfile.TemporaryDirectory() as place:
        metanetworks(Path(place), state, seed)

        for kind, amount in FLOPS:

            def value(name: str, share: float = float(amount)) -> float:
                given = {"metanetwork": str(Path(place) / name)}
                rows = Rows(methods=("metapruning",), settings=given, train=HALF, recover=HALF)
                key = f"{name}-{share}-seed{seed}"
                found = ledger.once(key, lambda: bench.result(rows, "metapruning", "flops", share, seed))
                return float(found[Figure.TRAINED])

            found = [value(name) for name in NAMES]
            samples[f"{kind}-{amount}"] = Sample(*(100 * (one - max(found[1:])) for one in found))
    return samples


full = FullCheck(CLAIMS, run, CONDITIONS)
