"""Iterative soft shrinkage's small-scale check: a small super-resolution network with 90 % of every layer removed.

Trained at factor 2 on the left 70 % of two photographs, measured on the right 30 %: PSNR of luma without a border of
2 pixels. All start from the same random weights and take the same steps, half of them at a held rate: shrinking softly,
thresholding hard (alpha 0, the baseline), a random mask from scratch, dense training, and one-shot magnitude after a
dense first half. Bicubic interpolation is shown beside; a network this small and short is not meant to beat it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial

from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from secateur import api
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import seeded
from secateur.data.batches import forward
from secateur.data.dataset import Splits
from secateur.lab.checks._training import sparse_trained
from secateur.lab.reproduce import Check, Expectation, FullCheck, Sample
from secateur.measure.psnr import psnr
from secateur.shrink.apply import apply_
from secateur.train.keep import weight_masks
from secateur.train.loop import Decay, Fitting, OptimizerName, Recipe
from secateur.train.study import Ledger
from secateur.zoo.photos import photos, resized
from secateur.zoo.super_resolution import small_edsr, small_swinir

SCALE, SPARSITY, STAGE = 2, 0.9, 600  # steps of each of the two halves

CLAIMS = {
    "hard": Expectation("dB of soft shrinkage above hard thresholding, EDSR-like x2, 90 %", ">= 1", "both"),
    "random": Expectation(
        "dB above a random mask trained from scratch (baseline shown: one-shot magnitude of a half-trained dense net)",
        ">= 2",
        "random",
    ),
    "dense": Expectation(
        "dB of dense training above the best sparse network (baseline shown: bicubic interpolation)", "> 0", "random"
    ),
}


class HeldRecipe(Recipe):
    """The rate stays at its first value for `hold` steps; the schedule runs over the rest."""

    hold: int = Field(0, ge=0, description="steps before the schedule starts")

    def rate(self, step: int) -> float:
        """Learning rate of the step after `step` steps are done."""
        rest = Recipe(**{**self.model_dump(exclude={"hold"}), "steps": max(1, self.steps - self.hold)})
        return rest.rate(max(0, step - self.hold))


class SuperResolving(Fitting):
    """Trains by the mean absolute error of pixels."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """L1."""
        assert batch.target is not None
        return F.l1_loss(forward(model, batch), batch.target)


@cache
def pictures() -> Splits:
    """Patches to train on, halves of photographs to measure on."""
    return photos(SCALE)


def quality(large: Tensor) -> float:
    """Mean PSNR in dB of the enlarged evaluation images."""
    targets = pictures().evaluation.targets
    assert targets is not None
    return float(psnr(large, targets, SCALE).mean())


def fitting(seed: int, steps: int, hold: int, progress: Progress) -> SuperResolving:
    """Adam at 2e-3, halved at 50, 80, 90 and 95 % of what follows the held steps."""
    recipe = HeldRecipe(
        steps=steps,
        hold=hold,
        batch=4,
        optimizer=OptimizerName.ADAM,
        lr=2e-3,
        betas=(0.9, 0.99),
        decay=Decay.STEPS,
        milestones=(0.5, 0.8, 0.9, 0.95),
        factor=0.5,
    )
    return SuperResolving(
        pictures().calibration,
        recipe,
        lambda model: {"psnr": quality(model(pictures().evaluation.inputs))},
        seed=seed,
        progress=progress,
    )


def figures(make: Callable[[], nn.Module], seed: int, stage: int, progress: Progress) -> dict[str, float]:
    """PSNR in dB of every way to train, by name."""

    def fresh() -> nn.Module:
        with seeded(seed):
            return make()

    def shrunk(alpha: float) -> float:
        model, fit = fresh(), fitting(seed, 2 * stage, stage, progress)
        sparse_trained(model, fit, "iss", SPARSITY, progress, alpha=alpha, stage=0.5)
        return fit.figures(model)["psnr"]

    def masked(model: nn.Module, plan: Plan, steps: int, hold: int) -> float:
        return fitting(seed, steps, hold, progress)(apply_(model, plan), weight_masks(plan))["psnr"]

    chance, half = fresh(), fresh()
    fitting(seed, stage, stage, progress)(half)
    return {
        "dense": fitting(seed, 2 * stage, stage, progress)(fresh())["psnr"],
        "soft": shrunk(0.95),
        "hard": shrunk(0.0),
        "random": masked(chance, api.plan(chance, "random", SPARSITY, seed=seed), 2 * stage, stage),
        "one-shot": masked(half, api.plan(half, "global_magnitude", SPARSITY, spread="uniform"), stage, 0),
        "bicubic": quality(resized(pictures().evaluation.inputs, SCALE)),
    }


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    found = figures(small_edsr, seed, STAGE, progress)
    best = max(found[name] for name in ("soft", "hard", "one-shot"))
    return {
        "hard": Sample(found["soft"] - found["hard"], 0.0, found["random"] - found["hard"]),
        "random": Sample(found["soft"] - found["random"], found["one-shot"] - found["random"], 0.0),
        "dense": Sample(found["dense"] - max(best, found["random"]), found["bicubic"] - best, found["random"] - best),
    }


# --- both kinds of network, longer ----------------------------------------------------------------------

LONG = 1000  # steps of each half
NETWORKS: Mapping[str, Callable[[], nn.Module]] = {"EDSR-like": small_edsr, "Swin-like": small_swinir}
CONDITIONS = (
    f"Two small super-resolution networks, factor {SCALE}, 90 % of every layer's weights removed; trained on the left "
    f"70 % of two photographs, PSNR of luma on the right 30 %. Two halves of {LONG:,} steps each. The random control "
    "is a random mask from scratch."
)
FULL_CLAIMS = {
    f"{claim} {name}": Expectation(f"{quantity}, {name}", threshold, control)
    for name in NETWORKS
    for claim, quantity, threshold, control in (
        ("hard", "dB of soft shrinkage above hard thresholding", ">= 1", "both"),
        ("one_shot", "dB of soft shrinkage above one-shot magnitude", "> 0", "both"),
        ("bicubic", "dB of soft shrinkage above bicubic interpolation", "> 0", "random"),
    )
}


def full(seed: int, progress: Progress, ledger: Ledger) -> Mapping[str, Sample]:
    """Every claim for both; the transformer takes most of the time."""
    samples = {}
    for name, make in NETWORKS.items():
        found = ledger.once(f"{name}-seed{seed}", partial(figures, make, seed, LONG, progress))
        for claim, rival in (("hard", "hard"), ("one_shot", "one-shot"), ("bicubic", "bicubic")):
            samples[f"{claim} {name}"] = Sample(found["soft"] - found[rival], 0.0, found["random"] - found[rival])
    return samples


check = Check(CLAIMS, run, FullCheck(FULL_CLAIMS, full, CONDITIONS))
