"""The command line. Light at the start: torch is imported by the command that needs it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; errors of the input's making become one sentence and exit code 2."""
    from secateur.cli.app import app
    from secateur.core.errors import SecateurError
    from secateur.core.signals import STOPPED, StopRequest, stop_by_exception

    stop_by_exception()
    try:
        app()  # ends with SystemExit; prints what is wrong with options itself and exits with 2
    except SecateurError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one place that speaks to stderr
        sys.exit(2)
    except (StopRequest, KeyboardInterrupt):
        print("stopped: nothing half-written was left behind", file=sys.stderr)  # noqa: T201
        sys.exit(STOPPED)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
