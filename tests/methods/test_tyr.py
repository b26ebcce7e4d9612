"""Tyr-the-Pruner: budgets that the search keeps, its facts, resumption, key/value groups, and the paper's traps."""

from __future__ import annotations

import copy
from collections import defaultdict
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import secateur as sc
from secateur import zoo
from secateur.core.budget import Budget, Quantity
from secateur.core.errors import BudgetError, SettingsError
from secateur.core.journal import Journal
from secateur.core.method import Decision, Task
from secateur.core.plan import Plan
from secateur.data.batches import forward
from secateur.data.dataset import Splits
from secateur.methods.llm import tyr
from secateur.shrink import supernet as supernets
from secateur.shrink.ladder import shared_out
from secateur.shrink.structured import begin
from secateur.shrink.supernet import Supernet
from secateur.structure.readers import readers

LAYERS = ("model.layers.*",)
SMALL: dict[str, Any] = {
    "kinds": "head,neuron",
    "generations": 2,
    "offspring": 5,
    "tokens": "96,384",
    "survivors": "3,1",
    "iterations": 2,
    "levels": 3,
}


@cache
def data(model: str = "pydoc-llama") -> Splits:
    return zoo.load_data(zoo.get(model).data, samples=8)


def planned(model: str = "pydoc-llama", sparsity: float = 0.5, **settings: Any) -> Plan:
    return sc.plan(
        zoo.load_model(model),
        "tyr",
        data=data(model).calibration,
        sparsity=sparsity,
        include=LAYERS,
        **{**SMALL, **settings},
    )


@cache
def usual() -> Plan:
    return planned()


def removed(plan: Plan) -> dict[str, int]:
    """By kind of unit."""
    found: dict[str, int] = defaultdict(int)
    for name, site in plan.sites.items():
        found[site.kind.value] += int((~plan.masks[name]).sum())
    return dict(found)


class TestBudget:
    @pytest.mark.parametrize("sparsity", [0.125, 0.5])
    def test_shares_of_heads_and_neurons_stay_what_was_asked(self, sparsity: float) -> None:
        plan = planned(sparsity=sparsity)
        assert removed(plan) == {"head": 16 * sparsity, "neuron": 1024 * sparsity}
        assert not plan.warnings

    def test_sites_differ_and_each_keeps_a_unit(self) -> None:
        counts = {plan_site: usual().kept(plan_site) for plan_site in usual().sites}
        assert len({count for name, count in counts.items() if name.endswith("neuron")}) > 1
        assert min(counts.values()) >= 1

    def test_nearly_everything_leaves_one_unit_in_every_site(self) -> None:
        plan = planned(sparsity=0.9, iterations=1)
        assert min(plan.kept(name) for name in plan.sites) >= 1
        assert sum(removed(plan).values()) == 936
        assert removed(plan)["head"] == 12
        assert any("12 of 16 units of kind head went where 14 were asked for" in one for one in plan.warnings)

    def test_parameters_as_budget(self) -> None:
        model = zoo.load_model("pydoc-llama")
        whole = sum(p.numel() for p in model.parameters())
        budget = Budget(0.6 * whole, Quantity.PARAMETERS)
        plan = sc.plan(
            model, "tyr", budget=budget, data=data().calibration, include=LAYERS, **{**SMALL, "iterations": 1}
        )
        sc.apply_(model, plan)
        kept = sum(p.numel() for p in model.parameters())
        assert 0.57 * whole < kept <= 0.6 * whole
        assert plan.facts["search"]["parameters"] == kept

    def test_widths_in_multiples(self) -> None:
        plan = planned(multiple=16, least_neurons=1)
        kept = [plan.kept(name) for name in plan.sites if name.endswith("neuron")]
        assert {count % 16 for count in kept} == {0}
        assert sum(kept) == 512

    @given(st.integers(0, 1040), st.integers(0, 2))
    def test_shared_out_is_exact_and_above_floors(self, total: int, least: int) -> None:
        whole, floors = {"heads": 16, "neurons": 1024}, {"heads": 4 * least, "neurons": 4}
        if total < sum(floors.values()):
            with pytest.raises(BudgetError, match="the highest sparsity is"):
                shared_out(whole, floors, total)
            return
        found = shared_out(whole, floors, total)
        assert sum(found.values()) == total
        assert all(floors[kind] <= found[kind] <= whole[kind] for kind in whole)
        assert (
            abs(found["heads"] - total * 16 / 1040) <= 1
            or found["heads"] == floors["heads"]
            or (found["neurons"] == floors["neurons"])
        )


