"""EEP: fewer experts by evolution, without gradients (Liu et al. 2024, arXiv 2407.00945).

Two matrices for every group of layers: expert i's weights become E'_i = sum_j M_ij W_j, and routing probabilities p
become p' = p R^T; top-k and the division by the sum follow. First phase: rows of M = R pick experts, and evolution
looks for the picks with the best fitness. Second phase: noise and crossover on both matrices, apart. All candidates
stay in the population; equals are shuffled before parents are drawn from the best.

One-hot R is folded into the gate: its rows are sliced, which deletes the experts and their logits. Where a router
divides by the sum of the chosen ones (Mixtral) that is p R^T; where it does not (norm_topk_prob=False) the softmax
is then over the kept ones, and a general R counts likewise: softmax(log p'). A general R stays as an n' x n matrix
after the softmax. Candidates under which a token's k-th best p' is not positive have fitness -inf.

The released search names groups so that all layers fall into one; ours are as in the paper. Its settings were not
released: the defaults here were read off the released matrices. Fitness is measured on one part of the calibration
data, and what is reported on the rest too; with few samples the second phase fits the first part closely.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from math import inf, isinf

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.core import tags as t
from secateur.core.budget import Quantity
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.core.journal import Journal, Section
from secateur.core.method import Batch, Decision, Group, Method, Protocol, Settings, Task
from secateur.core.progress import Progress
from secateur.core.units import UnitKind
from secateur.data.running import evaluating
from secateur.search.evolution import Archive, Evaluated
from secateur.search.held_out import Fitness, halves
from secateur.search.merging import Mixing, Mixture, Phases, matrix
from secateur.shrink.experts import Coefficients, addition_of, check_mapping, mix_, mixed, routers, values_of
from secateur.structure.analysis import Structure, analyse
from secateur.structure.experts import ExpertLayer, find_experts

FEW_GROUPS = 8  # up to here half of the groups change at once, beyond it a tenth


class Router(StrEnum):
    """What becomes of the routing matrix R."""

    MAP = "map"  # searched too; stays behind the softmax where it is not one-hot
    FOLD = "fold"  # stays one-hot, so that the gate is sliced and the model stays plain


class EEPSettings(Settings):
    """EEP's settings."""

    groups: int = Field(0, ge=0, description="groups of neighbouring layers that share both matrices; 0: one a layer")
    fitness: Fitness = Field(Fitness.LOSS, description="loss: minus the mean loss; accuracy: needs labels")
    search_share: float = Field(0.5, gt=0, lt=1, description="share of the samples that the search sees")
    merge: bool = Field(True, description="second phase: mix experts; False: only choose them")
    router: Router = Field(Router.MAP, description="map: search R too; fold: keep it one-hot, the model stays plain")
    active: int = Field(0, ge=0, description="experts that a token takes from now on; 0: as many as before")
    initial: int = Field(30, ge=1, description="random candidates")
    discrete: int = Field(160, ge=1, description="evaluations after which the second phase begins")
    total: int = Field(400, ge=1, description="evaluations in all")
    parents: int = Field(10, ge=1, description="the best from which parents are drawn")
    change: float = Field(0.0, ge=0, le=1, description="chance that a group changes; 0: 0.5 up to 8 groups, else 0.1")
    replace: float = Field(0.3, gt=0, le=1, description="first phase: chance that a row of it gets another expert")
    entry: float = Field(0.15, ge=0, le=1, description="second phase: chance that an entry gets noise")
    scale: float = Field(0.05, ge=0, description="standard deviation of the noise")
    cross: float = Field(0.5, ge=0, le=1, description="second phase: chance of two parents")
    front: float = Field(0.5, ge=0, le=1, description="chance that a row comes from the first of them")
    norm: float = Field(0.5, ge=0, le=1, description="chance that rows of merging matrices are divided by their sums")

    def mixing(self, groups: Sequence[Grouped]) -> Mixing:
        """The moves between candidates."""
        return Mixing(
            experts=tuple(group.layers[0].count for group in groups),
            kept=tuple(group.kept for group in groups),
            change=self.change or (0.5 if len(groups) <= FEW_GROUPS else 0.1),
            replace=self.replace,
            entry=self.entry,
            scale=self.scale,
            cross=self.cross,
            front=self.front,
            norm=self.norm,
            fold=self.router is Router.FOLD,
        )


