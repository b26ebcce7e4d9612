"""Random small networks, as data: a graph is a list of named blocks with a seed each, and builds the same module again.

A block changes a feature map `[B, C, H, W]` or tokens `[B, T, C]` and is written the way people write it. Everything
random in a block comes from its own seed, so that a block can be left out of a failing graph without changing others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from random import Random
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

IMAGE, CLASSES = 3, 5
MAP, TOKENS, ANY = "map", "tokens", "any"


class Shape(NamedTuple):
    """What flows: maps have `side * side` pixels, tokens are `side * side` long; a fixed side must stay."""

    kind: str
    width: int
    side: int
    fixed: bool = False

    def wide(self, width: int) -> Shape:
        return self._replace(width=width)


class Node(NamedTuple):
    """A block by name, its seed, and the blocks of its branches."""

    block: str
    seed: int
    branches: tuple[tuple[Node, ...], ...] = ()

    def __str__(self) -> str:
        inside = "".join(f"[{' '.join(map(str, branch))}]" for branch in self.branches)
        return f"{self.block}:{self.seed}{inside}"


class Graph(NamedTuple):
    """A whole network: image side, seed of the stem, the weights and the masks, and its blocks."""

    side: int
    seed: int
    nodes: tuple[Node, ...]

    def __str__(self) -> str:
        return f"side {self.side}, seed {self.seed}: {' '.join(map(str, self.nodes)) or 'no blocks'}"


class Block(nn.Module):
    """A piece of a network. `out` is what leaves it; the lists name parameter dimensions that must be free, or not."""

    def __init__(self, out: Shape):
        super().__init__()
        self.out = out
        self.must_free: list[tuple[str, int]] = []
        self.must_freeze: list[tuple[str, int]] = []


Maker = Callable[[Shape, Random, "list[nn.Module]"], Block]


class Kind(NamedTuple):
    """A registered block: what it takes, its least and largest number of branches, and whether it may be refused."""

    make: Maker
    takes: str
    branches: tuple[int, int]
    refused: bool


BLOCKS: dict[str, Kind] = {}


def block(takes: str, branches: tuple[int, int] = (0, 0), refused: bool = False) -> Callable[[type], type]:
    def register(cls: type) -> type:
        BLOCKS[cls.__name__] = Kind(cls, takes, branches, refused)
        return cls

    return register


# --- parts ----------------------------------------------------------------------------------------


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def some_width(rng: Random, multiple: int = 1) -> int:
    return multiple * rng.randint(-(-4 // multiple), 12 // multiple)


def channels(x: Tensor) -> int:
    """The dimension of the channels."""
    return 1 if x.dim() == 4 else -1


def mix(shape: Shape, out: int, rng: Random) -> nn.Module:
    """A layer that multiplies channels: a linear layer on tokens, some convolution on maps."""
    bias = rng.random() < 0.7
    if shape.kind == TOKENS:
        return nn.Linear(shape.width, out, bias)
    kernel, dilation = rng.choice([(1, 1), (3, 1), (3, 2)])
    return nn.Conv2d(shape.width, out, kernel, padding=kernel // 2 * dilation, dilation=dilation, bias=bias)


def activation(rng: Random) -> nn.Module:
    return rng.choice([nn.ReLU, nn.SiLU, nn.GELU, nn.Sigmoid, nn.Softplus, nn.Tanh, nn.Hardswish])()


def pooled(x: Tensor) -> Tensor:
    """One vector per sample."""
    return x.mean((2, 3)) if x.dim() == 4 else x.mean(1)


def spread(vector: Tensor, x: Tensor) -> Tensor:
    """A vector per sample in the form that broadcasts to `x`."""
    return vector[:, :, None, None] if x.dim() == 4 else vector.unsqueeze(1)


class RMSNorm(nn.Module):
    """As Llama writes it."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class LayerNorm2d(nn.Module):
    """Over the channels of every pixel: by hand, by moving them to the end, or by `F.layer_norm`'s attribute."""

    def __init__(self, width: int, way: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(width)), nn.Parameter(torch.zeros(width))
        self.way, self.shape = way, (width,)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            mean = x.mean(1, keepdim=True)
            x = (x - mean) / torch.sqrt((x - mean).pow(2).mean(1, keepdim=True) + 1e-6)
            return self.weight[:, None, None] * x + self.bias[:, None, None]
        x = x.permute(0, 2, 3, 1)
        shape = self.shape if self.way == 1 else (x.shape[-1],)
        return F.layer_norm(x, shape, self.weight, self.bias, 1e-6).permute(0, 3, 1, 2)


def norm(shape: Shape, rng: Random) -> nn.Module:
    width = shape.width
    if shape.kind == TOKENS:
        return rng.choice([nn.LayerNorm, RMSNorm, nn.RMSNorm])(width)
    groups = rng.choice(divisors(width))
    return rng.choice(
        [
            lambda: nn.BatchNorm2d(width, affine=rng.random() < 0.8),
            lambda: nn.GroupNorm(groups, width),
            lambda: nn.InstanceNorm2d(width, affine=rng.random() < 0.8, track_running_stats=rng.random() < 0.5),
            lambda: LayerNorm2d(width, rng.randrange(3)),
        ]
    )()


# --- blocks of one input --------------------------------------------------------------------------


class Single(Block):
    """One layer called on what flows."""

    def __init__(self, out: Shape, layer: nn.Module):
        super().__init__(out)
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


@block(ANY)
class Mix(Single):
    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        out = shape.wide(some_width(rng))
        super().__init__(out, mix(shape, out.width, rng))


