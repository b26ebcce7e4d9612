"""What the tests of penalties that end with a cut share: a small residual CNN, a training by step number, a resume."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import secateur as sc
from secateur.core.plan import Plan
from secateur.train.sparsifier import Sparsifier

SHAPE = (1, 8, 8)


class Net(nn.Module):
    """stem - residual block - strided convolution without a norm - linear: a stream, an inner and a normless site."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv1, self.norm1 = nn.Conv2d(8, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        self.conv2, self.norm2 = nn.Conv2d(12, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.bare, self.head = nn.Conv2d(8, 6, 3, stride=2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm0(self.stem(x)).relu()
        x = (x + self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))).relu()
        return self.head(self.bare(x).relu().mean((2, 3)))


STREAM, INNER, BARE = "stem:channel", "conv1:channel", "bare:channel"


def net(seed: int = 0) -> Net:
    """With scales and shifts that differ."""
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for norm in (model.norm0, model.norm1, model.norm2):
            norm.weight.uniform_(-1, 1)
            norm.bias.uniform_(-0.5, 0.5)
    return model


def sgd(model: nn.Module, lr: float = 0.05, momentum: float = 0.9, decay: float = 1e-3) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr, momentum=momentum, weight_decay=decay)


def batch(step: int, size: int = 16) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(700 + step)
    return torch.randn(size, *SHAPE, generator=rng), torch.randint(3, (size,), generator=rng)


def advance(model: nn.Module, optimizer: torch.optim.Optimizer, start: int, stop: int) -> None:
    """The user's loop: it knows of no sparsifier."""
    model.train()
    for step in range(start, stop):
        x, y = batch(step)
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()


def attached(method: str, sparsity: float | None = 0.5, *, steps: int = 6, model: nn.Module | None = None, **more):
    """(model, optimizer, sparsifier)."""
    model = net() if model is None else model
    optimizer = more.pop("optimizer", None) or sgd(model)
    return model, optimizer, sc.sparsify(model, optimizer, method, sparsity, steps=steps, **more)


def finished(
    method: str, sparsity: float | None = 0.5, *, steps: int = 6, **more
) -> tuple[Plan, nn.Module, Sparsifier]:
    """Trained to the end."""
    model, optimizer, run = attached(method, sparsity, steps=steps, **more)
    advance(model, optimizer, 0, steps)
    return run.finish(), model.eval(), run


def resumed(method: str, at: int, *, steps: int = 6, **more) -> tuple[Plan, nn.Module]:
    """Stopped after `at` steps and gone on with in a new process, as it were."""
    model, optimizer, run = attached(method, steps=steps, **more)
    advance(model, optimizer, 0, at)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
    other = net(seed=9)
    own = sgd(other)
    other.load_state_dict(saved[0])
    own.load_state_dict(saved[1])
    again = sc.sparsify(other, own, method, 0.5, steps=steps, state=saved[2], **more)
    advance(other, own, at, steps)
    return again.finish(), other.eval()


def same_bytes(first: nn.Module, second: nn.Module) -> bool:
    """Whether two models have equal state, bit by bit."""
    one, two = first.state_dict(), second.state_dict()
    return one.keys() == two.keys() and all(torch.equal(value, two[name]) for name, value in one.items())
