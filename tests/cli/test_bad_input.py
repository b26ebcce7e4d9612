"""Bad input: exit code 2, one clear sentence on stderr, nothing on stdout, nothing half-written."""

import json
import shutil

import pytest
from cli_runs import files, good, run, separately, write_images, write_language_model, write_text
from safetensors.torch import load_file, save_file

NET = "cli_runs:net"


def refused(folder, *words, says):
    """Run and check everything that holds for every bad input."""
    before = files(folder)
    done = run(*words)
    check(done, says)
    assert files(folder) == before
    return done.err


def check(done, says):
    assert done.code == 2, done
    assert done.out == ""
    lines = [line for line in done.err.splitlines() if not line.endswith(" s")]  # stages of over a second
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ")
    assert "Traceback" not in done.err
    for word in [says] if isinstance(says, str) else says:
        assert word in lines[0], lines[0]


def prune(model, *more, method="random", out="out"):
    return ["prune", model, "--method", method, "--out", out, *more]


HALF = ("--sparsity", "0.5")

NAMES = {
    "method": (prune(NET, *HALF, method="wnada"), ["unknown method 'wnada'", "did you mean wanda"]),
    "method, far": (prune(NET, *HALF, method="qqqqq"), ["unknown method 'qqqqq'; known: ", "wanda"]),
    "method of methods": (["methods", "sparsgpt"], "did you mean sparsegpt"),
    "method of reproduce": (["reproduce", "shortgtp"], "did you mean shortgpt"),
    "tag": (["methods", "--tag", "wen=after_training"], "did you mean when"),
    "value of a tag": (["methods", "--tag", "when=after"], ["value of the tag when", "after_training"]),
    "tag without value": (["methods", "--tag", "when"], "--tag takes name=value, got 'when'"),
    "zoo model": (prune("zoo:digit-resnet", *HALF), "did you mean digits-resnet"),
    "zoo model of build": (["zoo", "build", "digits-mpl", "--out", "x"], "did you mean digits-mlp"),
    "model": (prune("digits-resnet", *HALF), ["unknown model 'digits-resnet'", "zoo:digits-resnet"]),
    "model's folder": (prune("./nowhere", *HALF), "./nowhere"),
    "model's file": (prune("file.txt", *HALF), "is a file"),
    "factory's module": (prune("no_such_module:make", *HALF), "cannot import 'no_such_module'"),
    "factory": (prune("cli_runs:nett", *HALF), "did you mean net"),
    "factory of no module": (prune("cli_runs:no_module", *HALF), "returned int, not a torch module"),
    "zoo data": (prune(NET, *HALF, "--data", "zoo:digit"), "did you mean digits"),
    "data": (prune(NET, *HALF, "--data", "digits"), ["unknown data set 'digits'", "zoo:digits"]),
    "data file": (prune(NET, *HALF, "--data", "none.parquet"), ["none.parquet", "does not exist"]),
    "kind of data": (prune("lm", *HALF, "--data", "file.csv"), "no known kind"),
    "option of data": (prune(NET, *HALF, "--data", "images?sise=4"), "did you mean size"),
    "setting": (prune(NET, *HALF, "--set", "spred=erk"), "did you mean spread"),
    "value of a setting": (prune(NET, *HALF, "--set", "spread=x"), ["setting 'spread' of random", "got 'x'"]),
    "setting without value": (prune(NET, *HALF, "--set", "spread"), "--set takes name=value"),
    "recovery": (prune(NET, *HALF, "--data", "images", "--recover", "fintune"), "did you mean finetune"),
    "setting of recovery": (
        prune(NET, *HALF, "--data", "images", "--recover", "finetune:step=3"),
        ["setting of finetune 'step'", "did you mean steps"],
    ),
    "dtype": (prune(NET, *HALF, "--dtype", "bfloat61"), "did you mean bfloat16"),
    "device": (prune(NET, *HALF, "--device", "warp"), "device 'warp' cannot be used"),
    "plan": (["show", "."], "holds no plan"),
    "plan of apply": (["apply", "nowhere", NET, "--out", "out"], "holds no plan"),
    "plan of diff": (["diff", "nowhere", "."], "holds no plan"),
    "result of report": (["report", "nowhere"], "cannot read the result's record"),
    "model of bench": (["bench", "zoo:digits-mpl"], "did you mean digits-mlp"),
}

