"""Runs the official Wanda and SparseGPT code on the recipes and writes the golden files; needs clones of both.

    python make_golden.py WANDA_CLONE SPARSEGPT_CLONE

Not run by the tests.
"""

import contextlib
import io
import json
import math
import platform
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import golden_recipes as recipes
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor

from secateur.core.masks import pack

HERE = Path(__file__).parent
NUMBERS = {"2:4": (2, 4), "4:8": (4, 8)}  # the same whether they count what is kept or what goes


def _stubs() -> None:
    """The official data loader imports a package that is not needed here; a CPU has nothing to synchronise."""
    datasets = ModuleType("datasets")
    datasets.load_dataset = None
    sys.modules.setdefault("datasets", datasets)
    torch.cuda.synchronize = lambda *_: None
    transformers.Conv1D = transformers.pytorch_utils.Conv1D


def _pattern(pruning: dict[str, Any]) -> tuple[int, int]:
    return NUMBERS[pruning["pattern"]] if "pattern" in pruning else (0, 0)


def wanda(clone: str) -> dict[str, Tensor]:
    sys.path.insert(0, clone)
    from lib import prune
    from lib.layerwrapper import WrappedGPT

    found: dict[str, Tensor] = {}
    prune.get_loaders = lambda *_, **__: ([(one.unsqueeze(0),) for one in recipes.sequences()], None)
    for name, asked in recipes.WANDA.items():
        model = recipes.Decoder()
        model.config = SimpleNamespace(use_cache=False, hidden_size=recipes.WIDTH)
        model.seqlen, model.hf_device_map = recipes.LENGTH, {}
        n, m = _pattern(asked)
        args = SimpleNamespace(
            nsamples=recipes.SEQUENCES, seed=0, sparsity_ratio=asked.get("sparsity", 0.5),
            use_variant=asked.get("variant", False),
        )  # fmt: skip
        prune.prune_wanda(args, model, None, torch.device("cpu"), n, m)
        for parameter, value in model.named_parameters():
            found[f"wanda/{name}/{parameter}"] = pack(value != 0)
    layer = recipes.Layer(64, 256, 50, {})
    wrapped = WrappedGPT(layer.module())
    for batch in layer.inputs():
        wrapped.add_batch(batch, None)
    found["wanda/moment"] = wrapped.scaler_row
    return found


def sparsegpt(clone: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    sys.path.insert(0, clone)
    from quant import Quantizer
    from sparsegpt import SparseGPT

    found, errors = {}, {}
    for name, recipe in recipes.SPARSEGPT.items():
        layer = recipe.module()
        solver = SparseGPT(layer)
        settings = dict(recipe.settings)
        if bits := settings.pop("wbits", None):
            solver.quantizer = Quantizer()
            solver.quantizer.configure(bits, perchannel=True, sym=False, mse=False)
        for batch in recipe.inputs():
            solver.add_batch(batch, None)
        n, m = _pattern(recipe.pruning)
        with contextlib.redirect_stdout(io.StringIO()) as said:
            solver.fasterprune(recipe.pruning.get("sparsity", 0), n, m, **settings)
        errors[name] = float(said.getvalue().split()[-1])
        found[f"sparsegpt/{name}"] = layer.weight.detach().contiguous()
    return found, errors


def main(wanda_clone: str, sparsegpt_clone: str) -> None:
    _stubs()
    weights, errors = sparsegpt(sparsegpt_clone)
    found = wanda(wanda_clone) | weights
    save_file(found, HERE / recipes.GOLDEN)
    made = {
        "wanda": {"sequences": recipes.digest(recipes.sequences()), "weights": recipes.digest(
            *(value.detach() for value in recipes.Decoder().parameters()))},
        "sparsegpt": {
            name: recipes.digest(recipe.module().weight.detach(), *recipe.inputs())
            for name, recipe in recipes.SPARSEGPT.items()
        },
        "errors": errors,
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
    }  # fmt: skip
    (HERE / recipes.PROVENANCE).write_text(json.dumps(made, indent=1, sort_keys=True) + "\n")
    assert all(math.isfinite(float(value.float().sum())) for value in found.values())


if __name__ == "__main__":
    main(*sys.argv[1:])
