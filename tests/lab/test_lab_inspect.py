"""What `inspect` says about a model agrees with the model: counts, couplings, shares, and what is frozen."""

import json

import pytest
import torch
from torch import nn

from secateur.core.errors import DataError, ModelError, SettingsError
from secateur.core.method import Batch
from secateur.io.models import OpenedModel
from secateur.lab.inspect import Inspection, describe, inspect, probe
from secateur.report.structure import Role
from secateur.structure.analysis import analyse

TINY = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Residual(nn.Module):
    """Two convolutions beside a shortcut; a head that reads their channels."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.norm, self.head = nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        x = self.stem(x)
        x = self.norm(x + self.outer(self.inner(x).relu()))
        return self.head(x.mean((2, 3)))


def seen(model, *shape, name="net"):
    batch = Batch((torch.randn(shape),))
    return describe(model, analyse(model, batch), batch, name, "a test")


@pytest.fixture(scope="module")
def view():
    return seen(Residual(), 2, 3, 8, 8)


def config_only(folder, **more):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | more))
    return folder


def test_sites_name_what_is_coupled_and_what_each_layer_does_with_it(view):
    stream, inner = view.sites
    assert (stream.name, stream.kind, stream.units) == ("stem:channel", "channel", 8)
    assert (inner.name, inner.units, inner.coupled) == ("inner:channel", 6, ("outer",))
    assert {touch.module: touch.role for touch in stream.touches} == {
        "stem": Role.MAKES,
        "inner": Role.READS,
        "outer": Role.MAKES,
        "norm": Role.CARRIES,
        "head": Role.READS,
    }
    assert stream.coupled == ("inner", "outer", "norm", "head")
    assert {place.parameter for place in inner.occurrences} == {"inner.weight", "inner.bias", "outer.weight"}


def test_costs_and_shares_are_those_of_the_cut_model(view):
    net, (_, inner) = Residual(), view.sites
    total = sum(p.numel() for p in net.parameters())
    each = 8 * 9 + 1 + 8 * 9
    assert (view.parameters, inner.cost) == (total, each)
    assert inner.parameters_share == pytest.approx(3 * each / total)
    macs = 64 * 9 * (3 * 8 + 8 * 6 + 6 * 8) + 8 * 5
    assert view.flops == 2 * macs  # of one sample
    assert inner.flops_share == pytest.approx(64 * 9 * 48 / macs)
    half = 64 * 9 * (3 * 4 + 4 * 3 + 3 * 4) + 4 * 5
    assert view.halved_flops == 2 * half


def test_rows_are_in_the_order_of_execution_with_their_widths():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first, self.table = nn.Linear(6, 3), nn.Linear(8, 6), nn.Parameter(torch.zeros(4, 8))

        def forward(self, x):
            return self.last(self.first(x + self.table))

    rows = seen(Backwards(), 2, 4, 8).rows
    assert [(row.module, row.reads, row.makes) for row in rows] == [
        ("", "", "4, 8"),
        ("first", "8", "6"),
        ("last", "6", "3"),
    ]


def test_what_is_frozen_comes_with_reason_and_size(view):
    assert {(axis.parameter, axis.dim, axis.units) for axis in view.frozen} == {
        ("stem.weight", 1, 3),
        ("head.weight", 0, 5),
    }
    assert {axis.parameters for axis in view.frozen} == {8 * 3 * 9, 40}
    assert all(axis.reason for axis in view.frozen)
    assert view.unknown == ()


def test_the_width_of_a_unit_says_which_counts_keep_widths_even(tmp_path):
    found = {site.name: site for site in inspect(Inspection(str(config_only(tmp_path / "lm")))).sites}
    assert (found["model.embed_tokens:embedding"].width, found["model.embed_tokens:embedding"].multiple) == (1, 8)
    groups = found["model.layers.0.self_attn:kv_group"]
    assert (groups.width, groups.multiple) == (16, 1)  # two heads of eight


def test_a_config_is_enough(tmp_path):
    view = inspect(Inspection(str(config_only(tmp_path / "lm"))))
    assert view.kind == "LlamaForCausalLM"
    assert view.inputs == "made up, [2, 16]"
    assert sum(site.kind == "neuron" for site in view.sites) == 3
    shorter = inspect(Inspection(str(tmp_path / "lm"), tokens="2x4"))
    assert shorter.inputs == "token ids [2, 4]"
    assert shorter.parameters == view.parameters
    assert shorter.flops < view.flops / 3


def test_a_zoo_model_is_looked_at_with_its_own_data():
    view = inspect(Inspection("zoo:digits-resnet"))
    assert view.inputs == "two samples of zoo:digits"
    assert {site.kind for site in view.sites} == {"channel"}


def opened(model):
    return OpenedModel(model, "nets:make")


def test_given_shapes_win():
    batch, words = probe(opened(Residual()), Inspection("nets:make", shape="4,3,16,16"))
    assert batch.args[0].shape == (4, 3, 16, 16)
    assert words == "one tensor of numbers [4, 3, 16, 16]"
    batch, _ = probe(opened(nn.Sequential(nn.Embedding(9, 4))), Inspection("nets:make", tokens="3x5"))
    assert batch.args[0].shape == (3, 5)
    assert batch.args[0].max() < 9


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, y):
        return self.linear(x + y)


@pytest.mark.parametrize(
    ("model", "asked", "error", "words"),
    [
        (Two(), {}, DataError, "--data, a shape with --input"),
        (Residual(), {"shape": "2,3,a"}, SettingsError, "--input takes sizes as 2,3,224,224, got '2,3,a'"),
        (Residual(), {"shape": "2,0"}, SettingsError, "--input"),
        (Residual(), {"tokens": "16"}, SettingsError, "--tokens takes sizes as 2x16, got '16'"),
        (Residual(), {"tokens": "2x16"}, DataError, "no table of tokens"),
        (Residual(), {"tokens": "2x16", "shape": "2,3"}, SettingsError, "exclude each other"),
    ],
)
def test_bad_inputs_are_named(model, asked, error, words):
    with pytest.raises(error, match="(?s)" + words.replace("[", r"\[")):
        probe(opened(model), Inspection("nets:make", **asked))


def test_made_up_inputs_that_do_not_fit_say_how_to_give_others(tmp_path, monkeypatch):
    (tmp_path / "odd_nets.py").write_text(
        "from torch import nn\nmake = lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Unflatten(1, (7, 5)))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelError, match=r"made up, .*--input"):
        inspect(Inspection("odd_nets:make"))


def test_no_weights_needs_something_to_build_from(tmp_path):
    with pytest.raises(ModelError, match=r"module\.path:factory"):
        inspect(Inspection("some/name", outline=True))
    with pytest.raises(SettingsError, match="exclude each other"):
        inspect(Inspection("a:b", weights="w.safetensors", outline=True))
    with pytest.raises(ModelError, match="cannot be built as LlamaForCausalLM"):
        inspect(Inspection(str(config_only(tmp_path / "bad", num_attention_heads=0))))
