"""How far a changed model is from the dense one, on small samples of data: what searches minimise.

The dense model's answers are found once, before anything is changed, and kept in the task's journal: its highest
`topk` logits at every position, and if asked for the hidden states after some blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from secateur.core.distributed import share, total
from secateur.core.errors import DataError
from secateur.core.journal import Notes, Section
from secateur.core.method import Batch
from secateur.core.progress import Progress, track
from secateur.data.batches import joined, split_batch, token_losses, token_mask
from secateur.data.running import evaluating
from secateur.search.prefix import ROOM, PrefixRuns, run_order
from secateur.stats.catching import hidden_of


class Target(StrEnum):
    """What a candidate is judged by."""

    SPARSE_KL = "sparse_kl"  # KL to the dense model among its highest logits
    KL = "kl"  # KL over all logits
    PPL = "ppl"  # the candidate's own perplexity on the text


@dataclass(frozen=True)
class Objective:
    """beta KL(dense || candidate) + alpha sum over some blocks of |h_dense - h|^2, both means over tokens.

    Attributes:
        target: the first term.
        topk: logits that `sparse_kl` compares, the dense model's highest; both sides are normalised among them.
        beta: weight of the first term.
        alpha: weight of the second.
        depths: the second term's blocks, as shares of the way through the model.
    """

    target: Target = Target.SPARSE_KL
    topk: int = 8192
    beta: float = 1.0
    alpha: float = 0.0
    depths: tuple[float, ...] = (0.0, 0.5, 1.0)

    def hidden_blocks(self, blocks: int) -> list[int]:
        """The blocks whose output counts."""
        return sorted({round(depth * (blocks - 1)) for depth in self.depths}) if self.alpha and blocks else []


def positions(logits: Tensor) -> Tensor:
    """Logits by sample and position, `[samples, positions, classes]`; the last position of text predicts nothing."""
    return logits[:, :-1] if logits.dim() == 3 else logits[:, None]


def divergence(student: Tensor, values: Tensor, index: Tensor | None) -> Tensor:
    """KL(teacher || student) at every position, in nats.

    Args:
        student: logits `[..., classes]`.
        values: the teacher's logits `[..., k]`.
        index: int64 `[..., k]`, their classes; None for all of them. Both sides are normalised among them.
    """
    own = student.float() if index is None else student.float().gather(-1, index)
    own, dense = own.log_softmax(-1), values.float().log_softmax(-1)
    return F.kl_div(own, dense, reduction="none", log_target=True).sum(-1)


@dataclass(frozen=True)
class Minibatch:
    """Samples on which the candidates of one stage are compared, in batches.

    Attributes:
        batches: what the model is run on.
        samples: which samples each holds.
        lengths: how many positions of each sample count, the last of them perhaps fewer than it has.
    """

    batches: list[Batch]
    samples: list[list[int]]
    lengths: list[int]


class Samples:
    """The data of a search, sample by sample.

    Raises:
        DataError: there is none.
    """

    def __init__(self, batches: Sequence[Batch]):
        self.items = [one for batch in batches for one in split_batch(batch)]
        if not self.items:
            raise DataError("the search needs data; give data=... (--data)")
        self.together = max(batch.samples for batch in batches)

    def length(self, index: int) -> int:
        """Tokens of a sample; 1 where samples are no token ids."""
        return _length(self.items[index])

    def draw(self, size: int, rng: torch.Generator) -> Minibatch:
        """Samples without repetition with exactly `size` tokens, the last one cut; all there are where those are fewer.

        Of several processes that split the data each draws its part from its own.
        """
        wanted = -(-size // share()[1])
        drawn: list[tuple[int, int]] = []  # (sample, tokens of it)
        for index in torch.randperm(len(self.items), generator=rng).tolist():
            length = min(self.length(index), wanted)
            if length < min(2, self.length(index)):
                break  # one token of a text predicts nothing
            drawn.append((index, length))
            wanted -= length
        return self._in_batches(drawn or [(0, self.length(0))])

    def _in_batches(self, drawn: list[tuple[int, int]]) -> Minibatch:
        groups: list[list[tuple[int, int]]] = []
        for index, length in drawn:
            if not groups or len(groups[-1]) == self.together or length != groups[-1][0][1]:
                groups.append([])
            groups[-1].append((index, length))
        return Minibatch(
            [joined([_cut(self.items[index], length) for index, length in group]) for group in groups],
            [[index for index, _ in group] for group in groups],
            [group[0][1] for group in groups],
        )


def _length(item: Batch) -> int:
    first = item.tensors[0]
    return int(first.shape[1]) if first.dim() == 2 and first.dtype == torch.int64 else 1


def _cut(item: Batch, length: int) -> Batch:
    """The first `length` tokens."""
    whole = _length(item)
    if length == whole:
        return item

    def shorter(value: object) -> object:
        per_token = isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == whole
        return value[:, :length] if per_token and isinstance(value, Tensor) else value

    return Batch(tuple(map(shorter, item.args)), {key: shorter(value) for key, value in item.kwargs.items()})


class Teacher:
    """The dense model's answers on all samples, in a section of a journal.

    Args:
        objective: says what is needed.
        samples: of the search.
        section: where the answers are kept.
        blocks: how many the model has in a row; 0 if no hidden states are to be compared.
    """

    def __init__(self, objective: Objective, samples: Samples, section: Section, blocks: int):
        self.objective, self.samples, self.section = objective, samples, section
        self.hidden = objective.hidden_blocks(blocks)

    def ask(self, model: nn.Module, blocks: Sequence[nn.Module], progress: Progress) -> None:
        """Find what is missing.

        Args:
            model: dense.
            blocks: its blocks in the order they run, for hidden states.
            progress: where to report.
        """
        if self.objective.target is Target.PPL and not self.hidden:
            return
        with evaluating(model):
            for index, item in enumerate(track(self.samples.items, progress, "answers of the dense model")):
                if _step(index) not in self.section:
                    with PrefixRuns(model, blocks, [item]) as runs:
                        logits = runs.logits(0, 0)
                        states = {f"hidden/{block}": _state(runs.output(block)) for block in self.hidden}
                    self.section.write(_step(index), Notes({**self._top(logits), **states}))

    def _top(self, logits: Tensor) -> dict[str, Tensor]:
        if self.objective.target is Target.SPARSE_KL and self.objective.topk < logits.shape[-1]:
            values, index = logits.topk(self.objective.topk, -1)
            return {"values": values.cpu(), "index": index.to(torch.int32).cpu()}
        return {} if self.objective.target is Target.PPL else {"values": logits.cpu()}

    def answers(self, key: str, samples: Sequence[int], tokens: int | None) -> Tensor | None:
        """`values`, `index` or `hidden/BLOCK` of some samples as one tensor, the first `tokens` only; None if none."""
        if key not in self.section.names_of(_step(samples[0])):
            return None
        return torch.cat([self.section.tensor(_step(sample), key)[:, :tokens] for sample in samples])


def _step(index: int) -> str:
    return f"sample-{index:06d}"


def _state(output: object) -> Tensor:
    hidden = hidden_of(output)
    assert hidden is not None  # blocks of a stack pass one on
    return hidden.cpu()


class Comparison:
    """The candidates of one stage on one minibatch.

    Args:
        model: that `assemble` changes.
        blocks: in the order they run; where that is not known none, and every run is a whole one.
        minibatch: the same for all candidates.
        teacher: the dense model's answers.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], minibatch: Minibatch, teacher: Teacher):
        self.model, self.minibatch, self.teacher = model, minibatch, teacher
        self.runs = PrefixRuns(model, blocks, minibatch.batches)
        self._held: dict[tuple[str, int], Tensor | None] = {}
        self._room = ROOM

    def fitness(self, candidates: Sequence[tuple[int, ...]], assemble: Callable[[tuple[int, ...]], int]) -> list[float]:
        """The objective for every candidate; lower is better.

        Args:
            candidates: in any order; those that begin alike are run one after the other.
            assemble: makes the model a candidate and returns the first block whose weights that changed.
        """
        found: dict[tuple[int, ...], float] = {}
        with evaluating(self.model), self.runs:
            for candidate in sorted(candidates):
                found[candidate] = self._one(assemble(candidate))
        return [found[candidate] for candidate in candidates]

    def _one(self, first: int) -> float:
        objective = self.teacher.objective
        sums = torch.zeros(3, dtype=torch.float64)  # first term, second term, tokens
        for index, batch in enumerate(self.minibatch.batches):
            logits = self.runs.logits(index, first)
            counted = _counted(batch, logits)
            far = self._first_term(index, batch, logits)
            sums[0] += (far * counted).sum(dtype=torch.float64).cpu()
            sums[1] += sum(((self._apart(index, block) * counted).sum() for block in self.teacher.hidden), 0.0)
            sums[2] += counted.sum().cpu()
        first_term, second_term, tokens = total(sums).tolist()
        mean = first_term / max(1.0, tokens)
        if objective.target is Target.PPL:
            mean = float(torch.tensor(mean, dtype=torch.float64).exp())
        return float(objective.beta * mean + objective.alpha * second_term / max(1.0, tokens))

    def _first_term(self, index: int, batch: Batch, logits: Tensor) -> Tensor:
        """KL or loss at every position that predicts, `[samples, positions]`."""
        if self.teacher.objective.target is Target.PPL:
            if logits.dim() != 3:
                raise DataError("fitness ppl needs a language model and token ids; take fitness=kl for other models")
            return token_losses(logits, batch.kwargs.get("input_ids", batch.tensors[0]).to(logits.device))
        values, classes = (self._answers(key, index, logits.device) for key in ("values", "index"))
        assert values is not None
        return divergence(positions(logits), positions(values), None if classes is None else positions(classes))

    def _apart(self, index: int, block: int) -> Tensor:
        """|h_dense - h|^2 at the same positions."""
        hidden = hidden_of(self.runs.output(block))
        assert hidden is not None
        dense = self._answers(f"hidden/{block}", index, hidden.device)
        assert dense is not None
        apart = (dense.float() - hidden.float()).square().sum(-1)
        return apart[:, :-1] if self.minibatch.lengths[index] > 1 else apart.flatten(1).sum(1, keepdim=True)

    def _answers(self, key: str, index: int, device: torch.device) -> Tensor | None:
        if (key, index) in self._held:
            return self._held[key, index]
        length = self.minibatch.lengths[index]
        found = self.teacher.answers(key, self.minibatch.samples[index], length if length > 1 else None)
        if found is not None:
            found = found.to(device, torch.int64 if key == "index" else found.dtype)
        size = 0 if found is None else found.nbytes
        if size <= self._room:
            self._room -= size
            self._held[key, index] = found
        return found


def _counted(batch: Batch, logits: Tensor) -> Tensor:
    """1 for every position that counts, 0 for padding, `[samples, positions]`."""
    like = positions(logits)[..., 0]
    real = token_mask(batch)
    if real is None or logits.dim() != 3:
        return torch.ones_like(like, dtype=torch.float32)
    return real[:, : like.shape[1]].to(like.device, torch.float32)


def ordered_blocks(model: nn.Module, blocks: Sequence[nn.Module], batch: Batch) -> bool:
    """Whether the blocks run in this order, once each, so that runs may go on from any of them."""
    with evaluating(model):
        return run_order(model, blocks, batch) == list(range(len(blocks)))
