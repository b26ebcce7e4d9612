"""What becomes of cut copies of one trained network: criteria and figures at once, figures after retraining."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from torch import nn

from secateur.core.errors import NumericsError
from secateur.core.select import keep_top
from secateur.data.running import evaluating
from secateur.shrink.subsets import Layers, Units
from secateur.train.candidates import Candidates
from secateur.train.endings import Ending, endings
from secateur.train.loop import Fit
from secateur.train.study import Study

Row = dict[str, Any]
Run = dict[str, dict[str, float]]
Criterion = Callable[[nn.Module, Units], float]
LOSS, L1 = "pruned_loss", "l1_norm"


class Trial:
    """Candidates of one trained network, each cut and retrained as often as there are fits.

    Every result comes from the study's ledger if it is there.

    Args:
        study: its `fit`, steps and metric.
        layers: of the trained network.
        drawn: the candidates.
        loss: model -> training loss.
        criteria: further ones, (whole model, removed units) -> number; small = goes first.
        fits: one retraining each.
        short: a shorter retraining with its own `steps`, once a candidate.
        final: which value of a figure counts.
        tail: evaluations that a mean is over.
    """

    def __init__(
        self,
        study: Study,
        layers: Layers,
        drawn: Candidates,
        *,
        loss: Callable[[nn.Module], float],
        criteria: Mapping[str, Criterion],
        fits: Sequence[Fit],
        short: Any = None,
        final: Ending = Ending.MEAN,
        tail: int = 5,
    ):
        self.study, self.layers, self.drawn, self.loss, self.norms = study, layers, drawn, loss, layers.norms()
        self.fits, self.short, self.final, self.tail = fits, short, final, tail
        self.criteria: dict[str, Criterion] = {LOSS: self.pruned_loss, L1: self.l1_norm, **criteria}

    def pruned_loss(self, _: nn.Module, removed: Units) -> float:
        """Training loss right after pruning, in eval mode: the oracle's own criterion."""
        smaller = self.layers.smaller(removed)
        with evaluating(smaller):
            return float(self.loss(smaller))

    def l1_norm(self, _: nn.Module, removed: Units) -> float:
        """Norm of all that goes."""
        return sum(float(self.norms[name][units].sum()) for name, units in removed.items())

    def candidate(self, index: int) -> Row:
        """The row of one candidate."""
        return self.row(str(index), self.drawn.named(self.drawn.removed[index]))

    def smallest_norms(self) -> Row:
        """The row of what L1-norm pruning removes; with the candidate's own results if it is among them."""
        removals = self.layers.removals
        gone = {name: ~keep_top(self.norms[name], units - count) for name, (units, count) in removals.items()}
        removed = {name: mask.nonzero().flatten().tolist() for name, mask in gone.items()}
        known = [self.drawn.named(one) for one in self.drawn.removed]
        return self.row(str(known.index(removed)) if removed in known else L1, removed) | {"network": "l1"}

    def row(self, key: str, removed: Units) -> Row:
        """Numbers of the criteria, figures before and after; the latter averaged over the retrainings.

        Args:
            key: of the results in the ledger.
            removed: what is cut out.
        """
        once = self.study.ledger.once
        row: Row = {"network": "candidate", "removed": removed}
        for name, score in self.criteria.items():
            row[name] = once(f"{key}-by-{name}", partial(self.number, score, removed))
        row["before"] = once(f"{key}-before", lambda: dict(self.study.fit(self.layers.smaller(removed), {}, 0, 0)))
        row["repeats"] = [
            once(f"{key}-{repeat}", partial(self.retrained, removed, fit, self.study.steps))
            for repeat, fit in enumerate(self.fits)
        ]
        row["after"] = self.averaged(row["repeats"])
        if self.short is not None:
            run = once(f"{key}-short", partial(self.retrained, removed, self.short, self.short.steps))
            row["short"] = self.averaged([run])
        return row

    def number(self, criterion: Criterion, removed: Units) -> float:
        """What a criterion says of the whole model and these units."""
        return float(criterion(self.layers.model, removed))

    def retrained(self, removed: Units, fit: Fit, steps: int) -> Run:
        """How the retraining of a copy of its own ends; nothing if the loss became NaN or infinite."""
        try:
            metrics = fit(self.layers.smaller(removed), {}, 0, steps)
        except NumericsError:
            return {}
        return endings(metrics, self.study.metric, steps, self.tail)

    def averaged(self, runs: Sequence[Run]) -> dict[str, float]:
        """Means over retrainings of the values that count; nothing if one of them failed."""
        if not all(runs):
            return {}
        values = [run[self.final.value] for run in runs]
        return {name: fmean(one[name] for one in values) for name in values[0]}
