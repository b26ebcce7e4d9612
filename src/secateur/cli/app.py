"""The commands. Each hands over to a function that does the work; options are the same words everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from secateur.core.errors import SettingsError

app = typer.Typer(
    name="secateur",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    help="Remove whatever a deep-learning system can do without, and show what it cost and brought.\n\n"
    "Start with:  `secateur prune zoo:pydoc-llama --method wanda --sparsity 0.5 --out pruned`",
)
zoo_app = typer.Typer(no_args_is_help=True, help="Small trained models that are shipped with the library.")
app.add_typer(zoo_app, name="zoo")

MODEL_HELP = "zoo:NAME, a Hugging Face folder, a hub id, or timm:NAME or module.path:factory with --weights"
DATA_HELP = (
    "zoo:NAME, a .txt/.jsonl/.parquet file (rows of text or conversations), an image folder, or a hub id; options as "
    "file?limit=2000&chat=1, and text?generated=8: calibrate on what the model writes after 8 tokens"
)

Model = Annotated[str, typer.Argument(help=MODEL_HELP)]
Data = Annotated[str | None, typer.Option(help=DATA_HELP)]
Json = Annotated[bool, typer.Option("--json", help="one JSON document on stdout")]
Seed = Annotated[int, typer.Option(help="of everything random")]
Force = Annotated[bool, typer.Option(help="replace an existing output folder")]
Weights = Annotated[str | None, typer.Option(help="safetensors file for module.path:factory")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16; default: as stored")]
Trust = Annotated[bool, typer.Option(help="import the factory that a result folder names")]


def pairs(words: list[str], option: str) -> dict[str, str]:
    """`["a=1", "b=2"]` as a dictionary."""
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals or not name:
            raise SettingsError(f"{option} takes name=value, got '{word}'")
        found[name.strip().replace("-", "_")] = value.strip()
    return found


@app.command()
def prune(
    model: Model,
    method: Annotated[str, typer.Option(help="a name from `secateur methods`")],
    out: Annotated[Path | None, typer.Option(help="folder for the result; not needed with --dry-run")] = None,
    sparsity: Annotated[float | None, typer.Option(help="fraction of the units to remove, in [0, 1)")] = None,
    pattern: Annotated[str | None, typer.Option(help="instead: KEEP:OF, e.g. 2:4 keeps 2 of every 4 inputs")] = None,
    parameters: Annotated[float | None, typer.Option(help="instead: parameters kept; up to 1 a share")] = None,
    flops: Annotated[float | None, typer.Option(help="instead: FLOPs kept; up to 1 a share, e.g. 0.5")] = None,
    size: Annotated[float | None, typer.Option("--bytes", help="instead: bytes kept; up to 1 a share")] = None,
    latency: Annotated[
        float | None, typer.Option(help="instead: time of a call on this machine, measured; up to 1 a share, else ms")
    ] = None,
    minimum: Annotated[int, typer.Option(help="every layer keeps at least so many units")] = 0,
    data: Data = None,
    samples: Annotated[int | None, typer.Option(help="calibration samples; default 128 (zoo: 64)")] = None,
    setting: Annotated[list[str] | None, typer.Option("--set", help="a setting of the method, name=value")] = None,
    include: Annotated[list[str] | None, typer.Option(help="only layers that match, e.g. 'model.layers.1*'")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="no layers that match, e.g. '*down_proj*'")] = None,
    compensate: Annotated[
        bool, typer.Option("--compensate", help="add the mean of what structured pruning removes to the next biases")
    ] = False,
    recover: Annotated[
        str | None, typer.Option(help="finetune or batchnorm, with settings: finetune:steps=300,lr=1e-3")
    ] = None,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_factory: Trust = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="one block of a folder's weights in memory at a time; resumes after a kill")
    ] = False,
    spill: Annotated[bool, typer.Option("--spill", help="with --stream: activations on disk only")] = False,
    dry_run: Annotated[bool, typer.Option(help="show the plan, write nothing")] = False,
    verify: Annotated[bool, typer.Option(help="reload the result and compare its outputs before keeping it")] = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Prune a model, save it, prove that it reloads, measure it and write a report.

    `secateur prune zoo:pydoc-llama --method wanda --sparsity 0.5 --out pruned`

    `secateur prune zoo:pydoc-llama --method shortgpt --sparsity 0.25 --out shorter`

    `secateur prune zoo:digits-resnet --method channel-norm --flops 0.5 --recover finetune --out half`

    `secateur prune zoo:digits-resnet --method global-magnitude --sparsity 0.9 --recover finetune --out small`

    `secateur prune ./my-llama --method sparsegpt --pattern 2:4 --data text.jsonl --out my-llama-2-4`

    `secateur prune ./larger-than-memory --method wanda --sparsity 0.5 --data text.jsonl --out half --stream`

    `secateur prune mynets:make --weights w.safetensors --method taylor --sparsity 0.8 --data photos/ --out net`
    """
    from secateur.cli import commands

    request: dict[str, Any] = {
        "model": model,
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "parameters": parameters,
        "flops": flops,
        "bytes": size,
        "latency": latency,
        "minimum": minimum,
        "data": data,
        "samples": samples,
        "settings": pairs(setting or [], "--set"),
        "include": tuple(include or ("*",)),
        "exclude": tuple(exclude or ()),
        "compensate": compensate,
        "recover": recover,
        "seed": seed,
        "weights": weights,
        "device": device,
        "dtype": dtype,
        "trust_factory": trust_factory,
        "verify": verify,
        "force": force,
    }
    commands.prune(request, out, json=json, dry_run=dry_run, stream=stream, spill=spill)


