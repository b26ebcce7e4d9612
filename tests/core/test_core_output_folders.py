import os
import resource
import signal
import subprocess
import sys
from errno import EACCES, EDQUOT, ENOSPC

import pytest
import torch
from safetensors.torch import save_file

from secateur.core import files
from secateur.core.errors import OutputError, PlanError
from secateur.core.files import MARK, check_free, read_json, sweep, whole_folder, write_json


def left_in(folder):
    return sorted(path.name for path in folder.iterdir())


def fill(folder, text="new"):
    (folder / "sub").mkdir()
    (folder / "sub" / "file").write_text(text)


def write(target, force=False, fails_with=None):
    """Fill the folder and then raise, if asked."""
    with whole_folder(target, force) as temporary:
        fill(temporary)
        if fails_with is not None:
            raise fails_with


def content(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def old(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "precious").write_text("old")
    return folder


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_block_that_succeeds_leaves_exactly_the_target(tmp_path):
    target = tmp_path / "deep" / "out"
    with whole_folder(target) as temporary:
        assert temporary.parent == target.parent
        assert not target.exists()
        fill(temporary)
    assert left_in(tmp_path / "deep") == ["out"]
    assert content(target) == {"sub/file": "new"}
    assert not temporary.exists()


def test_results_are_readable_by_others(tmp_path):
    with whole_folder(tmp_path / "out") as temporary:
        fill(temporary)
        (temporary / "sub" / "file").chmod(0o600)
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "out", *sorted((tmp_path / "out").rglob("*")))]
    assert modes == [0o755, 0o755, 0o644]


def test_a_relative_target_stays_where_the_block_began(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with whole_folder(files.Path("out")) as temporary:
        fill(temporary)
        monkeypatch.chdir(tmp_path / "elsewhere")
    assert content(tmp_path / "out") == {"sub/file": "new"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit])
@pytest.mark.parametrize("force", [False, True])
def test_a_block_that_fails_leaves_nothing_new(tmp_path, error, force):
    target = tmp_path / "out"
    if force:
        target.mkdir()
        (target / "precious").write_text("old")
    with pytest.raises(error):
        write(target, force, error)
    assert left_in(tmp_path) == (["out"] if force else [])
    assert not force or content(target) == {"precious": "old"}


def test_an_existing_target_is_refused_before_any_work(old):
    with pytest.raises(OutputError, match=r"out' exists already; .*--force"), whole_folder(old):
        pytest.fail("the block must not run")
    assert content(old) == {"precious": "old"}
    assert left_in(old.parent) == ["out"]


def test_force_replaces_the_whole_folder(old):
    with whole_folder(old, force=True) as temporary:
        fill(temporary)
        assert content(old) == {"precious": "old"}
    assert content(old) == {"sub/file": "new"}
    assert left_in(old.parent) == ["out"]


def test_force_does_not_replace_a_file(tmp_path):
    (tmp_path / "out").write_text("no folder")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        check_free(tmp_path / "out", force=True)
    check_free(tmp_path / "free", force=False)


@pytest.mark.parametrize("fails_at", [1, 2])
@pytest.mark.parametrize("error", [KeyboardInterrupt, PermissionError(EACCES, "no")])
def test_the_old_folder_survives_a_failing_replacement(old, monkeypatch, fails_at, error):
    rename, calls = os.rename, []

    def failing(source, target):
        calls.append(source)
        if len(calls) == fails_at:
            raise error
        rename(source, target)

    monkeypatch.setattr(files.os, "rename", failing)
    with pytest.raises((KeyboardInterrupt, PermissionError)):
        write(old, force=True)
    assert content(old) == {"precious": "old"}
    assert left_in(old.parent) == ["out"]


# --- what killed runs leave ---------------------------------------------------------------------


def test_the_next_run_sweeps_what_a_dead_process_left(tmp_path):
    stale = tmp_path / f".other{MARK}{dead_pid()}-abc"
    living = tmp_path / f".other{MARK}{os.getppid()}-abc"
    own = tmp_path / f".other{MARK}{os.getpid()}-abc"
    unrelated = [tmp_path / name for name in (".other", f".other{MARK}x-abc", f"visible{MARK}{dead_pid()}-a")]
    for folder in (stale, living, own, *unrelated):
        folder.mkdir()
        (folder / "file").write_text("x")
    with whole_folder(tmp_path / "out") as temporary:
        fill(temporary)
    assert left_in(tmp_path) == sorted(path.name for path in (living, own, *unrelated, tmp_path / "out"))