@block(ANY)
class Plain(Block):
    """Layer, activation, layer: the width between can always go."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        out, hidden = shape.wide(some_width(rng)), shape.wide(some_width(rng))
        super().__init__(out)
        self.layers = nn.Sequential(mix(shape, hidden.width, rng), activation(rng), mix(hidden, out.width, rng))
        self.must_free = [("layers.0.weight", 0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@block(MAP)
class Grouped(Single):
    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        groups = rng.choice(divisors(shape.width))
        out = groups * rng.randint(-(-4 // groups), max(1, 12 // groups))
        bias, kernel = rng.random() < 0.5, rng.choice([1, 3])
        super().__init__(
            shape.wide(out), nn.Conv2d(shape.width, out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        )


@block(MAP)
class Depthwise(Single):
    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        multiplier = 2 if shape.width <= 6 and rng.random() < 0.4 else 1
        out = shape.wide(shape.width * multiplier)
        conv = nn.Conv2d(shape.width, out.width, 3, padding=1, groups=shape.width, bias=rng.random() < 0.5)
        super().__init__(out, conv)


@block(MAP)
class Transposed(Single):
    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        groups = rng.choice([1, 1, *divisors(shape.width)])
        out = groups * rng.randint(-(-4 // groups), max(1, 12 // groups))
        double = shape.side <= 4 and not shape.fixed and rng.random() < 0.6
        kernel, stride, padding = (2, 2, 0) if double else (3, 1, 1)
        conv = nn.ConvTranspose2d(shape.width, out, kernel, stride, padding, groups=groups, bias=rng.random() < 0.7)
        super().__init__(shape._replace(width=out, side=shape.side * (2 if double else 1)), conv)


@block(ANY)
class Norm(Single):
    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape, norm(shape, rng))


@block(ANY)
class Act(Single):
    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        prelu = shape.kind == MAP and rng.random() < 0.2
        super().__init__(shape, nn.PReLU(shape.width) if prelu else activation(rng))


@block(MAP)
class Resample(Single):
    """Pooling and upsampling of many kinds."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        same = [nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1, count_include_pad=False)]
        up = [nn.Upsample(scale_factor=2, mode="nearest"), nn.Upsample(scale_factor=2, mode="bilinear")]
        half = shape.side // 4 * 2  # sides stay even
        down = [nn.MaxPool2d(2), nn.AvgPool2d(2)] if shape.side % 4 == 0 else []
        down += [nn.AdaptiveAvgPool2d(half), nn.AdaptiveMaxPool2d(half)]
        if shape.fixed:
            super().__init__(shape, rng.choice(same))
        elif shape.side <= 4:
            super().__init__(shape._replace(side=shape.side * 2), rng.choice(up))
        else:
            super().__init__(shape._replace(side=half), rng.choice(down))


@block(MAP)
class PixelShuffle(Block):
    """Up by `nn.PixelShuffle`, or down by its inverse, or there and back by views."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        width = some_width(rng, 4) // 4 + 1
        up = shape.side <= 4 and not shape.fixed
        way = rng.randrange(2)
        super().__init__(shape._replace(width=width, side=shape.side * 2) if up else shape.wide(width))
        self.conv = nn.Conv2d(shape.width, 4 * width, 3, padding=1)
        self.up, self.way, self.fold = up, way, nn.PixelShuffle(2)
        self.after = nn.Conv2d(4 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        if self.way == 0:
            x = self.fold(x)
        else:
            B, C, H, W = x.shape
            x = x.view(B, C // 4, 2, 2, H, W).permute(0, 1, 4, 2, 5, 3).reshape(B, C // 4, H * 2, W * 2)
        return x if self.up else self.after(F.pixel_unshuffle(x, 2))


@block(MAP)
class ChannelShuffle(Block):
    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.groups = rng.choice(divisors(shape.width))
        self.width, self.way = shape.width, rng.randrange(4)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        if self.way == 0:
            return F.channel_shuffle(x, self.groups)
        if self.way == 1:
            return x.view(B, self.groups, C // self.groups, H, W).transpose(1, 2).reshape(B, C, H, W)
        if self.way == 2:
            each = self.width // self.groups
            return x.reshape(B, self.groups, each, H, W).transpose(1, 2).contiguous().view(B, -1, H, W)
        return x.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(1, 2)


@block(ANY)
class Gated(Block):
    """A doubled width split into values and gate in one of many ways."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        width = some_width(rng)
        super().__init__(shape.wide(width))
        self.layer, self.act = mix(shape, 2 * width, rng), activation(rng)
        self.width, self.way, self.normed = width, rng.randrange(7), rng.random() < 0.3
        self.norm = norm(shape.wide(2 * width), rng) if self.normed else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layer(x))
        d = channels(x)
        if self.way == 0:
            a, b = x.chunk(2, dim=d)
        elif self.way == 1:
            a, b = x.split(self.width, dim=d)
        elif self.way == 2:
            a, b = torch.split(x, [self.width, self.width], d)
        elif self.way == 3:
            return F.glu(x, d)
        elif self.way == 4:
            a, b = (x[:, : self.width], x[:, self.width :]) if d == 1 else (x[..., : self.width], x[..., self.width :])
        elif self.way == 5:
            a, b = (x[:, ::2], x[:, 1::2]) if d == 1 else (x[..., ::2], x[..., 1::2])
        else:
            a, b = x.unflatten(d, (2, -1)).unbind(1 if d == 1 else 2)
        return a * self.act(b)


@block(ANY)
class Uneven(Block):
    """Split into unequal pieces that go different ways: a partial layer, as FasterNet and CSP have it."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.first = rng.randint(1, shape.width - 1)
        self.rest, self.way = shape.width - self.first, rng.randrange(4)
        self.layer = mix(shape.wide(self.first), self.first, rng)

    def forward(self, x: Tensor) -> Tensor:
        d = channels(x)
        if self.way == 0:
            a, b = torch.split(x, [self.first, self.rest], d)
        elif self.way == 1:
            a, b = x.narrow(d, 0, self.first), x.narrow(d, self.first, self.rest)
        elif self.way == 2:
            a, b = (x[:, : self.first], x[:, self.first :]) if d == 1 else (x[..., : self.first], x[..., self.first :])
        else:
            a, b = (x[:, : -self.rest], x[:, -self.rest :]) if d == 1 else (x[..., : -self.rest], x[..., -self.rest :])
        return torch.cat([self.layer(a), b] if self.way % 2 else [b, self.layer(a)], d)


@block(ANY)
class SqueezeExcite(Block):
    """A gate per channel from the pooled vector: linear layers, 1x1 convolutions, or ECA's convolution."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        hidden, self.way = rng.randint(2, 6), rng.randrange(3)
        if self.way == 1 and shape.kind == MAP:
            one, two = nn.Conv2d(shape.width, hidden, 1), nn.Conv2d(hidden, shape.width, 1)
        else:
            one, two = nn.Linear(shape.width, hidden), nn.Linear(hidden, shape.width)
        self.gate = nn.Sequential(one, nn.ReLU(), two, nn.Sigmoid())
        self.over = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 1 and x.dim() == 4:
            return x * self.gate(F.adaptive_avg_pool2d(x, 1))
        if self.way == 2:
            return x * spread(self.over(pooled(x).unsqueeze(1)).squeeze(1).sigmoid(), x)
        return x * spread(self.gate(pooled(x)), x)


