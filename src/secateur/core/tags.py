"""The survey's taxonomy (Cheng, Zhang, Shi 2023, arXiv 2308.06767) as enumerations.

One source of truth: registration checks against it, the command line filters by it and the docs
table is generated from it. Values marked "ours" extend the survey for what it does not cover.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import Any, get_args, get_origin, get_type_hints

from secateur.core.errors import SettingsError, UnknownNameError


class Speedup(StrEnum):
    """Where zeros or cuts bring speed: structured anywhere, the others on special kernels."""

    UNSTRUCTURED = "unstructured"
    SEMI_STRUCTURED = "semi_structured"
    STRUCTURED = "structured"
    NOT_APPLICABLE = "not_applicable"


class When(StrEnum):
    """When pruning happens relative to training."""

    BEFORE_TRAINING = "before_training"
    EARLY_TRAINING = "early_training"
    DURING_TRAINING = "during_training"
    AFTER_TRAINING = "after_training"
    RUN_TIME = "run_time"
    NOT_APPLICABLE = "not_applicable"


class Criterion(StrEnum):
    """What the importance is computed from."""

    MAGNITUDE = "magnitude"
    LP_NORM = "lp_norm"
    SENSITIVITY_SALIENCY = "sensitivity_saliency"
    LOSS_CHANGE = "loss_change"
    RANDOM = "random"  # from here on: ours
    ACTIVATION = "activation"
    SIMILARITY = "similarity"
    ENTROPY = "entropy"
    ATTENTION = "attention"
    RANK = "rank"
    LEARNED = "learned"
    COST_MODEL = "cost_model"


class Learn(StrEnum):
    """How a mask is learned, if it is."""

    SPARSITY_REGULARIZATION = "sparsity_regularization"
    META_LEARNING = "meta_learning"
    GRAPH_NEURAL_NETWORK = "graph_neural_network"
    REINFORCEMENT_LEARNING = "reinforcement_learning"
    EVOLUTIONARY = "evolutionary"  # from here on: ours
    BILEVEL = "bilevel"
    END_TO_END_MASK = "end_to_end_mask"


class Fusion(StrEnum):
    """What pruning is combined with."""

    QUANTIZATION = "quantization"
    TENSOR_DECOMPOSITION = "tensor_decomposition"
    NAS = "nas"
    DISTILLATION = "distillation"
    LORA = "lora"  # from here on: ours
    MIXTURE_OF_EXPERTS = "mixture_of_experts"


class Granularity(StrEnum):
    """What one removed unit is. `code` is the letter in the survey's paper list, if it has one."""

    LAYER = "layer"
    FILTER = "filter"
    CHANNEL = "channel"
    NEURON = "neuron"
    HEAD = "head"
    BLOCK = "block"
    MATRIX = "matrix"
    EMBEDDING = "embedding"
    WEIGHT = "weight"
    OTHER = "other"
    EXPERT = "expert"  # from here on: ours
    RANK = "rank"
    TOKEN = "token"
    EDGE = "edge"
    SAMPLE = "sample"
    STEP = "step"
    AGENT = "agent"
    CONDITION = "condition"

    @property
    def code(self) -> str:
        """The survey's one-letter code; the word itself where the survey has no letter."""
        return CODES.get(self, self.value)

    @classmethod
    def from_code(cls, code: str) -> Granularity:
        """The inverse of `code`."""
        words = {letter: word for word, letter in CODES.items()}
        return words[code] if code in words else cls(code)


CODES = {
    Granularity.LAYER: "L",
    Granularity.FILTER: "F",
    Granularity.CHANNEL: "C",
    Granularity.NEURON: "N",
    Granularity.HEAD: "H",
    Granularity.BLOCK: "B",
    Granularity.MATRIX: "M",
    Granularity.EMBEDDING: "E",
    Granularity.WEIGHT: "W",
    Granularity.OTHER: "Other",
}


class Schedule(StrEnum):
    """In one go or in rounds."""

    ONE_SHOT = "one_shot"
    ITERATIVE = "iterative"
    NOT_APPLICABLE = "not_applicable"


class Data(StrEnum):
    """Whether the criterion sees samples."""

    DATA_FREE = "data_free"
    DATA_DRIVEN = "data_driven"
    NOT_APPLICABLE = "not_applicable"


class Weights(StrEnum):
    """Which weights are pruned."""

    INITIALIZED = "initialized"
    PRETRAINED = "pretrained"
    NOT_APPLICABLE = "not_applicable"


class Recovery(StrEnum):
    """What training follows."""

    SCRATCH = "scratch"
    FINE_TUNE = "fine_tune"
    REWIND = "rewind"
    NONE = "none"
    NOT_APPLICABLE = "not_applicable"