def test_a_process_of_another_user_counts_as_living(tmp_path, monkeypatch):
    def not_allowed(pid, number):
        raise PermissionError

    monkeypatch.setattr(files.os, "kill", not_allowed)
    (tmp_path / f".out{MARK}123-abc").mkdir()
    assert sweep(tmp_path) == []


def test_a_run_killed_between_the_two_renames_loses_nothing(tmp_path):
    pid = dead_pid()
    fill(_made(tmp_path / f".out{MARK}{pid}-abc"), "half")
    fill(_made(tmp_path / f".out{MARK}{pid}-abc-old"), "old")
    sweep(tmp_path)
    assert left_in(tmp_path) == ["out"]
    assert content(tmp_path / "out") == {"sub/file": "old"}


def test_a_run_killed_after_the_second_rename_keeps_the_new_folder(tmp_path):
    fill(_made(tmp_path / "out"), "new")
    fill(_made(tmp_path / f".out{MARK}{dead_pid()}-abc-old"), "old")
    sweep(tmp_path)
    assert left_in(tmp_path) == ["out"]
    assert content(tmp_path / "out") == {"sub/file": "new"}


def _made(folder):
    folder.mkdir()
    return folder


WAITS = """
import sys, time
from pathlib import Path
from secateur.core.files import whole_folder
from secateur.core.signals import stop_by_exception
stop_by_exception()
with whole_folder(Path(sys.argv[1])) as temporary:
    (temporary / "part").write_text("x")
    print("ready", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_signal_leaves_no_partial_folder(tmp_path, number):
    process = subprocess.Popen([sys.executable, "-c", WAITS, str(tmp_path / "out")], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        assert len(left_in(tmp_path)) == 1
        process.send_signal(number)
        assert process.wait(30) != 0
    finally:
        process.kill()
        process.wait()
    assert not (tmp_path / "out").exists()
    assert bool(left_in(tmp_path)) == (number == signal.SIGKILL)
    sweep(tmp_path)
    assert left_in(tmp_path) == []


# --- full disks ---------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [ENOSPC, EDQUOT])
@pytest.mark.parametrize("kind", ["python", "safetensors"])
def test_a_full_disk_is_said_in_one_sentence(old, code, kind):
    error = OSError(code, os.strerror(code))
    if kind == "safetensors":
        error = RuntimeError(f"Error while serializing: I/O error: {error.strerror} (os error {code})")
    with pytest.raises(OutputError, match=r"disk full while writing '.*out'; nothing was kept"):
        write(old, True, error)
    assert content(old) == {"precious": "old"}
    assert left_in(old.parent) == ["out"]


@pytest.mark.parametrize("writer", ["python", "safetensors"])
def test_a_real_write_that_does_not_fit(tmp_path, writer):
    def write_much():
        with whole_folder(tmp_path / "out") as temporary:
            if writer == "python":
                (temporary / "big").write_bytes(bytes(1 << 23))
            else:
                save_file({"x": torch.zeros(1 << 23, dtype=torch.uint8)}, temporary / "big.safetensors")

    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 22, limit[1]))
    try:
        with pytest.raises(OutputError, match="disk full"):
            write_much()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert left_in(tmp_path) == []


def test_other_errors_are_not_taken_for_a_full_disk(tmp_path):
    for error in (PermissionError(EACCES, "no"), ValueError("something else")):
        with pytest.raises(type(error)) as raised:
            write(tmp_path / "out", fails_with=error)
        assert raised.value is error


def test_a_parent_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"cannot write beside '.*file/out': "):
        write(tmp_path / "file" / "out", fails_with=AssertionError("the block must not run"))


# --- JSON ---------------------------------------------------------------------------------------


def test_json_of_equal_data_is_equal_bytes(tmp_path):
    write_json(tmp_path / "a", {"b": [1, "ü"], "a": None})
    write_json(tmp_path / "b", {"a": None, "b": [1, "ü"]})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_text().endswith("}\n")
    assert read_json(tmp_path / "a") == {"a": None, "b": [1, "ü"]}


def test_unreadable_json_names_the_file(tmp_path):
    with pytest.raises(PlanError, match="gone' does not exist"):
        read_json(tmp_path / "gone")
    with pytest.raises(PlanError, match="cannot be read as JSON"):
        read_json(tmp_path)
    (tmp_path / "half").write_text('{"a": ')
    with pytest.raises(PlanError, match="half' cannot be read as JSON"):
        read_json(tmp_path / "half")
