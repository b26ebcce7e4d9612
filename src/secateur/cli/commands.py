"""What the commands do: open, call the library, print a table or JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from json import dumps
from pathlib import Path
from typing import Any

from secateur import api, zoo
from secateur.cli import show, structure
from secateur.cli.progress import Bars
from secateur.core import catalogue
from secateur.core.budget import Quantity
from secateur.core.errors import DataError, OutputError, PlanError, SettingsError, UnknownNameError
from secateur.core.files import write_json
from secateur.core.method import Batch
from secateur.core.plan import DOCUMENT, Plan
from secateur.core.tags import axes
from secateur.core.units import UnitKind
from secateur.data.probe import probe_for
from secateur.data.running import resized
from secateur.io.data import open_data
from secateur.io.models import OpenedModel, open_model
from secateur.lab import compare as comparison
from secateur.lab import inspect as inspection
from secateur.lab import prune as job
from secateur.lab import stream as streams
from secateur.lab import study as studies
from secateur.lab import train as sparse_training
from secateur.lab.reproduce import Report, Scale, run_check
from secateur.lab.training import read_job
from secateur.measure import Measurement, measure_together, probe_machine
from secateur.report import Record, write
from secateur.report.lanes import write_structure
from secateur.report.page import put
from secateur.shrink.apply import apply_ as apply_to
from secateur.shrink.export import ExportReport, export
from secateur.shrink.folder import CARD, OWN, read_config
from secateur.shrink.fuse import fuse_
from secateur.shrink.save import save


def find_plan(place: Path) -> Plan:
    """The plan in a plan's folder or a result folder.

    Raises:
        PlanError: there is none.
    """
    for folder in (place, place / OWN):
        if (folder / DOCUMENT).exists():
            return Plan.load(folder)
    raise PlanError(f"'{place}' holds no plan: neither {DOCUMENT} nor {OWN}/{DOCUMENT} is there")


def prune(
    request: Mapping[str, Any], out: Path | None, *, json: bool, dry_run: bool, stream: bool, spill: bool
) -> None:
    """Run the main job, or only its plan."""
    asked = job.Job(**request)
    if spill and not stream:
        raise SettingsError("--spill goes with --stream")
    if stream:
        _prune_streamed(asked, out, json, dry_run, spill)
        return
    with Bars() as progress:
        if dry_run:
            plan = job.make_plan(job.prepare(asked), progress)
        elif out is None:
            raise OutputError("give --out DIR for the result, or --dry-run to see the plan only")
        else:
            record = job.prune(asked, out, progress)
    if dry_run:
        _print_plan(plan, json)
    elif json:
        assert out is not None
        found = record.model_dump(mode="json") if record else None
        show.as_json({"out": str(out), "report": str(out / job.PAGE) if record else None, "record": found})
    else:
        assert out is not None
        _print_result(record, out)


def _prune_streamed(asked: job.Job, out: Path | None, json: bool, dry_run: bool, spill: bool) -> None:
    """The main job on a folder whose weights are not loaded as a whole."""
    if dry_run or out is None:
        raise OutputError("--stream writes a folder: give --out DIR, without --dry-run")
    with Bars() as progress:
        found = streams.prune_streamed(asked, out, spill=spill, progress=progress)
    if json:
        figures = {key: value for key, value in vars(found).items() if key != "record"}
        record = found.record.model_dump(mode="json") if found.record else None
        show.as_json({"out": str(out), "report": str(out / job.PAGE) if record else None, "record": record, **figures})
        return
    if found.record is not None or found.perplexity_after is None:
        _print_result(found.record, out, "")
    else:
        show.say(f"perplexity, block by block: {found.perplexity_before:.4g} -> {found.perplexity_after:.4g}")
        show.say(f"saved in {out}")
        show.say(_loads(out))
    blocks = found.seconds_per_block
    pace = f", {min(blocks):.1f} to {max(blocks):.1f} s per block" if blocks else ""
    show.say(f"peak memory {found.peak_bytes / 2**30:.2f} GiB{pace}")


def train(config: Path | None, flags: Mapping[str, Any], out: Path | None, json: bool) -> None:
    """Train sparsely, or go on where a killed run stopped."""
    asked = read_job(sparse_training.TrainJob, config, flags)
    if out is None:
        raise OutputError("give --out DIR for the result")
    with Bars() as progress:
        record = sparse_training.train(asked, out, progress)
    if json:
        found = record.model_dump(mode="json")
        show.as_json({"out": str(out), "report": str(out / job.PAGE), "record": found})
    else:
        _print_result(record, out)


def study(config: Path | None, flags: Mapping[str, Any], out: Path | None, json: bool) -> None:
    """Run a procedure around trainings, or go on where a killed one stopped."""
    asked = read_job(studies.StudyJob, config, flags)
    if out is None:
        raise OutputError("give --out DIR for the result")
    with Bars() as progress:
        found = studies.study(asked, out, progress)
    if json:
        show.as_json({"out": str(out), **found.to_json()})
        return
    columns = [name for name in dict.fromkeys(key for row in found.rows for key in row) if _is_plain(found.rows, name)]
    title = f"{asked.model} under {asked.method}"
    show.table(title, columns, [[_cell(row.get(name)) for name in columns] for row in found.rows])
    for name, value in found.summary.items():
        show.say(f"{name}: {_cell(value)}")
    show.warn(found.warnings)
    show.say(f"saved in {out}; the whole table: {out / OWN / studies.FINDINGS}")


def compare(file: Path, seeds: int | None, out: Path | None, keep: Path | None, *, json: bool) -> None:
    """Run a comparison, or the rows of it that are not there yet."""
    asked = comparison.read_comparison(file)
    asked = asked if seeds is None else asked.model_copy(update={"seeds": seeds})
    with Bars() as progress:
        results = comparison.compare(asked, keep, progress)
    rows = [result.model_dump(mode="json") for result in results]
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        put(comparison.markdown(asked, results), out / f"{file.stem}.md")
        write_json(out / f"{file.stem}.json", {"asked": asked.model_dump(mode="json"), "rows": rows})
    if json:
        show.as_json(rows)
        return
    columns = ["method", "budget", "amount", "value", "recovered", "parameters", "nonzeros", "flops", "speed"]
    show.table(asked.model, columns, [[_cell(row[name]) for name in columns] for row in rows if not row["error"]])
    show.warn([f"{row['method']} at {row['budget']} {row['amount']}: {row['error']}" for row in rows if row["error"]])


def _is_plain(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return not any(isinstance(row.get(name), (Mapping, list)) for row in rows)


def _cell(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_cell(one)}" for name, one in value.items())
    return show.figure(value) if isinstance(value, (int, float)) or value is None else str(value)


def _print_plan(plan: Plan, json: bool) -> None:
    if json:
        show.as_json(plan.document() | {"sparsity": plan.sparsity, "table": plan.table()})
        return
    show.layers(plan.table(), repr(plan))
    for entry in plan.provenance:
        asked = entry.budget.get("pattern") or f"{entry.budget['quantity']} {entry.budget['amount']:g}"
        settings = ", ".join(f"{name}={value}" for name, value in entry.settings.items())
        reached = _reached(plan, entry.budget["quantity"])
        show.say(f"{entry.method}: asked {asked}, reached {reached}; seed {entry.seed}; {settings}")
        if entry.data:
            show.say(f"calibrated on {entry.data['samples']} samples of {entry.data['name']} ({entry.data['digest']})")
    show.warn(plan.warnings)


def _reached(plan: Plan, quantity: str) -> str:
    """In what the budget counts, where the plan knows it, and in units."""
    if plan.kinds == (UnitKind.RANK,) and quantity in (Quantity.SPARSITY, Quantity.DENSITY):
        quantity = Quantity.PARAMETERS  # a share of these is what a sparsity of ranks means
    shares = [facts[f"{quantity}_kept"] for facts in plan.facts.values() if f"{quantity}_kept" in facts]
    units = f"{plan.kinds[0].replace('_', ' ')}s" if len(plan.kinds) == 1 else "units"
    said = f"{plan.sparsity:.4%} of the {units} removed"
    return f"{shares[0]:.4g} of the dense {quantity}, {said}" if shares else said


def _print_result(record: Record | None, out: Path, how: str = ", reloaded and compared") -> None:
    if record is None:
        show.say(f"saved in {out}; without data nothing could be measured, so there is no report (add --data)")
        show.say(_loads(out))
        return
    show.table(record.title, ["", "before", "after"], result_rows(record))
    show.warn(record.warnings)
    show.say(f"saved in {out}{how}; report: {out / job.PAGE}")
    show.say(_loads(out))


def _loads(out: Path) -> str:
    """Which runtimes take the folder."""
    card = read_config(out / OWN, CARD)
    return "loads in: " + "; ".join(f"{runtime} ({how})" for runtime, how in card["runtimes"].items())


def result_rows(record: Record) -> list[list[str]]:
    """Headline figures of a record, before and after."""
    found, sizes = record.quality, record.sizes
    rows = [[f"{found.metric} {found.unit}".strip(), show.figure(found.before.value), show.figure(found.after.value)]]
    if found.recovered:
        values = show.figure(found.before.value), show.figure(found.pruned.value)
        rows.insert(0, [f"{found.metric} before recovery", *values])
    named = [("parameters", sizes.parameters), ("non-zeros", sizes.nonzeros), ("FLOPs", sizes.flops)]
    rows += [[name, show.figure(pair.before), show.figure(pair.after)] for name, pair in named if pair]
    for row in record.latency.rows if record.latency else []:
        rows.append([f"latency, {row.label} (ms)", show.figure(row.before.median, 3), show.figure(row.after.median, 3)])
    if sizes.file_bytes:
        rows.append(["file (bytes)", show.figure(sizes.file_bytes.before), show.figure(sizes.file_bytes.after)])
    return rows


def inspect(request: Mapping[str, Any], page: Path | None, depth: int | None, every: bool, json: bool) -> None:
    """What can be removed from a model, as a tree, JSON or a page."""
    view = inspection.inspect(inspection.Inspection(**request))
    if page is not None:
        write_structure(view, page)
    if json:
        show.as_json(view.model_dump(mode="json"))
    else:
        structure.print_structure(view, depth, every)
        if page is not None:
            show.say(f"page: {page}")


def methods(name: str | None, tags: dict[str, str], json: bool) -> None:
    """The catalogue or one entry."""
    found = list(catalogue.select(api.methods(), tags).values()) if name is None else [api.find_method(name)]
    if json:
        show.as_json([entry.to_json() for entry in found])
    elif name is None:
        rows = [[e.name, e.paper, e.kind, ", ".join(sorted(e.tags.speedup)), e.units, e.formula] for e in found]
        show.table("methods", ["name", "paper", "kind", "speed-up", "unit", "rule"], rows)
    else:
        _print_method(found[0].to_json())


def _print_method(entry: dict[str, Any]) -> None:
    show.say(f"{entry['name']}: {entry['title']}\n{entry['citation']} (paper {entry['paper']})\n\n{entry['formula']}\n")
    needs = [word for word in ("data", "labels") if entry[f"needs_{word}"]]
    patterns = "yes" if entry["patterns"] else "no"
    show.say(f"needs: {', '.join(needs) or 'nothing but the weights'}; N:M patterns: {patterns}")
    rows = [[s["name"], s["type"], s["default"], s["help"]] for s in entry["settings"]]
    show.table("settings (--set name=value)", ["name", "type", "default", "meaning"], rows)
    tags = entry["tags"]
    lines = [[axis, ", ".join(tags[axis]) if isinstance(tags[axis], list) else tags[axis]] for axis in axes()]
    show.table("tags", ["axis", "value"], lines)


def show_plan(place: Path, json: bool) -> None:
    """A plan's contents."""
    _print_plan(find_plan(place), json)


