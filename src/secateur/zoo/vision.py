"""Untrained classifiers of the digits: images `[n, 1, 8, 8]` in [0, 1] to logits `[n, 10]`."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def digits_mlp() -> nn.Sequential:
    """An MLP 64-512-512-10 with ReLU."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(64, 512),
        nn.ReLU(),
        nn.Linear(512, 512),
        nn.ReLU(),
        nn.Linear(512, 10),
    )


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm, added to the input (He et al. 2016, figure 2).

    Where the number of channels or the size changes, the input passes a 1x1 convolution first.
    """

    def __init__(self, channels: int, out: int, stride: int = 1):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        """`[n, channels, h, w]` -> `[n, out, h / stride, w / stride]`."""
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


def _stage(channels: int, out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(ResidualBlock(channels, out, stride), ResidualBlock(out, out))


class DigitsResNet(nn.Module):
    """A residual network for 8x8 images: stages of 16, 32, 64 channels at 8x8, 4x4, 2x2."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.stage1 = _stage(16, 16, 1)
        self.stage2 = _stage(16, 32, 2)
        self.stage3 = _stage(32, 64, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(64, 10)

    def forward(self, images: Tensor) -> Tensor:
        """`[n, 1, 8, 8]` -> logits `[n, 10]`."""
        x = self.stage3(self.stage2(self.stage1(self.stem(images))))
        logits: Tensor = self.head(self.pool(x).flatten(1))
        return logits


def digits_resnet() -> DigitsResNet:
    """A residual CNN with BatchNorm; 3 stages of 2 blocks."""
    return DigitsResNet()


def digits_vit() -> nn.Module:
    """A `ViTForImageClassification`: 16 patches of 2x2, width 64, 4 layers, 4 heads."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        image_size=8,
        patch_size=2,
        num_channels=1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=128,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={digit: str(digit) for digit in range(10)},
        label2id={str(digit): digit for digit in range(10)},
    )
    model: nn.Module = ViTForImageClassification(config)
    return model


def digits_processor() -> dict[str, object]:
    """`preprocessor_config.json` for images in files: 8x8, one channel, bytes 0..255 scaled to [0, 1].

    This is the range of `zoo:digits`, whose pixels 0..16 are divided by 16; nothing else is done.
    """
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": 8, "width": 8},
        "resample": 2,
        "do_convert_rgb": False,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [0.0],
        "image_std": [1.0],
    }