@block(ANY)
class FiLM(Block):
    """Scale and shift per channel from a condition: the pooled vector, or a learned one."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.condition = nn.Parameter(torch.ones(1, 4)) if rng.random() < 0.4 else None
        self.layer = nn.Linear(4 if self.condition is not None else shape.width, 2 * shape.width)
        self.norm = norm(shape, rng) if rng.random() < 0.6 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        source = pooled(x) if self.condition is None else self.condition
        scale, shift = self.layer(F.silu(source)).chunk(2, dim=1)
        return self.norm(x) * (1 + spread(scale, x)) + spread(shift, x)


@block(ANY)
class Scale(Block):
    """A factor and a shift per channel: parameters, or a buffer."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        form = (shape.width, 1, 1) if shape.kind == MAP else (shape.width,)
        self.gamma = nn.Parameter(torch.ones(form))
        self.register_buffer("shift", torch.linspace(-1, 1, shape.width).view(form))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma + self.shift


@block(ANY)
class ChannelsLast(Block):
    """A small linear network over the last dimension, as ConvNeXt has it."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        hidden = some_width(rng)
        self.norm = nn.LayerNorm(shape.width)
        self.up, self.down, self.act = nn.Linear(shape.width, hidden), nn.Linear(hidden, shape.width), activation(rng)

    def forward(self, x: Tensor) -> Tensor:
        image = x.dim() == 4
        x = x.permute(0, 2, 3, 1) if image else x
        x = self.down(self.act(self.up(self.norm(x))))
        return x.permute(0, 3, 1, 2) if image else x


@block(ANY)
class Tied(Block):
    """One layer used twice, or a weight used again the other way round."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.turned, self.act = shape.kind == TOKENS and rng.random() < 0.5, activation(rng)
        self.layer = mix(shape, some_width(rng) if self.turned else shape.width, rng)

    def forward(self, x: Tensor) -> Tensor:
        if self.turned:
            return F.linear(self.act(self.layer(x)), self.layer.weight.t())
        return self.layer(self.act(self.layer(x)))


@block(ANY)
class Padded(Block):
    """Constant channels before and after."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        before, after = rng.randint(0, 3), rng.randint(0, 3)
        super().__init__(shape.wide(shape.width + before + after))
        self.before, self.after, self.value = before, after, rng.choice([0.0, 0.7])
        self.way = rng.randrange(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.way and x.dim() == 4:
            zeros = x.new_full((x.shape[0], self.before, *x.shape[2:]), self.value)
            more = x.new_full((x.shape[0], self.after, *x.shape[2:]), self.value)
            return torch.cat([zeros, x, more], 1)
        rest = (0, 0, 0, 0) if x.dim() == 4 else ()
        return F.pad(x, (*rest, self.before, self.after), value=self.value)


@block(ANY)
class OverChannels(Block):
    """Statistics over the channels: their mean taken off, a gate for every position, a softmax, a normalisation."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.way, self.gate = rng.randrange(9), nn.Conv2d(2, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        d = channels(x)
        if self.way == 0:
            return x - x.mean(d, keepdim=True)
        if self.way == 1 and x.dim() == 4:
            both = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
            return x * self.gate(both).sigmoid()
        if self.way == 2:
            return x.softmax(d)
        if self.way == 3:
            return F.normalize(x, dim=d)
        if self.way == 4:
            return x / (x.abs().sum(d, keepdim=True) + 1)
        if self.way == 5:
            return x / (x.std(d, correction=0, keepdim=True) + 1)
        if self.way == 6:
            return x * x.amax(d, keepdim=True)
        if self.way == 7:
            return x + x.logsumexp(d, keepdim=True)
        return x / (x.var(d, unbiased=False, keepdim=True) + 1)


@block(ANY)
class Ordered(Block):
    """Operations that depend on the order of the channels, between two layers whose width must stay."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        width, out = some_width(rng, 2), some_width(rng)
        super().__init__(shape.wide(out))
        self.way, self.shift = rng.randrange(8), rng.randint(1, width - 1)
        self.before, self.after = mix(shape, width, rng), mix(shape.wide(width), out, rng)
        self.register_buffer("order", torch.tensor(rng.sample(range(width), width)))
        self.fixed = rng.sample(range(width), width)
        self.must_freeze = [("before.weight", 0)]

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.moved(self.before(x)))

    def moved(self, x: Tensor) -> Tensor:
        d = channels(x)
        if self.way == 0:
            return x.cumsum(d)
        if self.way == 1:
            return torch.roll(x, self.shift, d)
        if self.way == 2:
            return x.flip(d)
        if self.way == 3:
            return x[:, self.fixed] if d == 1 else x[..., self.fixed]
        if self.way == 4:
            return x.index_select(d, self.order)
        if self.way == 5:
            return x.sort(dim=d)[0]
        if self.way == 6:
            return torch.stack([part * (i + 1) for i, part in enumerate(x.unbind(d))], d)
        return x.cumsum(d).flip([d])


class Doubled(torch.autograd.Function):
    """Code that cannot be looked into where it leaves torch."""

    @staticmethod
    def forward(ctx, x: Tensor, outside: bool) -> Tensor:
        return torch.from_numpy(x.numpy() * 2) if outside else x.flip(1) * 2

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        return grad * 2, None


@block(ANY, refused=True)
class Opaque(Block):
    """A custom autograd function."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.outside = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        return Doubled.apply(x, self.outside)


