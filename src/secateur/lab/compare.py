"""Many methods on one model: same calibration data, same budgets, several seeds, one table; resumable.

A comparison is a YAML file, or the name of one in `lab/comparisons`; model and data may begin with a $VARIABLE:

    model: ./my-llama
    data: wikitext2/?length=256&limit=120
    samples: 64
    dtype: float32
    include: ["model.layers*"]
    rows:
      - {methods: [wanda, sparsegpt, random], sparsity: [0.5, 0.6]}
      - {methods: [cfsp, amp], blocks: [0.2, 0.4]}             # share of the blocks' parameters that goes
      - {methods: [shortgpt], sparsity: [0.2], recover: "finetune:steps=200"}
      - {methods: [greg], flops: [0.5], train: "finetune:steps=100", recover: "finetune:steps=100"}  # acts in training
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from secateur import api, recover
from secateur.core.budget import Budget, Pattern, Quantity
from secateur.core.errors import SecateurError, SettingsError
from secateur.core.method import Batch, Method, Settings
from secateur.core.plan import Plan
from secateur.core.progress import Progress, Silent, track
from secateur.data.dataset import Dataset, Splits
from secateur.io.data import open_data, split_generated
from secateur.io.models import OpenedModel, open_model
from secateur.lab.reproduce import folder_of
from secateur.measure import interval, nonzeros, parameters, quality, quality_interval
from secateur.measure.decoding import can_generate, decoding
from secateur.measure.flops import flops
from secateur.measure.latency import latency
from secateur.recover import Recovery, Request
from secateur.recover.finetune import FinetuneSettings, recipe_of
from secateur.shrink.apply import apply_
from secateur.structure.stacks import main_stack
from secateur.train.loop import Fitting, Recipe
from secateur.train.sparse_fit import fit_sparsely
from secateur.train.sparsifier import Sparsifier
from secateur.train.study import Ledger


class Rows(BaseModel):
    """Methods and budgets, each combined with each."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    methods: tuple[str, ...]
    sparsity: tuple[float, ...] = ()
    pattern: tuple[str, ...] = ()
    parameters: tuple[float, ...] = ()
    flops: tuple[float, ...] = Field((), description="share of the dense model's FLOPs that stays")
    blocks: tuple[float, ...] = Field((), description="share of the parameters inside the blocks that goes")
    settings: dict[str, Any] = Field(default_factory=dict)
    train: str = Field("", description="training in which a method acts that is no one-shot method: finetune:steps=...")
    recover: str = Field("", description="a recovery and its settings; the row is measured before and after it")
    label: str = Field("", description="added to the method's name in the table")
    include: tuple[str, ...] | None = Field(None, description="instead of the comparison's")

    def budgets(self) -> list[tuple[str, float | str]]:
        """(what is counted, amount)."""
        kinds = ("sparsity", "pattern", "parameters", "flops", "blocks")
        return [(kind, amount) for kind in kinds for amount in getattr(self, kind)]


