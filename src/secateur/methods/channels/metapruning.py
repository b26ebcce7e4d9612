"""A network that makes networks easier to prune: meta pruning via graph metanetworks (Liu, Wang, Zhang 2025).

A graph neural network, the metanetwork, reads a trained network as a graph (`structure.graph`: channels are nodes,
kernels edges) and gives it slightly other weights, of which a fixed criterion removes more at less cost:

    theta' = phi(theta),  I_k = mean over a unit's coupled weights of their sums of squares, over the site's largest
    units of smallest I go, all sites in one ranking, one of `parts` after the other, until the FLOPs are few enough

It is trained once (`train.meta`) and then serves any network of its family, however wide:

    1. `sc.study` / `secateur study`: meta-training on the networks of extras["models"], or on `models` of them that
       `make` and `fit` train. The last ones are held out and tried: theta' -> fine-tuning A -> cut, beside A and the
       cut alone. The best of the `tried` epochs on them is saved in the folder `metanetwork`.
    2. `sc.sparsify` / `secateur train`: theta' is put into your network before the first step, your training is
       fine-tuning A, and at its end the units go (`sc.apply_`). This is the paper's way to prune.
    3. `sc.plan` / `secateur prune`: theta' and the cut at once, without A; fine-tune afterwards.

Fine-tuning B, of what is left, is your own training in all three. In the study A is extras["tune"], a fit with `steps`,
or the last `tune` share of your `fit`; extras["training"] are the data of the task loss, default those of a `Fitting`;
extras["example"] are inputs that the structure is found with.

`speedup` counts from the original: FLOPs of one sample before anything was pruned over those that stay; `already` is
what the given network has behind it. It goes with sparsity 0. Other budgets count from the given network.

The released code reads the classifier of its small networks back transposed, and holds layers in its metanetwork that
nothing runs through; neither is here. Weights whose meta-gradient is not finite sit a step out, as there.

Of the paper this leaves out vision transformers (networks of convolutions only), criteria other than the group norm,
and curves over speed-ups with a bisection over epochs: `tried` names the epochs that are compared, at one speed-up. Its
data models are pruned a little before meta-training (1.3 to 2 times faster); those of `make` are dense, give pruned
ones as extras["models"] and say so with `already`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.allocate.structured import Normalise, Scope, target_of
from secateur.core import tags as t
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, SettingsError
from secateur.core.files import check_free
from secateur.core.fingerprint import digests
from secateur.core.method import Batch, Decision, Group, Method, Protocol, Task
from secateur.core.plan import Plan
from secateur.core.progress import track
from secateur.core.units import UnitKind
from secateur.data.batches import as_batches
from secateur.data.example import describe_example, example_for
from secateur.data.running import evaluating
from secateur.scores.growing import group_norms, member_weights
from secateur.shrink.apply import apply_, masked, stamp
from secateur.shrink.cut import tensors_of
from secateur.shrink.ending import EndSettings, StructuredEnd
from secateur.shrink.structured import View, Work, begin, refuse_settings
from secateur.structure.graph import graph_of
from secateur.train.meta import MetaSettings, MetaTraining, Subject, one_family
from secateur.train.metanetwork import Metanetwork
from secateur.train.part import Part
from secateur.train.snapshot import model_state, put_back
from secateur.train.sparsifier import Order, Sparsifier
from secateur.train.study import Findings, Study

LAST = 1 - 1e-9  # of the units in the last step: a sparsity is below 1

Row = dict[str, Any]


class MetaPruningSettings(EndSettings, MetaSettings):
    """Settings of pruning by a metanetwork, and of its training."""

    metanetwork: str = Field("", description="folder of the metanetwork: written by the study, read by all else")
    scope: Scope = Field(Scope.GLOBAL, description="which units compare: all, those within a site, or of equal sites")
    normalise: Normalise = Field(Normalise.MAX, description="scale of a site's importance in a common ranking")
    multiple: int = Field(1, ge=1, description="keep widths at multiples of this where a site is 8 times as wide")
    largest_cut: float = Field(1.0, gt=0, le=1, description="largest share of a site's units that may go; one stays")
    parts: int = Field(200, ge=1, description="parts that the units go in, with the importance of what is left in each")
    speedup: float | None = Field(
        None, gt=1, description="FLOPs of the original network over those that stay; with sparsity 0"
    )
    already: float = Field(1.0, ge=1, description="speed-up that the given network has over its original")
    models: int = Field(6, ge=2, description="networks that the study trains where it is given none")
    held_out: float = Field(
        0.2, gt=0, lt=1, description="share of the networks, the last ones, that others are tried on"
    )
    tried: tuple[int, ...] = Field((), description="epochs whose metanetworks are tried; default: the last only")
    tune: float = Field(0.25, ge=0, le=1, description="last share of fit that is fine-tuning A, without extras['tune']")


# --- one network ------------------------------------------------------------------------------------


def goal(budget: Budget, settings: MetaPruningSettings) -> Budget:
    """What stays: the budget, or the FLOPs that a speed-up leaves.

    Raises:
        SettingsError: both are given, or `already` without a speed-up.
        BudgetError: the given network is as fast already.
    """
    if settings.speedup is None:
        if settings.already != 1:
            raise SettingsError("already=... is divided out of speedup=..., which was not given")
        return budget
    if budget.quantity is not Quantity.SPARSITY or budget.amount:
        raise SettingsError(f"speedup={settings.speedup:g} says what stays, and so does {budget}; give sparsity 0")
    if settings.already >= settings.speedup:
        raise BudgetError(
            f"a speed-up of {settings.speedup:g} is no more than the {settings.already:g} that the network has already"
        )
    return Budget(settings.already / settings.speedup, Quantity.FLOPS, floor=budget.floor)


def importance(view: View) -> dict[str, Tensor]:
    """I per unit, not yet normalised."""
    return group_norms(view.sites, tensors_of(view.model), member_weights(view.model))


def found_in(task: Task, settings: MetaPruningSettings) -> Work:
    """The units of a network that may go, and how much.

    Raises:
        ModelError: there are none.
        SettingsError, BudgetError: see `goal`.
    """
    refuse_settings(settings, "steps")  # the name of a training's length in `sc.study` and `sc.sparsify`
    return begin(replace(task, budget=goal(task.budget, settings)), settings, settings.filter(task.model))


def pruned(work: Work, settings: MetaPruningSettings) -> Decision:
    """The cut by the criterion, in small steps, each scoring what is left; its speed-up is among the facts.

    After part i of n floor(i / n) of all units are gone, one at least staying in every site, until the cost is the
    budget's or less. A sparsity is met exactly after n parts.

    Raises:
        BudgetError: out of reach; gives the reachable range.
    """
    held, aim = refuse_budget(work), cost_aim(work)
    masks, scores = work.whole(), dict[str, Tensor]()
    for part in track(range(1, settings.parts + 1), work.task.progress, "pruning"):
        share = part / settings.parts * work.budget.sparsity if aim is None else min(part / settings.parts, LAST)
        scores = work.scores(importance, masks)
        masks = work.choose(scores, Budget(share, floor=work.budget.floor), masks)
        if aim is not None and aim(masks):
            break
    decision = work.conclude(masks, scores)
    decision.warnings += held
    for facts in decision.facts.values():
        facts["speedup"] = round(settings.already / facts["flops_kept"], 6)
    return decision


def refuse_budget(work: Work) -> list[str]:
    """Say before a long training what the cut could not meet.

    Returns:
        Warnings: a sparsity that single sites cannot have.

    Raises:
        BudgetError: in milliseconds, or out of reach; gives the reachable range.
    """
    if work.budget.quantity is Quantity.MILLISECONDS:  # before anything is timed
        raise BudgetError("this method stops by FLOPs, parameters, bytes or a sparsity; give one of these")
    return work.refuse_unreachable(work.sites)


def cost_aim(work: Work) -> Callable[[Mapping[str, Tensor]], bool] | None:
    """Whether masks are within a budget of cost; None where the budget is a share of the units."""
    cost = work.cost
    if cost is None:
        return None
    target = target_of(work.budget, work.dense)
    return lambda masks: cost({name: int(mask.sum()) for name, mask in masks.items()}) <= target


def opened(settings: MetaPruningSettings) -> Metanetwork:
    """The trained metanetwork.

    Raises:
        SettingsError: no folder was named.
        PlanError: the folder holds none.
    """
    if not settings.metanetwork:
        raise SettingsError("give metanetwork=FOLDER: where the metanetwork is, or where the study shall put it")
    return Metanetwork.load(settings.metanetwork)


def changed(net: Metanetwork, model: nn.Module, example: Batch, wanted: Callable[[str], bool]) -> dict[str, Tensor]:
    """The weights that a metanetwork gives a network: name of a wanted parameter -> value, in the parameter's dtype.

    Raises:
        ModelError: the network has no graph, or one of another family.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        found = net.changed(graph_of(model, example), model.state_dict())
    return {name: value.to(parameters[name]).clone() for name, value in found.items() if wanted(name)}