class TaskScope(StrEnum):
    """Pruned on the task it is used for, or moved to another."""

    ORIGINAL = "original"
    TRANSFER = "transfer"
    NOT_APPLICABLE = "not_applicable"


class Runtime(StrEnum):
    """One fixed sub-network, or one per input."""

    STATIC = "static"
    DYNAMIC = "dynamic"
    NOT_APPLICABLE = "not_applicable"


class Allocation(StrEnum):
    """How sparsity is spread over the layers."""

    LOCAL = "local"
    GLOBAL = "global"
    LEARNED = "learned"
    SEARCHED = "searched"
    NOT_APPLICABLE = "not_applicable"


class Supervision(StrEnum):
    """What labels the criterion needs."""

    SUPERVISED = "supervised"
    SEMI = "semi"
    SELF = "self"
    UNSUPERVISED = "unsupervised"
    NOT_APPLICABLE = "not_applicable"


class Domain(StrEnum):
    """Kinds of network."""

    CNN = "cnn"
    VIT = "vit"
    BERT = "bert"
    LLM = "llm"
    DIFFUSION = "diffusion"
    VLM = "vlm"
    DETECTION = "detection"
    OTHER = "other"


@dataclass(frozen=True)
class Tags:
    """A method's place in the taxonomy. Sets hold every value that applies, possibly none.

    `physical` is True where units are really cut out (not only masked); `post_training` marks
    methods that need no or almost no retraining.

    Raises:
        SettingsError: a field holds something else than its enumeration; lists the allowed values.
    """

    speedup: frozenset[Speedup]
    when: frozenset[When]
    criterion: frozenset[Criterion]
    granularity: frozenset[Granularity]
    schedule: Schedule
    data: Data
    weights: Weights
    recovery: Recovery
    allocation: Allocation
    supervision: Supervision
    domain: frozenset[Domain]
    learn: frozenset[Learn] = frozenset()
    fusion: frozenset[Fusion] = frozenset()
    task: TaskScope = TaskScope.ORIGINAL
    runtime: Runtime = Runtime.STATIC
    physical: bool = False
    post_training: bool = False

    def __post_init__(self) -> None:
        for name, (kind, is_set) in axes().items():
            value = getattr(self, name)
            values = value if is_set and isinstance(value, (set, frozenset)) else (value,)
            for item in values:
                if not isinstance(item, kind):
                    allowed = ", ".join(map(str, kind)) if issubclass(kind, StrEnum) else "True, False"
                    raise SettingsError(f"tag {name}={item!r} is not allowed; allowed: {allowed}")
            if is_set:
                object.__setattr__(self, name, frozenset(values))

    @property
    def universal(self) -> bool:
        """Whether the speed-up shows on any hardware."""
        return self.speedup == {Speedup.STRUCTURED}

    def matches(self, axis: str, value: str) -> bool:
        """Whether a tag has a value (for sets: contains it).

        Raises:
            UnknownNameError: no such axis or value.
        """
        known = axes()
        if axis not in known:
            raise UnknownNameError("tag", axis, known)
        kind, is_set = known[axis]
        allowed = [member.value for member in kind] if issubclass(kind, StrEnum) else ["true", "false"]
        if value.lower() not in allowed:
            raise UnknownNameError(f"value of the tag {axis}", value, allowed)
        mine = getattr(self, axis)
        return value.lower() in {str(item).lower() for item in (mine if is_set else {mine})}

    def to_json(self) -> dict[str, Any]:
        """Plain data: sets as sorted lists."""
        return {
            name: sorted(getattr(self, name)) if is_set else getattr(self, name) for name, (_, is_set) in axes().items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tags:
        """The inverse of `to_json`.

        Raises:
            SettingsError: an axis is missing or unknown, or a value is not allowed.
        """
        known = axes()
        if different := sorted(known.keys() ^ data.keys()):
            raise SettingsError(f"tag '{different[0]}' is {'missing' if different[0] in known else 'no tag'}")
        values: dict[str, Any] = {}
        for name, (kind, is_set) in known.items():
            values[name] = frozenset(_member(kind, i) for i in data[name]) if is_set else _member(kind, data[name])
        return cls(**values)


def _member(kind: type, value: Any) -> Any:
    """The member with that value; what is none stays as it is for `Tags` to refuse."""
    return kind(value) if issubclass(kind, StrEnum) and value in set(kind) else value


def axes() -> dict[str, tuple[type, bool]]:
    """Axis name -> (type of its values, whether it holds a set)."""
    hints = get_type_hints(Tags)
    found = {}
    for item in fields(Tags):
        hint = hints[item.name]
        is_set = get_origin(hint) is frozenset
        found[item.name] = (get_args(hint)[0] if is_set else hint, is_set)
    return found