@dataclass(frozen=True)
class Grouped:
    """Neighbouring layers that share their matrices, and how many experts each keeps."""

    layers: tuple[ExpertLayer, ...]
    kept: int


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        pruned: the best candidate of the first phase.
        best: the best of all.
        report: fitness of the two on samples that the search did not see.
        archive: every candidate with its fitness, in order of evaluation.
        groups: the layers.
    """

    pruned: Evaluated[Mixture]
    best: Evaluated[Mixture]
    report: tuple[float, float]
    archive: Archive[Mixture]
    groups: tuple[Grouped, ...]

    def coefficients(self, candidate: Mixture | None = None) -> dict[str, Coefficients]:
        """Layer -> its matrices under a candidate; default: the best."""
        return coefficients(self.groups, candidate or self.best.genome)


def coefficients(groups: Sequence[Grouped], candidate: Mixture) -> dict[str, Coefficients]:
    """Layer -> its matrices."""
    return {
        layer.name: Coefficients(matrix(merge, layer.count), matrix(route, layer.count))
        for group, (merge, route) in zip(groups, candidate, strict=True)
        for layer in group.layers
    }


def grouped(layers: Sequence[ExpertLayer], kept: Sequence[int], groups: int) -> tuple[Grouped, ...]:
    """Contiguous groups of (nearly) equal length; 0: every layer by itself.

    Raises:
        SettingsError: more groups than layers, or a group of layers with different numbers of experts.
    """
    count = groups or len(layers)
    if count > len(layers):
        raise SettingsError(f"groups: {count} groups of {len(layers)} layers of experts are not possible")
    bounds = [len(layers) * index // count for index in range(count + 1)]
    found = []
    for start, stop in pairwise(bounds):
        own = tuple(layers[start:stop])
        if len({(layer.count, keep) for layer, keep in zip(own, kept[start:stop], strict=True)}) > 1:
            raise SettingsError(f"groups: '{own[0].name}' and others of its group have different numbers of experts")
        found.append(Grouped(own, kept[start]))
    return tuple(found)


def judged(
    model: nn.Module, groups: Sequence[Grouped], settings: EEPSettings, fitness: Callable[[nn.Module], float]
) -> Callable[[Mixture], float]:
    """The fitness of a candidate: of the model with its experts; -inf where a token's shares are not positive."""
    layers = [layer for group in groups for layer in group.layers]

    def judge(candidate: Mixture) -> float:
        found = coefficients(groups, candidate)
        undo = mix_(model, layers, found, settings.active, mapped=settings.router is Router.MAP)
        try:
            watched = routers(model)
            for router in watched:
                router.lowest = inf
            value = float(fitness(model))
            general = any(one.picks is None for one in found.values())
            return -inf if general and any((router.lowest or 0.0) <= 0 for router in watched) else value
        finally:
            undo()

    return judge


def eep_search(
    model: nn.Module,
    fitness: Callable[[nn.Module], float],
    report: Callable[[nn.Module], float],
    layers: Sequence[ExpertLayer],
    kept: Sequence[int],
    *,
    example: Batch,
    seed: int = 0,
    section: Section | None = None,
    progress: Progress | None = None,
    settings: EEPSettings | None = None,
) -> Outcome:
    """Search by any figure of merit, e.g. the accuracy of generated answers. The model is left as it was.

    Args:
        model: with layers of experts.
        fitness: model -> figure on the samples of the search, larger is better.
        report: the same on other samples; nothing is chosen by it.
        layers: see `structure.experts.find_experts`.
        kept: experts that stay, of every layer.
        example: inputs on which it is seen whether the routers can be mapped.
        seed: of all draws.
        section: of a journal, for a search that goes on after a kill.
        progress: receives one step for each evaluation.
        settings: EEP's; `fitness` and `search_share` are not looked at.

    Raises:
        BudgetError: fewer experts stay than a token takes.
        ModelError: a router is no softmax followed by a choice of the best, and router=map.
        SettingsError: `fitness` and `report` are one function, or the groups are not possible.
    """
    own = settings or EEPSettings()
    if fitness is report:
        raise SettingsError("fitness and report are the same function; what is reported must not have been searched on")
    for layer, keep in zip(layers, kept, strict=True):
        if not max(own.active or layer.chosen, 1) <= keep <= layer.count:
            raise BudgetError(
                f"'{layer.name}' would keep {keep} of {layer.count} experts, and a token takes "
                f"{own.active or layer.chosen}; keep at least as many, or let tokens take fewer (active=1)"
            )
    if own.router is Router.MAP:
        check_mapping(model, layers, example)
    groups = grouped(layers, kept, own.groups)
    section = section or Journal().section("eep")
    with evaluating(model):
        phases = Phases(own.initial, own.discrete, own.total if own.merge else 0, own.parents)
        found, pruned = phases.run(own.mixing(groups), judged(model, groups, own, fitness), seed, section, progress)
        on_report = judged(model, groups, own, report)
        best = found.best()
        after = on_report(pruned.genome)
        shown = (after, after if best.genome == pruned.genome else on_report(best.genome))
    return Outcome(pruned, best, shown, found, groups)


