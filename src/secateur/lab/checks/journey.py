"""The journey's small-scale check: a sparse run ends like a dense one of its average size, on the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from torch import nn

from secateur import api
from secateur.core.progress import Progress
from secateur.core.seeding import seeded
from secateur.lab.checks._characters import CharacterModel, Widths, fitting
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.measure.scaling_law import ScalingLaw, TrainingRun, fit_scaling_law
from secateur.train.compute import ComputePlan, dense_steps, mean_density, plan_compute
from secateur.train.schedules import Ramp, Shape, Window

COMPUTE, SPARSITY, EVERY = 500, 0.6, 20  # dense steps; fraction removed in the end; steps between events
DENSE = {"average": Widths(heads=2, mlp=160), "final": Widths(heads=2, mlp=76), "full": Widths()}
# compute, sparsity -> first event, last event, steps: configurations published with the official code
RELEASED = {
    (10_000, 0.2): (2500, 8100, 11_200),
    (10_000, 0.4): (2500, 8875, 13_050),
    (10_000, 0.6): (2500, 10_100, 16_375),
    (50_000, 0.5): (12_500, 47_200, 72_200),
    (16_365, 0.6): (4100, 16_600, 26_800),
}
LAW = {"E": 1.69, "A": 406.4, "alpha": 0.34, "B": 410.7, "beta": 0.28}  # Hoffmann et al. 2022

CLAIMS = {
    "law": Expectation(
        "percent by which its loss differs from that of a dense model of its average size on the same tokens "
        "(baseline: from a dense model of its initial size)",
        "<= 3",
        "both",
    ),
    "final": Expectation("nats per character below a dense model of its final size", ">= 0.03", "both"),
    "removed": Expectation("nats per character above the dense network: masks are enforced", ">= 0.03", "baseline"),
    "magnitude": Expectation("nats per character below the same schedule with a random score", ">= 0.05", "both"),
    "density": Expectation(
        "weights by which the count after an event misses (1 - s)^((j+1)/K), at most (baseline: a cubic curve)",
        "<= 1",
        "baseline",
    ),
    "average": Expectation(
        "percent by which the average count misses the closed form (baseline: a cubic curve in the same window)",
        "<= 1",
        "baseline",
    ),
    "shares": Expectation(
        "intervals by which the compute before, between and after the events misses 25, 50 and 25 % "
        "(baseline: events from 25 to 75 % of the steps)",
        "<= 1",
        "baseline",
    ),
    "planner": Expectation(
        "percent by which plans miss five released ones, at most (baseline: planned with the cubic mean)",
        "<= 1.5",
        "baseline",
    ),
    "prediction": Expectation(
        "percent by which the fitted law misses the true loss, at most, for 60 runs with 0.2 % noise of which half are "
        "sparse (baseline: fitted over final counts)",
        "<= 0.5",
        "baseline",
    ),
    "exponents": Expectation("error of the fitted alpha and beta, the larger", "<= 0.03", "baseline"),
}


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed."""
    return trained(seed, progress) | counted(seed) | planned() | fitted(seed)


def trained(seed: int, progress: Progress) -> dict[str, Sample]:
    """What needs training: the sparse run, its random control, three dense models, all on the same tokens."""
    plan = plan_compute(COMPUTE, SPARSITY, every=EVERY)
    study = partial(
        api.study,
        maker(Widths()),
        fitting(plan.steps, seed, progress),
        "journey",
        SPARSITY,
        seed=seed,
        metric="loss",
        every=EVERY,
        against=(),
    )
    dense = {name: maker(size) for name, size in DENSE.items()}
    loss = {row["run"]: row["loss"] for row in study(extras={"dense": dense}).rows}
    sparse, random = loss["geometric"], study(score="random").rows[0]["loss"]

    def apart(value: float) -> float:
        return 100 * abs(value / float(loss["average"]) - 1)

    return {
        "law": Sample(apart(sparse), apart(loss["full"]), apart(random)),
        "final": Sample(loss["final"] - sparse, 0.0, loss["final"] - random),
        "removed": Sample(sparse - loss["full"], 0.0, random - loss["full"]),
        "magnitude": Sample(random - sparse, 0.0, 0.0),
    }


def control_free(value: float, baseline: float) -> Sample:
    """A sample of what nothing random has a part in: the baseline is the only control."""
    return Sample(value, baseline, baseline)


def maker(size: Widths) -> Callable[[], nn.Module]:
    """What makes a character model of a size."""
    return lambda: CharacterModel(size)


