"""Plain modules: round trips by factory, ties, buffers, blocks twice, and who may be imported."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from shrink_models import assert_same_bits, block_plan, fresh_python, listed_tower, state, tower, weight_plan
from torch import nn

import secateur as sc
from secateur.core.errors import MissingExtraError, ModelError, OutputError, SettingsError, UnknownNameError
from secateur.shrink.load import build, load_weights, resolve_factory

X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def made(factory, seed=5) -> nn.Module:
    """Values that a fresh factory does not give by chance."""
    torch.manual_seed(seed)
    model = factory().eval()
    with torch.no_grad():
        model.shift.mul_(1.5)
        model.count.add_(1)
    return model


@pytest.mark.parametrize("name", ["tower", "listed_tower"])
def test_round_trip_with_ties_and_buffers(tmp_path, name):
    model = made({"tower": tower, "listed_tower": listed_tower}[name])
    plan = sc.plan(model, "random", 0.5)
    assert "second.weight" not in plan.masks  # tied: pruned under its first name
    sc.save(sc.apply_(model, plan), tmp_path / "out", plan, factory=f"shrink_models:{name}")
    again = sc.load(tmp_path / "out", trust_factory=True)
    assert_same_bits(again, state(model))
    assert again.second.weight is again.first.weight
    assert torch.equal(again(X), model(X))
    assert not again.training
    assert "scratch" not in load_file(tmp_path / "out" / "model.safetensors")


def test_half_precision_round_trip(tmp_path):
    model = made(tower).to(torch.bfloat16)
    sc.save(model, tmp_path / "out", factory="shrink_models:tower")
    again = sc.load(tmp_path / "out", trust_factory=True)
    assert again.first.weight.dtype == again.shift.dtype == torch.bfloat16
    assert again.count.dtype == torch.int64
    assert again.second.weight is again.first.weight
    assert_same_bits(again, state(model))


def test_zoo_factory_needs_no_trust(tmp_path):
    opened = sc.open_model("zoo:digits-resnet")
    plan = sc.plan(opened.model, "global_magnitude", 0.9)
    sc.save(sc.apply_(opened.model, plan), tmp_path / "out", plan, factory=opened.factory)
    again = sc.load(tmp_path / "out")
    assert_same_bits(again, state(opened.model))


@pytest.mark.parametrize("name", ["tower", "listed_tower"])
def test_blocks_can_be_removed_from_a_result_again(tmp_path, name):
    """A factory builds six blocks; the folder must remember every removal since."""
    model = made({"tower": tower, "listed_tower": listed_tower}[name])
    blocks = list(model.blocks)
    source = None
    for number, gone in enumerate(([1, 4], [0], [2])):  # 0 2 3 5, then 2 3 5, then 2 3
        plan = block_plan(model, "blocks", gone)
        folder = tmp_path / str(number)
        sc.save(sc.apply_(model, plan), folder, plan, source=source, factory=f"shrink_models:{name}")
        again = sc.load(folder, trust_factory=True)
        assert torch.equal(again(X), model(X))
        model, source = again, folder
    assert len(model.blocks) == 2
    for kept, original in zip(model.blocks, (blocks[2], blocks[3]), strict=True):
        assert torch.equal(kept.linear.weight, original.linear.weight)


def test_forgetting_the_source_of_a_second_removal_is_found_out(tmp_path):
    model = made(tower)
    for number, gone in enumerate(([1], [2])):
        plan = block_plan(model, "blocks", gone)
        sc.apply_(model, plan)
        if number == 0:
            sc.save(model, tmp_path / "0", plan, factory="shrink_models:tower")
    with pytest.raises(OutputError, match="reload"):  # without source= the first removal is not known
        sc.save(model, tmp_path / "1", plan, factory="shrink_models:tower")
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_foreign_factory_is_not_imported_without_trust(tmp_path):
    sc.save(made(tower), tmp_path / "out", factory="shrink_models:tower")
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')\n")
    card = tmp_path / "out" / "secateur" / "result.json"
    for path in ("trap:make", "secateur_evil:make", "secateur.cli:main", "os:getcwd"):
        card.write_text(json.dumps(json.loads(card.read_text()) | {"factory": path}))
        with pytest.raises(ModelError, match="trust_factory=True"):
            sc.load(tmp_path / "out")
    assert "trap" not in sys.modules


def test_given_factory_replaces_the_recorded_one(tmp_path):
    sc.save(made(tower), tmp_path / "out", factory="shrink_models:tower")
    assert torch.equal(sc.load(tmp_path / "out", factory=tower)(X), made(tower)(X))
    with pytest.raises(ModelError, match="returned dict"):
        sc.load(tmp_path / "out", factory=dict)


def test_without_a_factory_it_says_what_to_do(tmp_path):
    with pytest.raises(OutputError, match=r"without a factory.*--no-verify"):
        sc.save(made(tower), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    sc.save(made(tower), tmp_path / "out", verify=False)
    with pytest.raises(ModelError, match="factory="):
        sc.load(tmp_path / "out")


def test_a_factory_that_builds_something_else_is_found_out(tmp_path):
    with pytest.raises(OutputError, match=r"does not reload.*(has not|lacks|is \[)"):
        sc.save(made(tower), tmp_path / "out", factory="secateur.zoo.vision:digits_mlp")
    assert list(tmp_path.iterdir()) == []


def test_stock_safetensors_and_the_factory_alone_load_it(tmp_path):
    model = made(tower)
    plan = weight_plan(model, ["blocks.0.linear.weight", "first.weight"])
    sc.save(sc.apply_(model, plan), tmp_path / "out", plan, factory="shrink_models:tower")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    code = "import sys; from safetensors.torch import load_file; print(sorted(load_file(sys.argv[1])))"
    assert fresh_python(code, str(tmp_path / "out" / "model.safetensors")).strip() == str(sorted(stored))
    assert len({"first.weight", "second.weight"} & stored.keys()) == 1
    fresh = tower().eval()
    fresh.load_state_dict(stored, strict=False)
    assert torch.equal(fresh(X), model(X))


# --- factories --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "kind", "words"),
    [
        ("no_such_module_here:make", ModelError, "cannot import 'no_such_module_here'"),
        ("shrink_models:towr", UnknownNameError, "did you mean tower"),
        ("shrink_models:no_module", ModelError, "returned dict, not a torch module"),
        ("shrink_models:breaks", ModelError, "failed: ZeroDivisionError: by design"),
        ("shrink_models:model_of", ModelError, "failed: TypeError"),
        ("shrink_models:BLOCKS", UnknownNameError, "unknown factory"),
        ("shrink_models", ModelError, "module.path:factory"),
        ("shrink_models:", ModelError, "module.path:factory"),
        (":make", ModelError, "module.path:factory"),
        ("..relative:make", ModelError, "cannot import"),
        ("syntax_error_inside:make", ModelError, "cannot import.*SyntaxError"),
        ("raises_inside:make", ModelError, "cannot import.*RuntimeError: boom"),
    ],
)
def test_bad_factories_give_one_sentence(tmp_path, monkeypatch, path, kind, words):
    (tmp_path / "syntax_error_inside.py").write_text("def make(:\n")
    (tmp_path / "raises_inside.py").write_text("raise RuntimeError('boom')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(kind, match=words):
        build(path)


def test_factory_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "mynet_of_this_test.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 3)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    assert resolve_factory("mynet_of_this_test:make")().out_features == 3


def test_arguments_behind_a_factory(tmp_path, monkeypatch):
    source = (
        "from torch import nn\ndef make(inputs, outputs=3, bias=True):\n    return nn.Linear(inputs, outputs, bias)\n"
    )
    (tmp_path / "net_with_arguments.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    made = build("net_with_arguments:make?inputs=5&bias=false")
    assert (made.in_features, made.out_features, made.bias) == (5, 3, None)
    with pytest.raises(SettingsError, match="arguments are name=value&name=value, got 'inputs'"):
        build("net_with_arguments:make?inputs")
    with pytest.raises(ModelError, match=r"failed: TypeError: .*unexpected keyword argument 'depth'"):
        build("net_with_arguments:make?inputs=2&depth=3")


def test_timm_is_asked_for_by_the_name_of_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(MissingExtraError, match=r"secateur\[timm\]"):
        build("timm:resnet18")


# --- weight files for factories -----------------------------------------------------------------------


def weights(tmp_path, change=lambda tensors: None):
    model = made(tower)
    tensors = {name: value.clone() for name, value in model.state_dict().items() if name != "second.weight"}
    change(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def test_weights_fill_a_factory(tmp_path):
    assert torch.equal(load_weights(tower(), weights(tmp_path)).eval()(X), made(tower)(X))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("first.weight"), "lacks 'first.weight'"),
        (lambda t: t.pop("blocks.3.linear.bias"), "lacks 'blocks.3.linear.bias'"),
        (lambda t: t.pop("shift"), "lacks 'shift'"),
        (lambda t: t.update(extra=torch.ones(1)), "has 'extra', which Tower has not"),
        (lambda t: t.update(shift=torch.ones(7)), r"'shift' is \[7\].*\[6\] in the model"),
        (lambda t: t.update(shift=torch.ones(6, dtype=torch.int64)), "'shift' is torch.int64"),
    ],
)
def test_weights_that_do_not_fit_are_refused(tmp_path, change, words):
    with pytest.raises(ModelError, match=words):
        load_weights(tower(), weights(tmp_path, change))


def test_damaged_missing_and_pickled_weight_files(tmp_path):
    good = weights(tmp_path).read_bytes()
    for name, content, words in (
        ("cut.safetensors", good[:-10], "truncated or corrupt"),
        ("short.safetensors", good[:5], "truncated or corrupt"),
        ("empty.safetensors", b"", "truncated or corrupt"),
        ("noise.safetensors", b"\xff" * 100, "truncated or corrupt"),
        ("w.bin", good, "not a .safetensors file; pickled"),
        ("w.pt", good, "not a .safetensors file; pickled"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ModelError, match=words):
            load_weights(tower(), tmp_path / name)
    with pytest.raises(ModelError, match="does not exist"):
        load_weights(tower(), tmp_path / "none.safetensors")
    (tmp_path / "dir.safetensors").mkdir()
    with pytest.raises(ModelError):
        load_weights(tower(), tmp_path / "dir.safetensors")


def test_card_with_another_form(tmp_path):
    sc.save(tower(), tmp_path / "out", factory="shrink_models:tower")
    card = tmp_path / "out" / "secateur" / "result.json"
    good = json.loads(card.read_text())
    for removed, words in (
        ([{"blocks": {"blocks": [True] * 5}}], "does not fit what was removed.*has 6 blocks"),
        ([{"blocks": {"nowhere": [True]}}], "does not fit what was removed.*'nowhere'"),
        ([{"cut": [{"module": "nowhere", "attribute": "width", "value": 3}]}], "does not fit what was removed"),
        ([{"cut": [{"odd": 3}]}], "does not fit what was removed"),
        (3, "no list of steps"),
        ([3], "no list of steps"),
    ):
        card.write_text(json.dumps(good | {"steps": removed}))
        with pytest.raises(ModelError, match=words):
            sc.load(tmp_path / "out", trust_factory=True)