# what commands that train have in common; None where a flag is not given, so that a file can say it
JobModel = Annotated[str | None, typer.Argument(help=f"{MODEL_HELP}; or in the file")]
Config = Annotated[Path | None, typer.Option(help="a YAML file with any of these names; flags win")]
JobSparsity = Annotated[float | None, typer.Option(help="fraction of the units to remove, in [0, 1)")]
JobParameters = Annotated[float | None, typer.Option(help="instead: parameters kept; up to 1 a share")]
JobFlops = Annotated[float | None, typer.Option(help="instead: FLOPs kept; up to 1 a share, e.g. 0.5")]
JobOut = Annotated[Path | None, typer.Option(help="folder for the result; the running state is beside it")]
Steps = Annotated[int | None, typer.Option(help="optimiser steps of one whole training")]
Recipe = Annotated[
    list[str] | None, typer.Option(help="how to train, name=value: lr, batch, optimizer, decay, weight_decay, ...")
]
SettingWords = Annotated[list[str] | None, typer.Option("--set", help="a setting of the method, name=value")]
JobMinimum = Annotated[int | None, typer.Option(help="every layer keeps at least so many units")]
Include = Annotated[list[str] | None, typer.Option(help="only layers that match")]
Exclude = Annotated[list[str] | None, typer.Option(help="no layers that match")]
Validation = Annotated[float | None, typer.Option(help="share of the training data that decides")]
JobSeed = Annotated[int | None, typer.Option(help="of everything random")]
JobDevice = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1, ...")]
JobTrust = Annotated[bool | None, typer.Option("--trust-factory", help="import a folder's factory")]
JobForce = Annotated[bool | None, typer.Option("--force", help="replace an existing output folder")]