def plan(task: Task, settings: MetaPruningSettings) -> Decision:
    """New weights, and the cut that they allow."""
    work = found_in(task, settings)
    weights = changed(opened(settings), task.model, work.example, task.wants)
    with masked(task.model, Plan({}, {}, weights=weights)):
        decision = pruned(work, settings)
    decision.weights = weights
    return decision


class Eased(StructuredEnd):
    """New weights before the first step; the cut when training is over."""

    settings: MetaPruningSettings

    def __init__(self, order: Order, settings: MetaPruningSettings):
        super().__init__(settings, importance)
        self.budget, self.net, self.done = goal(order.budget, settings), opened(settings), False

    def start(self, run: Sparsifier) -> None:
        """Find the sites; refuse now what could not be met in the end."""
        super().start(run)
        self.work = replace(self.work, task=replace(self.work.task, budget=self.budget))
        refuse_budget(self.work)

    def before_batch(self, run: Sparsifier) -> None:
        """Once: the network gets its new weights."""
        if self.done:
            return
        parameters = dict(run.model.named_parameters())
        with torch.no_grad():
            for name, value in changed(self.net, run.model, self.work.example, self.work.task.wants).items():
                parameters[name].copy_(value)
        self.done = True
        run.log.append({"step": run.step, "what": "new weights", "density": 1.0})

    def finish(self, run: Sparsifier) -> None:
        """Any length of fine-tuning will do."""
        if run.step < run.steps:
            run.warn(f"fine-tuned for {run.step} of {run.steps} steps before the cut")

    def decision(self, run: Sparsifier) -> Decision:
        """The cut of the network as it is now."""
        with evaluating(run.model):
            return pruned(self.work, self.settings)

    def state_dict(self) -> dict[str, Any]:
        """Whether the weights are in."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse."""
        self.done = state["done"]


