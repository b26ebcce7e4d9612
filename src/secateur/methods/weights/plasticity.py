"""Pruning plasticity: how well a network recovers from a prune at a given moment (Liu et al. 2021, section 3).

For every moment k of a normal training: prune the network of step k by magnitude, once; train it on for a fixed,
short budget with learning rates and data as they are from k on;

    plasticity = quality after that training - quality right before the prune.

Regeneration follows the prune at once, in every layer, by |dL/dw| of one batch at step k before the prune:
`restore` brings back as many as were pruned, at zero, as in the released code; `exchange` swaps a share of the
survivors and leaves the density as it is (GraNet's event). Read `restore` with care: the network that is pruned
is dense, so all its connections come back and a dense network is compared with a sparse one. `exchange` is the
comparison at one density; a single one removes more than a short training brings back.

The paper prunes 20, 50, 90 and 98 %, over all layers or in each, before and after the drops of the learning rate,
and trains on for 30 of 160 epochs. Its finding: plasticity falls when the rate falls, and regeneration raises it.

`fit` starts every stretch with a fresh optimiser. The batch's loss comes from the study's `Fitting`; for another
`fit` give extras={"loss": function(model, step) -> scalar tensor}.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from enum import StrEnum
from math import ceil
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from secateur.allocate.spread import Spread, choose
from secateur.core import tags as t
from secateur.core.budget import Budget
from secateur.core.errors import NumericsError, SettingsError
from secateur.core.method import Group, Method, Protocol, Settings
from secateur.core.progress import track
from secateur.core.select import all_finite
from secateur.core.units import UnitKind
from secateur.data.running import training
from secateur.scores.weights import magnitude
from secateur.train.loop import Fitting
from secateur.train.parts import exchange
from secateur.train.snapshot import model_state, put_back
from secateur.train.study import Findings, Masks, State, Study, masked_state

BatchLoss = Callable[[nn.Module, int], Tensor]


class Regeneration(StrEnum):
    """What comes back right after the prune."""

    NONE = "none"
    RESTORE = "restore"  # as many as were pruned: the density before the prune
    EXCHANGE = "exchange"  # a share of the survivors goes as well, as many come back: the density after the prune


Prune = tuple[int, float, Regeneration]  # step, sparsity, what comes back


class PlasticitySettings(Settings):
    """Settings; the study's own sparsity is always among the rates."""

    moments: tuple[float, ...] = Field(
        (0.1, 0.3, 0.5, 0.75), description="when to prune: shares of the training up to 1, optimiser steps above"
    )
    rates: tuple[float, ...] = Field((), description="further sparsities to try (paper: 0.2, 0.5, 0.9, 0.98)")
    recovery: float = Field(
        0.1875, gt=0, description="training after the prune: a share of the whole up to 1 (30 of 160 epochs), or steps"
    )
    spread: Spread = Field(Spread.GLOBAL, description="one ranking over all layers, or layer densities by a rule")
    regenerate: tuple[Regeneration, ...] = Field(
        (Regeneration.NONE, Regeneration.RESTORE), description="what to compare: none, restore, exchange"
    )
    rate: float = Field(0.5, gt=0, le=1, description="share of a layer's survivors that an exchange swaps")


def plasticity(study: Study, settings: PlasticitySettings) -> Findings:
    """A row for every moment, sparsity and way of regenerating."""
    rates = sorted({*settings.rates, study.budget.of(UnitKind.WEIGHT).sparsity})
    after = max(1, _steps(settings.recovery, study.steps))
    moments = [_steps(moment, study.steps) for moment in settings.moments]
    for k in moments:
        if not 0 < k <= study.steps - after:
            raise SettingsError(
                f"pruning at step {k} and training on for {after} steps does not fit a training of {study.steps} "
                "steps; choose other moments or a shorter recovery"
            )
    loss = _batch_loss(study) if set(settings.regenerate) - {Regeneration.NONE} else None
    rows = [
        _row(study, settings, (k, rate, mode), after, loss)
        for k in track(moments, study.progress, "moments")
        for rate in rates
        for mode in settings.regenerate
    ]
    return Findings(rows, dict(_summary(rows)))


def _steps(moment: float, steps: int) -> int:
    return round(moment * steps if moment <= 1 else moment)