@block(ANY)
class Einsum(Block):
    """Products written as formulas, with a plain parameter, several experts or a score between channels."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        out = some_width(rng)
        way = rng.randrange(4)
        super().__init__(shape if way == 2 else shape.wide(out))
        self.way, width = way, shape.width
        self.weight = nn.Parameter(torch.zeros(width, out))
        self.experts, self.router = nn.Parameter(torch.zeros(3, width, out)), nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        image = x.dim() == 4
        if self.way == 0:
            return torch.einsum("bchw,co->bohw" if image else "btc,co->bto", x, self.weight)
        if self.way == 1:
            share = self.router(pooled(x)).softmax(-1)
            mixed = torch.einsum("be,eco->bco", share, self.experts)
            return torch.einsum("bchw,bco->bohw" if image else "btc,bco->bto", x, mixed)
        if self.way == 2:
            flat = x.flatten(2) if image else x.transpose(1, 2)
            score = (flat @ flat.transpose(1, 2) * 0.1).softmax(-1)
            out = torch.einsum("bcd,bdn->bcn", score, flat)
            return out.view_as(x) if image else out.transpose(1, 2)
        moved = torch.tensordot(x, self.weight, dims=([channels(x) % x.dim()], [0]))
        return moved.movedim(-1, 1) if image else moved


@block(ANY)
class Products(Block):
    """Axes multiplied and taken apart: outer products, maxout, repetitions, groups that are summed."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        width, times, way = rng.randint(2, 5), rng.randint(2, 3), rng.randrange(7)
        out = [width * times, width, width * times, width * times, width * times, width, times][way]
        super().__init__(shape.wide(out))
        self.width, self.times, self.way = width, times, way
        self.one = mix(shape, width if way in (0, 2, 3, 4) else width * times, rng)
        self.two = mix(shape, times, rng)

    def forward(self, x: Tensor) -> Tensor:
        image = x.dim() == 4
        a, d = self.one(x), channels(x)
        if self.way == 0:
            b = self.two(x)
            both = a.unsqueeze(2) * b.unsqueeze(1) if image else a.unsqueeze(-1) * b.unsqueeze(-2)
            return both.flatten(1, 2) if image else both.flatten(-2)
        if self.way == 1:
            at = 1 if image else 2
            return a.unflatten(at, (self.width, self.times)).amax(at + 1)
        if self.way == 2:
            return a.repeat_interleave(self.times, dim=d)
        if self.way == 3:
            return a.repeat(1, self.times, 1, 1) if image else a.repeat(1, 1, self.times)
        if self.way == 4:
            return torch.cat([a] * self.times, d)
        if self.way == 5:
            shape = (a.shape[0], self.times, self.width, *a.shape[2:]) if image else (*a.shape[:2], self.times, -1)
            return a.reshape(shape).sum(1 if image else 2)
        shape = (a.shape[0], self.times, -1, *a.shape[2:]) if image else (*a.shape[:2], self.times, self.width)
        return a.view(shape).mean(2 if image else -1)


@block(MAP)
class Unfolded(Block):
    """A convolution as a product with unfolded patches."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape.wide(some_width(rng)))
        self.weight = nn.Parameter(torch.zeros(self.out.width, shape.width * 9))

    def forward(self, x: Tensor) -> Tensor:
        patches = F.unfold(x, 3, padding=1)
        return (self.weight @ patches).view(x.shape[0], -1, *x.shape[2:])


@block(MAP)
class WeightNorm(Single):
    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        out = shape.wide(some_width(rng))
        super().__init__(out, weight_norm(nn.Conv2d(shape.width, out.width, 3, padding=1)))


@block(MAP)
class Standardised(Block):
    """A convolution whose weight is standardised in the forward."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape.wide(some_width(rng)))
        self.conv = nn.Conv2d(shape.width, self.out.width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        w = self.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 0.1)
        return F.conv2d(x, w, self.conv.bias, padding=1)


# --- tokens ---------------------------------------------------------------------------------------


@block(TOKENS)
class Positions(Block):
    """Learned positions, and a class token that comes and goes."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.where = nn.Parameter(torch.zeros(1, shape.side**2 + 1, shape.width))
        self.token, self.layer = nn.Parameter(torch.zeros(1, 1, shape.width)), nn.Linear(shape.width, shape.width)
        self.way = rng.randrange(2)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return x + self.where[:, : x.shape[1]]
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], dim=1) + self.where
        return self.layer(x)[:, 1:] + x[:, :1]


@block(TOKENS)
class OverTokens(Block):
    """Mixer's network over the positions."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        hidden, length = some_width(rng), shape.side**2
        self.layers = nn.Sequential(nn.Linear(length, hidden), activation(rng), nn.Linear(hidden, length))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.transpose(1, 2)).transpose(1, 2)


@block(TOKENS)
class Recurrent(Block):
    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        hidden, both, layers = rng.randint(3, 6), rng.random() < 0.4, rng.randint(1, 2)
        kind = rng.choice([nn.LSTM, nn.GRU, nn.RNN])
        super().__init__(shape.wide(hidden * (1 + both)))
        self.rnn = kind(shape.width, hidden, layers, batch_first=True, bidirectional=both)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@block(TOKENS)
class TorchAttention(Block):
    """`nn.MultiheadAttention`."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        heads, each = rng.randint(1, 3), rng.randint(2, 4)
        super().__init__(shape.wide(heads * each))
        self.before = nn.Linear(shape.width, heads * each)
        self.attention = nn.MultiheadAttention(heads * each, heads, batch_first=True, bias=rng.random() < 0.7)
        self.weights = rng.random() < 0.5

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        return self.attention(x, x, x, need_weights=self.weights)[0]


def rotated(x: Tensor) -> Tensor:
    """Rotary positions on `[B, heads, T, D]`, in halves."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(x.shape[2], dtype=x.dtype), 1 / 10 ** torch.arange(half, dtype=x.dtype))
    angles = torch.cat([angles, angles], -1)
    turned = torch.cat([-x[..., half:], x[..., :half]], -1)
    return x * angles.cos() + turned * angles.sin()


