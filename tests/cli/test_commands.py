"""Every command as a user and as a machine would call it."""

import contextlib
import io
import json
import re
import subprocess
import sys

import cli_runs
import pytest
import torch
from cli_runs import files, good, machine_facts, net, run, separately, spawn
from safetensors.torch import load_file, save_model

import secateur as sc
from secateur.cli import commands, progress, show
from secateur.core.plan import Plan

NET = "cli_runs:net"
COMMANDS = [
    ["prune"],
    ["train"],
    ["study"],
    ["compare"],
    ["inspect"],
    ["methods"],
    ["show"],
    ["apply"],
    ["diff"],
    ["bench"],
    ["evaluate"],
    ["export"],
    ["report"],
    ["reproduce"],
    ["zoo", "list"],
    ["zoo", "build"],
]


@pytest.fixture
def place(work, material):
    for name in ("lm", "text.txt", "images"):
        (work / name).symlink_to(material / name)
    return work


def prune(*more, model=NET, method="random", out="out"):
    return ["prune", model, "--method", method, "--sparsity", "0.5", "--out", out, *more]


# --- help and start-up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_help_teaches_by_example(command, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = good(*command, "--help").out
    assert f"secateur {' '.join(command)}" in said.partition("Usage")[2].partition("\n")[2]  # beyond the usage line
    assert "--json" in said


def test_all_commands_are_in_the_help_and_known_here():
    said = good("--help").out
    for command in COMMANDS:
        assert command[0] in said
    from typer.main import get_command

    from secateur.cli.app import app

    found = get_command(app).commands
    flat = {(name, *([sub] if sub else [])) for name, c in found.items() for sub in getattr(c, "commands", {"": 0})}
    assert flat == {tuple(command) for command in COMMANDS}


HEAVY = "import sys; heavy = {m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'numpy', 'sklearn'}"


@pytest.mark.parametrize(
    "code",
    [
        "import sys; sys.argv = ['secateur', '--help']\nfrom secateur.cli import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n",
        "import secateur\nassert secateur.__version__ and 'plan' in dir(secateur)\n",
    ],
    ids=["help", "import"],
)
def test_starts_without_the_heavy_libraries(code):
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{HEAVY}; assert not heavy, heavy; print('light')"],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.stdout.endswith("light\n"), done.stderr


def test_every_public_name_loads():
    for name in dir(sc):
        assert getattr(sc, name) is not None
    for _ in range(2):  # a room's name is not overwritten by importing the room
        assert "wanda" in sc.methods()
        assert callable(sc.measure)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = sc.nonsense


# --- methods ----------------------------------------------------------------------------------------------


def test_methods_json():
    found = good("methods", "--json").json
    assert {entry["name"] for entry in found} == set(sc.methods())
    assert len(found) >= 6
    for entry in found:
        assert {"name", "paper", "title", "kind", "tags", "settings", "citation", "formula"} <= entry.keys()
        assert entry["kind"] in {"plan", "sparsifier", "procedure", "attachment"}
        for setting in entry["settings"]:
            assert setting.keys() == {"name", "type", "default", "help"}


def test_one_method_by_either_spelling():
    for name in ("global-magnitude", "global_magnitude", "Global-Magnitude"):
        (entry,) = good("methods", name, "--json").json
        assert entry["name"] == "global_magnitude"
    said = good("methods", "wanda").out
    for word in ("2306.11695", "|W_ij| * ||X_j||_2", "sequencing", "after_training"):
        assert word in said


def test_methods_are_filtered_by_every_tag_given():
    structured = {entry["name"] for entry in good("methods", "--tag", "speedup=structured", "--json").json}
    assert structured == {n for n, m in sc.methods().items() if "structured" in m.tags.speedup}
    both = good("methods", "--tag", "speedup=unstructured", "--tag", "data=data_free", "--json").json
    data_free = {n for n, m in sc.methods().items() if m.tags.data == "data_free"}
    assert {e["name"] for e in both} == {n for n in data_free if "unstructured" in sc.methods()[n].tags.speedup}
    assert {"global_magnitude", "random"} <= {entry["name"] for entry in both}
    assert good("methods", "--tag", "runtime=dynamic", "--json").json == []


# --- prune ------------------------------------------------------------------------------------------------


