"""Layer removal by several selectors, as compared by Shrestha et al. 2026 (On the Limits of Layer Pruning).

Whole decoder layers go and nothing else changes ("passthrough"). Of L layers n = floor(sparsity * L) are removed:
reverse, the last ones, without the very last unless asked; cosine, at once those with the highest mean cosine of the
hidden state before and after, first over a prompt's tokens and then over prompts, so that every prompt counts the same;
iterative, n times the layer without which the model does best on a task, layer 0 never, of equal ones the later; or a
given list. Indices are those of the original model.

The default task of `iterative` is the loss on the calibration data. The paper uses the accuracy on 100 fixed training
items of several tasks, each as a share of the full model's: `measure.tasks.task_fitness` makes that, for `fitness=` in
Python. Its items must not be those that are reported on. The released slices silently repeat layers of an unsorted
list; here such a list is put in order, and repeated or missing indices are refused.

Classification survives this better than generation: measure both (`measure.tasks.abilities`), and see
`recover.self_generated` for the paper's recovery.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Any

import torch
from pydantic import Field, field_serializer
from torch import Tensor, nn

from secateur.allocate.depth import blocks_to_remove, depth_decision
from secateur.core import tags as t
from secateur.core.errors import BudgetError, ModelError, SettingsError
from secateur.core.journal import Notes
from secateur.core.method import Decision, Group, Method, Protocol, Settings, Task
from secateur.core.select import keep_top
from secateur.core.units import UnitKind
from secateur.data.batches import task_loss
from secateur.data.running import device_of
from secateur.scores.blocks import cosine
from secateur.search.greedy import remove_greedily
from secateur.shrink.depth import without_blocks
from secateur.stats.depth import block_flow
from secateur.stats.walker import BlockVisit, each_block
from secateur.structure.stacks import Stack, main_stack


class Selector(StrEnum):
    """How layers are chosen."""

    REVERSE = "reverse"
    COSINE = "cosine"
    ITERATIVE = "iterative"
    GIVEN = "given"


Fitness = Callable[[nn.Module], float]


class LayerLimitsSettings(Settings):
    """The paper's three selectors, and a list of one's own."""

    selector: Selector = Field(
        Selector.COSINE,
        description="reverse: the last layers; cosine: most alike before and after; iterative: greedy by a task; given",
    )
    drop_last: bool = Field(False, description="reverse: whether the very last layer may go")
    layers: tuple[int, ...] = Field((), description="given: which layers of the original model go, counted from 0")
    fitness: Any = Field(
        None,
        description="iterative, in Python: a function of a model, higher = better; default: minus the loss on the data",
    )

    @field_serializer("fitness")
    def _fitness_name(self, fitness: Any) -> str | None:
        return None if fitness is None else str(getattr(fitness, "__qualname__", type(fitness).__name__))


Chosen = tuple[Tensor, Tensor, dict[str, float]]
"""Keep-mask `[layers]`, scores `[layers]` and facts."""


def plan(task: Task, settings: LayerLimitsSettings) -> Decision:
    """Choose the layers to remove."""
    if getattr(getattr(task.model, "config", None), "is_encoder_decoder", False):
        raise ModelError("layer_limits removes layers of decoders; this is an encoder-decoder model, use shortgpt")
    stack = main_stack(task.model)
    count = blocks_to_remove(task, stack, "layer_limits", least=2)
    choose = {
        Selector.REVERSE: reverse,
        Selector.COSINE: most_alike,
        Selector.ITERATIVE: iterative,
        Selector.GIVEN: given,
    }
    return depth_decision(task, stack, *choose[settings.selector](task, settings, stack, count))


def reverse(task: Task, settings: LayerLimitsSettings, stack: Stack, count: int) -> Chosen:
    """The last layers; the very last stays unless `drop_last`."""
    scores = -torch.arange(len(stack.blocks), dtype=torch.float32)
    if not settings.drop_last:
        scores[-1] = torch.inf
    return _lowest(task, stack, scores, count), scores, {}


def most_alike(task: Task, settings: LayerLimitsSettings, stack: Stack, count: int) -> Chosen:
    """The lowest 1 - cos, the mean over prompts of each prompt's mean over its tokens."""
    masks = [batch.kwargs.get("attention_mask") for batch in task.batches]

    def measure(visit: BlockVisit) -> Notes:
        if visit.stack.name != stack.name:
            return Notes()
        of_prompts = [
            prompt_means(cosine(before, after).view(before.shape[:2]), mask)
            for (before, after), mask in zip(block_flow(visit), masks, strict=True)
        ]
        return Notes({"scores": 1 - torch.cat(of_prompts).mean()})

    section = each_block(task, "prompt-influence", measure)
    scores = torch.stack([section[name].tensors["scores"] for name in stack.names]).float().cpu()
    facts = {f"influence_{index}": round(float(score), 6) for index, score in enumerate(scores)}
    return _lowest(task, stack, scores, count), scores, facts


