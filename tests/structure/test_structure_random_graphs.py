"""Whatever the network: cut at random, it gives what the masked network gives."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_graphs import BLOCKS, Block, Graph, Net, Node, draw_graph, inputs, may_be_refused, size, smallest

from secateur.core.errors import ModelError
from secateur.core.method import Batch
from secateur.core.plan import Plan
from secateur.shrink.cut import install, make_cut
from secateur.shrink.reference import reference
from secateur.structure.analysis import Structure, analyse

TOLERANCE = 1e-5


@dataclass
class Outcome:
    """What became of one graph; `wrong` is empty where everything holds."""

    wrong: str = ""
    changed: bool = False
    refused: bool = False


def random_masks(structure: Structure, seed: int) -> dict[str, torch.Tensor]:
    """A random share of every site, at least one unit of each; some sites, or all but one, stay whole."""
    rng, masks = Random(seed), {}
    only = rng.choice(list(structure.sites)) if structure.sites and rng.random() < 0.25 else None
    for name, site in structure.sites.items():
        whole = rng.random() < 0.2 if only is None else name != only
        step = structure.multiples.get(name, 1)
        kept = site.units if whole else step * rng.randint(1, site.units // step)
        masks[name] = torch.zeros(site.units, dtype=torch.bool)
        masks[name][rng.sample(range(site.units), kept)] = True
    return masks


def expectations(model: Net, structure: Structure) -> list[str]:
    """What every block says about its own parameters: free or frozen."""
    free = {(place.parameter, place.dim) for site in structure.sites.values() for place in site.occurrences}
    found = []
    for prefix, block in model.named_modules():
        if isinstance(block, Block):
            kind = type(block).__name__
            for name, dim in block.must_free:
                if (f"{prefix}.{name}", dim) not in free:
                    found.append(f"{kind} '{prefix}.{name}' has no free units in dimension {dim}")
            for name, dim in block.must_freeze:
                if (f"{prefix}.{name}", dim) in free:
                    found.append(f"{kind} way {block.way} '{prefix}.{name}' has free units in dimension {dim}")
    return found


def differs(got: torch.Tensor, wanted: torch.Tensor) -> str:
    if got.shape != wanted.shape:
        return f"the cut model returns {list(got.shape)}, the masked one {list(wanted.shape)}"
    gap = ((got - wanted).abs() / wanted.abs().clamp(min=1)).max().item()
    return "" if gap <= TOLERANCE else f"the cut model differs from the masked one by {gap:.2g}"


def outcome(graph: Graph) -> Outcome:
    """Everything that must hold for one graph."""
    model, x = Net(graph), inputs(graph)
    with torch.no_grad():
        dense = model(x)
    assert dense.isfinite().all(), f"the generator made a network without finite outputs: {graph}"
    try:
        structure = analyse(model, Batch((x,)))
    except ModelError as error:
        return Outcome("" if may_be_refused(graph.nodes) else f"refused: {error}", refused=True)
    found = expectations(model, structure)
    if found:
        return Outcome("; ".join(found))
    return cut_and_compare(graph, model, structure, dense)


def cut_and_compare(graph: Graph, model: Net, structure: Structure, dense: torch.Tensor) -> Outcome:
    x, masks = inputs(graph), random_masks(structure, graph.seed)
    plan = Plan(sites=dict(structure.sites), masks=masks)
    wanted = reference(model, plan, structure, Batch((x,)))
    undo = install(model, make_cut(model, plan, structure))
    try:
        with torch.no_grad():
            got = model(x)
        wrong = differs(got, wanted)
        left = sum(p.numel() for p in model.parameters())
    finally:
        undo()
    promised = structure.parameters({name: plan.kept(name) for name in masks})
    if left != promised:
        wrong = wrong or f"{left} parameters are left, {promised} were promised"
    with torch.no_grad():
        if not torch.equal(model(x), dense):
            wrong = wrong or "undo does not give the dense model back"
    return Outcome(wrong, changed=bool((wanted - dense).abs().max() > 1e-6))


def judged(graph: Graph) -> Outcome:
    """`outcome`, with any exception as a failure."""
    try:
        return outcome(graph)
    except Exception as error:  # a sweep goes on and reports it
        return Outcome(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")


def sweep(n: int, seed: int) -> list[tuple[Graph, str]]:
    """Draw n graphs with plain `random`; every failing one, made as small as it gets, with what is wrong."""
    rng = Random(seed)
    drawn = (draw_graph(rng) for _ in range(n))
    failing = [graph for graph in drawn if judged(graph).wrong]
    least = [smallest(graph, lambda one: bool(judged(one).wrong)) for graph in failing]
    return [(graph, judged(graph).wrong) for graph in least]


LEAVES = sorted(name for name, kind in BLOCKS.items() if kind.branches[1] == 0)
BRANCHED = sorted(name for name, kind in BLOCKS.items() if kind.branches[1])
SEEDS = st.integers(0, 9_999)


def branched(inside: st.SearchStrategy[Node]) -> st.SearchStrategy[Node]:
    chains = st.lists(inside, max_size=2).map(tuple)

    def with_branches(name: str) -> st.SearchStrategy[Node]:
        least, most = BLOCKS[name].branches
        return st.builds(Node, st.just(name), SEEDS, st.lists(chains, min_size=least, max_size=most).map(tuple))

    return st.sampled_from(BRANCHED).flatmap(with_branches)


def no_more_than_ten(nodes: list[Node]) -> tuple[Node, ...]:
    return tuple(node for i, node in enumerate(nodes) if size(tuple(nodes[: i + 1])) <= 10)


LEAF = st.builds(Node, st.sampled_from(LEAVES), SEEDS, st.just(()))  # Hypothesis would fill in any nodes as branches
INSIDE = st.one_of(LEAF, LEAF, branched(LEAF))
NODES = st.one_of(LEAF, LEAF, LEAF, branched(INSIDE))
GRAPHS = st.builds(
    Graph,
    st.sampled_from([4, 6, 8]),
    SEEDS,
    st.lists(NODES, min_size=1, max_size=6).map(no_more_than_ten),
)


def test_a_cut_network_gives_what_the_masked_network_gives():
    seen: Counter[str] = Counter()

    @settings(max_examples=60, derandomize=True, deadline=None)
    @given(GRAPHS)
    def check(graph: Graph) -> None:
        found = outcome(graph)
        assert not found.wrong, f"{found.wrong}\n{graph}"
        seen.update(all=1, changed=found.changed, refused=found.refused)

    check()
    assert seen["changed"] > 0.7 * seen["all"]
    assert seen["refused"] < 0.2 * seen["all"]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_thousands_of_networks():
    assert not [f"{wrong}\n{graph}" for graph, wrong in sweep(3_000, 0)]