def test_prune_json_and_what_is_written(place):
    found = good(*prune("--data", "images", "--json")).json
    assert found.keys() == {"out", "report", "record"}
    assert found["record"] == json.loads((place / "out" / "secateur" / "report.json").read_text())
    assert (place / "out" / "report.html").read_text().startswith("<!")
    assert found["report"] == "out/report.html"
    plan = Plan.load(place / "out" / "secateur")
    assert plan.units() == (114, 228)
    stored = load_file(place / "out" / "model.safetensors")
    for name, mask in plan.masks.items():
        assert torch.equal(stored[name] != 0, mask)
        assert torch.equal(stored[name][mask], net().state_dict()[name][mask])
    assert sorted(path.name for path in place.iterdir()) == ["images", "lm", "out", "text.txt"]


def test_record_counts_are_right(place):
    record = good(*prune("--data", "images", "--json")).json["record"]
    total = sum(p.numel() for p in net().parameters())
    zeros_before = sum(int((p == 0).sum()) for p in net().parameters())
    assert record["sizes"]["parameters"] == {"before": total, "after": total}
    assert record["sizes"]["nonzeros"] == {"before": total - zeros_before, "after": total - zeros_before - 114}
    assert {layer["site"]: (layer["kept"], layer["units"]) for layer in record["layers"]} == {
        "1.weight": (96, 192),
        "4.weight": (18, 36),
    }


def test_prune_without_data_for_a_method_that_needs_none(place):
    found = good(*prune("--json")).json
    assert found == {"out": "out", "report": None, "record": None}
    assert not (place / "out" / "report.html").exists()
    assert Plan.load(place / "out" / "secateur").provenance[0].data == {}
    assert "no report (add --data)" in good(*prune(out="again")).out
    done = run("report", "out")
    assert (done.code, done.out) == (2, "")


def test_dry_run_writes_nothing_and_shows_the_same_plan(place):
    before = files(place)
    dry = good(*prune("--dry-run", "--json")).json
    assert files(place) == before
    good(*prune())
    document = json.loads((place / "out" / "secateur" / "plan.json").read_text())
    assert {key: dry[key] for key in document} == document
    assert dry["sparsity"] == 0.5
    assert good("show", "out", "--json").json == dry
    assert good("show", "out/secateur", "--json").json == dry
    said = good("prune", NET, "--method", "random", "--sparsity", "0.5", "--dry-run").out  # needs no --out
    assert "reached 50.0000%" in said


def test_force_replaces_and_leaves_nothing_of_the_old(place):
    good(*prune())
    (place / "out" / "old.txt").write_text("x")
    good(*prune("--force", "--seed", "1"))
    assert not (place / "out" / "old.txt").exists()
    assert Plan.load(place / "out" / "secateur").provenance[0].seed == 1
    assert not [path for path in place.iterdir() if path.name.startswith(".")]


def test_a_result_can_be_pruned_into_its_own_place(place):
    good(*prune(model="lm"))
    good(*prune("--force", "--data", "text.txt", model="out", method="shortgpt"))
    assert sc.load("out").config.num_hidden_layers == 2
    assert (place / "out" / "tokenizer.json").exists()


def test_weights_of_a_factory(place):
    model = net()
    with torch.no_grad():
        model[4].bias.fill_(0.25)
    save_model(model, "w.safetensors")
    good(*prune("--weights", "w.safetensors"))
    assert load_file("out/model.safetensors")["4.bias"].tolist() == [0.25] * 3


@pytest.mark.parametrize(("dtype", "model"), [("bfloat16", NET), ("bfloat16", "lm"), ("float16", "lm")])
def test_half_precision(place, dtype, model):
    data = ["--data", "text.txt" if model == "lm" else "images"] if dtype == "bfloat16" else []
    good(*prune("--dtype", dtype, *data, model=model))
    stored = load_file("out/model.safetensors")
    assert {value.dtype for value in stored.values() if value.is_floating_point()} == {getattr(torch, dtype)}


def test_include_exclude_and_settings_reach_the_method(place):
    found = good(*prune("--dry-run", "--json", "--exclude", "4*", "--set", "spread=global")).json
    assert [row["site"] for row in found["table"]] == ["1.weight"]
    assert found["provenance"][0]["settings"]["spread"] == "global"
    found = good(*prune("--dry-run", "--json", "--include", "4")).json
    assert [row["site"] for row in found["table"]] == ["4.weight"]