NUMBERS = {
    "sparsity 1": (prune(NET, "--sparsity", "1"), ["sparsity must be in [0, 1), got 1"]),
    "negative sparsity": (prune(NET, "--sparsity", "-0.1"), ["sparsity must be in [0, 1), got -0.1"]),
    "sparsity in percent": (prune(NET, "--sparsity", "50"), ["[0, 1)", "0.5 removes half"]),
    "sparsity nan": (prune(NET, "--sparsity", "nan"), "finite"),
    "no budget": (prune(NET), "give one of --sparsity, --pattern, --parameters, --flops"),
    "two budgets": (prune(NET, *HALF, "--pattern", "2:4"), "give one of --sparsity, --pattern, --parameters, --flops"),
    "negative minimum": (prune(NET, *HALF, "--minimum", "-1"), "floor must be 0 or more"),
    "minimum with a pattern": (prune(NET, "--pattern", "2:4", "--minimum", "3"), "--minimum goes with --sparsity"),
    "samples 0": (prune(NET, *HALF, "--data", "images", "--samples", "0"), "--samples must be 1 or more"),
    "negative samples": (prune(NET, *HALF, "--data", "images", "--samples", "-4"), "--samples must be 1 or more"),
    "layer empty": (
        prune(NET, "--sparsity", "0.996", method="global-magnitude"),
        ["would keep 0 of", "lower the sparsity"],
    ),
    "minimum out of reach": (
        prune(NET, "--sparsity", "0.9", "--minimum", "35"),
        ["needs 70", "highest sparsity with this floor is 0.6929"],
    ),
    "blocks out of reach": (
        prune("lm", "--sparsity", "0.1", "--data", "text.txt", method="shortgpt"),
        ["removes 0", "reachable: sparsity 0.25 (1 block) to 0.75 (3 blocks)"],
    ),
    "pattern's form": (prune(NET, "--pattern", "2-4"), "KEEP:OF"),
    "pattern keeps all": (prune(NET, "--pattern", "4:4"), "not possible"),
    "pattern's width": (
        prune(NET, "--pattern", "3:5", "--data", "images", method="wanda"),
        ["1.weight", "16", "5"],
    ),
    "pattern of blocks": (prune("lm", "--pattern", "2:4", "--data", "text.txt", method="shortgpt"), "N:M"),
    "nothing left": (prune(NET, *HALF, "--exclude", "*"), "no weight is left to prune"),
    "infinite weight": (prune("cli_runs:infinite", *HALF, method="global-magnitude"), ["'4.weight'", "infinite"]),
    "infinite activation": (
        prune("cli_runs:explodes", *HALF, "--data", "images", method="wanda"),
        ["layer 'second.weight'", "NaN or infin"],
    ),
    "no data": (prune(NET, *HALF, method="wanda"), ["wanda needs data", "give --data"]),
    "no data to recover": (prune(NET, *HALF, "--recover", "finetune"), "finetune needs data"),
    "no out": (["prune", NET, "--method", "random", *HALF], "give --out DIR"),
    "weights for the zoo": (prune("zoo:digits-mlp", *HALF, "--weights", "w.safetensors"), "--weights goes with"),
    "weights missing": (prune(NET, *HALF, "--weights", "w.safetensors"), "'w.safetensors' does not exist"),
    "weights pickled": (prune(NET, *HALF, "--weights", "w.pt"), "pickled weights are not read"),
    "text for images": (prune(NET, *HALF, "--data", "text.txt"), "needs a tokenizer"),
    "wrong images": (prune(NET, *HALF, "--data", "wide"), ["1, 6, 6]", "cannot be run"]),
    "wrong images for statistics": (prune(NET, *HALF, "--data", "wide", method="wanda"), ["1, 6, 6]", "cannot be run"]),
    "short text": (
        prune("lm", *HALF, "--data", "short.txt", method="wanda"),
        ["short.txt", "holds 6 tokens", "needs 24", "smaller length"],
    ),
    "images of unequal size": (prune(NET, *HALF, "--data", "mixed"), "6x6 pixels, the images before it 4x4"),
}


