"""One small model for each family of operators, with the groups that its author wrote down by hand.

A group is written as site -> {"parameter:dim": indices of unit 1}: what goes when the second unit goes.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.core.units import UnitKind
from secateur.data.batches import run
from secateur.data.running import evaluating
from secateur.shrink.cut import install, make_cut
from secateur.shrink.reference import reference
from secateur.shrink.verify import difference, float_tensors
from secateur.structure.analysis import Structure, analyse
from secateur.structure.table import OPERATORS, operator

Groups = dict[str, dict[str, list[int]]]


class Net(nn.Module):
    """Parts by name and a forward pass as a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module | Tensor):
        super().__init__()
        for name, part in parts.items():
            if isinstance(part, (nn.Parameter, nn.Module)):
                setattr(self, name, part)
            else:
                self.register_buffer(name, part)
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


def groups(structure: Structure) -> Groups:
    found: Groups = {}
    for name, site in structure.sites.items():
        places: dict[str, list[int]] = {}
        for place in site.occurrences:
            places.setdefault(f"{place.parameter}:{place.dim}", []).extend(place.indices(site.units)[1].tolist())
        found[name] = {place: sorted(indices) for place, indices in places.items()}
    return found


def random_plan(structure: Structure, seed: int) -> Plan:
    rng = torch.Generator().manual_seed(seed)
    masks = {}
    for name, site in structure.sites.items():
        multiple = structure.multiples.get(name, 1)
        kept = max(1, int(torch.randint(1, site.units // multiple + 1, (), generator=rng))) * multiple
        masks[name] = torch.zeros(site.units, dtype=torch.bool)
        masks[name][torch.randperm(site.units, generator=rng)[:kept]] = True
    return Plan({name: structure.sites[name] for name in masks}, masks)


def check_cuts(model: nn.Module, batch: Batch, structure: Structure, seeds: int = 3) -> None:
    """Cut models give what silenced models give, and have as many parameters as promised."""
    for seed in range(seeds):
        plan = random_plan(structure, seed)
        expected = reference(model, plan, structure, batch)
        undo = install(model, make_cut(model, plan, structure))
        promised = structure.parameters({name: plan.kept(name) for name in plan.sites})
        assert sum(parameter.numel() for parameter in model.parameters()) == promised
        with evaluating(model):
            found = run(model, batch)
        undo()
        for a, b in zip(float_tensors(expected), float_tensors(found), strict=True):
            assert difference(a, b) < 1e-5


def images(channels: int = 2, side: int = 6) -> Tensor:
    return torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(1))


def tokens(width: int = 6, length: int = 5) -> Tensor:
    return torch.randn(2, length, width, generator=torch.Generator().manual_seed(1))


def ids() -> Tensor:
    return torch.randint(0, 9, (2, 5), generator=torch.Generator().manual_seed(1))


def conv(i: int, o: int, k: int = 3, **more: int) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **more)


def up_down(between: Callable[[Tensor], Tensor], width: int = 8, out: int | None = None, **parts: nn.Module) -> Net:
    """linear -> something -> linear."""
    return Net(
        lambda net, x: net.down(between(net.up(x))), up=nn.Linear(6, width), down=nn.Linear(out or width, 3), **parts
    )


UP = {"up.weight:0": [1], "up.bias:0": [1]}
UP_DOWN: Groups = {"up:neuron": {**UP, "down.weight:1": [1]}}


# --- groups by hand -------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], Groups]] = {}


def case(name: str, make: Callable[[], nn.Module], x: Callable[[], Tensor], expected: Groups) -> None:
    CASES[name] = (make, x, expected)


# chains
case("linear", lambda: up_down(torch.tanh), tokens, UP_DOWN)
case(
    "conv-bn-conv",
    lambda: Net(lambda n, x: n.b(n.bn(n.a(x)).relu()), a=conv(2, 4), bn=nn.BatchNorm2d(4), b=conv(4, 3)),
    images,
    {
        "a:channel": {
            "a.weight:0": [1],
            "a.bias:0": [1],
            "bn.weight:0": [1],
            "bn.bias:0": [1],
            "bn.running_mean:0": [1],
            "bn.running_var:0": [1],
            "b.weight:1": [1],
        }
    },
)
case(
    "flatten",
    lambda: Net(lambda n, x: n.fc(F.max_pool2d(n.a(x), 3).flatten(1)), a=conv(2, 4), fc=nn.Linear(16, 3)),
    images,
    {"a:channel": {"a.weight:0": [1], "a.bias:0": [1], "fc.weight:1": [4, 5, 6, 7]}},
)
case(
    "channels last",
    lambda: Net(lambda n, x: n.fc(n.a(x).permute(0, 2, 3, 1)), a=conv(2, 4), fc=nn.Linear(4, 3)),
    images,
    {"a:channel": {"a.weight:0": [1], "a.bias:0": [1], "fc.weight:1": [1]}},
)
case(
    "positions before channels",
    lambda: Net(
        lambda n, x: n.fc(F.max_pool2d(n.a(x), 3).permute(0, 2, 3, 1).flatten(1)), a=conv(2, 4), fc=nn.Linear(16, 3)
    ),
    images,
    {"a:channel": {"a.weight:0": [1], "a.bias:0": [1], "fc.weight:1": [1, 5, 9, 13]}},
)
case(
    "conv1d and conv3d",
    lambda: Net(
        lambda n, x: n.c(n.b(n.a(x.flatten(2)).view(2, -1, 4, 3, 3)).flatten(2)),
        a=nn.Conv1d(2, 4, 1),
        b=nn.Conv3d(4, 5, 1),
        c=nn.Conv1d(5, 3, 1),
    ),
    images,
    {
        "a:channel": {"a.weight:0": [1], "a.bias:0": [1], "b.weight:1": [1]},
        "b:channel": {"b.weight:0": [1], "b.bias:0": [1], "c.weight:1": [1]},
    },
)
case(
    "transposed conv",
    lambda: Net(lambda n, x: n.b(n.a(x)), a=nn.ConvTranspose2d(2, 4, 2, 2), b=nn.ConvTranspose2d(4, 3, 2, 2)),
    images,
    {"a:channel": {"a.weight:1": [1], "a.bias:0": [1], "b.weight:0": [1]}},
)
case(
    "depthwise",
    lambda: Net(lambda n, x: n.b(n.d(n.a(x))), a=conv(2, 4), d=conv(4, 4, groups=4), b=conv(4, 3, 1)),
    images,
    {
        "a:channel": {
            "a.weight:0": [1],
            "a.bias:0": [1],
            "d.weight:0": [1],
            "d.bias:0": [1],
            "b.weight:1": [1],
        }
    },
)
case(
    "grouped conv: whole groups, and inputs of all groups alike",
    lambda: Net(lambda n, x: n.b(n.g(n.a(x))), a=conv(2, 6), g=conv(6, 4, groups=2), b=conv(4, 3, 1)),
    images,
    {
        "a:channel": {
            "a.weight:0": [3, 4, 5],
            "a.bias:0": [3, 4, 5],
            "g.weight:0": [2, 3],
            "g.bias:0": [2, 3],
            "b.weight:1": [2, 3],
        },
        "a:channel#2": {"a.weight:0": [1, 4], "a.bias:0": [1, 4], "g.weight:1": [1]},
        "g:channel": {"g.weight:0": [1, 3], "g.bias:0": [1, 3], "b.weight:1": [1, 3]},
    },
)
case(
    "depthwise with two filters a channel",
    lambda: Net(lambda n, x: n.b(n.d(n.a(x))), a=conv(2, 4), d=conv(4, 8, groups=4), b=conv(8, 3, 1)),
    images,
    {
        "a:channel": {
            "a.weight:0": [1],
            "a.bias:0": [1],
            "d.weight:0": [2, 3],
            "d.bias:0": [2, 3],
            "b.weight:1": [2, 3],
        },
        "d:channel": {
            "d.weight:0": [1, 3, 5, 7],
            "d.bias:0": [1, 3, 5, 7],
            "b.weight:1": [1, 3, 5, 7],
        },
    },
)

# joins
case(
    "residual",
    lambda: Net(lambda n, x: n.c(n.a(x) + n.b(n.a(x)).relu()), a=conv(2, 4), b=conv(4, 4), c=conv(4, 3)),
    images,
    {
        "a:channel": {
            "a.weight:0": [1],
            "a.bias:0": [1],
            "b.weight:0": [1],
            "b.weight:1": [1],
            "b.bias:0": [1],
            "c.weight:1": [1],
        }
    },
)
case(
    "cat",
    lambda: Net(lambda n, x: n.c(torch.cat([n.a(x), n.b(x)], 1)), a=conv(2, 3), b=conv(2, 4), c=conv(7, 3)),
    images,
    {
        "a:channel": {"a.weight:0": [1], "a.bias:0": [1], "c.weight:1": [1]},
        "b:channel": {"b.weight:0": [1], "b.bias:0": [1], "c.weight:1": [4]},
    },
)
case(
    "dense connections",
    lambda: Net(
        lambda n, x: n.c(torch.cat([n.a(x), n.b(torch.cat([x, n.a(x)], 1))], 1)),
        a=conv(2, 3),
        b=conv(5, 2),
        c=conv(5, 3),
    ),
    images,
    {
        "a:channel": {"a.weight:0": [1], "a.bias:0": [1], "b.weight:1": [3], "c.weight:1": [1]},
        "b:channel": {"b.weight:0": [1], "b.bias:0": [1], "c.weight:1": [4]},
    },
)
case(
    "chunk: halves stay equal",
    lambda: up_down(lambda h: h.chunk(2, -1)[0] * h.chunk(2, -1)[1], 8, 4),
    tokens,
    {"up:neuron": {"up.weight:0": [1, 5], "up.bias:0": [1, 5], "down.weight:1": [1]}},
)
case(
    "glu",
    lambda: up_down(lambda h: F.glu(h, -1), 8, 4),
    tokens,
    {"up:neuron": {"up.weight:0": [1, 5], "up.bias:0": [1, 5], "down.weight:1": [1]}},
)
case(
    "gated mlp",
    lambda: Net(
        lambda n, x: n.down(F.silu(n.gate(x)) * n.up(x)),
        gate=nn.Linear(6, 8, False),
        up=nn.Linear(6, 8, False),
        down=nn.Linear(8, 3),
    ),
    tokens,
    {"gate:neuron": {"gate.weight:0": [1], "up.weight:0": [1], "down.weight:1": [1]}},
)
case(
    "pad with new channels",
    lambda: Net(lambda n, x: n.b(F.pad(n.a(x), (0, 0, 0, 0, 1, 2))), a=conv(2, 4), b=conv(7, 3)),
    images,
    {"a:channel": {"a.weight:0": [1], "a.bias:0": [1], "b.weight:1": [2]}},
)
case(
    "repeat: copies after each other",
    lambda: up_down(lambda h: h.repeat(1, 1, 2), 4, 8),
    tokens,
    {"up:neuron": {**UP, "down.weight:1": [1, 5]}},
)
case(
    "repeat_interleave: copies side by side",
    lambda: up_down(lambda h: h.repeat_interleave(2, -1), 4, 8),
    tokens,
    {"up:neuron": {**UP, "down.weight:1": [2, 3]}},
)
case(
    "stack",
    lambda: Net(
        lambda n, x: n.down(torch.stack([n.a(x), n.b(x)]).sum(0)),
        a=nn.Linear(6, 4),
        b=nn.Linear(6, 4),
        down=nn.Linear(4, 3),
    ),
    tokens,
    {"a:neuron": {"a.weight:0": [1], "a.bias:0": [1], "b.weight:0": [1], "b.bias:0": [1], "down.weight:1": [1]}},
)

# norms
WITH_NORM: Groups = {"up:neuron": {**UP, "down.weight:1": [1], "norm.weight:0": [1], "norm.bias:0": [1]}}
case(
    "layer norm",
    lambda: Net(lambda n, x: n.down(n.norm(n.up(x))), up=nn.Linear(6, 8), norm=nn.LayerNorm(8), down=nn.Linear(8, 3)),
    tokens,
    WITH_NORM,
)
case(
    "rms norm",
    lambda: Net(lambda n, x: n.down(n.norm(n.up(x))), up=nn.Linear(6, 8), norm=nn.RMSNorm(8), down=nn.Linear(8, 3)),
    tokens,
    {"up:neuron": {**UP, "down.weight:1": [1], "norm.weight:0": [1]}},
)
case(
    "group norm: whole groups, and channels of all groups alike",
    lambda: Net(lambda n, x: n.b(n.norm(n.a(x))), a=conv(2, 6), norm=nn.GroupNorm(2, 6), b=conv(6, 3)),
    images,
    {
        "a:channel": {
            name: [3, 4, 5] for name in ("a.weight:0", "a.bias:0", "norm.weight:0", "norm.bias:0", "b.weight:1")
        },
        "a:channel#2": {
            name: [1, 4] for name in ("a.weight:0", "a.bias:0", "norm.weight:0", "norm.bias:0", "b.weight:1")
        },
    },
)
case(
    "instance norm",
    lambda: Net(lambda n, x: n.b(n.norm(n.a(x))), a=conv(2, 4), norm=nn.InstanceNorm2d(4, affine=True), b=conv(4, 3)),
    images,
    {"a:channel": {name: [1] for name in ("a.weight:0", "a.bias:0", "norm.weight:0", "norm.bias:0", "b.weight:1")}},
)
case(
    "weight norm",
    lambda: Net(
        lambda n, x: n.down(n.up(x).relu()),
        up=nn.utils.parametrizations.weight_norm(nn.Linear(6, 8)),
        down=nn.Linear(8, 3),
    ),
    tokens,
    {
        "up:neuron": {
            "up.bias:0": [1],
            "up.parametrizations.weight.original0:0": [1],
            "up.parametrizations.weight.original1:0": [1],
            "down.weight:1": [1],
        }
    },
)
case(
    "prelu",
    lambda: Net(lambda n, x: n.b(n.act(n.a(x))), a=conv(2, 4), act=nn.PReLU(4), b=conv(4, 3)),
    images,
    {"a:channel": {"a.weight:0": [1], "a.bias:0": [1], "act.weight:0": [1], "b.weight:1": [1]}},
)

# tables and positions
case(
    "embedding with positions",
    lambda: Net(
        lambda n, x: n.down(n.table(x) + n.places[:, : x.shape[1]]),
        table=nn.Embedding(9, 8),
        places=nn.Parameter(torch.randn(1, 7, 8)),
        down=nn.Linear(8, 3),
    ),
    ids,
    {"table:embedding": {"places:2": [1], "table.weight:1": [1], "down.weight:1": [1]}},
)
case(
    "class token",
    lambda: Net(
        lambda n, x: n.down(torch.cat([n.token.expand(len(x), -1, -1), n.up(x)], 1)[:, 0]),
        token=nn.Parameter(torch.randn(1, 1, 8)),
        up=nn.Linear(6, 8),
        down=nn.Linear(8, 3),
    ),
    tokens,
    {"up:neuron": {"token:2": [1], **UP, "down.weight:1": [1]}},
)
case(
    "mean over positions",
    lambda: Net(lambda n, x: n.fc(n.a(x).mean((2, 3))), a=conv(2, 4), fc=nn.Linear(4, 3)),
    images,
    {"a:channel": {"a.weight:0": [1], "a.bias:0": [1], "fc.weight:1": [1]}},
)
case(
    "squeeze and excite",
    lambda: Net(
        lambda n, x: n.b(n.a(x) * n.e(n.s(n.a(x).mean((2, 3), keepdim=True)).relu()).sigmoid()),
        a=conv(2, 4),
        s=nn.Conv2d(4, 2, 1),
        e=nn.Conv2d(2, 4, 1),
        b=conv(4, 3),
    ),
    images,
    {
        "a:channel": {
            "a.weight:0": [1],
            "a.bias:0": [1],
            "s.weight:1": [1],
            "e.weight:0": [1],
            "e.bias:0": [1],
            "b.weight:1": [1],
        },
        "s:channel": {"s.weight:0": [1], "s.bias:0": [1], "e.weight:1": [1]},
    },
)
case("mean over units", lambda: up_down(lambda h: h - h.mean(-1, keepdim=True)), tokens, UP_DOWN)
case("softmax over units", lambda: up_down(lambda h: h.softmax(-1)), tokens, UP_DOWN)
case("normalised units", lambda: up_down(lambda h: F.normalize(h, dim=-1)), tokens, UP_DOWN)
case(
    "mask over units", lambda: up_down(lambda h: torch.where(h > 0, h, h * 0.1).masked_fill(h > 2, 2)), tokens, UP_DOWN
)
case("order over positions", lambda: up_down(lambda h: h.cumsum(1).flip(1)), tokens, UP_DOWN)
case("sums by index over positions", lambda: up_down(lambda h: h[:, torch.tensor([0, 2, 1])]), tokens, UP_DOWN)

# spatial
case(
    "pool and interpolate",
    lambda: Net(
        lambda n, x: n.b(F.interpolate(F.avg_pool2d(n.a(x), 2), scale_factor=2, mode="bilinear")),
        a=conv(2, 4),
        b=conv(4, 3),
    ),
    images,
    {"a:channel": {"a.weight:0": [1], "a.bias:0": [1], "b.weight:1": [1]}},
)
case(
    "pixel shuffle",
    lambda: Net(lambda n, x: n.b(F.pixel_shuffle(n.a(x), 2)), a=conv(2, 12), b=conv(3, 3)),
    images,
    {"a:channel": {"a.weight:0": [4, 5, 6, 7], "a.bias:0": [4, 5, 6, 7], "b.weight:1": [1]}},
)
case(
    "pixel unshuffle",
    lambda: Net(lambda n, x: n.b(F.pixel_unshuffle(n.a(x), 2)), a=conv(2, 3), b=conv(12, 3)),
    images,
    {"a:channel": {"a.weight:0": [1], "a.bias:0": [1], "b.weight:1": [4, 5, 6, 7]}},
)
case(
    "channel shuffle: units of all groups alike",
    lambda: Net(lambda n, x: n.b(F.channel_shuffle(n.a(x), 2)), a=conv(2, 6), b=conv(6, 3)),
    images,
    {"a:channel": {"a.weight:0": [1, 4], "a.bias:0": [1, 4], "b.weight:1": [2, 3]}},
)
case(
    "unfold",
    lambda: Net(lambda n, x: n.fc(F.unfold(n.a(x), 2, stride=2).transpose(1, 2)), a=conv(2, 3), fc=nn.Linear(12, 3)),
    images,
    {"a:channel": {"a.weight:0": [1], "a.bias:0": [1], "fc.weight:1": [4, 5, 6, 7]}},
)

# products
case(
    "bilinear",
    lambda: Net(
        lambda n, x: n.down(n.two(n.a(x), n.b(x))),
        a=nn.Linear(6, 4),
        b=nn.Linear(6, 5),
        two=nn.Bilinear(4, 5, 7),
        down=nn.Linear(7, 3),
    ),
    tokens,
    {
        "a:neuron": {"a.weight:0": [1], "a.bias:0": [1], "two.weight:1": [1]},
        "b:neuron": {"b.weight:0": [1], "b.bias:0": [1], "two.weight:2": [1]},
        "two:neuron": {"two.weight:0": [1], "two.bias:0": [1], "down.weight:1": [1]},
    },
)
case(
    "einsum with a parameter",
    lambda: Net(
        lambda n, x: n.down(torch.einsum("btc,cd->btd", n.up(x), n.mix)),
        up=nn.Linear(6, 8),
        mix=nn.Parameter(torch.randn(8, 4)),
        down=nn.Linear(4, 3),
    ),
    tokens,
    {"up:neuron": {"mix:0": [1], **UP}, ":neuron": {"mix:1": [1], "down.weight:1": [1]}},
)
case(
    "matrix by hand",
    lambda: Net(
        lambda n, x: n.down(n.up(x) @ n.mix.t()),
        up=nn.Linear(6, 8),
        mix=nn.Parameter(torch.randn(4, 8)),
        down=nn.Linear(4, 3),
    ),
    tokens,
    {":neuron": {"mix:0": [1], "down.weight:1": [1]}, "up:neuron": {"mix:1": [1], **UP}},
)


# attention
def attention(n: Net, x: Tensor, eager: bool) -> Tensor:
    q, k, v = (part(x).unflatten(-1, (n.heads, -1)).transpose(1, 2) for part in (n.q, n.k, n.v))
    out = (q @ k.transpose(-1, -2)).softmax(-1) @ v if eager else F.scaled_dot_product_attention(q, k, v, scale=1.0)
    return n.o(out.transpose(1, 2).flatten(2))


class Attention(nn.Module):
    """4 heads of 2 on a stream of 6."""

    def __init__(self, eager: bool):
        super().__init__()
        self.heads, self.eager = 4, eager
        self.q, self.k, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 6)

    def forward(self, x):
        return attention(self, x, self.eager)


