"""Reproduction checks: they pass for the methods, fail when they should, and say everything in JSON."""

import json
import math
import sys

import pytest

from secateur import api
from secateur.cli import main
from secateur.core.errors import DataError, SettingsError, UnknownNameError
from secateur.core.method import Protocol
from secateur.lab import reproduce
from secateur.lab.reproduce import Check, Expectation, FullCheck, Sample, Scale, find_check, known_checks, run_check
from secateur.measure import interval

TRAINED = {name for name, method in api.methods().items() if method.kind is not Protocol.PLAN}
SLOW = {
    "adapt_pruner",
    "amp",
    "cfsp",
    "channel_norm",
    "comp",
    "eep",
    "flap",
    "fpgm",
    "gblm",
    "global_magnitude",
    "grasp",
    "group_taylor",
    "hrank",
    "layer_limits",
    "layer_lottery",
    "llm_pruner",
    "maw",
    "random",
    "rd",
    "slicegpt",
    "snip",
    "sparsegpt",
    "svd",
    "synflow",
    "tyr",
    "wanda",
} | TRAINED  # `make slow` has all; these train networks
FIELDS = {"quantity", "baseline", "random_control", "value", "interval", "threshold", "seeds", "passed"}


def test_every_method_has_a_check():
    assert set(known_checks()) == set(api.methods())


@pytest.mark.parametrize("name", sorted(set(known_checks()) - SLOW))
def test_the_method_s_claims_show_for_one_seed(name):
    found = run_check(name, seeds=1)
    failed = [(claim.quantity, claim.value, claim.threshold) for claim in found.claims if not claim.passed]
    assert not failed
    assert found.passed
    assert [claim.quantity for claim in found.claims] == [e.quantity for e in find_check(name).claims.values()]
    for claim in found.claims:
        assert math.isfinite(claim.value)
        assert claim.interval is None  # one seed has none
        assert claim.seeds == [0]


@pytest.mark.slow
@pytest.mark.parametrize("name", known_checks())
def test_the_method_s_claims_show_for_three_seeds(name):
    assert run_check(name, seeds=3).passed


def fake(monkeypatch, expectation, *samples, calls=None):
    """Let `find_check` find a check of one claim with one sample a seed."""

    def run(seed, progress):
        if calls is not None:
            calls.append(seed)
        return {"claim": samples[seed]}

    monkeypatch.setattr(reproduce, "find_check", lambda name: Check({"claim": expectation}, run))
    return run_check("wanda", seeds=len(samples))


BELOW = "< 1"
CASES = {  # control, threshold, value, baseline, random -> passed
    "shows": ("both", BELOW, 0.5, 2, 3, True),
    "method misses": ("both", BELOW, 1.5, 2, 3, False),
    "method on the threshold": ("both", BELOW, 1, 2, 3, False),
    "on a threshold that includes it": ("both", "<= 1", 1, 2, 3, True),
    "baseline meets it too": ("both", BELOW, 0.5, 0.9, 3, False),
    "random meets it too": ("both", BELOW, 0.5, 2, 0.9, False),
    "random alone counts": ("random", BELOW, 0.5, 0.9, 3, True),
    "and it meets it": ("random", BELOW, 0.5, 2, 0.9, False),
    "baseline alone counts": ("baseline", BELOW, 0.5, 2, 0.9, True),
    "and the baseline meets it": ("baseline", BELOW, 0.5, 0.9, 3, False),
    "larger is better": ("both", ">= 5", 5, 4.9, 0, True),
    "larger than": ("both", "> 5", 5, 4.9, 0, False),
    "exactly": ("both", "== 0", 0, 1, 7, True),
    "not exactly": ("both", "== 0", 1e-9, 1, 7, False),
    "no number": ("both", BELOW, math.nan, 2, 3, False),
    "infinite control": ("both", BELOW, 0.5, 2, math.inf, True),
    "control without a number": ("both", BELOW, 0.5, math.nan, 3, False),
}


@pytest.mark.parametrize("case", CASES)
def test_a_claim_needs_the_method_to_meet_it_and_the_control_not_to(monkeypatch, case):
    control, threshold, value, baseline, random, passed = CASES[case]
    found = fake(monkeypatch, Expectation("a number", threshold, control), Sample(value, baseline, random))
    assert found.passed is passed
    assert found.claims[0].passed is passed


def test_random_is_the_control_unless_said_otherwise():
    assert Expectation("a number", BELOW).control == "random"


def test_one_failed_claim_fails_the_report(monkeypatch):
    claims = {"good": Expectation("good", BELOW), "bad": Expectation("bad", BELOW)}
    samples = {"good": Sample(0, 2, 2), "bad": Sample(2, 2, 2)}
    monkeypatch.setattr(reproduce, "find_check", lambda name: Check(claims, lambda seed, progress: samples))
    found = run_check("wanda", seeds=1)
    assert [claim.passed for claim in found.claims] == [True, False]
    assert not found.passed


def test_means_and_the_interval_are_over_the_seeds(monkeypatch):
    calls = []
    samples = [Sample(0.25, 2, 10), Sample(0.5, 3, 20), Sample(1.5, 4, 60)]  # the last alone would fail
    found = fake(monkeypatch, Expectation("a number", BELOW, "both"), *samples, calls=calls)
    (claim,) = found.claims
    assert calls == claim.seeds == [0, 1, 2]
    assert (claim.value, claim.baseline, claim.random_control) == (0.75, 3, 30)
    assert claim.values == [0.25, 0.5, 1.5]
    expected = interval([0.25, 0.5, 1.5])
    assert claim.interval == (expected.low, expected.high)
    assert claim.interval[0] < 0.75 < claim.interval[1]
    assert found.passed


