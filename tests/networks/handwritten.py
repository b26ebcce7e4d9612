"""Small networks as people write them by hand: each holds one way in which widths depend on one another."""

import functools
import itertools
import math

import torch
from network_tools import BATCH, Inputs, Network, entry, images, tensors, tokens
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm

CLASSES, VOCABULARY, LENGTH = 10, 40, 12


def conv_norm(width: int, out: int, kernel: int = 3, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution that keeps the size, batch normalisation, SiLU."""
    conv = nn.Conv2d(width, out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.SiLU())


class OptionA(nn.Module):
    """The shortcut without parameters: every second pixel, and zeros for the new channels."""

    def __init__(self, extra: int):
        super().__init__()
        self.extra = extra

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.extra // 2, self.extra // 2))


class CifarBlock(nn.Module):
    """Two convolutions and a shortcut."""

    def __init__(self, width: int, out: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.shortcut = OptionA(out - width) if stride != 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(out)) + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet-20 and -56 for CIFAR (He et al. 2016, section 4.2): widths 16, 32, 64, `depth` blocks each."""

    def __init__(self, depth: int):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        widths = [16, *[16] * depth, *[32] * depth, *[64] * depth]
        pairs = itertools.pairwise(widths)
        self.blocks = nn.Sequential(*[CifarBlock(a, b, 1 if a == b else 2) for a, b in pairs])
        self.head = nn.Linear(64, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


class UNet(nn.Module):
    """Two levels down, two up by transposed convolutions, concatenated with what was there before."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = conv_norm(3, 16), conv_norm(16, 32)
        self.bottom = conv_norm(32, 64)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join2, self.join1 = conv_norm(64, 32), conv_norm(32, 16)
        self.head = nn.Conv2d(16, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.down1(x)
        second = self.down2(F.max_pool2d(first, 2))
        bottom = self.bottom(F.max_pool2d(second, 2))
        x = self.join2(torch.cat([second, self.up2(bottom)], 1))
        return self.head(self.join1(torch.cat([first, self.up1(x)], 1)))


class MixerBlock(nn.Module):
    """Two small networks, one over the positions, one over the channels."""

    def __init__(self, length: int, width: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.over_tokens = nn.Sequential(nn.Linear(length, 24), nn.GELU(), nn.Linear(24, length))
        self.over_channels = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.over_tokens(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.over_channels(self.norm2(x))


class Mixer(nn.Module):
    """MLP-Mixer on 16 patches."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.blocks = nn.Sequential(MixerBlock(16, 32), MixerBlock(16, 32))
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        return self.head(self.norm(self.blocks(x)).mean(1))


class SuperResolution(nn.Module):
    """EDSR: residual blocks without norms, one long shortcut, pixel shuffle."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 24, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.Conv2d(24, 24, 3, padding=1)) for _ in range(3)
        )
        self.up = nn.Sequential(nn.Conv2d(24, 4 * 16, 3, padding=1), nn.PixelShuffle(2))
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = long = self.first(x)
        for block in self.blocks:
            x = x + 0.1 * block(x)
        return self.last(self.up(x + long))


class WaveNet(nn.Module):
    """Dilated causal 1-D convolutions with a gate; every layer feeds the next one and a common sum."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv1d(1, 16, 1)
        self.gated = nn.ModuleList(nn.Conv1d(16, 48, 2, dilation=2**i) for i in range(3))
        self.residual = nn.ModuleList(nn.Conv1d(24, 16, 1) for _ in range(3))
        self.skip = nn.ModuleList(nn.Conv1d(24, 20, 1) for _ in range(3))
        self.last = nn.Conv1d(20, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        x, total = self.first(x), 0
        for gated, residual, skip in zip(self.gated, self.residual, self.skip, strict=True):
            values, gate = gated(F.pad(x, (gated.dilation[0], 0))).chunk(2, dim=1)
            hidden = torch.tanh(values) * torch.sigmoid(gate)
            x, total = x + residual(hidden), total + skip(hidden)
        return self.last(F.relu(total))


class Volumes(nn.Module):
    """3-D convolutions, flattened in front of the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *[nn.Conv3d(2, 16, 3, padding=1), nn.BatchNorm3d(16), nn.ReLU(), nn.MaxPool3d(2)],
            *[nn.Conv3d(16, 24, (1, 3, 3), padding=(0, 1, 1)), nn.BatchNorm3d(24), nn.ReLU(), nn.MaxPool3d(2)],
        )
        self.head = nn.Linear(24 * 8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x).flatten(1))


class RecurrentClassifier(nn.Module):
    """The last state of an LSTM, or of a bidirectional GRU's two directions, side by side."""

    def __init__(self, bidirectional_gru: bool):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        kind = nn.GRU if bidirectional_gru else nn.LSTM
        self.rnn = kind(16, 24, batch_first=True, bidirectional=bidirectional_gru)
        self.head = nn.Linear(48 if bidirectional_gru else 24, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        _, state = self.rnn(self.embed(ids))
        hidden = state[0] if isinstance(state, tuple) else state
        return self.head(hidden.transpose(0, 1).flatten(1))


class Tagger(nn.Module):
    """A stacked LSTM with an output for every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.rnn = nn.LSTM(16, 24, num_layers=2, batch_first=True)
        self.head = nn.Linear(24, 7)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(ids))[0])


class Bottleneck(nn.Module):
    """Two convolutions and a shortcut, YOLO's."""

    def __init__(self, width: int):
        super().__init__()
        self.cv1, self.cv2 = conv_norm(width, width), conv_norm(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.cv2(self.cv1(x))


class C2f(nn.Module):
    """One convolution cut in two halves; all of what comes out of the blocks is concatenated."""

    def __init__(self, width: int, out: int, depth: int = 2):
        super().__init__()
        self.cv1, self.cv2 = conv_norm(width, out, 1), conv_norm((2 + depth) * out // 2, out, 1)
        self.m = nn.ModuleList(Bottleneck(out // 2) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.cv1(x).chunk(2, 1))
        parts.extend(block(parts[-1]) for block in self.m)
        return self.cv2(torch.cat(parts, 1))


class SPPF(nn.Module):
    """The same pooling three times in a row, concatenated."""

    def __init__(self, width: int):
        super().__init__()
        self.cv1, self.cv2 = conv_norm(width, width // 2, 1), conv_norm(2 * width, width, 1)
        self.pool = nn.MaxPool2d(5, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.cv1(x)]
        parts.extend(self.pool(parts[-1]) for _ in range(3))
        return self.cv2(torch.cat(parts, 1))


class Yolo(nn.Module):
    """YOLOv8 in small: backbone, neck that goes up and down again, heads at two scales, boxes decoded."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv_norm(3, 16, stride=2), conv_norm(16, 32, stride=2), C2f(32, 32))
        self.deep = nn.Sequential(conv_norm(32, 64, stride=2), C2f(64, 64), SPPF(64))
        self.up, self.down = C2f(96, 32), C2f(96, 64)
        self.again = conv_norm(32, 32, stride=2)
        self.boxes = nn.ModuleList(nn.Sequential(conv_norm(c, 16), nn.Conv2d(16, 4 * 8, 1)) for c in (32, 64))
        self.classes = nn.ModuleList(nn.Sequential(conv_norm(c, 24), nn.Conv2d(24, CLASSES, 1)) for c in (32, 64))
        self.register_buffer("bins", torch.arange(8.0))

    def forward(self, x: Tensor) -> Tensor:
        stem = self.stem(x)
        deep = self.deep(stem)
        up = self.up(torch.cat([F.interpolate(deep, scale_factor=2.0), stem], 1))
        down = self.down(torch.cat([self.again(up), deep], 1))
        heads = zip((up, down), self.boxes, self.classes, strict=True)
        found = torch.cat([torch.cat([box(x), label(x)], 1).flatten(2) for x, box, label in heads], 2)
        boxes, labels = found.split((4 * 8, CLASSES), 1)
        sides = boxes.view(x.shape[0], 4, 8, -1).softmax(2)
        return torch.cat([torch.einsum("nkba,b->nka", sides, self.bins), labels.sigmoid()], 1)


class FeaturePyramid(nn.Module):
    """Lateral convolutions whose outputs are added from the top down."""

    def __init__(self) -> None:
        super().__init__()
        self.stages = nn.ModuleList(conv_norm(a, b, stride=2) for a, b in ((3, 16), (16, 32), (32, 48)))
        self.lateral = nn.ModuleList(nn.Conv2d(c, 24, 1) for c in (16, 32, 48))
        self.smooth = nn.ModuleList(nn.Conv2d(24, 24, 3, padding=1) for _ in range(3))
        self.head = nn.Conv2d(24, 6, 1)

    def forward(self, x: Tensor) -> list[Tensor]:
        levels = []
        for stage in self.stages:
            x = stage(x)
            levels.append(x)
        sums = [self.lateral[2](levels[2])]
        for i in (1, 0):
            sums.insert(0, self.lateral[i](levels[i]) + F.interpolate(sums[0], size=levels[i].shape[-2:]))
        return [self.head(smooth(level)) for smooth, level in zip(self.smooth, sums, strict=True)]


class SqueezeExcite(nn.Module):
    """A gate per channel from the channels' means."""

    def __init__(self, width: int):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.expand(F.relu(self.reduce(x.mean((2, 3), keepdim=True)))).sigmoid()


class FiLM(nn.Module):
    """Scales and shifts computed from a second input, one linear layer for both; squeeze and excitation after it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 24, 3, padding=1), nn.Conv2d(24, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(24, affine=False)
        self.condition = nn.Sequential(nn.Linear(8, 16), nn.SiLU(), nn.Linear(16, 48))
        self.gate = SqueezeExcite(32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        scale, shift = self.condition(condition)[:, :, None, None].chunk(2, dim=1)
        x = F.relu(self.norm(self.conv1(x)) * (1 + scale) + shift)
        return self.head(self.gate(F.relu(self.conv2(x))).mean((2, 3)))


class GatedMLP(nn.Module):
    """`F.glu` over one layer, and a product of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(20, 64)
        self.gate, self.up, self.down = nn.Linear(32, 48), nn.Linear(32, 48), nn.Linear(48, 32)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.glu(self.first(x), dim=-1)
        return self.head(x + self.down(F.silu(self.gate(x)) * self.up(x)))


class FusedAttention(nn.Module):
    """One layer for queries, keys and values, taken apart by a reshape, as timm does."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4).unbind(0)
        attention = (q * self.scale @ k.transpose(-2, -1)).softmax(-1)
        return self.proj((attention @ v).transpose(1, 2).reshape(B, N, C))


class VitBlock(nn.Module):
    """Attention and a feed-forward network, norms first."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = FusedAttention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """ViT with a class token and learned positions."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 8, 8)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 32))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 17, 32))
        self.blocks = nn.Sequential(VitBlock(32, 4), VitBlock(32, 4))
        self.norm, self.head = nn.LayerNorm(32), nn.Linear(32, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


class HandRMSNorm(nn.Module):
    """Root mean square in single precision, then the scale."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        values = x.float()
        return self.weight * (values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def rotate(x: Tensor) -> Tensor:
    """Rotary positions for `[batch, heads, length, width]`."""
    half = x.shape[-1] // 2
    angles = torch.arange(x.shape[-2])[:, None] / 100 ** (torch.arange(half) / half)
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


class LlamaBlock(nn.Module):
    """Grouped heads: queries, keys and values of unequal widths split from one layer; gate and up from another."""

    def __init__(self, width: int, heads: int, groups: int, head_dim: int, inner: int):
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.norm1, self.norm2 = HandRMSNorm(width), HandRMSNorm(width)
        self.wqkv = nn.Linear(width, (heads + 2 * groups) * head_dim, bias=False)
        self.wo = nn.Linear(heads * head_dim, width, bias=False)
        self.w13, self.w2 = nn.Linear(width, 2 * inner, bias=False), nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        sizes = [self.heads * self.head_dim, self.groups * self.head_dim, self.groups * self.head_dim]
        parts = self.wqkv(self.norm1(x)).split(sizes, dim=-1)
        q, k, v = (part.view(n, length, -1, self.head_dim).transpose(1, 2) for part in parts)
        k, v = (part.repeat_interleave(self.heads // self.groups, 1) for part in (rotate(k), v))
        mixed = F.scaled_dot_product_attention(rotate(q), k, v, is_causal=True)
        x = x + self.wo(mixed.transpose(1, 2).reshape(n, length, -1))
        gate, up = self.w13(self.norm2(x)).chunk(2, dim=-1)
        return x + self.w2(F.silu(gate) * up)


class HandLlama(nn.Module):
    """Two such blocks between an embedding and a head of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.layers = nn.ModuleList(LlamaBlock(32, 4, 2, 8, 48) for _ in range(2))
        self.norm, self.head = HandRMSNorm(32), nn.Linear(32, VOCABULARY, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x))


class EinsumAttention(nn.Module):
    """Weights with axes of their own for heads and head width, contracted by einsum; cross-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.wq = nn.Parameter(torch.randn(32, 4, 8) * 32**-0.5)
        self.wk = nn.Parameter(torch.randn(24, 4, 8) * 24**-0.5)
        self.wv = nn.Parameter(torch.randn(24, 4, 8) * 24**-0.5)
        self.wo = nn.Parameter(torch.randn(4, 8, 32) * 32**-0.5)
        self.read, self.write = nn.Linear(6, 32), nn.Linear(6, 24)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x, memory = self.read(x), self.write(memory)
        q = torch.einsum("nld,dhk->nhlk", x, self.wq)
        k, v = (torch.einsum("nmd,dhk->nhmk", memory, w) for w in (self.wk, self.wv))
        attention = (torch.einsum("nhlk,nhmk->nhlm", q, k) / math.sqrt(8)).softmax(-1)
        mixed = torch.einsum("nhlm,nhmk->nhlk", attention, v)
        return self.head(x + torch.einsum("nhlk,hkd->nld", mixed, self.wo))


class ChannelShuffle(nn.Module):
    """Grouped and depthwise convolutions with the channels of the groups dealt out in between."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv_norm(3, 24)
        self.squeeze, self.depthwise = conv_norm(24, 48, 1, groups=3), conv_norm(48, 48, groups=48)
        self.expand = conv_norm(48, 24, 1, groups=3)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.squeeze(x)
        y = y.view(y.shape[0], 3, y.shape[1] // 3, *y.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.head((x + self.expand(self.depthwise(y))).mean((2, 3)))


class TiedLanguageModel(nn.Module):
    """The embedding is the head's weight, too."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.body = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
        self.head = nn.Linear(32, VOCABULARY)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        return self.head(x + self.body(x))


class Autoencoder1d(nn.Module):
    """Strided 1-D convolutions down, transposed ones up."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv1d(2, 16, 4, 2, 1), nn.ELU(), nn.Conv1d(16, 24, 4, 2, 1), nn.ELU())
        up = [nn.ConvTranspose1d(24, 16, 4, 2, 1), nn.ELU(), nn.ConvTranspose1d(16, 2, 4, 2, 1)]
        self.decoder = nn.Sequential(*up)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(x)
        return self.decoder(code), code


class UsedTwice(nn.Module):
    """One layer called twice, and one matrix that is read forwards and, transposed, backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.head = nn.Linear(12, 24), nn.Linear(24, 24), nn.Linear(24, CLASSES)
        self.matrix = nn.Parameter(torch.randn(16, 24) * 24**-0.5)
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(x))
        x = F.relu(self.again(F.relu(self.again(x))))
        code = F.relu(F.linear(x, self.matrix, self.bias))
        return self.head(F.linear(code, self.matrix.t()) + x)


class Masked(nn.Module):
    """A causal mask kept as a buffer, `torch.where`, and a second mask from the caller."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.key, self.value, self.query = nn.Linear(32, 24), nn.Linear(32, 40), nn.Linear(32, 24)
        self.out, self.head = nn.Linear(40, 32), nn.Linear(32, CLASSES)
        self.register_buffer("causal", torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril(), persistent=False)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        scores = self.query(x) @ self.key(x).transpose(1, 2) / math.sqrt(24)
        scores = torch.where(self.causal[: ids.shape[1], : ids.shape[1]] & mask[:, None], scores, -1e4)
        x = x + self.out(scores.softmax(-1) @ self.value(x))
        return self.head(x.masked_fill(~mask[..., None], 0.0).sum(1) / mask.sum(1, keepdim=True))


class Encoder(nn.Module):
    """PyTorch's own encoder layers; their fused path in eval mode skips the parts' forward."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        layer = nn.TransformerEncoderLayer(32, 4, 48, batch_first=True, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(ids)).mean(1))


class BagOfWords(nn.Module):
    """The mean of the words' vectors, and a small network."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCABULARY, 24, mode="mean")
        self.body = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, CLASSES))

    def forward(self, ids: Tensor) -> Tensor:
        return self.body(self.bag(ids))


def _weight_norm_net() -> nn.Module:
    convs = [weight_norm(nn.Conv2d(a, b, 3, 2, 1)) for a, b in ((3, 16), (16, 32))]
    pool = [nn.AdaptiveAvgPool2d(2), nn.Flatten()]
    return nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), *pool, weight_norm(nn.Linear(128, CLASSES)))


def _group_norm_net() -> nn.Module:
    body = [nn.Conv2d(3, 24, 3, 2, 1), nn.GroupNorm(4, 24), nn.SiLU(), nn.Conv2d(24, 32, 3, 2, 1), nn.GroupNorm(8, 32)]
    return nn.Sequential(*body, nn.SiLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, CLASSES))


def _instance_norm_net() -> nn.Module:
    norms = [nn.InstanceNorm2d(16, affine=True), nn.InstanceNorm2d(24)]
    up = [nn.Upsample(scale_factor=2), nn.ReflectionPad2d(1), nn.Conv2d(24, 3, 3), nn.Tanh()]
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), norms[0], nn.PReLU(16), nn.Conv2d(16, 24, 3, 2, 1), norms[1], nn.ReLU(), *up
    )


def _film_inputs() -> Inputs:
    return (torch.randn(BATCH, 3, 16, 16), torch.randn(BATCH, 8)), {}


def _cross_inputs() -> Inputs:
    return (torch.randn(BATCH, 5, 6), torch.randn(BATCH, 7, 6)), {}


def _masked_inputs() -> Inputs:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, LENGTH // 2 :] = False
    return (torch.randint(3, VOCABULARY, (BATCH, LENGTH)),), {"mask": mask}


def handwritten_networks() -> list[Network]:
    """All of the above."""
    text = tokens(VOCABULARY, LENGTH)
    table = {
        "cifar_resnet20": (functools.partial(CifarResNet, 3), images(32)),
        "cifar_resnet56": (functools.partial(CifarResNet, 9), images(32)),
        "unet": (UNet, images(32)),
        "mlp_mixer": (Mixer, images(32)),
        "super_resolution": (SuperResolution, images(16)),
        "wavenet": (WaveNet, tensors((1, 64))),
        "volumes": (Volumes, tensors((2, 8, 8, 8))),
        "lstm_classifier": (functools.partial(RecurrentClassifier, False), text),
        "bigru_classifier": (functools.partial(RecurrentClassifier, True), text),
        "lstm_tagger": (Tagger, text),
        "yolo": (Yolo, images(64)),
        "fpn": (FeaturePyramid, images(32)),
        "film": (FiLM, _film_inputs),
        "glu_mlp": (GatedMLP, tensors((20,))),
        "fused_vit": (VisionTransformer, images(32)),
        "fused_llama": (HandLlama, text),
        "einsum_attention": (EinsumAttention, _cross_inputs),
        "weight_norm_net": (_weight_norm_net, images(16)),
        "group_norm_net": (_group_norm_net, images(16)),
        "instance_norm_net": (_instance_norm_net, images(16)),
        "channel_shuffle": (ChannelShuffle, images(16)),
        "tied_lm": (TiedLanguageModel, text),
        "autoencoder_1d": (Autoencoder1d, tensors((2, 64))),
        "used_twice": (UsedTwice, tensors((12,))),
        "masked": (Masked, _masked_inputs),
        "torch_encoder": (Encoder, text),
        "bag_of_words": (BagOfWords, text),
    }
    return [entry("hand-written", name, make, inputs) for name, (make, inputs) in table.items()]
