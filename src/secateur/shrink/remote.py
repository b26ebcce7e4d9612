"""The model code that goes with an uneven transformers folder, for users without secateur."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from secateur.shrink import additions, bypass, factorised, routers, shortcuts

MODULE = "modeling_cut"
COPIED = {
    f"modeling_{one.__name__.rpartition('.')[2]}": one for one in (additions, shortcuts, routers, factorised, bypass)
}

TEMPLATE = '''"""{name} with layers of uneven widths: the plain class, resized and given biases as `CUT` says."""

import json

import torch
from transformers import {name}
{imports}
CUT = json.loads({cut!r})


class Cut{name}({name}):
    """The original class after its units were cut out."""

    def __init__(self, config, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        {additions}for change in CUT["attributes"]:
            owner = self.get_submodule(change["module"])
            if change["on_config"] is not None:
                owner = getattr(owner, change["on_config"])
            value = change["value"]
            if change["index"] is not None:
                items = list(getattr(owner, change["attribute"]))
                items[change["index"]] = value
                value = tuple(items)
            setattr(owner, change["attribute"], value)
        for name, shape in CUT["added"].items():
            owner, _, leaf = name.rpartition(".")
            self.get_submodule(owner).register_parameter(leaf, torch.nn.Parameter(torch.empty(shape)))
        tensors = dict(self.named_parameters()) | dict(self.named_buffers())
        for name, shape in CUT["shapes"].items():
            tensors[name].data = tensors[name].data.new_empty(shape)

    @classmethod
    def from_pretrained(cls, *args, **kwargs):
        found = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        buffers = dict(model.named_buffers())
        for name, values in CUT["buffers"].items():
            buffers[name].data = torch.tensor(values, dtype=buffers[name].dtype, device=buffers[name].device)
        return found
'''


def write_model_code(folder: Path, name: str, card: Mapping[str, Any], buffers: Mapping[str, Tensor]) -> None:
    """Write `modeling_cut.py` and name it in the config's `auto_map`.

    Args:
        folder: a saved transformers folder.
        name: the original class.
        card: its `attributes` are what changed, its `shapes` the parameters whose shape is not what the config
            builds, its `added` the parameters that the config does not build, its `additions` what
            `additions.attach` puts in.
        buffers: cut buffers that no weight file holds, with their values.
    """
    changes = {key: card[key] for key in ("attributes", "shapes", "added", "additions")}
    values = {key: tensor.tolist() for key, tensor in buffers.items()}
    cut = json.dumps(changes | {"buffers": values}, sort_keys=True)
    imports, attaching = "", ""
    if card["additions"]:
        _copy_modules(folder)
        imports, attaching = "from .modeling_additions import attach\n", 'attach(self, CUT["additions"])\n        '
    code = TEMPLATE.format(name=name, cut=cut, imports=imports, additions=attaching)
    (folder / f"{MODULE}.py").write_text(code, encoding="utf-8")
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["auto_map"] = {"AutoModel": f"{MODULE}.Cut{name}", auto_class(name): f"{MODULE}.Cut{name}"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _copy_modules(folder: Path) -> None:
    """What `attach` needs, importing each other in the folder."""
    for name, module in COPIED.items():
        assert module.__file__ is not None
        code = Path(module.__file__).read_text(encoding="utf-8")
        for other, imported in COPIED.items():
            code = code.replace(imported.__name__, f".{other}")
        (folder / f"{name}.py").write_text(code, encoding="utf-8")


def auto_class(name: str) -> str:
    """The Auto class that users ask for."""
    for ending, auto in (
        ("ForCausalLM", "AutoModelForCausalLM"),
        ("LMHeadModel", "AutoModelForCausalLM"),
        ("ForMaskedLM", "AutoModelForMaskedLM"),
        ("ForSequenceClassification", "AutoModelForSequenceClassification"),
        ("ForTokenClassification", "AutoModelForTokenClassification"),
        ("ForQuestionAnswering", "AutoModelForQuestionAnswering"),
        ("ForImageClassification", "AutoModelForImageClassification"),
        ("ForConditionalGeneration", "AutoModelForSeq2SeqLM"),
    ):
        if name.endswith(ending):
            return auto
    return "AutoModel"
