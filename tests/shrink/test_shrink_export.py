"""Export: files that run elsewhere, agree with torch, and do not exist where they do not."""

import json
import resource
import sys

import pytest
import torch
from shrink_models import Tower, assert_same_bits, bert, block_plan, fresh_python, llama, model_of, state
from torch import Tensor, nn

import secateur as sc
from secateur.cli import main
from secateur.core.errors import (
    DataError,
    MissingExtraError,
    ModelError,
    OutputError,
    SettingsError,
    UnknownNameError,
)
from secateur.core.method import Batch
from secateur.data.running import evaluating, logits, resized
from secateur.shrink import export as room
from secateur.shrink.export import ExportReport, Kind, export
from secateur.zoo import load_data, load_model

ZOO = ["digits-mlp", "digits-resnet", "digits-vit", "pydoc-llama"]
KINDS = [kind.value for kind in Kind]
LIMIT = {"pt2": 1e-5, "onnx": 1e-4}
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))


def zoo_probe(name, size=3):
    data = load_data("zoo:pydoc" if "llama" in name else "zoo:digits", samples=8)
    return resized(
        Batch((data.calibration.inputs[:, :20],)) if "llama" in name else next(data.calibration.batches()), size
    )


def exported(model, target, probe=None, **more) -> ExportReport:
    return export(model, target, probe or Batch((X,)), **({"seconds": 0.001} | more))


def run_file(path, *args, **kwargs) -> Tensor:
    if path.suffix == ".pt2":
        return torch.export.load(path).module()(*args, **kwargs)
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_inputs()]
    feed = dict(zip(names, args, strict=False)) | kwargs
    return torch.from_numpy(session.run(None, {name: item.numpy() for name, item in feed.items()})[0])


def left(folder):
    return sorted(path.name for path in folder.iterdir())


# --- what works ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ZOO)
def test_zoo_models_agree_with_torch_at_every_batch_size(name, kind, tmp_path):
    model, probe = load_model(f"zoo:{name}"), zoo_probe(name)
    before, modes = state(model.train()), [module.training for module in model.modules()]
    target = tmp_path / "deep" / f"model.{kind}"
    found = exported(model, target, probe)
    assert [module.training for module in model.modules()] == modes
    assert_same_bits(model, before)
    assert left(target.parent) == [target.name]
    assert found.file == target
    assert found.kind == kind
    assert found.bytes == target.stat().st_size
    assert found.compared == (3, 1, 4)
    assert found.batch_size == 3
    assert found.difference <= LIMIT[kind]
    assert found.difference <= found.allowed
    assert found.torch_ms > 0
    assert found.runtime_ms > 0
    assert found.torch_latency.threads == found.runtime_latency.threads == torch.get_num_threads()
    assert (found.opset or 0) >= (18 if kind == "onnx" else 0)
    other = resized(probe, 5)
    with evaluating(model):
        torch.testing.assert_close(run_file(target, *other.args), logits(model, other), atol=LIMIT[kind], rtol=0)
    document = json.loads(json.dumps(found.to_json()))
    assert document["kind"] == kind
    assert document["torch_ms"] == found.torch_ms
    assert document["file"] == str(target)


def test_a_new_process_runs_the_pt2_file_without_this_library(tmp_path):
    model, probe = load_model("zoo:digits-resnet"), zoo_probe("digits-resnet")
    exported(model, tmp_path / "m.pt2", probe)
    torch.save(probe.args[0], tmp_path / "x")
    code = "import sys, torch; m = torch.export.load(sys.argv[1]).module(); x = torch.load(sys.argv[2])"
    said = fresh_python(f"{code}\nprint(m(x).tolist())", str(tmp_path / "m.pt2"), str(tmp_path / "x"))
    torch.testing.assert_close(torch.tensor(json.loads(said)), logits(model, probe).detach(), atol=1e-5, rtol=0)