def prompt_means(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `[prompts, tokens]` over the tokens of each prompt that are no padding, `[prompts]`."""
    if mask is None or mask.shape != values.shape:
        return values.mean(1)
    real = mask.to(values)
    return (values * real).sum(1) / real.sum(1)


def iterative(task: Task, settings: LayerLimitsSettings, stack: Stack, count: int) -> Chosen:
    """Greedy: the layer goes without which the fitness is highest, one after the other; layer 0 never."""
    if task.residency is not None:
        raise SettingsError(
            "selector=iterative runs the whole model again and again, which streaming cannot; use cosine"
        )
    if settings.fitness is not None and not callable(settings.fitness):
        raise SettingsError("fitness must be a function of a model; it can be given in Python only")
    fitness: Fitness = settings.fitness or (lambda model: -calibration_loss(task, model))
    candidates = [index for index in range(1, len(stack.blocks)) if task.wants(stack.names[index])]
    if count > len(candidates):
        raise BudgetError(
            f"{count} of {len(stack.blocks)} blocks cannot go: layer 0 never does and "
            f"{len(stack.blocks) - 1 - len(candidates)} others are excluded"
        )

    def without(gone: tuple[int, ...]) -> float:
        with without_blocks(task.model, stack.name, [index not in gone for index in range(len(stack.blocks))]):
            return float(fitness(task.model))

    found = remove_greedily(candidates, count, without, task.progress)
    scores = torch.full((len(stack.blocks),), float(count))
    for place, index in enumerate(found.order):
        scores[index] = place
    facts = {f"fitness_without_{index}": value for index, value in (found.rounds[0] if found.rounds else {}).items()}
    facts |= {f"round_{place}": float(index) for place, index in enumerate(found.order)}
    return scores == count, scores, facts


def calibration_loss(task: Task, model: nn.Module) -> float:
    """Mean loss in nats over the calibration data."""
    batches = [batch.to(device_of(model)) for batch in task.batches]
    return sum(float(task_loss(model, batch)) * batch.samples for batch in batches) / sum(b.samples for b in batches)


def given(task: Task, settings: LayerLimitsSettings, stack: Stack, count: int) -> Chosen:
    """The user's list, which must be as long as the budget says."""
    total, layers = len(stack.blocks), settings.layers
    wrong = [index for index in layers if not 0 <= index < total]
    if wrong or len(set(layers)) < len(layers) or len(layers) != count:
        raise SettingsError(
            f"layers={','.join(map(str, layers)) or '(none)'} must name {count} different layers, as many as "
            f"the budget removes, from 0 to {total - 1}"
        )
    keep = torch.tensor([index not in layers for index in range(total)])
    return keep, keep.float(), {}


def _lowest(task: Task, stack: Stack, scores: Tensor, count: int) -> Tensor:
    """Keep-mask without the `count` lowest scores; excluded layers stay, of equal ones the later goes."""
    free = torch.tensor([task.wants(name) for name in stack.names])
    return keep_top(scores.masked_fill(~free, torch.inf), len(scores) - count)


method = Method(
    name="layer_limits",
    paper="28",
    title="On the limits of layer pruning for generative reasoning in LLMs",
    citation="Shrestha, Shrestha, Nepal, Kim, Ross 2026",
    formula="last layers; or lowest 1 - mean_prompt mean_token cos(h_l, h_l+1); or greedy by a task's fitness",
    kind=Protocol.PLAN,
    tags=t.Tags(
        speedup=frozenset({t.Speedup.STRUCTURED}),
        when=frozenset({t.When.AFTER_TRAINING}),
        criterion=frozenset({t.Criterion.SIMILARITY, t.Criterion.LOSS_CHANGE}),
        granularity=frozenset({t.Granularity.LAYER, t.Granularity.BLOCK}),
        schedule=t.Schedule.ONE_SHOT,
        data=t.Data.DATA_DRIVEN,
        weights=t.Weights.PRETRAINED,
        recovery=t.Recovery.FINE_TUNE,
        allocation=t.Allocation.GLOBAL,
        supervision=t.Supervision.SELF,
        domain=frozenset({t.Domain.LLM}),
        fusion=frozenset({t.Fusion.LORA}),
        physical=True,
    ),
    settings=LayerLimitsSettings,
    run=plan,
    streams=True,
    units=UnitKind.BLOCK,
    exact=Group.SITE,
    needs_data=True,
)