@block(TOKENS)
class Attention(Block):
    """Heads in every way: fused or separate projections, shared keys and values, positions, by hand or fused."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape.wide(some_width(rng)) if rng.random() < 0.5 else shape)
        self.num_heads, self.head_dim = rng.choice([1, 2, 4]), rng.choice([2, 3, 4])
        self.source = rng.choice(["view5", "chunk", "separate", "grouped", "grouped"])
        self.num_kv = rng.choice(divisors(self.num_heads)) if self.source == "grouped" else self.num_heads
        self.groups, self.inner = self.num_heads // self.num_kv, self.num_heads * self.head_dim
        bias = rng.random() < 0.6
        if self.source in ("view5", "chunk"):
            self.qkv = nn.Linear(shape.width, 3 * self.inner, bias)
        else:
            self.q = nn.Linear(shape.width, self.inner, bias)
            self.k = nn.Linear(shape.width, self.num_kv * self.head_dim, bias)
            self.v = nn.Linear(shape.width, self.num_kv * self.head_dim, bias)
        self.proj = nn.Linear(self.inner, self.out.width)
        self.normed = rng.random() < 0.3
        if self.normed:
            kind = rng.choice([RMSNorm, nn.LayerNorm])
            self.q_norm, self.k_norm = kind(self.head_dim), kind(self.head_dim)
        self.rotary = self.head_dim % 2 == 0 and rng.random() < 0.35
        self.shared_by, self.core, self.joined = rng.randrange(3), rng.randrange(5), rng.randrange(4)
        self.scale, self.viewed = self.head_dim**-0.5, rng.randrange(3)
        biased = rng.random() < 0.25
        self.bias = nn.Parameter(torch.zeros(self.num_heads, shape.side**2, shape.side**2)) if biased else None

    def heads(self, x: Tensor, n: int) -> Tensor:
        B, T, _ = x.shape
        if self.viewed == 0:
            return x.view(B, T, n, self.head_dim).transpose(1, 2)
        if self.viewed == 1:
            return x.view(B, T, -1, self.head_dim).transpose(1, 2)
        return x.reshape(B, T, n, -1).permute(0, 2, 1, 3)

    def projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        B, T, _ = x.shape
        if self.source == "view5":
            qkv = self.qkv(x).reshape(B, T, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
            return (qkv[0], qkv[1], qkv[2]) if self.viewed else qkv.unbind(0)
        if self.source == "chunk":
            parts = self.qkv(x).chunk(3, -1) if self.viewed else self.qkv(x).split(self.inner, dim=-1)
            q, k, v = (self.heads(part, self.num_heads) for part in parts)
            return q, k, v
        return (
            self.heads(self.q(x), self.num_heads),
            self.heads(self.k(x), self.num_kv),
            self.heads(self.v(x), self.num_kv),
        )

    def shared(self, x: Tensor) -> Tensor:
        """Every key or value head for all query heads of its group."""
        if self.source != "grouped":
            return x
        B, n, T, D = x.shape
        if self.shared_by == 0:
            return x.repeat_interleave(self.groups, dim=1)
        if self.shared_by == 1:
            return x[:, :, None].expand(B, n, self.groups, T, D).reshape(B, n * self.groups, T, D)
        return torch.repeat_interleave(x, self.num_heads // self.num_kv, 1)

    def attended(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.core == 0:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)
        if self.core == 1:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias, scale=self.scale)
        scores = torch.einsum("bhqd,bhkd->bhqk", q, k) if self.core == 2 else q @ k.transpose(-2, -1)
        scores = scores * self.scale if self.core < 4 else scores / math.sqrt(q.shape[-1])
        scores = scores if self.bias is None else scores + self.bias
        weights = scores.softmax(-1)
        return torch.einsum("bhqk,bhkd->bhqd", weights, v) if self.core == 2 else weights @ v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.projected(x)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary:
            q, k = rotated(q), rotated(k)
        if self.source == "grouped" and self.core == 0 and self.bias is None and self.shared_by == 2:
            out = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            out = self.attended(q, self.shared(k), self.shared(v))
        out, (B, T, _) = out.transpose(1, 2), x.shape
        if self.joined == 0:
            out = out.reshape(B, T, self.num_heads * self.head_dim)
        elif self.joined == 1:
            out = out.contiguous().view(B, T, -1)
        else:
            out = out.flatten(2) if self.joined == 2 else out.reshape(B, T, self.inner)
        return self.proj(out)


# --- more ways that networks are written in -------------------------------------------------------


@block(ANY)
class Res2(Block):
    """Pieces of a split that feed one another, as Res2Net has them."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        count, width = rng.randint(2, 4), rng.randint(2, 4)
        super().__init__(shape.wide(count * width))
        self.before, self.width, self.way = mix(shape, self.out.width, rng), width, rng.randrange(3)
        self.pieces = count
        self.layers = nn.ModuleList(mix(shape.wide(width), width, rng) for _ in range(count - 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        d = channels(x)
        pieces = (
            x.split(self.width, d)
            if self.way == 0
            else x.chunk(self.pieces if self.way == 1 else len(self.layers) + 1, d)
        )
        out = [pieces[0]]
        for piece, layer in zip(pieces[1:], self.layers, strict=True):
            out.append(layer(piece + out[-1]))
        return torch.cat(out, d)


@block(MAP)
class ShuffleUnit(Block):
    """One half goes through layers, then the halves are interleaved, as ShuffleNet's second version does."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        half = rng.randint(2, 6)
        super().__init__(shape.wide(2 * half))
        self.before = nn.Conv2d(shape.width, 2 * half, 1)
        self.layers = nn.Sequential(
            nn.Conv2d(half, half, 1, bias=False),
            nn.BatchNorm2d(half),
            nn.ReLU(inplace=True),
            nn.Conv2d(half, half, 3, padding=1, groups=half),
            nn.BatchNorm2d(half),
            nn.Conv2d(half, half, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.before(x).chunk(2, 1)
        x = torch.cat((a, self.layers(b)), 1)
        B, C, H, W = x.size()
        return x.view(B, 2, C // 2, H, W).transpose(1, 2).contiguous().view(B, -1, H, W)


@block(MAP)
class Coordinates(Block):
    """Coordinate attention: pooled rows and columns side by side in one convolution, then split again."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        hidden = some_width(rng)
        self.shared, self.bn = nn.Conv2d(shape.width, hidden, 1), nn.BatchNorm2d(hidden)
        self.rows, self.columns = nn.Conv2d(hidden, shape.width, 1), nn.Conv2d(hidden, shape.width, 1)

    def forward(self, x: Tensor) -> Tensor:
        H, W = x.shape[2:]
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)
        both = F.hardswish(self.bn(self.shared(torch.cat([rows, columns], dim=2))))
        rows, columns = torch.split(both, [H, W], dim=2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.permute(0, 1, 3, 2)).sigmoid()


@block(ANY)
class InPlace(Block):
    """Results written into a tensor: by slices, with `add_`, `mul_`, or into zeros."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.part, self.way = rng.randint(1, shape.width - 1), rng.randrange(5)
        self.layer, self.whole = mix(shape.wide(self.part), self.part, rng), mix(shape, shape.width, rng)

    def forward(self, x: Tensor) -> Tensor:
        d = channels(x)
        y = self.whole(x)
        if self.way == 0:
            return y.add_(x).mul_(0.5)
        if self.way == 1:
            return F.relu_(y)
        if self.way == 2:
            out = torch.zeros_like(x)
            out += y
            return out
        if d == 1:
            y = y.clone()
            y[:, : self.part] = self.layer(x[:, : self.part])
            return y
        out = x.new_zeros(x.shape)
        out[..., : self.part] = self.layer(x[..., : self.part])
        return out + y if self.way == 3 else out


@block(ANY)
class JoinedNorm(Block):
    """A normalisation or grouped convolution over two layers side by side."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        one, two = rng.choice([(4, 4), (2, 4), (3, 5), (4, 8), (6, 3)])
        super().__init__(shape.wide(one + two))
        self.one, self.two = mix(shape, one, rng), mix(shape, two, rng)
        self.norm, both = norm(self.out, rng), one + two
        groups = rng.choice(divisors(both))
        grouped = shape.kind == MAP and rng.random() < 0.5
        self.after = nn.Conv2d(both, both, 3, padding=1, groups=groups) if grouped else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.after(F.silu(self.norm(torch.cat([self.one(x), self.two(x)], channels(x)))))


@block(MAP)
class Functional(Block):
    """Convolutions called as functions: groups from an attribute or a size, kernels made of several or by a network."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.way, width = rng.randrange(5), shape.width
        self.groups = rng.choice(divisors(width)) if self.way == 1 else width
        each = width // self.groups if self.way < 3 else width
        self.weight = nn.Parameter(torch.zeros(width, each, 3, 3))
        self.small = nn.Parameter(torch.zeros(width, width, 1, 1))
        self.down, self.up = nn.Parameter(torch.zeros(2, width)), nn.Parameter(torch.zeros(width, 2))
        self.kernel = nn.Linear(width, width * 9)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 0:
            return F.conv2d(x, self.weight, padding=1, groups=x.shape[1])
        if self.way == 1:
            return F.conv2d(x, self.weight, None, 1, 1, 1, self.groups)
        if self.way == 2:
            B, C, H, W = x.shape
            kernel = self.kernel(x.mean((2, 3))).view(B * C, 1, 3, 3)
            return F.conv2d(x.reshape(1, B * C, H, W), kernel, padding=1, groups=B * C).view(B, C, H, W)
        if self.way == 3:
            return F.conv2d(x, self.weight + F.pad(self.small, (1, 1, 1, 1)), padding=1)
        return F.conv2d(x, self.small + (self.up @ self.down)[:, :, None, None])


@block(MAP)
class WholeNorm(Single):
    """Layer normalisation over channels and pixels, or group normalisation with one group."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        whole = nn.LayerNorm([shape.width, shape.side, shape.side])
        super().__init__(shape, whole if rng.random() < 0.6 else nn.GroupNorm(1, shape.width))


@block(TOKENS)
class Turned(Block):
    """Layers of maps on turned tokens: batch and group normalisation, one-dimensional convolutions with a gate."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.first = nn.Conv1d(shape.width, 2 * shape.width, 3, padding=1)
        self.depth = nn.Conv1d(shape.width, shape.width, 3, padding=1, groups=shape.width)
        self.norm = rng.choice(
            [nn.BatchNorm1d(shape.width), nn.GroupNorm(rng.choice(divisors(shape.width)), shape.width)]
        )

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.first(x.transpose(1, 2)), dim=1)
        return self.norm(self.depth(x)).transpose(1, 2)


@block(TOKENS)
class Windows(Block):
    """Attention inside windows, cut out by views as Swin does, shifted by a roll of the positions."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.heads, each = rng.choice([1, 2, 3]), rng.choice([2, 4])
        self.inner, self.side, self.shift = self.heads * each, shape.side, rng.randrange(2)
        self.qkv, self.proj = nn.Linear(shape.width, 3 * self.inner), nn.Linear(self.inner, shape.width)
        self.table = nn.Parameter(torch.zeros(9, self.heads))
        place = torch.arange(2)[:, None] * 3 + torch.arange(2)
        self.register_buffer("index", (place.flatten()[:, None] - place.flatten()[None]) + 4)

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        n = self.side // 2
        x = x.view(B, self.side, self.side, C)
        x = torch.roll(x, (-self.shift, -self.shift), (1, 2)) if self.shift else x
        x = x.view(B, n, 2, n, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(-1, 4, C)
        qkv = self.qkv(x).view(x.shape[0], 4, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        scores = qkv[0] @ qkv[1].transpose(-2, -1)
        bias = self.table[self.index.view(-1)].view(4, 4, -1).permute(2, 0, 1)
        x = ((scores + bias.unsqueeze(0)).softmax(-1) @ qkv[2]).transpose(1, 2).reshape(-1, 4, self.inner)
        x = self.proj(x).view(B, n, n, 2, 2, C).permute(0, 1, 3, 2, 4, 5).reshape(B, self.side, self.side, C)
        return x.view(B, T, C)


@block(TOKENS)
class CrossAttention(Block):
    """Learned queries look at the tokens, and the tokens at them; heads exchange scores in one of the ways."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.h, self.d, width = rng.choice([1, 2, 4]), rng.choice([2, 3]), some_width(rng)
        self.queries = nn.Parameter(torch.zeros(3, width))
        self.q1, self.kv1 = nn.Linear(width, self.h * self.d), nn.Linear(shape.width, 2 * self.h * self.d)
        self.o1, self.q2 = nn.Linear(self.h * self.d, width), nn.Linear(shape.width, self.h * self.d)
        self.kv2, self.o2 = nn.Linear(width, 2 * self.h * self.d), nn.Linear(self.h * self.d, shape.width)
        self.talking = nn.Linear(self.h, self.h) if rng.random() < 0.4 else None
        self.norm = nn.LayerNorm(width)

    def attend(self, q: Tensor, kv: Tensor) -> Tensor:
        q = q.unflatten(-1, (self.h, self.d)).transpose(1, 2)
        k, v = kv.unflatten(-1, (2, self.h, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.mT
        if self.talking is not None:
            scores = self.talking(scores.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.unsqueeze(0).expand(x.size(0), -1, -1)
        seen = queries + self.o1(self.attend(self.q1(queries), self.kv1(x)))
        return self.o2(self.attend(self.q2(x), self.kv2(self.norm(seen))))


@block(TOKENS)
class ChannelAttention(Block):
    """XCiT: channels attend to one another inside heads, with a temperature per head; or linear attention."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        heads, each = rng.choice([1, 2, 3]), rng.choice([2, 4])
        super().__init__(shape.wide(heads * each))
        self.num_heads, self.linear = heads, rng.random() < 0.5
        self.qkv = nn.Linear(shape.width, 3 * self.out.width)
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 4, 1)  # [B, heads, D, N]
        if self.linear:
            q, k = q.softmax(-2), k.softmax(-1)
            out = torch.einsum("bhdn,bhen->bhde", k, v).transpose(-1, -2) @ q * self.temperature
        else:
            q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            out = ((q @ k.transpose(-2, -1)) * self.temperature).softmax(-1) @ v
        return out.permute(0, 3, 1, 2).reshape(B, N, -1)


@block(MAP)
class PatchMerging(Block):
    """Every second pixel four times, side by side, normalised and reduced; or the same by views. Then up again."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape.wide(some_width(rng)))
        self.way, self.norm = rng.randrange(2), nn.LayerNorm(4 * shape.width)
        self.reduction = nn.Linear(4 * shape.width, self.out.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        if self.way:
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
        else:
            B, H, W, C = x.shape
            x = x.view(B, H // 2, 2, W // 2, 2, C).permute(0, 1, 3, 4, 2, 5).flatten(3)
        return F.interpolate(self.reduction(self.norm(x)).permute(0, 3, 1, 2), scale_factor=2)


@block(ANY)
class Experts(Block):
    """Several small networks and their shares: module by module, or stacked weights with `bmm`."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape)
        self.n, hidden = rng.randint(2, 3), some_width(rng)
        self.router, self.stacked = nn.Linear(shape.width, self.n), rng.random() < 0.5
        self.up = nn.Parameter(torch.zeros(self.n, shape.width, 2 * hidden))
        self.down = nn.Parameter(torch.zeros(self.n, hidden, shape.width))
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(shape.width, rng.randint(3, 6)), nn.ReLU()) for _ in range(self.n)
        )
        self.back = nn.ModuleList(nn.Linear(expert[0].out_features, shape.width) for expert in self.experts)

    def forward(self, x: Tensor) -> Tensor:
        image = x.dim() == 4
        rows = x.permute(0, 2, 3, 1) if image else x
        flat = rows.reshape(-1, rows.shape[-1])
        shares = self.router(flat).softmax(-1)
        if self.stacked:
            gate, up = torch.bmm(flat.expand(self.n, -1, -1), self.up).chunk(2, -1)
            out = (torch.bmm(F.silu(gate) * up, self.down) * shares.t().unsqueeze(-1)).sum(0)
        else:
            out = torch.zeros_like(flat)
            for i, (expert, back) in enumerate(zip(self.experts, self.back, strict=True)):
                out = out + shares[:, i : i + 1] * back(expert(flat))
        out = out.view(rows.shape)
        return out.permute(0, 3, 1, 2) if image else out