def test_a_new_process_runs_the_onnx_file_without_torch(tmp_path):
    model, probe = load_model("zoo:digits-mlp"), zoo_probe("digits-mlp")
    exported(model, tmp_path / "m.onnx", probe)
    code = (
        "import sys, json, numpy, onnxruntime as ort\n"
        "s = ort.InferenceSession(sys.argv[1]); name = s.get_inputs()[0].name\n"
        "x = numpy.array(json.loads(sys.argv[2]), dtype='float32')\n"
        "assert 'torch' not in sys.modules\nprint(s.run(None, {name: x})[0].tolist())"
    )
    said = fresh_python(code, str(tmp_path / "m.onnx"), json.dumps(probe.args[0].tolist()))
    torch.testing.assert_close(torch.tensor(json.loads(said)), logits(model, probe).detach(), atol=1e-4, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_removed_blocks_are_gone_from_the_file(kind, tmp_path):
    model, stack = model_of("gpt2")
    probe = Batch((torch.arange(24).view(2, 12),))
    dense = logits(model, probe).detach()
    sc.apply_(model, block_plan(model, stack, [1, 2, 3]))
    found = run_file(exported(model, tmp_path / f"m.{kind}", probe).file, *probe.args)
    torch.testing.assert_close(found, logits(model, probe).detach(), atol=1e-4, rtol=1e-4)
    assert (found - dense).abs().max() > 1e-2
    assert b"h.2" not in (said := (tmp_path / f"m.{kind}").read_bytes())
    assert b"h.1" in said


@pytest.mark.parametrize("kind", KINDS)
def test_masks_that_are_on_go_along(kind, tmp_path):
    from shrink_models import weight_plan

    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2)).eval()
    plan = weight_plan(model, ["0.weight"])
    with sc.masked(model, plan):
        expected = model(X).detach()
        found = exported(model, tmp_path / f"m.{kind}")
    assert not torch.equal(model(X), expected)
    torch.testing.assert_close(run_file(found.file, X), expected, atol=1e-5, rtol=0)