def test_minimum_is_kept_in_every_layer(place):
    sparse = ["prune", NET, "--method", "global-magnitude", "--sparsity", "0.96", "--dry-run", "--json"]
    found = good(*sparse, "--minimum", "4").json
    assert all(row["kept"] >= 4 for row in found["table"])
    assert sum(row["kept"] for row in found["table"]) == 228 - int(0.96 * 228)


def test_samples_and_seed_choose_the_calibration_data(place):
    base = ["prune", "lm", "--method", "wanda", "--sparsity", "0.5", "--data", "text.txt", "--dry-run", "--json"]

    def data(*more):
        return good(*base, *more).json["provenance"][0]["data"]

    assert data("--samples", "5")["samples"] == 5
    assert data()["samples"] == 128
    assert data("--seed", "1")["digest"] != data()["digest"]
    assert data("--seed", "1") == data("--seed", "1")


MANY_DIGITS = ["prune", NET, "--method", "random", "--sparsity", "0.123456789", "--data", "images", "--out", "o"]
RECORDED = {
    "digits, seed, setting": [*MANY_DIGITS, "--seed", "7", "--set", "spread=erk"],
    "layers": prune("--data", "images", "--include", "*", "--include", "1*", "--exclude", "4*"),
    "minimum": prune("--data", "images", "--minimum", "5", method="global-magnitude"),
    "samples": prune("--data", "text.txt", "--samples", "6", "--set", "compare=layer", model="lm", method="wanda"),
    "n:m": ["prune", "lm", "--method", "wanda", "--pattern", "1:4", "--data", "text.txt?limit=4", "--out", "o"],
    "recovery": prune("--data", "images?channels=1&limit=20", "--recover", "finetune:steps=2,lr=1e-4", method="taylor"),
    "weights": prune("--data", "images", "--weights", "my weights.safetensors", "--dtype", "bfloat16", "--no-verify"),
}


@pytest.mark.parametrize("case", RECORDED)
def test_recorded_command_and_python_make_the_identical_plan(place, case):
    import shlex

    save_model(net(), "my weights.safetensors")
    words = RECORDED[case]
    good(*words)
    out = place / words[words.index("--out") + 1]
    reproduce = json.loads((out / "secateur" / "report.json").read_text())["reproduce"]
    first = {name: files(out)[f"secateur/{name}"] for name in ("plan.json", "plan.safetensors")}
    model = files(out)["model.safetensors"]
    program, *again = shlex.split(reproduce["command"])
    assert program == "secateur"
    good(*again, "--force")
    assert {name: files(out)[f"secateur/{name}"] for name in first} == first
    assert files(out)["model.safetensors"] == model
    names = {}
    exec(reproduce["python"], names)
    names["plan"].save("python")
    assert files(place / "python")["plan.safetensors"] == first["plan.safetensors"]
    if case != "recovery":  # the snippet ends with the pruned model
        sc.save(names["opened"].model, "saved", verify=False)
        assert files(place / "saved")["model.safetensors"] == model


# --- apply, show, diff ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "method"), [("lm", "wanda"), ("lm", "shortgpt"), ("lm", "sparsegpt"), (NET, "random")]
)
def test_apply_gives_the_same_model_as_prune(place, model, method):
    data = ["--data", "text.txt"] if model == "lm" else []
    good(*prune(*data, model=model, method=method))
    found = good("apply", "out", model, "--out", "again", "--json").json
    plan = Plan.load("out/secateur")
    assert found == {"out": "again", "kept": plan.units()[0], "total": plan.units()[1], "sparsity": plan.sparsity}
    assert files(place / "again")["model.safetensors"] == files(place / "out")["model.safetensors"]
    for name in ("plan.json", "plan.safetensors"):
        assert (place / "again" / "secateur" / name).read_bytes() == (place / "out" / "secateur" / name).read_bytes()
    assert "applied to" in good("apply", "out", model, "--out", "third").out


