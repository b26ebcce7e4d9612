"""The command line. Light at the start: torch is imported by the command that needs it."""

from __future__ import annotations

import sys
from typing import Any

STOPPED = 130  # exit code after Ctrl-C or a request to end


def main() -> None:
    """Run the command line; errors of the input's making become one sentence and exit code 2."""
    from secateur.core.errors import SecateurError
    from secateur.core.signals import clean_exit_on_signals

    clean_exit_on_signals()
    try:
        sys.exit(_run())
    except SecateurError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one place that speaks to stderr
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped: nothing half-written was left behind", file=sys.stderr)  # noqa: T201
        sys.exit(STOPPED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)


def _run() -> int:
    import typer

    from secateur.cli.app import app

    # typer brings its own click or uses the installed one; its public names lead to the right classes
    usage_error: Any = typer.BadParameter.__mro__[2]
    try:
        code = app(standalone_mode=False)
    except typer.Abort:
        raise KeyboardInterrupt from None
    except usage_error as error:
        error.show()
        return int(error.exit_code)
    if code == STOPPED:  # newer versions of typer make an exit code of Ctrl-C themselves
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0