class TestResult:
    def test_cut_model_is_the_candidate_that_was_found(self) -> None:
        """Zero columns in o_proj and down_proj are the removal of the units that they read."""
        plan, model = usual(), zoo.load_model("pydoc-llama").eval()
        batch = next(data().evaluation.batches(4))
        reconstructed = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in plan.weights.items():
                reconstructed.get_parameter(name).copy_(value)
            zeroed = forward(reconstructed, batch)
            cut = sc.apply_(copy.deepcopy(model), plan)
            torch.testing.assert_close(forward(cut, batch), zeroed, rtol=1e-3, atol=1e-3)
            assert not torch.allclose(forward(model, batch), zeroed, atol=0.1)
        assert set(plan.weights) == {
            f"model.layers.{i}.{name}.weight" for i in range(4) for name in ("self_attn.o_proj", "mlp.down_proj")
        }
        assert sum(p.numel() for p in cut.parameters()) == plan.facts["search"]["parameters"]

    def test_facts(self) -> None:
        facts = usual().facts
        search = facts["search"]
        assert [f"fitness_{i}_{g}" in search for i in (1, 2) for g in (1, 2)] == [True] * 4
        assert search["candidates_1"] == 2 * (5 + 3 + 1)
        assert search["supernet_bytes_1"] > 5e5
        site = facts["model.layers.1.mlp.gate_proj:neuron"]
        assert 0 < site["error"] < 1
        assert site["levels_1"] == site["levels_2"] == 3
        assert facts["model.layers.1.self_attn:head"]["levels_1"] == 3

    def test_weights_are_solved_for_not_only_zeroed(self) -> None:
        plan, dense = usual(), zoo.load_model("pydoc-llama")
        for name, value in plan.weights.items():
            kept = value.abs().sum(0) > 0
            assert not torch.allclose(value[:, kept], dense.get_parameter(name).detach()[:, kept], atol=1e-3), name

    def test_same_seed_same_plan_other_seed_another_search(self) -> None:
        again, other = planned(), planned(seed=5, iterations=1)
        assert again.facts == usual().facts
        assert all(torch.equal(again.weights[name], value) for name, value in usual().weights.items())
        assert other.facts["search"] != usual().facts["search"]


class TestKeyValueGroups:
    def test_groups_go_whole(self) -> None:
        model = zoo.load_model("pydoc-llama-gqa")
        plan = sc.plan(model, "tyr", data=data().calibration, sparsity=0.5, include=LAYERS,
                       **{**SMALL, "kinds": "auto", "iterations": 1})  # fmt: skip
        assert removed(plan) == {"kv_group": 4, "neuron": 512}
        for name, site in plan.sites.items():
            if site.kind.value == "kv_group":
                weight = plan.weights[f"{name.partition(':')[0]}.o_proj.weight"]
                used = weight.view(96, 2, 48).abs().sum((0, 2)) > 0
                assert torch.equal(used, plan.masks[name])
        dense = sum(p.numel() for p in model.parameters())
        sc.apply_(model, plan)
        # a group: two query heads, a key and a value head of 24 rows, and 48 columns of o_proj; 96 wide
        assert dense - sum(p.numel() for p in model.parameters()) == 4 * 96 * (48 + 24 + 24 + 48) + 512 * 3 * 96


