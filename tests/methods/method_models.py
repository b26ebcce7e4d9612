"""Small models and oracles that the methods' tests share."""

import copy

import numpy as np
import torch
from torch import Tensor, nn


def inputs(*shape: int, seed: int = 0) -> Tensor:
    """Correlated float32 inputs with features of different scale, the last dimension being the features."""
    rng = torch.Generator().manual_seed(seed)
    mixing = torch.randn(shape[-1], shape[-1], generator=rng) / shape[-1] ** 0.5
    return (torch.randn(shape, generator=rng) @ mixing) * torch.exp(torch.randn(shape[-1], generator=rng))


def linear(weight: Tensor) -> nn.Linear:
    """A layer without bias."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight = nn.Parameter(weight)
    return layer


class Block(nn.Module):
    """x + down(relu(up(x)))."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


class Stacked(nn.Module):
    """Blocks one after the other."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x


def stacked(blocks: int = 2, width: int = 12, inner: int = 20, seed: int = 0) -> Stacked:
    """A stack of `Block`s."""
    torch.manual_seed(seed)
    return Stacked(*(Block(width, inner) for _ in range(blocks)))


class Experts(nn.Module):
    """A block whose tokens go to experts by the sign of their first feature; the third gets none."""

    def __init__(self, width: int):
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = flat.clone()
        positive = flat[:, 0] > 0
        for expert, chosen in zip(self.experts, (positive, ~positive, positive & ~positive), strict=True):
            if chosen.any():
                out[chosen] += expert(flat[chosen])
        return out.view_as(x)


def tiny_gpt2(width: int = 16, blocks: int = 2) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=40, n_embd=width, n_layer=blocks, n_head=2, n_positions=32, bos_token_id=None, eos_token_id=None
    )
    model = GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # the default initialisation is so small that blocks do nothing
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def with_linears(model: nn.Module) -> nn.Module:
    """The same function with every transformers `Conv1D` as a `Linear`."""
    from transformers.pytorch_utils import Conv1D

    clone = copy.deepcopy(model)
    for name, module in list(clone.named_modules()):
        if isinstance(module, Conv1D):
            layer = nn.Linear(module.nx, module.nf)
            layer.weight = nn.Parameter(module.weight.detach().t().contiguous())
            layer.bias = module.bias
            parent, _, leaf = name.rpartition(".")
            setattr(clone.get_submodule(parent), leaf, layer)
    return clone


def lowest_per_row(scores: np.ndarray, remove: int) -> np.ndarray:
    """Keep-mask without the `remove` lowest of each row, ties to the lower column; a plain loop."""
    keep = np.ones(scores.shape, dtype=bool)
    for row in range(len(scores)):
        order = sorted(range(scores.shape[1]), key=lambda column: (scores[row, column], column))
        keep[row, order[:remove]] = False
    return keep


def wanda_scores(weight: Tensor, entering: Tensor) -> np.ndarray:
    """|W| times the norm of each input feature, in float64."""
    norms = np.sqrt((entering.double().reshape(-1, entering.shape[-1]).numpy() ** 2).sum(0))
    return np.abs(weight.detach().double().numpy()) * norms
