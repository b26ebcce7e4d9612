"""Residual networks on CIFAR-10: every structured method beside the norm of channels and random ones.

A trained ResNet-56 at 2, 2.5 and 3 times fewer FLOPs under one short training; ResNet-20 for methods that train from
the start, beside what is cut before the same training.
"""

from __future__ import annotations

from secateur.core.progress import Progress
from secateur.lab.checks._beside import Amount, Figure, Ground, Rival, Runs, beside
from secateur.lab.reproduce import Expectation, FullCheck, Sample
from secateur.train.study import Ledger

TRAINED = Ground(
    "resnet56-cifar10",
    "Pretrained ResNet-56 (83.2 % of all re-compressed CIFAR-10 test images), accuracy on 3,000 of these after 64 "
    "batches of 64 of 3,000 training images: SGD 0.02, Nesterov momentum 0.9, cosine, drawn by the seed. Methods that "
    "act in training have the first 32 batches of them before their cut.",
    Figure.TRAINED,
    lower=False,
)
INITIAL = Ground(
    "resnet20-cifar10",
    "ResNet-20 from one draw of initial weights, trained with 256 batches of 64 of 8,000 images of CIFAR-10: SGD 0.1, "
    "Nesterov momentum 0.9, weight decay 5e-4, cosine, drawn by the seed; accuracy on 8,000 test images.",
    Figure.TRAINED,
    lower=False,
)
FLOPS: tuple[Amount, ...] = (("flops", 0.5), ("flops", 0.4), ("flops", 0.333))
DENSE, NOTHING = Rival("random", "keeps all"), ("sparsity", 0.0)
NORM, UNITS = Rival("channel_norm"), Rival("group_random")


def of_trained(method: str) -> FullCheck:
    """A method on the trained network beside the L2 norm of channels and random channels."""
    return beside(TRAINED, Rival(method), NORM, UNITS, FLOPS)


def from_scratch(method: str, amount: Amount, near: float, baseline: Rival, control: Rival | None = None) -> FullCheck:
    """A method from the start: as good as the dense network but for `near` points, better than baseline and control.

    Args:
        method: its name.
        amount: its budget.
        near: points that it may lose.
        baseline: what must be worse.
        control: one of random choices; without one the baseline is all there is.
    """
    rivals, at = [baseline, *([control] if control else [])], f"at {amount[0]} {amount[1]}"
    names = " and ".join(rival.shown for rival in rivals)
    claims = {
        "dense": Expectation(f"accuracy points above the dense network, {at}", f">= {-near:g}"),
        "rivals": Expectation(f"accuracy points above the best of {names}, {at}", "> 0", "both"),
    }

    def run(seed: int, progress: Progress, ledger: Ledger) -> dict[str, Sample]:
        runs = Runs.of(INITIAL, seed, progress, ledger)
        own, full = runs.value(Rival(method), amount), runs.value(DENSE, NOTHING)
        others = [runs.value(rival, amount) for rival in rivals]
        found = [own, others[0], others[-1]]
        return {
            "dense": Sample(*(100 * (value - full) for value in found)),
            "rivals": Sample(*(100 * (value - max(others)) for value in found)),
        }

    return FullCheck(claims, run, INITIAL.conditions)