class TestResume:
    def run(self, folder: Path | None) -> Decision:
        model = zoo.load_model("pydoc-llama").eval()
        task = Task(model, Budget(0.5), list(data().calibration.batches(4)), include=LAYERS, journal=Journal(folder))
        with torch.no_grad():
            return tyr.plan(task, tyr.method.configure(SMALL))  # type: ignore[arg-type]

    @pytest.mark.parametrize("deaths", [[9], [2, 4, 1, 6, 1]])
    def test_killed_at_any_time_ends_the_same(
        self, deaths: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It dies after that many blocks walked, stages compared or answers given; some runs die several times."""
        whole = self.run(None)

        class KilledError(Exception):
            pass

        left = [0]

        def mortal(function: Any) -> Any:
            def wrapped(*args: Any, **kwargs: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise KilledError
                return function(*args, **kwargs)

            return wrapped

        monkeypatch.setattr(Supernet, "_block", mortal(Supernet._block))
        monkeypatch.setattr(tyr.Comparison, "fitness", mortal(tyr.Comparison.fitness))
        for after in deaths:
            left[0] = after
            with pytest.raises(KilledError):
                self.run(tmp_path)
        left[0] = -1
        resumed = self.run(tmp_path)
        assert resumed.facts == whole.facts
        assert all(torch.equal(resumed.weights[name], value) for name, value in whole.weights.items())
        assert all(torch.equal(resumed.masks[name], value) for name, value in whole.masks.items())
        assert not list(tmp_path.glob("tyr-bank-*"))

    def test_a_finished_run_is_only_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        first = self.run(tmp_path)
        monkeypatch.setattr(tyr.Supernet, "build", None)
        assert self.run(tmp_path).facts == first.facts

    def test_on_disk_without_a_work_folder(self, monkeypatch: pytest.MonkeyPatch) -> None:
        folders = []
        original = supernets.LevelBank.write

        def watched(bank: Any, *args: Any) -> None:
            folders.append(bank.folder)
            original(bank, *args)

        monkeypatch.setattr(supernets.LevelBank, "write", watched)
        plan = planned(on_disk=True)
        assert all(folder is not None and not folder.exists() for folder in folders)
        assert plan.facts == usual().facts


class TestTraps:
    def test_candidates_of_a_stage_share_their_tokens_and_stages_do_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        drawn, compared = [], []
        original = tyr.Samples.draw

        def draw(self: Any, size: int, rng: torch.Generator) -> Any:
            drawn.append(original(self, size, rng))
            return drawn[-1]

        fitness = tyr.Comparison.fitness

        def counted(self: Any, candidates: Any, assemble: Any) -> Any:
            compared.append((self.minibatch, len(candidates)))
            return fitness(self, candidates, assemble)

        monkeypatch.setattr(tyr.Samples, "draw", draw)
        monkeypatch.setattr(tyr.Comparison, "fitness", counted)
        planned(iterations=1, tokens="192,384")
        assert [minibatch for minibatch, _ in compared] == drawn
        assert [count for _, count in compared] == [5, 4] * 2
        tokens = [sum(batch.args[0].numel() for batch in minibatch.batches) for minibatch in drawn]
        assert tokens == [192, 384] * 2
        assert len({str(minibatch.samples) for minibatch in drawn}) == 4
        first = [[index for group in minibatch.samples for index in group][:2] for minibatch in drawn]
        assert first[0] != first[1]  # not the same order, taken further
        assert first[2] != first[3]

    def test_the_dense_model_is_asked_before_anything_is_pruned(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[Tensor] = []
        original = tyr.Teacher.ask

        def ask(self: Any, model: nn.Module, *rest: Any) -> None:
            asked.append(model.get_parameter("model.layers.2.mlp.down_proj.weight").detach().clone())
            original(self, model, *rest)

        monkeypatch.setattr(tyr.Teacher, "ask", ask)
        planned(iterations=1)
        assert [torch.equal(one, zoo.load_model("pydoc-llama").get_parameter("model.layers.2.mlp.down_proj.weight"))
                for one in asked] == [True]  # fmt: skip

    def test_levels_get_finer(self) -> None:
        steps = []
        model = zoo.load_model("pydoc-llama").eval()
        work = begin(
            Task(model, Budget(0.5), list(data().calibration.batches(4)), include=LAYERS),
            tyr.method.configure({"kinds": "head,neuron"}),  # type: ignore[arg-type]
        )
        for least in (1, 32):
            settings = tyr.method.configure({"kinds": "head,neuron", "least_neurons": least})
            run = tyr._Tyr(work, settings)  # type: ignore[arg-type]
            places = {place.reader.site.kind.value: place for place in run.places}
            steps.append(
                [[run._step(places[kind], iteration) for iteration in range(4)] for kind in ("neuron", "head")]
            )
        assert steps == [[[32, 16, 8, 4], [1, 1, 1, 1]], [[32, 32, 32, 32], [1, 1, 1, 1]]]

    def test_every_iteration_starts_from_dense_weights(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[Tensor] = []
        original = Supernet._pruned

        def pruned(self: Any, place: Any, kept: Any, stat: Any) -> Any:
            if place.reader.layer == "model.layers.3.mlp.down_proj.weight":
                seen.append(place.layer.matrix.clone())
            return original(self, place, kept, stat)

        monkeypatch.setattr(Supernet, "_pruned", pruned)
        planned()
        dense = zoo.load_model("pydoc-llama").get_parameter("model.layers.3.mlp.down_proj.weight")
        assert [torch.equal(one, dense) for one in seen] == [True, True]


class TestOptions:
    @pytest.mark.parametrize(
        "settings",
        [{"fitness": "kl"}, {"fitness": "ppl"}, {"topk": 20}, {"alpha": 0.1}, {"accumulation": "none"},
         {"accumulation": "level0"}, {"largest_total": 2}],
    )  # fmt: skip
    def test_each_changes_what_is_found(self, settings: dict[str, Any]) -> None:
        plan = planned(**settings, iterations=1)
        first = {key: value for key, value in usual().facts["search"].items() if key.startswith("fitness_1")}
        assert {key: plan.facts["search"][key] for key in first} != first or settings == {"fitness": "kl"}
        assert removed(plan) == {"head": 8, "neuron": 512}
        if "largest_total" in settings:
            assert sum(abs(facts.get("level_1", 0)) for facts in plan.facts.values()) <= 2

    def test_reference_is_the_released_saliency_and_rounds(self) -> None:
        settings = tyr.TyrSettings(reference=True)
        assert (settings.local.saliency, settings.local.heads.rounds, settings.local.neurons.rounds) == ("code", 1, 16)
        mine, released = planned(generations=0, iterations=1), planned(reference=True, generations=0, iterations=1)
        assert any(not torch.equal(mine.masks[name], released.masks[name]) for name in mine.masks)

    def test_no_generations_is_the_same_everywhere(self) -> None:
        plan = planned(generations=0)
        assert {plan.kept(name) for name in plan.sites} == {2, 128}


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "sentence"),
        [
            ({"tokens": "5", "survivors": "2,1"}, "must be as many numbers"),
            ({"survivors": "0,1"}, "all of them 1 or more"),
            ({"layout": "uniform"}, "layout has no meaning here"),
            ({"shares": "model.layers.0.mlp=0.1"}, "shares has no meaning here"),
            ({"steps": 2}, "steps has no meaning here"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], sentence: str) -> None:
        with pytest.raises(SettingsError, match=sentence):
            planned(**settings)

    def test_milliseconds(self) -> None:
        budget = Budget(0.5, Quantity.MILLISECONDS)
        with pytest.raises(SettingsError, match="milliseconds"):
            sc.plan(zoo.load_model("pydoc-llama"), "tyr", data=data().calibration, budget=budget, include=LAYERS)

    def test_streamed_models(self) -> None:
        class Elsewhere:
            device = torch.device("cpu")

        task = Task(zoo.load_model("pydoc-llama"), Budget(0.5), residency=Elsewhere())  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match="needs the model in memory"):
            tyr.plan(task, tyr.TyrSettings())


def test_every_site_has_one_reader_inside_a_block() -> None:
    model = zoo.load_model("pydoc-llama").eval()
    work = begin(Task(model, Budget(0.5), include=LAYERS), tyr.TyrSettings())
    places = supernets.places_of(model, readers(model, work.sites))
    assert [place.reader.module.rpartition(".")[2] for place in places] == ["o_proj", "down_proj"] * 4