@block(ANY)
class Bilinear(Block):
    """Products of two projections: `nn.Bilinear`, or a low-rank one that is summed in groups."""

    def __init__(self, shape: Shape, rng: Random, _: list[nn.Module]):
        super().__init__(shape.wide(some_width(rng)))
        a, b, self.way = rng.randint(2, 4), rng.randint(2, 4), rng.randrange(2)
        self.one, self.two = nn.Linear(shape.width, a), nn.Linear(shape.width, b)
        self.product = nn.Bilinear(a, b, self.out.width)
        self.p, self.q = mix(shape, 2 * self.out.width, rng), mix(shape, 2 * self.out.width, rng)

    def forward(self, x: Tensor) -> Tensor:
        image = x.dim() == 4
        if self.way:
            both = self.p(x) * self.q(x)
            return both.unflatten(1, (-1, 2)).sum(2) if image else both.unflatten(-1, (-1, 2)).sum(-1)
        x = x.permute(0, 2, 3, 1) if image else x
        x = self.product(self.one(x), self.two(x))
        return x.permute(0, 3, 1, 2) if image else x


# --- branches -------------------------------------------------------------------------------------


class Branched(Block):
    """Some branches over one input."""

    def __init__(self, out: Shape, branches: list[nn.Module]):
        super().__init__(out)
        self.branches = nn.ModuleList(branches)


