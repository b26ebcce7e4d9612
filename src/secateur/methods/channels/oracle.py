"""Is oracle pruning the true oracle? Does a criterion predict what is left after retraining (Feng et al. 2024)?

Oracle pruning removes the filters whose removal costs the least training loss. This does not prune: it puts that
criterion, or any other, on trial for the user's own network, data and retraining.

    candidates: k = floor(share * n) filters of each of the chosen layers, all ways or M distinct random ones
    for each:   a physically smaller copy -> L_pruned, mean training loss at once -> retrained R times -> y
    tau, p = Kendall's tau-b of L_pruned and y over the candidates, y averaged over the repetitions
    anomaly ratio = share of candidates that end strictly better than the one with the smallest L_pruned

A valid oracle has tau > 0.2 for a loss, < -0.2 for an accuracy, p <= 0.05 and few anomalies; the paper finds that on
tiny tasks only. At 0 steps the loss must rank itself: tau 1, no anomaly. `repeatability` is the tau of two
repetitions with each other: a criterion can hardly reach more. Beside the candidates stands L1-norm pruning.

`make` gives the trained model, or extras={"state": its weights}. The extras besides:

    loss        model -> training loss; default: mean cross entropy over all samples of the study's `Fitting`
    reordered   seed -> fit with another order of the data; default: `fit.reordered`
    criteria    {name: (model, {site: removed units}) -> number}, small = goes first; the model is the whole one
    short       a shorter fit with its own `steps`: does early retraining predict the end?
    example     inputs that the structure is found with; default: those of `Fitting`, or made-up ones

Residual streams stay whole, as in the paper, unless `coupled`. The released code takes the best *test* epoch
(`final=best`) and measures L_pruned on augmented images; here: the mean of the last evaluations, images as they are.
A retraining whose loss becomes NaN or infinite ranks last. Further criteria can be tried on a finished folder.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from pydantic import Field
from torch import nn

from secateur.core import tags as t
from secateur.core.errors import SettingsError
from secateur.core.fingerprint import digests
from secateur.core.method import Group, Method, Protocol, Settings
from secateur.core.progress import track
from secateur.core.units import UnitKind
from secateur.data.example import example_for
from secateur.measure.quality import mean_loss
from secateur.measure.ranking import correlation, verdict, worst_for_missing
from secateur.shrink.cut import tensors_of
from secateur.shrink.subsets import Layers
from secateur.shrink.trial import L1, LOSS, Criterion, Row, Trial
from secateur.train.candidates import Candidates, candidates
from secateur.train.endings import Ending
from secateur.train.loop import Fitting
from secateur.train.snapshot import put_back
from secateur.train.stability import reordered
from secateur.train.study import Findings, Study

COLUMNS = frozenset({"network", "removed", "before", "after", "repeats", "short", LOSS, L1})
FEW = 50  # candidates, below which a large p shows nothing


class OracleSettings(Settings):
    """Defaults: the paper's 1000 random candidates, each retrained three times."""

    candidates: int = Field(1000, ge=2, description="how many; all ways of removing are taken where there are fewer")
    repeats: int = Field(3, ge=1, description="retrainings of each candidate, each with another order of the data")
    criterion: str = Field(LOSS, description="what is on trial: pruned_loss, l1_norm, or a name of extras['criteria']")
    final: Ending = Field(Ending.MEAN, description="mean of the last evaluations, last, or best by the study's metric")
    tail: int = Field(5, ge=1, description="evaluations that `mean` is over, where fit reports `accuracy@step`")
    figures: tuple[str, ...] = Field(
        (), description="figures of fit that are predicted; default: the metric and `loss`"
    )
    kinds: str = Field("channel", description="kinds of unit, comma-separated: channel, neuron, head ...")
    shares: str = Field("", description="own removed share for single layers: 'layer1.*=0.2'; the last match counts")
    coupled: bool = Field(False, description="also units that several layers make together, as on residual streams")


def oracle(study: Study, settings: OracleSettings) -> Findings:
    """One row per candidate and one for L1-norm pruning; rank correlations over the candidates."""
    trial = prepared(study, settings)
    figures = predicted(study, settings, trial.candidate(0))  # a wrong name is said now and not after hours
    rows = [trial.candidate(index) for index in track(range(len(trial.drawn)), study.progress, "candidates")]
    beside = trial.smallest_norms()
    ranks = [ranking(rows, criterion, figure) for figure in figures for criterion in trial.criteria]
    headline = next(one for one in ranks if (one["criterion"], one["figure"]) == (settings.criterion, study.metric))
    numbers = worst_for_missing([row[settings.criterion] for row in rows])
    chosen = rows[numbers.index(min(numbers))]
    summary = {
        "criterion": settings.criterion,
        **{name: headline[name] for name in ("tau", "p", "anomaly", "valid")},
        "n": len(rows),
        "ways": trial.drawn.ways,
        "exhaustive": trial.drawn.exhaustive,
        "repeats": settings.repeats,
        "oracle": {"removed": chosen["removed"], **chosen["after"]},
        "l1": {"removed": beside["removed"], **beside["after"]},
        "rankings": ranks,
    }
    if settings.repeats > 1:
        first, second = ([trial.averaged([row["repeats"][run]]) for row in rows] for run in (0, 1))
        summary["repeatability"] = agreement(first, second, figures)
    if trial.short is not None:
        summary["short"] = agreement([row["short"] for row in rows], [row["after"] for row in rows], figures)
    warnings = caveats(trial, rows, headline)
    return Findings([*rows, beside], summary, warnings=warnings, plan=trial.layers.plan(chosen["removed"]))