HEADS: Groups = {
    "q:head": {f"{part}:0": [2, 3] for name in "qkv" for part in (f"{name}.weight", f"{name}.bias")}
    | {"o.weight:1": [2, 3]},
    "q:head_dim": {f"{part}:0": [1, 3, 5, 7] for name in "qk" for part in (f"{name}.weight", f"{name}.bias")},
    "v:head_dim": {"v.weight:0": [1, 3, 5, 7], "v.bias:0": [1, 3, 5, 7], "o.weight:1": [1, 3, 5, 7]},
}
case("attention", lambda: Attention(False), tokens, HEADS)
case("attention by hand", lambda: Attention(True), tokens, HEADS)


class Fused(nn.Module):
    """One projection for queries, keys and values."""

    def __init__(self):
        super().__init__()
        self.heads = 4
        self.qkv, self.o = nn.Linear(6, 24, False), nn.Linear(8, 6)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.o(F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2))


case(
    "fused attention",
    Fused,
    tokens,
    {
        "qkv:head": {"qkv.weight:0": [2, 3, 10, 11, 18, 19], "o.weight:1": [2, 3]},
        "qkv:head_dim": {"qkv.weight:0": [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23], "o.weight:1": [1, 3, 5, 7]},
    },
)


class Grouped(nn.Module):
    """4 query heads on 2 key/value heads of 2."""

    def __init__(self):
        super().__init__()
        self.kv, self.repeats = 2, 2
        self.q, self.k, self.v, self.o = nn.Linear(6, 8), nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(8, 6)

    def forward(self, x):
        q = self.q(x).unflatten(-1, (-1, 2)).transpose(1, 2)
        k, v = (part(x).unflatten(-1, (-1, 2)).transpose(1, 2).repeat_interleave(2, 1) for part in (self.k, self.v))
        return self.o(F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).flatten(2))