def job_flags(flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that were given, under the names that a file has for them."""
    steps, recipe, setting = flags.pop("steps"), flags.pop("recipe"), flags.pop("setting")
    flags["settings"] = pairs(setting or [], "--set") or None
    flags["recipe"] = pairs(recipe or [], "--recipe") | ({"steps": steps} if steps is not None else {}) or None
    for name in ("include", "exclude"):
        flags[name] = tuple(flags[name]) if flags[name] else None
    return {name: value for name, value in flags.items() if value is not None}


@app.command()
def train(
    model: JobModel = None,
    config: Config = None,
    method: Annotated[str | None, typer.Option(help="acts during training: granet, gmp, rigl, ...")] = None,
    sparsity: JobSparsity = None,
    parameters: JobParameters = None,
    flops: JobFlops = None,
    out: JobOut = None,
    steps: Steps = None,
    recipe: Recipe = None,
    setting: SettingWords = None,
    data: Data = None,
    minimum: JobMinimum = None,
    include: Include = None,
    exclude: Exclude = None,
    from_scratch: Annotated[bool | None, typer.Option("--from-scratch", help="start from new random weights")] = None,
    validation: Validation = None,
    evaluate_every: Annotated[int | None, typer.Option(help="optimiser steps between validations")] = None,
    patience: Annotated[int | None, typer.Option(help="validations on target without a better one, then stop")] = None,
    tensorboard: Annotated[bool | None, typer.Option("--tensorboard", help="write scalars for TensorBoard")] = None,
    recover: Annotated[str | None, typer.Option(help="after the training and its cut: finetune:steps=300")] = None,
    seed: JobSeed = None,
    weights: Weights = None,
    device: JobDevice = None,
    trust_factory: JobTrust = None,
    force: JobForce = None,
    json: Json = False,
) -> None:
    """Train a model while a method makes it sparse; keep the state that is best on validation data.

    Killed? Run the same command again: it goes on where it was.

    `secateur train zoo:digits-mlp --method granet --sparsity 0.95 --steps 1000 --from-scratch --out sparse`

    `secateur train zoo:digits-resnet --method group-lasso --flops 0.5 --steps 300 --recover finetune --out half`

    `secateur train --config run.yaml --out sparse`
    """
    flags = dict(locals())
    from secateur.cli import commands

    config, out, json = flags.pop("config"), flags.pop("out"), flags.pop("json")
    commands.train(config, job_flags(flags), out, json)


@app.command()
def study(
    model: JobModel = None,
    config: Config = None,
    method: Annotated[str | None, typer.Option(help="works around trainings: lottery, plasticity, oracle, ...")] = None,
    sparsity: JobSparsity = None,
    parameters: JobParameters = None,
    flops: JobFlops = None,
    out: JobOut = None,
    steps: Steps = None,
    recipe: Recipe = None,
    setting: SettingWords = None,
    data: Data = None,
    minimum: JobMinimum = None,
    include: Include = None,
    exclude: Exclude = None,
    pretrained: Annotated[bool | None, typer.Option("--pretrained", help="start trainings from its weights")] = None,
    validation: Validation = None,
    seed: JobSeed = None,
    weights: Weights = None,
    device: JobDevice = None,
    trust_factory: JobTrust = None,
    force: JobForce = None,
    json: Json = False,
) -> None:
    """Run a procedure around whole trainings: lottery tickets, pruning plasticity, a criterion on trial.

    Killed? Run the same command again: it goes on where it was.

    `secateur study zoo:digits-mlp --method plasticity --sparsity 0.9 --steps 400 --out plasticity`

    `secateur study zoo:digits-mlp --method lottery --sparsity 0.9 --steps 400 --recipe lr=0.1 --out ticket`
    """
    flags = dict(locals())
    from secateur.cli import commands

    config, out, json = flags.pop("config"), flags.pop("out"), flags.pop("json")
    commands.study(config, job_flags(flags), out, json)


@app.command()
def inspect(
    model: Model,
    data: Data = None,
    shape: Annotated[str | None, typer.Option("--input", help="numbers of this shape, e.g. 2,3,224,224")] = None,
    tokens: Annotated[str | None, typer.Option(help="token ids: samples x length, e.g. 2x16")] = None,
    weights: Weights = None,
    no_weights: Annotated[bool, typer.Option("--no-weights", help="build the model without values")] = False,
    html: Annotated[Path | None, typer.Option(help="also write a page with a picture of the couplings")] = None,
    depth: Annotated[int | None, typer.Option(help="so many levels of modules, nothing folded", min=1)] = None,
    frozen: Annotated[bool, typer.Option("--frozen", help="list everything that cannot go, with reasons")] = False,
    trust_factory: Trust = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """What can be removed from a model: channels, neurons, heads, widths; what goes with each, and what is frozen.

    No weights are needed: a folder with only a config.json will do. Without inputs, fitting ones are made up.

    `secateur inspect zoo:digits-resnet`

    `secateur inspect ./llama-config-only --html llama.html`

    `secateur inspect mynets:make --no-weights --input 2,3,64,64 --json`
    """
    from secateur.cli import commands

    asked = {"weights": weights, "outline": no_weights, "trust_factory": trust_factory, "seed": seed}
    commands.inspect(
        asked | {"model": model, "data": data, "shape": shape, "tokens": tokens}, html, depth, frozen, json
    )


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="one method, in full")] = None,
    tag: Annotated[
        list[str] | None, typer.Option(help="only methods with this tag, e.g. speedup=structured; can be repeated")
    ] = None,
    json: Json = False,
) -> None:
    """The catalogue of methods, filterable by the survey's tags.

    `secateur methods`

    `secateur methods wanda`

    `secateur methods --tag when=after_training --tag data=data_free`
    """
    from secateur.cli import commands

    commands.methods(name, pairs(tag or [], "--tag"), json)


@app.command()
def show(
    place: Annotated[Path, typer.Argument(help="a result folder or a plan's folder")],
    json: Json = False,
) -> None:
    """What a plan keeps and removes, and what made it.

    `secateur show pruned`
    """
    from secateur.cli import commands

    commands.show_plan(place, json)


@app.command()
def apply(
    plan: Annotated[Path, typer.Argument(help="a result folder or a plan's folder")],
    model: Model,
    out: Annotated[Path, typer.Option(help="folder for the result")],
    other_weights: Annotated[
        bool, typer.Option(help="accept the same architecture with other weights, e.g. retrained ones")
    ] = False,
    weights: Weights = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_factory: Trust = False,
    verify: Annotated[bool, typer.Option(help="reload the result and compare before keeping it")] = True,
    force: Force = False,
    json: Json = False,
) -> None:
    """Put a plan on the model it was made for, and save the result.

    `secateur apply pruned zoo:pydoc-llama --out again`
    """
    from secateur.cli import commands

    opening = {"weights": weights, "device": device, "dtype": dtype, "trust_factory": trust_factory}
    saving = {"verify": verify, "force": force}
    commands.apply_plan(plan, model, out, other_weights, opening, saving, json)


@app.command()
def diff(
    first: Annotated[Path, typer.Argument(help="a plan")],
    second: Annotated[Path, typer.Argument(help="another plan")],
    json: Json = False,
) -> None:
    """Compare two plans site by site: kept by both, only by one, overlap.

    `secateur diff pruned-wanda pruned-magnitude`
    """
    from secateur.cli import commands

    commands.diff(first, second, json)


@app.command()
def bench(
    models: Annotated[list[str], typer.Argument(help=f"{MODEL_HELP}; several are measured side by side")],
    data: Data = None,
    batch: Annotated[list[int] | None, typer.Option(help="batch sizes; default 1 and 16")] = None,
    seconds: Annotated[float, typer.Option(help="time to spend on each model and batch size")] = 1.0,
    machine: Annotated[bool, typer.Option(help="also measure what zeros and cuts bring on this machine")] = True,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_factory: Trust = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Latency, throughput, memory, size and quality of models, side by side and interleaved.

    `secateur bench zoo:pydoc-llama pruned shorter`
    """
    from secateur.cli import commands

    opening = {"device": device, "dtype": dtype, "trust_factory": trust_factory}
    commands.bench(models, data, tuple(batch or (1, 16)), seconds, machine, opening, seed, json)


@app.command()
def evaluate(
    models: Annotated[list[str], typer.Argument(help=f"{MODEL_HELP}; the first is what the others are compared with")],
    tasks: Annotated[
        str | None,
        typer.Option(help="tasks of the lm-evaluation-harness, a,b,c, or secateur_cloze, secateur_labels, ..."),
    ] = None,
    include_path: Annotated[list[Path] | None, typer.Option(help="folder with more task files for --tasks")] = None,
    limit: Annotated[
        int | None, typer.Option(help="questions of each task; default 100, with --tasks all", min=1)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="with --tasks: sequences that run together; default 8", min=1)
    ] = None,
    shots: Annotated[
        int | None, typer.Option(help="worked examples before each built-in question; 3 if it never saw them", min=0)
    ] = None,
    data: Annotated[str | None, typer.Option(help=f"also measure perplexity on: {DATA_HELP}")] = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_factory: Trust = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """What language models can do, side by side: abilities by choice and by generation, and degeneration of text.

    The built-in tasks need no network: labels, digits, copying, brackets, arithmetic, cloze. With --tasks, those of
    the lm-evaluation-harness (`pip install 'secateur[eval]'`); a task that is not in --include-path may fetch its data.

    `secateur evaluate zoo:skills-llama pruned`

    `secateur evaluate ./my-llama pruned --shots 3 --data text.txt`

    `secateur evaluate ./my-llama pruned --tasks hellaswag,arc_easy --limit 200`

    `secateur evaluate zoo:skills-llama pruned --tasks secateur_cloze,secateur_brackets`
    """
    from secateur.cli.evaluate import Asked
    from secateur.cli.evaluate import evaluate as run

    opening = {"device": device, "dtype": dtype, "trust_factory": trust_factory}
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    run(Asked(models, names, include_path or [], limit, batch, shots, data, opening, seed), json)


@app.command()
def export(
    model: Model,
    out: Annotated[Path, typer.Argument(help="the file; .pt2 for torch.export, .onnx for ONNX")],
    data: Data = None,
    batch: Annotated[int, typer.Option(help="samples in the probe, which is compared and timed", min=1)] = 1,
    opset: Annotated[int | None, typer.Option(help="ONNX operator set; default: torch's")] = None,
    static: Annotated[bool, typer.Option("--static", help="only this batch size, for models that need it")] = False,
    fuse: Annotated[bool, typer.Option("--fuse", help="fold batch norms into the layers before them first")] = False,
    verify: Annotated[bool, typer.Option(help="run the file and compare its outputs before keeping it")] = True,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    trust_factory: Trust = False,
    force: Annotated[bool, typer.Option(help="replace an existing file")] = False,
    json: Json = False,
) -> None:
    """Write a model as one file for another runtime, compare its outputs with torch's and time both.

    `secateur export pruned pruned.onnx`

    `secateur export zoo:digits-resnet resnet.pt2 --batch 16`
    """
    from secateur.cli import commands

    opening = {"weights": weights, "device": device, "dtype": dtype, "trust_factory": trust_factory}
    saving = {"opset": opset, "dynamic_batch": not static, "verify": verify, "force": force}
    commands.export_model(model, out, data, batch, seed, fuse, opening, saving, json)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="result folders; several are compared on one page")],
    out: Annotated[Path | None, typer.Option(help="HTML file; default: report.html in the only folder")] = None,
    json: Json = False,
) -> None:
    """One self-contained HTML page about one or several results.

    `secateur report pruned`

    `secateur report pruned shorter small --out comparison.html`
    """
    from secateur.cli import commands

    commands.report(folders, out, json)