def prepared(study: Study, settings: OracleSettings) -> Trial:
    """The trained network, its layers, and the candidates, which are drawn once and stored.

    Raises:
        SettingsError: the folder holds a study of other weights, or something is missing among the extras.
    """
    model = study.model()
    if "state" in study.extras:
        put_back(model, study.extras["state"])
    weights = digests(tensors_of(model))
    if study.ledger.once("weights", lambda: weights) != weights:
        raise SettingsError("the folder holds a study of other weights of this network; choose another folder")
    example = example_for(model, study.extras.get("example", getattr(study.fit, "data", None)))
    layers = Layers(
        model,
        example,
        study.budget,
        kinds=settings.kinds,
        shares=settings.shares,
        include=study.include,
        exclude=study.exclude,
        coupled=settings.coupled,
    )
    drawn = study.ledger.once(
        "candidates",
        lambda: candidates(layers.removals, settings.candidates, study.rng("oracle", "candidates")).to_data(),
    )
    return Trial(
        study,
        layers,
        Candidates.from_data(drawn),
        loss=_train_loss(study),
        criteria=_criteria(study, settings),
        fits=[study.fit, *(reordered(study, str(repeat)) for repeat in range(1, settings.repeats))],
        short=study.extras.get("short"),
        final=settings.final,
        tail=settings.tail,
    )


def predicted(study: Study, settings: OracleSettings, row: Row) -> list[str]:
    """The figures that criteria are compared with.

    Raises:
        SettingsError: `fit` gives no such figure.
    """
    given = row["before"] | row["after"]
    wanted = (study.metric, *(settings.figures or ("loss",) * ("loss" in given)))
    for name in wanted:
        if name not in given:
            raise SettingsError(f"fit gives no figure '{name}', it gives {sorted(given)}; choose others")
    return list(dict.fromkeys(wanted))


def ranking(rows: list[Row], criterion: str, figure: str) -> Row:
    """One criterion against one figure: after retraining, and `before` it."""
    up = not figure.endswith("loss")
    numbers = [row[criterion] for row in rows]
    after, before = (verdict(numbers, [row[when].get(figure) for row in rows], up) for when in ("after", "before"))
    return {"criterion": criterion, "figure": figure, **after, "before": before}


def agreement(first: list[Row], second: list[Row], figures: list[str]) -> Row:
    """Figure -> how alike two retrainings of the same candidates rank them."""

    def column(side: list[Row], name: str) -> list[float]:
        return worst_for_missing([values.get(name) for values in side], not name.endswith("loss"))

    return {name: correlation(column(first, name), column(second, name)).to_json() for name in figures}


def caveats(trial: Trial, rows: list[Row], headline: Row) -> list[str]:
    """How much the headline is worth."""
    how = "all there are" if trial.drawn.exhaustive else f"a random sample of {trial.drawn.ways}"
    found = [
        f"tau rests on {len(rows)} candidates ({how}), each averaged over {len(trial.fits)} retrainings, with "
        f"{headline['distinct'][1]} distinct values of {trial.study.metric}"
    ]
    if len(rows) < FEW and not headline["valid"]:
        found.append(f"fewer than {FEW} candidates: p = {headline['p']} is no proof that there is no correlation")
    failed = sum(not row["after"] for row in rows)
    if failed:
        found.append(f"the loss of {failed} candidates became NaN or infinite in retraining; they are ranked last")
    return found


def _criteria(study: Study, settings: OracleSettings) -> Mapping[str, Criterion]:
    found: Mapping[str, Criterion] = study.extras.get("criteria", {})
    for name in found:
        if name in COLUMNS or not name.isidentifier():
            raise SettingsError(f"a criterion cannot be named '{name}': give it a plain word that is no column yet")
    if settings.criterion not in {LOSS, L1, *found}:
        raise SettingsError(
            f"criterion '{settings.criterion}' is none of {[LOSS, L1, *found]}; give it in extras['criteria']"
        )
    return found


def _train_loss(study: Study) -> Callable[[nn.Module], float]:
    if "loss" not in study.extras and isinstance(study.fit, Fitting):
        data = study.fit.data
        return lambda model: mean_loss(model, data)
    found: Callable[[nn.Module], float] = study.extra("loss", "oracle")
    return found


method = Method(
    name="oracle",
    paper="18",
    title="Is oracle pruning the true oracle?",
    citation="Feng, Tao, Wang 2024, arXiv 2412.00143",
    formula="tau-b of the training loss right after pruning and the result after retraining, over many candidates",
    kind=Protocol.PROCEDURE,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.LOSS_CHANGE}),
        granularity=frozenset({t.Granularity.FILTER, t.Granularity.CHANNEL}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.SUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.VIT, t.Domain.OTHER}),
        physical=True,
    ),
    settings=OracleSettings,
    procedure=oracle,
    units=UnitKind.CHANNEL,
    exact=Group.SITE,
    structured=True,
)