case(
    "grouped queries",
    Grouped,
    tokens,
    {
        "q:kv_group": {
            "q.weight:0": [4, 5, 6, 7],
            "q.bias:0": [4, 5, 6, 7],
            "k.weight:0": [2, 3],
            "k.bias:0": [2, 3],
            "v.weight:0": [2, 3],
            "v.bias:0": [2, 3],
            "o.weight:1": [4, 5, 6, 7],
        }
    },
)
case(
    "packed attention of torch",
    lambda: Net(
        lambda n, x: n.down(n.attend(n.up(x), n.up(x), n.up(x), need_weights=False)[0]),
        up=nn.Linear(6, 8),
        attend=nn.MultiheadAttention(8, 4, batch_first=True),
        down=nn.Linear(8, 3),
    ),
    tokens,
    {
        "up:head": {
            "up.weight:0": [2, 3],
            "up.bias:0": [2, 3],
            "attend.in_proj_weight:0": [2, 3, 10, 11, 18, 19],
            "attend.in_proj_weight:1": [2, 3],
            "attend.in_proj_bias:0": [2, 3, 10, 11, 18, 19],
            "attend.out_proj.weight:0": [2, 3],
            "attend.out_proj.weight:1": [2, 3],
            "attend.out_proj.bias:0": [2, 3],
            "down.weight:1": [2, 3],
        },
        "up:head_dim": {
            "up.weight:0": [1, 3, 5, 7],
            "up.bias:0": [1, 3, 5, 7],
            "attend.in_proj_weight:0": list(range(1, 24, 2)),
            "attend.in_proj_weight:1": [1, 3, 5, 7],
            "attend.in_proj_bias:0": list(range(1, 24, 2)),
            "attend.out_proj.weight:0": [1, 3, 5, 7],
            "attend.out_proj.weight:1": [1, 3, 5, 7],
            "attend.out_proj.bias:0": [1, 3, 5, 7],
            "down.weight:1": [1, 3, 5, 7],
        },
    },
)

