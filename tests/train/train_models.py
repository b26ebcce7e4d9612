"""Small networks and loops for the tests of the training engine."""

import torch
from torch import nn
from torch.nn import functional as F

from secateur.core.budget import Budget, Quantity
from secateur.train.parts import Growth, PruneTo, Regrow, StartSparse
from secateur.train.schedules import CosineRate, Ramp, Window
from secateur.train.sparsifier import Order, Sparsifier

STEPS = 24


class Net(nn.Module):
    """A convolution, a norm, a linear layer used twice, dropout."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.twice = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x))).mean((2, 3))
        return self.head(self.drop(self.twice(F.relu(self.twice(x)))))


def net(seed=0):
    torch.manual_seed(seed)
    return Net()


def batch(step, size=8):
    rng = torch.Generator().manual_seed(1000 + step)
    return torch.randn(size, 1, 5, 5, generator=rng), torch.randint(4, (size,), generator=rng)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2),
    "nesterov-foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True, weight_decay=1e-2, foreach=True),
    "sgd-fused": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, fused=True),
    "adam": lambda p: torch.optim.Adam(p, 1e-2, weight_decay=1e-2),
    "adam-foreach": lambda p: torch.optim.Adam(p, 1e-2, amsgrad=True, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, 1e-2, weight_decay=0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.9, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, 1.0),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
}


def parts(density=0.2, steps=STEPS, start=1.0, growth=Growth.GRADIENT):
    """Gradual pruning and regrowing, from dense or from sparse."""
    window = Window(0, steps // 2, 4)
    found = [] if start == 1.0 else [StartSparse(start)]
    return [
        *found,
        PruneTo(Ramp(window, start, density)),
        Regrow(CosineRate(0.5, 0.01, steps), Window(0, steps, 4), growth),
    ]


def order(density=0.2, steps=STEPS, **more):
    return Order("granet", Budget(density, Quantity.DENSITY), steps, **more)


def attach(model, optimizer, density=0.2, steps=STEPS, start=1.0, growth=Growth.GRADIENT, **more):
    return Sparsifier(model, optimizer, parts(density, steps, start, growth), order(density, steps, **more))


def one_step(model, optimizer, step):
    """What a user's loop does."""
    x, y = batch(step)
    torch.manual_seed(step)  # dropout
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


def train(model, optimizer, start=0, stop=STEPS, each=None):
    model.train()
    for step in range(start, stop):
        one_step(model, optimizer, step)
        if each:
            each(step + 1)


def leaks(sparsifier):
    """Entries that should be zero and are not, in weights and optimiser states."""
    count = 0
    for name, parameter in sparsifier.masks.parameters.items():
        removed = ~sparsifier.masks.get(name)
        for tensor in (parameter.detach(), *sparsifier.masks.states(parameter)):
            count += int((tensor[removed] != 0).sum())
    return count