def diff(first: Path, second: Path, json: bool) -> None:
    """Two plans side by side."""
    a, b = find_plan(first), find_plan(second)
    rows = a.diff(b)
    if json:
        show.as_json({"first": repr(a), "second": repr(b), "sites": rows})
        return
    names = ("units", "both", "only_first", "only_second")
    shown = [[row["site"], *(f"{row[name]:,}" for name in names), f"{row['overlap']:.2%}"] for row in rows]
    total = {name: sum(row[name] for row in rows) for name in names}
    either = total["units"] and sum(row["both"] + row["only_first"] + row["only_second"] for row in rows)
    overlap = total["both"] / either if either else 1.0
    shown.append(["all", *(f"{total[name]:,}" for name in names), f"{overlap:.2%}"])
    show.table(f"{a!r}  against  {b!r}", ["site", "units", "both", "only first", "only second", "overlap"], shown)


def apply_plan(
    place: Path,
    model: str,
    out: Path,
    other_weights: bool,
    opening: Mapping[str, Any],
    saving: Mapping[str, Any],
    json: bool,
) -> None:
    """A plan on a model, saved."""
    plan = find_plan(place)
    opened = open_model(model, **opening)
    apply_to(opened.model, plan, other_weights)
    save(opened.model, out, plan, source=opened.folder, factory=opened.factory, data=opened.data, **saving)
    kept, total = plan.units()
    if json:
        show.as_json({"out": str(out), "kept": kept, "total": total, "sparsity": plan.sparsity})
    else:
        show.say(f"{plan!r} applied to {model}; saved in {out}")


