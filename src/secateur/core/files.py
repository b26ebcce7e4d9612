"""Output folders that appear whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from secateur.core.errors import OutputError, PlanError

MARK = ".secateur-tmp-"
OLD = "-old"  # ends the name of a replaced folder for the moment between two renames
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def sweep(parent: Path) -> list[Path]:
    """Delete temporary folders that killed runs left in `parent`; folders of living runs stay.

    A folder that was about to be replaced when its run was killed is put back.
    """
    swept = []
    for path in parent.glob(f".*{MARK}*"):
        name, _, rest = path.name[1:].partition(MARK)
        pid = rest.partition("-")[0]
        if not pid.isdecimal() or _alive(int(pid)):
            continue
        if path.name.endswith(OLD) and not (parent / name).exists():
            os.rename(path, parent / name)
        shutil.rmtree(path, ignore_errors=True)
        swept.append(path)
    return swept


def check_free(target: Path, force: bool) -> None:
    """Refuse early, before any long work, to write where something already is."""
    try:
        exists = target.exists()
    except OSError as error:  # a name that is too long
        raise OutputError(f"cannot write '{target}': {error.strerror}; choose another --out") from error
    if exists and not force:
        raise OutputError(f"'{target}' exists already; choose another --out or add --force to replace it")
    if exists and not target.is_dir():
        raise OutputError(f"'{target}' is a file, not a folder; choose another --out")


@contextlib.contextmanager
def whole_folder(target: Path, force: bool = False) -> Iterator[Path]:
    """A temporary sibling of `target` to write into; renamed to `target` when the block succeeds.

    Any error, Ctrl-C included, removes the temporary folder and leaves `target` as it was. What a
    killed process leaves behind is removed by the next run beside it.

    Raises:
        OutputError: the target exists, or the disk is full or not writable.
    """
    target = Path(os.path.abspath(target))
    check_free(target, force)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        sweep(target.parent)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}{MARK}{os.getpid()}-", dir=target.parent))
    except OSError as error:
        raise OutputError(f"cannot write beside '{target}': {error.strerror}") from error
    try:
        yield temporary
        _make_readable(temporary)
        _swap(temporary, target)
    except Exception as error:
        if _is_full(error):
            raise OutputError(f"disk full while writing '{target}'; nothing was kept, free some space") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_full(error: Exception) -> bool:
    """Whether the disk, the user's quota or the process's file size limit is used up."""
    if isinstance(error, OSError):
        return error.errno in FULL
    # safetensors wraps the operating system's error in one of its own
    return any(os.strerror(code) in str(error) for code in FULL)


def _make_readable(folder: Path) -> None:
    """Temporary folders and safetensors files are private to their user; results are not."""
    folder.chmod(0o755)
    for path in folder.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        os.rename(new, target)
        return
    old = new.with_name(new.name + OLD)
    try:
        os.rename(target, old)
        os.rename(new, target)
    except BaseException:
        if old.exists() and not target.exists():
            os.rename(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, data: Any) -> None:
    """Write with sorted keys and a final newline: equal data, equal bytes."""
    path.write_text(json.dumps(data, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        PlanError: missing or not JSON; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PlanError(f"'{path}' does not exist") from None
    except (OSError, ValueError) as error:
        raise PlanError(f"'{path}' cannot be read as JSON: {error}") from error