# recurrent
case(
    "lstm",
    lambda: Net(lambda n, x: n.down(n.rnn(x)[0]), rnn=nn.LSTM(6, 4, batch_first=True), down=nn.Linear(4, 3)),
    tokens,
    {
        "rnn:neuron": {
            "rnn.weight_ih_l0:0": [1, 5, 9, 13],
            "rnn.weight_hh_l0:0": [1, 5, 9, 13],
            "rnn.weight_hh_l0:1": [1],
            "rnn.bias_ih_l0:0": [1, 5, 9, 13],
            "rnn.bias_hh_l0:0": [1, 5, 9, 13],
            "down.weight:1": [1],
        }
    },
)
case(
    "gru in two directions",
    lambda: Net(
        lambda n, x: n.down(n.rnn(x)[0]),
        rnn=nn.GRU(6, 4, batch_first=True, bidirectional=True, bias=False),
        down=nn.Linear(8, 3),
    ),
    tokens,
    {
        "rnn:neuron": {
            "rnn.weight_ih_l0:0": [1, 5, 9],
            "rnn.weight_hh_l0:0": [1, 5, 9],
            "rnn.weight_hh_l0:1": [1],
            "rnn.weight_ih_l0_reverse:0": [1, 5, 9],
            "rnn.weight_hh_l0_reverse:0": [1, 5, 9],
            "rnn.weight_hh_l0_reverse:1": [1],
            "down.weight:1": [1, 5],
        }
    },
)