@pytest.fixture
def place(work, material):
    """The current folder with links to good and bad material."""
    for name in ("lm", "text.txt", "images"):
        (work / name).symlink_to(material / name)
    (work / "file.txt").write_text("x")
    (work / "file.csv").write_text("x")
    write_text(work / "short.txt", 30)
    write_images(work / "wide", 6, 8)
    write_images(work / "mixed", 4, 8)
    shutil.copy(work / "wide" / "class2" / "7.png", work / "mixed" / "class2" / "7.png")
    return work


@pytest.mark.parametrize("case", NAMES)
def test_unknown_names(place, case):
    words, says = NAMES[case]
    refused(place, *words, says=says)


@pytest.mark.parametrize("case", NUMBERS)
def test_impossible_numbers_models_and_data(place, case):
    words, says = NUMBERS[case]
    refused(place, *words, says=says)


@pytest.mark.parametrize("case", ["no data", "layer empty", "infinite weight", "pattern's width"])
def test_dry_run_refuses_the_same(place, case):
    words, says = NUMBERS[case]
    refused(place, *words, "--dry-run", says=says)


# --- models on disk -----------------------------------------------------------------------------------


@pytest.fixture
def sharded(place, material):
    from transformers import AutoModelForCausalLM

    from secateur.shrink.folder import quiet_transformers

    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(material / "lm")
        model.save_pretrained(place / "sharded", max_shard_size="10KB")
    return place / "sharded"


def shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[1]


