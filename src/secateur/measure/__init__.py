"""What a model costs and how good it is: size, FLOPs, latency, memory, quality, and how sure that is."""

import sys
from types import ModuleType
from typing import Any

from secateur.measure.flops import Flops, count, effective_flops, flops
from secateur.measure.latency import Latency, latency
from secateur.measure.layouts import Layout
from secateur.measure.machine import MachineFacts, Row, probe_machine
from secateur.measure.measurement import Change, Comparison, Measurement, compare, measure, measure_together
from secateur.measure.memory import Memory, forward_memory, peak_memory
from secateur.measure.quality import Metric, Quality, accuracy, perplexity, quality
from secateur.measure.size import nonzeros, parameters, sparsity, weight_bytes
from secateur.measure.statistics import (
    Interval,
    Paired,
    bootstrap,
    interval,
    paired,
    paired_quality,
    quality_interval,
)

__all__ = [
    "Change",
    "Comparison",
    "Flops",
    "Interval",
    "Latency",
    "Layout",
    "MachineFacts",
    "Measurement",
    "Memory",
    "Metric",
    "Paired",
    "Quality",
    "Row",
    "accuracy",
    "bootstrap",
    "compare",
    "count",
    "effective_flops",
    "flops",
    "forward_memory",
    "interval",
    "latency",
    "measure",
    "measure_together",
    "nonzeros",
    "paired",
    "paired_quality",
    "parameters",
    "peak_memory",
    "perplexity",
    "probe_machine",
    "quality",
    "quality_interval",
    "sparsity",
    "weight_bytes",
]


class _Callable(ModuleType):
    """`secateur.measure(model)` is the call, `secateur.measure.latency` a part: one name serves both.

    Importing a submodule always binds it in its package, so a function of that name would vanish.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Measurement:
        return measure(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
