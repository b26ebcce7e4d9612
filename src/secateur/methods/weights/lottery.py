"""The lottery ticket hypothesis: iterative magnitude pruning with resetting (Frankle and Carbin 2019, ICLR).

A dense network at its initial values theta_0 contains a sparse one that, trained alone from *its own* initial
values, does at least as well in at most as many steps. It is found afterwards:

    m <- 1;  repeat: train m * theta_0 for T steps;  in every layer the share p of the *surviving* weights with the
    smallest |theta_T| goes from m (p / 2 in the output layer);  all other values back to theta_0

so n rounds leave (1 - p)^n. Everything goes back: biases, batch-norm gains and statistics too. `strategy` has
the paper's variants: `continued` trains on from round to round and resets once, `one_shot` removes all at once.
Deep networks take one ranking over all layers but the output (`ranking=global`; leave shortcuts out by `exclude`).

What makes a ticket special is what its controls lose: `reinit` trains the same mask from another draw of the same
constructor, `shuffled` as many weights per layer at random places from theta_0.

Early stopping is at the best of the figures that `fit` gives as `loss@100`, `loss@200`, ... (or another name).

The first released code sorts survivors and removes up to and including index round(p * count); OpenLTH takes
ceil(p * all survivors), those of spared layers included, and one more. Both let ties go together, and leave
momentum on removed weights. Ours removes what was asked, ties by index, and the last round removes less, so that
the asked density is met exactly; `reference=True` has the released thresholds. Whether rounds see the same order
of the data is up to `fit`. Cost: rounds + 1 whole trainings and one per control; zeros alone make nothing faster.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

from pydantic import Field

from secateur.core import tags as t
from secateur.core.errors import SettingsError
from secateur.core.method import Group, Method, Protocol
from secateur.core.progress import track
from secateur.core.units import UnitKind
from secateur.train.controls import Shuffle, reinitialised, shuffled
from secateur.train.cuts import REFERENCE_COUNTS, Cuts, CutSettings
from secateur.train.study import Findings, Level, Masks, RewindSettings, RewindTo, Rounds, State, Study
from secateur.train.tickets import dead_layers, gain, level_row, trained_beside


class Strategy(StrEnum):
    """How the mask is found."""

    ITERATIVE = "iterative"  # reset before every round
    CONTINUED = "continued"  # train on from round to round, reset once at the end
    ONE_SHOT = "one_shot"  # train once, remove everything


class Control(StrEnum):
    """What a ticket is compared with."""

    REINIT = "reinit"  # same mask, other initial values
    SHUFFLED = "shuffled"  # other mask, same initial values


class LotterySettings(CutSettings):
    """Defaults: the paper's LeNet-300-100, 20 % per round and layer, 10 % of the output layer."""

    strategy: Strategy = Field(Strategy.ITERATIVE, description="iterative, continued or one_shot")
    controls: tuple[Control, ...] = Field((), description="reinit, shuffled: trained beside the last level's ticket")
    control_levels: tuple[int, ...] = Field((), description="levels whose controls are trained as well")
    draws: int = Field(1, ge=1, description="of each control")
    shuffle: Shuffle = Field(Shuffle.LAYER, description="what a shuffled mask keeps: layer, global or even counts")
    stopping: str = Field("", description="figure whose best step is where training would stop; default: the metric")


def lottery(study: Study, settings: LotterySettings) -> Findings:
    """Find the mask round by round; train the ticket and its controls; one row per network."""
    run = _Run(study, settings)
    level = run.dense()
    ticket = level
    for index in track(range(1, run.cuts.rounds + 1), study.progress, "rounds of pruning"):
        level = run.rounds.next(level, run.cuts.masks(index, level.masks, level.after))
        ticket = run.ticket(level)
        if index == run.cuts.rounds or index in settings.control_levels:
            run.controls(ticket)
    return Findings(
        rows=run.rows, summary=run.summary(), masks=ticket.masks, state=ticket.after, warnings=run.warnings(ticket)
    )