def ends(branch: nn.Module, shape: Shape, rng: Random, always: bool = False) -> nn.Module:
    """The branch with a last layer where its width is not the wanted one."""
    if branch.out.width == shape.width and not always:
        return branch
    return Chain([branch, Single(shape, mix(branch.out, shape.width, rng))], shape)


@block(ANY, branches=(1, 1))
class Residual(Branched):
    def __init__(self, shape: Shape, rng: Random, branches: list[nn.Module]):
        super().__init__(shape, [ends(branches[0], shape, rng)])
        self.factor, self.norm = rng.choice([1.0, 0.1]), norm(shape, rng) if rng.random() < 0.4 else nn.Identity()
        self.inplace = rng.random() < 0.2

    def forward(self, x: Tensor) -> Tensor:
        out = self.branches[0](self.norm(x))
        if self.inplace and out is not x:
            out = out * self.factor
            out += x
            return out
        return x + self.factor * out


@block(ANY, branches=(1, 1))
class Gate(Branched):
    """Multiplied with a branch."""

    def __init__(self, shape: Shape, rng: Random, branches: list[nn.Module]):
        super().__init__(shape, [ends(branches[0], shape, rng)])

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.branches[0](x))


@block(ANY, branches=(1, 3))
class Cat(Branched):
    """Branches side by side, the input too where there is only one."""

    def __init__(self, shape: Shape, rng: Random, branches: list[nn.Module]):
        dense = len(branches) == 1 or rng.random() < 0.3
        width = sum(branch.out.width for branch in branches) + shape.width * dense
        super().__init__(shape.wide(width), branches)
        self.dense, self.bottleneck = dense, None
        if width > 24:
            self.out = shape.wide(some_width(rng))
            self.bottleneck = mix(shape.wide(width), self.out.width, rng)

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        out = torch.cat([x, *parts] if self.dense else parts, channels(x))
        return out if self.bottleneck is None else self.bottleneck(out)


@block(ANY, branches=(2, 3))
class Sum(Branched):
    """Branches added up: one by one, stacked, chosen by sign, mixed by learned shares, or the larger of them."""

    def __init__(self, shape: Shape, rng: Random, branches: list[nn.Module]):
        out = shape.wide(some_width(rng))
        super().__init__(out, [ends(branch, out, rng, always=True) for branch in branches])
        self.way, self.shares = rng.randrange(7), nn.Parameter(torch.zeros(len(branches)))

    def forward(self, x: Tensor) -> Tensor:
        parts = [branch(x) for branch in self.branches]
        if self.way == 0:
            return torch.stack(parts).sum(0)
        if self.way == 1:
            return torch.stack(parts, 1).mean(1)
        if self.way == 2:
            return torch.where(parts[0] > 0, parts[0], parts[1])
        if self.way == 3:
            return torch.maximum(parts[0], parts[1])
        if self.way == 4:
            shares = self.shares.softmax(0)
            return sum(share * part for share, part in zip(shares, parts, strict=True))
        if self.way == 5:
            return torch.lerp(parts[0], parts[1], 0.3)
        return sum(parts)


