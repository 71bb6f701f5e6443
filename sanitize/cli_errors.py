"""How a command ends that does not finish: one line on stderr and an exit code (listed in cli.py)."""

import contextlib
import signal
from typing import Any

import click

from sanitize.errors import SanitizeError


class Command(click.Group):
    """Turns our errors into one line on stderr and an exit code."""

    def invoke(self, context: click.Context) -> Any:
        word, code = "interrupted", 130

        def terminate(*_: object) -> None:
            """SIGTERM, which a scheduler sends before it takes the machine away, ends a command as Ctrl-C does."""
            nonlocal word, code
            word, code = "terminated", 143
            raise KeyboardInterrupt

        with contextlib.suppress(ValueError):  # not the main thread: somebody else's process, whose signals stay
            signal.signal(signal.SIGTERM, terminate)
        try:
            return super().invoke(context)
        except SanitizeError as error:
            click.echo(f"error: {error}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(f"{word}; run the same command again to go on.", err=True)
            context.exit(code)
