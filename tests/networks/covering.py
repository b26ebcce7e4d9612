"""One network of the list pruned at random, cut, and compared with the masked network."""

import re
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from network_tools import Network, output_tensors, warm_up
from torch import Tensor, nn

from secateur.core.errors import SecateurError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.data.batches import run
from secateur.data.running import evaluating
from secateur.shrink.cut import install, make_cut
from secateur.shrink.reference import reference
from secateur.shrink.verify import difference
from secateur.structure.analysis import Structure, analyse

SHARE = 0.3
"""Of every free group's units, this share goes."""

TOLERANCE = 1e-5
"""Largest difference allowed, relative to the largest output where that is above 1."""

MOVED = 0.01
"""Control: pruning changes the output at least this much, else the comparison could not fail."""


SHRUNK = 0.8
"""A network that is right has fewer than this share of its parameters left, unless it is mostly frozen."""

MOSTLY_FROZEN = {
    "channel_shuffle": "channels in 3 groups of 16 are dealt out and grouped by 3 again, across the 16, so the new "
    "groups would lose unequal numbers; the number of groups itself is a constant in the code",
    "swinv2_cr_tiny_224": "a head is as wide as the stream divided by the number of heads (`C // self.num_heads`), so "
    "neither the stream nor heads nor their width can go without the others; the hidden units of its MLPs are free",
}
"""Networks that are right and hardly smaller -> what holds them."""

REFUSED: dict[str, str] = {}
"""Networks that may be refused -> the exact message; none is today."""

PLACES = {
    r" in '[^']*'": "",
    r"^'[^']*' takes no part": "the parameter takes no part",
    r"^'[^']*' is the size": "one attribute is the size",
    r"the buffer '[^']*'": "a buffer",
}
"""What names a place in a reason -> what stands for all places."""


class Verdict(StrEnum):
    """What came of a network."""

    RIGHT = "right"
    REFUSED = "refused"
    WRONG = "wrong"


@dataclass(frozen=True)
class Coverage:
    """What is known of one network after its test.

    Attributes:
        verdict: right: equal to the masked network and as small as promised; refused: an error says why not.
        reason: why it is not right; empty otherwise.
        sites: number of free groups of each kind.
        frozen: number of axes that cannot be cut, by reason without the place.
        unknown: operators without a rule.
        left: share of the parameters that is left.
        gap: largest difference between the cut and the masked network.
        moved: largest difference between the dense and the masked network.
        seconds: how long the analysis took.
    """

    network: str
    family: str
    verdict: Verdict
    reason: str = ""
    sites: dict[str, int] = field(default_factory=dict)
    frozen: dict[str, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()
    left: float = 1.0
    gap: float = 0.0
    moved: float = 0.0
    seconds: float = 0.0


def cover(network: Network) -> Coverage:
    """The verdict on a network; never raises, so that one network does not end a table of all."""
    try:
        return prune_and_compare(network)
    except SecateurError as error:
        return Coverage(network.name, network.family, Verdict.REFUSED, str(error))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        reason = f"{type(error).__name__} in {place.filename.rpartition('/')[2]}:{place.lineno}: {error}"
        return Coverage(network.name, network.family, Verdict.WRONG, reason)


def prune_and_compare(network: Network) -> Coverage:
    """Everything that is known of a network that can be analysed.

    The masked and the cut network run before the dense one: a cut may not depend on what an earlier run has left.

    Raises:
        SecateurError: the network is refused.
    """
    model = warm_up(network.build(), network.inputs)
    batch = Batch(*network.inputs())
    start = time.perf_counter()
    structure = analyse(model, batch)
    seconds = time.perf_counter() - start
    plan = random_plan(structure)
    masked = output_tensors(reference(model, plan, structure, batch))
    before = parameters(model)
    undo = install(model, make_cut(model, plan, structure))
    after, cut = parameters(model), outputs(model, batch)
    undo()
    gap, moved = largest(masked, cut), largest(masked, outputs(model, batch))
    promised = structure.parameters({name: plan.kept(name) for name in plan.masks})
    reason = what_is_wrong(gap, moved, after, promised)
    return Coverage(
        network=network.name,
        family=network.family,
        verdict=Verdict.WRONG if reason else Verdict.RIGHT,
        reason=reason,
        sites=dict(Counter(site.kind.value for site in structure.sites.values())),
        frozen=dict(Counter(without_place(frozen.reason) for frozen in structure.frozen).most_common()),
        unknown=tuple(sorted({operator for _, operator, _ in structure.unknown})),
        left=after / before,
        gap=gap,
        moved=moved,
        seconds=seconds,
    )


def random_plan(structure: Structure, seed: int = 0) -> Plan:
    """A plan for all sites at once, within the least and the multiples that the code asks for."""
    rng = torch.Generator().manual_seed(seed)
    masks = {}
    for name, site in structure.sites.items():
        multiple = structure.multiples.get(name, 1)
        wanted = max(structure.minimums.get(name, 1), site.units - max(1, round(site.units * SHARE)))
        kept = max(multiple, wanted // multiple * multiple)
        masks[name] = torch.zeros(site.units, dtype=torch.bool)
        masks[name][torch.randperm(site.units, generator=rng)[:kept]] = True
    return Plan(sites=dict(structure.sites), masks=masks)


def what_is_wrong(gap: float, moved: float, after: int, promised: int) -> str:
    """The first thing that is not as promised; empty when all is."""
    if not gap <= TOLERANCE:  # NaN is wrong too
        return f"the cut network is off by {gap:.2g}"
    if after != promised:
        return f"{after} parameters are left where {promised} were promised"
    if not moved >= MOVED:
        return f"pruning moves the output by {moved:.2g} only, which proves nothing"
    return ""


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """The float outputs of a model as it stands."""
    with evaluating(model):
        return output_tensors(run(model, batch))


def largest(expected: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference in any output, relative to that output's largest value where it is above 1."""
    return max(difference(a, b) for a, b in zip(expected, found, strict=True))


def parameters(model: nn.Module) -> int:
    """Number of parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def without_place(reason: str) -> str:
    """A reason that stands for all places where it holds."""
    for place, anywhere in PLACES.items():
        reason = re.sub(place, anywhere, reason)
    return reason
