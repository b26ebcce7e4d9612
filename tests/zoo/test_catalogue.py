import subprocess
import sys
from importlib import import_module

import pytest

from secateur import zoo
from secateur.core.errors import UnknownNameError

NAMES = ["digits-mlp", "digits-resnet", "digits-vit", "pydoc-llama", "pydoc-llama-gqa", "skills-llama"]


def test_names_are_the_models_in_order():
    assert zoo.names() == NAMES
    assert zoo.data_names() == ["digits", "pydoc", "skills"]


@pytest.mark.parametrize("spelling", ["digits-mlp", "zoo:digits-mlp", "zoo:digits_mlp", " Digits-MLP "])
def test_prefix_case_and_underscores_do_not_matter(spelling):
    assert zoo.get(spelling).name == "digits-mlp"


def test_unknown_model_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"zoo model 'digits-renset'; did you mean digits-resnet"):
        zoo.get("digits-renset")


def test_unknown_data_names_the_nearest():
    with pytest.raises(UnknownNameError, match=r"zoo data set 'zoo:digit'; did you mean digits"):
        zoo.load_data("zoo:digit")


def test_entries_point_to_factories_and_data_that_exist():
    for name in zoo.names():
        entry = zoo.get(name)
        module, _, function = entry.factory.partition(":")
        assert callable(getattr(import_module(module), function))
        assert entry.data in zoo.data_names()


def test_import_does_not_load_torch_and_lists_models():
    code = "import sys, secateur.zoo as z; z.names(); z.card('digits-mlp'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_public_name_is_there():
    for name in zoo.__all__:
        assert getattr(zoo, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        zoo.nothing  # noqa: B018
