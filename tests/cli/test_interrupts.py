"""Signals and a full disk: no partial and no temporary folder at any moment; what a kill leaves goes next time."""

import errno
import os
import random
import resource
import signal
import time

import cli_runs
import pytest
from cli_runs import files, good, run, spawn

from secateur.core.files import MARK

NET = "cli_runs:net"


def prune(*more, out="out"):
    return ["prune", NET, "--method", "random", "--sparsity", "0.5", "--data", "images", "--out", out, *more]


@pytest.fixture
def place(work, material):
    (work / "images").symlink_to(material / "images")
    return work


def names(folder):
    return sorted(path.name for path in folder.iterdir())


# --- from inside, at every single moment of the job -----------------------------------------------------


MOMENTS = {
    "opening": "secateur.lab.prune.open_model",
    "planning": "secateur.lab.prune.make_plan",
    "applying": "secateur.lab.prune.apply_",
    "measuring": "secateur.lab.prune.measure_together",
    "before writing": "secateur.lab.prune.save",
    "plan written": "secateur.core.plan.write_json",
    "weights being written": "secateur.shrink.save.save_model",
    "verifying": "secateur.shrink.save.verify_folder",
    "report": "secateur.lab.prune.write",
    "permissions": "secateur.core.files._make_readable",
    "renaming": "secateur.core.files._swap",
}


@pytest.mark.parametrize(
    ("moment", "number"),
    [(moment, signal.SIGTERM) for moment in MOMENTS]
    + [(moment, number) for moment in ("planning", "verifying") for number in (signal.SIGINT, signal.SIGHUP)],
)
@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_a_signal_at_any_moment_leaves_nothing(place, monkeypatch, moment, number, after):
    import importlib

    module, _, name = MOMENTS[moment].rpartition(".")
    module = importlib.import_module(module)
    original, reached = getattr(module, name), []

    def with_signal(*args, **kwargs):
        result = original(*args, **kwargs) if after else None
        reached.append(moment)
        os.kill(os.getpid(), number)
        time.sleep(0.01)  # the handler runs in here at the latest
        return result

    monkeypatch.setattr(module, name, with_signal)
    before = files(place)
    done = run(*prune("--trust-factory"))
    assert reached == [moment]
    if after and moment in ("renaming", "before writing"):  # the result was there, whole, before the signal came
        assert "out" in names(place)
        assert (place / "out" / "report.html").exists()
    else:
        assert files(place) == before
    assert not [name for name in names(place) if MARK in name]
    assert done.code == 130
    assert done.out == ""
    assert done.err == "stopped: nothing half-written was left behind\n"


def test_every_step_of_progress_can_be_the_last(place, monkeypatch):
    """Ctrl-C at each report of progress in turn, until the job gets through."""
    from secateur.cli.progress import Bars

    left = [0]
    original = Bars.advance

    def advance(self, steps=1):
        original(self, steps)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(Bars, "advance", advance)
    before = files(place)
    moment = 1
    while moment < 1000:
        left[0] = moment
        done = run(*prune())
        if done.code == 0:
            break
        assert done.code == 130
        assert files(place) == before
        moment += 1 if moment < 6 else 40
    assert 2 < moment < 1000
    assert names(place) == ["images", "out"]


def test_the_old_folder_survives_an_interrupted_replacement(place, monkeypatch):
    good(*prune())
    before = files(place)
    from secateur.core import files as writing

    original, calls = os.rename, []

    def rename(source, target):
        calls.append((source, target))
        if len(calls) == 2:  # the old one is aside, the new one not yet there
            raise KeyboardInterrupt
        original(source, target)

    monkeypatch.setattr(writing.os, "rename", rename)
    assert run(*prune("--force", "--seed", "1")).code == 130
    assert len(calls) >= 2
    assert files(place) == before


# --- from outside ----------------------------------------------------------------------------------------


SLOW = f"""
import sys, time
{cli_runs.HURRIED}
from secateur.shrink import save
original = save.verify_folder
def slowly(*args):
    original(*args)
    print("written", flush=True)
    time.sleep(60)
save.verify_folder = slowly
"""


def start_slow(place):
    return spawn(*prune(), cwd=place, before=SLOW)


def test_kill_leaves_a_temporary_folder_that_the_next_run_removes(place):
    process = start_slow(place)
    assert process.stdout.readline() == "written\n"
    (rest,) = [name for name in names(place) if MARK in name]
    assert not (place / "out").exists()
    good(*prune(out="living"))  # a run beside it, while it lives, leaves it alone
    assert rest in names(place)
    process.kill()
    process.communicate(timeout=60)
    assert rest in names(place)
    good("apply", "living", NET, "--out", "other")
    assert names(place) == ["images", "living", "other"]


def test_signals_at_random_moments_of_a_real_process(place):
    rng = random.Random(0)
    before = files(place)
    for number, latest in ((signal.SIGINT, 5.0), (signal.SIGTERM, 1.0)):
        process = start_slow(place)
        time.sleep(rng.uniform(0.05, latest))
        process.send_signal(number)
        _, err = process.communicate(timeout=60)
        assert process.returncode != 0
        assert files(place) == before, err


def test_stopping_a_whole_process_is_one_line(place):
    process = start_slow(place)
    assert process.stdout.readline() == "written\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "stopped: nothing half-written was left behind"
    assert "Traceback" not in err
    assert names(place) == ["images"]


# --- full disk -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [200, 3000, 20_000], ids=["plan", "weights", "report"])
def test_disk_full(place, limit):
    """A limit on the size of files is the nearest thing to a full disk that needs no privileges."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        done = run(*prune())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(f"error: disk full while writing '{place / 'out'}'")
    assert done.err.count("\n") == 1
    assert names(place) == ["images"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("target", ["write_json", "write_shard"])
def test_every_way_to_be_full_is_said(place, monkeypatch, code, target):
    from secateur.core import plan

    def full(*args, **kwargs):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(plan, target, full)
    before = files(place)
    done = run(*prune())
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("error: disk full while writing")
    assert files(place) == before


def test_a_page_that_does_not_fit(place, monkeypatch):
    good(*prune())
    before = files(place)
    from pathlib import Path

    def full(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    done = run("report", "out", "--out", "page.html")
    assert done.code == 2
    assert "disk full" in done.err
    monkeypatch.undo()
    assert files(place) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_place_that_is_not_writable(place):
    (place / "closed").mkdir(mode=0o555)
    done = run(*prune(out="closed/out"))
    assert done.code == 2
    assert "cannot write beside" in done.err