@pytest.mark.parametrize("name", CASES)
def test_the_groups_are_those_written_by_hand(name):
    torch.manual_seed(0)
    make, x, expected = CASES[name]
    model, batch = make(), Batch((x(),))
    structure = analyse(model, batch)
    assert groups(structure) == expected
    assert structure.unknown == []
    for site_name, site in structure.sites.items():
        assert site.kind.value == site_name.partition(":")[2].partition("#")[0]
        assert site.name == site_name
    check_cuts(model, batch, structure)


# --- what must stay -------------------------------------------------------------------------------

FROZEN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor], str]] = {
    "select": (lambda: up_down(lambda h: h * h[..., :1].select(-1, 0)[..., None]), tokens, "a fixed"),
    "unbind": (lambda: up_down(lambda h: torch.stack(h.unbind(-1)[::-1], -1)), tokens, "every index is used by itself"),
    "sort": (lambda: up_down(lambda h: h.sort(-1).values), tokens, "the order of units matters"),
    "cumsum": (lambda: up_down(lambda h: h.cumsum(-1)), tokens, "the order of units matters"),
    "flip": (lambda: up_down(lambda h: h.flip(-1)), tokens, "the order of units matters"),
    "roll": (lambda: up_down(lambda h: h.roll(1, -1)), tokens, "the order of units matters"),
    "argmax": (lambda: up_down(lambda h: h + h.argmax(-1, keepdim=True)), tokens, "a position is computed"),
    "gather": (lambda: up_down(lambda h: h.gather(-1, torch.zeros_like(h).long())), tokens, "units are looked up"),
    "index": (lambda: up_down(lambda h: h[..., torch.arange(7, -1, -1)]), tokens, "units are looked up by index"),
    "index_select": (lambda: up_down(lambda h: h.index_select(-1, torch.arange(8))), tokens, "units are looked up"),
    "conv over units": (
        lambda: Net(
            lambda n, x: n.down(n.c(n.up(x))), up=nn.Linear(6, 8), c=nn.Conv1d(5, 5, 3, padding=1), down=nn.Linear(8, 3)
        ),
        tokens,
        "it is convolved over",
    ),
    "fixed slice": (lambda: up_down(lambda h: h[..., 2:6], 8, 4), tokens, "the code fixes a size"),
    "fixed view": (lambda: up_down(lambda h: h.view(2, 5, 2, 4).flatten(2)), tokens, "the code fixes a size"),
    "unequal split": (lambda: up_down(lambda h: torch.cat(h.split([5, 3], -1), -1)), tokens, "the code fixes a size"),
    "complex": (
        lambda: up_down(lambda h: torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2)))).flatten(-2)),
        tokens,
        "it holds real and imaginary part",
    ),
    "triangle": (lambda: up_down(lambda h: h.tril()), tokens, "rows and columns are compared"),
    "table added": (
        lambda: Net(lambda n, x: n.down(n.up(x) + torch.arange(8.0)), up=nn.Linear(6, 8), down=nn.Linear(8, 3)),
        tokens,
        "must match a fixed size",
    ),
}