def bench(
    names: list[str],
    data: str | None,
    batches: tuple[int, ...],
    seconds: float,
    machine: bool,
    opening: Mapping[str, Any],
    seed: int,
    json: bool,
) -> None:
    """Models side by side, and what sparsity brings here."""
    opened = {name: open_model(name, **opening) for name in names}
    first = next(iter(opened.values()))
    source = data or next((entry.data for entry in opened.values() if entry.data), None)
    evaluation = open_data(source, first, seed).evaluation if source else None
    models = {name: entry.model for name, entry in opened.items()}
    with Bars() as progress:
        found = measure_together(models, evaluation, batch_sizes=batches, seconds=seconds, seed=seed, progress=progress)
        facts = probe_machine(device=opening["device"], progress=progress) if machine else None
    if json:
        results = {name: measured.to_json() for name, measured in found.items()}
        show.as_json({"data": source, "models": results, "machine": facts and facts.to_json()})
        return
    _print_bench(found, source)
    for sentence in facts.sentences if facts else ():
        show.say(f"here: {sentence}")


def _print_bench(found: Mapping[str, Measurement], source: str | None) -> None:
    rows = []
    for name, one in found.items():
        quality = f"{one.quality.metric} {one.quality.value:.4g}" if one.quality else "-"
        for size, time in (one.latency or {}).items():
            spread = f"{time.p10:.3g} to {time.p90:.3g}"
            rows.append([name, size, f"{time.median:.3g}", spread, f"{time.throughput:,.0f}", *_costs(one), quality])
        if not one.latency:
            rows.append([name, "-", "-", "-", "-", *_costs(one), quality])
    times = [time for one in found.values() for time in (one.latency or {}).values()]
    note = "no data named, so nothing was run: give --data"
    if times:
        note = (
            f"{times[0].threads} threads, {times[0].dtype}, {times[0].device}; {min(t.repeats for t in times)} or more "
            f"interleaved repeats after {times[0].warmup} warm-up calls; data {source}"
        )
    columns = ["model", "batch", "median ms", "p10 to p90", "samples/s", "parameters", "non-zeros", "FLOPs", "peak MiB"]
    show.table("bench", [*columns, "quality"], rows, note)