def make_parts(order: Order, settings: MetaPruningSettings) -> Sequence[Part]:
    """One part does it all."""
    return [Eased(order, settings)]


# --- meta-training and what it brings -----------------------------------------------------------------


class Trials:
    """Fine-tuning A and the cut of the held-out networks, with and without a metanetwork.

    Args:
        study: its `fit`, metric and budget.
        settings: of the cut, and how long A is.
        networks: number -> network.
    """

    def __init__(self, study: Study, settings: MetaPruningSettings, networks: Mapping[int, Subject]):
        self.study, self.settings, self.networks = study, settings, networks
        self.fit = study.extras.get("tune", study.fit)
        self.stop = int(getattr(self.fit, "steps", study.steps))
        self.start = 0 if "tune" in study.extras else self.stop - round(settings.tune * self.stop)

    def rows(self, epoch: int, net: Metanetwork | None) -> list[Row]:
        """One row per network; without a metanetwork as epoch 0."""
        return [
            {"epoch": epoch, "network": index, **self.result(epoch, index, net)["figures"]} for index in self.networks
        ]

    def result(self, epoch: int, index: int, net: Metanetwork | None) -> dict[str, Any]:
        """Figures of a network, its state before the cut, and the masks of it."""
        found: dict[str, Any] = self.study.ledger.once(
            f"trial-{epoch}-{index}", lambda: self._tried(self.networks[index], net)
        )
        return found

    def _tried(self, subject: Subject, net: Metanetwork | None) -> dict[str, Any]:
        model = copy.deepcopy(subject.model)
        figures = {"dense": self._figure(model)}
        if net is not None:
            put_back(model, model_state(model) | net.changed(subject.graph, subject.tensors))
        figures["changed"] = self._figure(model)
        figures["tuned"] = float(self.fit(model, {}, self.start, self.stop)[self.study.metric])
        figures["spread"] = spread(subject, model)
        state, task = model_state(model), task_of(self.study, model)
        with evaluating(model):
            decision = pruned(found_in(task, self.settings), self.settings)
        figures["speedup"] = next(iter(decision.facts.values()))["speedup"]
        apply_(model, Plan(decision.sites, decision.masks), example=task.example)
        return {"figures": figures | {"pruned": self._figure(model)}, "state": state, "masks": dict(decision.masks)}

    def _figure(self, model: nn.Module) -> float:
        return float(self.study.fit(model, {}, 0, 0)[self.study.metric])

    def plan(self, epoch: int, index: int, net: Metanetwork) -> tuple[Plan, dict[str, Tensor]]:
        """A held-out network's cut, and the weights after A that it is for."""
        found, model = self.result(epoch, index, net), copy.deepcopy(self.networks[index].model)
        put_back(model, found["state"])
        example = describe_example(task_of(self.study, model).example)
        made = Plan(dict(self.networks[index].sites), found["masks"], example=example)
        stamp(model, made)
        return made, found["state"]


def spread(subject: Subject, model: nn.Module) -> float:
    """Coefficient of variation of sqrt(I) within a site, mean over the sites."""
    norms = group_norms(subject.sites, tensors_of(model), subject.members).values()
    return fmean(float(one.sqrt().std(correction=0) / one.sqrt().mean()) for one in norms)