def plan(task: Task, settings: EEPSettings) -> Decision:
    """Find the layers, search, and cut or mix."""
    if task.residency is not None:
        raise SettingsError("eep runs the whole model for every candidate; it cannot be streamed from disk")
    assert task.example is not None  # the method is structured
    structure = analyse(task.model, task.example)
    found = find_experts(task.model, structure, task.example)
    layers = [layer for layer in found.layers if task.wants(layer.name)]
    if not layers:
        more = f" ({found.notes[0]})" if found.notes else ""
        raise ModelError(f"{type(task.model).__name__} has no block of experts that a router chooses from{more}")
    budget = task.budget.of(UnitKind.EXPERT)
    if budget.pattern or budget.quantity not in (Quantity.SPARSITY, Quantity.DENSITY):
        raise BudgetError("eep takes the share of experts to remove from every layer; give a sparsity")
    kept = [max(budget.keep(layer.count), min(budget.floor, layer.count)) for layer in layers]
    first, second = halves(task.batches, settings.search_share, settings.fitness, task.rng("eep", "splits"))
    outcome = eep_search(
        task.model,
        first,
        second,
        layers,
        kept,
        example=task.example,
        seed=task.seed,
        section=task.journal.section("eep"),
        progress=task.progress,
        settings=settings,
    )
    decision = decided(task.model, structure, outcome, settings)
    decision.warnings = [*found.notes, *decision.warnings]
    return decision


def decided(model: nn.Module, structure: Structure, outcome: Outcome, settings: EEPSettings) -> Decision:
    """Keep-masks where routers can be sliced, with new values where experts were mixed; else mapped routers."""
    matrices = outcome.coefficients()
    layers = [layer for group in outcome.groups for layer in group.layers]
    sites = {layer.site.name: layer.site for layer in layers}
    masks = {layer.site.name: _kept(matrices[layer.name]) for layer in layers}
    decision = Decision(sites=sites, masks=masks, structure=structure, facts=_facts(outcome, layers))
    picked = all(one.picks is not None for one in matrices.values())
    others = any(settings.active not in (0, layer.chosen) for layer in layers)
    for layer in layers:
        own = matrices[layer.name]
        if picked and not others and layer.fused:
            decision.weights.update(_in_place(model, layer, own))
        else:
            mapped = own.picks is None
            decision.additions.append(addition_of(model, layer, len(own.merge), mapped, settings.active))
            decision.weights.update(values_of(model, layer, own, mapped))
    if isinf(outcome.best.fitness):
        decision.warnings = ["no candidate gave every token enough experts; the model will be of little use"]
    return decision


def _kept(found: Coefficients) -> Tensor:
    """One expert for every row: that from which most of its tokens come, none twice."""
    mask = torch.zeros(found.route.shape[1], dtype=torch.bool)
    for row in found.route:
        mask[row.masked_fill(mask, -inf).argmax()] = True
    return mask


def _in_place(model: nn.Module, layer: ExpertLayer, found: Coefficients) -> Mapping[str, Tensor]:
    """New values at the dense model's size, for experts that are more than one old expert."""
    picks = found.picks
    if picks is None or torch.equal(found.merge, found.route):
        return {}
    values = {}
    for (name,) in layer.tensors:
        dense = model.get_parameter(name).detach()
        values[name] = dense.clone()
        values[name][picks.to(dense.device)] = mixed(dense, found.merge)
    return values


def _facts(outcome: Outcome, layers: Sequence[ExpertLayer]) -> dict[str, dict[str, float]]:
    """At the first site: what was evaluated, and the fitness before and after mixing on both splits."""
    figures = {
        "evaluations": float(len(outcome.archive)),
        "search_pruned": outcome.pruned.fitness,
        "search_best": outcome.best.fitness,
        "report_pruned": outcome.report[0],
        "report_best": outcome.report[1],
    }
    return {layers[0].site.name: {name: round(value, 6) for name, value in figures.items() if not isinf(value)}}


method = Method(
    name="eep",
    paper="43",
    title="Efficient expert pruning for sparse mixture-of-experts language models",
    citation="Liu, Zhu, Lin, Ning, Blaschko, Yan, Dai, Yang, Wang 2024, arXiv 2407.00945",
    formula="E'_i = sum_j M_ij W_j, p' = p R^T; M and R by evolution",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LOSS_CHANGE}),
        granularity=frozenset({t.Granularity.EXPERT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.NONE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.LLM}),
        learn=frozenset({t.Learn.EVOLUTIONARY}),
        fusion=frozenset({t.Fusion.MIXTURE_OF_EXPERTS}),
        physical=True,
        post_training=True,
    ),
    settings=EEPSettings,
    run=plan,
    units=UnitKind.EXPERT,
    exact=Group.SITE,
    needs_data=True,
    changes_weights=True,
    structured=True,
)
