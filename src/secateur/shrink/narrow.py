"""A model whose residual stream gets narrower: what is counted, what is cut, what is added."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.core.units import Occurrence, Site, UnitKind
from secateur.shrink.shortcuts import NAME
from secateur.stats.residual import Branch, Residual, find_residual
from secateur.structure.kinds import OUT_DIM
from secateur.structure.layers import layout_of
from secateur.structure.norms import NormForm, norm_form


def shortcut_name(branch: Branch) -> str:
    """The parameter of a branch's shortcut."""
    return f"{branch.host}.{NAME}.weight"


@dataclass(frozen=True)
class Narrow:
    """A dense model and how its stream can be narrowed.

    Attributes:
        model: dense.
        stream: its residual stream.
        forms: norm -> what it computes; all centre, or none.
        slice_head: whether the last block's output and the heads get narrower too.
    """

    model: nn.Module
    stream: Residual
    forms: Mapping[str, NormForm]
    slice_head: bool

    @classmethod
    def find(cls, model: nn.Module, batch: Batch, slice_head: bool) -> Narrow:
        """See how the model uses its stream.

        Raises:
            ModelError: it is no decoder of pre-norm blocks with layer or RMS norms.
        """
        stream = find_residual(model, batch)
        names = [branch.norm for pair in stream.branches for branch in pair] + [stream.norm]
        forms = {name: norm_form(model.get_submodule(name), name, stream.width) for name in names}
        odd = next((name for name in names if forms[name].centred != forms[names[0]].centred), None)
        if odd is not None:
            raise ModelError(
                f"'{names[0]}' and '{odd}' differ in kind: slicing needs layer norms or RMS norms throughout"
            )
        return cls(model, stream, forms, slice_head)

    @property
    def centre(self) -> bool:
        """Whether the norms subtract the mean feature."""
        return self.forms[self.stream.norm].centred

    def end(self, width: int) -> int:
        """Features after the last block."""
        return width if self.slice_head else self.stream.width

    def ends(self, width: int) -> Iterator[tuple[Branch, int, int]]:
        """(branch, features that it reads, features that it writes) in order."""
        *body, last = (branch for pair in self.stream.branches for branch in pair)
        yield from ((branch, width, width) for branch in body)
        yield last, width, self.end(width)

    def layers(self, width: int) -> Iterator[tuple[str, bool, int]]:
        """(layer, whether it writes to the stream, features of the stream that it has then)."""
        yield from ((name, True, width) for name in self.stream.tables)
        for branch, entered, left in self.ends(width):
            yield from ((name, False, entered) for name in branch.readers)
            yield branch.writer, True, left
        yield from ((name, False, self.end(width)) for name in self.stream.heads)

    @cached_property
    def tied(self) -> list[str]:
        """Weights of heads that are a table's too; they must part."""
        tables = {id(self.model.get_submodule(name).weight) for name in self.stream.tables}
        return [f"{name}.weight" for name in self.stream.heads if id(self.model.get_submodule(name).weight) in tables]

    def parameters(self, width: int) -> int:
        """Parameters of the whole model at a width: shortcuts, untied heads and new biases included."""
        full = self.stream.width
        found = sum(parameter.numel() for parameter in self.model.parameters())
        found += sum(self.model.get_parameter(name).numel() for name in self.tied)
        for name, writes, kept in self.layers(width):
            for tensor, _ in self._along(name, writes):
                found -= tensor.numel() // full * (full - kept)
        for name in self.forms:
            found -= sum(parameter.numel() for parameter in self.model.get_submodule(name).parameters())
        return found + self._new_biases() + sum(entered * left for _, entered, left in self.ends(width))

    def _new_biases(self) -> int:
        reads = [(branch.norm, branch.readers) for pair in self.stream.branches for branch in pair]
        reads.append((self.stream.norm, self.stream.heads))
        layers = [name for norm, names in reads if bool(self.forms[norm].shift.any()) for name in names]
        bare = [module for name in layers if (module := self.model.get_submodule(name)).bias is None]
        return sum(
            int(module.weight.numel()) // self.stream.width for module in bare if isinstance(module.weight, Tensor)
        )

    def _along(self, name: str, writes: bool) -> Iterator[tuple[Tensor, Occurrence]]:
        """The tensors of a layer that have the stream's axis, and where."""
        module = self.model.get_submodule(name)
        layout = layout_of(module)
        dim = 1 if layout is None else OUT_DIM[layout] if writes else 1 - OUT_DIM[layout]
        assert isinstance(module.weight, Tensor)
        yield module.weight, Occurrence(f"{name}.weight", dim)
        if writes and isinstance(bias := getattr(module, "bias", None), Tensor):
            yield bias, Occurrence(f"{name}.bias", 0)

    def site(self) -> Site:
        """The stream's axis: what is narrowed everywhere."""
        width = self.stream.width
        along = [
            one for name, writes, kept in self.layers(0) if kept == 0 for one in self._along(name, writes)
        ]  # kept is not 0 at a wide end
        return Site(
            f"{self.stream.tables[0]}:{UnitKind.EMBEDDING.value}",
            UnitKind.EMBEDDING,
            (width,),
            cost=sum(tensor.numel() // width for tensor, _ in along),
            occurrences=tuple(place for _, place in along),
        )

    def additions(self, width: int) -> list[dict[str, Any]]:
        """What the model gets, as `additions.attach` takes it."""
        found: list[dict[str, Any]] = [{"kind": "untied", "parameter": name} for name in self.tied]
        found += [
            {"kind": "norm", "module": name, "width": self.stream.width, "eps": form.eps}
            for name, form in self.forms.items()
        ]
        for branch, entered, left in self.ends(width):
            block = self.stream.stack.names[-1] if left > entered else None
            where = {"host": branch.host, "norm": branch.norm, "block": block}
            found.append({"kind": "shortcut", **where, "shape": [entered, left]})
        return found
