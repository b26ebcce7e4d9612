"""secateur: remove whatever a deep-learning system can do without, and show what it cost and brought.

    import secateur as sc

    opened = sc.open_model("zoo:pydoc-llama")
    data = sc.open_data("zoo:pydoc", opened)
    plan = sc.plan(opened.model, method="wanda", sparsity=0.5, data=data.calibration)
    with sc.masked(opened.model, plan):
        print(sc.measure(opened.model, data.evaluation))
    sc.apply_(opened.model, plan)
    sc.save(opened.model, "pruned", plan, source=opened.folder)

Names load on first use, so that the command line starts without importing torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from secateur.api import analyse as analyse
    from secateur.api import methods as methods
    from secateur.api import plan as plan
    from secateur.api import sparsify as sparsify
    from secateur.api import study as study
    from secateur.callbacks import hf_callback as hf_callback
    from secateur.callbacks import lightning_callback as lightning_callback
    from secateur.core.budget import Budget as Budget
    from secateur.core.errors import SecateurError as SecateurError
    from secateur.core.plan import Plan as Plan
    from secateur.data.dataset import Dataset as Dataset
    from secateur.io.data import open_data as open_data
    from secateur.io.models import open_model as open_model
    from secateur.lab.prune import Job as Job
    from secateur.lab.prune import prune as prune
    from secateur.measure import compare as compare
    from secateur.measure import measure as measure
    from secateur.measure import measure_together as measure_together
    from secateur.measure.scaling_law import TrainingRun as TrainingRun
    from secateur.measure.scaling_law import fit_scaling_law as fit_scaling_law
    from secateur.recover.bias import compensate as compensate
    from secateur.shrink.apply import apply_ as apply_
    from secateur.shrink.apply import masked as masked
    from secateur.shrink.export import export as export
    from secateur.shrink.fuse import fuse_ as fuse_
    from secateur.shrink.load import load as load
    from secateur.shrink.save import save as save
    from secateur.streaming import folder_perplexity as folder_perplexity
    from secateur.streaming import prune_folder as prune_folder
    from secateur.train.compute import plan_compute as plan_compute
    from secateur.train.keep import MaskKeeper as MaskKeeper
    from secateur.train.loop import Fitting as Fitting
    from secateur.train.loop import Recipe as Recipe
    from secateur.train.sparsifier import Sparsifier as Sparsifier

__version__ = "0.1.0"

_HOMES = {
    "Budget": "core.budget",
    "Dataset": "data.dataset",
    "Fitting": "train.loop",
    "Job": "lab.prune",
    "MaskKeeper": "train.keep",
    "Plan": "core.plan",
    "Recipe": "train.loop",
    "SecateurError": "core.errors",
    "Sparsifier": "train.sparsifier",
    "TrainingRun": "measure.scaling_law",
    "analyse": "api",
    "apply_": "shrink.apply",
    "compare": "measure",
    "compensate": "recover.bias",
    "export": "shrink.export",
    "fit_scaling_law": "measure.scaling_law",
    "folder_perplexity": "streaming",
    "fuse_": "shrink.fuse",
    "hf_callback": "callbacks",
    "lightning_callback": "callbacks",
    "load": "shrink.load",
    "masked": "shrink.apply",
    "measure_together": "measure",
    "open_data": "io.data",
    "open_model": "io.models",
    "plan": "api",
    "plan_compute": "train.compute",
    "prune": "lab.prune",
    "prune_folder": "streaming",
    "save": "shrink.save",
    "sparsify": "api",
    "study": "api",
}
ROOMS = ("measure", "methods")  # rooms that can be called themselves


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return import_module(f"secateur.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    return getattr(import_module(f"secateur.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*_HOMES, *ROOMS, "__version__"])