@pytest.mark.parametrize("name", FROZEN)
def test_units_that_are_told_apart_stay_and_say_why(name):
    torch.manual_seed(0)
    make, x, reason = FROZEN[name]
    model, batch = make(), Batch((x(),))
    structure = analyse(model, batch)
    stuck = [entry for entry in structure.frozen if reason in entry.reason]
    assert stuck, [entry.reason for entry in structure.frozen]
    assert any(entry.parameter.startswith(("up.", "down.")) for entry in stuck)
    check_cuts(model, batch, structure)


def test_the_output_is_never_cut():
    structure = analyse(nn.Linear(4, 3), Batch((torch.randn(2, 4),)))
    assert structure.sites == {}
    assert [(entry.parameter, entry.dim, entry.units) for entry in structure.frozen] == [
        ("weight", 0, 3),
        ("weight", 1, 4),
    ]
    assert structure.frozen[0].reason == "it is an output of the model"
    assert structure.frozen[1].reason == "must match a fixed size in 'Linear' (linear)"


# --- no rule, and one's own -----------------------------------------------------------------------


def test_an_operator_without_a_rule_is_frozen_and_listed():
    inner = Net(lambda n, x: torch.fft.fft(n.up(x)).real, up=nn.Linear(6, 8))
    model = nn.Sequential(inner, nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 3))
    batch = Batch((tokens(),))
    structure = analyse(model, batch)
    assert structure.unknown == [("0", "aten::_fft_r2c", "no rule for this operator; it was left whole")]
    assert list(structure.sites) == ["1:neuron"]
    stuck = [entry for entry in structure.frozen if entry.parameter == "0.up.weight" and entry.dim == 0]
    assert [entry.reason for entry in stuck] == ["no rule for this operator in '0' (_fft_r2c)"]
    check_cuts(model, batch, structure)