DAMAGES = {
    "truncated": (lambda path: path.write_bytes(path.read_bytes()[:-5]), "truncated or corrupt"),
    "noise": (lambda path: path.write_bytes(b"\xff" * 300), "truncated or corrupt"),
    "missing": (lambda path: path.unlink(), "is missing"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_shard(place, sharded, damage):
    change, says = DAMAGES[damage]
    path = shard(sharded)
    change(path)
    refused(place, *prune("sharded", *HALF), says=[path.name, says])


def test_nan_in_a_stored_weight(place):
    folder = write_language_model(place / "sick")
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.2.mlp.up_proj.weight"
    tensors[name][3, 3] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for method, data in (("global-magnitude", ()), ("wanda", ("--data", "text.txt"))):
        refused(place, *prune("sick", *HALF, *data, method=method), says=[name, "NaN"])


def test_foreign_factory_in_a_folder_is_not_imported(place):
    good(*prune(NET, *HALF, out="made"))
    refused(place, *prune("made", *HALF), says="--trust-factory")
    good(*prune("made", "--sparsity", "0.6", "--trust-factory"))


# --- plans ----------------------------------------------------------------------------------------------


def test_plan_on_another_model(place):
    good(*prune("lm", *HALF, out="made"))
    write_language_model(place / "same-shape")
    other = load_file(place / "same-shape" / "model.safetensors")
    other["model.norm.weight"] += 1e-3
    save_file(other, place / "same-shape" / "model.safetensors", metadata={"format": "pt"})
    write_language_model(place / "deeper", blocks=5)
    refused(place, "apply", "made", "same-shape", "--out", "out", says=["another model", "model.norm.weight"])
    refused(place, "apply", "made", "deeper", "--out", "out", says="another model")
    refused(place, "apply", "made", NET, "--out", "out", says="missing in this model")
    refused(place, "apply", "made", "deeper", "--other-weights", "--out", "out", says="another model")
    good("apply", "made", "same-shape", "--other-weights", "--out", "out")


@pytest.mark.parametrize("name", ["plan.json", "plan.safetensors"])
def test_damaged_plan(place, name):
    good(*prune(NET, *HALF, out="made"))
    path = place / "made" / "secateur" / name
    content = path.read_bytes()
    for damage in (content[:-20], b"{}", b"", None):
        path.unlink()
        if damage is not None:
            path.write_bytes(damage)
        says = "holds no plan" if damage is None and name == "plan.json" else name
        refused(place, "show", "made", says=says)
        refused(place, "apply", "made", NET, "--out", "out", says=says)


def test_damaged_record(place):
    good(*prune(NET, *HALF, "--data", "images", out="made"))
    path = place / "made" / "secateur" / "report.json"
    record = json.loads(path.read_text())
    (place / "made" / "report.html").unlink()
    good_record = path.read_bytes()
    for damage in ("", "{", "[]", json.dumps(record | {"title": 3}), json.dumps(record | {"extra": 3})):
        path.write_text(damage)
        refused(place, "report", "made", says="not a result's record")
    path.write_bytes(good_record)
    refused(place, "report", "made", "made", says="--out")


# --- where to ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_existing_out_is_refused_before_any_work(place, monkeypatch, kind):
    if kind == "folder":
        (place / "out").mkdir()
        (place / "out" / "precious.txt").write_text("mine")
    else:
        (place / "out").write_text("mine")
    monkeypatch.setattr("secateur.lab.prune.prepare", lambda job: pytest.fail("worked before it looked"))
    refused(place, *prune(NET, *HALF), says=["'out' exists already", "--force"])
    if kind == "file":
        refused(place, *prune(NET, *HALF, "--force"), says="is a file, not a folder")


def test_every_command_that_writes_refuses_an_existing_folder(place):
    good(*prune(NET, *HALF, out="made"))
    (place / "out").mkdir()
    refused(place, "apply", "made", NET, "--out", "out", says="--force")
    refused(place, "zoo", "build", "digits-mlp", "--out", "out", says="--force")


def test_out_below_a_file(place):
    refused(place, *prune(NET, *HALF, out="file.txt/out"), says=["file.txt/out", "cannot write"])


def test_out_with_an_impossible_name(place):
    refused(place, *prune(NET, *HALF, out="x" * 300), says="cannot write")


# --- the hub ------------------------------------------------------------------------------------------------


def test_hub_model_without_network(place, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(place))
    refused(place, *prune("nobody/no-such-model-7b", *HALF), says=["nobody/no-such-model-7b", "hub"])


def test_hub_data_without_network(place):
    err = refused(place, *prune(NET, *HALF, "--data", "nobody/no-such-data"), says=["nobody/no-such-data", "hub"])
    assert len(err) < 500


# --- in a process of its own: nothing else may speak on stderr ---------------------------------------------


def test_one_line_in_a_real_process(place, sharded):
    shard(sharded).write_bytes(b"\xff" * 300)
    before = files(place)
    check(separately(*prune("sharded", *HALF), cwd=place), "truncated or corrupt")
    assert files(place) == before


def test_usage_errors_have_code_2_and_no_traceback(work):
    for words in (["prune"], ["prune", NET], ["nonsense"], prune(NET, "--sparsity", "much"), ["bench", "--batch", "x"]):
        done = run(*words)
        assert done.code == 2
        assert done.out == ""
        assert "Traceback" not in done.err
        assert done.err.strip()
    assert files(work) == {}


def test_the_material_is_good(place):
    """What the refusals above rest on: without the fault, each of these runs."""
    good(*prune(NET, *HALF, "--data", "images", out="a"))
    good(*prune("lm", *HALF, "--data", "text.txt", method="wanda", out="b"))
    good(*prune(NET, *HALF, "--data", "images", method="wanda", out="c"))