class Options(nn.Module):
    """Positional and keyword inputs, some of which are no tensors."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x, scale=1.0, *, mask=None, shift=None, double=False):
        y = self.linear(x) * scale + shift
        return (y.masked_fill(mask, 0.0) * (2 if double else 1), "not a tensor")


@pytest.mark.parametrize("kind", KINDS)
def test_inputs_keep_their_names_and_constants_stay(kind, tmp_path):
    model = Options().eval()
    # one tensor given twice, and keywords in another order than in the signature
    probe = Batch((X, 3.0), {"shift": X, "double": True, "mask": X > 0})
    found = exported(model, tmp_path / f"m.{kind}", probe)
    other = torch.randn(5, 6, generator=torch.Generator().manual_seed(1))
    inputs = {"shift": other + 1, "mask": other < 0}
    expected = model(other, 3.0, double=True, **inputs)[0].detach()
    torch.testing.assert_close(run_file(found.file, other, **inputs), expected, atol=1e-5, rtol=0)


def test_onnx_names(tmp_path):
    import onnx

    found = exported(bert(), tmp_path / "m.onnx", Batch(kwargs={"input_ids": torch.ones(2, 8, dtype=torch.long)}))
    graph = onnx.load(found.file).graph
    (ids,), (out,) = graph.input, graph.output
    assert (ids.name, out.name) == ("input_ids", "logits")
    assert [dim.dim_param or dim.dim_value for dim in ids.type.tensor_type.shape.dim] == ["batch", 8]
    assert out.type.tensor_type.shape.dim[0].dim_param == "batch"


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_sample_gives_any_batch_size(kind, tmp_path):
    found = exported(Tower().eval(), tmp_path / f"m.{kind}", Batch((X[:1],)))
    assert found.compared == (1, 2)
    assert found.batch_size == 1
    assert run_file(found.file, X).shape == (3, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_static_is_for_one_batch_size(kind, tmp_path):
    class Fixed(nn.Module):
        def forward(self, x):
            return x.reshape(3, 2, 3).sum(1)

    with pytest.raises(ModelError, match=r"Fixed computes with a fixed batch size.*--static \(dynamic_batch=False\)"):
        exported(Fixed(), tmp_path / f"m.{kind}")
    found = exported(Fixed(), tmp_path / f"m.{kind}", dynamic_batch=False)
    assert found.compared == (3, 3)
    assert not found.dynamic_batch


def test_kind_and_opset_can_be_said(tmp_path):
    found = exported(nn.Linear(6, 2), tmp_path / "weights.bin", kind="onnx", opset=21)
    assert found.kind is Kind.ONNX
    assert found.opset == 21
    assert exported(nn.Linear(6, 2), tmp_path / "M.PT2").kind is Kind.PT2


@pytest.mark.parametrize("kind", KINDS)
def test_without_verification_nothing_is_run(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    found = exported(nn.Linear(6, 2), tmp_path / f"m.{kind}", verify=False)
    assert found.bytes
    assert found.difference is found.torch_ms is found.runtime_ms is None
    assert found.compared == ()


def test_half_precision(tmp_path):
    model, probe = nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)).half(), Batch((X.half(),))
    assert exported(model, tmp_path / "m.onnx", probe).difference < 0.01
    assert exported(model.bfloat16(), tmp_path / "m.pt2", Batch((X.bfloat16(),))).difference == 0
    with pytest.raises(ModelError, match=r"onnxruntime cannot run.*bfloat16, --dtype float32"):
        exported(model, tmp_path / "b.onnx", Batch((X.bfloat16(),)))
    assert left(tmp_path) == ["m.onnx", "m.pt2"]


def test_large_weights_stand_beside_the_onnx_file(tmp_path, monkeypatch):
    from torch.onnx._internal.exporter import _onnx_program

    monkeypatch.setattr(_onnx_program, "_LARGE_MODEL_THRESHOLD", 100)
    model = nn.Linear(6, 600).eval()
    found = exported(model, tmp_path / "m.onnx")
    assert left(tmp_path) == ["m.onnx", "m.onnx.data"]
    assert found.bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) > 6 * 600 * 4
    torch.testing.assert_close(run_file(found.file, X), model(X).detach(), atol=1e-5, rtol=0)
    (tmp_path / "m.onnx").unlink()
    with pytest.raises(OutputError, match=r"m\.onnx\.data' exists already"):
        exported(model, tmp_path / "m.onnx")
    assert left(tmp_path) == ["m.onnx.data"]


@pytest.mark.parametrize("kind", KINDS)
def test_files_tell_nothing_of_the_probe_and_the_machine(kind, tmp_path):
    probe = Batch((torch.full((2, 6), 1234.5678),))
    found = exported(Tower().eval(), tmp_path / f"m.{kind}", probe)
    said = found.file.read_bytes()
    assert probe.args[0].numpy().tobytes()[:16] not in said
    assert __file__.encode() not in said
    assert b"site-packages" not in said
    assert b"shrink_models.py" not in said


# --- what is refused ----------------------------------------------------------------------------------------


class Decides(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # by values
            return x * 2
        return x


class Unknown(nn.Module):
    def forward(self, x):
        return torch.special.bessel_j0(x)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.rand_like(x)


class Copies(nn.Module):
    def forward(self, x):
        return torch.from_numpy(x.numpy() * 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dynamic", [True, False])
def test_a_branch_on_values_names_its_line(kind, dynamic, tmp_path, capfd):
    with pytest.raises(
        ModelError, match=r"Decides decides by the values.*`if x\.sum\(\) > 0:.*test_shrink_export\.py:\d+"
    ):
        exported(Decides(), tmp_path / f"m.{kind}", dynamic_batch=dynamic)
    assert left(tmp_path) == []
    assert capfd.readouterr() == ("", "")


def test_an_operator_that_onnx_lacks_is_named(tmp_path, capfd):
    with pytest.raises(ModelError, match=r"no counterpart of the operator 'prims\.bessel_j0'; export to a \.pt2"):
        exported(Unknown(), tmp_path / "m.onnx")
    assert left(tmp_path) == []
    assert capfd.readouterr() == ("", "")
    assert exported(Unknown(), tmp_path / "m.pt2").difference == 0


def test_other_untraceable_code_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"Copies cannot be exported: .*numpy.* at `return torch\.from_numpy"):
        exported(Copies(), tmp_path / "m.pt2")


def test_an_operator_without_shapes_is_named(tmp_path):
    library = torch.library.Library("secateur_export_test", "DEF")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CPU")

    class Custom(nn.Module):
        def forward(self, x):
            return torch.ops.secateur_export_test.twice(x)

    with pytest.raises(ModelError, match=r"operator 'secateur_export_test\.twice\.default' at .*register_fake"):
        exported(Custom(), tmp_path / "m.pt2")


@pytest.mark.parametrize("kind", KINDS)
def test_other_outputs_leave_no_file_and_keep_the_old_one(kind, tmp_path):
    target = tmp_path / f"m.{kind}"
    target.write_text("old")
    with pytest.raises(OutputError, match=r"was not kept: its outputs differ from torch's by up to 0\.\d+"):
        exported(Noisy(), target, force=True)
    assert left(tmp_path) == [target.name]
    assert target.read_text() == "old"
    with pytest.raises(OutputError, match=r"exists already; choose another name or add --force"):
        exported(nn.Linear(6, 2), target)
    assert exported(nn.Linear(6, 2), target, force=True).bytes == target.stat().st_size > 3


def test_nan_in_one_of_the_two_is_a_difference():
    nan, one = torch.tensor([float("nan"), 1.0]), torch.tensor([1.0, 1.0])
    assert room._gap(nan, nan) == 0
    assert room._gap(nan, one) == room._gap(one, nan) == float("inf")
    assert room._gap(one, one[:1]) == float("inf")


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_names_the_extra(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingExtraError, match=rf"ONNX needs the package '{package}': .*secateur\[export\]"):
        exported(nn.Linear(6, 2), tmp_path / "m.onnx")
    assert exported(nn.Linear(6, 2), tmp_path / "m.pt2").bytes


def test_bad_requests(tmp_path):
    model, folder = nn.Linear(6, 2), tmp_path / "is.onnx"
    folder.mkdir()
    with pytest.raises(SettingsError, match=r"'m\.bin' does not say .*\.pt2 or \.onnx"):
        exported(model, tmp_path / "m.bin")
    with pytest.raises(UnknownNameError, match="export format 'onn'"):
        exported(model, tmp_path / "m", kind="onn")
    with pytest.raises(OutputError, match="is a folder"):
        exported(model, folder, force=True)
    with pytest.raises(OutputError, match="name"):
        exported(model, tmp_path / ("a" * 300 + ".pt2"))
    with pytest.raises(SettingsError, match="opset goes with"):
        exported(model, tmp_path / "m.pt2", opset=20)
    with pytest.raises(SettingsError, match="opset 99, torch fell back to"):
        exported(model, tmp_path / "m.onnx", opset=99)
    with pytest.raises(ModelError, match=r"Linear cannot be run on inputs of shape \[3, 5\]"):
        exported(model, tmp_path / "m.pt2", Batch((X[:, :5],)))
    with pytest.raises(DataError, match="'input' holds several values"):
        exported(nn.Sequential(), tmp_path / "m.pt2", Batch(((X, X),)))
    with pytest.raises(DataError, match="at least one tensor"):
        exported(nn.Sequential(), tmp_path / "m.pt2", Batch((3,)))
    assert left(tmp_path) == ["is.onnx"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_full_disk_is_one_sentence(kind, tmp_path):
    model = nn.Linear(6, 20000).eval()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"could not be written: File too large; choose another place"):
            exported(model, tmp_path / f"m.{kind}")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert left(tmp_path) == []


# --- the command --------------------------------------------------------------------------------------------


def command(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["secateur", "export", *map(str, words)])
    monkeypatch.setattr("secateur.core.signals.stop_by_exception", lambda: None)
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr()
    return end.value.code or 0, said.out, said.err


def test_the_command_exports_a_result_folder(tmp_path, monkeypatch, capsys):
    model = llama()
    sc.save(sc.apply_(model, block_plan(model, "model.layers", [2])), tmp_path / "cut")
    code, out, err = command(monkeypatch, capsys, tmp_path / "cut", tmp_path / "m.onnx", "--json")
    assert code == 0, err
    assert json.loads(out)["compared"] == [1, 2]
    tokens = torch.arange(32).view(2, 16)
    torch.testing.assert_close(run_file(tmp_path / "m.onnx", tokens), model(tokens).logits, atol=1e-4, rtol=1e-4)


def test_the_command_prints_a_table_and_takes_data(tmp_path, monkeypatch, capsys):
    place = tmp_path / "m.pt2"
    words = ["zoo:digits-mlp", place, "--data", "zoo:digits", "--batch", 4, "--static"]
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 0, err
    assert "torch ms" in out
    assert "batches of 4 only" in out
    assert run_file(place, torch.rand(4, 1, 8, 8)).shape == (4, 10)
    code, out, err = command(monkeypatch, capsys, *words)
    assert code == 2
    assert "exists already" in err
    assert len(err.splitlines()) == 1
    assert command(monkeypatch, capsys, *words, "--force", "--no-verify")[0] == 0


def test_the_command_asks_for_data_where_it_has_none(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("secateur.cli.commands.probe_for", lambda model: None)  # nothing can be made up either
    code, _, err = command(monkeypatch, capsys, "shrink_models:tower", tmp_path / "m.pt2")
    assert code == 2
    assert "has to be run once to be exported; give samples with --data" in err
