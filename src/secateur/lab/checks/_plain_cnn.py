"""A plain CNN on the digits, trained per seed in seconds: three convolutions with batch norms, each width its own."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.plan import Plan
from secateur.core.progress import Progress
from secateur.core.seeding import seeded
from secateur.lab.checks._digits import digits
from secateur.recover import Request, find


class PlainCNN(nn.Module):
    """Convolutions at 8x8, 8x8 and 4x4 pixels, a linear layer over 2x2 positions."""

    def __init__(self, widths: Sequence[int]):
        super().__init__()
        first, second, third = widths
        self.conv1, self.norm1 = nn.Conv2d(1, first, 3, padding=1, bias=False), nn.BatchNorm2d(first)
        self.conv2, self.norm2 = nn.Conv2d(first, second, 3, padding=1, bias=False), nn.BatchNorm2d(second)
        self.conv3, self.norm3 = nn.Conv2d(second, third, 3, padding=1, bias=False), nn.BatchNorm2d(third)
        self.head = nn.Linear(4 * third, 10)

    def forward(self, images: Tensor) -> Tensor:
        """`[n, 1, 8, 8]` -> logits `[n, 10]`."""
        x = F.relu(self.norm1(self.conv1(images)))
        x = F.max_pool2d(F.relu(self.norm2(self.conv2(x))), 2)
        x = F.max_pool2d(F.relu(self.norm3(self.conv3(x))), 2)
        logits: Tensor = self.head(x.flatten(1))
        return logits


def trained_cnn(widths: Sequence[int], seed: int, progress: Progress, steps: int = 300) -> PlainCNN:
    """After so many steps of SGD (0.05, cosine, weight decay 5e-4)."""
    with seeded(seed):
        model = PlainCNN(widths)
    recovery = find("finetune")
    settings = {"steps": steps, "lr": 0.05, "optimizer": "sgd", "weight_decay": 5e-4}
    recovery.run(Request(model, Plan({}, {}), digits().calibration, seed, progress), recovery.configure(settings))
    return model.eval()
