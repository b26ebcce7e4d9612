"""The command line. Light at the start: torch is imported by the command that needs it."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; errors of the input's making become one sentence and exit code 2."""
    import click

    from secateur.cli.app import app
    from secateur.core.errors import SecateurError
    from secateur.core.signals import clean_exit_on_signals

    clean_exit_on_signals()
    try:
        code = app(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except SecateurError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201 - the one place that speaks to stderr
        sys.exit(2)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (KeyboardInterrupt, click.Abort):
        print("stopped: nothing half-written was left behind", file=sys.stderr)  # noqa: T201
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