class _Run:
    """What all rounds of one search share, and the rows that they leave."""

    def __init__(self, study: Study, settings: LotterySettings):
        if settings.strategy is Strategy.ONE_SHOT:
            settings = _one_round(settings)
        self.study, self.settings, self.rows = study, settings, list[dict[str, Any]]()
        self.continued = settings.strategy is Strategy.CONTINUED
        self.cuts = Cuts(study.sites(study.model()), study.budget, settings)
        self.rounds = Rounds(study, RewindSettings(rewind=RewindTo.NONE if self.continued else RewindTo.INIT))
        outside = [level for level in settings.control_levels if not 1 <= level <= self.cuts.rounds]
        if outside:
            raise SettingsError(f"control_levels={outside} do not exist: there are levels 1 to {self.cuts.rounds}")

    def dense(self) -> Level:
        """Level 0."""
        level = self.rounds.first()
        self.add(level, "dense")
        return level

    def ticket(self, level: Level) -> Level:
        """The sparse network trained from theta_0: the level itself, unless training went on from round to round."""
        if not self.continued:
            self.add(level, "ticket")
            return level
        self.add(level, "continued")
        if level.index < self.cuts.rounds and level.index not in self.settings.control_levels:
            return level
        found = self.trained("ticket", level, self.rounds.trunk(), level.masks)
        self.add(found, "ticket")
        return found

    def controls(self, ticket: Level) -> None:
        """Every control of one ticket, trained exactly as the ticket was."""
        for control in self.settings.controls:
            for draw in range(self.settings.draws):
                masks, state = ticket.masks, self.rounds.trunk()  # never the ticket's own state: it is zero elsewhere
                if control is Control.REINIT:
                    state = reinitialised(self.study, draw)
                else:
                    masks = shuffled(masks, self.study.seed, self.settings.shuffle, draw, self.cuts.whole)
                self.add(self.trained(f"{control.value}-{draw}", ticket, state, masks), control.value, draw)

    def trained(self, name: str, level: Level, state: State, masks: Masks) -> Level:
        """One more training of the whole recipe."""
        return trained_beside(self.study, f"{name}-{level.index}", level.index, state, masks)

    def add(self, level: Level, network: str, draw: int = 0) -> None:
        """One row."""
        self.rows.append(level_row(self.study, level, network, draw, self.settings.stopping))

    def summary(self) -> dict[str, Any]:
        """Dense and last ticket side by side, and the sparsest ticket that is at least as good."""
        metric = self.study.metric
        dense, tickets = self.rows[0], [row for row in self.rows if row["network"] == "ticket"]
        winning = [row["density"] for row in tickets if gain(row, dense, metric) >= 0]
        return {
            "dense": dense.get(metric),
            "ticket": tickets[-1].get(metric) if tickets else None,
            "density": self.rows[-1]["density"],
            "smallest_winning_density": min(winning, default=None),
            "rounds": self.cuts.rounds,
            "trainings": len(self.rows),
        }

    def warnings(self, ticket: Level) -> list[str]:
        """What the user should know before relying on the ticket."""
        found = dead_layers(ticket.masks) + [REFERENCE_COUNTS] * self.settings.reference
        loss = -gain(ticket.metrics, self.rows[0], self.study.metric)
        if loss > 0:
            found.append(
                f"the ticket is worse than the dense network by {loss:.4g} in {self.study.metric}; on deep networks "
                "with a high learning rate rewind to a slightly later step (method rewinding), or keep more weights"
            )
        return found


def _one_round(settings: LotterySettings) -> LotterySettings:
    if settings.rounds not in (None, 1):
        raise SettingsError(f"one_shot is one round, but rounds={settings.rounds}; leave out one of the two")
    return settings.model_copy(update={"rounds": 1})


method = Method(
    name="lottery",
    paper="13",
    title="The lottery ticket hypothesis: Finding sparse, trainable neural networks",
    citation="Frankle, Carbin 2019, ICLR, arXiv 1803.03635",
    formula="n rounds: train theta_0 * m, remove the share p of the survivors with the smallest |w|, reset to theta_0",
    kind=Protocol.PROCEDURE,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.UNSTRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.MAGNITUDE}),
        granularity=frozenset({t.Granularity.WEIGHT}),
        schedule=t.Schedule.ITERATIVE,
        data=t.Data.DATA_FREE,
        weights=t.Weights.INITIALIZED,
        recovery=t.Recovery.SCRATCH,
        allocation=t.Allocation.LOCAL,
        supervision=t.Supervision.UNSUPERVISED,
        domain=frozenset({t.Domain.CNN, t.Domain.OTHER}),
    ),
    settings=LotterySettings,
    procedure=lottery,
    units=UnitKind.WEIGHT,
    exact=Group.TOTAL,
    changes_weights=True,
)