def _costs(one: Measurement) -> list[str]:
    peak = one.memory.peak / 2**20 if one.memory and one.memory.peak else None
    return [show.figure(one.parameters), show.figure(one.nonzeros), show.figure(one.flops), show.figure(peak)]


def export_model(
    name: str,
    out: Path,
    data: str | None,
    batch: int,
    seed: int,
    fuse: bool,
    opening: Mapping[str, Any],
    saving: Mapping[str, Any],
    json: bool,
) -> None:
    """A model as one file for another runtime."""
    opened = open_model(name, **opening)
    probe = _probe(opened, data, batch, seed)
    if fuse:
        fuse_(opened.model, probe)
    with Bars() as progress:
        found = export(opened.model, out, probe, progress=progress, **saving)
    if json:
        show.as_json(found.to_json())
        return
    columns = ["file", "bytes", "batch", "largest difference", "torch ms", "runtime ms"]
    figures = (found.difference, found.torch_ms, found.runtime_ms)
    row = [out, show.figure(found.bytes), found.batch_size, *(show.figure(value, 3) for value in figures)]
    show.table(f"{name} as {found.kind}", columns, [row], _export_note(found))


def _probe(opened: OpenedModel, data: str | None, batch: int, seed: int) -> Batch:
    source = data or opened.data
    if source:
        return resized(Batch((open_data(source, opened, seed).calibration.inputs,)), batch)
    made = probe_for(opened.model)
    if made is None:
        raise DataError(f"'{opened.name}' has to be run once to be exported; give samples with --data")
    return resized(made, batch)