def counted(seed: int) -> dict[str, Sample]:
    """Counts in the sparsifier's log, with weights that stand still: they do not depend on what is learned."""
    plan = plan_compute(COMPUTE, SPARSITY, every=EVERY)
    cubic = Ramp(plan.ramp.window, 1.0, 1 - SPARSITY, Shape.CUBIC, from_first=True)
    kept, units = traced(plan, seed)
    events = plan.ramp.window.events
    wanted = [(1 - SPARSITY) ** ((j + 1) / len(events)) * units for j in range(len(events))]
    misses = [abs(kept[step] - count) for step, count in zip(events, wanted, strict=True)]
    other = [abs(cubic.density(step) * units - count) for step, count in zip(events, wanted, strict=True)]
    closed = COMPUTE / plan_compute(COMPUTE, SPARSITY, every=1).steps * units
    average = sum(kept[: plan.steps]) / plan.steps
    return {
        "density": control_free(max(misses), max(other)),
        "average": control_free(
            100 * abs(average / closed - 1),
            100 * abs(dense_steps(cubic, plan.steps) / plan.steps * units / closed - 1),
        ),
    }


def traced(plan: ComputePlan, seed: int) -> tuple[list[int], int]:
    """Weights kept after 0, 1, ... steps of a training without gradients, and how many there are."""
    with seeded(seed):
        model = CharacterModel(Widths())
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with api.sparsify(model, optimizer, "journey", SPARSITY, steps=plan.steps, seed=seed, every=EVERY) as sparsifier:
        kept = [sparsifier.units]
        for _ in range(plan.steps):
            optimizer.step()
            kept.append(sum(sparsifier.masks.kept.values()))
    return kept, sparsifier.units


def planned() -> dict[str, Sample]:
    """The planner against released plans, and the shares of a plan's compute."""
    plan = plan_compute(COMPUTE, SPARSITY, every=EVERY)
    by_steps = ComputePlan(
        Ramp(Window.share(0.25, 0.75, plan.steps, EVERY), 1.0, 1 - SPARSITY, Shape.GEOMETRIC, from_first=True),
        plan.steps,
        COMPUTE,
    )
    return {
        "shares": control_free(share_miss(plan), share_miss(by_steps)),
        "planner": control_free(released_miss(Shape.GEOMETRIC), released_miss(Shape.CUBIC)),
    }


def share_miss(plan: ComputePlan) -> float:
    """Largest distance of the three shares from 25, 50, 25 %, in dense steps per interval."""
    return max(abs(part - goal) for part, goal in zip(plan.shares, (0.25, 0.5, 0.25), strict=True)) * COMPUTE / EVERY


def released_miss(shape: Shape) -> float:
    """Largest relative distance from a released plan, in percent."""
    misses = []
    for (compute, sparsity), released in RELEASED.items():
        plan = plan_compute(compute, sparsity, shape=shape)
        found = (plan.start, plan.stop, plan.steps)
        misses += [abs(mine / theirs - 1) for mine, theirs in zip(found, released, strict=True)]
    return 100 * max(misses)


def fitted(seed: int) -> dict[str, Sample]:
    """The law's coefficients from made-up runs, every second one sparse: over average and over final counts."""
    rng = np.random.default_rng(seed)
    average = 10 ** rng.uniform(7.5, 10, 60)
    tokens = average * 10 ** rng.uniform(0.7, 2.3, 60)
    losses = LAW["E"] + LAW["A"] / average ** LAW["alpha"] + LAW["B"] / tokens ** LAW["beta"]
    seen = losses * np.exp(0.002 * rng.standard_normal(60))
    shrunk = np.where(np.arange(60) % 2, (1 - SPARSITY) / mean_density(1 - SPARSITY), 1.0)
    laws = [
        fit_scaling_law([TrainingRun(*map(float, row)) for row in zip(counts, tokens, seen, strict=True)])
        for counts in (average, average * shrunk)
    ]

    def miss(law: ScalingLaw, counts: Mapping[int, float]) -> float:
        found = [law.predict(counts[place], float(tokens[place])) for place in range(60)]
        return 100 * float(np.abs(np.array(found) / losses - 1).max())

    by_average, by_final = dict(enumerate(average.tolist())), dict(enumerate((average * shrunk).tolist()))
    exponents = [max(abs(law.alpha - LAW["alpha"]), abs(law.beta - LAW["beta"])) for law in laws]
    return {
        "prediction": control_free(miss(laws[0], by_average), miss(laws[1], by_final)),
        "exponents": control_free(exponents[0], exponents[1]),
    }


check = Check(CLAIMS, run)