def test_blocks_of_a_plain_module_go_again_and_again(place):
    """Every removal so far stays in the folder's memory, whichever command made it."""
    from secateur.core.units import Site, UnitKind

    source, expected = "cli_runs:stack", cli_runs.stack()
    for number, gone in enumerate(([0, 3], [1], [2])):
        mask = torch.ones(len(expected[1]), dtype=torch.bool)
        mask[gone] = False
        Plan({"1": Site("1", UnitKind.BLOCK, tuple(mask.shape))}, {"1": mask}).save(f"plan{number}")
        good("apply", f"plan{number}", source, "--out", f"out{number}", "--trust-factory")
        source, expected[1] = (
            f"out{number}",
            torch.nn.Sequential(*(b for b, k in zip(expected[1], mask, strict=True) if k)),
        )
        x = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
        assert torch.equal(sc.load(source, trust_factory=True)(x), expected(x))
    good(*prune("--trust-factory", model="out2", out="masked"))
    assert len(sc.load("masked", trust_factory=True)[1]) == 2


def test_diff_counts_sites(place):
    for seed in ("1", "2"):
        good(*prune("--seed", seed, out=f"out{seed}"))
    a, b = (Plan.load(f"out{seed}/secateur") for seed in (1, 2))
    rows = good("diff", "out1", "out2", "--json").json["sites"]
    for row in rows:
        mine, theirs = (plan.masks[row["site"]].flatten().tolist() for plan in (a, b))
        both = sum(x and y for x, y in zip(mine, theirs, strict=True))
        first = sum(x and not y for x, y in zip(mine, theirs, strict=True))
        second = sum(y and not x for x, y in zip(mine, theirs, strict=True))
        assert (row["both"], row["only_first"], row["only_second"]) == (both, first, second)
        assert row["overlap"] == pytest.approx(both / (both + first + second))
        assert first > 0
    same = good("diff", "out1", "out1", "--json").json["sites"]
    assert {row["overlap"] for row in same} == {1.0}
    assert "100.00%" in good("diff", "out1", "out1").out


# --- bench, report, zoo -----------------------------------------------------------------------------------


def test_bench_json_side_by_side(place):
    good(*prune("--data", "images"))
    words = ["bench", NET, "out", "--trust-factory", "--seconds", "0.01", "--no-machine", "--json"]
    found = good(*words).json
    assert found["data"] == "images"  # the result knows what it was measured on
    assert list(found["models"]) == [NET, "out"]
    dense, pruned = found["models"].values()
    for one in (dense, pruned):
        assert set(one["latency"]) == {"1", "16"}
        for time_ in one["latency"].values():
            assert {"median", "p10", "p90", "throughput", "warmup", "repeats", "threads", "dtype"} <= time_.keys()
            assert 0 < time_["p10"] <= time_["median"] <= time_["p90"]
        assert one["memory"]["peak"] > 0
    assert pruned["nonzeros"] == dense["nonzeros"] - 114
    assert found["machine"] is None
    assert set(good(*words, "--batch", "3").json["models"]["out"]["latency"]) == {"3"}
    text = good(*words[:-1]).out
    assert "threads, float32, cpu" in text
    assert "warm-up" in text


def test_bench_without_data_says_so(place):
    done = good("bench", NET, "--no-machine", "--json").json
    assert done["data"] is None
    assert done["models"][NET]["latency"] == {}
    assert "give --data" in good("bench", NET, "--no-machine").out


def test_bench_measures_the_machine_unless_told_not_to(place, monkeypatch):
    monkeypatch.setattr(commands, "probe_machine", lambda **ignored: machine_facts())
    found = good("bench", NET, "--seconds", "0.01", "--json").json["machine"]
    assert found == json.loads(json.dumps(machine_facts().to_json()))
    assert "here: zeros bring nothing" in good("bench", NET, "--seconds", "0.01").out


def test_report_of_one_and_of_several(place):
    for name in ("a", "b"):
        good(*prune("--data", "images", out=name))
    (place / "a" / "report.html").unlink()
    assert good("report", "a", "--json").json == {"report": str(place / "a" / "report.html"), "results": ["a"]}
    assert (place / "a" / "report.html").exists()
    found = good("report", "a", "b", "--out", "both.html", "--json").json
    assert found == {"report": str(place / "both.html"), "results": ["a", "b"]}
    assert (place / "both.html").stat().st_size > (place / "a" / "report.html").stat().st_size


def test_zoo_list_json():
    found = good("zoo", "list", "--json").json
    assert [card["name"] for card in found] == [
        "digits-mlp",
        "digits-resnet",
        "digits-vit",
        "pydoc-llama",
        "pydoc-llama-gqa",
        "skills-llama",
    ]
    assert all({"title", "data", "parameters", "quality"} <= card.keys() for card in found)