def _export_note(found: ExportReport) -> str:
    sizes = "any batch size" if found.dynamic_batch else f"batches of {found.batch_size} only"
    if found.torch_latency is None:
        return f"takes {sizes}; not run (--no-verify)"
    threads, compared = found.torch_latency.threads, ", ".join(map(str, found.compared))
    return f"takes {sizes}; compared on batches of {compared}; {threads} threads, interleaved repeats"


def report(folders: list[Path], out: Path | None, json: bool) -> None:
    """One page about one or several results."""
    records = [Record.load(folder / OWN / job.RECORD) for folder in folders]
    if out is None:
        if len(folders) > 1:
            raise OutputError("several results need a name for their page: --out comparison.html")
        out = folders[0] / job.PAGE
    written = write(records, out)
    if json:
        show.as_json({"report": str(written), "results": [str(folder) for folder in folders]})
    else:
        show.say(f"report: {written}")


def reproduce(name: str, seeds: int, scale: str, out: Path | None, keep: Path | None, json: bool) -> None:
    """A method's claims; exit code 1 if one does not show."""
    if scale not in list(Scale):
        raise UnknownNameError("scale", scale, list(Scale))
    if keep is not None and scale == Scale.SMALL:
        raise SettingsError("--keep is for --scale full; the small scale takes minutes and keeps nothing")
    with Bars() as progress:
        found = run_check(api.find_method(name).name, seeds, progress, scale=Scale(scale), folder=keep)
    if out is not None:
        put(found.to_markdown(), out / f"{found.name}.md")
        put(dumps(found.to_json(), indent=1, sort_keys=True) + "\n", out / f"{found.name}.json")
    if json:
        show.as_json(found.to_json())
    else:
        _print_claims(found)
    if not found.passed:
        raise SystemExit(1)


def _print_claims(found: Report) -> None:
    rows = []
    for claim in found.claims:
        ends = f"{claim.interval[0]:.4g} to {claim.interval[1]:.4g}" if claim.interval else "-"
        verdict = "shows" if claim.passed else "DOES NOT SHOW"
        numbers = (claim.value, claim.baseline, claim.random_control)
        rows.append([claim.quantity, *map(show.figure, numbers), ends, claim.threshold, len(claim.seeds), verdict])
    columns = ["claim", "value", "baseline", "random", "95 % interval", "threshold", "seeds", ""]
    show.table(f"{found.name}: {'passed' if found.passed else 'NOT PASSED'}", columns, rows)


def zoo_list(json: bool) -> None:
    """The shipped models."""
    cards = [zoo.card(name) for name in zoo.names()]
    if json:
        show.as_json(cards)
        return
    rows = [
        [f"zoo:{card['name']}", card["title"], f"zoo:{card['data']}", card["parameters"], _quality(card["quality"])]
        for card in cards
    ]
    show.table("zoo", ["name", "what", "data", "parameters", "quality"], rows)


def _quality(found: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in found.items())


def zoo_build(name: str, out: Path, seed: int, force: bool, json: bool) -> None:
    """A zoo model trained again."""
    with Bars() as progress:
        quality = zoo.build(name, out, seed, progress, force=force)
    if json:
        show.as_json({"out": str(out), "quality": quality})
    else:
        show.say(f"{name} trained again in {out}: {_quality(quality)}")