def checkpoint(study: Study, k: int, loss: BatchLoss | None) -> dict[str, Any]:
    """State, metrics and, where wanted, |gradients| at step k of normal training, whatever other moments there are."""

    def make() -> dict[str, Any]:
        state, metrics = study.trained(model_state(study.model()), {}, 0, k)
        return {"state": state, "metrics": metrics, "growth": gradients(study, state, k, loss) if loss else {}}

    found: dict[str, Any] = study.ledger.once(f"moment-{k}", make)
    return found


def gradients(study: Study, state: State, k: int, loss: BatchLoss) -> State:
    """|dL/dw| of the batch of step k, for every prunable weight.

    Raises:
        NumericsError: NaN or infinite; names the layer.
    """
    model = study.model()
    put_back(model, state)
    parameters = {name: p for name, p in model.named_parameters() if name in study.sites(model)}
    with training(model, study.seed):
        found = torch.autograd.grad(loss(model, k), list(parameters.values()))
    for name, gradient in zip(parameters, found, strict=True):
        if not all_finite(gradient):
            raise NumericsError(f"the gradient of '{name}' at step {k} is NaN or infinite: nothing can be regrown")
    return {name: gradient.abs().float() for name, gradient in zip(parameters, found, strict=True)}


def pruned(study: Study, settings: PlasticitySettings, state: State, rate: float) -> Masks:
    """Magnitude pruning of a state, once; every layer keeps at least one weight."""
    sites = study.sites(study.model())
    scores = {name: magnitude(state[name]) for name in sites}
    return choose(scores, sites, Budget(rate, floor=max(1, study.budget.floor)), settings.spread)


def regenerated(mask: Tensor, weight: Tensor, growth: Tensor, mode: Regeneration, rate: float) -> Tensor:
    """One layer's mask after the regeneration."""
    kept = int(mask.sum())
    if mode is Regeneration.NONE or kept == mask.numel():
        return mask
    if mode is Regeneration.RESTORE:  # pruned from a dense network: everything that went comes back
        return torch.ones_like(mask)
    return exchange(weight, mask, growth, ceil(rate * kept))


def _row(
    study: Study, settings: PlasticitySettings, prune: Prune, after: int, loss: BatchLoss | None
) -> dict[str, Any]:
    k, rate, mode = prune
    found = checkpoint(study, k, loss)
    state, growth = found["state"], found["growth"]
    survivors = pruned(study, settings, state, rate)
    masks = {
        name: regenerated(keep, state[name], growth.get(name, keep), mode, settings.rate)
        for name, keep in survivors.items()
    }
    cut = masked_state(state, survivors)  # what comes back, comes back at zero
    metrics = study.ledger.once(f"moment-{k}-{rate:g}-{mode}", lambda: study.trained(cut, masks, k, k + after)[1])
    before, later = found["metrics"][study.metric], metrics[study.metric]
    return {
        "step": k,
        "sparsity": rate,
        "regenerate": mode.value,
        "density": sum(int(m.sum()) for m in masks.values()) / sum(m.numel() for m in masks.values()),
        "before": before,
        "after": later,
        "plasticity": before - later if study.metric.endswith("loss") else later - before,
    }


def _summary(rows: list[dict[str, Any]]) -> Iterator[tuple[str, float]]:
    """Mean plasticity over the sparsities: of every moment, and what regenerating adds to it over all."""
    for k in dict.fromkeys(row["step"] for row in rows):
        for mode in dict.fromkeys(row["regenerate"] for row in rows):
            values = [row["plasticity"] for row in rows if (row["step"], row["regenerate"]) == (k, mode)]
            yield f"plasticity at {k}, {mode}", sum(values) / len(values)


def _batch_loss(study: Study) -> BatchLoss:
    fitting = study.fit
    if isinstance(fitting, Fitting) and "loss" not in study.extras:
        return lambda model, step: fitting.loss(model, fitting.stream.at(step).to(next(model.parameters()).device))
    found: BatchLoss = study.extra("loss", "plasticity with regeneration")
    return found


method = Method(
    name="plasticity",
    paper="01",
    title="Sparse training via boosting pruning plasticity with neuroregeneration",
    citation="Liu, Chen, Chen, Atashgahi, Yin, Kou, Shen, Pechenizkiy, Wang, Mocanu 2021, NeurIPS, arXiv 2106.10404",
    formula="quality after a prune at step k and a short training, minus quality right before the prune",
    kind=Protocol.PROCEDURE,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.DURING_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE, t.Criterion.SENSITIVITY_SALIENCY}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
    ),
    settings=PlasticitySettings,
    procedure=plasticity,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
)
