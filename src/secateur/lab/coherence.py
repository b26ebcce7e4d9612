"""Does a criterion know good from bad? The lowest go, the highest go, any go: quality must fall in that order.

AMP's coherence check (Mugnaini et al. 2025, arXiv 2504.21174, section 4) for any criterion: all three at the same
counts in every site, so that only the choice differs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from secateur.core.errors import SettingsError
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent, track
from secateur.core.seeding import generator
from secateur.core.select import keep_top
from secateur.data.dataset import Dataset
from secateur.measure.quality import quality
from secateur.scores.weights import uniform_random
from secateur.shrink.apply import masked


@dataclass(frozen=True)
class Coherence:
    """Quality without the lowest, without random and without the highest units.

    Attributes:
        metric: accuracy or perplexity.
        higher_is_better: which way is better.
        standard: the criterion as it is meant.
        random: one value a draw.
        reversed: the criterion the wrong way round.
    """

    metric: str
    higher_is_better: bool
    standard: float
    random: tuple[float, ...]
    reversed: float

    @property
    def chance(self) -> float:
        """Mean over the random draws."""
        return sum(self.random) / len(self.random)

    @property
    def holds(self) -> bool:
        """Whether standard is better than chance and chance better than reversed, both strictly."""
        ranks = (self.standard, self.chance, self.reversed)
        best, middle, worst = ranks if self.higher_is_better else tuple(-value for value in ranks)
        return best > middle > worst

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"chance": self.chance, "holds": self.holds}

    def __str__(self) -> str:
        word = "holds" if self.holds else "does not hold"
        return (
            f"{self.metric}: standard {self.standard:.4g}, random {self.chance:.4g} (mean of {len(self.random)}), "
            f"reversed {self.reversed:.4g}: the order {word}"
        )


def coherence(
    model: nn.Module, plan: Plan, data: Dataset, *, draws: int = 3, seed: int = 0, progress: Progress | None = None
) -> Coherence:
    """Measure a model under a plan's counts with its criterion as it is, at random, and reversed. It is left as it was.

    Args:
        model: the model that the plan was made on.
        plan: with its scores (`keep_scores=True`); how many units each site keeps is taken from its masks.
        data: to measure on.
        draws: random choices, whose mean is chance.
        seed: of the draws.
        progress: receives progress.

    Raises:
        SettingsError: the plan has no scores for one of its sites, or new weights, which fit only its own choice.
    """
    if plan.weights:
        raise SettingsError("the plan changes kept weights for its own choice; the other two would be unfair on them")
    if missing := sorted(plan.masks.keys() - plan.scores.keys()):
        raise SettingsError(f"the plan has no scores for '{missing[0]}'; plan with keep_scores=True")
    if draws < 1:
        raise SettingsError(f"draws must be 1 or more, got {draws}")
    choices = [
        plan.scores,
        {name: -scores for name, scores in plan.scores.items()},
        *({name: _draw(site.shape, seed, draw, name) for name, site in plan.sites.items()} for draw in range(draws)),
    ]
    found = []
    for scores in track(choices, progress or Silent(), "choices"):
        with masked(model, chosen(plan, scores)):
            found.append(quality(model, data))
    values = [one.value for one in found]
    return Coherence(found[0].metric.value, found[0].higher_is_better, values[0], tuple(values[2:]), values[1])


def chosen(plan: Plan, scores: Mapping[str, Tensor]) -> Plan:
    """The plan with the same number of units in every site, those with the highest scores."""
    masks = {
        name: keep_top(scores[name].reshape(-1), plan.kept(name)).view(mask.shape) for name, mask in plan.masks.items()
    }
    return replace(plan, masks=masks, scores={}, applied={})


def _draw(shape: tuple[int, ...], seed: int, draw: int, name: str) -> Tensor:
    return uniform_random(shape, generator(seed, "coherence", str(draw), name))