@app.command()
def reproduce(
    name: Annotated[str, typer.Argument(help="a method")],
    seeds: Annotated[int, typer.Option(help="number of seeds", min=1)] = 3,
    scale: Annotated[
        str,
        typer.Option(help="small, or full: the paper's, with the folders SECATEUR_DATA and SECATEUR_MODELS"),
    ] = "small",
    out: Annotated[Path | None, typer.Option(help="folder for NAME.md and NAME.json", metavar="DIR")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="folder for what the full scale trains; a killed run goes on", metavar="DIR")
    ] = None,
    json: Json = False,
) -> None:
    """Run a method's check: does the paper's central claim show, against baseline and random?

    Exit code 1 if a claim does not show.

    `secateur reproduce wanda --seeds 3`

    `secateur reproduce lottery --scale full --seeds 5 --keep runs --out evidence`
    """
    from secateur.cli import commands

    commands.reproduce(name, seeds, scale, out, keep, json)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="a YAML file: model, data, rows; or the name of one that is shipped")],
    seeds: Annotated[int | None, typer.Option(help="seeds of calibration; default: the file's", min=1)] = None,
    out: Annotated[Path | None, typer.Option(help="folder for NAME.md and NAME.json", metavar="DIR")] = None,
    keep: Annotated[
        Path | None, typer.Option(help="folder for finished rows; a killed run goes on", metavar="DIR")
    ] = None,
    json: Json = False,
) -> None:
    """Many methods on one model: same data, same budgets, several seeds, one table.

    `secateur compare rows.yaml --keep rows --out tables`
    """
    from secateur.cli import commands

    commands.compare(file, seeds, out, keep, json=json)


@zoo_app.command("list")
def zoo_list(json: Json = False) -> None:
    """Shipped models with their quality and size.

    `secateur zoo list`
    """
    from secateur.cli import commands

    commands.zoo_list(json)


@zoo_app.command("build")
def zoo_build(
    name: Annotated[str, typer.Argument(help="a zoo model")],
    out: Annotated[Path, typer.Option(help="folder for the result")],
    seed: Seed = 0,
    force: Force = False,
    json: Json = False,
) -> None:
    """Train a zoo model again from scratch; same seed and versions, same bytes.

    `secateur zoo build digits-resnet --out my-resnet`
    """
    from secateur.cli import commands

    commands.zoo_build(name, out, seed, force, json)
