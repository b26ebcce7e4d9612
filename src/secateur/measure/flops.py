"""Floating-point operations of one forward pass, dense and as an ideal sparse kernel would do them.

Convention: one multiply-add is 2 FLOPs. Counted are matrix products, convolutions, attention (the
full square: causal masking saves nothing) and LSTM layers; element-wise work, norms, softmax and
look-ups count nothing, as in torch's own counter. A custom kernel the counter cannot see into counts
nothing either.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from secateur.core.method import Batch
from secateur.data.running import evaluating, logits

CONVENTION = "one multiply-add = 2 FLOPs; matrix products, convolutions, attention and LSTM layers"

aten = torch.ops.aten
Formula = Callable[..., int]

CONVOLUTIONS = (aten.convolution, aten._convolution, aten.cudnn_convolution, aten.convolution_overrideable)


@dataclass(frozen=True)
class Flops:
    """FLOPs of one forward pass.

    Attributes:
        total: with every weight taken as non-zero.
        effective: with each product scaled by the density of the weight in it.
    """

    total: int
    effective: int


def flops(model: nn.Module, batch: Batch) -> int:
    """FLOPs of one forward pass over `batch`; one multiply-add is 2 FLOPs.

    Raises:
        ModelError: the model cannot be run on the batch.
    """
    return count(model, batch).total


def effective_flops(model: nn.Module, batch: Batch) -> int:
    """FLOPs a kernel would need that skips every zero weight and nothing else.

    A bound, not a promise: `machine.probe_machine` says what zeros bring on the machine at hand.
    """
    return count(model, batch).effective


def count(model: nn.Module, batch: Batch) -> Flops:
    """Both counts from one forward pass.

    A product's weight is recognised by its memory: a view of a parameter, or of a parametrised weight.
    Weights that are computed or copied inside the forward pass (autocast, for instance) count as dense.

    Raises:
        ModelError: the model cannot be run on the batch.
    """
    from torch.utils.flop_counter import FlopCounterMode

    with evaluating(model), parametrize.cached(), _no_fused_transformer_layers():
        tally = _Tally(_weight_storages(model))
        counter = FlopCounterMode(display=False, custom_mapping=tally.formulas())
        with counter:
            logits(model, batch)
    total = counter.get_total_flops()
    return Flops(total, total - tally.saved)


@contextlib.contextmanager
def _no_fused_transformer_layers() -> Iterator[None]:
    # torch.nn's fused encoder layer is one operator, which torch's counter takes for no work at all
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _weight_storages(model: nn.Module) -> set[int]:
    weights = [parameter for parameter in model.parameters() if parameter.dim() >= 2]
    for module in model.modules():
        if parametrize.is_parametrized(module):
            # inside parametrize.cached() this is the very tensor that the forward pass will use
            weights += [getattr(module, name) for name in module.parametrizations]  # type: ignore[union-attr]
    return {weight.untyped_storage().data_ptr() for weight in weights} - {0}


class _Tally:
    """Adds up the FLOPs that zeros in weights would save, operator by operator."""

    def __init__(self, storages: set[int]):
        self.storages = storages
        self.saved = 0

    def formulas(self) -> dict[Any, Formula]:
        """Operator -> formula that also looks at the weights, for FlopCounterMode."""
        from torch.utils.flop_counter import flop_registry

        places: dict[Any, tuple[int, ...]] = {
            aten.mm: (0, 1),
            aten.bmm: (0, 1),
            aten.addmm: (1, 2),
            aten.baddbmm: (1, 2),
            **dict.fromkeys(CONVOLUTIONS, (1,)),
        }
        found = {operator: self._watch(flop_registry[operator], where) for operator, where in places.items()}
        found |= {operator: self._watch(_grouped, (0, 1)) for operator in _grouped_products()}
        found[aten.mkldnn_rnn_layer] = _raw(self._lstm)
        attention = flop_registry[aten._scaled_dot_product_flash_attention]
        return {**found, aten._scaled_dot_product_flash_attention_for_cpu: _raw(attention)}

    def _watch(self, formula: Formula, places: tuple[int, ...]) -> Formula:
        def watched(*args: Any, **kwargs: Any) -> int:
            total = int(formula(*args, **kwargs))
            self.saved += max((self._zero_share(args[place], total) for place in places), default=0)
            return total

        return _raw(watched)

    def _zero_share(self, operand: Tensor, total: int) -> int:
        if operand.untyped_storage().data_ptr() not in self.storages or not operand.numel():
            return 0
        kept = int(torch.count_nonzero(operand))
        return total - total * kept // operand.numel()

    def _lstm(self, x: Tensor, input_weight: Tensor, hidden_weight: Tensor, *_: Any, **__: Any) -> int:
        steps = prod(x.shape[:-1])  # x: (time, batch, features)
        shares = [2 * steps * weight.numel() for weight in (input_weight, hidden_weight)]
        self.saved += self._zero_share(input_weight, shares[0]) + self._zero_share(hidden_weight, shares[1])
        return sum(shares)


def _raw(formula: Formula) -> Formula:
    # the mark by which FlopCounterMode hands over tensors and not only their shapes
    def taking_tensors(*args: Any, **kwargs: Any) -> int:
        return int(formula(*args, **kwargs))

    taking_tensors._get_raw = True  # type: ignore[attr-defined]
    return taking_tensors


def _grouped_products() -> list[Any]:
    """The operators that mixtures of experts use, as far as this process has them."""
    own = getattr(aten, "_grouped_mm", None)
    transformers = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return [operator for operator in (own, transformers) if operator is not None]


def _grouped(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    # every row of `a` meets one group of `b`, whichever of the two is the stacked one
    groups = a.shape[0] if a.dim() == b.dim() == 3 else 1
    return 2 * groups * a.shape[-2] * a.shape[-1] * b.shape[-1]
