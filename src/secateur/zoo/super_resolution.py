"""Untrained super-resolution networks: images `[n, 3, h, w]` in [0, 1] to `[n, 3, scale * h, scale * w]`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Residual(nn.Module):
    """x + conv(relu(conv(x))), without norms (Lim et al. 2017)."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, channels, h, w]` -> the same."""
        y: Tensor = x + self.conv2(F.relu(self.conv1(x)))
        return y


class SmallEDSR(nn.Module):
    """EDSR (Lim et al. 2017, arXiv 1707.02921), small: residual blocks at low resolution, pixel shuffle at the end."""

    def __init__(self, channels: int = 16, blocks: int = 2, scale: int = 2):
        super().__init__()
        self.head = nn.Conv2d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(_Residual(channels) for _ in range(blocks)))
        self.after = nn.Conv2d(channels, channels, 3, padding=1)
        self.tail = nn.Conv2d(channels, 3 * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, images: Tensor) -> Tensor:
        """`[n, 3, h, w]` -> `[n, 3, scale * h, scale * w]`."""
        x = self.head(images)
        large: Tensor = self.shuffle(self.tail(x + self.after(self.blocks(x))))
        return large


class WindowAttention(nn.Module):
    """Self-attention inside windows, with a learned bias per relative position (Liu et al. 2021, section 3.2)."""

    def __init__(self, width: int, heads: int, window: int):
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        rows, columns = torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")
        places = torch.stack([rows.flatten(), columns.flatten()])
        offsets = places[:, :, None] - places[:, None, :] + window - 1  # (2, window^2, window^2)
        self.register_buffer("offset", offsets[0] * (2 * window - 1) + offsets[1], persistent=False)

    def forward(self, x: Tensor, blocked: Tensor | None) -> Tensor:
        """`[windows, tokens, width]` -> the same; `blocked` is added to the scores, `[windows per image, 1, T, T]`."""
        n, tokens, width = x.shape
        q, k, v = self.qkv(x).view(n, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        assert isinstance(self.offset, Tensor)
        scores = self.bias[self.offset].permute(2, 0, 1).unsqueeze(0)  # (1, heads, tokens, tokens)
        if blocked is not None:
            scores = scores + blocked.repeat(n // len(blocked), 1, 1, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, scores.expand(n, -1, -1, -1))
        found: Tensor = self.out(mixed.transpose(1, 2).reshape(n, tokens, width))
        return found


class SwinLayer(nn.Module):
    """Attention in windows, shifted by half a window in every other layer, then an MLP; norms come first."""

    def __init__(self, width: int, heads: int, window: int, shifted: bool):
        super().__init__()
        self.window, self.shift = window, window // 2 if shifted else 0
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = WindowAttention(width, heads, window)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, h, w, width]` -> the same; h and w are multiples of the window."""
        n, h, w, _ = x.shape
        y = torch.roll(self.norm1(x), (-self.shift, -self.shift), (1, 2))
        y = self.attention(self._cut(y), self._blocked(h, w, x))
        y = self._join(y, n, h, w)
        x = x + torch.roll(y, (self.shift, self.shift), (1, 2))
        mixed: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return mixed

    def _cut(self, x: Tensor) -> Tensor:
        """`[n, h, w, width]` -> `[n * windows, window^2, width]`."""
        n, h, w, width = x.shape
        size = self.window
        return x.view(n, h // size, size, w // size, size, width).transpose(2, 3).reshape(-1, size**2, width)

    def _join(self, x: Tensor, n: int, h: int, w: int) -> Tensor:
        size = self.window
        return x.view(n, h // size, w // size, size, size, -1).transpose(2, 3).reshape(n, h, w, -1)

    def _blocked(self, h: int, w: int, like: Tensor) -> Tensor | None:
        """Pixels that the shift brought together from opposite sides do not see each other."""
        if not self.shift:
            return None
        edges = [torch.arange(side, device=like.device) for side in (h, w)]
        bands = [(e >= s - self.window).int() + (e >= s - self.shift).int() for e, s in zip(edges, (h, w), strict=True)]
        region = (3 * bands[0][:, None] + bands[1]).view(1, h, w, 1)
        regions = self._cut(region).squeeze(-1)  # (windows, tokens)
        apart = regions[:, :, None] != regions[:, None, :]
        return (
            torch.zeros(apart.shape, dtype=like.dtype, device=like.device).masked_fill(apart, -torch.inf).unsqueeze(1)
        )


class SmallSwinIR(nn.Module):
    """SwinIR (Liang et al. 2021, arXiv 2108.10257), small: one residual group of Swin layers between convolutions."""

    def __init__(self, width: int = 24, layers: int = 4, heads: int = 4, window: int = 4, scale: int = 2):
        super().__init__()
        self.window = window
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.layers = nn.ModuleList(SwinLayer(width, heads, window, bool(i % 2)) for i in range(layers))
        self.norm = nn.LayerNorm(width)
        self.after = nn.Conv2d(width, width, 3, padding=1)
        self.tail = nn.Conv2d(width, 3 * scale**2, 3, padding=1)
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, images: Tensor) -> Tensor:
        """`[n, 3, h, w]` of any size -> `[n, 3, scale * h, scale * w]`."""
        h, w = images.shape[-2:]
        x = F.pad(images, (0, -w % self.window, 0, -h % self.window), mode="replicate")
        x = self.head(x)
        y = x.permute(0, 2, 3, 1)
        for layer in self.layers:
            y = layer(y)
        x = x + self.after(self.norm(y).permute(0, 3, 1, 2))
        large: Tensor = self.shuffle(self.tail(x))
        scale = large.shape[-1] // x.shape[-1]
        return large[..., : h * scale, : w * scale]


def small_edsr(channels: int = 16, blocks: int = 2, scale: int = 2) -> SmallEDSR:
    """A convolutional network; weights drawn from torch's global generator."""
    return SmallEDSR(channels, blocks, scale)


def small_swinir(width: int = 24, layers: int = 4, scale: int = 2) -> SmallSwinIR:
    """A network of shifted-window transformers."""
    return SmallSwinIR(width, layers, scale=scale)
