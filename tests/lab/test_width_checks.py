"""Parts of the width methods' checks: which bytes are knowledge and which form, and the report over widths."""

import torch

from secateur import zoo
from secateur.data.dataset import Splits
from secateur.lab.checks.maw import abilities, kinds_of_bytes, sweep


def test_kinds_of_bytes():
    text = "a function_name (x), ok"
    kinds = kinds_of_bytes(torch.tensor([[ord(letter) for letter in text]]))
    assert marked(text, kinds["inside long names"]) == ".....tion_name........"
    assert marked(text, kinds["white space and punctuation"]) == " ............. (.), .."


def marked(text, mask):
    """The bytes to predict that a mask holds; dots for the rest."""
    return "".join(letter if held else "." for letter, held in zip(text[1:], mask[0], strict=True))


def test_both_curves_are_reported_with_perplexity_beside():
    model, whole = zoo.load_model("pydoc-llama"), zoo.load_data("pydoc")
    data = Splits(whole.calibration, whole.evaluation.take(torch.arange(24)))
    report = abilities(model, data, shares=(0.0, 0.3, 0.6))
    assert [task.name for task in report.tasks if task.perplexity] == ["perplexity"]
    for task in report.tasks:
        better = task.values[0] < task.values[2] if task.perplexity else task.values[0] > task.values[2]
        assert better, task.name
    ppl = report.task("perplexity").values
    assert list(ppl) == sweep(model, data, "maw", shares=(0.0, 0.3, 0.6))
    said = report.to_markdown([("inside long names", "white space and punctuation")])
    assert "only 3 points" in said
