"""Sparse training: what masks cost per step, what an event costs, what a ranking over 100 M weights needs.

    python benchmarks/sparse_training.py            # everything, about 3 minutes
    python benchmarks/sparse_training.py step event

step    a training step under masks over the dense step, interleaved, medians (bar 1.03); and memory beside
        torch.nn.utils.prune (bar one half)
event   one prune-and-regrow event; beside it the usual way, two full sorts per layer (bars 5 and 50 ms)
rank    one ranking over 100 M scores: time and extra memory
"""

from __future__ import annotations

import resource
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune

from secateur.core.budget import Budget, Quantity
from secateur.core.select import keep_global
from secateur.lab.checks._cifar import ResNet20
from secateur.train.parts import PruneTo, Regrow, StartSparse
from secateur.train.schedules import CosineRate, Ramp, Window
from secateur.train.sparsifier import Order, Sparsifier

THREADS = 2


class Transformer(nn.Module):
    """About 10 M parameters: width 320, 8 layers, 256 tokens of a vocabulary of 512."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(512, 320)
        layer = nn.TransformerEncoderLayer(320, 5, 1280, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, 8, enable_nested_tensor=False)
        self.head = nn.Linear(320, 512)

    def forward(self, tokens: Tensor) -> Tensor:
        """[n, length] -> logits [n * length, 512]."""
        return self.head(self.layers(self.embed(tokens))).flatten(0, 1)


def batch_of(model: nn.Module) -> tuple[Tensor, Tensor]:
    """Inputs and labels."""
    if isinstance(model, Transformer):
        tokens = torch.randint(512, (16, 128))
        return tokens, tokens.flatten()
    return torch.randn(128, 3, 32, 32), torch.randint(10, (128,))


def stepper(make: Callable[[], nn.Module], sparse: bool) -> tuple[Callable[[], None], nn.Module]:
    """One training step as a call."""
    torch.manual_seed(0)
    model = make()
    optimizer: torch.optim.Optimizer
    if isinstance(model, Transformer):
        optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    else:
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
    if sparse:
        budget = Budget(0.1, Quantity.DENSITY)
        Sparsifier(model, optimizer, [StartSparse(0.1)], Order("static", budget, 10**6))
    x, y = batch_of(model)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step, model


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def step_cost(name: str, make: Callable[[], nn.Module], rounds: int) -> None:
    dense, _ = stepper(make, sparse=False)
    masked, model = stepper(make, sparse=True)
    for call in (dense, masked):
        call()
    pairs = []
    for turn in range(rounds):  # each pair back to back, the order alternating: the machine is noisy
        if turn % 2:
            under = seconds(masked)
            pairs.append((seconds(dense), under))
        else:
            plain = seconds(dense)
            pairs.append((plain, seconds(masked)))
    ratio = statistics.median(under / plain for plain, under in pairs)
    plain = statistics.median(plain for plain, _ in pairs)
    print(f"step   {name:<22} dense {plain * 1e3:8.1f} ms   under masks / dense {ratio:.3f}   (bar 1.03)")
    weights = sum(p.numel() for n, p in model.named_parameters() if p.dim() > 1)
    print(f"memory {name:<22} {weights / 1e6:.2f} M weights: masks {weights / 2**20:.1f} MiB, ", end="")
    print(f"torch.nn.utils.prune {pruned_bytes() * weights / 2**20:.1f} MiB (mask and product)")


def pruned_bytes() -> float:
    """Bytes per weight that torch.nn.utils.prune holds beside the weight itself."""
    layer = nn.Linear(100, 100)
    prune.l1_unstructured(layer, "weight", 0.5)
    held = layer.weight_mask.untyped_storage().nbytes() + layer.weight.untyped_storage().nbytes()
    return held / 10_000


def event_cost(width: int, bar: int) -> None:
    """One event on weights with gradients, at 10 % density of 20 %."""
    model = ResNet20(width)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    window = Window(1, 10**5)
    parts = [
        StartSparse(0.2),
        PruneTo(Ramp(window, 0.2, 0.05)),
        Regrow(CosineRate(0.5, 0.005, 10**6), window),
    ]
    sparsifier = Sparsifier(model, optimizer, parts, Order("granet", Budget(0.05, Quantity.DENSITY), 10**6))
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()

    def event() -> None:
        sparsifier.step += 2000  # so that every event has something to prune
        for part in sparsifier.parts:
            part.after_step(sparsifier)

    weights = {name: p.detach().clone() for name, p in sparsifier.masks.parameters.items()}
    gradients = {name: p.grad for name, p in sparsifier.masks.parameters.items()}
    ours = [seconds(event) for _ in range(9)]
    usual = [seconds(lambda: sorted_event(weights, gradients, sparsifier)) for _ in range(5)]
    mine, theirs = statistics.median(ours) * 1e3, statistics.median(usual) * 1e3
    print(
        f"event  width {width:<3} {sparsifier.units / 1e6:5.2f} M weights: {mine:7.1f} ms (bar {bar}), with full sorts "
        f"{theirs:7.1f} ms, ratio {mine / theirs:.2f}"
    )


def sorted_event(weights: dict[str, Tensor], gradients: dict[str, Tensor], sparsifier: Sparsifier) -> None:
    """What is usually done: everything in one list and sorted, then two full sorts in every layer."""
    everything = torch.cat([weight.abs().flatten() for weight in weights.values()])
    torch.topk(everything, everything.numel() // 10)
    for name, weight in weights.items():
        mask = sparsifier.masks.get(name)
        order = torch.sort(weight.abs().flatten()).values
        kept = weight.abs() > order[int(0.9 * order.numel())]
        places = torch.sort((gradients[name].abs() * ~kept).flatten(), descending=True).indices
        grown = mask.flatten().clone()
        grown[places[: order.numel() // 20]] = True


def rank_cost() -> None:
    """One ranking over 100 M scores in 40 tensors."""
    scores = {str(index): torch.rand(2_500_000) for index in range(40)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    took = seconds(lambda: keep_global(scores, 5_000_000))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10
    print(
        f"rank   100 M scores (381 MiB): {took:.2f} s, {more:.0f} MiB more at the peak, of which 95 MiB are the masks"
    )


def main() -> None:
    torch.set_num_threads(THREADS)
    asked = sys.argv[1:] or ["rank", "step", "event"]
    if "rank" in asked:
        rank_cost()
    if "step" in asked:
        step_cost("ResNet-20, batch 128", ResNet20, 15)
        step_cost("transformer, 10 M", Transformer, 7)
    if "event" in asked:
        event_cost(16, 5)
        event_cost(64, 50)


if __name__ == "__main__":
    main()