@pytest.fixture
def swap():
    """A custom operator: the two halves of the last dimension change places and one is doubled."""
    library = torch.library.Library("secateur_rules_test", "DEF")
    library.define("swap(Tensor x) -> Tensor")

    def compute(x: Tensor) -> Tensor:
        a, b = x.chunk(2, -1)
        return torch.cat([b, 2 * a], -1)

    library.impl("swap", compute, "CPU")
    library.impl("swap", torch.empty_like, "Meta")
    before = dict(OPERATORS)
    yield torch.ops.secateur_rules_test.swap
    OPERATORS.clear()
    OPERATORS.update(before)
    library._destroy()


def test_a_custom_operator_without_a_rule_is_frozen(swap):
    structure = analyse(up_down(swap), Batch((tokens(),)))
    assert structure.unknown == [("", "secateur_rules_test::swap", "no rule for this operator; it was left whole")]
    assert structure.sites == {}


def test_a_rule_for_a_custom_operator_is_added_in_a_call(swap):
    from secateur.structure.dims import concat, cut

    @operator("secateur_rules_test::swap")
    def halves(run, call):
        *rest, last = run.dims(call.args[0])
        first, second = cut(last, call.args[0].shape[-1] // 2, run.reason("halves change places"))
        run.same(first, second)
        run.set(call.out, [*rest, concat(second, first)])

    torch.manual_seed(0)
    model, batch = up_down(swap), Batch((tokens(),))
    structure = analyse(model, batch)
    assert structure.unknown == []
    assert groups(structure) == {"up:neuron": {"up.weight:0": [1, 5], "up.bias:0": [1, 5], "down.weight:1": [1, 5]}}
    check_cuts(model, batch, structure)


def test_a_rule_that_gives_wrong_sizes_is_named_and_what_it_touches_is_frozen(swap):
    @operator("secateur_rules_test::swap")
    def wrong(run, call):
        run.set(call.out, [1, *run.dims(call.args[0])])

    structure = analyse(up_down(swap), Batch((tokens(),)))
    assert [(name, "does not cover this call" in why) for _, name, why in structure.unknown] == [
        ("secateur_rules_test::swap", True)
    ]
    assert not structure.sites
    assert any("secateur_rules_test::swap" in entry.reason for entry in structure.frozen)


# --- kinds and costs ------------------------------------------------------------------------------


def test_kinds_of_units():
    kinds = {
        name: {site.kind for site in analyse(make(), Batch((x(),))).sites.values()}
        for name, (make, x, _) in CASES.items()
    }
    assert kinds["conv-bn-conv"] == {UnitKind.CHANNEL}
    assert kinds["linear"] == {UnitKind.NEURON}
    assert kinds["attention"] == {UnitKind.HEAD, UnitKind.HEAD_DIM}
    assert kinds["grouped queries"] == {UnitKind.KV_GROUP}


@pytest.mark.parametrize("name", CASES)
def test_the_cost_of_a_unit_is_what_the_model_loses(name):
    torch.manual_seed(0)
    make, x, _ = CASES[name]
    structure = analyse(make(), Batch((x(),)))
    dense = structure.parameters({})
    for site_name, site in structure.sites.items():
        assert dense - structure.parameters({site_name: site.units - 1}) == site.cost
