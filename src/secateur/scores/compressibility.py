"""How unevenly magnitudes are spread: the PQ index and the Gini index. Higher = sparser = more can go.

Both look at the entries that a mask keeps, not at the non-zeros: a kept weight that happens to be 0 counts, a
removed one does not. With the removed zeros in, every round of pruning would raise the index and ask for more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from secateur.core.errors import NumericsError, SettingsError
from secateur.core.select import all_finite

P, Q = 0.5, 1.0  # the pair that reports show
CHUNK = 1 << 22  # entries widened to float64 at a time
TINY = 1e-7  # the official Gini index adds it to every magnitude


def pq_index(values: Tensor, mask: Tensor | None = None, p: float = P, q: float = Q, where: str = "weights") -> Tensor:
    """I = 1 - d^(1/q - 1/p) ||w||_p / ||w||_q over the d kept entries (Diao et al. 2023, definition 1).

    Written with power means, so it depends neither on scale nor on how often the vector is repeated. 0 for equal
    magnitudes, 1 - d^(1/q - 1/p) for a single non-zero; 0 as well where nothing is kept or all is zero.

    Args:
        values: `[..., n]`; every row on its own.
        mask: the same shape, True = kept; everything without one.
        p: above 0; below 1 the quasi-norm with outer power 1/p.
        q: above p.
        where: name for the error.

    Returns:
        float64 `[...]`, in [0, 1).

    Raises:
        SettingsError: not 0 < p < q.
        NumericsError: NaN or infinity among the kept entries.
    """
    check_powers(p, q)
    size, kept = _kept(values, mask, where)
    scale = size.amax(-1, keepdim=True) if size.shape[-1] else size.new_ones(*size.shape[:-1], 1)
    size = size / torch.where(scale > 0, scale, 1.0)  # powers neither overflow nor vanish
    return index_of_sums(kept.sum(-1), _powers(size, p).sum(-1), _powers(size, q).sum(-1), p, q)


def index_of_sums(count: Tensor, low: Tensor, high: Tensor, p: float, q: float) -> Tensor:
    """The PQ index from d, sum |w|^p and sum |w|^q; sums of several tensors may be added before."""
    some = high > 0
    d, low, high = count.clamp(min=1).double(), torch.where(some, low, 1.0), torch.where(some, high, 1.0)
    ratio = (low / d) ** (1 / p) / (high / d) ** (1 / q)
    return torch.where(some, (1 - ratio).clamp(min=0), 0.0)  # rounding may go below 0


def power_sums(values: Tensor, p: float = P, q: float = Q) -> tuple[int, float, float]:
    """Number of non-zeros, sum |w|^p and sum |w|^q in float64, a part at a time: for weights of any size."""
    count, low, high = 0, 0.0, 0.0
    for part in torch.split(values.detach().reshape(-1), CHUNK):
        size = part.double().abs()
        count += int(torch.count_nonzero(size))
        low, high = low + float(_powers(size, p).sum()), high + float(_powers(size, q).sum())
    return count, low, high


def retained(count: Tensor, index: Tensor, p: float, q: float, eta: float = 0.0) -> Tensor:
    """r: the fewest entries with which the rest stays a share eta of them (Diao et al. 2023, theorem 2).

    r = ceil(d (1 + eta)^(-q/(q-p)) (1 - I)^(pq/(q-p))), where eta bounds the sum of |w|^p over the entries that go
    relative to the r largest.

    Args:
        count: d, integers `[...]`.
        index: I, `[...]`.
        p: the index's lower power.
        q: its upper one.
        eta: 0 or more.

    Returns:
        int64 `[...]`, at most d.
    """
    check_powers(p, q)
    bound = count.double() * (1 + eta) ** (-q / (q - p)) * (1 - index.double()) ** (p * q / (q - p))
    return torch.minimum(bound.ceil().long(), count.long())


def gini(values: Tensor, mask: Tensor | None = None, where: str = "weights") -> Tensor:
    """G = sum_i (2i - d - 1) x_i / (d sum x) over the d kept magnitudes in ascending order, i = 1..d.

    As in the official code of Diao et al. 2023, 1e-7 is added to every magnitude.

    Args:
        values: `[..., n]`; every row on its own.
        mask: the same shape, True = kept; everything without one.
        where: name for the error.

    Returns:
        float64 `[...]`, in [0, 1); 0 where nothing is kept.

    Raises:
        NumericsError: NaN or infinity among the kept entries.
    """
    size, kept = _kept(values, mask, where)
    count = kept.sum(-1, keepdim=True)
    size = torch.where(kept, size + TINY, 0.0).sort(-1).values  # removed ones come first
    rank = torch.arange(1, size.shape[-1] + 1, device=size.device) - (size.shape[-1] - count)
    spread = ((2 * rank - count - 1) * size).sum(-1)
    return torch.where(count.squeeze(-1) > 0, spread / (count.squeeze(-1) * size.sum(-1)).clamp(min=TINY), 0.0)


def check_powers(p: float, q: float) -> None:
    """Refuse what is no pair of powers.

    Raises:
        SettingsError: not 0 < p < q.
    """
    if not 0 < p < q:
        raise SettingsError(f"the PQ index needs 0 < p < q, got p={p:g}, q={q:g}")


def _kept(values: Tensor, mask: Tensor | None, where: str) -> tuple[Tensor, Tensor]:
    """Magnitudes in float64, 0 where removed, and the mask."""
    values = values.detach()
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else mask.to(values.device)
    size = values.double().abs().masked_fill(~kept, 0)
    if not all_finite(size):
        raise NumericsError(f"{where}: kept entries are NaN or infinite; repair the model or lower the learning rate")
    return size, kept


def _powers(size: Tensor, power: float) -> Tensor:
    """size^power; 0 stays 0, the usual powers are fast."""
    if power == 1.0:
        return size
    return size.sqrt() if power == 0.5 else size**power