def data_models(study: Study, settings: MetaPruningSettings) -> list[nn.Module]:
    """The trained networks: those that were given, or new ones of other initialisations.

    Raises:
        SettingsError: fewer than two were given, or the folder's results are of others.
    """
    given = [copy.deepcopy(model) for model in study.extras.get("models", ())]
    if len(given) == 1:
        raise SettingsError("meta-training needs two networks at least: one to learn on and one that it is tried on")
    found = {str(index): digests(tensors_of(model)) for index, model in enumerate(given)}
    if study.ledger.once("models", lambda: found) != found:
        raise SettingsError("the folder holds a study of other networks; choose another folder")
    return given or [_trained(study, index) for index in track(range(settings.models), study.progress, "data models")]


def _trained(study: Study, index: int) -> nn.Module:
    model = study.model(study.seed + index)

    def make() -> dict[str, Tensor]:
        study.fit(model, {}, 0, study.steps)
        return model_state(model)

    put_back(model, study.ledger.once(f"model-{index}", make))
    return model


def task_of(study: Study, model: nn.Module) -> Task:
    """A network of the study as something to prune."""
    example = example_for(model, study.extras.get("example", getattr(study.fit, "data", None)))
    return Task(model, study.budget, seed=study.seed, include=study.include, exclude=study.exclude, example=example)


def subject_of(study: Study, settings: MetaPruningSettings, model: nn.Module) -> Subject:
    """A network of the study as something to learn on."""
    work = found_in(task_of(study, model.eval()), settings)
    refuse_budget(work)
    return Subject(model, graph_of(model, work.example), work.sites)


def _checked(study: Study, settings: MetaPruningSettings) -> tuple[int, ...]:
    """The epochs that are tried; everything that can be wrong is said before anything is trained."""
    if not settings.metanetwork:
        raise SettingsError("give metanetwork=FOLDER, where the trained metanetwork shall be saved")
    study.ledger.once("free", lambda: check_free(Path(settings.metanetwork), force=False))
    goal(study.budget, settings)
    tried = settings.tried or (settings.epochs,)
    if not all(1 <= epoch <= settings.epochs for epoch in tried):
        raise SettingsError(f"tried={','.join(map(str, tried))} must be epochs from 1 to {settings.epochs}")
    return tried


def metapruning(study: Study, settings: MetaPruningSettings) -> Findings:
    """Meta-train, try the metanetworks on held-out networks, save the best.

    Returns:
        A row per held-out network and tried epoch, epoch 0 being without metanetwork; the first held-out network after
        fine-tuning A with its cut.
    """
    tried = _checked(study, settings)
    given = study.extras.get("training", getattr(study.fit, "data", None))
    batches = as_batches(study.extra("training", "metapruning") if given is None else given, settings.batch)
    subjects = [subject_of(study, settings, model) for model in data_models(study, settings)]
    one_family(subjects)
    learn = max(1, len(subjects) - max(1, round(settings.held_out * len(subjects))))
    training = MetaTraining(study, subjects[:learn], batches, settings)
    epochs = training.run()
    trials = Trials(study, settings, dict(list(enumerate(subjects))[learn:]))
    without, rows = trials.rows(0, None), {epoch: trials.rows(epoch, training.network(epoch)) for epoch in tried}
    sign = -1 if study.metric.endswith("loss") else 1
    best = max(rows, key=lambda epoch: sign * _mean(rows[epoch], "pruned"))
    net = training.network(best)
    about = {"epoch": best, "networks": learn, "seed": study.seed, "settings": settings.model_dump(mode="json")}
    about["training"] = epochs
    net.save(settings.metanetwork, about, force=True)
    figures = [name for name in without[0] if name not in ("epoch", "network")]
    summary = {
        "epoch": best,
        "metanetwork": settings.metanetwork,
        "with": {name: _mean(rows[best], name) for name in figures},
        "without": {name: _mean(without, name) for name in figures},
        "training": epochs[-1],
    }
    plan, state = trials.plan(best, learn, net)
    return Findings([*without, *(row for some in rows.values() for row in some)], summary, state=state, plan=plan)


def _mean(rows: Sequence[Row], name: str) -> float:
    return fmean(row[name] for row in rows)


method = Method(
    name="metapruning",
    paper="32",
    title="Meta pruning via graph metanetworks",
    citation="Liu, Wang, Zhang 2025",
    formula="theta' = phi(theta) by a graph network; of theta' units of small coupled L2 norm go, in one ranking",
    kind=Protocol.PROCEDURE,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LEARNED, t.Criterion.LP_NORM}),
        granularity=frozenset({t.Granularity.CHANNEL, t.Granularity.FILTER}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN}),
        learn=frozenset({t.Learn.META_LEARNING, t.Learn.GRAPH_NEURAL_NETWORK, t.Learn.SPARSITY_REGULARIZATION}),
        physical=True,
    ),
    settings=MetaPruningSettings,
    run=plan,
    parts=make_parts,
    procedure=metapruning,
    units=UnitKind.CHANNEL,
    exact=Group.TOTAL,
    changes_weights=True,
    structured=True,
)