def test_zoo_build_json(work, monkeypatch):
    from dataclasses import replace

    from secateur.zoo import catalogue

    entry = catalogue.get("digits-mlp")
    short = replace(entry, recipe=replace(entry.recipe, steps=3, warmup=0))
    monkeypatch.setattr("secateur.zoo.builder.get", lambda name: short)
    found = good("zoo", "build", "digits-mlp", "--out", "built", "--json").json
    assert found["out"] == "built"
    assert 0 <= found["quality"]["accuracy"] <= 1
    assert (work / "built" / "model.safetensors").exists()


# --- stdout and stderr --------------------------------------------------------------------------------------


def test_bars_go_to_stderr_and_json_stays_clean(place, monkeypatch):
    """Even with a terminal on stderr, stdout is one JSON document and nothing else."""
    screen = io.StringIO()
    real = progress.Console

    def terminal(*args, **kwargs):
        assert kwargs.get("stderr") is True
        return real(file=screen, force_terminal=True, width=100)

    monkeypatch.setattr(progress, "Console", terminal)
    done = good(*prune("--data", "text.txt", "--json", model="lm", method="wanda"))
    assert done.json["record"]["method"]["name"] == "wanda"
    drawn = screen.getvalue()
    assert "\x1b[" in drawn  # something was drawn
    assert "-:--:--" in drawn or "0:00:" in drawn  # with the time left


def test_long_stages_leave_one_short_line_where_there_is_no_terminal(capsys, monkeypatch):
    clock = iter([0.0, 0.5, 10.0, 13.25])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock, 20.0))
    bars = progress.Bars()
    for stage in ("short", "long"):
        bars.start(stage, 3)
        bars.advance()
        bars.finish()
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "long: 3.2 s\n"


def test_stages_nest():
    bars = progress.Bars()
    bars.start("outer", 2)
    bars.start("inner", 5)
    bars.advance(3)
    inner = bars.bars.tasks[-1]
    assert (inner.description, inner.completed) == ("inner", 3)
    bars.finish()
    bars.advance()
    (outer,) = bars.bars.tasks
    assert (outer.description, outer.completed) == ("outer", 1)
    bars.finish()
    assert not bars.bars.tasks


def test_warnings_go_to_stderr(place):
    done = good(*prune("--exclude", "4*", "--dry-run"))
    assert "warning: '4.weight' was not pruned" in done.err
    assert "warning" not in done.out


def test_tables_keep_long_lines_where_there_is_no_terminal(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    rows = [[f"model.layers.{i}.self_attn.q_proj.weight", "weight", "1,234", "617", "50.00%"] for i in range(3)]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        show.table("t", ["site", "unit", "units", "kept", "removed"], rows)
    assert sum("q_proj.weight" in line and "50.00%" in line for line in out.getvalue().splitlines()) == 3


def test_markup_in_names_is_printed_as_it_is(capsys):
    show.say("[bold]layer[/bold] [0]")
    show.table("t", ["site"], [["[red]x"]])
    show.warn(["[blue]y"])
    out, err = capsys.readouterr()
    assert "[bold]layer[/bold] [0]" in out
    assert "[red]x" in out
    assert "[blue]y" in err


def test_a_closed_pipe_is_no_traceback(work):
    process = spawn("methods", "--json", cwd=work)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    process.wait(60)
    process.stderr.close()


def test_the_whole_job_in_a_real_process(place):
    """Nothing is patched here: real measurements, real machine facts."""
    done = separately(*prune("--data", "zoo:digits", "--json", model="zoo:digits-mlp"), cwd=place)
    assert done.code == 0, done.err
    record = done.json["record"]
    assert [row["label"] for row in record["latency"]["rows"]] == ["batch 1", "batch 16"]
    assert record["machine"]["sentences"]
    assert all(line.endswith(" s") or line.startswith("warning:") for line in done.err.splitlines())


def test_a_sparsity_of_ranks_is_shown_in_parameters(place):
    good("prune", "zoo:digits-mlp", "--method", "svd", "--sparsity", "0.5", "--out", "ranks")
    found = re.search(
        r"asked sparsity 0.5, reached (0\.\d+) of the dense parameters, .*% of the ranks removed",
        good("show", "ranks").out,
    )
    assert 0.48 < float(found[1]) <= 0.5