def test_unknown_checks_get_a_hint():
    with pytest.raises(UnknownNameError, match="did you mean wanda"):
        find_check("wando")


def command(monkeypatch, capsys, *words):
    """Exit code and stdout of the command line."""
    monkeypatch.setattr(sys, "argv", ["secateur", "reproduce", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code, capsys.readouterr()


@pytest.mark.parametrize(("value", "code"), [(0.5, 0), (1.5, 1)])
def test_the_command_s_exit_code_and_json(monkeypatch, capsys, value, code):
    check = Check(
        {"claim": Expectation("a number", BELOW, "both")}, lambda seed, progress: {"claim": Sample(value + seed, 8, 9)}
    )
    monkeypatch.setattr(reproduce, "find_check", lambda name: check)
    found, said = command(monkeypatch, capsys, "wanda", "--seeds", "1", "--json")
    assert found == code
    document = json.loads(said.out)
    assert document["name"] == "wanda"
    assert document["passed"] is (code == 0)
    (claim,) = document["claims"]
    assert claim.keys() >= FIELDS
    assert (claim["quantity"], claim["value"], claim["baseline"]) == ("a number", value, 8)
    assert (claim["random_control"], claim["threshold"], claim["seeds"]) == (9, BELOW, [0])
    assert claim["interval"] is None
    assert claim["passed"] is (code == 0)
    found, said = command(monkeypatch, capsys, "wanda", "--seeds", "1")
    assert found == code
    assert ("DOES NOT SHOW" in said.out) is (code == 1)


def test_the_command_takes_hyphens_and_refuses_unknown_names(monkeypatch, capsys):
    seen = []

    def find(name):
        seen.append(name)
        return Check({"claim": Expectation("a number", BELOW)}, lambda seed, progress: {"claim": Sample(0, 2, 2)})

    monkeypatch.setattr(reproduce, "find_check", find)
    code, said = command(monkeypatch, capsys, "global-magnitude", "--seeds", "2", "--json")
    assert code == 0
    assert seen == ["global_magnitude"]
    document = json.loads(said.out)
    assert document["claims"][0]["seeds"] == [0, 1]
    assert document["claims"][0]["interval"] == [0, 0]
    code, said = command(monkeypatch, capsys, "wandaa", "--json")
    assert code == 2
    assert "did you mean wanda" in said.err
    assert not said.out


# --- full scale -----------------------------------------------------------------------------------


class Large:
    """A full check of one claim whose trainings are counted, and killed before a seed."""

    def __init__(self, monkeypatch, killed_at=None, conditions="Two networks."):
        self.trained, self.killed_at = [], killed_at
        claims = {"claim": Expectation("points", "> 1", "both")}
        check = Check(claims, lambda seed, progress: {}, FullCheck(claims, self.run, conditions))
        monkeypatch.setattr(reproduce, "find_check", lambda name: check)

    def run(self, seed, progress, ledger):
        return {"claim": Sample(ledger.once(f"net-seed{seed}", lambda: self.train(seed)), 0.5, 0.25)}

    def train(self, seed):
        if seed == self.killed_at:
            raise KeyboardInterrupt
        self.trained.append(seed)
        return seed + 1.5


def test_the_full_scale_goes_on_where_it_was_killed(monkeypatch, tmp_path):
    Large(monkeypatch)
    straight = run_check("wanda", 3, scale=Scale.FULL)
    first = Large(monkeypatch, killed_at=2)
    with pytest.raises(KeyboardInterrupt):
        run_check("wanda", 3, scale=Scale.FULL, folder=tmp_path / "runs")
    second = Large(monkeypatch)
    found = run_check("wanda", 3, scale=Scale.FULL, folder=tmp_path / "runs")
    assert (first.trained, second.trained) == ([0, 1], [2])
    assert found == straight
    assert found.scale is Scale.FULL
    assert found.claims[0].values == [1.5, 2.5, 3.5]
    Large(monkeypatch, conditions="Three networks.")
    with pytest.raises(SettingsError, match="Three networks"):
        run_check("wanda", 3, scale=Scale.FULL, folder=tmp_path / "runs")


def test_only_some_methods_have_a_full_scale():
    with pytest.raises(SettingsError, match=r"no check at full scale; these have one: .*bip, .*lottery"):
        run_check("snip", 1, scale=Scale.FULL)


@pytest.mark.parametrize(
    ("name", "variable"), [("lottery", "SECATEUR_DATA"), ("granet", "SECATEUR_MODELS"), ("wanda", "SECATEUR_MODELS")]
)
def test_the_full_scale_says_which_folder_is_missing(monkeypatch, tmp_path, name, variable):
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(DataError, match=f"{variable}='{tmp_path}' names no folder"):
        run_check(name, 1, scale=Scale.FULL)


def test_the_command_writes_a_page_and_numbers(monkeypatch, capsys, tmp_path):
    large = Large(monkeypatch)
    code, said = command(monkeypatch, capsys, "wanda", "--scale", "full", "--out", str(tmp_path), "--json")
    assert code == 0
    assert large.trained == [0, 1, 2]
    page = (tmp_path / "wanda.md").read_text()
    assert "# wanda, full scale: every claim shows" in page
    assert "Two networks." in page
    assert "| points | 2.5 | 0.01586 to 4.984 | 0.5 | 0.25 | > 1 | both | yes |" in page
    assert json.loads((tmp_path / "wanda.json").read_text()) == json.loads(said.out)


@pytest.mark.parametrize(
    ("words", "error"),
    [(["--scale", "huge"], "unknown scale 'huge'"), (["--keep", "runs"], "--keep is for --scale full")],
)
def test_wrong_options_of_the_command(monkeypatch, capsys, words, error):
    code, said = command(monkeypatch, capsys, "wanda", *words)
    assert code == 2
    assert error in said.err