@block(ANY, branches=(1, 1))
class Selective(Branched):
    """Selective kernels: shares of two branches per channel by a softmax over the branches."""

    def __init__(self, shape: Shape, rng: Random, branches: list[nn.Module]):
        super().__init__(shape, [ends(branches[0], shape, rng)])
        self.shares, self.way = nn.Linear(shape.width, 2 * shape.width), rng.randrange(2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.branches[0](x)
        shares = self.shares(pooled(x + y))
        if self.way:
            shares = shares.view(x.shape[0], 2, -1).softmax(1)
            return x * spread(shares[:, 0], x) + y * spread(shares[:, 1], x)
        first, second = torch.stack(shares.chunk(2, 1)).softmax(0)
        return x * spread(first, x) + y * spread(second, x)


# --- conversions, chains, whole networks ----------------------------------------------------------


class ToTokens(Block):
    def __init__(self, shape: Shape, rng: Random):
        super().__init__(shape._replace(kind=TOKENS))
        self.way = rng.randrange(3)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        if self.way == 0:
            return x.flatten(2).transpose(1, 2)
        if self.way == 1:
            return x.permute(0, 2, 3, 1).reshape(B, H * W, C)
        return x.reshape(B, C, -1).permute(0, 2, 1)


class ToMap(Block):
    def __init__(self, shape: Shape, rng: Random):
        super().__init__(shape._replace(kind=MAP))
        self.way, self.side, self.width = rng.randrange(3), shape.side, shape.width

    def forward(self, x: Tensor) -> Tensor:
        B, _, C = x.shape
        if self.way == 0:
            return x.transpose(1, 2).reshape(B, C, self.side, self.side)
        if self.way == 1:
            return x.view(B, self.side, self.side, self.width).permute(0, 3, 1, 2)
        return x.transpose(1, 2).unflatten(2, (self.side, self.side))


class Chain(nn.Sequential):
    """Blocks one after the other."""

    def __init__(self, blocks: list[nn.Module], out: Shape):
        super().__init__(*blocks)
        self.out = out


def converted(shape: Shape, kind: str, rng: Random) -> list[Block]:
    if kind in (ANY, shape.kind):
        return []
    return [ToTokens(shape, rng) if kind == TOKENS else ToMap(shape, rng)]


def chain(nodes: tuple[Node, ...], shape: Shape, kind: str = ANY) -> Chain:
    """Blocks built one after the other, with conversions where a block takes the other form."""
    blocks: list[nn.Module] = []
    for node in nodes:
        rng, found = Random(node.seed), BLOCKS[node.block]
        blocks += converted(shape, found.takes, rng)
        shape = blocks[-1].out if blocks else shape
        inside = [chain(branch, shape._replace(fixed=True), shape.kind) for branch in node.branches]
        blocks.append(found.make(shape, rng, inside))
        blocks[-1].out = blocks[-1].out._replace(fixed=shape.fixed)
        shape = blocks[-1].out
    blocks += converted(shape, kind, Random(len(nodes)))
    return Chain(blocks, blocks[-1].out if blocks else shape)


class Head(nn.Module):
    """The end: pooled and linear, flattened and linear, one answer per position, or none."""

    def __init__(self, shape: Shape, rng: Random):
        super().__init__()
        self.way = rng.randrange(4)
        width = shape.width * shape.side**2 if self.way == 1 else shape.width
        image = shape.kind == MAP and self.way == 2
        self.layer = nn.Conv2d(width, CLASSES, 1) if image else nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        if self.way == 1:
            return self.layer(x.flatten(1))
        return self.layer(x if self.way == 2 else pooled(x))


class Net(nn.Module):
    """A graph as a module, all its values random and none of them special; double precision."""

    def __init__(self, graph: Graph):
        super().__init__()
        rng = Random(graph.seed)
        stem = Shape(MAP, some_width(rng), graph.side)
        self.stem = mix(Shape(MAP, IMAGE, graph.side), stem.width, rng)
        self.blocks = chain(graph.nodes, stem)
        self.head = Head(self.blocks.out, rng)
        self.double().eval()
        fill(self, torch.Generator().manual_seed(graph.seed))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


def fill(model: nn.Module, generator: torch.Generator) -> None:
    """Weights that keep the scale; vectors between 0.5 and 1.5 with either sign; variances that are positive."""
    with torch.no_grad():
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if not tensor.is_floating_point():
                continue
            if tensor.dim() > 1 and tensor.numel() > max(tensor.shape):
                spread_ = 1.5 / math.sqrt(tensor.numel() / tensor.shape[0])
                tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * spread_)
            else:
                value = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype) + 0.5
                sign = torch.randint(0, 4, tensor.shape, generator=generator) > 0
                tensor.copy_(value if "running_var" in name else torch.where(sign, value, -value))


def inputs(graph: Graph, batch: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(graph.seed + 1)
    return torch.randn(batch, IMAGE, graph.side, graph.side, generator=generator, dtype=torch.float64)


# --- drawing and making smaller -------------------------------------------------------------------


def size(nodes: tuple[Node, ...]) -> int:
    return sum(1 + sum(map(size, node.branches)) for node in nodes)


def draw_nodes(rng: Random, most: int, depth: int = 0) -> tuple[Node, ...]:
    """At most `most` blocks, those in branches counted."""
    nodes: list[Node] = []
    wanted = rng.randint(depth == 0, min(most, 7 - 2 * depth))
    while size(tuple(nodes)) < wanted:
        name = rng.choice(list(BLOCKS))
        least, largest = BLOCKS[name].branches
        left = most - size(tuple(nodes)) - 1
        if largest and (depth > 1 or left < 1):
            continue
        branches = []
        for _ in range(rng.randint(least, largest)):
            branches.append(draw_nodes(rng, max(1, min(4, left)), depth + 1) if left > 0 else ())
            left -= size(branches[-1])
        nodes.append(Node(name, rng.randrange(10_000), tuple(branches)))
    return tuple(nodes)


def draw_graph(rng: Random) -> Graph:
    return Graph(rng.choice([4, 6, 8]), rng.randrange(10_000), draw_nodes(rng, 10))


def may_be_refused(nodes: tuple[Node, ...]) -> bool:
    return any(BLOCKS[node.block].refused or any(map(may_be_refused, node.branches)) for node in nodes)


def smaller_nodes(nodes: tuple[Node, ...]) -> Iterator[tuple[Node, ...]]:
    """The same without one block, with a block's branch in its place, or with a smaller branch."""
    for i, node in enumerate(nodes):
        before, after = nodes[:i], nodes[i + 1 :]
        yield before + after
        for j, branch in enumerate(node.branches):
            yield before + branch + after
            rest = (*node.branches[:j], *node.branches[j + 1 :])
            if len(rest) >= BLOCKS[node.block].branches[0]:
                yield (*before, node._replace(branches=rest), *after)
            for less in smaller_nodes(branch):
                changed = (*node.branches[:j], less, *node.branches[j + 1 :])
                yield (*before, node._replace(branches=changed), *after)


def smallest(graph: Graph, fails: Callable[[Graph], bool]) -> Graph:
    """A graph from which no block can be left out without the failure going away."""
    for nodes in smaller_nodes(graph.nodes):
        if fails(graph._replace(nodes=nodes)):
            return smallest(graph._replace(nodes=nodes), fails)
    return graph