class Comparison(BaseModel):
    """Everything a comparison was asked for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    data: str
    samples: int = 64
    dtype: str | None = None
    include: tuple[str, ...] = ("*",)
    seeds: int = 3
    recovered_seeds: int = Field(1, description="recovery is costly: only the first so many seeds are recovered")
    speed: bool = True
    batches: tuple[int, ...] = Field((1, 128), description="batch sizes at which models that write no text are timed")
    training: int = Field(4096, description="samples to train on")
    rows: tuple[Rows, ...]


def known_comparisons() -> dict[str, Path]:
    """Those that come with the package: name -> file."""
    return {file.stem: file for file in sorted(Path(__file__).with_name("comparisons").glob("*.yaml"))}


def read_comparison(file: Path) -> Comparison:
    """A comparison from its YAML file or by its name; relative paths in it are relative to the current folder.

    Raises:
        SettingsError: it cannot be read, or a field is wrong; names it.
    """
    known = known_comparisons()
    if not file.exists() and str(file) not in known:
        raise SettingsError(f"there is no file '{file}', and no comparison of that name: {', '.join(known)}")
    file = file if file.exists() else known[str(file)]
    try:
        return Comparison(**yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, TypeError) as error:
        raise SettingsError(f"'{file}' is no comparison: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise SettingsError(f"'{file}', field '{place}': {first['msg']}") from None


def located(text: str) -> str:
    """A path with the folder in place of its variable: `$SECATEUR_DATA/wikitext2?length=256`.

    Raises:
        DataError: the variable names no folder with such a thing.
    """
    if not text.startswith("$"):
        return text
    variable, _, rest = text[1:].partition("/")
    name, mark, options = rest.partition("?")
    return f"{folder_of(variable, name)}{mark}{options}"


class Result(BaseModel):
    """One row of the table: means over the seeds.

    Attributes:
        method, budget, amount: what was asked for.
        value: of the metric; one per seed in `values`, `interval` over the seeds (Student's t).
        sampling: interval over the evaluation's samples, of the first seed.
        parameters, nonzeros: what is left.
        flops: left, of the dense model's, of models that write no text; a method that stops early leaves more.
        speed: what -> speed over the dense model's, measured side by side; empty where shapes are the dense ones.
        milliseconds: batch size -> median time of a batch, of models that write no text.
        recovered: the metric after the row's recovery, over the recovered seeds; `recovered_interval` likewise.
        error: why there is no result.
    """

    method: str
    budget: str
    amount: float | str
    value: float | None = None
    values: list[float] = Field(default_factory=list)
    interval: tuple[float, float] | None = None
    sampling: tuple[float, float] | None = None
    parameters: int | None = None
    nonzeros: int | None = None
    flops: float | None = None
    speed: dict[str, float] = Field(default_factory=dict)
    milliseconds: dict[str, float] = Field(default_factory=dict)
    recovered: float | None = None
    recovered_interval: tuple[float, float] | None = None
    error: str | None = None


def compare(asked: Comparison, keep: Path | None = None, progress: Progress | None = None) -> list[Result]:
    """Run every row with every seed; what is in `keep` is not run again.

    Returns:
        The dense model's row first, then one for every method and budget. A row whose method refuses its budget
        says so instead of stopping the others.
    """
    progress = progress or Silent()
    for rows in asked.rows:
        for name in rows.methods:
            _check(api.find_method(name), rows)
        _recovery_of(rows.recover)
    bench = Bench(asked, Ledger(keep, asked.model_dump(mode="json", exclude={"rows", "seeds"})), progress)
    cases = [(rows, name, *budget) for rows in asked.rows for name in rows.methods for budget in rows.budgets()]
    for rows in asked.rows:
        bench.check(rows)
    results = [bench.dense()]
    for rows, name, kind, amount in track(cases, progress, "comparison"):
        results.append(bench.row(rows, name, kind, amount))
    return results


def _check(entry: Method, rows: Rows) -> None:
    """Refuse before any work what a row cannot do."""
    entry.configure(rows.settings)
    if rows.train:
        if entry.parts is None:
            raise SettingsError(f"{entry.name} does not act during training; leave `train` out of its row")
        _training_of(rows.train)
    elif entry.run is None:
        raise SettingsError(f"{entry.name} is no one-shot method; give its row a training: train: finetune:steps=100")


class Bench:
    """The model, opened once; its data, drawn once a seed."""

    def __init__(self, asked: Comparison, ledger: Ledger, progress: Progress):
        self.asked, self.ledger, self.progress = asked, ledger, progress
        self.source = located(asked.model)
        self.opened: OpenedModel = open_model(self.source, dtype=asked.dtype)
        self.data = located(asked.data)
        self._splits: dict[int, Splits] = {}

    def splits(self, seed: int) -> Splits:
        """Calibration drawn by the seed; the evaluation is always the same."""
        if seed not in self._splits:
            self._splits[seed] = open_data(self.data, self.opened, seed, self.asked.samples)
        return self._splits[seed]

    def check(self, rows: Rows) -> None:
        """Refuse before any work a recovery that cannot work."""
        if recovery := _recovery_of(rows.recover):
            for name in rows.methods:
                data = self.splits(0).calibration
                recovery[0].refuse(self.opened.model, data, api.find_method(name).units)

    def dense(self) -> Result:
        """The unpruned model."""
        found = self.ledger.once("dense", lambda: self._measured(self.opened.model))
        return Result(
            method="dense",
            budget="sparsity",
            amount=0.0,
            value=found["value"],
            values=[found["value"]],
            sampling=tuple(found["sampling"]) if found["sampling"] else None,
            parameters=found["parameters"],
            nonzeros=found["nonzeros"],
        )

    def row(self, rows: Rows, name: str, kind: str, amount: float | str) -> Result:
        """One method at one budget."""
        shown = f"{name} {rows.label}".strip()
        found = [self.result(rows, name, kind, amount, seed) for seed in range(self.asked.seeds)]
        error = next((one["error"] for one in found if one.get("error")), None)
        if error is not None:
            return Result(method=shown, budget=kind, amount=amount, error=error)
        values = [one["value"] for one in found]
        ends = interval(values)
        recovered = [one["recovered"] for one in found if one.get("recovered") is not None]
        first = found[0]
        return Result(
            method=shown,
            budget=kind,
            amount=amount,
            value=mean(values),
            values=values,
            interval=(ends.low, ends.high) if ends else None,
            sampling=tuple(first["sampling"]) if first["sampling"] else None,
            parameters=round(mean(one["parameters"] for one in found)),
            nonzeros=round(mean(one["nonzeros"] for one in found)),
            flops=mean(counted) if (counted := [one["flops"] for one in found if "flops" in one]) else None,
            speed={name: first[name] for name in self.speeds if name in first},
            milliseconds=first.get("milliseconds", {}),
            recovered=mean(recovered) if recovered else None,
            recovered_interval=(found_ends.low, found_ends.high) if (found_ends := interval(recovered)) else None,
        )

    def result(self, rows: Rows, name: str, kind: str, amount: float | str, seed: int) -> dict[str, Any]:
        """One method at one budget under one seed: `value`, `parameters` ... or `error`; run once."""
        key = "-".join([f"{name} {rows.label}".strip(), kind, str(amount), str(seed), _digest(rows)])
        key = key.replace("/", "_").replace(" ", "_").replace(":", "_")
        found: dict[str, Any] = self.ledger.once(key, lambda: self._run(rows, name, kind, amount, seed))
        return found

    def _run(self, rows: Rows, name: str, kind: str, amount: float | str, seed: int) -> dict[str, Any]:
        """Prune a copy and measure it; what a method refuses becomes the row's result."""
        model = copy.deepcopy(self.opened.model)
        try:
            plan = self._plan(model, rows, name, self._budget(kind, amount), seed)
            apply_(model, plan)
        except SecateurError as error:
            return {"error": str(error)}
        found = self._measured(model)
        if self.asked.speed and parameters(model) < parameters(self.opened.model):
            found |= self._flops(model)
            found |= self._speed(model) if seed == 0 else {}
        recovery = _recovery_of(rows.recover)
        if recovery is not None and seed < self.asked.recovered_seeds:
            way, settings = recovery
            request = Request(model, plan, self._training(seed), seed, self.progress, self.opened.model)
            way.run(request, settings)
            found["recovered"] = self._measured(model)["value"]
        return found

    def _plan(self, model: nn.Module, rows: Rows, name: str, budget: Budget, seed: int) -> Plan:
        """The method's decision: in one shot, or at the end of the row's training, which changes the model."""
        include = rows.include or self.asked.include
        if not rows.train:
            return api.plan(
                model,
                name,
                budget=budget,
                data=self.splits(seed).calibration,
                seed=seed,
                include=include,
                source=self.source,
                **rows.settings,
            )
        fit = Fitting(self._training(seed), _training_of(rows.train), seed=seed, progress=self.progress)
        attached: list[Sparsifier] = []

        def attach(model: nn.Module, optimizer: torch.optim.Optimizer) -> Sparsifier:
            own: dict[str, Any] = {"budget": budget, "seed": seed, "include": include, **rows.settings}
            attached.append(api.sparsify(model, optimizer, name, steps=fit.steps, example=fit.data, **own))
            return attached[0]

        fit_sparsely(fit, model, attach)
        return attached[0].finish()

    def _training(self, seed: int) -> Dataset:
        """What is trained on: another draw for each seed."""
        return open_data(split_generated(self.data)[0], self.opened, seed, self.asked.training).calibration

    @cached_property
    def speeds(self) -> tuple[str, ...]:
        """What is timed: reading and writing text, or batches."""
        text = can_generate(self.opened.model)
        return ("prefill", "decode") if text else tuple(f"batch {size}" for size in self.asked.batches)

    def _speed(self, model: nn.Module) -> dict[str, Any]:
        """Speed over the dense model's; for models that write no text milliseconds too."""
        dense = self.opened.model
        if can_generate(model):
            times = decoding({"dense": dense, "pruned": model}, progress=self.progress)
            return {name: getattr(times["pruned"], name) / getattr(times["dense"], name) for name in self.speeds}
        found: dict[str, Any] = {"milliseconds": {}}
        for name, size in zip(self.speeds, self.asked.batches, strict=True):
            batch = self._inputs(size)
            medians = latency({"dense": (dense, batch), "pruned": (model, batch)}, progress=self.progress)
            found[name] = medians["dense"].median / medians["pruned"].median
            found["milliseconds"][name] = medians["pruned"].median
        return found

    def _flops(self, model: nn.Module) -> dict[str, float]:
        if can_generate(model):
            return {}
        one = self._inputs(1)
        return {"flops": flops(model, one) / flops(self.opened.model, one)}

    def _inputs(self, size: int) -> Batch:
        batch = next(iter(self.splits(0).evaluation.batches(size)))
        return Batch(batch.args, batch.kwargs)

    def _measured(self, model: nn.Module) -> dict[str, Any]:
        found = quality(model, self.splits(0).evaluation, progress=self.progress)
        ends = quality_interval(found)
        return {
            "value": found.value,
            "sampling": [ends.low, ends.high] if ends else None,
            "parameters": parameters(model),
            "nonzeros": nonzeros(model),
        }

    def _budget(self, kind: str, amount: float | str) -> Budget:
        if kind == "pattern":
            return Budget.nm(Pattern.parse(str(amount)))
        number = float(amount)
        if kind in ("parameters", "flops"):
            return Budget(number, Quantity(kind))
        if kind == "blocks":
            stack = main_stack(self.opened.model)
            inside = sum(p.numel() for block in stack.blocks for p in block.parameters())
            return Budget(1 - number * inside / parameters(self.opened.model), Quantity.PARAMETERS)
        return Budget(number)


def _digest(rows: Rows) -> str:
    """What else a row's results depend on, in a few letters."""
    text = json.dumps([rows.settings, rows.recover, rows.include, rows.train], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


def _training_of(said: str) -> Recipe:
    _, settings = recover.in_words(said)
    if not isinstance(settings, FinetuneSettings):
        raise SettingsError(f"train: '{said}' is no training; write finetune:steps=100")
    return recipe_of(settings)


def _recovery_of(said: str) -> tuple[Recovery, Settings] | None:
    return recover.in_words(said) if said else None


def markdown(asked: Comparison, results: list[Result]) -> str:
    """The table as a page."""
    speeds = list(dict.fromkeys(name for one in results for name in one.speed))
    columns = ["method", "budget", "metric", "over seeds", "over samples", "after recovery", "over seeds"]
    columns += ["parameters", "non-zeros", "FLOPs", *speeds]
    lines = [
        f"# {asked.model}",
        "",
        f"Data {asked.data}, {asked.samples} calibration samples, {asked.seeds} seeds of calibration; mean over the "
        "seeds, Student's t interval (95 %) over the seeds, bootstrap interval over the evaluation's samples (first "
        "seed). Speed is relative to the dense model, measured side by side in one process.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    return "\n".join([*lines, *(_line(one, speeds) for one in results)]) + "\n"


def _line(one: Result, speeds: Sequence[str]) -> str:
    amount = one.amount if isinstance(one.amount, str) else f"{one.amount:g}"
    if one.error is not None:
        return f"| {one.method} | {one.budget} {amount} | refused: {one.error} {'| ' * (7 + len(speeds))}|"
    cells = [one.method, f"{one.budget} {amount}", _number(one.value), _ends(one.interval), _ends(one.sampling)]
    cells += [
        _number(one.recovered),
        _ends(one.recovered_interval),
        f"{one.parameters:,}",
        f"{one.nonzeros:,}",
        _number(one.flops),
        *(_times(one.speed.get(name), one.milliseconds.get(name)) for name in speeds),
    ]
    return f"| {' | '.join(cells)} |"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _ends(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.4g} to {ends[1]:.4g}"


def _times(value: float | None, milliseconds: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.2f}x" + ("" if milliseconds is None else f" ({milliseconds:.3g} ms)")
