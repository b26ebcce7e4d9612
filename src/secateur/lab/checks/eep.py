"""EEP's small-scale check: a tiny classifier with experts on permuted digits, of which two kinds matter.

Digits under eight fixed permutations of their pixels ("domains"), the domain appended; a linear layer, four residual
layers of eight experts, top-2, and a linear layer. The task is domains 0 and 1: half of the experts of each layer
stay, each layer its own group. The search sees 100 images under both permutations, the claims are on about 700 others
that neither training nor search saw. Mixing is judged on both splits: with 200 samples to search on it overfits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.method import Batch
from secateur.core.progress import Progress
from secateur.core.seeding import generator, seeded
from secateur.core.select import keep_top
from secateur.data.running import evaluating
from secateur.lab.checks._digits import digits
from secateur.lab.reproduce import Check, Expectation, Sample
from secateur.methods.experts.eep import EEPSettings, Outcome, eep_search
from secateur.scores.routing import Usage, watching
from secateur.search.merging import Mixture
from secateur.shrink.experts import mix_
from secateur.structure.analysis import analyse
from secateur.structure.experts import ExpertLayer, find_experts

DOMAINS, EXPERTS, KEPT, WIDTH, HIDDEN, LAYERS, CHOSEN = 8, 8, 4, 32, 24, 4, 2
TRAIN, SEARCH, STEPS, BATCH = 1100, 100, 1500, 256
EVALUATIONS = EEPSettings(initial=30, discrete=180, total=380)
CLAIMS = {
    "pruned": Expectation("accuracy without mixing minus the mean of 30 random choices, points", ">= 10"),
    "best random": Expectation("accuracy without mixing minus that of the best random choice on it, points", ">= 0"),
    "frequency": Expectation("accuracy without mixing minus that of the most used experts, points", ">= -0.5"),
    "mixed, searched": Expectation("accuracy gained by mixing on the samples of the search, points", ">= 1"),
    "mixed, reported": Expectation("accuracy gained by mixing on other samples, points", ">= -2"),
}


class Expert(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, width]`."""
        out: Tensor = self.down(self.up(x).relu())
        return out


class Layer(nn.Module):
    """x + the two best of eight experts on the normalised x."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.experts = nn.ModuleList(Expert() for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        """`[rows, width]`."""
        normal = F.layer_norm(x, (WIDTH,))
        shares, places = self.gate(normal).softmax(-1).topk(CHOSEN, -1)
        shares = shares / shares.sum(-1, keepdim=True)
        if self.training:
            return x + self._all(normal, torch.zeros(len(x), EXPERTS).scatter(1, places, shares))
        out = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            rows, slot = torch.where(places == index)
            if len(rows):
                out = out.index_add(0, rows, expert(normal[rows]) * shares[rows, slot, None])
        return x + out

    def _all(self, x: Tensor, shares: Tensor) -> Tensor:
        """Every expert on every row, which is faster for small ones."""
        wide, wide_bias, narrow, narrow_bias = (
            torch.stack([expert.get_parameter(f"{layer}.{name}") for expert in self.experts])
            for layer in ("up", "down")
            for name in ("weight", "bias")
        )
        hidden = torch.baddbmm(wide_bias[:, None], x.expand(EXPERTS, *x.shape), wide.mT).relu() * shares.T[..., None]
        return torch.bmm(hidden, narrow.mT).sum(0) + shares @ narrow_bias


def classifier() -> nn.Sequential:
    """Permuted pixels and domain in, ten logits out."""
    return nn.Sequential(nn.Linear(64 + DOMAINS, WIDTH), *(Layer() for _ in range(LAYERS)), nn.Linear(WIDTH, 10))


@dataclass(frozen=True)
class Part:
    """Samples `[n, 72]` and their digits."""

    inputs: Tensor
    labels: Tensor

    def accuracy(self, model: nn.Module) -> float:
        """In percent."""
        return 100 * float((model(self.inputs).argmax(1) == self.labels).double().mean())


def parts(seed: int) -> tuple[Part, Part, Part]:
    """Training on all domains; search and report on domains 0 and 1, each on images of its own."""
    everything = (digits().calibration, digits().evaluation)
    images = torch.cat([one.inputs.flatten(1) for one in everything])
    labels = torch.cat([one.targets for one in everything if one.targets is not None])
    order = torch.randperm(len(images), generator=generator(seed, "images"))
    rng = generator(0, "permutations")
    permutations = [torch.randperm(64, generator=rng) for _ in range(DOMAINS)]

    def part(index: Tensor, domains: int) -> Part:
        own = F.one_hot(torch.arange(domains), DOMAINS).float()
        rows = [
            torch.cat([images[index][:, permutations[d]], own[d].expand(len(index), -1)], 1) for d in range(domains)
        ]
        return Part(torch.cat(rows), labels[index].repeat(domains))

    searched = TRAIN + SEARCH
    return part(order[:TRAIN], DOMAINS), part(order[TRAIN:searched], 2), part(order[searched:], 2)


def trained(seed: int, data: Part) -> nn.Module:
    """1500 steps of AdamW."""
    with seeded(seed):
        model = classifier()
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rng = generator(seed, "order")
    for _ in range(STEPS):
        index = torch.randint(len(data.inputs), (BATCH,), generator=rng)
        optimiser.zero_grad()
        F.cross_entropy(model(data.inputs[index]), data.labels[index]).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    return model.eval().requires_grad_(False)


def run(seed: int, progress: Progress) -> Mapping[str, Sample]:
    """All claims under one seed. Baseline: the most used experts; random: the mean of the 30 random choices."""
    training, search, report = parts(seed)
    model = trained(seed, training)
    example = Batch((search.inputs[:8],))
    layers = find_experts(model, analyse(model, example), example).layers
    outcome = eep_search(
        model,
        search.accuracy,
        report.accuracy,
        layers,
        [KEPT] * LAYERS,
        example=example,
        seed=seed,
        progress=progress,
        settings=EVALUATIONS,
    )
    starts = list(outcome.archive)[: EVALUATIONS.initial]
    random = [under(model, layers, outcome, one, report) for one in starts]
    used = under(model, layers, outcome, most_used(model, layers, search), report)
    mean, (pruned, mixed) = sum(random) / len(random), outcome.report
    gained = outcome.best.fitness - outcome.pruned.fitness
    return {
        "pruned": Sample(pruned - mean, used - mean, 0.0),
        "best random": Sample(pruned - max(random), used - max(random), mean - max(random)),
        "frequency": Sample(pruned - used, 0.0, mean - used),
        "mixed, searched": Sample(gained, 0.0, 0.0),
        "mixed, reported": Sample(mixed - pruned, used - pruned, mean - pruned),
    }


def under(model: nn.Module, layers: list[ExpertLayer], outcome: Outcome, choice: Mixture, data: Part) -> float:
    """Accuracy with a candidate's experts."""
    with evaluating(model):
        undo = mix_(model, layers, outcome.coefficients(choice))
        try:
            return data.accuracy(model)
        finally:
            undo()


def most_used(model: nn.Module, layers: list[ExpertLayer], data: Part) -> Mixture:
    """The experts that most tokens take, in every layer."""
    usage = {layer.gate: Usage(layer.count, layer.chosen) for layer in layers}
    with evaluating(model), watching(model, usage):
        model(data.inputs)
    rows = [tuple(keep_top(one.frequency, KEPT).nonzero().flatten().tolist()) for one in usage.values()]
    return tuple((one, one) for one in rows)


check = Check(CLAIMS, run)
